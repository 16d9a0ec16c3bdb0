package e2e

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
)

// A shared is a world without a guest: those come with their networks.
type shared struct{ *rig.Net }

func newShared(t *testing.T) *shared {
	t.Helper()
	rig.NeedUsernet(t)
	t.Parallel()
	return &shared{rig.New(t, rig.Options{})}
}

// networkEnv is what usernet needs to find networks.
var networkEnv = []string{"XDG_RUNTIME_DIR=/run/user/1000", "HOME=/tmp"}

// A member is a guest on a shared network.
type member struct {
	*rig.Attach
	guest *rig.Node
}

// join attaches a new guest to a network.
func (s *shared) join(t *testing.T, network, name string, flags ...string) *member {
	t.Helper()
	m := &member{guest: s.Guest(t)}
	m.Attach = s.Attach(t, m.guest, append([]string{"--network", network, "--name", name, "--dns", rig.Web4.String()}, flags...)...)
	return m
}

// addr returns the address of a member's interface.
func (m *member) addr(t *testing.T, six bool) netip.Addr {
	t.Helper()
	for word := range strings.FieldsSeq(m.guest.Must(t, "ip", pick(six, "-4", "-6"), "-o", "addr", "show", "dev", "tap0", "scope", "global")) {
		if p, err := netip.ParsePrefix(word); err == nil {
			return p.Addr()
		}
	}
	t.Fatal("a member has no address")
	return netip.Addr{}
}

