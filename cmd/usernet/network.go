package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/usernet/usernet"
)

// newNetwork makes the command about networks of several guests.
func newNetwork() *cobra.Command {
	cmd := &cobra.Command{
		Use: "network", Short: "Show and end networks that guests share", Args: noArguments, DisableFlagsInUseLine: true,
		Long: `
Show and end networks that guests share.

A guest joins one with --network NAME, of usernet and of usernet run. The first
starts it, the last ends it.`,
		RunE: showHelp,
	}
	cmd.AddCommand(newNetworkList(), newNetworkInspect(), newNetworkRemove())
	return cmd
}

func newNetworkList() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use: "list", Short: "List the networks of this user", Args: noArguments, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := usernet.SharedNetworks(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				if all == nil {
					all = []usernet.SharedNetwork{}
				}
				return printJSON(cmd.OutOrStdout(), map[string]any{"networks": all})
			}
			rows := make([][]string, len(all))
			for i, n := range all {
				six := "-"
				if n.IPv6 != nil {
					six = n.IPv6.Prefix.String()
				}
				rows[i] = []string{n.Name, n.IPv4.Prefix.String(), six, fmt.Sprint(len(n.Members)), seconds(time.Since(n.Since).Seconds())}
			}
			return table(cmd.OutOrStdout(), "NAME\tIPV4\tIPV6\tMEMBERS\tAGE", rows)
		},
	}
	addGroups(cmd, outputGroup(&asJSON))
	return cmd
}

func newNetworkInspect() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use: "inspect NAME", Short: "Show a network and its members", Args: oneNetwork, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := usernet.InspectNetwork(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), n)
			}
			return printNetwork(cmd.OutOrStdout(), n)
		},
	}
	addGroups(cmd, outputGroup(&asJSON))
	return cmd
}

func printNetwork(w io.Writer, n usernet.SharedNetwork) error {
	fmt.Fprintf(w, "network %s, hub %d, MTU %d\n", n.Name, n.HubPID, n.MTU)
	for _, s := range []*usernet.Subnet{&n.IPv4, n.IPv6} {
		if s != nil && s.Prefix.IsValid() {
			fmt.Fprintf(w, "subnet %v, gateway %v, DNS %v\n", s.Prefix, s.Gateway, s.DNS)
		}
	}
	if s := n.Switch; s != nil {
		fmt.Fprintf(w, "frames between members %d (%s), to groups %d; dropped: %d spoofed, %d isolated, %d to nobody, %d above the bound for groups, %d refused inside\n",
			s.Forwarded, size(s.ForwardedBytes), s.Flooded, s.Spoofed, s.Isolated, s.Unknown, s.FloodLimited, s.Refused)
	}
	fmt.Fprintln(w)
	rows := make([][]string, len(n.Members))
	for i, m := range n.Members {
		addrs := make([]string, len(m.Addrs))
		for i, a := range m.Addrs {
			addrs[i] = a.String()
		}
		rows[i] = []string{
			orDash(m.Name), orDash(strings.Join(m.Aliases, ",")), strings.Join(addrs, ","), m.MAC,
			orDash(strings.Join(m.Forwards, " ")), fmt.Sprint(m.PID), seconds(time.Since(m.Since).Seconds()),
		}
	}
	return table(w, "NAME\tALIASES\tADDRESSES\tMAC\tFORWARDS\tPID\tAGE", rows)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newNetworkRemove() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "remove NAME", Short: "End a network", Args: oneNetwork, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return usernet.RemoveNetwork(cmd.Context(), args[0], force)
		},
	}
	f := newFlagSet()
	f.BoolVarP(&force, "force", "f", false, "even if it has members, which end then")
	addGroups(cmd, []group{{"Caution", f}})
	return cmd
}

func outputGroup(asJSON *bool) []group {
	f := newFlagSet()
	f.BoolVar(asJSON, "json", false, "print JSON")
	return []group{{"Output", f}}
}

func oneNetwork(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usagef("read arguments: %s needs the name of a network, `usernet network list` shows them", cmd.CommandPath())
	}
	return nil
}
