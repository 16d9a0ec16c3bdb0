package e2e

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
)

// A forge makes frames of a guest that no kernel would send.
type forge struct {
	w              *world
	guest, gateway net.HardwareAddr
	marks          int
}

func newForge(t *testing.T, w *world) *forge {
	t.Helper()
	f := &forge{w: w}
	w.Guest.Must(t, "ping", "-c1", "-W5", w.Gateway4.String())
	mac := func(text string) net.HardwareAddr {
		for word := range strings.FieldsSeq(text) {
			if m, err := net.ParseMAC(word); err == nil && len(m) == 6 {
				return m
			}
		}
		t.Fatalf("no link address in %q", text)
		return nil
	}
	f.guest = mac(w.Guest.Must(t, "ip", "link", "show", "tap0"))
	f.gateway = mac(w.Guest.Must(t, "ip", "neigh", "show", w.Gateway4.String()))
	return f
}

// ethLen is the length of an Ethernet header, v4Len and v6Len are those of IP.
const ethLen, v4Len, v6Len = 14, 20, 40

// frame makes a frame around a transport header and what is behind it, with right
// checksums.
func (f *forge) frame(src, dst netip.Addr, proto byte, l4 []byte) []byte {
	be := binary.BigEndian
	b := slices.Concat(f.gateway, f.guest, []byte{8, 0})
	if dst.Is4() {
		h := []byte{0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, proto, 0, 0}
		be.PutUint16(h[2:], uint16(v4Len+len(l4)))
		b = slices.Concat(b, h, src.AsSlice(), dst.AsSlice(), l4)
	} else {
		be.PutUint16(b[12:], unix.ETH_P_IPV6)
		h := []byte{0x60, 0, 0, 0, 0, 0, proto, 64}
		be.PutUint16(h[4:], uint16(len(l4)))
		b = slices.Concat(b, h, src.AsSlice(), dst.AsSlice(), l4)
	}
	rig.FixChecksums(b)
	return b
}

// fromTo begins the header of TCP or UDP.
func fromTo(src, dst uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, src), dst)
}

// udp makes a datagram of 96 bytes to the echo servers.
func (f *forge) udp(mark int, src, dst netip.Addr) []byte {
	l4 := append(fromTo(rig.MarkPort(mark), uint16(rig.Services.Echo)), 0, 96, 0, 0)
	return f.frame(src, dst, unix.IPPROTO_UDP, append(l4, rig.MarkText(mark, 88)...))
}

// tcp makes a SYN.
func (f *forge) tcp(mark int, src, dst netip.Addr) []byte {
	l4 := append(fromTo(rig.MarkPort(mark), rig.MarkPort(mark)), 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 2, 0xff, 0xff, 0, 0, 0, 0)
	return f.frame(src, dst, unix.IPPROTO_TCP, l4)
}

// ping makes an echo request.
func (f *forge) ping(mark int, src, dst netip.Addr) []byte {
	typ, proto := byte(8), byte(unix.IPPROTO_ICMP)
	if dst.Is6() {
		typ, proto = 128, unix.IPPROTO_ICMPV6
	}
	l4 := append([]byte{typ, 0, 0, 0}, fromTo(rig.MarkPort(mark), 1)...)
	return f.frame(src, dst, proto, append(l4, rig.MarkText(mark, 88)...))
}

// source is the guest's own address.
func (f *forge) source(six bool) netip.Addr { return pick(six, f.w.Guest4, f.w.Guest6) }

// An attempt is something that a guest tries: the frames, which carry a mark, and
// whether they may leave the host.
type attempt struct {
	what   string
	leaves bool
	frames func(mark int) [][]byte
}

// each makes attempts of a SYN, a datagram and a ping with these addresses.
func (f *forge) each(what string, leaves bool, src, dst netip.Addr) []attempt {
	var all []attempt
	for _, kind := range []struct {
		name string
		make func(int, netip.Addr, netip.Addr) []byte
	}{{"tcp", f.tcp}, {"udp", f.udp}, {"ping", f.ping}} {
		all = append(all, attempt{kind.name + " " + what, leaves, func(mark int) [][]byte { return [][]byte{kind.make(mark, src, dst)} }})
	}
	return all
}

// try has the guest try them all, and looks at what leaves the host, or comes to
// its loopback. What the guest is answered is returned by attempt.
func (f *forge) try(t *testing.T, all []attempt) map[string][]rig.Seen {
	t.Helper()
	rig.StartWatch.On(t, f.w.Host, rig.Watch{})
	rig.StartWatch.On(t, f.w.Guest, rig.Watch{Interface: "tap0", Incoming: true})
	first := f.marks + 1
	var frames [][]byte
	for _, a := range all {
		f.marks++
		frames = append(frames, a.frames(f.marks)...)
	}
	// What is no lie comes last, and shows that those before it are through.
	f.marks++
	truth := f.udp(f.marks, f.w.Guest4, rig.Web4)
	left := make(map[int]string)
	missing := func() (names []string) {
		clear(left)
		for _, s := range rig.Watched.On(t, f.w.Host, struct{}{}) {
			left[s.Mark] = s.String()
		}
		for i, a := range append(all, attempt{what: "the truth", leaves: true}) {
			if a.leaves && left[first+i] == "" {
				names = append(names, a.what)
			}
		}
		return names
	}
	var names []string
	if !rig.Poll(rig.Patience, func() bool {
		f.send(t, frames)
		f.send(t, [][]byte{truth})
		for range 20 {
			time.Sleep(50 * time.Millisecond)
			if names = missing(); len(names) == 0 {
				return true
			}
		}
		return false
	}) {
		t.Errorf("did not leave the host: %q", names)
	}
	time.Sleep(300 * time.Millisecond) // for answers
	missing()
	for i, a := range all {
		if text := left[first+i]; text != "" && !a.leaves {
			t.Errorf("%s has left the host: %s", a.what, text)
		}
	}
	back := make(map[string][]rig.Seen)
	for _, s := range rig.Watched.On(t, f.w.Guest, struct{}{}) {
		if i := s.Mark - first; i >= 0 && i < len(all) {
			back[all[i].what] = append(back[all[i].what], s)
		}
	}
	return back
}

