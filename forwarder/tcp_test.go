package forwarder_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/forwarder"
)

var open = forwarder.PolicyConfig{HostLoopback: true}

// variants are the links that every test of bytes runs on.
var variants = []struct {
	name    string
	opt     rigOptions
	size    int // how much to send where it matters, over so many streams
	streams []int
}{
	{"offload/mtu65520", rigOptions{mtu: 65520, offload: true, policy: open}, 16 << 20, []int{1, 64}},
	{"offload/mtu1500", rigOptions{mtu: 1500, offload: true, policy: open}, 16 << 20, []int{1, 64}},
	{"plain/mtu1500", rigOptions{mtu: 1500, policy: open}, 2 << 20, []int{1, 16}},
	{"bad/mtu65520", rigOptions{mtu: 65520, offload: true, policy: open, bad: true}, 4 << 20, []int{1, 8}},
	{"bad/mtu1500", rigOptions{mtu: 1500, policy: open, bad: true}, 256 << 10, []int{1, 8}},
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// pattern writes size pseudo-random bytes in pieces of random size and returns
// their hash.
func pattern(w io.Writer, size int, seed uint64) ([32]byte, error) {
	r := rand.New(rand.NewPCG(seed, 1))
	h := sha256.New()
	buf := make([]byte, 200<<10)
	for i := range buf {
		buf[i] = byte(r.Uint32())
	}
	for size > 0 {
		n := 1 + r.IntN(len(buf)-1)
		if r.IntN(3) == 0 {
			n = 1 + r.IntN(100)
		}
		n = min(n, size)
		off := r.IntN(len(buf) - n + 1)
		h.Write(buf[off : off+n])
		if _, err := w.Write(buf[off : off+n]); err != nil {
			return [32]byte{}, err
		}
		size -= n
	}
	return [32]byte(h.Sum(nil)), nil
}

func TestTCPCarriesBytesBothWaysAtOnce(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			for _, streams := range v.streams {
				size := v.size / streams
				var hostGot sync.Map
				port := listen(t, func(c *net.TCPConn) {
					defer c.Close()
					var id [8]byte
					if _, err := io.ReadFull(c, id[:]); err != nil {
						return
					}
					sent := make(chan [32]byte, 1)
					go func() {
						h, _ := pattern(c, size, 2)
						c.CloseWrite()
						sent <- h
					}()
					h := sha256.New()
					io.Copy(h, c)
					hostGot.Store(id, [32]byte(h.Sum(nil)))
					<-sent
				})
				n := newNetwork(t, v.opt)
				var wg sync.WaitGroup
				for i := range streams {
					wg.Go(func() {
						c, err := n.dial(at(gateway4, port))
						if err != nil {
							t.Error(err)
							return
						}
						defer c.Close()
						id := [8]byte{byte(i), byte(i >> 8), 1}
						c.Write(id[:])
						var want [32]byte
						done := make(chan struct{})
						go func() {
							defer close(done)
							want, err = pattern(c, size, uint64(i)+10)
							if err != nil {
								t.Errorf("write: %v", err)
							}
							c.CloseWrite()
						}()
						h := sha256.New()
						got, err2 := io.Copy(h, c)
						<-done
						if err2 != nil || got != int64(size) {
							t.Errorf("read %d bytes, want %d, error %v", got, size, err2)
						}
						ref, _ := pattern(io.Discard, size, 2)
						if [32]byte(h.Sum(nil)) != ref {
							t.Errorf("bytes from the host differ")
						}
						deadline := time.Now().Add(90 * time.Second)
						for time.Now().Before(deadline) {
							if g, ok := hostGot.Load(id); ok {
								if g != want {
									t.Errorf("bytes to the host differ")
								}
								return
							}
							time.Sleep(5 * time.Millisecond)
						}
						t.Errorf("host saw no end of stream %d", i)
					})
				}
				wg.Wait()
			}
		})
	}
}

func TestTCPRefusalIsARefusal(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	n := newNetwork(t, rigOptions{policy: open})
	_, err = n.dial(at(gateway4, port))
	if err == nil || err.Error() == "" || !bytes.Contains([]byte(err.Error()), []byte("refused")) {
		t.Errorf("dial of a closed port: %v, want connection refused", err)
	}
}

func TestTCPLoopbackIsClosedByDefault(t *testing.T) {
	reached := make(chan struct{}, 16)
	port := listen(t, func(c *net.TCPConn) { reached <- struct{}{}; c.Close() })
	n := newNetwork(t, rigOptions{})
	var wg sync.WaitGroup
	for _, a := range []netip.Addr{gateway4, gateway6} {
		wg.Go(func() {
			if c, err := n.dialWithin(2*time.Second, at(a, port)); err == nil {
				c.Close()
				t.Errorf("%v port %d: connected", a, port)
			}
		})
	}
	wg.Wait()
	select {
	case <-reached:
		t.Error("a connection reached the host's loopback")
	default:
	}
}

