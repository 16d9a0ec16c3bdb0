package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// runFlags is the command `usernet run`.
type runFlags struct {
	networkFlags
	keepID     bool
	socketPath string
}

func newRun() *cobra.Command {
	var r runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] [--] COMMAND [ARGUMENT...]",
		Short: "Run a command in a namespace of its own, with a network",
		Long: `
Run a command in user, network and mount namespaces of its own, with a network.

The command starts when the network is ready. It sees the same files, but for
a resolv.conf that leads to usernet's DNS server, and is root in its user
namespace, which gives it no rights outside: the files it makes are the user's.
Neither root nor /etc/subuid is needed. Signals are passed on to it, and what it
leaves running is ended with it.`,
		Example: `
  usernet run -- curl https://example.com
  usernet run --host-port 5432 -- make test        # may use the host's database
  usernet run --deny 10.0.0.0/8 -- sh`,
		Annotations: map[string]string{footerKey: `
Exit status: that of the command, 128+N if signal N has ended it, 127 if it was
not found, 126 if it cannot be executed; 1 if usernet failed, 2 bad arguments.`},
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("run command: none given: write `usernet run -- COMMAND`")
			}
			return nil
		},
		RunE:                  func(cmd *cobra.Command, args []string) error { return r.run(cmd, args) },
		DisableFlagsInUseLine: true,
	}
	// The log goes between the lines of the command, so it is short.
	groups := r.groups("warn")
	user := newFlagSet()
	user.BoolVar(&r.keepID, "keep-id", false,
		"keep the user's id inside, with the right to configure the network, instead of root's")
	control := newFlagSet()
	define(control, &r.socketPath, "api-socket", "PATH", "", text, socketUsage)
	addGroups(cmd, append(append([]group{{"User", user}}, groups...), group{"Control, not by the command", control}))
	cmd.Flags().SetInterspersed(false) // flags after the command are its own
	return cmd
}

// The signals that the command gets if usernet does: those that end a process,
// usernet too as long as there is no command, and those that do not. The stops of
// job control come by the terminal.
var (
	deadly   = []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM}
	harmless = []syscall.Signal{unix.SIGWINCH, unix.SIGCONT}
)

