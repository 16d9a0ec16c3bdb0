package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/usernet/usernet"
)

// newRoot returns the command line: `usernet` itself attaches, and below it are
// the other commands.
func newRoot() *cobra.Command {
	var a attach
	cmd := &cobra.Command{
		Use:   "usernet {--netns PATH | --pid PID | --tap-fd N} [flags]",
		Short: "Give a network namespace a network, without privileges",
		Long: `
usernet gives a network namespace a network, without privileges.

It puts an interface into the namespace and serves what comes out of it as
sockets of its own: TCP, UDP and ping, IPv4 and IPv6, with DHCP and DNS. It
stays in the foreground until SIGTERM or SIGINT, the hang-up of --exit-fd, or
the end of the namespace, and leaves nothing behind.

The host's loopback is closed to the guest unless --host-loopback or
--host-port opens it. So are link-local addresses, and those where clouds serve
credentials, unless an --allow rule names them.`,
		Example: `
  # A shell in a namespace of its own, and a network for it:
  unshare -Urn sh -c 'echo $$; exec sh'     # in one terminal, prints its PID
  usernet --pid PID                         # in another

  # The same in one command:
  usernet run -- sh

  # As a runtime would: 7 gets "1" when ready, the end of 8 ends usernet.
  usernet --netns /proc/$PID/ns/net --ready-fd 7 --exit-fd 8`,
		Annotations: map[string]string{footerKey: `
Names that the guest can look up: host.usernet.internal (also
host.containers.internal, host.docker.internal) and gateway.usernet.internal.

Exit status: 0 ended by signal, hang-up or the namespace's end, 1 failure,
2 bad arguments.`},
		Args:                  noArguments,
		RunE:                  func(cmd *cobra.Command, _ []string) error { return a.serve(cmd) },
		SilenceErrors:         true,
		SilenceUsage:          true,
		DisableFlagsInUseLine: true,
		Version:               version().String(),
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.SetVersionTemplate("{{.Version}}\n")
	cobra.EnableCommandSorting = false
	addGroups(cmd, a.groups())
	for _, c := range []*cobra.Command{newRun(), newForward(), newFlows(), newLeases(), newNetwork(), newDNS(), newStats(), newInfo(), newCapture(), newLogLevel(), newSlirp(), newDoctor(), newVersion()} {
		cmd.AddCommand(c)
	}
	return cmd
}

// initCompletion adds the command that writes scripts for shells. It takes its
// output from its parent at this time, so that has to be set.
func initCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() != "completion" {
			continue
		}
		c.Use, c.Args, c.RunE = "completion SHELL", noArguments, showHelp
		c.DisableFlagsInUseLine = true
		for _, shell := range c.Commands() {
			shell.Args = noArguments
		}
	}
}

// attach is the command `usernet` without another.
type attach struct {
	networkFlags
	tapFD, readyFD, exitFD int
	pidFile, socketPath    string
}

func (a *attach) groups() []group {
	target, life := newFlagSet(), newFlagSet()
	c := &a.config
	define(target, &c.NetnsPath, "netns", "PATH", "", text,
		"attach to this network namespace: /proc/PID/ns/net, a bind mount, or a name of ip-netns")
	define(target, &c.PID, "pid", "PID", 0, positive, "attach to the network namespace of this process")
	define(target, &a.tapFD, "tap-fd", "N", 0, positive, "serve the TAP that is open as descriptor N")

	define(life, &a.readyFD, "ready-fd", "N", 0, number,
		"write 1 to descriptor N when the guest can use the network; close it without that on failure")
	define(life, &a.exitFD, "exit-fd", "N", 0, number, "end when the other end of descriptor N is closed")
	define(life, &a.pidFile, "pid-file", "PATH", "", text, "write the process id to this file, and remove it at the end")
	define(life, &a.socketPath, "api-socket", "PATH", "", text,
		socketUsage)
	groups := append([]group{{"Namespace (one of these is needed)", target}}, a.networkFlags.groups("info")...)
	last := len(groups) - 1
	return append(groups[:last:last], group{"Lifetime", life}, groups[last])
}

func positive(s string) (int, error) {
	n, err := number(s)
	if err == nil && n <= 0 {
		return 0, errors.New("not a positive number")
	}
	return n, err
}

