package forwarder_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/forwarder"
)

// loopback makes sockets as the agent does, but on this machine's loopback.
type loopback struct {
	near, far int
	asked     []asked
}

type asked struct {
	id uint32
	to netip.AddrPort
}

func newLoopback(t testing.TB) *loopback {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return &loopback{near: pair[0], far: pair[1]}
}

func (l *loopback) FD() int { return l.near }

func (l *loopback) Dial(id uint32, _, to netip.AddrPort) error {
	l.asked = append(l.asked, asked{id, to})
	return nil
}

// Spare returns sockets that cannot be had for a client's address.
func (l *loopback) Spare(bool) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return fd
}

func (l *loopback) Trim() {}

func (l *loopback) Flush() error {
	if len(l.asked) > 0 {
		unix.Write(l.far, []byte{1})
	}
	return nil
}

func (l *loopback) Receive(got func(uint32, int, unix.Errno)) error {
	var b [16]byte
	for {
		if _, err := unix.Read(l.near, b[:]); err != nil {
			break
		}
	}
	for _, a := range l.asked {
		fd, _ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
		err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(a.to.Port()), Addr: [4]byte{127, 0, 0, 1}})
		if err != nil && !errors.Is(err, unix.EINPROGRESS) {
			unix.Close(fd)
			got(a.id, -1, unix.ECONNREFUSED)
			continue
		}
		got(a.id, fd, 0)
	}
	l.asked = nil
	return nil
}

func (l *loopback) Adopt(uint32, *forwarder.Conn) error { return unix.EOPNOTSUPP }
func (l *loopback) Release(uint32) error                { return unix.EOPNOTSUPP }
func (l *loopback) Close()                              { unix.Close(l.near); unix.Close(l.far) }

// ways are the paths that a client can take.
var ways = []struct {
	name    string
	splice  bool
	streams int // as many as the guest can serve, which is netstack where it has to be
}{{"splice", true, 64}, {"netstack", false, 16}}

// published is a network with a published TCP port whose server is serve, and
// returns where clients connect to.
func published(t testing.TB, splice bool, serve func(halfConn)) (*network, string) {
	t.Helper()
	n := newNetwork(t, rigOptions{offload: true})
	var guest netip.AddrPort
	if splice {
		guest = netip.AddrPortFrom(guest4, listen(t, func(c *net.TCPConn) { serve(c) }))
		if err := n.fwd.UseInside(context.Background(), newLoopback(t), guest4, guest6); err != nil {
			t.Fatal(err)
		}
	} else {
		guest = netip.AddrPortFrom(guest4, 80)
		l, err := gonet.ListenTCP(n.guest, tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(guest4.AsSlice()), Port: 80}, header.IPv4ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go serve(c.(*gonet.TCPConn))
			}
		}()
	}
	return n, publish(t, n, guest)
}

type halfConn interface {
	net.Conn
	CloseWrite() error
}

func publish(t testing.TB, n *network, guest netip.AddrPort) string {
	t.Helper()
	fd, at, err := forwarder.Listen(forwarder.TCP, netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.fwd.Publish(context.Background(), forwarder.Inbound{Proto: forwarder.TCP, FDs: []int{fd}, Guest4: guest})
	if err != nil {
		t.Fatal(err)
	}
	return at.String()
}

func TestInboundCarriesBytesBothWaysAtOnce(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			for _, streams := range []int{1, way.streams} {
				size := (32 << 20) / streams
				var got sync.Map
				n, addr := published(t, way.splice, func(c halfConn) {
					// Netstack, which is the guest here, may lose a FIN that
					// Close follows at once.
					defer time.AfterFunc(5*time.Second, func() { c.Close() })
					var id [1]byte
					io.ReadFull(c, id[:])
					sent := make(chan struct{})
					go func() {
						defer close(sent)
						pattern(c, size, 2)
						c.CloseWrite()
					}()
					h := sha256.New()
					io.Copy(h, c)
					got.Store(id[0], [32]byte(h.Sum(nil)))
					<-sent
				})
				ref, _ := pattern(io.Discard, size, 2)
				var wg sync.WaitGroup
				for i := range streams {
					wg.Go(func() {
						c, err := net.Dial("tcp", addr)
						if err != nil {
							t.Error(err)
							return
						}
						defer c.Close()
						c.Write([]byte{byte(i)})
						sent := make(chan [32]byte, 1)
						go func() {
							h, err := pattern(c, size, uint64(i)+10)
							if err != nil {
								t.Errorf("write: %v", err)
							}
							c.(*net.TCPConn).CloseWrite()
							sent <- h
						}()
						h := sha256.New()
						k, err := io.Copy(h, c)
						if err != nil || k != int64(size) || [32]byte(h.Sum(nil)) != ref {
							t.Errorf("read %d bytes, want %d, error %v", k, size, err)
						}
						want := <-sent
						for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
							if h, ok := got.Load(byte(i)); ok {
								if h != want {
									t.Errorf("stream %d: bytes to the guest differ", i)
								}
								return
							}
							if time.Now().After(deadline) {
								t.Errorf("stream %d has no end in the guest", i)
								return
							}
						}
					})
				}
				wg.Wait()
				gone(t, n)
			}
		})
	}
}

