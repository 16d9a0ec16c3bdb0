package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds on guests' TCP connections (RFC 7766 §6.1, §6.2).
const (
	maxStreams     = 100
	maxPipelined   = 32              // queries of one stream being answered
	maxUnsent      = 8 << 20         // bytes of answers to all streams; from then on
	fairUnsent     = 128 << 10       // streams with more than this are cut off
	streamPatience = 8 * time.Second // for a query to begin, or a write; half of it for a query's rest
)

// stream is a guest's TCP connection.
type stream struct {
	conn   net.Conn
	all    *streams
	out    chan []byte    // answers with their length in front; never full
	slots  chan struct{}  // one for each answer that is to be written
	asked  sync.WaitGroup // queries without their last answer
	open   atomic.Int32   // how many those are
	unsent atomic.Int64   // bytes queued
	cut    atomic.Bool    // it is gone or reads too slowly: its answers are dropped
	active atomic.Int64   // when the last query came, in nanoseconds
}

// streams are the TCP connections of guests.
type streams struct {
	patience time.Duration
	unsent   atomic.Int64 // bytes waiting for slow readers

	mu     sync.Mutex // guards following
	open   map[*stream]struct{}
	closed bool
}

// add takes st in. When all places are taken it closes the stream that has
// been idle longest; false means that all are busy.
func (s *streams) add(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.open == nil {
		s.open = make(map[*stream]struct{})
	}
	if len(s.open) >= maxStreams {
		var oldest *stream
		for o := range s.open {
			if len(o.slots) == 0 && (oldest == nil || o.active.Load() < oldest.active.Load()) {
				oldest = o
			}
		}
		if oldest == nil {
			return false
		}
		oldest.conn.Close()
		delete(s.open, oldest)
	}
	s.open[st] = struct{}{}
	return true
}

func (s *streams) remove(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, st)
}

func (s *streams) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for st := range s.open {
		st.conn.Close()
	}
}

func (s *streams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// serveListener answers the connections to l. It returns nil if l was closed
// because ctx is done.
func (s *Server) serveListener(ctx context.Context, l net.Listener) error {
	var streams sync.WaitGroup
	defer streams.Wait()
	var wait backoff
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) || !wait.sleep(ctx) {
				return fmt.Errorf("dns: accept connections: %w", err)
			}
			continue
		}
		wait.reset()
		st := &stream{
			conn: conn, all: &s.streams,
			out:   make(chan []byte, maxPipelined),
			slots: make(chan struct{}, maxPipelined),
		}
		st.active.Store(int64(s.now()))
		if !s.streams.add(st) {
			conn.Close()
			continue
		}
		streams.Go(func() {
			s.serveStream(st)
			s.streams.remove(st)
		})
	}
}

// scratches are the working memories of streams that have a query right now.
var scratches = sync.Pool{New: func() any { return &scratch{out: make([]byte, 0, 4096)} }}

// serveStream reads queries until the guest ends, tires us or misbehaves; then
// it sees the answers under way out.
func (s *Server) serveStream(st *stream) {
	var writer sync.WaitGroup
	writer.Go(st.write)
	r := bufio.NewReaderSize(st.conn, 1024)
	var msg []byte
	for {
		var ok bool
		if msg, ok = st.read(r, msg); !ok {
			break
		}
		st.active.Store(int64(s.now()))
		st.slots <- struct{}{}
		st.asked.Add(1)
		st.open.Add(1)
		w := scratches.Get().(*scratch)
		c := client{id: binary.BigEndian.Uint16(msg), tcp: st}
		ok = s.handle(msg, c, overTCP, w)
		if cap(w.out) <= 4096 {
			scratches.Put(w)
		}
		if !ok {
			st.answered()
			break
		}
	}
	st.asked.Wait() // every query has an answer in the end
	close(st.out)
	writer.Wait()
	st.conn.Close()
}

// read reads a message, into msg if there is room. False means that the
// stream is over.
func (st *stream) read(r *bufio.Reader, msg []byte) ([]byte, bool) {
	for {
		st.conn.SetReadDeadline(time.Now().Add(st.all.patience))
		_, err := r.Peek(1)
		if err == nil {
			break
		}
		// Who waits for an answer is not idle.
		var late net.Error
		if st.open.Load() == 0 || !errors.As(err, &late) || !late.Timeout() {
			return nil, false
		}
	}
	st.conn.SetReadDeadline(time.Now().Add(st.all.patience / 2))
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, false
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n < headerLen || n > maxQuery {
		return nil, false
	}
	if n > cap(msg) {
		msg = make([]byte, n)
	}
	_, err := io.ReadFull(r, msg[:n])
	return msg[:n], err == nil
}

// send queues a copy of msg, the last answer to the query of that id. It does
// not block.
func (st *stream) send(id uint16, msg []byte) {
	st.queue(id, msg)
	st.answered()
}

func (st *stream) answered() {
	st.open.Add(-1)
	st.asked.Done()
}

// finish says that the last answer to a query went by more.
func (st *stream) finish() {
	<-st.slots
	st.answered()
}

// more queues a copy of msg, an answer that others may follow. It waits until
// there is room for the next: for a reader that is slow, but not for ever. It
// reports whether anybody still reads.
func (st *stream) more(id uint16, msg []byte) bool {
	st.queue(id, msg)
	st.slots <- struct{}{}
	return !st.cut.Load()
}

// queue puts a copy of msg where the caller has a slot for it, or nothing if
// nobody reads any more.
func (st *stream) queue(id uint16, msg []byte) {
	if st.cut.Load() {
		st.out <- nil
		return
	}
	framed := make([]byte, 2, 2+len(msg))
	binary.BigEndian.PutUint16(framed, uint16(len(msg)))
	framed = append(framed, msg...)
	binary.BigEndian.PutUint16(framed[2:], id)
	own := st.unsent.Add(int64(len(framed)))
	if st.all.unsent.Add(int64(len(framed))) > maxUnsent && own > fairUnsent {
		st.cut.Store(true)
		st.conn.Close() // the writer gives back what it cannot send
	}
	st.out <- framed
}

// write writes answers, several at once if they are there, until out is closed.
func (st *stream) write() {
	var buf []byte
	for msg := range st.out {
		n := 1
		buf = append(buf[:0], msg...)
	gather:
		for len(buf) < 16<<10 {
			select {
			case more, ok := <-st.out:
				if !ok {
					break gather
				}
				buf = append(buf, more...)
				n++
			default:
				break gather
			}
		}
		st.conn.SetWriteDeadline(time.Now().Add(st.all.patience))
		if _, err := st.conn.Write(buf); err != nil {
			st.cut.Store(true)
			st.conn.Close()
		}
		st.unsent.Add(-int64(len(buf)))
		st.all.unsent.Add(-int64(len(buf)))
		for range n {
			<-st.slots
		}
		if cap(buf) > 64<<10 {
			buf = nil
		}
	}
}
