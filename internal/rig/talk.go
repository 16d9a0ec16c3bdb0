package rig

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Step is one thing that a side of a TCP connection does. Exactly one of its
// fields is set; see the constructors.
type Step struct {
	SendBytes  int64  `json:",omitempty"`
	Seed       uint64 `json:",omitempty"`
	MaxWrite   int    `json:",omitempty"`
	Receive    bool   `json:",omitempty"`
	ReceiveN   int64  `json:",omitempty"`
	Exchange   int64  `json:",omitempty"`
	CloseWrite bool   `json:",omitempty"`
	Reset      bool   `json:",omitempty"`
	Sleep      time.Duration
	Urgent     string `json:",omitempty"`
}

// Send writes n bytes that depend only on seed, in one piece.
func Send(n int64, seed uint64) Step { return Step{SendBytes: n, Seed: seed} }

// SendPieces writes n bytes in pieces of random sizes from 1 to largest.
func SendPieces(n int64, seed uint64, largest int) Step {
	return Step{SendBytes: n, Seed: seed, MaxWrite: largest}
}

// Receive reads to the end.
func Receive() Step { return Step{Receive: true} }

// ReceiveN reads n bytes.
func ReceiveN(n int64) Step { return Step{ReceiveN: n} }

// Exchange sends n bytes in random pieces, closes that half, and reads to the
// end meanwhile.
func Exchange(n int64, seed uint64) Step { return Step{Exchange: n, Seed: seed, MaxWrite: 70000} }

// CloseWrite ends the sending half with a FIN.
func CloseWrite() Step { return Step{CloseWrite: true} }

// Reset closes the connection with a RST.
func Reset() Step { return Step{Reset: true} }

// Sleep does nothing for d.
func Sleep(d time.Duration) Step { return Step{Sleep: d} }

// Urgent writes text and marks its last byte urgent.
func Urgent(text string) Step { return Step{Urgent: text} }

// A Talk is what both sides of a TCP connection do. The server learns its part
// from the first line of the connection.
type Talk struct {
	Addr    string // of a script server
	Client  []Step
	Server  []Step
	Streams int // connections at the same time; 0 means 1
}

// A Result is what one side of a connection has seen.
type Result struct {
	Sent, Got       int64
	SentSum, GotSum string
	Head            string // the first 64 bytes got
	// End is how reading ended: "eof", "reset", or an error's text. It is
	// empty if nothing read to the end.
	End string
	// Failure is the error of a step, with its errno.
	Failure *Error
}

// Results are both sides of one connection.
type Results struct{ Client, Server Result }

// runTalk does the client's part.
var runTalk = NewFunc("rig.talk", func(ctx context.Context, t Talk) ([]talkResult, error) {
	streams := max(t.Streams, 1)
	results := make([]talkResult, streams)
	var wg sync.WaitGroup
	for i := range results {
		wg.Go(func() {
			results[i] = talk(ctx, t, i)
		})
	}
	wg.Wait()
	return results, nil
})

type talkResult struct {
	Token string
	Result
}

// Do runs t between node client and the script server in node server, which is
// where it fetches what the server has seen.
func (t Talk) Do(client, server *Node, limit time.Duration) ([]Results, error) {
	seen, err := runTalk.Within(limit).Try(client, t)
	if err != nil {
		return nil, err
	}
	all := make([]Results, len(seen))
	for i, s := range seen {
		all[i].Client = s.Result
		if s.Sent+s.Got == 0 && s.Failure != nil {
			return all, fmt.Errorf("stream %d: %w", i, s.Failure)
		}
		if all[i].Server, err = observe.Within(limit).Try(server, s.Token); err != nil {
			return all, fmt.Errorf("stream %d (client: %+v): %w", i, s.Result, err)
		}
	}
	return all, nil
}

// preamble is the first line of a scripted connection.
type preamble struct {
	Token string
	Steps []Step
}

// talk is the client's side. Stream i sends other bytes than stream 0.
func talk(ctx context.Context, t Talk, i int) talkResult {
	token := fmt.Sprintf("%016x", rand.Uint64())
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", t.Addr)
	if err != nil {
		return talkResult{token, Result{Failure: newError(err)}}
	}
	defer c.Close()
	line, err := json.Marshal(preamble{token, differ(t.Server, i)})
	if err != nil {
		return talkResult{token, Result{Failure: newError(err)}}
	}
	if _, err := c.Write(append(line, '\n')); err != nil {
		return talkResult{token, Result{Failure: newError(err)}}
	}
	return talkResult{token, play(ctx, c.(*net.TCPConn), c, differ(t.Client, i))}
}

func differ(steps []Step, i int) []Step {
	own := append([]Step(nil), steps...)
	for j := range own {
		own[j].Seed += uint64(i)
	}
	return own
}

