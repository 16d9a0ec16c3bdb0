package dns

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// inbox is room for datagrams that are received by one system call. What is
// never filled takes no memory.
type inbox struct {
	hdrs []mmsghdr
	bufs []byte
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

// room is what a datagram may take: one byte more than a message, so that none
// is cut unseen.
const room = maxMessage + 1

func newInbox(n int) *inbox {
	b := &inbox{hdrs: make([]mmsghdr, n), bufs: make([]byte, n*room)}
	iov := make([]unix.Iovec, n)
	for i := range b.hdrs {
		iov[i] = unix.Iovec{Base: &b.bufs[i*room], Len: room}
		b.hdrs[i].hdr.Iov, b.hdrs[i].hdr.Iovlen = &iov[i], 1
	}
	return b
}

// receive reads what is there and returns how many datagrams it was. fd must
// not block.
func (b *inbox) receive(fd int) (int, unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.hdrs[0])), uintptr(len(b.hdrs)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// message returns the i-th datagram, good until the next receive.
func (b *inbox) message(i int) []byte {
	return b.bufs[i*room : i*room+int(b.hdrs[i].n)]
}
