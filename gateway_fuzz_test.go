package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/rig"
	"github.com/usernet/usernet/internal/vnet"
)

// fuzzGateway is a whole gateway whose link is a socket in memory. It may dial
// one port of this machine's loopback, where an echo server is, and nothing else.
type fuzzGateway struct {
	fd   int // the guest's end
	port uint16
	next map[uint16][2]uint32 // by guest port: sequence and acknowledgement numbers that fit
	buf  []byte
}

// fuzzPort is how frames name the server's port, which is another one each time.
const fuzzPort = 8080

func newFuzzGateway(t testing.TB) *fuzzGateway {
	echo, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { echo.Close() })
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(time.Minute))
				b := make([]byte, 4096)
				n, _ := c.Read(b)
				c.Write(b[:n])
			}()
		}
	}()
	port := echo.Addr().(*net.TCPAddr).Port
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		t.Skip("the port is taken for UDP:", err)
	}
	t.Cleanup(func() { udp.Close() })
	go func() { // what comes back are DNS answers, more or less
		b := make([]byte, 65536)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if n > 3 {
				b[2] |= 0x80
			}
			udp.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	loopback := Rule{Prefix: netip.MustParsePrefix("127.0.0.1/32"), From: uint16(port), To: uint16(port)}
	c := Config{
		PID: 1, HostLoopback: true, Allow: []Rule{loopback}, DNS: []netip.AddrPort{netip.AddrPortFrom(loopback.Prefix.Addr(), uint16(port))},
		AllowNames: []NameRule{{Name: "*.test", From: 1, To: 1}}, NoPrivateDNS: true, Logger: slog.New(slog.DiscardHandler),
	}.withDefaults()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	guest := net.HardwareAddr(rig.GuestFrames()[1][6:12])
	g, err := newGateway(c, agent.Link{FD: fds[0], MAC: guest, Kind: agent.TAP, Name: "tap0", MTU: 1500, VnetHdr: true, Offload: true, USO: true}, seed{Default6: true, Records: c.records()}, hooks{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the gateway ended: %v", err)
		}
		g.close()
	})
	return &fuzzGateway{fd: fds[1], port: uint16(port), next: make(map[uint16][2]uint32), buf: make([]byte, 1<<17)}
}

// wait waits for the guest's end of the link.
func (g *fuzzGateway) wait(t testing.TB, events int16) {
	p := []unix.PollFd{{Fd: int32(g.fd), Events: events}}
	for deadline := time.Now().Add(time.Minute); ; {
		n, err := unix.Poll(p, 1000)
		if n > 0 && err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the gateway hangs")
		}
	}
}

// receive takes one frame of the gateway, if there is one, and notes what the
// guest's TCP would.
func (g *fuzzGateway) receive(t testing.TB) ([]byte, bool) {
	n, err := unix.Read(g.fd, g.buf)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil, false
	}
	if err != nil || n < vnet.Size+14 {
		t.Fatalf("read of %d bytes: %v", n, err)
	}
	f := g.buf[vnet.Size:n]
	if tcp := tcpOf(f); tcp != nil {
		size := uint32(len(tcp) - int(tcp[12]>>4)*4)
		if tcp[13]&3 != 0 { // SYN and FIN count
			size++
		}
		be := binary.BigEndian
		g.next[be.Uint16(tcp[2:])] = [2]uint32{be.Uint32(tcp[8:]), be.Uint32(tcp[4:]) + size}
	}
	return f, true
}

// tcpOf returns the segment in a frame, nil if there is none.
func tcpOf(f []byte) []byte {
	switch {
	case len(f) >= 14+40 && f[12] == 8 && f[14] == 0x45 && f[23] == 6:
		return f[14+20:]
	case len(f) >= 14+60 && f[12] == 0x86 && f[20] == 6:
		return f[14+40:]
	}
	return nil
}