// serveTalk is the server's side; what it has seen is kept under the token.
func serveTalk(c *net.TCPConn) {
	defer c.Close()
	r := bufio.NewReaderSize(c, 64<<10)
	line, err := r.ReadBytes('\n')
	var p preamble
	if err != nil || json.Unmarshal(line, &p) != nil {
		return
	}
	// No test talks longer; a lost peer must not keep the goroutine.
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	observations.put(p.Token, play(ctx, c, r, p.Steps))
}

// player runs the steps of one side.
type player struct {
	conn      *net.TCPConn
	in        io.Reader
	sent, got hash.Hash
	Result
}

func play(ctx context.Context, c *net.TCPConn, in io.Reader, steps []Step) Result {
	p := &player{conn: c, in: in, sent: sha256.New(), got: sha256.New()}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for i, s := range steps {
		if err := p.step(ctx, s); err != nil {
			p.Failure = newError(fmt.Errorf("step %d: %w", i+1, err))
			break
		}
	}
	p.SentSum = hex.EncodeToString(p.sent.Sum(nil))
	p.GotSum = hex.EncodeToString(p.got.Sum(nil))
	return p.Result
}

func (p *player) step(ctx context.Context, s Step) error {
	switch {
	case s.SendBytes > 0:
		return p.send(s.SendBytes, s)
	case s.Receive:
		return p.receive()
	case s.ReceiveN > 0:
		n, err := io.CopyN(p, p.in, s.ReceiveN)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", n, s.ReceiveN, err)
		}
	case s.Exchange > 0:
		return p.exchange(s)
	case s.CloseWrite:
		return p.conn.CloseWrite()
	case s.Reset:
		p.conn.SetLinger(0)
		return p.conn.Close()
	case s.Urgent != "":
		return p.urgent(s.Urgent)
	case s.Sleep > 0:
		select {
		case <-time.After(s.Sleep):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Write counts received bytes; it is what receiving copies to.
func (p *player) Write(b []byte) (int, error) {
	p.Got += int64(len(b))
	if room := 64 - len(p.Head); room > 0 {
		p.Head += strings.ToValidUTF8(string(b[:min(room, len(b))]), "?")
	}
	return p.got.Write(b)
}

// receive reads to the end and notes which end it was.
func (p *player) receive() error {
	_, err := io.CopyBuffer(p, p.in, make([]byte, 128<<10))
	switch {
	case err == nil:
		p.End = "eof"
	case errors.Is(err, syscall.ECONNRESET):
		p.End = "reset"
	default:
		p.End = err.Error()
		return err
	}
	return nil
}

func (p *player) send(n int64, s Step) error {
	source := newRandom(s.Seed)
	sizes := rand.New(rand.NewPCG(s.Seed, 1))
	b := make([]byte, 128<<10)
	for end := p.Sent + n; p.Sent < end; {
		size := len(b)
		if s.MaxWrite > 0 {
			size = 1 + sizes.IntN(min(s.MaxWrite, len(b)))
		}
		size = int(min(int64(size), end-p.Sent))
		source.Read(b[:size])
		wrote, err := p.conn.Write(b[:size])
		p.sent.Write(b[:wrote])
		p.Sent += int64(wrote)
		if err != nil {
			return fmt.Errorf("after %d bytes of %d more: %w", p.Sent, n, err)
		}
	}
	return nil
}

func (p *player) exchange(s Step) error {
	failed := make(chan error, 1)
	go func() {
		err := p.send(s.Exchange, s)
		if err == nil {
			err = p.conn.CloseWrite()
		}
		failed <- err
	}()
	err := p.receive()
	return errors.Join(err, <-failed)
}

// urgent sends text with MSG_OOB.
func (p *player) urgent(text string) error {
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		sendErr = syscall.Sendto(int(fd), []byte(text), syscall.MSG_OOB, nil)
		return sendErr != syscall.EAGAIN
	})
	p.sent.Write([]byte(text))
	p.Sent += int64(len(text))
	return errors.Join(err, sendErr)
}

// newRandom gives the bytes that belong to a seed.
func newRandom(seed uint64) *rand.ChaCha8 {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return rand.NewChaCha8(key)
}

// A board keeps what servers have seen until the test asks.
type board struct {
	mu   sync.Mutex
	seen map[string]Result
	news chan struct{} // closed and replaced with every put
}

var observations = &board{seen: make(map[string]Result), news: make(chan struct{})}

func (b *board) put(token string, r Result) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen[token] = r
	close(b.news)
	b.news = make(chan struct{})
}

func (b *board) get(ctx context.Context, token string) (Result, error) {
	for {
		b.mu.Lock()
		r, ok := b.seen[token]
		news := b.news
		b.mu.Unlock()
		if ok {
			return r, nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return Result{}, errors.New("rig: the server has not seen the end of the connection")
		}
	}
}

var observe = NewFunc("rig.observe", func(ctx context.Context, token string) (Result, error) {
	return observations.get(ctx, token)
})