func (m *member) mac(t *testing.T) net.HardwareAddr {
	t.Helper()
	mac, err := net.ParseMAC(strings.TrimSpace(m.guest.Must(t, "cat", "/sys/class/net/tap0/address")))
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

// dns is the network's DNS server as a member knows it.
func (m *member) dns(t *testing.T) netip.Addr {
	b := m.addr(t, false).As4()
	b[3] = 3
	return netip.AddrFrom4(b)
}

// A sharedNetwork is what "usernet network inspect" tells.
type sharedNetwork struct {
	Name    string `json:"name"`
	HubPID  int    `json:"hub_pid"`
	Members []struct {
		Name      string       `json:"name"`
		Addresses []netip.Addr `json:"addresses"`
		Forwards  []string     `json:"forwards"`
	} `json:"members"`
	Switch struct {
		Spoofed  int `json:"spoofed"`
		Isolated int `json:"isolated"`
	} `json:"switch"`
	Sandbox struct {
		WorkerPID int `json:"worker_pid"`
	} `json:"sandbox"`
}

func (s *shared) inspect(t *testing.T, network string) (n sharedNetwork, ok bool) {
	t.Helper()
	p := s.usernet(t, "network", "inspect", "--json", network)
	if p.code != 0 {
		return n, false
	}
	if err := json.Unmarshal([]byte(p.stdout), &n); err != nil {
		t.Fatalf("%v: %s", err, p.stdout)
	}
	return n, true
}

func (n sharedNetwork) names() string {
	var names []string
	for _, m := range n.Members {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

type ran struct {
	code           int
	stdout, stderr string
}

// usernet runs a command of usernet as the ordinary user.
func (s *shared) usernet(t *testing.T, args ...string) ran {
	t.Helper()
	p := s.User.Exec(t, rig.Command{Args: append([]string{rig.Binary(t)}, args...), Env: networkEnv})
	code, ok := p.Wait(20 * time.Second)
	if !ok {
		t.Fatalf("usernet %q does not end", args)
	}
	return ran{code, p.Stdout(), p.Stderr()}
}

// within ends the test unless f holds in time.
func within(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	if !rig.Poll(limit, f) {
		t.Errorf("%s: not within %v", what, max(limit, rig.Patience))
	}
}

func (s *shared) wantGone(t *testing.T) {
	t.Helper()
	s.WantNothingLeft(t, 5*time.Second, "usernet", "usernet-agent", "usernet-hub", "usernet-worker")
	if left, _ := filepath.Glob(filepath.Join(s.Dir, "run/user/1000/usernet/networks/*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// talkScript serves, and asks the other members by their names, with each
// program and family.
const talkScript = `
dir=$(mktemp -d) || exit
trap 'rm -rf $dir' EXIT; trap 'exit 143' TERM
mkdir -p $dir/www.$NAME && echo "this is $NAME" > $dir/www.$NAME/index.html
busybox httpd -f -p '[::]:8000' -h $dir/www.$NAME &
iperf3 -s > $dir/iperf.$NAME 2>&1 &
try() { for i in $(seq 60); do "$@" > $dir/out.$NAME 2>&1 && return 0; sleep 0.5; done; echo "FAILED: $*"; cat $dir/out.$NAME; }
for peer in "$@"; do for family in -4 -6; do
	try ping $family -c 1 -W 1 $peer
	try curl $family -sS -m 3 http://$peer:8000/
	grep -q "this is $peer" $dir/out.$NAME || echo "FAILED: got $(cat $dir/out.$NAME) of $peer"
	try iperf3 $family -n 4M -c $peer
	try iperf3 $family -R -n 4M -c $peer.blue.usernet.internal
done; done
echo finished
sleep 600 & wait $!`

// TestNetworkTalk: three namespaces reach each other by name with real programs.
func TestNetworkTalk(t *testing.T) {
	rig.NeedTools(t, "ping", "curl", "iperf3", "busybox")
	s := newShared(t)
	names := []string{"web", "db", "cache"}
	var procs []*rig.Proc
	for i, name := range names {
		others := slices.Concat(names[:i], names[i+1:])
		procs = append(procs, s.User.Exec(t, rig.Command{
			Args: append([]string{rig.Binary(t), "run", "--network", "blue", "--name", name, "--dns", rig.Web4.String(),
				"--", "sh", "-c", talkScript, "sh"}, others...),
			Env: append([]string{"NAME=" + name}, networkEnv...),
		}))
	}
	for i, p := range procs {
		within(t, 40*time.Second, names[i], func() bool { return strings.Contains(p.Stdout(), "finished") })
		if out := p.Stdout(); strings.Contains(out, "FAILED") {
			t.Errorf("%s: %s", names[i], out)
		}
	}
	n, _ := s.inspect(t, "blue")
	if n.names() != "cache db web" {
		t.Errorf("members: %q", n.names())
	}
	for _, p := range procs {
		p.Signal(syscall.SIGTERM)
	}
	for _, p := range procs {
		p.WantExit(t, 128+15, 10*time.Second)
	}
	s.wantGone(t)
}

// TestNetworkNames: names are there at once, gone at once, and nobody else's.
func TestNetworkNames(t *testing.T) {
	rig.NeedTools(t, "dig")
	s := newShared(t)
	logged := startDNS(t, s.Internet, rig.Web4.String(), "--log-queries")
	a := s.join(t, "blue", "web", "--alias", "www,frontend")
	b := s.join(t, "blue", "db", "--alias", "frontend")
	other := s.join(t, "red", "db")
	look := func(m *member, name, kind string) string {
		got, text := dig(t, m.guest, m.dns(t), name, kind)
		return status(text) + " " + strings.Join(got, " ")
	}
	a4, a6, b4, b6 := a.addr(t, false), a.addr(t, true), b.addr(t, false), b.addr(t, true)
	for _, tt := range []struct {
		from             *member
		name, kind, want string
	}{
		{b, "web", "A", "NOERROR " + a4.String()},
		{b, "WWW", "A", "NOERROR " + a4.String()},
		{b, "www.blue.usernet.internal", "AAAA", "NOERROR " + a6.String()},
		{a, "db.blue.usernet.internal", "A", "NOERROR " + b4.String()},
		{a, "db", "AAAA", "NOERROR " + b6.String()},
		{a, "frontend", "A", "NOERROR " + a4.String() + " " + b4.String()},
		{a, "cache.blue.usernet.internal", "A", "NXDOMAIN "},
		{a, "db.red.usernet.internal", "A", "NXDOMAIN "},
		{a, "blue.usernet.internal", "A", "NOERROR "},
		{other, "db", "A", "NOERROR " + other.addr(t, false).String()},
		{other, "web.blue.usernet.internal", "A", "NXDOMAIN "},
	} {
		if got := look(tt.from, tt.name, tt.kind); got != tt.want {
			t.Errorf("%s %s: %q, want %q", tt.name, tt.kind, got, tt.want)
		}
	}
	for _, addr := range []netip.Addr{a4, a6} {
		got, _ := dig(t, b.guest, b.dns(t), "-x", addr.String())
		slices.Sort(got)
		if want := "frontend. frontend.blue.usernet.internal. web. web.blue.usernet.internal. www. www.blue.usernet.internal."; strings.Join(got, " ") != want {
			t.Errorf("%v is %q", addr, got)
		}
	}
	if got := status(second(dig(t, b.guest, b.dns(t), "-x", b4.Next().String()))); got != "NXDOMAIN" {
		t.Errorf("an address of nobody: %s", got)
	}
	// The death of a member's usernet is the end of its names.
	a.Signal(syscall.SIGKILL)
	within(t, time.Second, "the name of a dead member is gone", func() bool {
		return look(b, "web.blue.usernet.internal", "A") == "NXDOMAIN "
	})
	if got := look(b, "frontend", "A"); got != "NOERROR "+b4.String() {
		t.Errorf("an alias after the death of one of two: %q", got)
	}
	within(t, time.Second, "a dead member is gone", func() bool {
		n, _ := s.inspect(t, "blue")
		return n.names() == "db"
	})
	if text := logged.Stderr() + logged.Stdout(); strings.Contains(text, "usernet.internal") || strings.Contains(text, "in-addr.arpa") || strings.Contains(text, "ip6.arpa") {
		t.Errorf("names left the network: %s", text)
	}
}

func second[A, B any](_ A, b B) B { return b }

// TestNetworkApart: networks do not reach each other, nor do isolated members,
// by whatever frames.
func TestNetworkApart(t *testing.T) {
	rig.NeedTools(t, "ping")
	s := newShared(t)
	web := s.join(t, "blue", "web")
	apart := s.join(t, "blue", "apart", "--isolate")
	red := s.join(t, "red", "web")
	ports := make(map[*member]rig.Ports) // that nothing outside listens on
	for _, m := range []*member{web, apart, red} {
		ports[m] = m.guest.ServeOn(t, true)
	}
	families(t, func(t *testing.T, six bool) {
		for _, pair := range [][2]*member{{apart, web}, {web, apart}, {red, web}, {web, red}} {
			to := pair[1].addr(t, six)
			r := rig.Dial.On(t, pair[0].guest, rig.DialRequest{Network: "tcp", Addr: at(to, ports[pair[1]].Echo), Timeout: 700 * time.Millisecond})
			if r.String() == "connected" {
				t.Errorf("to %s: %v", to, r)
			}
		}
		// What is outside is there for all of them.
		for _, m := range []*member{web, apart, red} {
			r := rig.Dial.On(t, m.guest, rig.DialRequest{Network: "tcp", Addr: at(pick(six, rig.Web4, rig.Web6), rig.Services.Echo)})
			if r.String() != "connected" {
				t.Errorf("outside: %v", r)
			}
		}
	})
	// Frames of its own making, to the other's MAC and to all.
	for _, pair := range [][2]*member{{apart, web}, {web, apart}, {red, web}} {
		from, to := pair[0], pair[1]
		if n := heard(t, from, to, forged(t, from, to)); n > 0 {
			t.Errorf("%d frames passed", n)
		}
	}
	// Who is not isolated may not lie about who it is.
	third := s.join(t, "blue", "third")
	lies := forged(t, third, web)
	truth := lies[0]
	if n := heard(t, third, web, [][]byte{truth}); n != 1 {
		t.Errorf("a frame that is no lie: %d passed", n)
	}
	before, _ := s.inspect(t, "blue")
	gateway := third.addr(t, false).As4()
	gateway[3] = 2
	lie := func(f []byte, off int, b []byte) []byte {
		f = slices.Clone(f)
		copy(f[off:], b)
		return f
	}
	if n := heard(t, third, web, [][]byte{
		lie(truth, 6, []byte{2, 9, 9, 9, 9, 9}), // MAC
		lie(truth, 26, gateway[:]),              // IPv4 source
		lie(lies[1], 28, gateway[:]),            // ARP sender
		lie(lies[1], 22, web.mac(t)),            // ARP sender's MAC
	}); n != 0 {
		t.Errorf("%d lies passed", n)
	}
	if after, _ := s.inspect(t, "blue"); after.Switch.Spoofed != before.Switch.Spoofed+4 {
		t.Errorf("%d lies counted, want 4", after.Switch.Spoofed-before.Switch.Spoofed)
	}
}

// marker is what forged frames carry.
const marker = "usernet-forged"

// forged makes a datagram and an ARP request from one member to another, and the
// same to all.
func forged(t *testing.T, from, to *member) [][]byte {
	t.Helper()
	src, dst := from.addr(t, false).As4(), to.addr(t, false).As4()
	var frames [][]byte
	for _, mac := range []net.HardwareAddr{to.mac(t), {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}} {
		udp := append([]byte{0x30, 0x39, 0x30, 0x39, 0, byte(8 + len(marker)), 0, 0}, marker...)
		ip := []byte{0x45, 0, 0, byte(20 + len(udp)), 0, 1, 0, 0, 64, 17, 0, 0}
		ip = append(append(ip, src[:]...), dst[:]...)
		eth := append(append(slices.Clone(mac), from.mac(t)...), 8, 0)
		arp := append(append(slices.Clone(mac), from.mac(t)...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
		arp = append(append(append(append(arp, from.mac(t)...), src[:]...), 0, 0, 0, 0, 0, 0), dst[:]...)
		frames = append(frames, slices.Concat(eth, ip, udp), append(arp, marker...))
	}
	return frames
}

// heard counts the frames of those sent that another member gets.
func heard(t *testing.T, from, to *member, frames [][]byte) int {
	t.Helper()
	n := make(chan int)
	go func() {
		got, err := countMarked.Try(to.guest, 700)
		if err != nil {
			t.Error(err)
		}
		n <- got
	}()
	time.Sleep(200 * time.Millisecond)
	sendRaw.On(t, from.guest, frames)
	return <-n
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

func packetSocket() (int, *unix.SockaddrLinklayer, error) {
	iface, err := net.InterfaceByName("tap0")
	if err != nil {
		return -1, nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return -1, nil, err
	}
	ll := &unix.SockaddrLinklayer{Ifindex: iface.Index, Protocol: htons(unix.ETH_P_ALL)}
	return fd, ll, unix.Bind(fd, ll)
}

// sendRaw sends frames as they are.
var sendRaw = rig.NewFunc("e2e.sendRaw", func(_ context.Context, frames [][]byte) (struct{}, error) {
	fd, ll, err := packetSocket()
	if err != nil {
		return struct{}{}, err
	}
	defer unix.Close(fd)
	for _, f := range frames {
		if err := unix.Sendto(fd, f, 0, ll); err != nil {
			return struct{}{}, err
		}
	}
	return struct{}{}, nil
})

// countMarked counts the frames with the marker that come in so many
// milliseconds.
var countMarked = rig.NewFunc("e2e.countMarked", func(_ context.Context, milliseconds int) (int, error) {
	fd, _, err := packetSocket()
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	b := make([]byte, 1<<16)
	count := 0
	for end := time.Now().Add(time.Duration(milliseconds) * time.Millisecond); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING && strings.Contains(string(b[:n]), marker) {
			count++
		}
	}
	return count, nil
})

// A groupTalk is a datagram to a group.
type groupTalk struct {
	Group string // with port
	Text  string
}

var sendGroup = rig.NewFunc("e2e.sendGroup", func(_ context.Context, g groupTalk) (struct{}, error) {
	a, err := netip.ParseAddrPort(g.Group)
	if err != nil {
		return struct{}{}, err
	}
	zone := ""
	if a.Addr().Is6() {
		zone = "tap0"
	}
	iface, err := net.InterfaceByName("tap0")
	if err != nil {
		return struct{}{}, err
	}
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return struct{}{}, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return struct{}{}, err
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(iface.Index)})
	})
	_, err = c.WriteToUDPAddrPort([]byte(g.Text), netip.AddrPortFrom(a.Addr().WithZone(zone), a.Port()))
	return struct{}{}, err
})

// hearGroup returns the first datagram to a group.
var hearGroup = rig.NewFunc("e2e.hearGroup", func(ctx context.Context, group string) (string, error) {
	a, err := netip.ParseAddrPort(group)
	if err != nil {
		return "", err
	}
	iface, err := net.InterfaceByName("tap0")
	if err != nil {
		return "", err
	}
	c, err := net.ListenMulticastUDP("udp", iface, net.UDPAddrFromAddrPort(a))
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(rig.Patience))
	b := make([]byte, 2048)
	n, _, err := c.ReadFromUDP(b)
	return string(b[:n]), err
})

// TestNetworkMulticast: mDNS and LLMNR pass between members.
func TestNetworkMulticast(t *testing.T) {
	s := newShared(t)
	a, b, c := s.join(t, "blue", "a"), s.join(t, "blue", "b"), s.join(t, "blue", "c")
	for _, group := range []string{"224.0.0.251:5353", "[ff02::fb]:5353", "224.0.0.252:5355"} {
		heard := make(chan string, 2)
		for _, m := range []*member{b, c} {
			go func() {
				text, err := hearGroup.Try(m.guest, group)
				if err != nil {
					text = err.Error()
				}
				heard <- text
			}()
		}
		time.Sleep(300 * time.Millisecond)
		sendGroup.On(t, a.guest, groupTalk{group, "who is there"})
		for range 2 {
			if got := <-heard; got != "who is there" {
				t.Errorf("%s: heard %q", group, got)
			}
		}
	}
}

// TestNetworkPublish: every member has ports of its own, which see their clients
// and outlive the hub.
func TestNetworkPublish(t *testing.T) {
	s := newShared(t)
	a := s.join(t, "blue", "a", "-p", fmt.Sprintf("8081:%d", rig.Services.Whoami))
	b := s.join(t, "blue", "b", "-p", fmt.Sprintf("8082:%d", rig.Services.Whoami), "-p", fmt.Sprintf("8082:%d/udp", rig.Services.Whoami))
	a.guest.ServeOn(t, false)
	b.guest.ServeOn(t, false)
	check := func(when string) {
		t.Helper()
		for i, port := range []int{8081, 8082} {
			for _, six := range []bool{false, true} {
				source := netip.AddrPortFrom(pick(six, internet4, internet6), uint16(42000+i))
				r := rig.ReadAll.On(t, s.Internet, rig.DialRequest{Network: "tcp", Addr: host(six, port), Source: source.String()})
				if got, err := netip.ParseAddrPort(r.Text); err != nil || got.Addr() != source.Addr() {
					t.Errorf("%s, port %d: the server saw %v", when, port, r)
				}
			}
		}
		r := rig.Dial.On(t, s.Internet, rig.DialRequest{Network: "udp", Addr: host(false, 8082)})
		if !strings.HasPrefix(r.Text, internet4.String()+":") {
			t.Errorf("%s, UDP: the server saw %v", when, r)
		}
	}
	check("at first")
	s.killWorker(t, "blue")
	check("after the worker's death")
	n, _ := s.inspect(t, "blue")
	before := n.HubPID
	addrs := [2]netip.Addr{a.addr(t, false), b.addr(t, false)}
	s.Host.Must(t, "kill", "-9", strconv.Itoa(hubOf(t, s)))
	within(t, 5*time.Second, "another hub has both members", func() bool {
		n, ok := s.inspect(t, "blue")
		return ok && n.HubPID != before && len(n.Members) == 2 && len(n.Members[0].Forwards)+len(n.Members[1].Forwards) == 3
	})
	if got := [2]netip.Addr{a.addr(t, false), b.addr(t, false)}; got != addrs {
		t.Errorf("addresses were %v, are %v", addrs, got)
	}
	check("after the hub's death")
	r := rig.Dial.On(t, a.guest, rig.DialRequest{Network: "tcp", Addr: at(addrs[1], rig.Services.Echo)})
	if r.String() != "connected" {
		t.Errorf("to the other member after the hub's death: %v", r)
	}
	// A port ends with its member, within a second.
	a.Signal(syscall.SIGKILL)
	within(t, time.Second, "the port of a dead member is closed", func() bool {
		return rig.Dial.On(t, s.User, rig.DialRequest{Network: "tcp", Addr: "127.0.0.1:8081"}).Errno == syscall.ECONNREFUSED
	})
	b.Signal(syscall.SIGTERM)
	s.wantGone(t)
}

// killWorker ends the process that faces a network's guests, and waits until
// another one does.
func (s *shared) killWorker(t *testing.T, network string) {
	t.Helper()
	n, ok := s.inspect(t, network)
	if !ok || n.Sandbox.WorkerPID == 0 {
		t.Fatal("the network has no worker")
	}
	s.Host.Must(t, "kill", "-9", strconv.Itoa(n.Sandbox.WorkerPID))
	began := time.Now()
	if !rig.Poll(10*time.Second, func() bool {
		now, ok := s.inspect(t, network)
		return ok && now.Sandbox.WorkerPID != 0 && now.Sandbox.WorkerPID != n.Sandbox.WorkerPID
	}) {
		t.Fatal("no other worker has come")
	}
	t.Logf("another worker after %v", time.Since(began).Round(time.Millisecond))
}

// TestNetworkWorkerEnds: when the process that faces the guests ends, the next one
// serves the same members, with their names and addresses.
func TestNetworkWorkerEnds(t *testing.T) {
	rig.NeedTools(t, "dig", "ping")
	s := newShared(t)
	a := s.join(t, "blue", "web", "--alias", "front")
	b := s.join(t, "blue", "db")
	a.guest.ServeOn(t, false)
	gone := s.join(t, "blue", "gone")
	gone.Signal(syscall.SIGKILL)
	gone.Wait(10 * time.Second)
	within(t, 5*time.Second, "a member has left", func() bool { n, _ := s.inspect(t, "blue"); return n.names() == "db web" })
	before, _ := s.inspect(t, "blue")
	a4, a6 := a.addr(t, false), a.addr(t, true)
	for range 2 {
		s.killWorker(t, "blue")
		for name, want := range map[string]string{
			"web A": a4.String(), "front.blue.usernet.internal A": a4.String(), "web AAAA": a6.String(), "gone A": "",
		} {
			got, text := dig(t, b.guest, b.dns(t), strings.Fields(name)...)
			if strings.Join(got, " ") != want {
				t.Errorf("%s: %q, want %q:\n%s", name, got, want, text)
			}
		}
		for _, six := range []bool{false, true} {
			b.guest.Must(t, "ping", "-c1", "-W5", a.addr(t, six).String())
			for _, to := range []string{at(a.addr(t, six), rig.Services.Echo), web(six, rig.Services.Echo)} {
				if r := rig.Dial.On(t, b.guest, rig.DialRequest{Network: "tcp", Addr: to}); r.String() != "connected" {
					t.Errorf("to %s: %v", to, r)
				}
			}
		}
	}
	c := s.join(t, "blue", "cache")
	b.guest.Must(t, "ping", "-c1", "-W5", c.addr(t, false).String())
	after, _ := s.inspect(t, "blue")
	if after.HubPID != before.HubPID || after.names() != "cache db web" {
		t.Errorf("was %+v, is %+v", before, after)
	}
	for _, m := range []*member{a, b, c} {
		m.Signal(syscall.SIGTERM)
	}
	s.wantGone(t)
}

// TestNetworkVeth: members whose interface is one end of a veth pair share a network
// as those with a TAP do.
func TestNetworkVeth(t *testing.T) {
	rig.NeedTools(t, "dig", "ping")
	s := newShared(t)
	a := s.join(t, "blue", "web", "--link=veth", "-p", fmt.Sprintf("8081:%d", rig.Services.Whoami))
	b := s.join(t, "blue", "db", "--link=veth")
	a.guest.ServeOn(t, false)
	for _, when := range []string{"at first", "after the worker's death"} {
		for _, six := range []bool{false, true} {
			b.guest.Must(t, "ping", "-c1", "-W5", a.addr(t, six).String())
			talk := rig.Talk{
				Addr:   at(a.addr(t, six), rig.Services.Talk),
				Client: []rig.Step{rig.Send(3<<20, 1), rig.CloseWrite(), rig.Receive()},
				Server: []rig.Step{rig.Receive(), rig.Send(3<<20, 2), rig.CloseWrite()},
			}
			r, err := talk.Do(b.guest, a.guest, 20*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, when, r[0], 3<<20, 3<<20)
			if r := rig.Dial.On(t, b.guest, rig.DialRequest{Network: "tcp", Addr: web(six, rig.Services.Echo)}); r.String() != "connected" {
				t.Errorf("%s, to the outside: %v", when, r)
			}
		}
		if got, text := dig(t, b.guest, b.dns(t), "web"); strings.Join(got, " ") != a.addr(t, false).String() {
			t.Errorf("%s: web is %q:\n%s", when, got, text)
		}
		if r := rig.Dial.On(t, s.Internet, rig.DialRequest{Network: "tcp", Addr: host(false, 8081)}); r.Errno != 0 {
			t.Errorf("%s, published: %v", when, r)
		}
		if when == "at first" {
			s.killWorker(t, "blue")
		}
	}
	a.Signal(syscall.SIGTERM)
	b.Signal(syscall.SIGTERM)
	s.wantGone(t)
}

// TestNetworkWorkerSealed: the process that faces the guests of a network has no
// rights, and members can tell.
func TestNetworkWorkerSealed(t *testing.T) {
	s := newShared(t)
	a := s.join(t, "blue", "a")
	n, _ := s.inspect(t, "blue")
	if n.Sandbox.WorkerPID == 0 {
		t.Fatal("the network has no worker")
	}
	wantSealed(t, n.Sandbox.WorkerPID, s.User, a.guest)
	if p := s.usernet(t, "info", "--json"); p.code != 0 || !strings.Contains(p.stdout, fmt.Sprintf(`"worker_pid":%d`, n.Sandbox.WorkerPID)) {
		t.Errorf("a member does not tell of the worker: %+v", p)
	}
}

// TestNetworkCapture: what passes between members is captured by any of them, and
// goes on with the next worker.
func TestNetworkCapture(t *testing.T) {
	rig.NeedTools(t, "tcpdump", "ping")
	s := newShared(t)
	dir := shortDir(t)
	all, some := filepath.Join(dir, "all.pcapng"), filepath.Join(dir, "some.pcapng")
	a := s.join(t, "blue", "a", "--pcap", all)
	p := s.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "capture", "-w", some, "icmp"}, Env: networkEnv})
	if !rig.Poll(20*time.Second, func() bool { // the heads are there
		return s.User.Run(t, "test", "-s", some, "-a", "-s", all).Code == 0
	}) {
		t.Fatalf("nothing is captured: %s", p.Stderr())
	}
	b, c := s.join(t, "blue", "b"), s.join(t, "blue", "c")
	pings := func(path, what string) int {
		return strings.Count(s.User.Run(t, "tcpdump", "-nr", path).Stdout, what)
	}
	b.guest.Must(t, "ping", "-c1", "-W5", c.addr(t, false).String())
	within(t, 20*time.Second, "a ping between two others is captured", func() bool { return pings(all, "ICMP echo reply") > 0 })
	s.killWorker(t, "blue")
	within(t, 20*time.Second, "a ping is captured after the worker's death", func() bool {
		c.guest.Must(t, "ping", "-c1", "-W5", a.addr(t, false).String())
		return pings(all, c.addr(t, false).String()+" > "+a.addr(t, false).String()+": ICMP echo request") > 0
	})
	p.Signal(syscall.SIGINT)
	if code, ok := p.Wait(20 * time.Second); !ok || code != 0 {
		t.Errorf("status %d, ended %t: %s", code, ok, p.Stderr())
	}
	if pings(some, "ICMP echo reply") == 0 || pings(some, "ARP") != 0 {
		t.Errorf("captured with a filter:\n%s", s.User.Run(t, "tcpdump", "-nr", some).Stdout)
	}
	if code, ok := s.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "capture", "-w", some, "no filter"}, Env: networkEnv}).Wait(20 * time.Second); !ok || code == 0 {
		t.Errorf("a filter that is none: status %d", code)
	}
	for _, m := range []*member{a, b, c} {
		m.Signal(syscall.SIGTERM)
	}
	s.wantGone(t)
}

