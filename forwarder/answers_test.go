package forwarder_test

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// answering serves requests of four bytes, which say how long the answer is: a count
// in pieces. A request for nothing ends it.
func answering(c *net.TCPConn, end func(c *net.TCPConn)) {
	r := rand.New(rand.NewPCG(1, 2))
	var q [4]byte
	for sent := byte(0); ; {
		if _, err := io.ReadFull(c, q[:]); err != nil {
			c.Close()
			return
		}
		n := int(binary.BigEndian.Uint32(q[:]))
		if n == 0 {
			end(c)
			return
		}
		for b := make([]byte, n); len(b) > 0; {
			piece := b[:1+r.IntN(len(b))]
			for i := range piece {
				piece[i] = sent
				sent++
			}
			if _, err := c.Write(piece); err != nil {
				c.Close()
				return
			}
			b = b[len(piece):]
		}
	}
}

// ask has the server answer so much, and checks it.
func ask(c net.Conn, n int, next *byte) error {
	if _, err := c.Write(binary.BigEndian.AppendUint32(nil, uint32(n))); err != nil {
		return err
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	for _, x := range b {
		if x != *next {
			return errors.New("a byte is lost or repeated")
		}
		*next++
	}
	return nil
}

// TestAnswersAreWhole: nothing of small and long answers by turns is lost or comes
// twice, and no end is hidden or made another by what stays in sockets meanwhile.
func TestAnswersAreWhole(t *testing.T) {
	const rest = 3000 // the server's last words
	bye := make([]byte, rest)
	tests := []struct {
		name  string
		end   func(c *net.TCPConn)
		reset bool
	}{
		{"server closes", func(c *net.TCPConn) { c.Write(bye); c.Close() }, false},
		{"server resets", func(c *net.TCPConn) {
			c.Write(bye)
			time.Sleep(100 * time.Millisecond) // a reset overtakes what is on its way
			c.SetLinger(0)
			c.Close()
		}, true},
		{"urgent data", func(c *net.TCPConn) {
			raw, _ := c.SyscallConn()
			c.Write(bye[1:])
			raw.Control(func(fd uintptr) { unix.Sendto(int(fd), []byte{0}, unix.MSG_OOB, nil) })
			c.Close()
		}, false},
	}
	for _, v := range variants[:3] {
		for _, test := range tests {
			t.Run(v.name+"/"+test.name, func(t *testing.T) {
				n := newNetwork(t, v.opt)
				port := listen(t, func(c *net.TCPConn) { answering(c, test.end) })
				c := connect(t, n, port)
				r := seeded(t)
				var next byte
				for i := range 300 {
					size := 1 + r.IntN(400)
					switch r.IntN(20) {
					case 0:
						size = 1 + r.IntN(100000)
					case 1:
						size = 1 + r.IntN(10000)
					}
					if err := ask(c, size, &next); err != nil {
						t.Fatalf("answer %d: %v", i, err)
					}
				}
				c.Write(make([]byte, 4))
				got, err := io.ReadAll(c)
				if len(got) != rest || (err != nil) != test.reset {
					t.Errorf("%d bytes and %v, want %d and a reset: %v", len(got), err, rest, test.reset)
				}
			})
		}
	}
}

// TestGuestClosesAfterAnswers: the server sees an end, no reset.
func TestGuestClosesAfterAnswers(t *testing.T) {
	n := newNetwork(t, variants[0].opt)
	ends := make(chan error, 1)
	port := listen(t, func(c *net.TCPConn) {
		var q [4]byte
		for {
			if _, err := io.ReadFull(c, q[:]); err != nil {
				ends <- err
				c.Close()
				return
			}
			c.Write([]byte("an answer"))
		}
	})
	for range 20 {
		c, err := n.dial(at(gateway4, port))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(60 * time.Second))
		b := make([]byte, 9)
		for range 10 {
			c.Write(make([]byte, 4))
			if _, err := io.ReadFull(c, b); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
		select {
		case err := <-ends:
			if err != io.EOF {
				t.Fatalf("the server sees %v", err)
			}
		case <-time.After(60 * time.Second):
			t.Fatal("the server sees no end")
		}
	}
}

// TestSmallAnswersAreNotAcknowledged: each by itself. The next request does that.
func TestSmallAnswersAreNotAcknowledged(t *testing.T) {
	const turns = 400
	n := newNetwork(t, variants[0].opt)
	info := make(chan *unix.TCPInfo, 1)
	port := listen(t, func(c *net.TCPConn) {
		defer c.Close()
		var q [4]byte
		for range turns {
			if _, err := io.ReadFull(c, q[:]); err != nil {
				break
			}
			c.Write(make([]byte, 200))
			c.Write(make([]byte, 100))
		}
		raw, _ := c.SyscallConn()
		raw.Control(func(fd uintptr) {
			i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil {
				t.Error(err)
			}
			info <- i
		})
	})
	c := connect(t, n, port)
	slow := 0
	b := make([]byte, 300)
	for range turns {
		began := time.Now()
		c.Write(make([]byte, 4))
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		if time.Since(began) > 15*time.Millisecond {
			slow++ // so that the kernel's timer acknowledges, or a stall is suspected
		}
	}
	switch i := <-info; {
	case slow > 0:
		t.Skipf("%d of %d turns were slow", slow, turns)
	case !peeksTCP(t):
		t.Skip("this kernel's TCP has no SO_PEEK_OFF")
	case int(i.Segs_in) > turns*5/4:
		t.Errorf("the server received %d segments for %d requests", i.Segs_in, turns)
	}
}

func peeksTCP(t *testing.T) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0) == nil
}
