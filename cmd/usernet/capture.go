package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/capture"
	"github.com/usernet/usernet/internal/control"
)

func newCapture() *cobra.Command {
	var (
		a     ask
		o     usernet.CaptureOptions
		file  string
		count int
	)
	cmd := a.command("capture [-w FILE] [FILTER]", "Write the frames of a running network, for tcpdump or Wireshark", anyArguments,
		func(cmd *cobra.Command, c *control.Client, words []string) error {
			o.Filter = strings.Join(words, " ")
			return captureTo(cmd, c, o, file, uint64(count))
		})
	cmd.Long = `
Write the frames of the guest's link from now on, as pcapng, until Ctrl-C.
Traffic does not wait for the file: frames that it has no room for are dropped,
and counted.

FILTER is made of tcp, udp, icmp, arp, ip, ip6, host ADDR, net CIDR, port N and
portrange N-N, the last four also behind src or dst, joined by and, or, not and
brackets.`
	cmd.Example = `
  usernet capture -w dns.pcapng port 53
  usernet capture 'tcp and not net 10.0.0.0/8' | tcpdump -nr -
  usernet capture | wireshark -k -i -`
	out := newFlagSet()
	out.VarP(&value[string]{&file, "FILE", text, ""}, "write", "w", "write to this file, - is stdout (default: stdout, unless it is a terminal)")
	out.VarP(&value[int]{&o.Snaplen, "BYTES", number, "0"}, "snaplen", "s", "write only so much of each frame, 0 is all of it")
	out.VarP(&value[int]{&count, "N", positive, ""}, "count", "c", "end after so many frames")
	which := a.groups()[:1]
	addGroups(cmd, append(which, group{"Output", out}))
	return cmd
}

// anyArguments takes all there are.
func anyArguments(*cobra.Command, []string) error { return nil }

// captureTo writes frames to a file until it is interrupted.
func captureTo(cmd *cobra.Command, c *control.Client, o usernet.CaptureOptions, path string, count uint64) error {
	ctx, stop := untilSignal(cmd.Context())
	defer stop()
	out := cmd.OutOrStdout()
	if f, ok := out.(*os.File); ok && path == "" && isTerminal(f) {
		return usagef("capture: frames are not for a terminal: give -w FILE, or write `usernet capture | tcpdump -nr -`")
	}
	stream, err := c.Capture(ctx, o)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	}
	defer stream.Close()
	if path != "" && path != "-" {
		f, err := createCapture(path)
		if err != nil {
			return err
		}
		defer f.Close()
		out = f
	}
	s, err := capture.Copy(ctx, out, stream, count)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // the network has ended
	}
	if errors.Is(err, syscall.EPIPE) {
		err = nil // who reads has seen enough
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%d frames, %d dropped\n", s.Packets, s.Dropped)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}

// openPcap makes the file that --pcap names.
func (f *networkFlags) openPcap(c *usernet.Config) (closeFile func(), err error) {
	if f.pcap == "" {
		return func() {}, nil
	}
	file, err := createCapture(f.pcap)
	if err != nil {
		return nil, err
	}
	c.Capture = file
	return func() { file.Close() }, nil
}

// createCapture makes a file for frames. They are nobody else's business.
func createCapture(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("capture: %w: make its directory first", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("capture: %w: choose a path where this user may write", err)
	case err != nil:
		return nil, fmt.Errorf("capture: %w", err)
	}
	return f, nil
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
