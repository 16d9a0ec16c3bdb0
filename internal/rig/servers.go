package rig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Ports says where the servers of a node listen.
type Ports struct {
	Echo   int // TCP and UDP: sends back what it gets
	Talk   int // TCP: does what the client's first line says (see Talk)
	HTTP   int // /data?n=N&seed=S gives N bytes, /ok a few
	Whoami int // UDP: answers with the sender's address, TCP too
	Reset  int // TCP: resets every connection at once
}

// Services are the ports of the servers on the internet.
var Services = Ports{Echo: 7, Talk: 7001, HTTP: 80, Whoami: 7002, Reset: 7003}

// servers says on which addresses a node shall listen: none means all. Ports
// of 0 are chosen.
type servers struct {
	Addrs []string
	Ports *Ports // nil: Services
}

// ServeOn starts the servers in n on addrs: on those of Services, or if choose
// is set on ports that are free.
func (n *Node) ServeOn(t testing.TB, choose bool, addrs ...string) Ports {
	t.Helper()
	s := servers{Addrs: addrs}
	if choose {
		s.Ports = &Ports{}
	}
	return startServers.On(t, n, s)
}

var startServers = NewFunc("rig.servers", func(ctx context.Context, s servers) (Ports, error) {
	p := Services
	if s.Ports != nil {
		p = *s.Ports
	}
	if len(s.Addrs) == 0 {
		s.Addrs = []string{"0.0.0.0", "::"}
	}
	for _, addr := range s.Addrs {
		err := errors.Join(
			listenTCP(addr, &p.Echo, serveEcho),
			listenUDP(addr, &p.Echo, func(b []byte, _ netip.AddrPort) []byte { return b }),
			listenTCP(addr, &p.Talk, serveTalk),
			listenTCP(addr, &p.Whoami, func(c *net.TCPConn) {
				fmt.Fprint(c, c.RemoteAddr())
				c.Close()
			}),
			listenUDP(addr, &p.Whoami, func(_ []byte, from netip.AddrPort) []byte { return []byte(from.String()) }),
			listenTCP(addr, &p.Reset, func(c *net.TCPConn) {
				c.SetLinger(0)
				c.Close()
			}),
			listenHTTP(addr, &p.HTTP),
		)
		if err != nil {
			return p, err
		}
	}
	return p, nil
})

// listen opens a TCP listener on one family alone; a port of 0 is filled in.
func listen(addr string, port *int) (*net.TCPListener, error) {
	network := "tcp4"
	if netip.MustParseAddr(addr).Is6() {
		network = "tcp6" // sets IPV6_V6ONLY
	}
	l, err := net.Listen(network, net.JoinHostPort(addr, strconv.Itoa(*port)))
	if err != nil {
		return nil, err
	}
	*port = l.Addr().(*net.TCPAddr).Port
	return l.(*net.TCPListener), nil
}

func listenTCP(addr string, port *int, serve func(*net.TCPConn)) error {
	l, err := listen(addr, port)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				time.Sleep(10 * time.Millisecond) // out of descriptors
				continue
			}
			go serve(c)
		}
	}()
	return nil
}

// serveEcho sends everything back, and its own FIN after the client's.
func serveEcho(c *net.TCPConn) {
	defer c.Close()
	io.Copy(onlyWriter{c}, onlyReader{c})
}

// onlyReader and onlyWriter keep io.Copy from using splice, whose pipe would
// hide when data arrives.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// listenUDP answers datagrams from the address that they were sent to, which
// a socket on a wildcard address has to be told.
func listenUDP(addr string, port *int, answer func([]byte, netip.AddrPort) []byte) error {
	ip := netip.MustParseAddr(addr)
	network := "udp4"
	if ip.Is6() {
		network = "udp6"
	}
	c, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, uint16(*port))))
	if err != nil {
		return err
	}
	*port = c.LocalAddr().(*net.UDPAddr).Port
	c.SetReadBuffer(4 << 20)
	c.SetWriteBuffer(4 << 20)
	if err := wantPacketInfo(c, ip.Is6()); err != nil {
		return err
	}
	go func() {
		b := make([]byte, 65536)
		oob := make([]byte, 256)
		for {
			n, oobn, _, from, err := c.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				continue // an ICMP error of an earlier answer
			}
			c.WriteMsgUDPAddrPort(answer(b[:n], from), packetInfo(oob[:oobn]), from)
		}
	}()
	return nil
}