// send sends frames, a few at a time.
func (f *forge) send(t *testing.T, frames [][]byte) {
	t.Helper()
	for some := range slices.Chunk(frames, 100) {
		sendRaw.On(t, f.w.Guest, some)
	}
}

// counters are what was dropped and denied.
func counters(t *testing.T, w *world) map[string]int {
	t.Helper()
	var s map[string]json.RawMessage
	if err := json.Unmarshal([]byte(mustCtl(t, w, "stats", "--json")), &s); err != nil {
		t.Fatal(err)
	}
	all := make(map[string]int)
	for _, group := range []string{"dropped", "denied", "dhcp4", "dhcp6"} {
		var g map[string]int
		if err := json.Unmarshal(s[group], &g); err != nil {
			t.Fatal(err)
		}
		for name, n := range g {
			all[group+"."+name] = n
		}
	}
	return all
}

// wantGrown checks that counters have grown by at least so much.
func wantGrown(t *testing.T, w *world, before map[string]int, least map[string]int) {
	t.Helper()
	now := counters(t, w)
	for name, n := range least {
		if grown := now[name] - before[name]; grown < n {
			t.Errorf("%s has grown by %d, want at least %d", name, grown, n)
		}
	}
}

// besiege attaches usernet, has a guest try things, and sees that all goes on as
// before.
func besiege(t *testing.T, w *world, try func(f *forge), flags ...string) {
	t.Helper()
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ping", "dig", "ip")
	a := w.attach(t, flags...)
	worker := workerOf(t, w)
	try(newForge(t, w))
	alive(t, w, worker)
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, 0, 5*time.Second)
}

// TestSpoofedSource: a guest may have any address of its subnet that is not ours,
// and any MAC. With another address nothing leaves, and nothing is answered. A
// connection goes on meanwhile.
func TestSpoofedSource(t *testing.T) {
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		var all []attempt
		for _, src := range append(addrs(
			"198.51.100.99", "127.0.0.1", "0.0.0.0", "255.255.255.255", "10.0.2.255", "10.0.2.0", "224.0.0.1", "240.0.0.1", "169.254.1.1",
			"2001:db8:1::99", "::1", "ff02::1", "::ffff:10.0.2.100", "64:ff9b::a00:264", "fe80::2", "fd75:736e:6574::",
		), w.Gateway4, w.DNS4, rig.Host4, w.Gateway6, w.DNS6, rig.Host6) {
			all = append(all, f.each("from "+src.String(), false, src, pick(src.Is6(), rig.Web4, rig.Web6))...)
		}
		// A link-local address is a guest's, but leads no further than the link. That
		// of one who has none yet is nobody's.
		for _, a := range []string{"fe80::77", "::"} {
			all = append(all, f.each("from "+a, false, netip.MustParseAddr(a), rig.Web6)...)
		}
		forbidden := len(all) - 6
		others := addrs("10.0.2.77", "fd75:736e:6574::77")
		mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x77}
		from := func(src, mac net.HardwareAddr, attempts []attempt) []attempt {
			for i, a := range attempts {
				attempts[i].frames = func(mark int) [][]byte {
					frames := a.frames(mark)
					for _, b := range frames {
						copy(b[6:], src)
						copy(b, mac)
					}
					return frames
				}
			}
			return attempts
		}
		for _, src := range others {
			all = append(all, from(mac, f.gateway, f.each("from "+src.String(), true, src, pick(src.Is6(), rig.Web4, rig.Web6)))...)
		}
		for _, six := range []bool{false, true} {
			own, web, name := f.source(six), pick(six, rig.Web4, rig.Web6), pick(six, "v4 ", "v6 ")
			all = append(all, from(f.gateway, f.gateway, f.each(name+"from the gateway's MAC", false, own, web))...)
			all = append(all, from(net.HardwareAddr{3, 0, 0, 0, 0, 1}, f.gateway, f.each(name+"from a group's MAC", false, own, web))...)
			all = append(all, from(f.guest, mac, f.each(name+"to another MAC", false, own, web))...)
			all = append(all, from(mac, f.gateway, f.each(name+"from another MAC", true, own, web))...)
		}
		before := counters(t, w)
		pace := make(chan rig.Times)
		go func() {
			times, err := rig.MeasurePace.Within(2*rig.Patience).Try(w.Guest, rig.Pace{Addr: web(false, rig.Services.Echo), For: 2 * time.Second})
			if err != nil {
				t.Errorf("a connection meanwhile: %v", err)
			}
			pace <- times
		}()
		back := f.try(t, all)
		if times := <-pace; times.Count == 0 {
			t.Error("another connection stood still meanwhile")
		}
		wantGrown(t, w, before, map[string]int{"dropped.spoofed": forbidden, "dropped.foreign": 3 * 3 * 2})
		for _, a := range all {
			if answers := back[a.what]; len(answers) > 0 && !a.leaves {
				t.Errorf("%s is answered: %v", a.what, answers)
			}
		}
		for _, src := range others {
			for _, kind := range []string{"udp", "ping", "tcp"} {
				answers := back[kind+" from "+src.String()]
				if len(answers) == 0 {
					t.Errorf("%s from %v is not answered", kind, src)
				}
				for _, s := range answers {
					if s.MAC != mac.String() || s.Dst != src {
						t.Errorf("%s from %v at %v is answered to %v", kind, src, mac, s)
					}
				}
			}
		}
	})
}

