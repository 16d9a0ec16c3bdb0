package rig

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A DialRequest is one attempt to connect.
type DialRequest struct {
	Network string // "tcp", or "udp": there a datagram is sent and an answer awaited
	Addr    string
	Source  string        // local address, if any
	Timeout time.Duration // 0 means 10 s
}

// A DialResult is how the attempt ended. Errno is 0 for success.
type DialResult struct {
	Errno   syscall.Errno
	Timeout bool
	Text    string // of the error, or the UDP answer
	Took    time.Duration
}

func (r DialResult) String() string {
	switch {
	case r.Timeout:
		return "timeout"
	case r.Errno != 0:
		return unix.ErrnoName(r.Errno)
	case r.Text != "":
		return r.Text
	}
	return "connected"
}

// Dial tries to connect from a node.
var Dial = NewFunc("rig.dial", func(ctx context.Context, r DialRequest) (DialResult, error) {
	return dial(ctx, r), nil
})

// ReadAll connects and reads to the end; the text is what came.
var ReadAll = NewFunc("rig.readAll", func(ctx context.Context, r DialRequest) (DialResult, error) {
	start := time.Now()
	c, err := r.connect(ctx)
	if err != nil {
		return r.result(err, start), nil
	}
	defer c.Close()
	c.SetDeadline(start.Add(r.timeout()))
	b, err := io.ReadAll(c)
	result := r.result(err, start)
	if err == nil {
		result.Text = string(b)
	}
	return result, nil
})

// Dials tries several at the same time.
var Dials = NewFunc("rig.dials", func(ctx context.Context, rs []DialRequest) ([]DialResult, error) {
	results := make([]DialResult, len(rs))
	limit := make(chan struct{}, 64)
	done := make(chan struct{})
	for i, r := range rs {
		go func() {
			limit <- struct{}{}
			results[i] = dial(ctx, r)
			<-limit
			done <- struct{}{}
		}()
	}
	for range rs {
		<-done
	}
	return results, nil
})

func dial(ctx context.Context, r DialRequest) DialResult {
	start := time.Now()
	c, err := r.connect(ctx)
	if err != nil {
		return r.result(err, start)
	}
	defer c.Close()
	if r.Network != "udp" {
		return r.result(nil, start)
	}
	text, err := ask(c, start.Add(r.timeout()))
	result := r.result(err, start)
	if err == nil {
		result.Text = text
	}
	return result
}

func (r DialRequest) timeout() time.Duration {
	if r.Timeout == 0 {
		return 10 * time.Second
	}
	return r.Timeout
}

func (r DialRequest) connect(ctx context.Context) (net.Conn, error) {
	d := net.Dialer{Timeout: r.timeout()}
	if r.Source != "" {
		source, err := netip.ParseAddrPort(r.Source)
		if err != nil {
			return nil, err
		}
		d.LocalAddr = net.TCPAddrFromAddrPort(source)
		if r.Network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(source)
		}
	}
	d.Control = func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			if r.Network == "udp" {
				// All ICMP errors, not only those that are fatal. One of the
				// two is not of the socket's family.
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
			}
		})
	}
	return d.DialContext(ctx, r.Network, r.Addr)
}

func (r DialRequest) result(err error, start time.Time) DialResult {
	result := DialResult{Took: time.Since(start)}
	if err == nil {
		return result
	}
	e := newError(err)
	result.Text, result.Errno = e.Text, e.Errno
	result.Timeout = e.Timeout && e.Errno == 0
	return result
}

// ask sends a datagram, again every now and then as routers limit the rate of
// their errors, and returns the answer, or the error that came back.
func ask(c net.Conn, deadline time.Time) (string, error) {
	b := make([]byte, 2048)
	for {
		if _, err := c.Write([]byte("hello")); err != nil {
			return "", err
		}
		next := time.Now().Add(700 * time.Millisecond)
		if next.After(deadline) {
			next = deadline
		}
		c.SetReadDeadline(next)
		n, err := c.Read(b)
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || !time.Now().Before(deadline) {
			return string(b[:n]), err
		}
	}
}

// Sum is the SHA-256 of the n bytes that belong to a seed.
func Sum(n int64, seed uint64) string {
	h := sha256.New()
	io.CopyN(h, newRandom(seed), n)
	return hex.EncodeToString(h.Sum(nil))
}

// Many connects often, some at a time, and reads what the server sends to its
// end.
type Many struct {
	Addr    string
	Count   int
	Workers int
	Prefix  string // of what the server has to send
}

// ManyResult counts how the connections of a Many went.
type ManyResult struct {
	Good    int
	Slow    int            // good, but took more than 900 ms, so something was sent again
	Errors  map[string]int // by kind
	Slowest time.Duration
}

// ReadMany runs a Many in a node.
var ReadMany = NewFunc("rig.readMany", func(ctx context.Context, m Many) (ManyResult, error) {
	r := ManyResult{Errors: make(map[string]int)}
	var mu sync.Mutex
	var next atomic.Int64
	var wg sync.WaitGroup
	for range m.Workers {
		wg.Go(func() {
			for next.Add(1) <= int64(m.Count) && ctx.Err() == nil {
				one := readOne(ctx, m.Addr)
				mu.Lock()
				switch {
				case one.Errno != 0 || one.Timeout || one.Text == "":
					r.Errors[one.String()]++
				case !strings.HasPrefix(one.Text, m.Prefix):
					r.Errors["got "+one.Text]++
				default:
					r.Good++
				}
				if one.Took > 900*time.Millisecond {
					r.Slow++
				}
				r.Slowest = max(r.Slowest, one.Took)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return r, ctx.Err()
}).Within(time.Minute)

// readOne waits until there is a port to connect from.
func readOne(ctx context.Context, addr string) DialResult {
	request := DialRequest{Network: "tcp", Addr: addr}
	for {
		start := time.Now()
		c, err := request.connect(ctx)
		if errors.Is(err, syscall.EADDRNOTAVAIL) && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return request.result(err, start)
		}
		c.SetDeadline(start.Add(request.timeout()))
		b, err := io.ReadAll(c)
		c.Close()
		result := request.result(err, start)
		if err == nil {
			result.Text = string(b)
		}
		return result
	}
}
