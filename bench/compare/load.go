package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const flowBuffer = 64 << 10

var flowZeros [flowBuffer]byte

// A load is this program, run on the guest's side with connections to the
// flow server.
type load struct {
	stdin io.WriteCloser
	out   *bufio.Reader
	wait  func() error
	kill  func()
}

// startLoad opens n flows of a kind and returns once all of them are there.
func (b *bench) startLoad(ctx context.Context, in *instance, kind byte, n int, window time.Duration) (*load, error) {
	return b.startLoadTo(ctx, in, net.JoinHostPort(in.gateway, strconv.Itoa(flowPort)), kind, n, window)
}

// startLoadTo is startLoad with another server.
func (b *bench) startLoadTo(ctx context.Context, in *instance, to string, kind byte, n int, window time.Duration) (*load, error) {
	cmd := b.commandIn(ctx, in.guest, filepath.Join(b.work, selfFile), roleLoad,
		"-kind", string(kind), "-flows", strconv.Itoa(n), "-window", window.String(),
		"-to", to)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start load: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start load: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start load: %w", err)
	}
	l := &load{stdin: stdin, out: bufio.NewReader(stdout), wait: cmd.Wait, kill: func() { cmd.Process.Kill(); cmd.Wait() }}
	if _, err := l.out.ReadString('\n'); err != nil {
		l.kill()
		return nil, fmt.Errorf("open %d flows: %s", n, firstLine(complaint.Bytes()))
	}
	return l, nil
}

// number tells the load to go and reads the number it answers with.
func (l *load) number() (int64, error) {
	if _, err := io.WriteString(l.stdin, "go\n"); err != nil {
		return 0, err
	}
	line, err := l.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("read the load's answer: %w", err)
	}
	return strconv.ParseInt(strings.TrimSpace(line), 10, 64)
}

// loadMain is the guest's side: open the flows, say "ready", and for a
// transfer move data from "go" until the input ends.
func loadMain(args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	kind := flags.String("kind", "", "what the flows do")
	count := flags.Int("flows", 1, "how many")
	window := flags.Duration("window", time.Second, "for how long received bytes are counted")
	to := flags.String("to", "", "the flow server")
	if err := flags.Parse(args); err != nil || len(*kind) != 1 {
		return errUsage
	}
	if err := raiseFileLimit(); err != nil {
		return err
	}
	conns, err := dialFlows(*to, *count, (*kind)[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return nil // idle flows: the input just ends
	}
	var received atomic.Int64
	for _, c := range conns {
		go func() {
			switch (*kind)[0] {
			case flowUp:
				for {
					if _, err := c.Write(flowZeros[:]); err != nil {
						return
					}
				}
			case flowDown:
				if _, err := c.Write([]byte{flowDown}); err != nil {
					return
				}
				buf := make([]byte, flowBuffer)
				for {
					n, err := c.Read(buf)
					received.Add(int64(n))
					if err != nil {
						return
					}
				}
			}
		}()
	}
	time.Sleep(rampUp)
	before := received.Load()
	time.Sleep(*window)
	fmt.Println(received.Load() - before)
	_, err = io.Copy(io.Discard, in)
	return err
}

// rampUp is left out of a transfer's count.
const rampUp = 300 * time.Millisecond

// dialFlows connects, a few at a time, and has every flow carry something.
// For flowDown the first byte is left to the caller: it starts the transfer.
func dialFlows(to string, count int, kind byte) ([]net.Conn, error) {
	conns := make([]net.Conn, count)
	dialer := net.Dialer{Timeout: 10 * time.Second, KeepAlive: -1}
	var group errgroup.Group
	group.SetLimit(32)
	for i := range conns {
		group.Go(func() error {
			c, err := dialer.Dial("tcp", to)
			if err != nil {
				return err
			}
			conns[i] = c
			// What is queued at the end must not stay behind in sockets
			// without an owner: it would hold the memory that the kernel
			// allows TCP, and slow whatever is measured next.
			if err := c.(*net.TCPConn).SetLinger(0); err != nil {
				return err
			}
			switch kind {
			case flowUp:
				_, err = c.Write([]byte{flowUp})
			case flowEcho:
				err = exchange(c)
			}
			return err
		})
	}
	return conns, group.Wait()
}

// exchange sends 64 bytes and waits for them to come back.
func exchange(c net.Conn) error {
	message := bytes.Repeat([]byte{'x'}, 64)
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(append([]byte{flowEcho}, message...)); err != nil {
		return err
	}
	answer := make([]byte, len(message))
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if !bytes.Equal(answer, message) {
		return errors.New("the echo is not what was sent")
	}
	return c.SetDeadline(time.Time{})
}
