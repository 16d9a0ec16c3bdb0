package hub

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// pair returns the two ends of a connection.
func pair(t *testing.T) (*Conn, *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = newConn(c.(*net.UnixConn))
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

func TestConn(t *testing.T) {
	a, b := pair(t)
	for _, n := range []int{0, 1, maxPacket - 4, maxPacket - 3, maxPacket, 10 * maxPacket} {
		sent := strings.Repeat("x", n)
		go a.Send(sent, 0, 1)
		var got string
		fds, err := b.Receive(&got)
		if err != nil || got != sent || len(fds) != 2 {
			t.Errorf("%d bytes: %d came, %d descriptors, %v", n, len(got), len(fds), err)
		}
		rights.Close(fds)
	}
	// What is no message ends with an error, not with half of one.
	a.c.Write([]byte{last, '{'})
	var v any
	if _, err := b.Receive(&v); err == nil {
		t.Errorf("half a message: %v", v)
	}
	a.Close()
	if _, err := b.Receive(&v); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
}

func TestPlace(t *testing.T) {
	base := filepath.Join(t.TempDir(), "usernet", "networks")
	p := At(base, "blue")
	if _, err := Connect(p); err != ErrNoHub {
		t.Errorf("no directory: %v", err)
	}
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	l, err := listen(p)
	if err != nil {
		t.Fatal(err)
	}
	if !p.Live() || p.Clear() == nil {
		t.Error("a place that is held is free")
	}
	got := make(chan error, 1)
	go func() {
		c, pid, err := l.Accept()
		if err == nil && pid != os.Getpid() {
			t.Errorf("process %d", pid)
		}
		if err == nil {
			err = c.Send("hello")
		}
		got <- err
	}()
	c, err := Connect(p)
	if err != nil {
		t.Fatal(err)
	}
	var text string
	if _, err := c.Receive(&text); err != nil || text != "hello" || <-got != nil {
		t.Errorf("%q, %v", text, err)
	}
	if err := p.WriteState([]byte("state")); err != nil || string(p.ReadState()) != "state" {
		t.Errorf("state %q, %v", p.ReadState(), err)
	}
	// A second hub waits for the first, and gets the place when that has gone.
	next := make(chan *Listener)
	go func() {
		p.Make()
		l, err := listen(p)
		if err != nil {
			t.Error(err)
		}
		next <- l
	}()
	time.Sleep(50 * time.Millisecond)
	l.Close()
	if _, err := os.Stat(p.path(stateName)); err == nil {
		t.Error("the state of a hub that has ended in order is left")
	}
	select {
	case l := <-next:
		if l != nil {
			l.Close()
		}
	case <-time.After(time.Minute):
		t.Fatal("the place is not free")
	}
	if _, err := os.Stat(p.Dir()); err == nil {
		t.Error("the directory is left")
	}
}

func TestMakeRefuses(t *testing.T) {
	base := filepath.Join(t.TempDir(), "usernet", "networks")
	p := At(base, "blue")
	if err := os.MkdirAll(base, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := p.Make(); err == nil || !strings.Contains(err.Error(), "chmod 0700") {
		t.Errorf("open to others: %v", err)
	}
	if err := os.Chmod(base, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Dir(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Make(); err == nil || !strings.Contains(err.Error(), "it is none") {
		t.Errorf("a file in its place: %v", err)
	}
}