// hubOf finds the only hub's process, as the host knows it.
func hubOf(t *testing.T, s *shared) int {
	t.Helper()
	pid, err := findHub.Try(s.Host, struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

var findHub = rig.NewFunc("e2e.findHub", func(context.Context, struct{}) (int, error) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return 0, err
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, _ := os.ReadFile(d + "/cmdline")
		ns, _ := os.Readlink(d + "/ns/net")
		if strings.HasPrefix(string(b), "usernet-hub\x00") && ns == own {
			return strconv.Atoi(filepath.Base(d))
		}
	}
	return 0, os.ErrNotExist
})

// TestNetworkSecond: a guest on two networks has an interface on each, and one
// default route.
func TestNetworkSecond(t *testing.T) {
	s := newShared(t)
	m := s.join(t, "blue", "web")
	s.Attach(t, m.guest, "--network", "red", "--name", "web", "--ifname", "tap1", "--dns", rig.Web4.String())
	blue, red := s.join(t, "blue", "peer"), s.join(t, "red", "peer")
	for _, six := range []string{"-4", "-6"} {
		routes := m.guest.Must(t, "ip", six, "route", "show", "default")
		if strings.Count(routes, "default") != 1 || !strings.Contains(routes, "tap0") {
			t.Errorf("default routes: %s", routes)
		}
	}
	for _, p := range []*member{blue, red} {
		p.guest.ServeOn(t, false)
		families(t, func(t *testing.T, six bool) {
			if r := rig.Dial.On(t, m.guest, rig.DialRequest{Network: "tcp", Addr: at(p.addr(t, six), rig.Services.Echo)}); r.String() != "connected" {
				t.Errorf("to a member: %v", r)
			}
		})
	}
}

