package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// slirpName is what the binary is called in the place of slirp4netns.
const slirpName = "slirp4netns"

// newSlirp returns the command that is slirp4netns without a link of that name.
func newSlirp() *cobra.Command {
	cmd := &cobra.Command{
		Use:   slirpName + " [OPTION]... PID|PATH|FD [TAPNAME]",
		Short: "Take the place of slirp4netns, as a link of that name does",
		// It has its own ways with arguments, help included.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return &statusError{status: runSlirp(cmd.Context(), slirpName, args, cmd.OutOrStdout(), cmd.ErrOrStderr())}
		},
	}
	cmd.SetHelpFunc(func(cmd *cobra.Command, _ []string) { printSlirpHelp(cmd.OutOrStdout(), slirpName) })
	return cmd
}

// slirpVersion is the release whose command line this is.
const slirpVersion = "1.3.2"

// printSlirpVersion writes lines that programs take apart: the word "version"
// stands in the first one only, and a configuration version of 6 is what has
// all options.
func printSlirpVersion(w io.Writer) {
	b := version()
	commit := b.Revision
	if commit == "" {
		commit = "unknown"
	}
	fmt.Fprintf(w, "%s version %s\n", slirpName, slirpVersion)
	fmt.Fprintf(w, "commit: %s\n", commit)
	fmt.Fprintf(w, "usernet: %s\n", b.Version)
	fmt.Fprintf(w, "SLIRP_CONFIG_VERSION_MAX: 6\n")
}

// runSlirp is usernet in the place of slirp4netns, with that name in messages.
func runSlirp(ctx context.Context, name string, args []string, stdout, stderr io.Writer) int {
	o, err := parseSlirp(name, args)
	var e *slirpError
	switch {
	case errors.As(err, &e):
		if e.text != "" {
			fmt.Fprintln(stderr, e.text)
		}
		if e.usage {
			printSlirpHelp(stdout, name)
		}
		return exitFailure
	case o.help:
		printSlirpHelp(stdout, name)
		return exitOK
	case o.version:
		printSlirpVersion(stdout)
		return exitOK
	}
	// Who has started this may have closed what it reads the messages from.
	signal.Ignore(unix.SIGPIPE)
	for _, w := range o.warnings {
		fmt.Fprintf(stdout, "WARNING: %s\n", w)
	}
	s := &slirp{o: o, stdout: stdout, stderr: stderr, epilogue: []string{"do_slirp is exiting", "do_slirp failed", "parent failed"}}
	s.log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	// What a signal would have done, it does, only after everything is cleared.
	var caught os.Signal
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := onSignal(func(sig os.Signal) { caught = sig; cancel() })
	err = s.serve(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(stderr, "%s\n", describe(err))
		for _, l := range s.epilogue {
			fmt.Fprintln(stderr, l)
		}
		return exitFailure
	}
	if sig, ok := caught.(syscall.Signal); ok {
		_ = unix.Kill(unix.Getpid(), sig)
		time.Sleep(time.Second) // it is on its way
		return signalStatus(sig)
	}
	return exitOK
}

