package forwarder

import (
	"time"

	"golang.org/x/sys/unix"
)

// A source is a stream socket that is read. Where small answers follow what was
// sent to it, they are read without being taken out of the socket. A read that
// empties a socket of two segments, a header and a body, has the kernel acknowledge
// them at once (__tcp_cleanup_rbuf, net/ipv4/tcp.c), and that costs as much as the
// read; the next request says the same by the way. What stays in the socket is taken
// when there is more of it, when no request follows, before anything but read sees
// the socket, and at its end: one that is closed with something in it resets its
// connection.
type source struct {
	fd     int
	asked  bool  // something was sent since the last read
	turns  uint8 // small answers in a row, at most manyTurns
	peeks  peeking
	unread int           // bytes that were read and are still in the socket
	at     time.Duration // when something was read
}

// peeking tells whether a socket can be read behind what is in it, which TCP can
// since Linux 6.9 (socket(7), SO_PEEK_OFF).
type peeking uint8

const (
	peekUnknown peeking = iota
	peekCan
	peekCannot
)

const (
	// manyTurns is after how many small answers more of them are expected.
	manyTurns = 4
	// smallAnswer is the longest of them, in bytes.
	smallAnswer = 4 << 10
	// maxUnread bounds what stays in the socket: one acknowledgement for so
	// many bytes is not missed.
	maxUnread = 8 << 10
	// unreadTime is how long it stays at least, and twice that at most.
	unreadTime = sweepEvery
	// stallTime is how long the rest of an answer may take. A server can wait for
	// an acknowledgement (RFC 896, or a window of its own), which the kernel
	// delays for 40 ms at the least (TCP_DELACK_MIN).
	stallTime = 20 * time.Millisecond
)

// read reads into b. plain says that a FIN or urgent data may follow, which is not
// looked for behind bytes that are still in the socket.
func (s *source) read(b []byte, plain bool, now time.Duration) (int, unix.Errno) {
	if plain || s.turns < manyTurns || s.unread >= maxUnread || !s.canPeek() {
		if errno := s.consume(); errno != 0 {
			return 0, errno
		}
		n, errno := rawRecv(s.fd, b, 0)
		s.answered(n, now)
		return n, errno
	}
	n, errno := rawRecv(s.fd, b, unix.MSG_PEEK)
	if errno != 0 {
		return n, errno
	}
	s.unread += n
	if !s.asked && n > 0 && now-s.at > stallTime {
		s.peeks = peekCannot // this server may have waited
	}
	if s.peeks == peekCannot || n > smallAnswer || n == 0 {
		_ = s.consume() // if this fails the next read says so
	}
	s.answered(n, now)
	return n, 0
}

// answered notes that n bytes were read.
func (s *source) answered(n int, now time.Duration) {
	if n > 0 {
		s.at = now
	}
	switch {
	case n > smallAnswer:
		s.turns = 0
	case n > 0 && s.asked && s.turns < manyTurns:
		s.turns++
	}
	s.asked = s.asked && n == 0
}

func (s *source) canPeek() bool {
	if s.peeks == peekUnknown {
		s.peeks = peekCannot
		domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if err == nil && domain != unix.AF_UNIX && setInt(s.fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0) == 0 {
			s.peeks = peekCan
		}
	}
	return s.peeks == peekCan
}

// consume takes what was read out of the socket.
func (s *source) consume() unix.Errno {
	for tries := 0; s.unread > 0; tries++ {
		n, errno := rawDiscard(s.fd, s.unread)
		switch {
		case errno == 0 && n > 0:
			s.unread -= n
		case errno == unix.EAGAIN && tries < 100:
			// A signal is pending where urgent data begins.
		case errno == 0 || errno == unix.EAGAIN:
			return unix.ECONNABORTED // cannot happen: the bytes were there
		default:
			return errno
		}
	}
	return 0
}

// sweepSources takes what was read out of the sockets of idle flows.
func (f *Forwarder) sweepSources() {
	now := f.clock()
	for fl := range f.tcp.flows {
		fl.consumeIdle(fl.last, now)
	}
	for fl := range f.inbound.flows {
		fl.host.consumeIdle(fl.last, now)
		fl.guest.consumeIdle(fl.last, now)
	}
}

// consumeIdle takes what was read out of a socket whose flow was last used then.
func (s *source) consumeIdle(last, now time.Duration) {
	if s.unread > 0 && now-last >= unreadTime {
		_ = s.consume() // if it fails the next read says so
	}
}