// TestDoors: what the guest sends to addresses, ports and protocols that are none
// of its business reaches neither the network nor the host.
func TestDoors(t *testing.T) {
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		var all []attempt
		special := 0
		for _, dst := range append(addrs(
			"224.0.0.1", "224.0.0.251", "239.255.255.250", "255.255.255.255", "10.0.2.255", "10.0.2.0", "100.64.0.7", "240.0.0.1", "0.0.0.0", "0.1.2.3", "127.0.0.1", "127.0.0.53",
			"ff02::1", "ff02::fb", "ff05::2", "ff0e::1", "::", "::1", "::ffff:198.51.100.7", "10.0.2.77", "fd75:736e:6574::77", "10.0.2.100", "fd75:736e:6574::100", "fe80::2", "fe80::77",
			"2002:7f00:1::", "64:ff9b::127.0.0.1", "64:ff9b:1::127.0.0.1", "::127.0.0.1", "::ffff:0:127.0.0.1",
		), w.Gateway4, w.Gateway6, w.DNS4, w.DNS6, rig.Host4, rig.Host6) {
			all = append(all, f.each("to "+dst.String(), false, f.source(dst.Is6()), dst)...)
			special++
		}
		// Other protocols, and addresses of the host in what they carry.
		for _, proto := range []byte{0, 2, 4, 41, 47, 50, 51, 59, 89, 99, 132, 253, 255} {
			for _, six := range []bool{false, true} {
				all = append(all, attempt{fmt.Sprintf("protocol %d, IPv6 %v", proto, six), false, func(mark int) [][]byte {
					inner := f.udp(mark, f.source(six), pick(six, rig.Web4, rig.Web6))[ethLen:]
					return [][]byte{f.frame(f.source(six), pick(six, rig.Web4, rig.Web6), proto, inner)}
				}})
			}
		}
		for name, tag := range map[string][]byte{"VLAN": {0x81, 0, 0, 1}, "QinQ": {0x88, 0xa8, 0, 1, 0x81, 0, 0, 2}, "LLC": {0, 40}, "LLDP": {0x88, 0xcc}, "PPPoE": {0x88, 0x64}} {
			all = append(all, attempt{name, false, func(mark int) [][]byte {
				b := f.udp(mark, f.source(false), rig.Web4)
				if name != "VLAN" && name != "QinQ" {
					return [][]byte{slices.Concat(b[:12], tag, b[ethLen:])}
				}
				return [][]byte{slices.Concat(b[:12], tag, b[12:])}
			}})
		}
		before := counters(t, w)
		f.try(t, all)
		wantGrown(t, w, before, map[string]int{"dropped.foreign": 20, "denied.special": 3, "denied.virtual": 12, "denied.host": 15})
	})
}

// TestOddLengths: ports and lengths that no kernel writes. What can be read goes
// out, the rest nowhere.
func TestOddLengths(t *testing.T) {
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		// Where things are in a frame, by family.
		type change func(b []byte, l4 int)
		put := func(off int, v uint16) change {
			return func(b []byte, l4 int) { binary.BigEndian.PutUint16(b[l4+off:], v) }
		}
		udp, tcp := f.udp, f.tcp
		var all []attempt
		bad := 0
		for _, tt := range []struct {
			what            string
			make            func(int, netip.Addr, netip.Addr) []byte
			change          change
			asIs            bool // checksums too
			leaves4, leave6 bool
		}{
			{"udp to port 0", udp, put(2, 0), false, false, false},
			{"udp from port 0", udp, put(0, 0), false, false, false},
			{"udp of length 0", udp, put(4, 0), false, false, false},
			{"udp of length 7", udp, put(4, 7), false, false, false},
			{"udp longer than its packet", udp, put(4, 97), false, false, false},
			{"udp with a wrong checksum", udp, func(b []byte, l4 int) { b[l4+6] ^= 1 }, true, false, false},
			{"udp without a checksum", udp, put(6, 0), true, true, false},
			{"tcp to port 0", tcp, put(2, 0), false, false, false},
			{"tcp with a header of 16 bytes", tcp, func(b []byte, l4 int) { b[l4+12] = 4 << 4 }, false, false, false},
			{"tcp with a header beyond its end", tcp, func(b []byte, l4 int) { b[l4+12] = 15 << 4 }, false, false, false},
			{"tcp with a wrong checksum", tcp, func(b []byte, l4 int) { b[l4+16] ^= 1 }, true, false, false},
			{"tcp SYN and FIN", tcp, func(b []byte, l4 int) { b[l4+13] = 3 }, false, false, false},
			{"tcp SYN and RST", tcp, func(b []byte, l4 int) { b[l4+13] = 6 }, false, false, false},
			{"tcp without flags", tcp, func(b []byte, l4 int) { b[l4+13] = 0 }, false, false, false},
			{"tcp with all flags", tcp, func(b []byte, l4 int) { b[l4+13] = 0x3f }, false, false, false},
			{"packet longer than its frame", udp, func(b []byte, l4 int) {
				at := ethLen + pick(l4 > ethLen+v4Len, 2, 4)
				binary.BigEndian.PutUint16(b[at:], binary.BigEndian.Uint16(b[at:])+1)
			}, false, false, false},
			{"packet of length 0", udp, func(b []byte, l4 int) {
				binary.BigEndian.PutUint16(b[ethLen+pick(l4 > ethLen+v4Len, 2, 4):], 0)
			}, false, false, false},
			{"packet of another version", udp, func(b []byte, l4 int) { b[ethLen] ^= 0x10 }, false, false, false},
		} {
			for _, six := range []bool{false, true} {
				all = append(all, attempt{tt.what + pick(six, ", v4", ", v6"), pick(six, tt.leaves4, tt.leave6), func(mark int) [][]byte {
					b := tt.make(mark, f.source(six), pick(six, rig.Web4, rig.Web6))
					tt.change(b, ethLen+pick(six, v4Len, v6Len))
					if !tt.asIs {
						rig.FixChecksums(b)
					}
					return [][]byte{b}
				}})
			}
			bad++
		}
		// Every length of a datagram, and every one that a packet can be cut to.
		for _, six := range []bool{false, true} {
			all = append(all, attempt{pick(six, "v4", "v6") + " cut", false, func(mark int) (cut [][]byte) {
				b := f.udp(mark, f.source(six), pick(six, rig.Web4, rig.Web6))
				for n := ethLen; n < len(b); n++ {
					cut = append(cut, b[:n])
				}
				return cut
			}})
		}
		before := counters(t, w)
		f.try(t, all)
		wantGrown(t, w, before, map[string]int{"dropped.malformed": 100})
	})
}