// gone waits until there are no flows.
func gone(t *testing.T, n *network) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); n.fwd.Stats().TCPActive.Load() != 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d flows are left", n.fwd.Stats().TCPActive.Load())
		}
	}
}

func TestInboundStalledReaderLosesNothing(t *testing.T) {
	const size = 24 << 20
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			n, addr := published(t, way.splice, func(c halfConn) {
				defer c.Close()
				pattern(c, size, 3)
			})
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			time.Sleep(time.Second) // everything fills up
			h := sha256.New()
			got, err := io.Copy(h, c)
			want, _ := pattern(io.Discard, size, 3)
			if err != nil || got != size || [32]byte(h.Sum(nil)) != want {
				t.Errorf("read %d bytes, error %v", got, err)
			}
			c.Close()
			gone(t, n)
		})
	}
}

func TestInboundEnds(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name+"/the guest answers after the client's FIN", func(t *testing.T) {
			n, addr := published(t, way.splice, func(c halfConn) {
				defer c.Close()
				b, _ := io.ReadAll(c)
				time.Sleep(50 * time.Millisecond)
				fmt.Fprintf(c, "%d bytes", len(b))
			})
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write(make([]byte, 100000))
			c.(*net.TCPConn).CloseWrite()
			if b, err := io.ReadAll(c); err != nil || string(b) != "100000 bytes" {
				t.Errorf("read %q, %v", b, err)
			}
			gone(t, n)
		})
		t.Run(way.name+"/the guest resets", func(t *testing.T) {
			n, addr := published(t, way.splice, func(c halfConn) {
				b := make([]byte, 1)
				c.Read(b)
				c.Write([]byte("last words"))
				time.Sleep(20 * time.Millisecond)
				resetConn(c)
			})
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte("x"))
			if !way.splice {
				c.Write([]byte("unread")) // makes netstack's guest send a reset
			}
			b := make([]byte, 10)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "last words" {
				t.Errorf("read %q, %v", b, err)
			}
			if _, err := c.Read(b); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read after reset: %v, want connection reset", err)
			}
			gone(t, n)
		})
		t.Run(way.name+"/the client resets", func(t *testing.T) {
			result := make(chan error, 1)
			n, addr := published(t, way.splice, func(c halfConn) {
				defer c.Close()
				_, err := io.ReadAll(c)
				result <- err
			})
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			c.Write([]byte("x"))
			time.Sleep(50 * time.Millisecond)
			resetConn(c)
			select {
			case err := <-result:
				if err == nil {
					t.Error("the guest saw an end, want a reset")
				}
			case <-time.After(3 * time.Minute):
				t.Error("the guest saw nothing")
			}
			gone(t, n)
		})
		t.Run(way.name+"/the client resets after its FIN", func(t *testing.T) {
			ended := make(chan struct{})
			n, addr := published(t, way.splice, func(c halfConn) {
				defer c.Close()
				defer close(ended)
				io.ReadAll(c)
				c.Write([]byte("answer"))
				for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
					if _, err := c.Write([]byte("x")); err != nil {
						return
					}
				}
				t.Error("the guest can write for ever")
			})
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			c.(*net.TCPConn).CloseWrite()
			io.ReadFull(c, make([]byte, 6))
			resetConn(c)
			<-ended
			gone(t, n)
		})
		t.Run(way.name+"/refused", func(t *testing.T) {
			n := newNetwork(t, rigOptions{})
			if way.splice {
				if err := n.fwd.UseInside(context.Background(), newLoopback(t), guest4, guest6); err != nil {
					t.Fatal(err)
				}
			}
			c, err := net.Dial("tcp", publish(t, n, netip.AddrPortFrom(guest4, 1)))
			if err == nil {
				defer c.Close()
				_, err = c.Read(make([]byte, 1))
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%v, want connection reset", err)
			}
			gone(t, n)
		})
	}
}

