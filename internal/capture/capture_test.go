package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// ethernet makes a frame of an IP or ARP packet.
func ethernet(kind uint16, packet ...byte) []byte {
	b := make([]byte, 14, 14+len(packet))
	binary.BigEndian.PutUint16(b[12:], kind)
	return append(b, packet...)
}

// ip makes a packet with an upper layer's bytes. more are IPv6's extension headers.
func ip(proto uint8, src, dst string, upper []byte, more ...byte) []byte {
	s, d := netip.MustParseAddr(src), netip.MustParseAddr(dst)
	if s.Is4() {
		b := make([]byte, 20)
		b[0], b[9] = 0x45, proto
		copy(b[12:], s.AsSlice())
		copy(b[16:], d.AsSlice())
		return ethernet(typeIPv4, append(b, upper...)...)
	}
	b := make([]byte, 40)
	b[0], b[6] = 0x60, proto
	copy(b[8:], s.AsSlice())
	copy(b[24:], d.AsSlice())
	return ethernet(typeIPv6, append(append(b, more...), upper...)...)
}

func portPair(src, dst uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	return append(binary.BigEndian.AppendUint16(b, dst), 0, 0, 0, 0)
}

// frames are what filters are tried on.
var frames = map[string][]byte{
	"web":      ip(protoTCP, "10.0.2.100", "192.0.2.7", portPair(40000, 80)),
	"answer":   ip(protoTCP, "192.0.2.7", "10.0.2.100", portPair(80, 40000)),
	"dns":      ip(protoUDP, "10.0.2.100", "10.0.2.3", portPair(40001, 53)),
	"dns6":     ip(protoUDP, "fd00::100", "fd00::3", portPair(40002, 53)),
	"options6": ip(0, "fd00::100", "fd00::7", portPair(40003, 443), protoTCP, 0, 0, 0, 0, 0, 0, 0),
	"first6":   ip(44, "fd00::100", "fd00::8", portPair(40004, 53), protoUDP, 0, 0, 1, 0, 0, 0, 0),
	"later6":   ip(44, "fd00::100", "fd00::8", portPair(53, 53), protoUDP, 0, 0, 9, 0, 0, 0, 0),
	"later":    func() []byte { b := ip(protoUDP, "10.0.2.100", "10.0.2.8", portPair(53, 53)); b[14+7] = 1; return b }(),
	"ping":     ip(protoICMP, "10.0.2.100", "192.0.2.7", []byte{8, 0, 0, 0}),
	"ping6":    ip(protoICMPv6, "fd00::100", "fd00::2", []byte{128, 0, 0, 0}),
	"who-has": ethernet(typeARP, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 2, 100,
		0, 0, 0, 0, 0, 0, 10, 0, 2, 2),
	"short": {1, 2, 3},
	"other": ethernet(0x88cc, 1, 2, 3),
}

