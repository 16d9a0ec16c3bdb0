package capture

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// Blocks, options and flags of pcapng (draft-ietf-opsawg-pcapng). All numbers are
// in this machine's byte order, which the section header tells.
const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6

	byteOrderMagic = 0x1a2b3c4d
	linkEthernet   = 1

	optEnd         = 0
	optApplication = 4 // of a section
	optName        = 2 // of an interface
	optResolution  = 9
	optFilter      = 11
	optFlags       = 2 // of a packet
	optDropCount   = 4
	optReceived    = 4 // of statistics
	optDropped     = 5
	optAccepted    = 6

	flagInbound  = 1
	flagOutbound = 2
)

func u32(b []byte, v uint32) []byte { return binary.NativeEndian.AppendUint32(b, v) }

// begin begins a block whose length end fills in.
func begin(b []byte, kind uint32) []byte { return u32(u32(b, kind), 0) }

// end ends the block that begins at start.
func end(b []byte, start int) []byte {
	size := uint32(len(b) - start + 4)
	binary.NativeEndian.PutUint32(b[start+4:], size)
	return u32(b, size)
}

func pad(b []byte, size int) []byte { return append(b, 0, 0, 0)[:len(b)+(-size&3)] }

func option(b []byte, code uint16, value ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, code)
	b = binary.NativeEndian.AppendUint16(b, uint16(len(value)))
	return pad(append(b, value...), len(value))
}

func option64(b []byte, code uint16, v uint64) []byte {
	var value [8]byte
	binary.NativeEndian.PutUint64(value[:], v)
	return option(b, code, value[:]...)
}

// stamp appends a time in nanoseconds.
func stamp(b []byte, t time.Time) []byte {
	ns := uint64(t.UnixNano())
	return u32(u32(b, uint32(ns>>32)), uint32(ns))
}

// appendHead appends what a file begins with.
func appendHead(b []byte, name, filter string, snaplen int) []byte {
	start := len(b)
	b = begin(b, blockSection)
	b = u32(b, byteOrderMagic)
	b = binary.NativeEndian.AppendUint16(b, 1) // version 1.0
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint64(b, ^uint64(0)) // of unknown length
	b = option(b, optApplication, []byte("usernet")...)
	b = end(option(b, optEnd), start)

	start = len(b)
	b = begin(b, blockInterface)
	b = binary.NativeEndian.AppendUint16(b, linkEthernet)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = u32(b, uint32(snaplen))
	b = option(b, optName, []byte(name)...)
	b = option(b, optResolution, 9) // nanoseconds
	if filter != "" {
		b = option(b, optFilter, append([]byte{0}, filter...)...)
	}
	return end(option(b, optEnd), start)
}

// packetRoom is what a packet's block takes beside its bytes.
const packetRoom = 32 + 3 + 8 + 12 + 4

// appendPacket appends the first size bytes of a frame, which is in parts.
func appendPacket(b []byte, t time.Time, flags uint32, dropped uint64, size, length int, parts [][]byte) []byte {
	start := len(b)
	b = begin(b, blockPacket)
	b = u32(b, 0) // the interface
	b = stamp(b, t)
	b = u32(u32(b, uint32(size)), uint32(length))
	left := size
	for _, p := range parts {
		n := min(left, len(p))
		b = append(b, p[:n]...)
		left -= n
	}
	b = pad(b, size)
	b = binary.NativeEndian.AppendUint16(b, optFlags)
	b = u32(binary.NativeEndian.AppendUint16(b, 4), flags)
	if dropped > 0 {
		b = option64(b, optDropCount, dropped)
	}
	return end(u32(b, optEnd), start)
}

// appendStats appends the counters of now.
func appendStats(b []byte, t time.Time, s Stats) []byte {
	start := len(b)
	b = begin(b, blockStatistics)
	b = stamp(u32(b, 0), t)
	b = option64(b, optReceived, s.Seen)
	b = option64(b, optDropped, s.Dropped)
	b = option64(b, optAccepted, s.Matched)
	return end(option(b, optEnd), start)
}

// maxBlock is more than the largest block that Stream makes.
const maxBlock = 1 << 20

// Copy copies a stream that Stream has made, until it or ctx ends, or after count
// packets if that is not 0. What it writes ends with a whole block. Packets and
// Dropped of the result are what it has seen go by.
func Copy(ctx context.Context, to io.Writer, from io.Reader, count uint64) (s Stats, err error) {
	r, w := bufio.NewReaderSize(from, 1<<18), bufio.NewWriterSize(to, 1<<18)
	var block []byte
	for count == 0 || s.Packets < count {
		if r.Buffered() < 8 {
			if err = w.Flush(); err != nil {
				break // the reader at the other end has gone
			}
		}
		head, rerr := r.Peek(8)
		if rerr != nil {
			if len(head) > 0 || !errors.Is(rerr, io.EOF) {
				err = rerr
			}
			break
		}
		kind, size := binary.NativeEndian.Uint32(head), int(binary.NativeEndian.Uint32(head[4:]))
		if size < 12 || size > maxBlock || size&3 != 0 {
			err = fmt.Errorf("a block of %d bytes", size)
			break
		}
		if cap(block) < size {
			block = make([]byte, size)
		}
		block = block[:size]
		if _, err = io.ReadFull(r, block); err != nil {
			break
		}
		switch kind {
		case blockPacket:
			s.Packets++
		case blockStatistics:
			s.Dropped = max(s.Dropped, statistic(block, optDropped))
		}
		if _, err = w.Write(block); err != nil {
			break
		}
	}
	if ferr := w.Flush(); err == nil {
		err = ferr
	}
	if ctx.Err() != nil {
		err = nil // the end was wanted
	}
	return s, err
}

// statistic finds a counter in a block of statistics.
func statistic(block []byte, code uint16) uint64 {
	b := block[20 : len(block)-4]
	for len(b) >= 4 {
		c, size := binary.NativeEndian.Uint16(b), int(binary.NativeEndian.Uint16(b[2:]))
		if b = b[4:]; len(b) < size {
			break
		}
		if c == code && size == 8 {
			return binary.NativeEndian.Uint64(b)
		}
		b = b[min(size+(-size&3), len(b)):]
	}
	return 0
}