// onSignal calls f with the first signal to end, until stop. The second one
// kills.
func onSignal(f func(os.Signal)) (stop func()) {
	signals := honoured(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	if len(signals) == 0 { // would mean all of them
		return func() {}
	}
	c, done, ended := make(chan os.Signal, 1), make(chan struct{}), make(chan struct{})
	signal.Notify(c, signals...)
	go func() {
		defer close(ended)
		defer signal.Stop(c)
		select {
		case sig := <-c:
			f(sig)
		case <-done:
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// slirp is one run of usernet in the place of slirp4netns.
type slirp struct {
	o              *slirpOptions
	stdout, stderr io.Writer
	log            *slog.Logger
	epilogue       []string // follows the message about a failure
}

// config translates the options.
func (s *slirp) config(ctx context.Context) (usernet.Config, error) {
	o := s.o
	c := usernet.Config{
		Ifname: o.tapName, CIDR: o.cidr, CIDR6: netip.MustParsePrefix("fd00::/64"),
		MTU: o.mtu, MAC: o.mac, IPv6: usernet.IPv6Off, SLAAC: true,
		Configure: usernet.ConfigureKeep, Link: usernet.LinkTAP,
		HostLoopback: !o.noLoopback, NoGuard: true, NoDNS: o.noDNS,
		OutboundAddr: o.outbound4, OutboundAddr6: o.outbound6, Logger: s.log,
	}
	if o.ipv6 {
		c.IPv6 = usernet.IPv6On
		if c.MTU < 1280 {
			c.IPv6 = usernet.IPv6Auto // which tells that there is none
		}
	}
	if o.configure {
		c.Configure, c.Link = usernet.ConfigureStatic, usernet.LinkAuto
	}
	switch o.target {
	case slirpPID:
		c.PID = o.pid
	case slirpPath:
		c.NetnsPath = o.path
	case slirpTapFD:
		f, err := inherit("netns-type=tapfd", o.tapFD)
		if err != nil {
			return c, err
		}
		c.TapFile = f
	case slirpBESS:
		f, err := s.acceptBESS(ctx)
		if err != nil {
			return c, err
		}
		c.TapFile = f
	}
	if c.TapFile != nil {
		c.Ifname, c.Link, c.Configure = "", "", ""
	} else {
		// A relative path is no name of ip-netns here.
		if c.NetnsPath != "" {
			abs, err := filepath.Abs(c.NetnsPath)
			if err != nil {
				return c, err
			}
			c.NetnsPath = abs
		}
	}
	return c, nil
}

// acceptBESS waits for the peer whose packets are Ethernet frames.
func (s *slirp) acceptBESS(ctx context.Context) (*os.File, error) {
	fmt.Fprintln(s.stdout, "WARNING: BESS mode is experimental")
	_ = os.Remove(s.o.path)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: s.o.path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", s.o.path, err)
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	fmt.Fprintf(s.stderr, "Waiting for connection to %s\n", s.o.path)
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("accept at %s: %w", s.o.path, err)
	}
	defer conn.Close()
	return conn.File()
}

// serve gives the namespace its network until something ends it.
func (s *slirp) serve(ctx context.Context) error {
	o := s.o
	var ready, exit *os.File
	var err error
	if o.exitFD >= 0 {
		if exit, err = slirpFile("exit-fd", o.exitFD); err != nil {
			return err
		}
	}
	if o.readyFD >= 0 {
		if ready, err = slirpFile("ready-fd", o.readyFD); err != nil {
			return err
		}
		defer ready.Close()
	}
	c, err := s.config(ctx)
	if err != nil {
		return err
	}
	var api *slirpAPI
	if o.apiSocket != "" {
		if api, err = listenSlirpAPI(o.apiSocket); err != nil {
			return err
		}
		defer api.close()
	}
	n, err := usernet.New(c)
	if err != nil {
		return err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel(nil)
	if exit != nil {
		helpers.Go(func() {
			if waitHangup(ctx, exit) == nil {
				fmt.Fprintln(s.stderr, "exitfd event")
				fmt.Fprintln(s.stderr, "do_slirp is exiting")
				cancel(nil)
			}
		})
	}
	failed := s.epilogue
	s.epilogue = []string{"child failed(1)"}
	helpers.Go(func() {
		select {
		case <-n.Ready():
		case <-ctx.Done():
			return
		}
		s.epilogue = failed
		s.banner(c.Addresses())
		if err := s.lockDown(); err != nil {
			cancel(err)
			return
		}
		if api != nil {
			helpers.Go(func() { api.serve(ctx, n, c.Addresses(), s.log) })
		}
		if ready != nil {
			if err := signalReady(ready); err != nil {
				s.log.Warn("nobody waits for the network to be ready", "err", err)
			}
		}
	})
	tuneRuntime(ctx, n.Ready())
	err = n.Run(ctx)
	switch cause := context.Cause(ctx); {
	case cause == nil:
		return err
	case errors.Is(cause, context.Canceled): // somebody wanted it, however far it was
		return nil
	default:
		return cause
	}
}

// slirpFile takes over a descriptor that the caller has opened.
func slirpFile(name string, fd int) (*os.File, error) {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return nil, fmt.Errorf("use %s %d: %w", name, fd, err)
	}
	if fd > 2 {
		return inherit(name, fd)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// banner tells what the network looks like.
func (s *slirp) banner(a usernet.Addresses) {
	o := s.o
	mask := net.CIDRMask(a.Prefix4.Bits(), 32)
	fmt.Fprintln(s.stdout, "Starting slirp")
	for _, l := range []struct {
		name  string
		value any
	}{
		{"MTU", o.mtu},
		{"Network", a.Prefix4.Addr()},
		{"Netmask", net.IP(mask)},
		{"Gateway", a.Gateway4},
		{"DNS", a.DNS4},
		{"DHCP begin", a.PoolStart},
		{"DHCP end", a.PoolEnd},
		{"Recommended IP", a.Guest4},
	} {
		fmt.Fprintf(s.stdout, "* %-17s%v\n", l.name+":", l.value)
	}
	if o.apiSocket != "" {
		fmt.Fprintf(s.stdout, "* API Socket:      %s\n", o.apiSocket)
	}
	if o.outbound4.IsValid() {
		fmt.Fprintf(s.stdout, "* Outbound IPv4:    %v\n", o.outbound4)
	}
	if o.outbound6.IsValid() {
		fmt.Fprintf(s.stdout, "* Outbound IPv6:    %v\n", o.outbound6)
	}
	if o.mac != nil {
		fmt.Fprintf(s.stdout, "* MAC address:     %v\n", o.mac)
	}
	if !o.noLoopback {
		fmt.Fprintf(s.stdout, "WARNING: 127.0.0.1:* on the host is accessible as %v (set --disable-host-loopback to prohibit connecting to 127.0.0.1:*)\n", a.Gateway4)
	}
}