// TestInboundResetAtOnce: a server that lets a client in and resets it at once is
// not asked again by another way, and its last words arrive.
func TestInboundResetAtOnce(t *testing.T) {
	n, addr := published(t, true, func(c halfConn) {
		c.Write([]byte("last words"))
		resetConn(c)
	})
	for range 200 {
		c, err := net.Dial("tcp", addr)
		if errors.Is(err, syscall.ECONNRESET) {
			continue // all of it came before the client looked for the first time
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(c)
		c.Close()
		if string(b) != "last words" || !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read %q, %v, want the last words and a reset", b, err)
		}
	}
	gone(t, n)
	if refused := n.fwd.Stats().Refused.Load(); refused != 0 {
		t.Errorf("%d of 200 connections went by the interface, too", refused)
	}
}

// TestInboundLastBytes: what a server sends right before it closes arrives, and then
// the end, even where there is no room for it yet.
func TestInboundLastBytes(t *testing.T) {
	const piece = 1000
	n, addr := published(t, true, func(c halfConn) {
		defer c.Close()
		var pieces [1]byte
		io.ReadFull(c, pieces[:])
		for i := range pieces[0] {
			time.Sleep(200 * time.Microsecond) // so that each is passed on by itself
			c.Write(bytes.Repeat([]byte{i}, piece))
		}
	})
	// Of the pieces of one of these, the last is the first that finds no room.
	var wg sync.WaitGroup
	for pieces := range 200 {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
				unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, piece)
			})
		}}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte{byte(pieces)})
		wg.Go(func() {
			defer c.Close()
			time.Sleep(time.Second)
			var want []byte
			for i := range pieces {
				want = append(want, bytes.Repeat([]byte{byte(i)}, piece)...)
			}
			if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, want) {
				t.Errorf("read %d of %d bytes, error %v", len(b), len(want), err)
			}
		})
	}
	wg.Wait()
	gone(t, n)
}

// TestInboundCrowd: clients whom a server has no room for yet are not led another
// way, where there is none either: they wait.
func TestInboundCrowd(t *testing.T) {
	// On a machine that stops for seconds they may wait too long, but not always.
	var failed error
	for range 5 {
		if failed = crowd(t); failed == nil {
			return
		}
	}
	t.Error(failed)
}

func crowd(t *testing.T) error {
	n := newNetwork(t, rigOptions{})
	if err := n.fwd.UseInside(context.Background(), newLoopback(t), guest4); err != nil {
		t.Fatal(err)
	}
	server, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(server, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(server, 1); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(server)
	if err != nil {
		t.Fatal(err)
	}
	addr := publish(t, n, netip.AddrPortFrom(guest4, uint16(sa.(*unix.SockaddrInet4).Port)))
	const clients = 8
	results := make(chan error, clients)
	for range clients {
		go func() {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				defer c.Close()
				// With its queue full a kernel may forget whom it has answered
				// (SYN cookies), until that sends something.
				c.SetDeadline(time.Now().Add(30 * time.Second))
				c.Write([]byte("x"))
				_, err = io.ReadFull(c, make([]byte, 5))
			}
			results <- err
		}()
	}
	time.Sleep(600 * time.Millisecond) // longer than a detour is off
	go func() {
		for {
			fd, _, err := unix.Accept4(server, unix.SOCK_CLOEXEC)
			if err != nil {
				return
			}
			unix.Read(fd, make([]byte, 1))
			unix.Write(fd, []byte("hello"))
			unix.Close(fd)
		}
	}()
	defer unix.Close(server)
	defer unix.Shutdown(server, unix.SHUT_RDWR)
	for range clients {
		if e := <-results; e != nil {
			err = errors.Join(err, e)
		}
	}
	return err
}

func resetConn(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
	c.Close()
}

