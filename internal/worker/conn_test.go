package worker

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns two connected ends; each serves until the test ends.
func pair(t testing.TB, longest int, near, far Handler) (a, b *Conn) {
	t.Helper()
	x, y := sockets(t)
	a, b = newConn(x, longest, writeTimeout), newConn(y, longest, writeTimeout)
	var done sync.WaitGroup
	done.Go(func() { _ = a.Serve(near) })
	done.Go(func() { _ = b.Serve(far) })
	t.Cleanup(func() {
		a.Close()
		b.Close()
		done.Wait()
	})
	return a, b
}

func sockets(t testing.TB) (x, y *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if x, err = unixConn(fds[0]); err == nil {
		y, err = unixConn(fds[1])
	}
	if err != nil {
		t.Fatal(err)
	}
	return x, y
}

func nothing(*Request) (any, []int, error) { return nil, nil, nil }

// echo answers with what it is asked, and with the descriptors that came.
func echo(r *Request) (any, []int, error) {
	var s string
	if err := r.Decode(&s); err != nil {
		return nil, nil, err
	}
	var fds []int
	for fd := r.TakeFD(); fd >= 0; fd = r.TakeFD() {
		fds = append(fds, fd)
	}
	return s, fds, nil
}

// TestCall: messages of any length come whole, many at a time, with descriptors.
func TestCall(t *testing.T) {
	a, _ := pair(t, 1<<20, nothing, echo)
	var calls sync.WaitGroup
	for _, size := range []int{0, 1, packetSize - 8, packetSize - 3, packetSize, packetSize + 1, 3*packetSize + 5, 1 << 19} {
		calls.Go(func() {
			r, w, err := os.Pipe()
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			text, got := strings.Repeat("x", size), ""
			fds, err := a.Call(context.Background(), "echo", text, &got, int(w.Fd()))
			w.Close()
			if err != nil || got != text || len(fds) != 1 {
				t.Errorf("%d bytes: got %d, %d descriptors, %v", size, len(got), len(fds), err)
				return
			}
			f := os.NewFile(uintptr(fds[0]), "back")
			f.WriteString("here")
			f.Close()
			if b, _ := io.ReadAll(r); string(b) != "here" {
				t.Errorf("the pipe has %q: a copy of it was left open, or another was passed", b)
			}
		})
	}
	calls.Wait()
}

func TestCallErrors(t *testing.T) {
	block := make(chan struct{})
	a, b := pair(t, 1000, nothing, func(r *Request) (any, []int, error) {
		switch r.Op {
		case "errno":
			return nil, nil, unix.EADDRINUSE
		case "coded":
			return nil, nil, &Error{Code: "no-flow", Text: "no such flow"}
		case "block":
			<-block
		}
		return "fine", nil, nil
	})
	ctx := context.Background()
	_, err := a.Call(ctx, "errno", nil, nil)
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("error %v", err)
	}
	var e *Error
	if _, err = a.Call(ctx, "coded", nil, nil); !errors.As(err, &e) || e.Code != "no-flow" {
		t.Errorf("error %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err = a.Call(short, "block", nil, nil); !errors.Is(err, ErrSilent) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	close(block)
	var number int
	if _, err = a.Call(ctx, "other", nil, &number); err == nil {
		t.Error("a text is read as a number")
	}
	// Too long for the other side, which ends.
	if _, err = a.Call(ctx, "long", strings.Repeat("x", 2000), nil); !errors.Is(err, ErrEnded) {
		t.Errorf("error %v", err)
	}
	if _, err = a.Call(ctx, "more", nil, nil); !errors.Is(err, ErrEnded) {
		t.Errorf("error %v", err)
	}
	_ = b
}

// TestNotes come in order.
func TestNotes(t *testing.T) {
	got := make(chan int, 100)
	a, _ := pair(t, 1000, nothing, func(r *Request) (any, []int, error) {
		var n int
		err := r.Decode(&n)
		got <- n
		return nil, nil, err
	})
	for n := range 100 {
		if err := a.Note("count", n); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 100 {
		if x := <-got; x != n {
			t.Fatalf("note %d came as number %d", x, n)
		}
	}
}

// TestLog: a record is written as if it had never been away.
func TestLog(t *testing.T) {
	records := make(chan Record, 10)
	a, b := pair(t, 1<<16, func(r *Request) (any, []int, error) {
		var rec Record
		err := r.Decode(&rec)
		records <- rec
		return nil, nil, err
	}, nothing)
	_ = a
	h := NewLogHandler()
	go h.Send(b, "log")
	for _, format := range []func(io.Writer) slog.Handler{
		func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) },
		func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, nil) },
	} {
		var here, there bytes.Buffer
		when := time.Now().Round(0)
		log := func(h slog.Handler) {
			r := slog.NewRecord(when, slog.LevelWarn, "it \"happened\"\n", 0)
			r.Add("n", -3, "u", uint64(7), "f", 1.5, "b", true, "d", 90*time.Second, "s", "a=b", "err", io.ErrUnexpectedEOF)
			if err := h.WithAttrs([]slog.Attr{slog.Int("first", 1)}).Handle(context.Background(), r); err != nil {
				t.Fatal(err)
			}
		}
		log(format(&here))
		log(h)
		rec := <-records
		if err := format(&there).Handle(context.Background(), rec.Slog()); err != nil {
			t.Fatal(err)
		}
		if here.String() != there.String() {
			t.Errorf("written as\n%swant\n%s", there.String(), here.String())
		}
	}
}

// FuzzReceive: whatever a worker sends, the other side lives, gives every
// descriptor back, and takes in no more than its bound.
func FuzzReceive(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x01\x00\x00\x00\x04echo\"x\""), byte(20))
	f.Add([]byte("\x01\x01\x00\x00\x01\x00\x00\x00\x04echo"), byte(5))
	f.Add([]byte("\x02\x00\x00\x00\x01\x00\x00\x00\x00{}\x03\x00\x00\x00\x00\x00\x00\x00\xff"), byte(9))
	f.Fuzz(func(t *testing.T, b []byte, size byte) {
		x, y := sockets(t)
		c := newConn(x, 4096, writeTimeout)
		served := make(chan error, 1)
		go func() { served <- c.Serve(echo) }()
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		y.SetDeadline(time.Now().Add(time.Minute))
		go io.Copy(io.Discard, y)
		for n := 0; len(b) > 0; n++ {
			part := b[:min(len(b), max(int(size), 1))]
			b = b[len(part):]
			var rights []byte
			if n%2 == 1 {
				rights = unix.UnixRights(int(null.Fd()))
			}
			if _, _, err := y.WriteMsgUnix(part, rights, nil); err != nil {
				break
			}
		}
		y.CloseWrite()
		select {
		case <-served:
		case <-time.After(time.Minute):
			t.Fatal("it does not end")
		}
		y.Close()
	})
}
