package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// localTTL is that of local records. They can change at any time and asking
// again costs next to nothing.
const localTTL = 0

// maxAddrs is how many addresses a local name may have: their answer fits into
// one message.
const maxAddrs = 1000

// localName is what is known of one local name. It is never changed.
type localName struct {
	v4, v6 []netip.Addr
	ptr    [][]byte // wire format
}

// locals holds the local records. Readers take the index as it is; writers
// make a new one.
type locals struct {
	index atomic.Pointer[map[string]*localName] // by name in lower-case wire format

	zones map[string]struct{} // in lower-case wire format

	mu    sync.Mutex              // guards records
	names map[string][]netip.Addr // as given, in lower case
}

// setZones says which domains have nothing but local records. It is called
// before anything else.
func (l *locals) setZones(zones []string) error {
	l.zones = make(map[string]struct{}, len(zones))
	for _, z := range zones {
		wire, err := wireName(canonical(z))
		if err != nil {
			return err
		}
		l.zones[string(wire)] = struct{}{}
	}
	return nil
}

// inZone reports whether a name is a zone, or in one.
func (l *locals) inZone(wire []byte) bool {
	for len(l.zones) > 0 && len(wire) > 1 {
		if _, ok := l.zones[string(wire)]; ok {
			return true
		}
		wire = wire[1+wire[0]:]
	}
	return false
}

// set gives each name its addresses, and takes it away if there are none. It
// is all or nothing.
func (l *locals) set(records map[string][]netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.setLocked(records)
}

// add gives name further addresses, and returns all that it has then.
func (l *locals) add(name string, addrs []netip.Addr) ([]netip.Addr, error) {
	name = canonical(name)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.setLocked(map[string][]netip.Addr{name: slices.Concat(l.names[name], addrs)}); err != nil {
		return nil, err
	}
	return slices.Clone(l.names[name]), nil
}

func (l *locals) setLocked(records map[string][]netip.Addr) error {
	clean := make(map[string][]netip.Addr, len(records))
	for name, addrs := range records {
		name = canonical(name)
		if _, err := wireName(name); err != nil {
			return err
		}
		list := clean[name] // the same in other letters
		for _, a := range addrs {
			if a = a.Unmap().WithZone(""); !a.IsValid() {
				return fmt.Errorf("name %q: address is not valid", name)
			}
			if !slices.Contains(list, a) {
				list = append(list, a)
			}
		}
		if len(list) > maxAddrs {
			return fmt.Errorf("name %q: more than %d addresses", name, maxAddrs)
		}
		clean[name] = list
	}
	if l.names == nil {
		l.names = make(map[string][]netip.Addr)
	}
	for name, list := range clean {
		if len(list) > 0 {
			l.names[name] = list
		} else {
			delete(l.names, name)
		}
	}
	l.rebuildLocked()
	return nil
}

// remove takes name away and reports whether it was there.
func (l *locals) remove(name string) bool {
	name = canonical(name)
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.names[name]; !ok {
		return false
	}
	delete(l.names, name)
	l.rebuildLocked()
	return true
}

// snapshot returns a copy of all records.
func (l *locals) snapshot() map[string][]netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make(map[string][]netip.Addr, len(l.names))
	for name, addrs := range l.names {
		all[name] = slices.Clone(addrs)
	}
	return all
}

func (l *locals) rebuildLocked() {
	index := make(map[string]*localName, 2*len(l.names))
	entry := func(wire []byte) *localName {
		e := index[string(wire)]
		if e == nil {
			e = new(localName)
			index[string(wire)] = e
		}
		return e
	}
	// In order of names, so that equal records give equal answers.
	for _, name := range slices.Sorted(maps.Keys(l.names)) {
		wire, _ := wireName(name)
		e := entry(wire)
		for _, a := range l.names[name] {
			if a.Is4() {
				e.v4 = append(e.v4, a)
			} else {
				e.v6 = append(e.v6, a)
			}
			rev := entry(reverseName(a))
			if len(rev.ptr) < maxAddrs/4 {
				rev.ptr = append(rev.ptr, wire)
			}
		}
	}
	// What stands between a name and its zone exists too, without records: a
	// resolver may take all below a name that does not for missing (RFC 8020).
	for wire := range index {
		for up := []byte(wire); l.inZone(up); up = up[1+up[0]:] {
			entry(up)
		}
	}
	for z := range l.zones {
		entry([]byte(z))
	}
	l.index.Store(&index)
}

