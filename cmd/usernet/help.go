package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// showHelp is what a command does that is nothing without one below it.
func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// helpWidth is that of a terminal nobody has resized.
const helpWidth = 80

// printHelp prints the help of a command, its flags in groups.
func printHelp(cmd *cobra.Command, groups []group) {
	w := cmd.OutOrStdout()
	about := cmd.Long
	if about == "" {
		about = cmd.Short
	}
	fmt.Fprintf(w, "%s\n\nUsage:\n  %s\n", strings.TrimSpace(about), cmd.UseLine())
	if cmd.Example != "" {
		fmt.Fprintf(w, "\nExamples:\n%s\n", strings.Trim(cmd.Example, "\n"))
	}
	printCommands(w, cmd)
	for _, g := range groups {
		fmt.Fprintf(w, "\n%s:\n%s", g.title, g.flags.FlagUsagesWrapped(helpWidth))
	}
	if len(groups) == 0 && cmd.Flags().HasAvailableFlags() {
		fmt.Fprintf(w, "\nFlags:\n%s", cmd.Flags().FlagUsagesWrapped(helpWidth))
	}
	if footer := cmd.Annotations[footerKey]; footer != "" {
		fmt.Fprintf(w, "\n%s\n", strings.TrimSpace(footer))
	}
}

// footerKey annotates a command with what its help ends with.
const footerKey = "usernet_footer"

func printCommands(w io.Writer, cmd *cobra.Command) {
	if !cmd.HasAvailableSubCommands() {
		return
	}
	fmt.Fprintf(w, "\nCommands:\n")
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			fmt.Fprintf(w, "  %-12s%s\n", c.Name(), c.Short)
		}
	}
}

// noArguments refuses arguments; to a command that has others below it an
// argument is one that it does not have.
func noArguments(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasAvailableSubCommands():
		return usagef("read arguments: %s takes none, but got %q", cmd.CommandPath(), args[0])
	}
	names := make([]string, 0, 8)
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	slices.Sort(names)
	hint := "there are " + strings.Join(names, ", ")
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = fmt.Sprintf("did you mean %q?", near[0])
	}
	of := ""
	if cmd.HasParent() {
		of = " of " + cmd.CommandPath()
	}
	return usagef("run command %q: there is none of that name%s: %s", args[0], of, hint)
}
