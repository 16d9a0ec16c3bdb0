package forwarder

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newSource returns a source and the other end of its TCP connection.
func newSource(t *testing.T) (s *source, server int) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	defer unix.Close(l)
	must(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	must(unix.Listen(l, 1))
	addr, err := unix.Getsockname(l)
	must(err)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	t.Cleanup(func() { unix.Close(fd) })
	must(unix.Connect(fd, addr))
	must(unix.SetNonblock(fd, true))
	server, _, err = unix.Accept(l)
	must(err)
	t.Cleanup(func() { unix.Close(server) })
	return &source{fd: fd}, server
}

// exchange has the source say something and read the server's answers.
func exchange(t *testing.T, s *source, server int, now time.Duration, answers ...string) {
	t.Helper()
	s.asked = true
	for _, a := range answers {
		if _, err := unix.Write(server, []byte(a)); err != nil {
			t.Fatal(err)
		}
		got := readSource(t, s, now, len(a))
		if string(got) != a {
			t.Fatalf("%.60q was read, want %.60q", got, a)
		}
	}
}

// readSource reads n bytes.
func readSource(t *testing.T, s *source, now time.Duration, n int) (got []byte) {
	t.Helper()
	b := make([]byte, scratchSize)
	for end := time.Now().Add(10 * time.Second); len(got) < n; {
		m, errno := s.read(b, false, now)
		switch {
		case errno == unix.EAGAIN && time.Now().Before(end):
			time.Sleep(time.Millisecond)
		case errno != 0 || m == 0:
			t.Fatalf("%d bytes and %v after %d of %d", m, errno, len(got), n)
		default:
			got = append(got, b[:m]...)
		}
	}
	return got
}

// TestSmallAnswersStayInTheSocket: what was read of a socket stays there where small
// answers follow requests, and is never read twice.
func TestSmallAnswersStayInTheSocket(t *testing.T) {
	s, server := newSource(t)
	for i := range manyTurns {
		if s.unread != 0 {
			t.Fatalf("%d bytes stay after %d answers", s.unread, i)
		}
		exchange(t, s, server, 0, "head", "body")
	}
	s.consume()
	for i := range 5 {
		exchange(t, s, server, 0, "head", "body")
		if s.peeks == peekCannot {
			t.Skip("this kernel's TCP has no SO_PEEK_OFF")
		}
		if want := 8 * (i + 1); s.unread != want || queued(s.fd) != want {
			t.Fatalf("%d bytes are said to stay and %d do, want %d", s.unread, queued(s.fd), want)
		}
	}
	s.consumeIdle(0, unreadTime-1)
	if s.unread == 0 {
		t.Error("taken too early")
	}
	s.consumeIdle(0, unreadTime)
	if s.unread != 0 || queued(s.fd) != 0 {
		t.Errorf("%d bytes stay in an idle socket", queued(s.fd))
	}

	most := 0
	for range 30 {
		exchange(t, s, server, 0, string(bytes.Repeat([]byte("x"), 1000)))
		most = max(most, s.unread)
	}
	if most < maxUnread/2 || most >= maxUnread+smallAnswer {
		t.Errorf("up to %d bytes stay", most)
	}
	exchange(t, s, server, 0, "small", string(bytes.Repeat([]byte("large"), smallAnswer)))
	if s.unread != 0 {
		t.Errorf("%d bytes stay after a long answer", s.unread)
	}
}

// TestEndFindsNothingUnread: a socket whose peer has closed can be closed without a
// reset.
func TestEndFindsNothingUnread(t *testing.T) {
	s, server := newSource(t)
	for range manyTurns + 2 {
		exchange(t, s, server, 0, "answer")
	}
	unix.Shutdown(server, unix.SHUT_WR)
	b := make([]byte, 100)
	var n int
	var errno unix.Errno
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if n, errno = s.read(b, false, 0); errno != unix.EAGAIN || time.Now().After(end) {
			break
		}
	}
	if n != 0 || errno != 0 || s.unread != 0 || queued(s.fd) != 0 {
		t.Errorf("%d, %v; %d bytes stay", n, errno, queued(s.fd))
	}
}

// TestWaitingServerGetsItsAcknowledgement: a server whose answers' ends come late may
// have waited for one.
func TestWaitingServerGetsItsAcknowledgement(t *testing.T) {
	s, server := newSource(t)
	for range manyTurns + 1 {
		exchange(t, s, server, 0, "answer")
	}
	if s.unread == 0 {
		t.Skip("this kernel's TCP has no SO_PEEK_OFF")
	}
	exchange(t, s, server, time.Second, "its beginning")
	if s.unread == 0 {
		t.Error("an answer is late, not its end")
	}
	s.asked = false
	if _, err := unix.Write(server, []byte("end")); err != nil {
		t.Fatal(err)
	}
	if got := readSource(t, s, time.Second+stallTime+1, 3); string(got) != "end" {
		t.Errorf("%q", got)
	}
	exchange(t, s, server, time.Second+stallTime+1, "another")
	if s.unread != 0 {
		t.Errorf("%d bytes stay", s.unread)
	}
}

// TestUnixSocketIsRead: only TCP acknowledges.
func TestUnixSocketIsRead(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	s := &source{fd: fds[0]}
	for range manyTurns + 3 {
		exchange(t, s, fds[1], 0, "answer")
	}
	if s.unread != 0 {
		t.Errorf("%d bytes stay", s.unread)
	}
}
