package rig

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxMessage bounds one message between a test and a node. Bulk data goes
// through files and pipes, never through messages.
const maxMessage = 128 << 10

// maxFiles bounds the descriptors of one message; the kernel's own limit is
// 253 (SCM_MAX_FD).
const maxFiles = 64

// A request asks a node to do one thing. Exactly one of the pointers is set.
type request struct {
	ID     uint64
	Call   *callRequest   `json:",omitempty"`
	Start  *startRequest  `json:",omitempty"`
	Signal *signalRequest `json:",omitempty"`
}

// A callRequest runs a function registered with NewFunc.
type callRequest struct {
	Name    string
	Arg     json.RawMessage
	Timeout time.Duration
}

// A startRequest starts a program; its descriptors come with the message:
// stdin, stdout, stderr, and whatever shall be 3 and up.
type startRequest struct {
	Args []string
	Env  []string
	Dir  string
	Spaces
}

// A signalRequest signals a process that the node started.
type signalRequest struct {
	PID    int
	Signal int
}

// A response answers the request of the same ID. A start is answered twice:
// when the process runs and when it has ended.
type response struct {
	ID     uint64
	Result json.RawMessage `json:",omitempty"`
	PID    int             `json:",omitempty"`
	Exited bool            `json:",omitempty"`
	Status uint32          `json:",omitempty"`
	Err    *Error          `json:",omitempty"`
}

// An Error is a failure that happened in a node. Errno survives the way, so
// errors.Is(err, syscall.ECONNREFUSED) works on it.
type Error struct {
	Text    string
	Errno   syscall.Errno
	Timeout bool
}

func (e *Error) Error() string { return e.Text }

// Unwrap gives the system call's error number, if there was one.
func (e *Error) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// newError makes err fit for the wire; nil stays nil.
func newError(err error) *Error {
	if err == nil {
		return nil
	}
	e := &Error{Text: err.Error(), Timeout: errors.Is(err, os.ErrDeadlineExceeded)}
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		e.Timeout = true
	}
	errors.As(err, &e.Errno)
	return e
}

// A link is one end of the socket pair between a test and a node. It is
// SOCK_SEQPACKET: one message is one packet, and its descriptors stay with it.
type link struct {
	conn *net.UnixConn
	wmu  sync.Mutex
}

// newLinkPair gives the test's end and the file that becomes the node's end.
func newLinkPair() (*link, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("rig: make socket pair: %w", err)
	}
	near, err := newLink(os.NewFile(uintptr(fds[0]), "rig"))
	if err != nil {
		unix.Close(fds[1])
		return nil, nil, err
	}
	return near, os.NewFile(uintptr(fds[1]), "rig"), nil
}

// newLink takes f over.
func newLink(f *os.File) (*link, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("rig: use socket: %w", err)
	}
	return &link{conn: c.(*net.UnixConn)}, nil
}

// send writes one message. files stay the caller's.
func (l *link) send(v any, files []*os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("rig: encode message: %w", err)
	}
	if len(b) > maxMessage || len(files) > maxFiles {
		return fmt.Errorf("rig: message of %d bytes and %d files is too big", len(b), len(files))
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	l.wmu.Lock()
	defer l.wmu.Unlock()
	_, _, err = l.conn.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one message. The caller owns the files.
func (l *link) receive(v any) ([]*os.File, error) {
	b := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, _, _, err := l.conn.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, net.ErrClosed // end of file: a seqpacket of no bytes is never sent
	}
	files, err := parseFiles(oob[:oobn])
	if err != nil {
		return nil, err
	}
	return files, json.Unmarshal(b[:n], v)
}

func parseFiles(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("rig: parse control message: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}
