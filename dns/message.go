package dns

import (
	"encoding/binary"
)

// Sizes and offsets of RFC 1035 §4.1.1 and RFC 6891 §6.1.
const (
	headerLen  = 12
	maxName    = 255
	maxMessage = 65535
	maxQuery   = 4096 // longest name, and options enough
	minPayload = 512  // what every UDP client takes
	ourPayload = 1232 // what we say we take; fits every IPv6 path unfragmented
	optLen     = 11   // an OPT record without options
)

// Bits of the third and fourth byte of the header.
const (
	bitQR, maskOpcode, bitAA, bitTC, bitRD = 0x80, 0x78, 0x04, 0x02, 0x01
	bitRA, bitZ, bitAD, bitCD, maskRcode   = 0x80, 0x40, 0x20, 0x10, 0x0f
)

// Types, classes and response codes that are looked at.
const (
	typeA     = 1
	typeCNAME = 5
	typeSOA   = 6
	typePTR   = 12
	typeAAAA  = 28
	typeSVCB  = 64
	typeHTTPS = 65
	typeOPT   = 41
	typeTKEY  = 249
	typeTSIG  = 250
	typeIXFR  = 251
	typeAXFR  = 252
	typeANY   = 255

	classIN  = 1
	classANY = 255

	rcodeSuccess  = 0
	rcodeFormErr  = 1
	rcodeServFail = 2
	rcodeNXDomain = 3
	rcodeNotImp   = 4
	rcodeRefused  = 5
	rcodeBadVers  = 16 // extended: its upper bits live in the OPT record
)

// Extended errors (RFC 8914 §4) that say why we failed.
const (
	edeNone         = -1
	edeNotReady     = 14 // no upstream is known
	edeFiltered     = 17 // the client asked for it to be
	edeProhibited   = 18 // the egress policy forbids every upstream
	edeNoReachable  = 22 // no upstream answered
	edeOptionNumber = 15
)

// verdict says what is to be done with a message from a guest.
type verdict uint8

const (
	accept verdict = iota
	drop           // nothing may be sent: not a query, or too short to have an id
	formErr
	notImp
)

// query is a guest's message, taken apart as far as needed. It refers to the
// message's bytes and is good for as long as they are.
type query struct {
	msg    []byte
	end    int // of the question
	qtype  uint16
	qclass uint16

	edns    bool
	do      bool
	version uint8
	size    int // the largest answer that the client takes over UDP

	// plain is true if the key holds everything that can change the answer.
	plain bool

	nameLen int
	keyLen  int
	// buf holds the name in lower case, type, class, and a byte of flags.
	buf [maxName + 5]byte
}

// name returns the question's name in wire format and lower case.
func (q *query) name() []byte { return q.buf[:q.nameLen] }

// key returns what identifies the answer in the cache.
func (q *query) key() []byte { return q.buf[:q.keyLen] }

// id returns the client's id.
func (q *query) id() uint16 { return binary.BigEndian.Uint16(q.msg) }

// parse takes msg apart. After drop no field is valid, after formErr and
// notImp only msg is.
func (q *query) parse(msg []byte) verdict {
	if len(msg) < headerLen || msg[2]&bitQR != 0 {
		return drop
	}
	q.msg, q.end = msg, 0
	if len(msg) > maxQuery {
		return formErr
	}
	q.edns, q.do, q.version, q.size = false, false, 0, minPayload
	if msg[2]&maskOpcode != 0 {
		return notImp
	}
	// RFC 9619: a query has one question.
	if binary.BigEndian.Uint16(msg[4:]) != 1 {
		return formErr
	}
	n := lowerName(&q.buf, msg[headerLen:])
	if n == 0 || headerLen+n+4 > len(msg) {
		return formErr
	}
	q.nameLen = n
	off := headerLen + n
	q.qtype = binary.BigEndian.Uint16(msg[off:])
	q.qclass = binary.BigEndian.Uint16(msg[off+2:])
	copy(q.buf[n:], msg[off:off+4])
	off += 4
	q.end = off
	q.plain = plainHeader(msg) && plainType(q.qtype)
	if v := q.parseRest(off); v != accept {
		return v
	}
	bits := msg[2]&bitRD | msg[3]&(bitAD|bitCD)
	if q.edns {
		bits |= 0x02
	}
	if q.do {
		bits |= 0x04
	}
	q.buf[n+4] = bits
	q.keyLen = n + 5
	return accept
}

