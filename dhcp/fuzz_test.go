package dhcp

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
)

// captured returns the messages of real clients in testdata whose file name
// begins with kind. They are hex; what follows a # is a comment.
func captured(t testing.TB, kind string) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "clients", kind+"-*.txt"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no captured messages of %s: %v", kind, err)
	}
	ms := make(map[string][]byte)
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var digits strings.Builder
		for l := range strings.Lines(string(text)) {
			l, _, _ = strings.Cut(l, "#")
			digits.WriteString(strings.Join(strings.Fields(l), ""))
		}
		if ms[filepath.Base(f)], err = hex.DecodeString(digits.String()); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
	}
	return ms
}

// check fails if the lease table contradicts itself or the config.
func (p *pool) check(t testing.TB) {
	t.Helper()
	if len(p.byAddr) != len(p.byClient) || len(p.byAddr) > maxEntries+len(p.reserved) {
		t.Fatalf("%d entries by address, %d by client", len(p.byAddr), len(p.byClient))
	}
	for a, e := range p.byAddr {
		if e.addr != a || p.byClient[e.key] != e {
			t.Fatalf("entry of %v is %+v, its client's is %+v", a, e, p.byClient[e.key])
		}
		if m := p.reserved[a]; m != nil && !bytes.Equal(m, e.mac) {
			t.Fatalf("%v, reserved for %v, is with %v", a, m, e.mac)
		} else if m == nil && !p.inRange(a) {
			t.Fatalf("%v is not of the pool", a)
		}
	}
}

// FuzzServer4 has a server answer three messages some time apart. It must
// survive, its answers must be in order, and so must its table.
func FuzzServer4(f *testing.F) {
	first := message4(f, discover, mac(1))
	second := message4(f, requests, mac(1), want("10.0.2.15"), server("10.0.2.2"))
	f.Add(first, second, message4(f, decline, mac(1), want("10.0.2.15"), server("10.0.2.2")), uint32(1), uint32(60))
	f.Add(first, second, message4(f, releases, mac(1), ciaddr("10.0.2.15"), server("10.0.2.2")), uint32(1), uint32(3600))
	f.Add(message4(f, inform, mac(1), ciaddr("10.0.2.77")), message4(f, discover, mac(100), option(80)), message4(f, requests, mac(2), ciaddr("10.0.2.15")), uint32(0), uint32(0))
	f.Add(message4(f, discover, mac(1), option(52, 3), option(57, 2, 100), option(51, 0, 0, 1, 0)), first[:236], second, uint32(0), uint32(0))
	for _, b := range captured(f, "dhcp4") {
		f.Add(b, b, first, uint32(0), uint32(1))
	}
	f.Fuzz(func(t *testing.T, a, b, c []byte, wait1, wait2 uint32) {
		s := newTest4(t)
		now := start
		for i, m := range [][]byte{a, b, c} {
			now = now.Add(time.Duration([]uint32{0, wait1, wait2}[i]) * time.Second)
			if len(m) > maxMessage {
				m = m[:maxMessage]
			}
			r, to := s.handle(now, m, netip.Addr{})
			s.pool.check(t)
			if r == nil {
				continue
			}
			u := to.(*net.UDPAddr)
			if u.Port != 68 || !(u.IP.Equal(net.IPv4bcast) || s.cfg.Prefix.Contains(addrOf(u))) {
				t.Fatalf("answer goes to %v", u)
			}
			d, err := dhcpv4.FromBytes(r)
			if err != nil {
				t.Fatalf("answer % x: %v", r, err)
			}
			if len(r) > 1472 || d.OpCode != dhcpv4.OpcodeBootReply {
				t.Fatalf("answer of %d bytes, opcode %v", len(r), d.OpCode)
			}
			y := addr4(d.YourIPAddr)
			switch k := d.MessageType(); {
			case k == dhcpv4.MessageTypeNak || k == dhcpv4.MessageTypeAck && d.IPAddressLeaseTime(0) == 0:
				if y.IsValid() {
					t.Fatalf("%v with an address, %v", k, y)
				}
			case k == dhcpv4.MessageTypeAck || k == dhcpv4.MessageTypeOffer:
				if !s.pool.inRange(y) && !bytes.Equal(s.pool.reserved[y], d.ClientHWAddr) {
					t.Fatalf("%v of %v to %v", k, y, d.ClientHWAddr)
				}
			default:
				t.Fatalf("answer is a %v", k)
			}
		}
	})
}

