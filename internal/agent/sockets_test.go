package agent

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// tellers tell their clients who they are.
const tellers = `
import os, socket, threading
def serve(family, addr):
    s = socket.socket(family)
    s.bind((addr, 7000))
    s.listen(64)
    def loop():
        while True:
            c, peer = s.accept()
            c.sendall(("%s %d" % peer[:2]).encode())
            c.close()
    threading.Thread(target=loop, daemon=True).start()
serve(socket.AF_INET, "10.0.2.100")
serve(socket.AF_INET6, "fd75:736e:6574::100")
print("up", flush=True)
threading.Event().wait()
`

// await waits for answers of the agent.
func (s *Sockets) await(t *testing.T, got func(id uint32, fd int, errno unix.Errno)) {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(s.FD()), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(p, 30000); err == unix.EINTR {
			continue
		} else if n != 1 {
			t.Fatalf("no answer: %v", err)
		}
		if err := s.Receive(got); err != nil {
			t.Fatal(err)
		}
		return
	}
}

// TestSpares: sockets that were made ahead become a client's, in whatever process.
func TestSpares(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(TAP))
	defer unix.Close(link.FD)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Fatal(err)
	}
	c.start(t, "up", "python3", "-c", tellers)
	s, err := a.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Error4 != "" || s.Error6 != "" {
		t.Fatalf("no sockets: %q, %q", s.Error4, s.Error6)
	}
	nobody := func(id uint32, fd int, errno unix.Errno) {
		t.Errorf("an answer to what nobody asked: %d %d %v", id, fd, errno)
	}
	for range 2 * spareAfter {
		if fd := s.Spare(false); fd >= 0 {
			t.Fatal("there is a spare socket where nobody makes any")
		}
	}
	s.MakeSpares()
	for _, six := range []bool{false, true} {
		for range spareAfter {
			if fd := s.Spare(six); fd >= 0 {
				t.Fatal("there is a spare socket before one was needed")
			}
		}
		s.await(t, nobody)
		from, to := netip.MustParseAddrPort("198.51.100.7:4321"), netip.MustParseAddrPort("10.0.2.100:7000")
		if six {
			from, to = netip.MustParseAddrPort("[2001:db8::7]:4321"), netip.MustParseAddrPort("[fd75:736e:6574::100]:7000")
		}
		// All of the first batch, and some of the next.
		for i := range spareBatch + 10 {
			fd := s.Spare(six)
			if fd < 0 {
				s.await(t, nobody)
				fd = s.Spare(six)
			}
			if fd < 0 {
				t.Fatal("there is no spare socket")
			}
			client := netip.AddrPortFrom(from.Addr(), from.Port()+uint16(i))
			if got, want := toldBy(t, fd, client, to), fmt.Sprintf("%v %d", client.Addr(), client.Port()); got != want {
				t.Errorf("the server saw %q, want %q", got, want)
			}
		}
		held := s.held(six)
		if len(held) == 0 || len(held) >= 2*spareBatch {
			t.Errorf("%d are left, want less than %d", len(held), 2*spareBatch)
		}
		s.Trim() // they were used
		if got := s.held(six); len(got) != len(held) {
			t.Errorf("%d sockets are left of %d that were in use", len(got), len(held))
		}
		s.Trim()
		for _, fd := range held {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
				t.Errorf("a spare socket that nobody needs is still open: %v", err)
			}
		}
		if fd := s.Spare(six); fd >= 0 {
			t.Error("there is a spare socket after all were closed")
		}
	}
}

func (s *Sockets) held(six bool) []int {
	if six {
		return append([]int(nil), s.spares[1].fds...)
	}
	return append([]int(nil), s.spares[0].fds...)
}

// toldBy connects and returns what the server says.
func toldBy(t *testing.T, fd int, from, to netip.AddrPort) string {
	t.Helper()
	defer unix.Close(fd)
	if err := unix.Bind(fd, sockaddr(from)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil && err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
		n, err := unix.Read(fd, b)
		if err == nil {
			return string(b[:n])
		} else if err != unix.EAGAIN && err != unix.EINTR {
			t.Fatal(err)
		}
	}
	t.Fatal("the server says nothing")
	return ""
}

// TestHostileAgent: of what an agent that another has taken over hands over, only TCP
// sockets are taken, and are made not to block.
func TestHostileAgent(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	s := NewSockets(pair[0], Inside{})
	defer s.Close()
	s.MakeSpares()
	for range spareAfter {
		if fd := s.Spare(false); fd >= 0 {
			t.Fatal("there is a spare socket that nobody has made")
		}
	}
	var ask [spareSize]byte
	if n, err := unix.Read(pair[1], ask[:]); err != nil || n != spareSize {
		t.Fatalf("asked for spares by %d bytes, %v", n, err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	send := func(message []byte) {
		t.Helper()
		fds := []int{pipe[0], pipe[1]}
		for _, kind := range [][3]int{
			{unix.AF_UNIX, unix.SOCK_STREAM, 0}, {unix.AF_INET, unix.SOCK_DGRAM, 0}, {unix.AF_INET, unix.SOCK_STREAM, 0},
		} {
			fd, err := unix.Socket(kind[0], kind[1]|unix.SOCK_CLOEXEC, kind[2])
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			fds = append(fds, fd)
		}
		if err := sendTo(pair[1], message, fds); err != nil {
			t.Fatal(err)
		}
	}
	defer rights.Close(pipe[:])
	check := func(fd int) {
		t.Helper()
		if protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || protocol != unix.IPPROTO_TCP {
			t.Errorf("got what is no TCP socket: protocol %d, %v", protocol, err)
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Errorf("got a socket that blocks: %#x, %v", flags, err)
		}
		unix.Close(fd)
	}
	send(ask[:])
	s.await(t, nil)
	if held := s.held(false); len(held) != 1 {
		t.Errorf("%d of 5 descriptors are taken, want the last", len(held))
	}
	check(s.Spare(false))

	var answers []byte
	for id := range uint32(5) {
		answers = appendAnswer(answers, id, 0)
	}
	send(answers)
	s.await(t, func(id uint32, fd int, errno unix.Errno) {
		switch {
		case id == 4:
			check(fd)
		case fd >= 0 || errno == 0:
			t.Errorf("descriptor %d of the answer is taken: %d, %v", id, fd, errno)
		}
	})
}