// cut makes fragments of a frame, each from one byte to another. What is beyond
// its end is zero.
func cut(frame []byte, id int, ranges ...[2]int) (frames [][]byte) {
	l4 := frame[ethLen+pick(frame[12] != 8, v4Len, v6Len):]
	all := append(slices.Clone(l4), make([]byte, 1<<16)...)
	for _, r := range ranges {
		frames = append(frames, rig.Fragment(frame, id, r[0], all[r[0]:r[1]], r[1] < len(l4)))
	}
	return frames
}

// TestFragments: datagrams come together from pieces that fit, whatever their size
// and order. Pieces that overlap make nothing (RFC 8200, section 4.5), and the
// policy judges what has come together.
func TestFragments(t *testing.T) {
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		var eights [][2]int
		for n := 0; n < 96; n += 8 {
			eights = append(eights, [2]int{n, n + 8})
		}
		reversed := slices.Clone(eights)
		slices.Reverse(reversed)
		var all []attempt
		for _, six := range []bool{false, true} {
			web, name := pick(six, rig.Web4, rig.Web6), pick(six, "v4 ", "v6 ")
			add := func(what string, leaves bool, frames func(datagram []byte, id int) [][]byte) {
				all = append(all, attempt{name + what, leaves, func(mark int) [][]byte {
					return frames(f.udp(mark, f.source(six), web), mark)
				}})
			}
			for _, tt := range []struct {
				what   string
				leaves bool
				ranges [][2]int
			}{
				{"two pieces", true, [][2]int{{0, 48}, {48, 96}}},
				{"the second piece first", true, [][2]int{{48, 96}, {0, 48}}},
				{"one piece twice", true, [][2]int{{0, 48}, {0, 48}, {48, 96}}},
				{"pieces of 8 bytes", true, eights},
				{"pieces of 8 bytes from the end", true, reversed},
				{"a piece over the end of another (teardrop)", false, [][2]int{{0, 48}, {40, 96}}},
				{"a piece within another", false, [][2]int{{0, 48}, {8, 24}, {48, 96}}},
				{"a piece around another", false, [][2]int{{16, 24}, {0, 48}, {48, 96}}},
				{"a piece over the header", false, [][2]int{{8, 96}, {0, 16}}},
				{"a piece beyond the end", false, [][2]int{{48, 96}, {96, 104}, {0, 48}}},
				{"two ends", false, [][2]int{{48, 96}, {48, 104}, {0, 48}}},
				{"a hole", false, [][2]int{{0, 32}, {64, 96}}},
				{"no beginning", false, [][2]int{{32, 64}, {64, 96}}},
			} {
				add(tt.what, tt.leaves, func(b []byte, id int) [][]byte { return cut(b, id, tt.ranges...) })
			}
			l4 := pick(six, ethLen+v4Len, ethLen+v6Len)
			add("more than a packet may hold (ping of death)", false, func(b []byte, id int) [][]byte {
				return [][]byte{
					rig.Fragment(b, id, 0, b[l4:l4+48], true), rig.Fragment(b, id, 48, make([]byte, 65000), true),
					rig.Fragment(b, id, 65048, rig.MarkText(id, 500), false),
				}
			})
			add("a piece of nothing", false, func(b []byte, id int) [][]byte {
				return [][]byte{rig.Fragment(b, id, 0, nil, true), rig.Fragment(b, id, 0, nil, false)}
			})
			add("a piece of odd length", false, func(b []byte, id int) [][]byte {
				return [][]byte{rig.Fragment(b, id, 0, b[l4:l4+45], true), rig.Fragment(b, id, 48, b[l4+48:], false)}
			})
			add("an only piece", true, func(b []byte, id int) [][]byte { return [][]byte{rig.Fragment(b, id, 0, b[l4:], false)} })
			add("a ping in pieces", true, func(b []byte, id int) [][]byte {
				return cut(f.ping(id, f.source(six), web), id, [2]int{0, 24}, [2]int{24, 96})
			})
			for _, make := range []func(int, netip.Addr, netip.Addr) []byte{f.udp, f.tcp, f.ping} {
				add("a wrong checksum, in pieces", false, func(_ []byte, id int) [][]byte {
					b := make(id, f.source(six), web)
					b[l4+7] ^= 1
					return cut(b, id, [2]int{0, 8}, [2]int{8, len(b) - l4})
				})
			}
			closed := pick(six, denied[0], denied[3])
			add("what the policy closes, in pieces", false, func(_ []byte, id int) [][]byte {
				var frames [][]byte
				for _, make := range []func(int, netip.Addr, netip.Addr) []byte{f.udp, f.ping, f.tcp} {
					b := make(id, f.source(six), closed)
					frames = append(frames, cut(b, id, [2]int{0, 8}, [2]int{8, len(b) - l4})...)
				}
				return frames
			})
		}
		before := counters(t, w)
		f.try(t, all)
		wantGrown(t, w, before, map[string]int{"denied.metadata": 4, "dropped.fragments": 14, "dropped.malformed": 4})
	})
}