// parseRest reads what follows the question: usually nothing or an OPT record.
func (q *query) parseRest(off int) verdict {
	w := walkRecords(q.msg, off)
	for w.next() {
		if w.section != additional || w.typ != typeOPT {
			// Signatures (TSIG, SIG(0)) and the SOA of an IXFR question.
			q.plain = false
			continue
		}
		if q.edns || q.msg[w.start] != 0 { // RFC 6891 §6.1.1
			return formErr
		}
		q.edns = true
		q.size = max(int(w.class), minPayload)
		q.version = q.msg[w.ttl+1]
		flags := binary.BigEndian.Uint16(q.msg[w.ttl+2:])
		q.do = flags&0x8000 != 0
		// Options (client subnet, cookies, padding) are between the client
		// and the upstream: never answered from the cache.
		if w.rdLen != 0 || q.version != 0 || flags&0x7fff != 0 || q.msg[w.ttl] != 0 {
			q.plain = false
		}
	}
	if w.bad || w.off != len(q.msg) {
		return formErr
	}
	return accept
}

// plainHeader reports whether the header has only bits that a cached answer
// allows for.
func plainHeader(msg []byte) bool {
	return msg[2]&(bitAA|bitTC) == 0 && msg[3]&(bitRA|bitZ|maskRcode) == 0
}

// plainType reports whether answers to t may be cached at all.
func plainType(t uint16) bool {
	return t != typeOPT && (t < typeTKEY || t > typeAXFR)
}