func wantPacketInfo(c *net.UDPConn, six bool) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		// FREEBIND: the address is local only by a route.
		if six {
			optErr = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1))
		} else {
			optErr = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1))
		}
	})
	return errors.Join(err, optErr)
}

// packetInfo turns what was received with a datagram into what its answer
// needs: the same destination as source, the interface left to routing.
func packetInfo(oob []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= 12:
			info := &unix.Inet4Pktinfo{}
			copy(info.Spec_dst[:], m.Data[8:12])
			return unix.PktInfo4(info)
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= 16:
			info := &unix.Inet6Pktinfo{}
			copy(info.Addr[:], m.Data[:16])
			return unix.PktInfo6(info)
		}
	}
	return nil
}

// requests counts the HTTP requests that were answered in every tenth of a
// second since the server started.
var requests struct {
	mu     sync.Mutex
	start  time.Time
	tenths []int
}

func countRequest() {
	requests.mu.Lock()
	defer requests.mu.Unlock()
	if requests.start.IsZero() {
		return
	}
	i := int(time.Since(requests.start) / (100 * time.Millisecond))
	for len(requests.tenths) <= i {
		requests.tenths = append(requests.tenths, 0)
	}
	requests.tenths[i]++
}

// CountRequests starts a new count of HTTP requests in a node and returns the
// last one: requests per tenth of a second.
var CountRequests = NewFunc("rig.countRequests", func(context.Context, struct{}) ([]int, error) {
	requests.mu.Lock()
	defer requests.mu.Unlock()
	last := requests.tenths
	requests.start, requests.tenths = time.Now(), nil
	return last, nil
})

func listenHTTP(addr string, port *int) error {
	l, err := listen(addr, port)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/data", serveData)
	mux.HandleFunc("/ok", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ok\n")
		countRequest()
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 30 * time.Second}
	go server.Serve(l)
	return nil
}

// serveData answers with the n bytes of a seed.
func serveData(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
	seed, _ := strconv.ParseUint(r.FormValue("seed"), 10, 64)
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	io.CopyN(w, newRandom(seed), n)
}

// A Canary is a set of listeners that nobody may reach.
type Canary struct {
	Port int // TCP and UDP, on every address of both families
}

// canary counts who has reached it.
var canary struct {
	mu   sync.Mutex
	hits []string
}

func (c Canary) sing(what string) {
	canary.mu.Lock()
	defer canary.mu.Unlock()
	canary.hits = append(canary.hits, what)
}

// StartCanary listens in a node.
var StartCanary = NewFunc("rig.canary", func(_ context.Context, c Canary) (Canary, error) {
	var err error
	for _, addr := range []string{"0.0.0.0", "::"} {
		err = errors.Join(err,
			listenTCP(addr, &c.Port, func(conn *net.TCPConn) {
				c.sing(fmt.Sprintf("tcp %v → %v", conn.RemoteAddr(), conn.LocalAddr()))
				conn.Write([]byte("canary"))
				conn.Close()
			}),
			listenUDP(addr, &c.Port, func(b []byte, from netip.AddrPort) []byte {
				c.sing(fmt.Sprintf("udp %v: %q", from, b))
				return []byte("canary")
			}))
	}
	return c, err
})

// CanaryHits lists who has reached the canary of a node since the last call.
var CanaryHits = NewFunc("rig.canaryHits", func(context.Context, struct{}) ([]string, error) {
	canary.mu.Lock()
	defer canary.mu.Unlock()
	hits := canary.hits
	canary.hits = nil
	return hits, nil
})

// A PortRange names TCP ports: every Step-th from First to Last.
type PortRange struct{ First, Last, Step int }

// ListenMany listens on many ports of a node, on all addresses. What connects
// is closed at once.
var ListenMany = NewFunc("rig.listenMany", func(_ context.Context, r PortRange) (int, error) {
	n := 0
	for port := r.First; port <= r.Last; port += r.Step {
		for _, addr := range []string{"0.0.0.0", "::"} {
			if err := listenTCP(addr, &port, func(c *net.TCPConn) { c.Close() }); err != nil {
				return n, err
			}
		}
		n++
	}
	return n, nil
})