func TestFilter(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "all",
		"tcp":                     "answer options6 web",
		"udp":                     "dns dns6 first6 later later6",
		"icmp":                    "ping ping6",
		"arp":                     "who-has",
		"ip":                      "answer dns later ping web",
		"ip6":                     "dns6 first6 later6 options6 ping6",
		"port 53":                 "dns dns6 first6",
		"tcp port 80":             "answer web",
		"tcp dst port 80":         "web",
		"src port 80":             "answer",
		"portrange 40001-40003":   "dns dns6 options6",
		"dst portrange 443-443":   "options6",
		"host 192.0.2.7":          "answer ping web",
		"host ::ffff:192.0.2.7":   "answer ping web",
		"src host 192.0.2.7":      "answer",
		"host 10.0.2.2":           "who-has",
		"net 10.0.2.0/28":         "dns later who-has",
		"dst net fd00::/125":      "dns6 options6 ping6",
		"arp host 10.0.2.100":     "who-has",
		"udp and not port 53":     "later later6",
		"tcp or icmp":             "answer options6 ping ping6 web",
		"tcp || icmp && ip":       "answer options6 ping web",
		"(tcp||icmp)&&ip":         "answer ping web",
		"!ip and !ip6 and !arp":   "other short",
		"not not TCP":             "answer options6 web",
		"not (port 53 or tcp)":    "later later6 other ping ping6 short who-has",
		"udp and not (ip or ip6)": "",
	} {
		f, err := ParseFilter(text)
		if err != nil {
			t.Error(err)
			continue
		}
		var got []string
		for name, b := range frames {
			var p packet
			p.parse(b)
			if f.matches(&p) {
				got = append(got, name)
			}
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != want && (want != "all" || len(got) != len(frames)) {
			t.Errorf("%q chooses %q, want %q", text, s, want)
		}
	}
	for text, why := range map[string]string{
		"http":                    "there are tcp, udp",
		"tcp udp":                 "join conditions",
		"tcp and":                 "ends where a condition",
		"not":                     "ends where a condition",
		"src tcp":                 "there are tcp, udp",
		"(tcp":                    "not closed",
		"tcp)":                    "join conditions",
		"host":                    "not an IP address",
		"host example.com":        "not an IP address",
		"host fe80::1%lo":         "not an IP address",
		"net 10.0.0.0":            "not a subnet",
		"port 65536":              "not a number",
		"port http":               "not a number",
		"portrange 9-8":           "not a range",
		"portrange 9":             "not a range",
		strings.Repeat("(", 200):  "nested too deep",
		strings.Repeat("x", 5000): "too long",
	} {
		if f, err := ParseFilter(text); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%.20q: %v, %v, want an error with %q", text, f, err, why)
		}
	}
}

// FuzzFilter: any filter on any frame, without a fault; what is parsed is parsed
// the same again.
func FuzzFilter(f *testing.F) {
	for name, b := range frames {
		f.Add("tcp and not (src port 80 or net 10.0.0.0/8) || "+name, b)
		f.Add("portrange 1-2 or host fd00::1 and icmp", b)
	}
	f.Fuzz(func(t *testing.T, text string, b []byte) {
		var p packet
		p.parse(b)
		filter, err := ParseFilter(text)
		if err != nil {
			return
		}
		again, err := ParseFilter(filter.String())
		if err != nil || filter.matches(&p) != again.matches(&p) {
			t.Errorf("%q becomes %q, %v", text, filter, err)
		}
	})
}

// pipeStream runs a stream whose reader is the test.
func pipeStream(t *testing.T, r *Recorder, o Options) (*io.PipeReader, context.CancelFunc) {
	t.Helper()
	out, in := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := r.Stream(ctx, in, o)
		in.CloseWithError(err)
	}()
	t.Cleanup(func() {
		cancel()
		out.Close()
		<-done
	})
	for !r.Active() {
		time.Sleep(time.Millisecond)
	}
	return out, cancel
}

// TestStream: what a stream holds is the frames that its filter chooses, in
// whole blocks, with what was lost.
func TestStream(t *testing.T) {
	r := new(Recorder)
	if r.Active() {
		t.Error("active without a stream")
	}
	filter, err := ParseFilter("tcp")
	if err != nil {
		t.Fatal(err)
	}
	out, cancel := pipeStream(t, r, Options{Name: "tap0", Filter: filter, Snaplen: 60})
	long := append(bytes.Clone(frames["web"]), make([]byte, 1000)...)
	r.Record(true, frames["dns"])
	r.Record(true, long[:20], long[20:50], long[50:])
	r.Record(false, frames["answer"])
	time.AfterFunc(200*time.Millisecond, cancel)
	all, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []uint32
	var caught [][]byte
	var lengths, flags []uint32
	for b := all; len(b) > 0; {
		n := binary.NativeEndian.Uint32(b[4:])
		if n%4 != 0 || int(n) > len(b) || binary.NativeEndian.Uint32(b[n-4:]) != n {
			t.Fatalf("a block of %d bytes in %x", n, b)
		}
		kind := binary.NativeEndian.Uint32(b)
		kinds = append(kinds, kind)
		if kind == blockPacket {
			size := binary.NativeEndian.Uint32(b[20:])
			caught = append(caught, b[28:28+size])
			lengths = append(lengths, binary.NativeEndian.Uint32(b[24:]))
			flags = append(flags, binary.NativeEndian.Uint32(b[28+(size+3)&^3+4:]))
		}
		b = b[n:]
	}
	if want := []uint32{blockSection, blockInterface, blockPacket, blockPacket, blockStatistics}; !slices.Equal(kinds, want) {
		t.Fatalf("blocks %x, want %x", kinds, want)
	}
	if !bytes.Equal(caught[0], long[:60]) || !bytes.Equal(caught[1], frames["answer"]) {
		t.Errorf("caught %x", caught)
	}
	if lengths[0] != uint32(len(long)) || lengths[1] != uint32(len(frames["answer"])) || flags[0] != flagInbound || flags[1] != flagOutbound {
		t.Errorf("lengths %v, flags %v", lengths, flags)
	}
	if r.Active() {
		t.Error("still active")
	}
}