// send sends a frame. Flags: 1 makes its checksums right, 2 its TCP sequence
// numbers, 4 says that the checksum is left to us, 8 that a header of vnet is in
// front.
func (g *fuzzGateway) send(t testing.TB, flags byte, frame []byte) {
	out := make([]byte, vnet.Size, vnet.Size+len(frame))
	if flags&8 != 0 && len(frame) > vnet.Size {
		copy(out, frame)
		frame = frame[vnet.Size:]
	} else if flags&4 != 0 {
		vnet.Header{Flags: vnet.NeedsCsum, CsumStart: 34, CsumOffset: 16}.Encode(out)
	}
	out = append(out, frame...)
	f := out[vnet.Size:]
	if flags&1 != 0 && len(f) > 12 && f[0]&1 == 0 {
		mac := gatewayMAC(Config{}.Addresses().Gateway4)
		copy(f, mac[:])
	}
	be := binary.BigEndian
	if tcp := tcpOf(f); tcp != nil {
		if be.Uint16(tcp[2:]) == fuzzPort {
			be.PutUint16(tcp[2:], g.port)
		}
		if n, ok := g.next[be.Uint16(tcp)]; ok && flags&2 != 0 {
			be.PutUint32(tcp[4:], n[0])
			be.PutUint32(tcp[8:], n[1])
		}
	} else if len(f) >= 42 && f[12] == 8 && f[23] == 17 && f[14] == 0x45 && be.Uint16(f[36:]) == fuzzPort {
		be.PutUint16(f[36:], g.port)
	}
	if flags&1 != 0 {
		rig.FixChecksums(f)
	}
	for {
		_, err := unix.Write(g.fd, out)
		switch {
		case err == nil, errors.Is(err, unix.EMSGSIZE):
			return
		case errors.Is(err, unix.EAGAIN):
			for _, ok := g.receive(t); ok; _, ok = g.receive(t) {
			}
			g.wait(t, unix.POLLOUT|unix.POLLIN)
		default:
			t.Fatalf("write: %v", err)
		}
	}
}

// alive asks for the gateway's link address and waits for the answer, by which
// time everything before has been taken in.
func (g *fuzzGateway) alive(t testing.TB) {
	a := Config{}.Addresses()
	guest, gw := a.Guest4.As4(), a.Gateway4.As4()
	ask := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x09\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01\x02\x00\x00\x00\x00\x09"), guest[:]...)
	ask = append(append(ask, 0, 0, 0, 0, 0, 0), gw[:]...)
	g.send(t, 0, ask)
	for {
		f, ok := g.receive(t)
		if !ok {
			g.wait(t, unix.POLLIN)
			continue
		}
		if f[12] == 8 && f[13] == 6 && f[21] == 2 && len(f) >= 42 && string(f[32:38]) == string(ask[6:12]) {
			return
		}
	}
}

// appendFrame encodes a frame as FuzzGateway takes it.
func appendFrame(b []byte, flags byte, frame []byte) []byte {
	return append(binary.BigEndian.AppendUint16(append(b, flags), uint16(len(frame))), frame...)
}

// FuzzGateway gives sequences of up to 32 frames to the whole gateway: link
// endpoint, stack, netstack, forwarder, DHCP, DNS. It must answer afterwards.
func FuzzGateway(f *testing.F) {
	var all []byte
	for i, frame := range rig.GuestFrames() {
		f.Add(appendFrame(nil, 1, frame))
		f.Add(appendFrame(nil, 1|8, append(make([]byte, vnet.Size), frame...)))
		if i < 32 {
			all = appendFrame(all, 3, frame)
		}
	}
	f.Add(all)
	g := newFuzzGateway(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		for n := 0; len(b) > 3 && n < 32; n++ {
			flags, size := b[0], min(int(binary.BigEndian.Uint16(b[1:])), len(b)-3)
			g.send(t, flags, b[3:3+size])
			b = b[3+size:]
		}
		if len(g.next) > 1000 {
			clear(g.next)
		}
		g.alive(t)
	})
}

// TestMalformedFrames: the gateway takes a hundred thousand malformed frames,
// headers of vnet among them, and is as it was.
func TestMalformedFrames(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	g := newFuzzGateway(t)
	frames := rig.GuestFrames()
	if len(frames) < 25 {
		t.Fatalf("%d frames to begin with", len(frames))
	}
	count := 100_000
	if testing.Short() {
		count = 10_000
	}
	for i := range count {
		f := rig.Malform(rnd, frames[rnd.IntN(len(frames))])
		flags := byte(rnd.IntN(8))
		if rnd.IntN(4) == 0 {
			head := make([]byte, vnet.Size)
			for j := range head {
				head[j] = []byte{0, 0, 1, 4, 5, 14, 34, byte(rnd.Uint32())}[rnd.IntN(8)]
			}
			flags, f = flags|8, append(head, f...)
		}
		g.send(t, flags, f)
		if i%64 == 0 {
			g.alive(t)
		}
	}
	g.alive(t)
}