// FuzzServer6 is FuzzServer4 for DHCPv6.
func FuzzServer6(f *testing.F) {
	sid := server6(serverDUID)
	const a = "fd75:736e:6574::1abc"
	first := message6(dhcpv6.MessageTypeSolicit, client6(1), iana6(1), raw6(dhcpv6.OptionRapidCommit))
	for _, k := range []dhcpv6.MessageType{dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeDecline, dhcpv6.MessageTypeRelease} {
		f.Add(first, message6(k, client6(1), sid, iana6(1, a), iana6(2), &dhcpv6.OptIAPD{}), first, uint32(1), uint32(60))
	}
	f.Add(message6(dhcpv6.MessageTypeConfirm, client6(1), iana6(1, a)), message6(dhcpv6.MessageTypeRebind, client6(1), iana6(1, a, "2001:db8::1")), first, uint32(1), uint32(3600))
	f.Add(message6(dhcpv6.MessageTypeInformationRequest, dhcpv6.OptRequestedOption(23, 24)), message6(dhcpv6.MessageTypeSolicit, client6(1), nested(3)), first, uint32(1), uint32(3600))
	for _, b := range captured(f, "dhcp6") {
		f.Add(b, b, first, uint32(0), uint32(1))
	}
	f.Fuzz(func(t *testing.T, a, b, c []byte, wait1, wait2 uint32) {
		s := newTest6(t)
		now := start
		for i, m := range [][]byte{a, b, c} {
			now = now.Add(time.Duration([]uint32{0, wait1, wait2}[i]) * time.Second)
			if len(m) > maxMessage {
				m = m[:maxMessage]
			}
			r, _ := s.handle(now, m, linkLocal)
			s.pool.check(t)
			if r == nil {
				continue
			}
			d, err := dhcpv6.MessageFromBytes(r)
			if err != nil {
				// The client's own DUID comes back as it was, and need not
				// be one that the codec accepts.
				if d, err = withoutClient(r); err != nil {
					t.Fatalf("answer % x: %v", r, err)
				}
			}
			if len(r) > maxMessage*2 || (d.MessageType != dhcpv6.MessageTypeReply && d.MessageType != dhcpv6.MessageTypeAdvertise) {
				t.Fatalf("answer of %d bytes is a %v", len(r), d.MessageType)
			}
			for _, ia := range d.Options.IANA() {
				for _, x := range ia.Options.Addresses() {
					y, _ := netip.AddrFromSlice(x.IPv6Addr)
					if x.ValidLifetime > 0 && !s.pool.inRange(y) && s.pool.reserved[y] == nil {
						t.Fatalf("%v of %v", d.MessageType, y)
					}
				}
			}
		}
	})
}

func withoutClient(b []byte) (*dhcpv6.Message, error) {
	kind, opts, err := decode6(b)
	m := &dhcpv6.Message{MessageType: kind}
	for _, o := range opts {
		if o.Code() != dhcpv6.OptionClientID {
			m.AddOption(o)
		}
	}
	return m, err
}

// FuzzSolicitation has solicitations that may be malformed.
func FuzzSolicitation(f *testing.F) {
	f.Add(solicitation, []byte(net.ParseIP("fe80::1")))
	f.Add(append(bytes.Clone(solicitation), 1, 1, 2, 3, 4, 5, 6, 7), make([]byte, 16))
	f.Add(append(bytes.Clone(solicitation), 1, 0), []byte{10, 0, 2, 100})
	for _, b := range captured(f, "rs") {
		f.Add(b, []byte(net.ParseIP("fe80::1")))
	}
	f.Fuzz(func(t *testing.T, b, from []byte) {
		a, _ := netip.AddrFromSlice(from)
		if validSolicitation(b, a) && (len(b) < 8 || len(b)%8 != 0 || !a.Is6()) {
			t.Errorf("% x from %v is valid", b, a)
		}
	})
}

// FuzzNames encodes lists of names and decodes them again.
func FuzzNames(f *testing.F) {
	f.Add("usernet.internal corp.example.com example.com. b.corp.example.com . ..", 200)
	f.Add("a.b.c.d b.c.d c.d d a.b.c.d", 12)
	f.Fuzz(func(t *testing.T, list string, limit int) {
		names := domains(strings.Fields(list))
		b := compressed(names, limit)
		if len(b) > max(limit, 0) {
			t.Fatalf("%d bytes, limit %d", len(b), limit)
		}
		got := labels(t, b)
		if len(got) > len(names) {
			t.Fatalf("%q became %q", names, got)
		}
		for i := range got {
			if got[i] != names[i] {
				t.Fatalf("%q became %q", names, got)
			}
		}
	})
}

// labels decodes a list of names (RFC 1035 §4.1.4).
func labels(t testing.TB, b []byte) []string {
	var names []string
	for i := 0; i < len(b); {
		var name []string
		end := 0
		for at := i; ; {
			n := int(b[at])
			if n == 0 {
				end = max(end, at+1)
				break
			}
			if n >= 0xc0 {
				if end > 0 {
					t.Fatal("a pointer leads to a pointer")
				}
				end = at + 2
				if at = (n&0x3f)<<8 | int(b[at+1]); at >= i {
					t.Fatal("a pointer leads forward")
				}
				continue
			}
			name = append(name, string(b[at+1:at+1+n]))
			at += 1 + n
		}
		names, i = append(names, strings.Join(name, ".")), end
	}
	return names
}