// TestStreamDrops: a reader that does not read costs others nothing, and is told
// what it has missed.
func TestStreamDrops(t *testing.T) {
	r := new(Recorder)
	out, cancel := pipeStream(t, r, Options{Name: "tap0"})
	const n = 1000
	frame := append(bytes.Clone(frames["web"]), make([]byte, 60000)...)
	for range n {
		r.Record(true, frame)
	}
	time.AfterFunc(300*time.Millisecond, cancel)
	var file bytes.Buffer
	s, err := Copy(context.Background(), &file, out, 0)
	if err != nil || s.Dropped == 0 || s.Packets == 0 || s.Packets+s.Dropped != n {
		t.Errorf("%+v, %v", s, err)
	}
	if r.Dropped() != s.Dropped {
		t.Errorf("the recorder counts %d frames dropped, the stream %d", r.Dropped(), s.Dropped)
	}
}

// TestStreamMany: there is an end to how many read at a time.
func TestStreamMany(t *testing.T) {
	r := new(Recorder)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, maxStreams)
	for range maxStreams {
		go func() { done <- r.Stream(ctx, io.Discard, Options{}) }()
	}
	for r.active.Load() < maxStreams {
		time.Sleep(time.Millisecond)
	}
	if err := r.Stream(ctx, io.Discard, Options{}); !errors.Is(err, ErrBusy) {
		t.Errorf("one more: %v", err)
	}
	cancel()
	for range maxStreams {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if r.Active() {
		t.Error("still active")
	}
}

// TestCopyEnds: a copy ends with a whole block, however the stream ends.
func TestCopyEnds(t *testing.T) {
	b := appendHead(nil, "tap0", "", 0)
	head := len(b)
	for range 3 {
		b = appendPacket(b, time.Now(), flagInbound, 0, 5, 5, [][]byte{{1, 2}, {3, 4, 5}})
	}
	block := (len(b) - head) / 3
	for cut := range len(b) + 1 {
		var file bytes.Buffer
		s, err := Copy(context.Background(), &file, bytes.NewReader(b[:cut]), 0)
		packets := max(0, cut-head) / block
		if whole := head + packets*block; cut >= head && (file.Len() != whole || (err == nil) != (cut == whole)) {
			t.Errorf("cut at %d: %d bytes, %v", cut, file.Len(), err)
		}
		if s.Packets != uint64(packets) {
			t.Errorf("cut at %d: %d packets", cut, s.Packets)
		}
	}
	var file bytes.Buffer
	if s, err := Copy(context.Background(), &file, bytes.NewReader(b), 2); err != nil || s.Packets != 2 || file.Len() != head+2*block {
		t.Errorf("two of three: %+v, %v, %d bytes", s, err, file.Len())
	}
	if _, err := Copy(context.Background(), io.Discard, strings.NewReader("HTTP/1.1 200 OK\r\n"), 0); err == nil {
		t.Error("something else was copied")
	}
}
