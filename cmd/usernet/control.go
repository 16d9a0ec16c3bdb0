package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"sort"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/control"
	"github.com/usernet/usernet/internal/netns"
)

// ask is what the commands have in common that speak to a running usernet.
type ask struct {
	socket, netns string
	pid           int
	json          bool
}

// groups defines the flags.
func (a *ask) groups() []group {
	which, out := newFlagSet(), newFlagSet()
	define(which, &a.netns, "netns", "PATH", "", text, "the network of this namespace")
	define(which, &a.pid, "pid", "PID", 0, positive, "the network of this process")
	define(which, &a.socket, "api-socket", "PATH", "", text, "the network with this control socket")
	out.BoolVar(&a.json, "json", false, "print JSON")
	return []group{{"Which network (not needed where the user has only one)", which}, {"Output", out}}
}

// command makes one of these commands.
func (a *ask) command(use, short string, args cobra.PositionalArgs, run func(cmd *cobra.Command, c *control.Client, args []string) error) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: args, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.find(cmd)
			if err != nil {
				return err
			}
			return run(cmd, c, args)
		},
	}
	addGroups(cmd, a.groups())
	return cmd
}

// find finds the network that is meant.
func (a *ask) find(cmd *cobra.Command) (*control.Client, error) {
	given := 0
	for _, name := range []string{"netns", "pid", "api-socket"} {
		if cmd.Flags().Changed(name) {
			given++
		}
	}
	switch {
	case given > 1:
		return nil, usagef("choose network: give one of --netns PATH, --pid PID and --api-socket PATH")
	case a.socket != "":
		return control.NewClient(a.socket), nil
	case given == 1:
		return a.ofNamespace()
	}
	switch live := control.Live(); len(live) {
	case 1:
		return control.NewClient(live[0]), nil
	case 0:
		if control.DefaultDir() == "" {
			return nil, fmt.Errorf("find network: %s", runtimeDirHint())
		}
		return nil, fmt.Errorf("find network: no usernet has its control socket in %s: start one, or give --api-socket PATH", control.DefaultDir())
	default:
		return nil, usagef("choose network: there are %d: give --netns PATH, --pid PID or --api-socket with one of %s", len(live), strings.Join(live, ", "))
	}
}

// ofNamespace finds the network of a namespace by its default socket.
func (a *ask) ofNamespace() (*control.Client, error) {
	var (
		ns  *netns.Namespace
		err error
	)
	if a.pid != 0 {
		ns, err = netns.OpenPID(a.pid)
	} else {
		ns, err = netns.Open(a.netns)
	}
	if err != nil {
		return nil, fmt.Errorf("find network: %w", err)
	}
	defer ns.Close()
	switch started := cniSockets(ns.Inode()); len(started) {
	case 0:
	case 1:
		return control.NewClient(started[0]), nil
	default:
		return nil, usagef("choose network: that namespace has %d: give --api-socket with one of %s", len(started), strings.Join(started, ", "))
	}
	if control.DefaultDir() == "" {
		return nil, fmt.Errorf("find network: %s", runtimeDirHint())
	}
	path := control.DefaultPath(ns.Inode())
	if unix.Access(path, unix.F_OK) != nil {
		return nil, fmt.Errorf("find network: no usernet of this user serves that namespace with its control socket at %s: start one, or give --api-socket PATH", path)
	}
	return control.NewClient(path), nil
}

// show prints the answer to a GET: as it is, or as text.
func (a *ask) show(cmd *cobra.Command, c *control.Client, path string, text func(io.Writer, []byte) error) error {
	b, err := c.Call(cmd.Context(), "GET", path, nil)
	if err != nil {
		return err
	}
	if a.json {
		_, err = cmd.OutOrStdout().Write(b)
		return err
	}
	return text(cmd.OutOrStdout(), b)
}

// table prints rows in columns.
func table(w io.Writer, head string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, head)
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	return t.Flush()
}

// printJSON prints what a command has made.
func printJSON(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }

func newForward() *cobra.Command {
	cmd := &cobra.Command{Use: "forward COMMAND", Short: "Publish ports of a running network, list them, end them", Args: noArguments, RunE: showHelp, DisableFlagsInUseLine: true}
	var add, list, remove ask
	cmd.AddCommand(
		add.command("add SPEC...", "Publish ports, each SPEC as --publish takes it", atLeastOne("a port, as 8080:80"),
			func(cmd *cobra.Command, c *control.Client, specs []string) error {
				var all []control.Forward
				for _, spec := range specs {
					added, err := c.AddForward(cmd.Context(), spec)
					if err != nil {
						return err
					}
					all = append(all, added...)
				}
				return printForwards(cmd.OutOrStdout(), all, add.json)
			}),
		list.command("list", "List the published ports", noArguments,
			func(cmd *cobra.Command, c *control.Client, _ []string) error {
				all, err := c.Forwards(cmd.Context())
				if err != nil {
					return err
				}
				return printForwards(cmd.OutOrStdout(), all, list.json)
			}),
		remove.command("remove ID...", "End forwards; connections that they have let in go on", atLeastOne("an id, `usernet forward list` shows them"),
			each(func(ctx context.Context, c *control.Client, id string) error { return c.RemoveForward(ctx, id) })),
	)
	return cmd
}