// TestHeaders: options of IPv4 and extension headers of IPv6 are read as the RFCs
// have it, and lead to no other address and past no policy.
func TestHeaders(t *testing.T) {
	rig.NeedTools(t, "python3")
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		var all []attempt
		for _, tt := range []struct {
			what    string
			leaves  bool
			options []byte
		}{
			{"nothing", true, []byte{1, 1, 1, 0}},
			{"record route", true, []byte{7, 7, 4, 0, 0, 0, 0, 0}},
			{"router alert", true, []byte{148, 4, 0, 0}},
			{"an option without end", false, []byte{7, 40, 4, 0}},
			{"an option of length 0", false, []byte{7, 0, 4, 0}},
		} {
			all = append(all, attempt{"IPv4 option: " + tt.what, tt.leaves, func(mark int) [][]byte {
				return [][]byte{withOptions(f.udp(mark, w.Guest4, rig.Web4), tt.options)}
			}})
		}
		for _, make := range []func(int, netip.Addr, netip.Addr) []byte{f.udp, f.tcp, f.ping} {
			all = append(all, attempt{"IPv4 option: a wrong checksum behind it", false, func(mark int) [][]byte {
				b := withOptions(make(mark, w.Guest4, rig.Web4), []byte{1, 1, 1, 0})
				b[ethLen+v4Len+4+7] ^= 1
				return [][]byte{b}
			}}, attempt{"IPv4 option: a wrong checksum of the header", false, func(mark int) [][]byte {
				b := withOptions(make(mark, w.Guest4, rig.Web4), []byte{1, 1, 1, 0})
				b[ethLen+10] ^= 1
				return [][]byte{b}
			}}, attempt{"IPv6 header: a wrong checksum behind it", false, func(mark int) [][]byte {
				b := behind(make(mark, w.Guest6, rig.Web6), unix.IPPROTO_DSTOPTS, []byte{0, 0, 1, 4, 0, 0, 0, 0})
				b[ethLen+v6Len+8+7] ^= 1
				return [][]byte{b}
			}})
		}
		for _, kind := range []byte{131, 137} {
			for _, first := range []netip.Addr{rig.Web4, w.Gateway4, w.Guest4, denied[0]} {
				// To where the packet is going, by way of a closed address, and the other way round.
				option := slices.Concat([]byte{kind, 7, 4}, denied[0].AsSlice(), []byte{0})
				all = append(all, attempt{fmt.Sprintf("source route %d by %v", kind, first), first == rig.Web4, func(mark int) [][]byte {
					return [][]byte{withOptions(f.udp(mark, w.Guest4, first), option)}
				}})
			}
		}
		pad := []byte{0, 0, 1, 4, 0, 0, 0, 0} // PadN
		unknown := func(action byte) []byte { return []byte{0, 0, action<<6 | 0x1e, 4, 0, 0, 0, 0} }
		route := func(segments byte) []byte {
			return slices.Concat([]byte{0, 2, 0, segments, 0, 0, 0, 0}, denied[3].AsSlice())
		}
		const hop, routing, dest = unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS
		type ext struct {
			proto byte
			body  []byte
		}
		for _, tt := range []struct {
			what   string
			leaves bool
			chain  []ext
		}{
			{"hop-by-hop options", true, []ext{{hop, pad}}},
			{"destination options", true, []ext{{dest, pad}}},
			{"50 destination options", true, slices.Repeat([]ext{{dest, pad}}, 50)},
			{"hop-by-hop options behind others", false, []ext{{dest, pad}, {hop, pad}}},
			{"an unknown option to skip", true, []ext{{dest, unknown(0)}}},
			{"an unknown option to drop", false, []ext{{dest, unknown(1)}}},
			{"an unknown option to complain about", false, []ext{{dest, unknown(2)}}},
			{"an unknown hop-by-hop option to complain about", false, []ext{{hop, unknown(3)}}},
			{"an option beyond its header", false, []ext{{dest, []byte{0, 0, 1, 40, 0, 0, 0, 0}}}},
			{"a header beyond its packet", false, []ext{{dest, []byte{0, 200, 1, 4, 0, 0, 0, 0}}}},
			{"a route with a way to go", false, []ext{{routing, route(1)}}},
			{"a route that is over", true, []ext{{routing, route(0)}}},
			{"a jumbogram", false, []ext{{hop, []byte{0, 0, 0xc2, 4, 0, 1, 0, 0}}}},
			{"nothing behind", false, []ext{{unix.IPPROTO_NONE, pad}}},
			{"a security header", false, []ext{{unix.IPPROTO_AH, slices.Concat(pad, pad)}}},
		} {
			all = append(all, attempt{"IPv6 header: " + tt.what, tt.leaves, func(mark int) [][]byte {
				b := f.udp(mark, w.Guest6, rig.Web6)
				for _, e := range slices.Backward(tt.chain) {
					b = behind(b, e.proto, e.body)
				}
				return [][]byte{b}
			}})
		}
		for _, six := range []bool{false, true} {
			all = append(all, attempt{"a last hop here, behind options" + pick(six, ", v4", ", v6"), false, func(mark int) [][]byte {
				b := f.udp(mark, f.source(six), pick(six, rig.Web4, rig.Web6))
				if six {
					b[ethLen+7] = 1
					return [][]byte{behind(b, dest, pad)}
				}
				b[ethLen+8] = 1
				return [][]byte{withOptions(b, []byte{1, 1, 1, 0})}
			}})
		}
		for _, a := range f.each("behind destination options to a closed address", false, w.Guest6, denied[3]) {
			frames := a.frames
			a.frames = func(mark int) [][]byte { return [][]byte{behind(frames(mark)[0], dest, pad)} }
			all = append(all, a)
		}
		before := counters(t, w)
		f.try(t, all)
		wantGrown(t, w, before, map[string]int{"denied.metadata": 5, "dropped.malformed": 7})
		// The guest's kernel leaves checksums to its interface, with options too.
		out := w.Guest.Run(t, "python3", "-c", withRouterAlert, rig.Web4.String(), itoa(rig.Services.Echo))
		if out.Stdout != "tcp hello\nudp hello\n" {
			t.Errorf("sockets with options: %s%s", out.Stdout, out.Stderr)
		}
	})
}

