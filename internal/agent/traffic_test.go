package agent

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/vnet"
)

const (
	tcpBytes     = 8 << 20
	datagramSize = 1200
	datagrams    = 1000
	perWrite     = 50 // datagrams in one super-frame
)

// helpSource sends to the address in the order: a stream, then datagrams in
// super-frames.
func helpSource() error {
	addr := os.Getenv(orderEnv)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	sum := sha256.New()
	block := make([]byte, 1<<20)
	for i := range tcpBytes >> 20 {
		for j := range block {
			block[j] = byte(i*7 + j*j)
		}
		sum.Write(block)
		if _, err := conn.Write(block); err != nil {
			return err
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("%x", sum.Sum(nil)); string(answer) != want {
		return fmt.Errorf("sum %s, want %s", answer, want)
	}
	return sendDatagrams(addr)
}

func sendDatagrams(addr string) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, datagramSize)
	})
	if err != nil {
		return err
	}
	for range datagrams / perWrite {
		if _, err := conn.Write(make([]byte, datagramSize*perWrite)); err != nil {
			return err
		}
		time.Sleep(time.Millisecond) // the receiver's buffer is not the test
	}
	return nil
}

// helpSink is the other end of helpSource. It prints how many datagrams came.
func helpSink() error {
	addr := os.Getenv(orderEnv)
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	defer udp.Close()
	if err := udp.(*net.UDPConn).SetReadBuffer(4 << 20); err != nil { // all of it
		return err
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer listener.Close()
	fmt.Println("listening")
	conn, err := listener.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, conn); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "%x", sum.Sum(nil)); err != nil {
		return err
	}
	conn.Close()
	count := 0
	for b := make([]byte, 65536); count < datagrams; count++ {
		if err := udp.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return err
		}
		n, _, err := udp.ReadFrom(b)
		if err != nil {
			break
		}
		if n != datagramSize {
			return fmt.Errorf("datagram of %d bytes", n)
		}
	}
	fmt.Println(count)
	return nil
}

// attachHere attaches this process.
func attachHere(t *testing.T, c *container, spec *LinkSpec) (*Agent, Link) {
	t.Helper()
	ns, err := netns.OpenPID(c.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	a, err := Start(context.Background(), ns, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	link, err := a.OpenLink(*spec)
	if err != nil {
		t.Fatal(err)
	}
	return a, link
}

// A wire joins two links and looks at what passes.
type wire struct {
	a, b    *os.File
	wg      sync.WaitGroup
	largest [2]atomic.Int64 // by direction
	gso     [2][256]atomic.Int64
	errs    [2]error
}

func newWire(a, b Link) *wire {
	w := &wire{a: os.NewFile(uintptr(a.FD), "a"), b: os.NewFile(uintptr(b.FD), "b")}
	w.wg.Go(func() { w.errs[0] = w.pass(0, w.a, w.b) })
	w.wg.Go(func() { w.errs[1] = w.pass(1, w.b, w.a) })
	return w
}

func (w *wire) pass(direction int, from io.Reader, to io.Writer) error {
	b := make([]byte, 128<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return err
		}
		w.gso[direction][vnet.Decode(b).GSOType&^vnet.GSOECN].Add(1)
		w.largest[direction].Store(max(w.largest[direction].Load(), int64(n)))
		if _, err := to.Write(b[:n]); err != nil {
			return err
		}
	}
}

// cut ends the wire and returns what ended it before, if anything did.
func (w *wire) cut() error {
	w.a.Close()
	w.b.Close()
	w.wg.Wait()
	for _, err := range w.errs {
		if !errors.Is(err, os.ErrClosed) {
			return err
		}
	}
	return nil
}

// Two kernels talk over each kind of link; super-frames have to go in and out
// of both, for TCP and for UDP.
func TestSuperFrames(t *testing.T) {
	for _, kinds := range [][2]LinkKind{{TAP, TAP}, {Veth, Veth}, {TAP, Veth}} {
		for _, mtu := range []int{65520, 1500} {
			t.Run(fmt.Sprintf("%s-%s-%d", kinds[0], kinds[1], mtu), func(t *testing.T) { superFrames(t, kinds, mtu) })
		}
	}
}

func superFrames(t *testing.T, kinds [2]LinkKind, mtu int) {
	var containers [2]*container
	var links [2]Link
	for i, kind := range kinds {
		containers[i] = startContainer(t, rootless("-Urn")...)
		spec := testLink(kind)
		spec.MTU = mtu
		var a *Agent
		a, links[i] = attachHere(t, containers[i], spec)
		addresses := *testAddresses
		addresses.Addr4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, byte(100 + i)}), 24)
		addresses.Addr6 = netip.MustParsePrefix(fmt.Sprintf("fd75:736e:6574::%d/64", 100+i))
		if _, err := a.Configure(addresses); err != nil {
			t.Fatal(err)
		}
	}
	w := newWire(links[0], links[1])
	for i, addr := range []string{"10.0.2.101:5000", "10.0.2.100:5000", "[fd75:736e:6574::101]:5000"} {
		from := i % 2
		transfer(t, containers[from], containers[1-from], addr, w)
	}
	if err := w.cut(); err != nil {
		t.Error(err)
	}
	for direction := range w.largest {
		if n := w.largest[direction].Load(); n < 60000 {
			t.Errorf("direction %d: no frame of over %d bytes", direction, n)
		}
		if w.gso[direction][vnet.GSOUDP].Load() == 0 {
			t.Errorf("direction %d: no UDP super-frame", direction)
		}
	}
	if mtu == 1500 && (w.gso[0][vnet.GSOTCPv4].Load() == 0 || w.gso[0][vnet.GSOTCPv6].Load() == 0) {
		t.Error("no TCP super-frames")
	}
}