// TestNetworkDHCP: a client inside gets the address that the hub has chosen, and
// the search domain.
func TestNetworkDHCP(t *testing.T) {
	rig.NeedTools(t, "busybox")
	s := newShared(t)
	s.join(t, "blue", "first")
	m := s.join(t, "blue", "second", "--configure", "none")
	out := m.guest.Run(t, "sh", "-c", `dir=$(mktemp -d) && trap 'rm -r $dir' EXIT &&
printf '#!/bin/sh\nenv\n' > $dir/show && chmod +x $dir/show &&
busybox udhcpc -i tap0 -n -q -f -t 15 -T 1 -O search -s $dir/show`)
	text := out.Stdout + out.Stderr
	n, _ := s.inspect(t, "blue")
	for _, want := range []string{"ip=" + n.Members[1].Addresses[0].String(), "blue.usernet.internal"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in %s", want, text)
		}
	}
	leases := s.usernet(t, "leases", "--netns", m.guest.NetnsPath())
	if !strings.Contains(leases.stdout, "(second)") {
		t.Errorf("leases: %+v", leases)
	}
}

// TestNetworkRefusals: what cannot be is told in one line.
func TestNetworkRefusals(t *testing.T) {
	s := newShared(t)
	first := s.join(t, "blue", "web", "--alias", "www", "--cidr", "10.9.0.0/24", "--mac", "02:00:00:00:00:01")
	for _, tt := range []struct {
		code  int
		words string
		flags string
	}{
		{2, "lower case", "--network Blue"},
		{2, "not a name", "--network ../x"},
		{2, "not a name", "--network blue --name a.b"},
		{2, "only on a shared network", "--name web"},
		{2, "name already", "--network blue --name a --alias a"},
		{1, "name web is taken", "--network blue --name web"},
		{1, "name www is taken", "--network blue --name www"},
		{1, "alias web is taken", "--network blue --alias web"},
		{1, "the network's own", "--network blue --alias host.docker.internal"},
		{1, "10.9.0.100 is taken, by web", "--network blue --ip 10.9.0.100"},
		{1, "not in the network's subnet 10.9.0.0/24", "--network blue --ip 10.0.2.100"},
		{1, "meaning of its own", "--network blue --ip 10.9.0.2"},
		{1, "02:00:00:00:00:01 is web's", "--network blue --mac 02:00:00:00:00:01"},
		{1, "--cidr is 10.8.0.0/24, that of the network is 10.9.0.0/24", "--network blue --cidr 10.8.0.0/24"},
		{1, "another network of this user has 10.9.0.0/24", "--network green --cidr 10.9.0.0/24"},
		{1, "--host-loopback is true", "--network blue --host-loopback"},
		{1, "--deny is", "--network blue --deny 10.0.0.0/8"},
		{1, "--mtu is 1500", "--network blue --mtu 1500"},
		{1, "single packets", "--network blue --offload off"},
	} {
		p := usernetRun(t, s.Net, append(strings.Fields(tt.flags), "--", "true")...)
		p.WantExit(t, tt.code, 10*time.Second)
		p.WantOneLine(t, tt.words)
	}
	for _, args := range []string{"network inspect green", "network remove green", "network remove blue"} {
		if r := s.usernet(t, strings.Fields(args)...); r.code != 1 || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: %+v", args, r)
		}
	}
	if r := s.usernet(t, "network", "list"); !strings.Contains(r.stdout, "10.9.0.0/24") || strings.Contains(r.stdout, "green") {
		t.Errorf("list: %+v", r)
	}
	if r := s.usernet(t, "network", "remove", "--force", "blue"); r.code != 0 {
		t.Errorf("remove: %+v", r)
	}
	first.WantExit(t, 1, 5*time.Second)
	s.wantGone(t)
}