// withRouterAlert talks to an echo server through sockets that put an option into
// their packets.
const withRouterAlert = `
import socket, sys
for name, kind in ("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM):
    s = socket.socket(socket.AF_INET, kind)
    s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x94\x04\x00\x00")
    for _ in range(5):
        try:
            s.settimeout(5)
            if name == "udp" or _ == 0: s.connect((sys.argv[1], int(sys.argv[2])))
            s.send(b"hello")
            print(name, s.recv(100).decode(), flush=True)
            break
        except TimeoutError: pass
`

// withOptions puts options into the IPv4 header of a frame.
func withOptions(frame, options []byte) []byte {
	b := slices.Concat(frame[:ethLen+v4Len], options, frame[ethLen+v4Len:])
	b[ethLen] += byte(len(options) / 4)
	binary.BigEndian.PutUint16(b[ethLen+2:], uint16(len(b)-ethLen))
	rig.FixChecksums(b)
	return b
}

// behind puts an extension header in front of what a frame has behind its IPv6
// header.
func behind(frame []byte, proto byte, body []byte) []byte {
	body = slices.Clone(body)
	body[0] = frame[ethLen+6]
	b := slices.Concat(frame[:ethLen+v6Len], body, frame[ethLen+v6Len:])
	b[ethLen+6] = proto
	binary.BigEndian.PutUint16(b[ethLen+4:], uint16(len(b)-ethLen-v6Len))
	return b
}