// transfer sends from one container to the other.
func transfer(t *testing.T, from, to *container, addr string, w *wire) {
	t.Helper()
	sink := to.helper(t, "sink", addr)
	out, err := sink.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	sink.Stderr = os.Stderr
	if err := sink.Start(); err != nil {
		t.Fatal(err)
	}
	defer sink.Process.Kill()
	var word string
	if _, err := fmt.Fscanln(out, &word); err != nil || word != "listening" {
		t.Fatalf("sink: %q, %v", word, err)
	}
	began := time.Now()
	if b, err := from.helper(t, "source", addr).CombinedOutput(); err != nil {
		t.Fatalf("source: %v: %s", err, b)
	}
	var count int
	if _, err := fmt.Fscanln(out, &count); err != nil {
		t.Fatalf("sink: %v", err)
	}
	if err := sink.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%s: %v, %d of %d datagrams; frames: largest %d, plain %d, tcp4 %d, tcp6 %d, udp %d", addr, time.Since(began), count, datagrams,
		w.largest[0].Load(), w.gso[0][0].Load(), w.gso[0][vnet.GSOTCPv4].Load(), w.gso[0][vnet.GSOTCPv6].Load(), w.gso[0][vnet.GSOUDP].Load())
	if count < datagrams*9/10 {
		t.Errorf("%d of %d datagrams came", count, datagrams)
	}
}

// helper prepares a helper inside the container.
func (c *container) helper(t *testing.T, role, order string) *exec.Cmd {
	t.Helper()
	cmd := c.command(testBinary(t))
	cmd.Env = append(os.Environ(), roleEnv+"="+role, orderEnv+"="+order)
	return cmd
}

// The kernel at the far end of a veth pair must be neither seen nor heard, or
// the guest would take it for a neighbour.
func TestVethFarEndIsSilent(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Veth))
	defer unix.Close(link.FD)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Fatal(err)
	}
	out, err := c.helper(t, "listen", link.MAC.String()).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := strings.TrimSpace(string(out)); got != "sent 9, heard 0" {
		t.Error(got)
	}
	// And all of it arrived, so that the silence was not for lack of hearing.
	b := make([]byte, 128<<10)
	arrived := 0
	for {
		n, err := unix.Read(link.FD, b)
		if err != nil {
			break
		}
		if strings.Contains(string(b[:n]), provocation) {
			arrived++
		}
	}
	if arrived != 9 {
		t.Errorf("%d of 9 frames arrived", arrived)
	}
}

const provocation = "answer me, far end"