// answer appends the answer to q to out, if q asks for a local name. A local
// name has the records that we know of and no others: a type that is missing
// is answered at once with no records (RFC 2308 §2.2), which keeps clients
// that ask for A and AAAA together from waiting.
func (l *locals) answer(out []byte, q *query) ([]byte, bool) {
	index := l.index.Load()
	if index == nil || q.qclass != classIN && q.qclass != classANY {
		return out, false
	}
	e := (*index)[string(q.name())]
	if e == nil && !l.inZone(q.name()) {
		return out, false
	}
	if q.version != 0 {
		return q.appendReply(out, rcodeBadVers, edeNone), true
	}
	if e == nil {
		start := len(out)
		out = q.appendReply(out, rcodeNXDomain, edeNone)
		out[start+2] |= bitAA
		return out, true
	}
	start := len(out)
	out = q.appendReply(out, rcodeSuccess, edeNone)
	out[start+2] |= bitAA
	end := start + q.end
	opt := len(out) - end
	out = out[:end]
	count := 0
	if q.qtype == typeA || q.qtype == typeANY {
		for _, a := range e.v4 {
			b := a.As4()
			out = appendRecord(out, typeA, b[:])
			count++
		}
	}
	if q.qtype == typeAAAA || q.qtype == typeANY {
		for _, a := range e.v6 {
			b := a.As16()
			out = appendRecord(out, typeAAAA, b[:])
			count++
		}
	}
	if q.qtype == typePTR || q.qtype == typeANY {
		for _, name := range e.ptr {
			if len(out)-start+len(name)+12+optLen > maxMessage {
				break
			}
			out = appendRecord(out, typePTR, name)
			count++
		}
	}
	binary.BigEndian.PutUint16(out[start+6:], uint16(count))
	if opt > 0 {
		out = q.appendOPT(out, rcodeSuccess, edeNone)
	}
	return out, true
}

// appendRecord appends a record whose owner is the question's name.
func appendRecord(out []byte, typ byte, rdata []byte) []byte {
	out = append(out, 0xc0, headerLen, 0, typ, 0, classIN, 0, 0, 0, localTTL,
		byte(len(rdata)>>8), byte(len(rdata)))
	return append(out, rdata...)
}

// canonical returns name in lower case and without the dot at its end.
func canonical(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// wireName returns name in wire format. Escapes are not known: a local name is
// typed by people, who mean a host.
func wireName(name string) ([]byte, error) {
	if name == "" {
		return nil, errors.New("name is empty")
	}
	wire := make([]byte, 0, len(name)+2)
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 {
			return nil, fmt.Errorf("name %q: a label must have 1 to 63 characters", name)
		}
		for _, c := range []byte(label) {
			if c <= ' ' || c >= 0x7f || c == '\\' {
				return nil, fmt.Errorf("name %q: character %q is not allowed", name, c)
			}
		}
		wire = append(wire, byte(len(label)))
		wire = append(wire, label...)
	}
	wire = append(wire, 0)
	if len(wire) > maxName {
		return nil, fmt.Errorf("name %q is longer than %d bytes", name, maxName)
	}
	return wire, nil
}

// reverseName returns the name of a's PTR record in wire format (RFC 1035
// §3.5, RFC 3596 §2.5).
func reverseName(a netip.Addr) []byte {
	var wire []byte
	if a.Is4() {
		b := a.As4()
		for _, c := range slices.Backward(b[:]) {
			label := fmt.Appendf(nil, "%d", c)
			wire = append(wire, byte(len(label)))
			wire = append(wire, label...)
		}
		return append(wire, "\x07in-addr\x04arpa\x00"...)
	}
	const hex = "0123456789abcdef"
	b := a.As16()
	for _, c := range slices.Backward(b[:]) {
		wire = append(wire, 1, hex[c&15], 1, hex[c>>4])
	}
	return append(wire, "\x03ip6\x04arpa\x00"...)
}
