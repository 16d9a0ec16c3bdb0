package dns

import (
	"crypto/rand"
	"encoding/binary"
	"sync"
)

// idSource makes the ids of upstream queries from the system's random source,
// a block at a time. An id that can be guessed is half of a forged answer
// (RFC 5452 §9.2).
type idSource struct {
	mu   sync.Mutex // guards following
	buf  [512]byte
	left int
}

func (s *idSource) next() uint16 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left == 0 {
		rand.Read(s.buf[:]) // never fails
		s.left = len(s.buf)
	}
	s.left -= 2
	return binary.NativeEndian.Uint16(s.buf[s.left:])
}