// atLeastOne refuses no arguments, telling what is missing.
func atLeastOne(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef("read arguments: %s needs %s", cmd.CommandPath(), what)
		}
		return nil
	}
}

// each does something with every argument.
func each(do func(context.Context, *control.Client, string) error) func(*cobra.Command, *control.Client, []string) error {
	return func(cmd *cobra.Command, c *control.Client, args []string) error {
		for _, arg := range args {
			if err := do(cmd.Context(), c, arg); err != nil {
				return fmt.Errorf("%s %s: %w", cmd.Name(), arg, err)
			}
		}
		return nil
	}
}

func printForwards(w io.Writer, all []control.Forward, asJSON bool) error {
	if asJSON {
		return printJSON(w, map[string]any{"forwards": all})
	}
	rows := make([][]string, len(all))
	for i, f := range all {
		host := f.Host
		if f.HostPath != "" {
			host = "unix:" + f.HostPath
		}
		guest := f.Guest
		if f.Proxy != 0 {
			guest += fmt.Sprintf(" (PROXY v%d)", f.Proxy)
		}
		if f.Auto {
			guest += " (auto)"
		}
		rows[i] = []string{f.ID, f.Protocol, host, guest}
	}
	return table(w, "ID\tPROTO\tHOST\tGUEST", rows)
}

func newFlows() *cobra.Command {
	var list, kill ask
	watch := false
	cmd := list.command("flows [--watch]", "Show who talks to whom", noArguments, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		if watch {
			return watchFlows(cmd.Context(), cmd.OutOrStdout(), c, list.json)
		}
		return list.show(cmd, c, "/v1/flows", func(w io.Writer, b []byte) error {
			var l struct{ Flows []usernet.Flow }
			if err := json.Unmarshal(b, &l); err != nil {
				return err
			}
			return printFlows(w, l.Flows, nil)
		})
	})
	look := newFlagSet()
	look.BoolVarP(&watch, "watch", "w", false, "show them anew every second, the busiest first, until interrupted")
	addGroups(cmd, append(list.groups(), group{"Repetition", look}))
	cmd.AddCommand(kill.command("kill ID...", "End flows: both ends of a TCP connection get a reset", atLeastOne("an id, `usernet flows` shows them"),
		each(func(ctx context.Context, c *control.Client, id string) error { return c.KillFlow(ctx, id) })))
	return cmd
}

// watchFlows prints the flows every second until ctx is done.
func watchFlows(ctx context.Context, w io.Writer, c *control.Client, asJSON bool) error {
	ctx, stop := untilSignal(ctx)
	defer stop()
	before := make(map[string]usernet.Flow)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		flows, err := c.Flows(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case asJSON:
			err = printJSON(w, map[string]any{"flows": flows}) // one line each time
		default:
			fmt.Fprint(w, "\x1b[H\x1b[2J") // home, and clear (ECMA-48)
			err = printFlows(w, flows, before)
		}
		if err != nil {
			return err
		}
		clear(before)
		for _, f := range flows {
			before[f.ID] = f
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// printFlows prints flows, with their rates where it is known what they were a
// second before.
func printFlows(w io.Writer, flows []usernet.Flow, before map[string]usernet.Flow) error {
	up, down := "UP", "DOWN"
	if before != nil {
		up, down = "UP/S", "DOWN/S"
		for i := range flows {
			f := &flows[i]
			b := before[f.ID]
			f.Up, f.Down = f.Up-b.Up, f.Down-b.Down
		}
		sort.SliceStable(flows, func(i, j int) bool { return flows[i].Up+flows[i].Down > flows[j].Up+flows[j].Down })
	}
	rows := make([][]string, len(flows))
	for i, f := range flows {
		arrow := "->"
		if f.Direction == "inbound" {
			arrow = "<-"
		}
		remote := f.Remote.String()
		if f.Host.IsValid() && f.Host != f.Remote {
			remote += " (" + f.Host.String() + ")"
		}
		guest := f.Guest.String()
		if f.Member != "" {
			guest += " (" + f.Member + ")"
		}
		rows[i] = []string{f.ID, f.Protocol, guest, arrow, remote, f.State, size(f.Up), size(f.Down), seconds(f.Age), seconds(f.Idle)}
	}
	return table(w, "ID\tPROTO\tGUEST\t\tREMOTE\tSTATE\t"+up+"\t"+down+"\tAGE\tIDLE", rows)
}

// size writes a number of bytes in three or four digits.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprint(n)
	}
	v, i := float64(n)/1024, 0
	for ; v >= 999.5 && i < len(units)-1; i++ {
		v /= 1024
	}
	if v < 9.95 {
		return fmt.Sprintf("%.1f%c", v, units[i])
	}
	return fmt.Sprintf("%.0f%c", v, units[i])
}