// TestMetadataSpellings: link-local addresses and those where clouds hand out
// credentials are closed in every spelling, also where all addresses are allowed,
// and open where they are allowed themselves.
func TestMetadataSpellings(t *testing.T) {
	w := onTap(t)
	services := addrs("169.254.169.254", "169.254.0.1", "169.254.255.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
	spellings := func(a netip.Addr) []netip.Addr {
		if a.Is6() {
			return nil
		}
		b := a.As4()
		return addrs("64:ff9b::"+a.String(), "64:ff9b:1::"+a.String(), "::"+a.String(), "::ffff:0:"+a.String(), fmt.Sprintf("2002:%x:%x::1", int(b[0])<<8|int(b[1]), int(b[2])<<8|int(b[3])))
	}
	narrow := []string{"--allow", "fe80::/10"}
	for _, a := range services {
		narrow = append(narrow, "--allow", netip.PrefixFrom(a, a.BitLen()).String())
	}
	wide := []string{"--allow", "0.0.0.0/0", "--allow", "::/0"}
	for _, tt := range []struct {
		what  string
		flags []string
		open  bool
	}{{"by default", nil, false}, {"with all allowed", wide, false}, {"with each allowed", append(narrow, wide...), true}} {
		w.Guest = w.Net.Guest(t)
		besiege(t, w, func(f *forge) {
			var all []attempt
			closed := 0
			for _, a := range services {
				all = append(all, f.each("to "+a.String(), tt.open, f.source(a.Is6()), a)...)
				for _, s := range spellings(a) {
					all = append(all, f.each("to "+s.String(), tt.open, w.Guest6, s)...)
				}
				closed += 3 * (1 + len(spellings(a)))
				if a.Is4() { // which is nobody's, see receive6
					all = append(all, f.each("to the mapped "+a.String(), false, w.Guest6, netip.AddrFrom16(a.As16()))...)
				}
			}
			// On which of its links such an address is, a host's kernel asks of all but datagrams.
			router := strings.Fields(w.Host.Must(t, "ip", "-n", rig.RouterNetns, "-o", "-6", "addr", "show", "dev", "host0", "scope", "link"))[3]
			for _, a := range []netip.Addr{netip.MustParseAddr("fe80::a9fe:a9fe"), netip.MustParsePrefix(router).Addr()} {
				each := f.each("to "+a.String(), false, w.Guest6, a)
				each[1].leaves = tt.open && a.String() != "fe80::a9fe:a9fe" // udp
				all = append(all, each...)
			}
			before := counters(t, w)
			back := f.try(t, all)
			if !tt.open {
				wantGrown(t, w, before, map[string]int{"denied.metadata": closed + 6})
				return
			}
			for _, a := range services {
				for _, kind := range []string{"tcp", "udp", "ping"} {
					if !slices.ContainsFunc(back[kind+" to "+a.String()], func(s rig.Seen) bool { return s.Src == a }) {
						t.Errorf("%s: %s to %v is not answered: %v", tt.what, kind, a, back[kind+" to "+a.String()])
					}
				}
			}
		}, tt.flags...)
	}
}

// TestNeighborLies: whatever a guest says about who has which address, or which way
// others are, usernet believes nothing of it that is about others than itself, and
// keeps no more of it than 512 addresses.
func TestNeighborLies(t *testing.T) {
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x66}
		all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		nodes, linkLocal := netip.MustParseAddr("ff02::1"), netip.MustParseAddr("fe80::66")
		var lies [][]byte
		spoofed := 0
		for _, claim := range []netip.Addr{w.Gateway4, w.DNS4} {
			for _, op := range []byte{1, 2} {
				for _, to := range []net.HardwareAddr{all, f.gateway} {
					lies = append(lies, slices.Concat(to, f.guest, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, op}, mac, claim.AsSlice(), to, claim.AsSlice()))
					spoofed++
				}
			}
		}
		ndp := func(src, dst netip.Addr, typ byte, body ...[]byte) {
			b := f.frame(src, dst, unix.IPPROTO_ICMPV6, slices.Concat(append([][]byte{{typ, 0, 0, 0}}, body...)...))
			b[ethLen+7] = 255
			lies = append(lies, b, behind(b, unix.IPPROTO_DSTOPTS, []byte{0, 0, 1, 4, 0, 0, 0, 0}))
		}
		option := func(kind byte) []byte { return append([]byte{kind, 1}, mac...) }
		for _, claim := range []netip.Addr{w.Gateway6, w.DNS6, netip.MustParseAddr("fe80::2")} {
			for _, dst := range []netip.Addr{nodes, w.Gateway6} {
				ndp(w.Guest6, dst, 136, []byte{0xe0, 0, 0, 0}, claim.AsSlice(), option(2))
				ndp(claim, dst, 136, []byte{0xe0, 0, 0, 0}, claim.AsSlice(), option(2))
				ndp(claim, dst, 135, make([]byte, 4), w.Guest6.AsSlice(), option(1))
				spoofed += 4
			}
			ndp(netip.IPv6Unspecified(), nodes, 135, make([]byte, 4), claim.AsSlice())
		}
		// A router, for everything and for a prefix; addresses there are others' still.
		prefix := netip.MustParseAddr("2001:db8:66::")
		information := slices.Concat([]byte{3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0}, prefix.AsSlice())
		for _, dst := range []netip.Addr{nodes, netip.MustParseAddr("fe80::2"), w.Gateway6} {
			ndp(linkLocal, dst, 134, []byte{64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0}, option(1), []byte{5, 1, 0, 0, 0, 0, 5, 0}, information)
			ndp(linkLocal, dst, 137, make([]byte, 4), linkLocal.AsSlice(), rig.Web6.AsSlice(), option(2))
			ndp(w.Guest6, dst, 137, make([]byte, 4), w.Guest6.AsSlice(), rig.Web6.AsSlice(), option(2))
		}
		redirect := append([]byte{5, 1, 0, 0}, w.Guest4.AsSlice()...)
		lies = append(lies, f.frame(w.Guest4, w.Gateway4, unix.IPPROTO_ICMP, append(redirect, f.udp(1, w.Guest4, rig.Web4)[ethLen:ethLen+v4Len+8]...)))
		before := counters(t, w)
		f.send(t, lies)
		wantGrown(t, w, before, map[string]int{"dropped.spoofed": spoofed, "dropped.malformed": 6})
		eui := prefix.As16()
		copy(eui[8:], []byte{f.gateway[0] ^ 2, f.gateway[1], f.gateway[2], 0xff, 0xfe, f.gateway[3], f.gateway[4], f.gateway[5]})
		for _, to := range []netip.Addr{netip.AddrFrom16(eui), prefix.Next(), rig.Web6, rig.Web4} {
			r := rig.Dial.On(t, w.Guest, rig.DialRequest{Network: "tcp", Addr: at(to, rig.Services.Echo)})
			if r.String() != "connected" {
				t.Errorf("%v after the lies: %v", to, r)
			}
		}
		// What comes of many neighbors is bounded: see TestNeighborTableIsBounded.
		evicted := 0
		if !rig.Poll(rig.Patience, func() bool {
			sendNeighbors.Within(2*rig.Patience).On(t, w.Guest, neighbors{f.gateway, w.Guest6, 20000})
			evicted = counters(t, w)["dropped.neighbors_evicted"]
			return evicted > 10000
		}) {
			t.Errorf("%d neighbors made room for others", evicted)
		}
	})
}

// A neighbors asks for so many neighbors of the guest's, each with an address and a
// MAC of its own.
type neighbors struct {
	Gateway net.HardwareAddr
	Prefix  netip.Addr
	Count   int
}

// sendNeighbors has them advertise themselves, as far as the interface takes it.
var sendNeighbors = rig.NewFunc("e2e.sendNeighbors", func(ctx context.Context, n neighbors) (struct{}, error) {
	fd, ll, err := packetSocket()
	if err != nil {
		return struct{}{}, err
	}
	defer unix.Close(fd)
	f := forge{gateway: n.Gateway, guest: net.HardwareAddr{2, 0, 0, 0, 0, 0}}
	for i := 0; i < n.Count && ctx.Err() == nil; i++ {
		src := n.Prefix.As16()
		binary.BigEndian.PutUint32(src[10:], rand.Uint32())
		binary.BigEndian.PutUint32(f.guest[2:], uint32(i))
		a := netip.AddrFrom16(src)
		m := slices.Concat([]byte{136, 0, 0, 0, 0xa0, 0, 0, 0}, src[:], []byte{2, 1}, f.guest)
		frame := f.frame(a, netip.MustParseAddr("ff02::1"), unix.IPPROTO_ICMPV6, m)
		frame[ethLen+7] = 255
		_ = unix.Sendto(fd, frame, 0, ll)
	}
	return struct{}{}, ctx.Err()
})

