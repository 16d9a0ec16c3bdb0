package dns

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// outbox sends many queries by few system calls: those of one size in a row are
// one message, which the kernel takes apart (UDP_SEGMENT).
type outbox struct {
	n    int
	msgs [portQueries]outMessage
	iovs [2 * portQueries]unix.Iovec
	hdrs [portQueries]mmsghdr
	ctl  [portQueries][ctlSize]byte
}

// outMessage is a query: its id, and the bytes behind it.
type outMessage struct {
	id  [2]byte
	ask string
}

func (m *outMessage) size() int { return len(m.id) + len(m.ask) }

const (
	ctlSize = 24 // CMSG_SPACE(sizeof(uint16))
	// maxRun bounds a run: a UDP packet, headers included, fits into 65535.
	// portQueries is UDP_MAX_SEGMENTS, which bounds their number.
	maxRun = 65000
)

// add puts a query into the box, which has room for portQueries.
func (b *outbox) add(id uint16, ask string) {
	b.msgs[b.n] = outMessage{[2]byte{byte(id >> 8), byte(id)}, ask}
	b.n++
}

// clear empties the box.
func (b *outbox) clear() {
	clear(b.msgs[:b.n])
	b.n = 0
}

// send sends the queries on a connected socket that does not block, and returns
// how many have left. A full queue and lack of memory are no errors: they lose
// what would be lost elsewhere.
func (b *outbox) send(fd int) (int, error) {
	sent, joining := 0, true
	for sent < b.n {
		hdrs, first := b.headers(sent, joining)
		r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&hdrs[0])), uintptr(len(hdrs)), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == 0:
			for i := range hdrs[:r] {
				sent += int(hdrs[i].hdr.Iovlen) / 2
			}
		case errno == unix.EINTR:
		case errno == unix.EAGAIN, errno == unix.ENOBUFS:
			return b.n, nil
		case first > 1 && (errno == unix.EINVAL || errno == unix.EIO || errno == unix.EMSGSIZE):
			joining = false // the way out cannot carry a run
		default:
			return sent, errno
		}
	}
	return sent, nil
}

// headers describes the queries from the i-th on to the kernel, and returns of
// how many the first message is made.
func (b *outbox) headers(i int, joining bool) (hdrs []mmsghdr, first int) {
	n := 0
	for i < b.n {
		size, j := b.msgs[i].size(), i
		for ; j < b.n && (j == i || joining && b.msgs[j].size() == size && (j-i+1)*size <= maxRun); j++ {
			m := &b.msgs[j]
			b.iovs[2*j] = unix.Iovec{Base: &m.id[0], Len: uint64(len(m.id))}
			b.iovs[2*j+1] = unix.Iovec{Base: unsafe.StringData(m.ask), Len: uint64(len(m.ask))}
		}
		b.hdrs[n].hdr = unix.Msghdr{Iov: &b.iovs[2*i], Iovlen: uint64(2 * (j - i))}
		if j-i > 1 {
			b.segment(n, size)
		}
		if n == 0 {
			first = j - i
		}
		n++
		i = j
	}
	return b.hdrs[:n], first
}

// segment has the n-th message taken apart into datagrams of that size.
func (b *outbox) segment(n, size int) {
	ctl := &b.ctl[n]
	c := (*unix.Cmsghdr)(unsafe.Pointer(ctl))
	c.Level, c.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	c.SetLen(unix.CmsgLen(2))
	*(*uint16)(unsafe.Pointer(&ctl[unix.CmsgLen(0)])) = uint16(size)
	b.hdrs[n].hdr.Control, b.hdrs[n].hdr.Controllen = &ctl[0], ctlSize
}