func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}

func newLeases() *cobra.Command {
	var a ask
	return a.command("leases", "Show the addresses that DHCP has given", noArguments, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		return a.show(cmd, c, "/v1/leases", func(w io.Writer, b []byte) error {
			var l struct{ Leases []usernet.Lease }
			if err := json.Unmarshal(b, &l); err != nil {
				return err
			}
			rows := make([][]string, len(l.Leases))
			for i, x := range l.Leases {
				state := "leased"
				if x.Offered {
					state = "offered"
				}
				addr := x.Addr.String()
				if x.Member != "" {
					addr += " (" + x.Member + ")"
				}
				rows[i] = []string{addr, x.MAC, printable(x.Hostname), state, seconds(time.Until(x.Expires).Seconds())}
			}
			return table(w, "ADDRESS\tMAC\tHOSTNAME\tSTATE\tEXPIRES IN", rows)
		})
	})
}

// printable makes what a guest has chosen fit for a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

func newStats() *cobra.Command {
	var a ask
	return a.command("stats", "Show counters of a running network", noArguments, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		return a.show(cmd, c, "/v1/stats", printFields)
	})
}

func newInfo() *cobra.Command {
	var a ask
	return a.command("info", "Show what a running network is", noArguments, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		return a.show(cmd, c, "/v1/info", printFields)
	})
}

// printFields prints the members of a JSON object, one on a line, in their order.
func printFields(w io.Writer, b []byte) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if err := fields(t, json.NewDecoder(strings.NewReader(string(b))), ""); err != nil {
		return err
	}
	return t.Flush()
}

func fields(w io.Writer, d *json.Decoder, prefix string) error {
	d.UseNumber()
	if _, err := d.Token(); err != nil { // the brace
		return err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return err
		}
		path := prefix + fmt.Sprint(name)
		if raw[0] == '{' {
			if err := fields(w, json.NewDecoder(strings.NewReader(string(raw))), path+"."); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(w, "%s\t%s\n", path, strings.Trim(string(raw), `"`))
	}
	return nil
}

func newDNS() *cobra.Command {
	cmd := &cobra.Command{Use: "dns COMMAND", Short: "Show and change the names that a running network answers", Args: noArguments, RunE: showHelp, DisableFlagsInUseLine: true}
	var list, add, set, remove ask
	change := func(a *ask, use, short string, do func(*control.Client, context.Context, string, []netip.Addr) error) *cobra.Command {
		return a.command(use, short, nameAndAddresses, func(cmd *cobra.Command, c *control.Client, args []string) error {
			var addrs []netip.Addr
			for _, a := range args[1:] {
				addrs = append(addrs, netip.MustParseAddr(a))
			}
			return do(c, cmd.Context(), args[0], addrs)
		})
	}
	cmd.AddCommand(
		list.command("list", "List the names", noArguments, func(cmd *cobra.Command, c *control.Client, _ []string) error {
			return list.show(cmd, c, "/v1/dns", func(w io.Writer, b []byte) error {
				var l struct{ Records []usernet.Record }
				if err := json.Unmarshal(b, &l); err != nil {
					return err
				}
				rows := make([][]string, len(l.Records))
				for i, r := range l.Records {
					rows[i] = []string{r.Name, strings.Trim(fmt.Sprint(r.Addrs), "[]")}
				}
				return table(w, "NAME\tADDRESSES", rows)
			})
		}),
		change(&add, "add NAME ADDR...", "Give a name addresses beside those it has", (*control.Client).AddRecord),
		change(&set, "set NAME ADDR...", "Give a name its addresses, in place of those it had", (*control.Client).SetRecord),
		remove.command("remove NAME...", "Take names away", atLeastOne("a name, `usernet dns list` shows them"),
			each(func(ctx context.Context, c *control.Client, name string) error { return c.RemoveRecord(ctx, name) })),
	)
	return cmd
}

// nameAndAddresses refuses other arguments.
func nameAndAddresses(cmd *cobra.Command, args []string) error {
	if len(args) < 2 {
		return usagef("read arguments: %s needs a name and an address", cmd.CommandPath())
	}
	for _, a := range args[1:] {
		if _, err := address(a); err != nil {
			return usagef("read arguments: %q: %v", a, err)
		}
	}
	return nil
}

func newLogLevel() *cobra.Command {
	var a ask
	return a.command("log-level [debug|info|warn|error]", "Show or set the log level of a running network", func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			return usagef("read arguments: %s takes one level", cmd.CommandPath())
		}
		return nil
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		if len(args) == 1 {
			return c.SetLevel(cmd.Context(), args[0])
		}
		level, err := c.Level(cmd.Context())
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), map[string]string{"level": level})
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), level)
		return err
	})
}
