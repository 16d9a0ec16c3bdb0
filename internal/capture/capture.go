// Package capture records frames, as pcapng, for whoever asks.
package capture

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// A Recorder sees the frames of a link. Without a stream it costs a look at one
// number for each.
type Recorder struct {
	active  atomic.Int32
	dropped atomic.Uint64

	mu      sync.Mutex // guards following
	streams []*stream
	head    [headSize]byte
	packet  packet
}

// headSize is as much of a frame as filters look at.
const headSize = 256

// Options of a stream.
type Options struct {
	Name    string  // of the link
	Filter  *Filter // nil: all frames
	Snaplen int     // how much of each frame; 0: all of it
}

// MaxSnaplen is more than any frame has.
const MaxSnaplen = 1 << 18

// Stats count frames.
type Stats struct {
	Seen    uint64 // on the link
	Matched uint64 // by the filter
	Dropped uint64 // of those, for lack of room
	Packets uint64 // written
}

const (
	// bufferSize is how much waits for the reader of a stream, twice.
	bufferSize = 4 << 20
	// maxStreams bounds the streams at a time.
	maxStreams = 4
	// linger is how long frames wait for others, so that a stream of small ones
	// does not wake its reader for each.
	linger = 10 * time.Millisecond
	// statsEvery is the time between two blocks of statistics, if there is news.
	statsEvery = time.Second
)

// ErrBusy is returned by Stream when there are too many.
var ErrBusy = errors.New("capture: 4 are running already: end one first")

// stream is the frames that wait for one reader.
type stream struct {
	Options
	stats   Stats
	lost    uint64 // dropped since the last packet
	buf     []byte // blocks that wait
	wake    chan struct{}
	hurry   chan struct{} // the buffer is half full
	written []byte        // the other buffer, which is the reader's
}

// Active reports whether somebody wants to see frames.
func (r *Recorder) Active() bool { return r.active.Load() != 0 }

// Dropped returns how many frames all streams together had no room for.
func (r *Recorder) Dropped() uint64 { return r.dropped.Load() }

// Record shows a frame, which is in parts, to those who want to see it. It never
// waits for them.
func (r *Recorder) Record(received bool, parts ...[]byte) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	length, n := 0, 0
	for _, p := range parts {
		n += copy(r.head[n:], p)
		length += len(p)
	}
	r.packet.parse(r.head[:n])
	for _, s := range r.streams {
		s.stats.Seen++
		if s.Filter == nil || s.Filter.matches(&r.packet) {
			if !s.add(now, received, length, parts) {
				r.dropped.Add(1)
			}
		}
	}
}

// add reports whether there was room.
func (s *stream) add(now time.Time, received bool, length int, parts [][]byte) bool {
	s.stats.Matched++
	size := length
	if s.Snaplen > 0 {
		size = min(size, s.Snaplen)
	}
	if len(s.buf)+packetRoom+size > cap(s.buf) {
		s.stats.Dropped++
		s.lost++
		return false
	}
	flags := uint32(flagOutbound)
	if received {
		flags = flagInbound
	}
	before := len(s.buf)
	s.buf = appendPacket(s.buf, now, flags, s.lost, size, length, parts)
	s.lost = 0
	if before == 0 {
		signal(s.wake)
	}
	if half := cap(s.buf) / 2; before < half && len(s.buf) >= half {
		signal(s.hurry)
	}
	return true
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Stream writes frames as they come until ctx is done or w fails. The reader may
// be slow: what there is no room for is dropped, and counted in the stream.
func (r *Recorder) Stream(ctx context.Context, w io.Writer, o Options) error {
	s := &stream{
		Options: o, wake: make(chan struct{}, 1), hurry: make(chan struct{}, 1),
		buf: make([]byte, 0, bufferSize), written: make([]byte, 0, bufferSize),
	}
	if err := r.add(s); err != nil {
		return err
	}
	defer r.remove(s)
	filter := ""
	if o.Filter != nil {
		filter = o.Filter.String()
	}
	if _, err := w.Write(appendHead(nil, o.Name, filter, o.Snaplen)); err != nil {
		return err
	}
	tick := time.NewTicker(statsEvery)
	defer tick.Stop()
	told := uint64(0) // dropped, as the last statistics say
	for {
		stats := false
		select {
		case <-ctx.Done():
			r.remove(s)
			return r.write(s, w, true)
		case <-tick.C:
			stats = true
		case <-s.wake:
			select {
			case <-time.After(linger):
			case <-s.hurry:
			case <-ctx.Done():
			}
		}
		if stats {
			r.mu.Lock()
			stats = s.stats.Dropped != told
			told = s.stats.Dropped
			r.mu.Unlock()
			if !stats {
				continue
			}
		}
		if err := r.write(s, w, stats); err != nil {
			return err
		}
	}
}

// write writes what waits, and the counters.
func (r *Recorder) write(s *stream, w io.Writer, stats bool) error {
	r.mu.Lock()
	s.buf, s.written = s.written[:0], s.buf
	now := s.stats
	r.mu.Unlock()
	if len(s.written) > 0 {
		if _, err := w.Write(s.written); err != nil {
			return err
		}
	}
	if !stats {
		return nil
	}
	_, err := w.Write(appendStats(nil, time.Now(), now))
	return err
}

func (r *Recorder) add(s *stream) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.streams) >= maxStreams {
		return ErrBusy
	}
	r.streams = append(r.streams, s)
	r.active.Store(int32(len(r.streams)))
	return nil
}

func (r *Recorder) remove(s *stream) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, have := range r.streams {
		if have == s {
			r.streams = append(r.streams[:i:i], r.streams[i+1:]...)
		}
	}
	r.active.Store(int32(len(r.streams)))
}