// serve attaches and serves until something ends it.
func (a *attach) serve(cmd *cobra.Command) error {
	targets := 0
	for _, name := range []string{"netns", "pid", "tap-fd"} {
		if cmd.Flags().Changed(name) {
			targets++
		}
	}
	if targets != 1 {
		return usagef("choose namespace: give one of --netns PATH, --pid PID and --tap-fd N: `usernet --help` tells more, `usernet run -- COMMAND` makes a namespace")
	}
	ready, exit, err := a.descriptors(cmd)
	if err != nil {
		return err
	}
	a.settle(cmd)
	log, flush := a.logger(cmd.ErrOrStderr())
	defer flush()
	a.config.Logger = log
	if err := a.config.Validate(); err != nil {
		return err
	}
	ctx, stop := untilSignal(cmd.Context())
	defer stop()
	if a.pidFile != "" {
		f, err := writePIDFile(a.pidFile)
		if err != nil {
			return err
		}
		defer f.remove()
		a.config.Cleanup = []string{f.path}
	}
	s, err := listen(a.socketPath, a.config, a.config.Logger)
	if err != nil {
		return err
	}
	defer s.close()
	a.config.Cleanup = append(a.config.Cleanup, s.paths()...)
	closePcap, err := a.openPcap(&a.config)
	if err != nil {
		return err
	}
	defer closePcap()
	n, err := usernet.New(a.config)
	if err != nil {
		return err
	}
	defer s.serve(ctx, n, &a.levelVar, a.config.Logger)()
	tell := func() { tellChosen(cmd.OutOrStdout(), a.config.Publish, n.Forwards()) }
	return serve(ctx, n, ready, exit, tell, a.config.Logger)
}

// descriptors takes over those that flags name.
func (a *attach) descriptors(cmd *cobra.Command) (ready, exit *os.File, err error) {
	given := make(map[int]string)
	for _, f := range []struct {
		name string
		fd   int
		to   **os.File
		take func(string, int) (*os.File, error)
	}{
		{"ready-fd", a.readyFD, &ready, inheritWritable},
		{"exit-fd", a.exitFD, &exit, inherit},
		{"tap-fd", a.tapFD, &a.config.TapFile, inherit},
	} {
		if !cmd.Flags().Changed(f.name) {
			continue
		}
		if other, ok := given[f.fd]; ok {
			return nil, nil, usagef("set --%s %d: that descriptor is --%s already: open another", f.name, f.fd, other)
		}
		given[f.fd] = f.name
		if *f.to, err = f.take(f.name, f.fd); err != nil {
			return nil, nil, err
		}
	}
	// An open TAP has no namespace to configure, and its interface has a name.
	if a.config.TapFile != nil {
		for _, name := range []string{"link", "ifname", "configure"} {
			if cmd.Flags().Changed(name) {
				return nil, nil, usagef("set --%s: it is about a namespace, and --tap-fd gives an open TAP: leave one out", name)
			}
		}
		a.config.Configure = usernet.ConfigureNone
	}
	return ready, exit, nil
}

// serve runs a network until ctx is done or the hang-up of exit. What tell has
// to say comes before it is ready.
func serve(ctx context.Context, n *usernet.Network, ready, exit *os.File, tell func(), log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	if exit != nil {
		helpers.Go(func() {
			switch err := waitHangup(ctx, exit); {
			case err == nil:
				log.Info("ending: the exit-fd was hung up")
				cancel()
			case ctx.Err() == nil:
				log.Warn("the exit-fd is no longer watched", "err", err)
			}
		})
	}
	helpers.Go(func() { announce(ctx, n, ready, tell, log) })
	tuneRuntime(ctx, n.Ready())
	return n.Run(ctx)
}

// announce tells those who wait when the network is ready, and the service
// manager also when it ends.
func announce(ctx context.Context, n *usernet.Network, ready *os.File, tell func(), log *slog.Logger) {
	if ready != nil {
		defer ready.Close()
	}
	select {
	case <-n.Ready():
	case <-ctx.Done():
		return
	}
	tell()
	if ready != nil {
		if err := signalReady(ready); err != nil {
			log.Warn("nobody waits for usernet to be ready", "err", err)
		}
	}
	if err := notifySystemd("READY=1", "STATUS=Serving"); err != nil {
		log.Warn("cannot tell the service manager", "err", err)
	}
	<-ctx.Done()
	_ = notifySystemd("STOPPING=1")
}

// tellChosen writes a line for every published port that was to be any free one.
func tellChosen(w io.Writer, asked []usernet.Forward, got []usernet.ForwardInfo) {
	for i, f := range asked {
		if f.HostPath == "" && f.Host.Port() == 0 && i < len(got) {
			fmt.Fprintf(w, "published %v\n", got[i].Forward)
		}
	}
}