func TestInboundLeavesNothingBehind(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			n, addr := published(t, way.splice, func(c halfConn) {
				defer c.Close()
				b, _ := io.ReadAll(c)
				c.Write(b)
			})
			before := openFDs(t)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for range 100 {
						c, err := net.Dial("tcp", addr)
						if err != nil {
							t.Error(err)
							return
						}
						c.Write([]byte("ping"))
						c.(*net.TCPConn).CloseWrite()
						if b, err := io.ReadAll(c); err != nil || string(b) != "ping" {
							t.Errorf("read %q, %v", b, err)
						}
						c.Close()
					}
				})
			}
			wg.Wait()
			gone(t, n)
			for deadline := time.Now().Add(time.Minute); openFDs(t) > before && time.Now().Before(deadline); {
				time.Sleep(10 * time.Millisecond)
			}
			if after := openFDs(t); after > before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

func TestInboundUDP(t *testing.T) {
	n := newNetwork(t, rigOptions{})
	server, err := gonet.DialUDP(n.guest, &tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(guest4.AsSlice()), Port: 53}, nil, header.IPv4ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		b := make([]byte, 2000)
		for {
			k, from, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			server.WriteTo([]byte(fmt.Sprintf("%v %s", from, b[:k])), from)
		}
	}()
	fd, at, err := forwarder.Listen(forwarder.UDP, netip.MustParseAddrPort("0.0.0.0:0"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := n.fwd.Publish(context.Background(), forwarder.Inbound{Proto: forwarder.UDP, FDs: []int{fd}, Guest4: netip.AddrPortFrom(guest4, 53)})
	if err != nil {
		t.Fatal(err)
	}
	var up, down uint64
	// The answer comes from the address that was asked.
	for i, host := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.1"} {
		c, err := net.Dial("udp", net.JoinHostPort(host, strconv.Itoa(int(at.Port()))))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for j := range 3 {
			fmt.Fprintf(c, "%d-%d", i, j)
			c.SetReadDeadline(time.Now().Add(3 * time.Minute))
			b := make([]byte, 100)
			k, err := c.Read(b)
			want := fmt.Sprintf("10.0.2.2:%d %d-%d", c.LocalAddr().(*net.UDPAddr).Port, i, j)
			if err != nil || string(b[:k]) != want {
				t.Errorf("answer %q, %v, want %q", b[:k], err, want)
			}
			up, down = up+uint64(k), down+3
		}
	}
	if a := n.fwd.Stats().UDPActive.Load(); a != 3 {
		t.Errorf("%d flows, want 3", a)
	}
	if s := n.fwd.Stats(); s.UDPBytesUp.Load() != up || s.UDPBytesDown.Load() != down {
		t.Errorf("%d bytes up and %d down, want %d and %d", s.UDPBytesUp.Load(), s.UDPBytesDown.Load(), up, down)
	}
	if err := n.fwd.Unpublish(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	if a := n.fwd.Stats().UDPActive.Load(); a != 0 {
		t.Errorf("%d flows are left", a)
	}
}

// stalling is a loopback after whose answers the engine stands still for a while.
type stalling struct {
	*loopback
	stall time.Duration
}

func (s *stalling) Receive(got func(uint32, int, unix.Errno)) error {
	defer time.Sleep(s.stall)
	return s.loopback.Receive(got)
}

// TestInboundNoDetour: what the guest has answered is not taken for unanswered,
// whether the engine has slept until the client came or stood still since then.
// The other way, through netstack, leads nowhere here.
func TestInboundNoDetour(t *testing.T) {
	for _, tt := range []struct {
		name        string
		idle, stall time.Duration
	}{{"after a pause", time.Second, 0}, {"on a machine that stands still", 0, time.Second}} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNetwork(t, rigOptions{})
			if err := n.fwd.UseInside(context.Background(), &stalling{newLoopback(t), tt.stall}, guest4); err != nil {
				t.Fatal(err)
			}
			port := listen(t, func(c *net.TCPConn) {
				io.Copy(c, c)
				c.Close()
			})
			addr := publish(t, n, netip.AddrPortFrom(guest4, port))
			time.Sleep(tt.idle)
			start := time.Now()
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte("hello"))
			if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			flows, err := n.fwd.Flows(context.Background())
			if err != nil || len(flows) != 1 || flows[0].Age > time.Since(start) {
				t.Errorf("flows after %v: %+v, %v", time.Since(start), flows, err)
			}
			c.Close()
			gone(t, n)
		})
	}
}