// TestDHCPStarvation: a guest that makes up thousands of clients fills the pool with
// them and nothing else. Its own interface gets the address that is meant for it.
func TestDHCPStarvation(t *testing.T) {
	rig.NeedTools(t, "udhcpc")
	w := onTap(t)
	besiege(t, w, func(f *forge) {
		var now map[string]int
		if !rig.Poll(rig.Patience, func() bool { // some find the server's queue full
			sendClients.Within(2*rig.Patience).On(t, w.Guest, 2000)
			now = counters(t, w)
			return now["dropped.dhcp_no_lease"] >= 2000 && now["dhcp6.received"] >= 2000
		}) {
			t.Errorf("counters: %v", now)
		}
		if four, six := now["dhcp4.leases_now"], now["dhcp6.leases_now"]; four < 10 || four > 17 || six < 1 || six > 1024 {
			t.Errorf("%d leases of IPv4 and %d of IPv6, want those of a pool of 16 and at most 1024", four, six)
		}
		out := w.Guest.Run(t, "udhcpc", "-f", "-n", "-q", "-t", "10", "-i", "tap0", "-s", "/etc/udhcpc/default.script")
		if text := out.Stdout + out.Stderr; out.Code != 0 || !strings.Contains(text, w.Guest4.String()) {
			t.Errorf("udhcpc: status %d, want a lease of %v:\n%s", out.Code, w.Guest4, text)
		}
		if text := w.Guest.Must(t, "ip", "addr", "show", "dev", "tap0"); !strings.Contains(text, w.Guest4.String()+"/24") {
			t.Errorf("addresses:\n%s", text)
		}
	})
}

// sendClients has so many DHCP clients of a guest's own making ask for addresses:
// each discovers servers, requests an address of the pool, and solicits one of IPv6.
var sendClients = rig.NewFunc("e2e.sendClients", func(ctx context.Context, count int) (struct{}, error) {
	fd, ll, err := packetSocket()
	if err != nil {
		return struct{}{}, err
	}
	defer unix.Close(fd)
	for i := range count {
		mac := binary.BigEndian.AppendUint32([]byte{2, 0x99}, rand.Uint32())
		f := forge{gateway: net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, guest: mac}
		four := func(options ...byte) []byte {
			b := make([]byte, 236)
			copy(b, []byte{1, 1, 6, 0})
			binary.BigEndian.PutUint32(b[4:], uint32(i))
			copy(b[28:], mac)
			b = slices.Concat(b, []byte{99, 130, 83, 99}, options, []byte{61, 7, 1}, mac, []byte{255})
			l4 := append(binary.BigEndian.AppendUint16(fromTo(68, 67), uint16(8+len(b))), 0, 0)
			return f.frame(netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), unix.IPPROTO_UDP, append(l4, b...))
		}
		// SOLICIT with a DUID, rapid commit, and an identity association.
		six := slices.Concat([]byte{1, 0, byte(i >> 8), byte(i), 0, 1, 0, 10, 0, 3, 0, 1}, mac, []byte{0, 14, 0, 0, 0, 3, 0, 12, 0, 0, 0, 1}, make([]byte, 8))
		l4 := append(binary.BigEndian.AppendUint16(fromTo(546, 547), uint16(8+len(six))), 0, 0)
		for _, frame := range [][]byte{
			four(53, 1, 1),
			four(53, 1, 3, 50, 4, 10, 0, 2, byte(15+i%16)),
			f.frame(netip.MustParseAddr("fe80::77"), netip.MustParseAddr("ff02::1:2"), unix.IPPROTO_UDP, append(l4, six...)),
		} {
			for unix.Sendto(fd, frame, 0, ll) != nil && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
		}
		if i%16 == 15 { // the server's queue is not meant to be full of them
			time.Sleep(2 * time.Millisecond)
		}
	}
	return struct{}{}, ctx.Err()
})

// TestControlFromInside: a guest that is the user and sees all of the user's files is
// not answered by the control socket, from whatever namespaces below its own. There
// is no abstract socket that it could find.
func TestControlFromInside(t *testing.T) {
	rig.NeedTools(t, "unshare", "curl")
	w := onTap(t)
	w.Guest = w.GuestOf(t, w.User, rig.Spaces{User: true, Net: true})
	besiege(t, w, func(f *forge) {
		socket := strings.TrimSpace(w.User.Must(t, "sh", "-c", "echo /run/user/1000/usernet/*.sock"))
		curl := []string{"curl", "-s", "--max-time", "10", "--unix-socket", socket, "http://usernet/v1/info"}
		if text := w.User.Must(t, curl...); !strings.Contains(text, "ready") {
			t.Errorf("the user is answered %q", text)
		}
		w.Guest.Must(t, "test", "-S", socket)
		for _, below := range [][]string{nil, {"unshare", "--net"}, {"unshare", "--user"}, {"unshare", "--user", "--map-root-user", "--net"}, {"unshare", "--user", "--map-root-user", "--mount"}} {
			out := w.Guest.Run(t, slices.Concat(below, curl)...)
			if strings.Contains(out.Stdout, "ready") || !strings.Contains(out.Stdout, "forbidden") {
				t.Errorf("%q is answered: status %d, %s%s", below, out.Code, out.Stdout, out.Stderr)
			}
			if out := w.Guest.Run(t, slices.Concat(below, []string{rig.Binary(t), "stats", "--api-socket", socket})...); out.Code == 0 {
				t.Errorf("%q: usernet stats: %s", below, out.Stdout)
			}
		}
		for _, n := range []*rig.Node{w.User, w.Guest} {
			if text := n.Must(t, "cat", "/proc/net/unix"); strings.Contains(text, " @") {
				t.Errorf("abstract sockets of %s:\n%s", n.Name, text)
			}
		}
	})
}