// run makes the namespaces, gives them a network, and runs the command.
func (r *runFlags) run(cmd *cobra.Command, command []string) error {
	r.settle(cmd)
	c := r.config
	log, flush := r.logger(cmd.ErrOrStderr())
	defer flush()
	c.Logger = log
	c.PID = os.Getpid() // until there is the right one
	if err := c.Validate(); err != nil {
		return err
	}
	signals := make(chan os.Signal, 16)
	notify(signals, deadly)
	defer signal.Stop(signals)

	var early setup // of a shared network the addresses are not known yet
	if c.Network == "" {
		early = newSetup(c, c.DNSSearch)
	}
	s, err := startSpaces(command, r.keepID, early, streams{cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()})
	if err != nil {
		return err
	}
	defer s.kill()
	l := &life{spaces: s, signals: signals, ctx: cmd.Context()}
	if err := l.awaitReady(); err != nil {
		return err
	}

	c.PID = s.cmd.Process.Pid
	sock, err := listen(r.socketPath, c, c.Logger)
	if err != nil {
		return err
	}
	defer sock.close()
	c.Cleanup = sock.paths()
	closePcap, err := r.openPcap(&c)
	if err != nil {
		return err
	}
	defer closePcap()
	n, err := usernet.New(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer sock.serve(ctx, n, &r.levelVar, c.Logger)()
	network := make(chan error, 1)
	tuneRuntime(ctx, n.Ready())
	go func() { network <- n.Run(ctx) }() // ends with ctx
	defer func() {
		cancel()
		if !l.networkEnded {
			<-network
		}
	}()
	l.network = network
	if err := l.awaitNetwork(n.Ready()); err != nil {
		return err
	}
	tellChosen(cmd.ErrOrStderr(), c.Publish, n.Forwards()) // stdout is the command's
	start := order{Start: true}
	if c.Network != "" {
		late := newSetup(n.Config(), n.Search())
		start.Setup = &late
	}
	if err := s.send(start); err != nil {
		return err
	}
	notify(signals, harmless)
	return l.follow()
}

// life is a command's, from its namespaces to its end.
type life struct {
	*spaces
	ctx          context.Context
	signals      <-chan os.Signal
	network      <-chan error
	networkEnded bool
}

// awaitReady waits for the namespaces.
func (l *life) awaitReady() error {
	select {
	case e, ok := <-l.events:
		return l.judge(e, ok)
	case sig := <-l.signals:
		return endedBy(sig)
	case <-l.ctx.Done():
		return l.ctx.Err()
	}
}

// awaitNetwork waits until the guest can use its network.
func (l *life) awaitNetwork(ready <-chan struct{}) error {
	select {
	case <-ready:
		return nil
	case e, ok := <-l.events:
		return l.judge(e, ok)
	case err := <-l.network:
		l.networkEnded = true
		if err == nil {
			err = errors.New("run network: it has ended before it was ready")
		}
		return err
	case sig := <-l.signals:
		return endedBy(sig)
	case <-l.ctx.Done():
		return l.ctx.Err()
	}
}

// follow accompanies the command to its end.
func (l *life) follow() error {
	for {
		select {
		case e, ok := <-l.events:
			switch {
			case !ok:
				l.events = nil // the end is near
			case e.Stopped != 0:
				l.stop(e.Stopped)
			default:
				return l.judge(e, ok)
			}
		case sig := <-l.signals:
			if sig == unix.SIGCONT {
				_ = l.send(order{Continue: true})
				continue
			}
			_ = l.send(order{Signal: sig.(syscall.Signal)})
		case err := <-l.network:
			l.networkEnded = true
			l.network = nil
			if err := l.loseNetwork(err); err != nil {
				return err
			}
		case <-l.done:
			return l.end()
		case <-l.ctx.Done():
			return l.ctx.Err()
		}
	}
}

// end returns what the command has ended with, or why it did not start: the
// process may have told that in its last moment.
func (l *life) end() error {
	if l.events != nil {
		for e := range l.events {
			if e.Error != "" {
				return l.judge(e, true)
			}
		}
	}
	return exitWith(l.status())
}

// judge says what an event, or the end of all events, means.
func (l *life) judge(e event, ok bool) error {
	switch {
	case ok && e.Error != "":
		return &statusError{e.Status, errors.New(e.Error)}
	case ok:
		return nil
	}
	<-l.done
	return fmt.Errorf("run namespaces: the process in them has ended with status %d", l.status())
}

// loseNetwork looks whether the network has ended because the command has, and
// ends that if not: it would wait for answers that cannot come.
func (l *life) loseNetwork(err error) error {
	grace := 5 * time.Second
	if err != nil {
		grace = time.Second
	}
	select {
	case <-l.done:
		return nil
	case <-time.After(grace):
	}
	if err == nil {
		err = errors.New("run network: it has ended")
	}
	return err
}

// stop stops usernet as the command was stopped, for the shell to see, and
// sends the command on when the shell sends us on. A group that no shell looks
// after is not stopped by these signals, and goes on at once.
func (l *life) stop(by syscall.Signal) {
	if by == unix.SIGSTOP {
		by = unix.SIGTSTP
	}
	_ = unix.Kill(0, by)
	// The signal may take effect on another thread, a moment later.
	time.Sleep(20 * time.Millisecond)
	_ = l.send(order{Continue: true})
}

func exitWith(status int) error {
	if status == exitOK {
		return nil
	}
	return &statusError{status: status}
}

// endedBy is the end by a signal while there was no command to get it.
func endedBy(s os.Signal) error { return exitWith(signalStatus(s.(syscall.Signal))) }

// newSetup writes the files that the command sees instead of the host's.
func newSetup(c usernet.Config, search []string) setup {
	var s setup
	if !c.NoDNS {
		a := c.Addresses()
		host, _ := os.ReadFile("/etc/resolv.conf")
		s.ResolvConf = resolvConf(string(host), []netip.Addr{a.DNS4, a.DNS6}, search)
	}
	if len(c.AddHosts) > 0 {
		// Names in the host's file would go before those of our DNS server.
		var b strings.Builder
		for _, h := range c.AddHosts {
			fmt.Fprintf(&b, "%v\t%s\n", h.Addr, h.Name)
		}
		host, _ := os.ReadFile("/etc/hosts")
		s.Hosts = append([]byte(b.String()), host...)
	}
	return s
}

// resolvConf replaces the servers of the host's resolv.conf by our own, and its
// search list if there is another. Options stay.
func resolvConf(host string, servers []netip.Addr, search []string) []byte {
	var b strings.Builder
	for _, a := range servers {
		if a.IsValid() {
			fmt.Fprintf(&b, "nameserver %v\n", a)
		}
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	for line := range strings.Lines(host) {
		line = strings.TrimSpace(line)
		key, _, _ := strings.Cut(strings.ReplaceAll(line, "\t", " "), " ")
		switch key {
		case "search", "domain":
			if len(search) > 0 {
				continue
			}
		case "options":
		default:
			continue
		}
		fmt.Fprintln(&b, line)
	}
	return []byte(b.String())
}
