package agent

import (
	"encoding/binary"
	"net/netip"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

// servers listen in all the ways that there are.
const servers = `
import socket
def open(family, kind, addr, port, only6=None, peer=None, device=None):
    s = socket.socket(family, kind)
    if only6 is not None: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
    if device: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    s.bind((addr, port))
    if kind == socket.SOCK_STREAM: s.listen()
    if peer: s.connect(peer)
    all.append(s)
all = []
v4, v6, tcp, udp = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
for kind in tcp, udp:
    open(v4, kind, "0.0.0.0", 1001)
    open(v4, kind, "0.0.0.0", 1002)
    open(v4, kind, "10.0.2.100", 1003)
    open(v4, kind, "127.0.0.1", 1004)
    open(v6, kind, "::", 1005, 1)
    open(v6, kind, "::", 1006, 0)
    open(v6, kind, "fd75:736e:6574::100", 1007)
    open(v6, kind, "::1", 1008)
    open(v6, kind, "::ffff:10.0.2.100", 1009, 0)
    open(v4, kind, "0.0.0.0", 1010)
    open(v6, kind, "::", 1010, 1)
    open(v4, kind, "0.0.0.0", 1011, device=b"lo")
open(v4, udp, "0.0.0.0", 1012, peer=("10.0.2.100", 9))
print("up", flush=True)
import time
time.sleep(60)
`

// TestListening: what is told of servers is what clients from outside can reach.
func TestListening(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(TAP))
	defer unix.Close(link.FD)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Fatal(err)
	}
	own := []netip.Addr{testAddresses.Addr4.Addr(), testAddresses.Addr6.Addr()}
	l, err := a.Listening(own...)
	if err != nil || len(l.Ports) > 0 || l.Cut || l.LocalFrom != 32768 || l.LocalTo != 60999 {
		t.Errorf("of an empty namespace: %+v, %v", l, err)
	}
	c.start(t, "up", "python3", "-c", servers)
	l, err = a.Listening(own...)
	if err != nil {
		t.Fatal(err)
	}
	var want []Ports
	for _, p := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		want = append(want, Ports{p, 1001, 1003, true, false}, Ports{p, 1005, 1005, false, true},
			Ports{p, 1006, 1006, true, true}, Ports{p, 1007, 1007, false, true}, Ports{p, 1009, 1009, true, false}, Ports{p, 1010, 1010, true, true})
	}
	if !reflect.DeepEqual(l.Ports, want) {
		t.Errorf("got  %+v\nwant %+v", l.Ports, want)
	}
}

// TestListeningMany: more than can be told is cut, and the agent lives on.
func TestListeningMany(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(TAP))
	defer unix.Close(link.FD)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Fatal(err)
	}
	c.start(t, "up", "python3", "-c", `
import socket, time
all = []
for port in range(2000, 2000 + 2*800, 2):
    s = socket.socket(); s.bind(("", port)); s.listen(); all.append(s)
print("up", flush=True)
time.sleep(60)`)
	for range 2 {
		l, err := a.Listening(testAddresses.Addr4.Addr())
		if err != nil || !l.Cut || len(l.Ports) != maxPorts {
			t.Fatalf("%d ports, cut %t, %v", len(l.Ports), l.Cut, err)
		}
	}
}

// diagMessage is one message of a dump.
func diagMessage(kind uint16, body ...byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
	binary.NativeEndian.PutUint32(b, uint32(cap(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	return append(b, body...)
}

// FuzzSockets: no answer of the kernel's is read beyond its end.
func FuzzSockets(f *testing.F) {
	socket := make([]byte, diagMessageSize, diagMessageSize+8)
	socket[0], socket[1] = unix.AF_INET6, stateListen
	f.Add(append(diagMessage(unix.SOCK_DIAG_BY_FAMILY, append(socket, 5, 0, diagOnly6, 0, 1, 0, 0, 0)...), diagMessage(unix.NLMSG_DONE, 0, 0, 0, 0)...))
	f.Add(diagMessage(unix.NLMSG_ERROR, 0xfe, 0xff, 0xff, 0xff))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseSockets(b, func(s boundSocket) {
			if !s.addr.IsValid() {
				t.Errorf("%x: a socket without an address", b)
			}
		})
	})
}