// lowerName copies the uncompressed name at the start of b to dst, in lower
// case, and returns its length; 0 if there is none. RFC 1035 §4.1.4 would
// allow a pointer in a question, but there is nothing that it could point at.
func lowerName(dst *[maxName + 5]byte, b []byte) int {
	i := 0
	for {
		if i >= len(b) || i >= maxName {
			return 0
		}
		n := int(b[i])
		dst[i] = b[i]
		i++
		if n == 0 {
			return i
		}
		if n > 63 || i+n >= len(b) || i+n >= maxName {
			return 0
		}
		for end := i + n; i < end; i++ {
			dst[i] = lower(b[i])
		}
	}
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// skipName returns the offset behind the name at off, -1 if there is none. It
// does not follow pointers: where the record goes on is all that is asked.
func skipName(msg []byte, off int) int {
	for start := off; off < len(msg) && off-start < maxName; {
		c := msg[off]
		switch {
		case c == 0:
			return off + 1
		case c >= 0xc0:
			if off+2 > len(msg) {
				return -1
			}
			return off + 2
		case c > 63:
			return -1 // RFC 6891 §5 gave these up
		}
		off += 1 + int(c)
	}
	return -1
}

// section numbers, in the order in which they come.
const (
	answer = iota
	authority
	additional
	sections
)

// walker goes through the records that follow a question. Every step moves
// forward by at least 11 bytes, so 64 KiB are at most 5957 steps.
type walker struct {
	msg     []byte
	left    [sections]uint16
	section int
	off     int // behind the current record
	bad     bool

	start, ttl, rd, rdLen int
	typ, class            uint16
}

// walkRecords returns a walker over the records of msg, which begin at off.
func walkRecords(msg []byte, off int) walker {
	w := walker{msg: msg, off: off}
	for i := range w.left {
		w.left[i] = binary.BigEndian.Uint16(msg[6+2*i:])
	}
	return w
}

// next moves to the next record. At the end, or with bad set at the first
// record that is not whole, it returns false.
func (w *walker) next() bool {
	for w.left[w.section] == 0 {
		if w.section == additional {
			return false
		}
		w.section++
	}
	w.left[w.section]--
	off := skipName(w.msg, w.off)
	if off < 0 || off+10 > len(w.msg) {
		w.bad = true
		return false
	}
	w.start = w.off
	w.typ = binary.BigEndian.Uint16(w.msg[off:])
	w.class = binary.BigEndian.Uint16(w.msg[off+2:])
	w.ttl = off + 4
	w.rdLen = int(binary.BigEndian.Uint16(w.msg[off+8:]))
	w.rd = off + 10
	if w.rd+w.rdLen > len(w.msg) {
		w.bad = true
		return false
	}
	w.off = w.rd + w.rdLen
	return true
}

// whole reports whether the records that msg says it has are there. One that is
// marked as truncated may end anywhere.
func whole(msg []byte, end int) bool {
	if msg[2]&bitTC != 0 {
		return true
	}
	w := walkRecords(msg, end)
	for w.next() {
	}
	return !w.bad
}

// matches reports whether msg is an answer, under the given id, to the query
// whose bytes behind its id are ask and whose question ends at end. What is cut off
// or garbled is none: another server's, or the same one's next, may be better.
func matches(msg []byte, ask string, end int, id uint16) bool {
	if len(msg) < headerLen || binary.BigEndian.Uint16(msg) != id ||
		msg[2]&bitQR == 0 || msg[2]&maskOpcode != 0 {
		return false
	}
	switch binary.BigEndian.Uint16(msg[4:]) {
	case 1:
		if len(msg) < end {
			return false
		}
		// Length bytes are below 64 and so no letters: folding the whole
		// name does no harm. Type and class are compared as they are.
		for i := headerLen; i < end-4; i++ {
			if lower(msg[i]) != lower(ask[i-2]) {
				return false
			}
		}
		return string(msg[end-4:end]) == ask[end-6:end-2] && whole(msg, end)
	case 0:
		// Some servers refuse without repeating the question.
		rcode := msg[3] & maskRcode
		empty := msg[6]|msg[7]|msg[8]|msg[9] == 0
		return empty && rcode != rcodeSuccess && rcode != rcodeNXDomain
	}
	return false
}

// appendReply appends an answer of our own with no records to out: header,
// the question where there was a valid one, and OPT where the query had it.
// Rcodes above 15 need EDNS.
func (q *query) appendReply(out []byte, rcode int, ede int) []byte {
	start := len(out)
	out = append(out, q.msg[0], q.msg[1],
		bitQR|q.msg[2]&(maskOpcode|bitRD), bitRA|q.msg[3]&bitCD|byte(rcode&maskRcode),
		0, 0, 0, 0, 0, 0, 0, 0)
	if q.end == 0 {
		return out
	}
	out[start+5] = 1
	out = append(out, q.msg[headerLen:q.end]...)
	if q.edns {
		out[start+11] = 1
		out = q.appendOPT(out, rcode, ede)
	}
	return out
}

// appendOPT appends our OPT record.
func (q *query) appendOPT(out []byte, rcode int, ede int) []byte {
	var do byte
	if q.do {
		do = 0x80
	}
	out = append(out, 0, 0, typeOPT, ourPayload>>8, ourPayload&0xff, byte(rcode>>4), 0, do, 0)
	if ede == edeNone {
		return append(out, 0, 0)
	}
	return append(out, 0, 6, 0, edeOptionNumber, 0, 2, 0, byte(ede))
}

// truncate cuts the answer msg, whose question ends at end, to at most limit
// bytes, in place. Whole records of the answer and authority sections stay,
// from the front: clients that know no TCP make do with them. If not all of
// those fit, TC is set. Of the additional section OPT alone stays, which is
// no reason for TC (RFC 2181 §9).
func truncate(msg []byte, end, limit int) []byte {
	if len(msg) <= limit {
		return msg
	}
	if end > len(msg) || end+optLen > limit {
		// Not ours to understand; never so for a question, which has at
		// most 271 bytes.
		msg[2] |= bitTC
		clear(msg[4:headerLen])
		return msg[:headerLen]
	}
	var opt []byte
	w := walkRecords(msg, end)
	for w.next() {
		if w.section == additional && w.typ == typeOPT && end+w.off-w.start <= limit {
			opt = msg[w.start:w.off]
		}
	}
	if w.bad {
		msg[2] |= bitTC
	}
	var count [sections]uint16
	keep, room := end, limit-len(opt)
	w = walkRecords(msg, end)
	for w.next() && w.section != additional {
		if w.off > room {
			msg[2] |= bitTC
			break
		}
		keep = w.off
		count[w.section]++
	}
	if opt != nil {
		keep += copy(msg[keep:], opt) // opt lies behind
		count[additional] = 1
	}
	for i, n := range count {
		binary.BigEndian.PutUint16(msg[6+2*i:], n)
	}
	return msg[:keep]
}
