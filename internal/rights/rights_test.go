package rights

import (
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPass: descriptors come in their order, as copies of what was sent.
func TestPass(t *testing.T) {
	for _, n := range []int{0, 1, 3} {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var ends []*os.File
		var send []int
		for range n {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			ends, send = append(ends, r), append(send, int(w.Fd()))
		}
		if err := unix.Sendmsg(pair[0], []byte("x"), Encode(send), nil, 0); err != nil {
			t.Fatal(err)
		}
		b, control := make([]byte, 10), make([]byte, Space(n))
		_, controlN, _, _, err := unix.Recvmsg(pair[1], b, control, unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(control[:controlN])
		if err != nil || len(got) != n {
			t.Fatalf("%d sent: %v, %v", n, got, err)
		}
		for i, fd := range got {
			if _, err := unix.Write(fd, []byte{byte(i)}); err != nil {
				t.Error(err)
			}
			one := make([]byte, 1)
			if _, err := io.ReadFull(ends[i], one); err != nil || one[0] != byte(i) {
				t.Errorf("descriptor %d is another's: %d, %v", i, one[0], err)
			}
		}
		Close(got)
		Close(pair[:])
	}
}

func TestDecodeNonsense(t *testing.T) {
	for _, b := range [][]byte{make([]byte, unix.SizeofCmsghdr), {200, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}} {
		if fds, err := Decode(b); err == nil || fds != nil {
			t.Errorf("%v: %v, %v", b, fds, err)
		}
	}
}