func TestTCPHalfClose(t *testing.T) {
	for _, v := range variants {
		if v.opt.bad {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			// The host answers only after the guest's FIN, and at length.
			port := listen(t, func(c *net.TCPConn) {
				defer c.Close()
				in, _ := io.ReadAll(c)
				time.Sleep(50 * time.Millisecond)
				c.Write(bytes.Repeat(in, 1000))
			})
			n := newNetwork(t, v.opt)
			c, err := n.dial(at(gateway4, port))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write(bytes.Repeat([]byte("x"), 10000))
			c.CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || len(got) != 10_000_000 {
				t.Errorf("read %d bytes, error %v", len(got), err)
			}
		})
	}
}

func TestTCPResetOfTheHostReachesTheGuest(t *testing.T) {
	port := listen(t, func(c *net.TCPConn) {
		b := make([]byte, 1)
		c.Read(b)
		c.Write([]byte("last words"))
		c.SetLinger(0)
		time.Sleep(20 * time.Millisecond)
		c.Close()
	})
	n := newNetwork(t, rigOptions{policy: open})
	c, err := n.dial(at(gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	b := make([]byte, 100)
	k, err := io.ReadFull(c, b[:10])
	if err != nil || string(b[:k]) != "last words" {
		t.Errorf("read %q, %v", b[:k], err)
	}
	if _, err = c.Read(b); err == nil || errors.Is(err, io.EOF) || !bytes.Contains([]byte(err.Error()), []byte("reset")) {
		t.Errorf("read after reset: %v, want connection reset", err)
	}
}

func TestTCPResetOfTheGuestReachesTheHost(t *testing.T) {
	result := make(chan error, 1)
	port := listen(t, func(c *net.TCPConn) {
		c.Write([]byte("unread")) // closing with this unread makes the guest send a reset
		b := make([]byte, 100)
		var err error
		for err == nil {
			_, err = c.Read(b)
		}
		result <- err
	})
	n := newNetwork(t, rigOptions{policy: open})
	c, err := n.dial(at(gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	c.Close()
	select {
	case err := <-result:
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("host read: %v, want connection reset", err)
		}
	case <-time.After(3 * time.Minute):
		t.Error("the host saw no end")
	}
}

func TestTCPStalledReaderLosesNothing(t *testing.T) {
	const size = 24 << 20
	port := listen(t, func(c *net.TCPConn) {
		defer c.Close()
		pattern(c, size, 3)
	})
	for _, v := range variants {
		if v.opt.bad {
			continue // would take minutes
		}
		t.Run(v.name, func(t *testing.T) {
			n := newNetwork(t, v.opt)
			c, err := n.dial(at(gateway4, port))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			time.Sleep(time.Second) // everything fills up
			h := sha256.New()
			got, err := io.Copy(h, c)
			want, _ := pattern(io.Discard, size, 3)
			if err != nil || got != size || [32]byte(h.Sum(nil)) != want {
				t.Errorf("read %d bytes, error %v, equal %v", got, err, [32]byte(h.Sum(nil)) == want)
			}
		})
	}
}

func TestTCPManyShortConnectionsLeaveNothingBehind(t *testing.T) {
	port := listen(t, func(c *net.TCPConn) {
		defer c.Close()
		b, _ := io.ReadAll(c) // io.Copy would keep pipes for splice
		c.Write(b)
	})
	n := newNetwork(t, rigOptions{policy: open, offload: true})
	before := openFDs(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				c, err := n.dial(at(gateway4, port))
				if err != nil {
					t.Error(err)
					return
				}
				c.Write([]byte("ping"))
				c.CloseWrite()
				if b, err := io.ReadAll(c); err != nil || string(b) != "ping" {
					t.Errorf("read %q, %v", b, err)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	deadline := time.Now().Add(3 * time.Minute)
	for n.fwd.Stats().TCPActive.Load() > 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if a := n.fwd.Stats().TCPActive.Load(); a != 0 {
		t.Errorf("%d flows left", a)
	}
	for openFDs(t) > before && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if after := openFDs(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// The guest is long gone, in order, when the host gets round to reading.
func TestTCPOrderlyEndLosesNothingThatTheHostHasYetToRead(t *testing.T) {
	const size = 4 << 20
	got := make(chan [32]byte, 1)
	port := listen(t, func(c *net.TCPConn) {
		defer c.Close()
		c.SetReadBuffer(128 << 10)
		c.CloseWrite()
		time.Sleep(500 * time.Millisecond)
		h := sha256.New()
		io.Copy(h, c)
		got <- [32]byte(h.Sum(nil))
	})
	n := newNetwork(t, rigOptions{policy: open, offload: true})
	c, err := n.dial(at(gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	want, err := pattern(c, size, 5)
	if err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	io.ReadAll(c)
	c.Close()
	select {
	case h := <-got:
		if h != want {
			t.Error("bytes to the host differ")
		}
	case <-time.After(3 * time.Minute):
		t.Error("the host saw no end")
	}
}