// TestNetworkChurn: members join and leave in any order, and nothing is left of
// them. USERNET_CHURN is for how long, USERNET_CHURN_MEMBERS how many.
func TestNetworkChurn(t *testing.T) {
	s := newShared(t)
	limit, err := time.ParseDuration(os.Getenv("USERNET_CHURN"))
	if err != nil {
		limit = 4 * time.Second
	}
	count, err := strconv.Atoi(os.Getenv("USERNET_CHURN_MEMBERS"))
	if err != nil {
		count = 8
	}
	s.join(t, "blue", "stays")
	guests := make([]*rig.Node, count)
	for i := range guests {
		guests[i] = s.Guest(t)
	}
	hub := hubOf(t, s)
	usage := func() (fds, threads int) {
		got := handlesOf.On(t, s.Host, hub)
		return got[0], got[1]
	}
	fds, threads := usage()
	worker := func() (files, goroutines int) {
		var stats struct {
			Process struct {
				Files      int `json:"files_now"`
				Goroutines int `json:"goroutines_now"`
			}
		}
		p := s.usernet(t, "stats", "--json")
		if err := json.Unmarshal([]byte(p.stdout), &stats); err != nil {
			t.Fatalf("%v: %+v", err, p)
		}
		return stats.Process.Files, stats.Process.Goroutines
	}
	files, goroutines := worker()
	members := make([]*rig.Attach, count)
	joins := 0
	for end := time.Now().Add(limit); time.Now().Before(end); {
		i := rand.IntN(count)
		if m := members[i]; m != nil {
			m.Signal([]syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[rand.IntN(2)])
			m.Wait(5 * time.Second)
			members[i] = nil
			continue
		}
		members[i] = s.Attach(t, guests[i], "--network", "blue", "--name", fmt.Sprintf("m%d", i), "--dns", rig.Web4.String(),
			"-p", fmt.Sprintf("%d:80", 20000+i), "--api-socket", "none")
		joins++
	}
	n, _ := s.inspect(t, "blue")
	living := 1
	for _, m := range members {
		if m != nil {
			living++
		}
	}
	if len(n.Members) != living {
		t.Errorf("%d members, %d live", len(n.Members), living)
	}
	for _, m := range members {
		if m != nil {
			m.Signal(syscall.SIGTERM)
		}
	}
	within(t, 5*time.Second, "all but one have left", func() bool {
		n, _ := s.inspect(t, "blue")
		return n.names() == "stays"
	})
	within(t, 10*time.Second, "the hub's descriptors are closed", func() bool {
		now, _ := usage()
		return now <= fds+2
	})
	within(t, 10*time.Second, "what the worker held is given back", func() bool {
		f, g := worker()
		return f <= files+2 && g <= goroutines+5
	})
	nowFiles, nowGoroutines := worker()
	t.Logf("the worker's descriptors %d, then %d; goroutines %d, then %d", files, nowFiles, goroutines, nowGoroutines)
	now, nowThreads := usage()
	t.Logf("%d joined; descriptors %d, then %d; threads %d, then %d", joins, fds, now, threads, nowThreads)
}

// handlesOf counts the descriptors and threads of a process.
var handlesOf = rig.NewFunc("e2e.handles", func(_ context.Context, pid int) ([2]int, error) {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return [2]int{}, err
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return [2]int{len(fds), len(threads)}, err
})
