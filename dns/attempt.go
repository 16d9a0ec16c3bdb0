package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"
)

// maxForged is how many wrong answers are taken until TCP is safer.
const maxForged = 256

// errSilent is why an upstream rests that did not answer.
var errSilent = errors.New("no answer")

// errForged ends an attempt over UDP that somebody tries to forge answers to.
var errForged = errors.New("too many answers that do not match")

// attempt is a query to one upstream.
type attempt struct {
	f         *flight
	up        *upstream
	transport transport
	started   time.Duration
	id        uint16
	open      bool

	sock   *socket            // its UDP socket, nil: none
	cancel context.CancelFunc // of a goroutine; nil: none
}

// askLocked asks up. False means that this failed at once.
func (f *flight) askLocked(up *upstream, now time.Duration) bool {
	s := f.s
	if s.closed.Load() {
		return false
	}
	if s.permit != nil {
		if err := s.permit(up.addr); err != nil {
			f.ede = edeProhibited
			return false
		}
	}
	a := &f.room.first
	if a.f != nil {
		a = new(attempt)
	}
	*a = attempt{f: f, up: up, transport: f.transport, started: now, id: s.ids.next()}
	if f.transport == overUDP && s.dial == nil {
		if err := s.sockets.send(a, s.bind); err != nil {
			f.failLocked(a, err, now)
			return false
		}
	} else {
		f.goLocked(a)
	}
	a.open = true
	f.attempts = append(f.attempts, a)
	f.pending++
	s.stats.upstreamQueries.Add(1)
	return true
}

// goLocked starts the goroutine of an attempt through a net.Conn.
func (f *flight) goLocked(a *attempt) {
	ctx, cancel := context.WithTimeout(f.s.ctx, flightTime)
	a.cancel = cancel
	f.s.tasks.Go(func() { a.converse(ctx) })
}

// endLocked ends a's waiting. Good means that its answer has come.
func (f *flight) endLocked(a *attempt, good bool) {
	a.open = false
	f.pending--
	f.s.sockets.forget(a, good)
	if a.cancel != nil {
		a.cancel()
	}
	if f.pending == 0 {
		f.lingeredLocked()
	}
}

// receive takes msg, which came on sock under a's id, and reports whether it is
// a's answer.
func (a *attempt) receive(sock *socket, msg []byte) bool {
	f := a.f
	f.mu.Lock()
	defer f.unlock()
	if !a.open || a.sock != sock {
		return true // it may well have been
	}
	if !matches(msg, f.ask, f.end, a.id) {
		return false
	}
	f.replyLocked(a, msg, f.s.now())
	return true
}

// fail takes an error of sock, if that is a's.
func (a *attempt) fail(sock *socket, err error) {
	f := a.f
	f.mu.Lock()
	defer f.unlock()
	if !a.open || a.sock != sock {
		return
	}
	now := f.s.now()
	f.failLocked(a, err, now)
	f.nextLocked(now)
}

// again sends a's query from another port than sock's, by which it has not left.
func (a *attempt) again(sock *socket) {
	f := a.f
	f.mu.Lock()
	defer f.unlock()
	if !a.open || a.sock != sock {
		return
	}
	f.s.sockets.forget(a, false)
	if err := f.s.sockets.send(a, f.s.bind); err != nil {
		now := f.s.now()
		f.failLocked(a, err, now)
		f.nextLocked(now)
	}
}

// suspect has a's question asked over TCP if it was asked by sock, whose port
// somebody seems to know.
func (a *attempt) suspect(sock *socket) {
	f := a.f
	f.mu.Lock()
	defer f.unlock()
	if a.open && a.sock == sock {
		f.suspectLocked(a)
	}
}

// matches reports whether msg answers a.
func (f *flight) matches(a *attempt, msg []byte) bool {
	if matches(msg, f.ask, f.end, a.id) {
		return true
	}
	f.s.stats.mismatched.Add(1)
	return false
}

// nextLocked goes on after a failure.
func (f *flight) nextLocked(now time.Duration) {
	if f.done {
		return
	}
	f.askNextLocked(now)
	f.settleLocked(now)
}

// suspectLocked gives up UDP for a and asks the same upstream over TCP, where
// port and id are not all there is to be guessed.
func (f *flight) suspectLocked(a *attempt) {
	f.endLocked(a, false)
	if f.done {
		return
	}
	now := f.s.now()
	b := &attempt{f: f, up: a.up, transport: overTCP, started: now, id: f.s.ids.next()}
	f.goLocked(b)
	b.open = true
	f.attempts = append(f.attempts, b)
	f.pending++
	f.settleLocked(now)
}

// converse asks a's upstream through a net.Conn and waits for the answer.
func (a *attempt) converse(ctx context.Context) {
	defer a.cancel()
	msg, err := a.exchange(ctx)
	f := a.f
	f.mu.Lock()
	defer f.unlock()
	if !a.open {
		return
	}
	now := f.s.now()
	if err != nil {
		f.failLocked(a, err, now)
		f.nextLocked(now)
		return
	}
	f.replyLocked(a, msg, now)
}

func (a *attempt) exchange(ctx context.Context) ([]byte, error) {
	conn, err := a.f.s.connect(ctx, a.transport, a.up.addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if a.transport == overUDP {
		return a.exchangeUDP(conn)
	}
	ask := a.f.ask
	msg := make([]byte, 4, 4+len(ask))
	binary.BigEndian.PutUint16(msg, uint16(2+len(ask)))
	binary.BigEndian.PutUint16(msg[2:], a.id)
	if _, err := conn.Write(append(msg, ask...)); err != nil {
		return nil, err
	}
	for range maxForged {
		msg, err := readMessage(conn)
		if err != nil {
			return nil, err
		}
		if a.f.matches(a, msg) {
			return msg, nil
		}
	}
	return nil, errForged
}

func (a *attempt) exchangeUDP(conn net.Conn) ([]byte, error) {
	msg := append([]byte{byte(a.id >> 8), byte(a.id)}, a.f.ask...)
	if _, err := conn.Write(msg); err != nil {
		return nil, err
	}
	buf := make([]byte, maxMessage)
	for range maxForged {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		if a.f.matches(a, buf[:n]) {
			return buf[:n], nil
		}
	}
	return nil, errForged
}

// connect opens a connection to an upstream.
func (s *Server) connect(ctx context.Context, t transport, addr netip.AddrPort) (net.Conn, error) {
	if s.dial != nil {
		return s.dial(ctx, t.String(), addr)
	}
	return s.dialer.DialContext(ctx, t.String(), addr.String())
}