// helpListen runs inside the container: it sends what a kernel would answer if
// it could, and counts what comes in.
func helpListen() error {
	mac, err := net.ParseMAC(os.Getenv(orderEnv))
	if err != nil {
		return err
	}
	ifi, err := net.InterfaceByName("tap0")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: ifi.Index}); err != nil {
		return err
	}
	frames := provocations(mac)
	for _, f := range frames {
		if _, err := unix.Write(fd, f); err != nil {
			return err
		}
	}
	heard := 0
	b := make([]byte, 65536)
	for deadline := time.Now().Add(1500 * time.Millisecond); time.Now().Before(deadline); {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EAGAIN) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		heard++
		fmt.Fprintf(os.Stderr, "heard %x\n", b[:n])
	}
	fmt.Printf("sent %d, heard %d\n", len(frames), heard)
	return nil
}

// provocations are frames that get an answer from a kernel with an address:
// ARP, neighbour solicitation, echo to everybody, a datagram and a connection
// to closed ports. All are broadcast on the link, for the far end's own address
// is nobody's business.
func provocations(mac net.HardwareAddr) [][]byte {
	ether := func(dst []byte, proto uint16, payload []byte) []byte {
		f := append(append([]byte{}, dst...), mac...)
		f = binary.BigEndian.AppendUint16(f, proto)
		return append(append(f, payload...), provocation...)
	}
	everybody := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	all6 := []byte{0x33, 0x33, 0, 0, 0, 1}
	arp := func(target string) []byte {
		p := []byte{0, 1, 8, 0, 6, 4, 0, 1}
		p = append(append(p, mac...), 10, 0, 2, 100)
		return ether(everybody, unix.ETH_P_ARP, append(append(p, 0, 0, 0, 0, 0, 0), netip.MustParseAddr(target).AsSlice()...))
	}
	ip4 := func(dst string, proto byte, payload []byte) []byte {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)+len(provocation)))
		copy(h[12:], []byte{10, 0, 2, 100})
		copy(h[16:], netip.MustParseAddr(dst).AsSlice())
		binary.BigEndian.PutUint16(h[10:], ^onesSum(0, h))
		return ether(everybody, unix.ETH_P_IP, append(h, payload...))
	}
	ip6 := func(dst string, proto byte, payload []byte) []byte {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, proto, 255
		binary.BigEndian.PutUint16(h[4:], uint16(len(payload)+len(provocation)))
		copy(h[8:], netip.MustParseAddr("fd75:736e:6574::100").AsSlice())
		copy(h[24:], netip.MustParseAddr(dst).AsSlice())
		text := append(append([]byte{}, payload...), provocation...)
		sum := onesSum(uint32(len(text))+uint32(proto), h[8:40])
		binary.BigEndian.PutUint16(payload[2:], ^onesSum(uint32(sum), text))
		return ether(all6, unix.ETH_P_IPV6, append(h, payload...))
	}
	echo := []byte{8, 0, 0, 0, 0, 1, 0, 1}
	text := append(append([]byte{}, echo...), provocation...)
	binary.BigEndian.PutUint16(echo[2:], ^onesSum(0, text))
	udp := []byte{0x30, 0x39, 0x30, 0x39, 0, byte(8 + len(provocation)), 0, 0}
	solicit := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr("fd75:736e:6574::2").AsSlice()...)
	query := append([]byte{130, 0, 0, 0, 0, 1, 0, 0}, make([]byte, 16)...)
	return [][]byte{
		arp("10.0.2.2"), arp("127.0.0.1"),
		ip4("255.255.255.255", unix.IPPROTO_ICMP, echo), ip4("10.0.2.2", unix.IPPROTO_ICMP, echo), ip4("10.0.2.2", unix.IPPROTO_UDP, udp),
		ip4("224.0.0.1", unix.IPPROTO_ICMP, echo),
		ip6("ff02::1", unix.IPPROTO_ICMPV6, []byte{128, 0, 0, 0, 0, 1, 0, 1}),
		ip6("ff02::1", unix.IPPROTO_ICMPV6, solicit), ip6("ff02::1", unix.IPPROTO_ICMPV6, query),
	}
}

// onesSum is the Internet checksum's sum, not inverted.
func onesSum(sum uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
