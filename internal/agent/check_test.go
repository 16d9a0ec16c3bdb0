package agent

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// liar is an agent that is not what it should be: it gives every request the same
// answer.
func liar(t *testing.T, r reply, fds ...int) *Agent {
	t.Helper()
	conn, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	close(done)
	t.Cleanup(func() { conn.Close() })
	go func() {
		defer theirs.Close()
		buf := make([]byte, maxMessage)
		for {
			if n, err := unix.Read(int(theirs.Fd()), buf); n <= 0 || err != nil {
				return
			}
			_ = send(int(theirs.Fd()), r, fds)
		}
	}()
	return &Agent{log: slog.New(slog.DiscardHandler), done: done, conn: conn, buf: make([]byte, maxMessage)}
}

// opened has descriptors that a process of the container could pass for a link.
func opened(t *testing.T) map[string]int {
	t.Helper()
	m := make(map[string]int)
	add := func(name string, fd int, err error) {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		m[name] = fd
	}
	var pipe [2]int
	err := unix.Pipe2(pipe[:], unix.O_CLOEXEC)
	add("pipe", pipe[0], err)
	add("other end", pipe[1], err)
	for name, path := range map[string]string{"file": "/proc/self/exe", "directory": "/", "device": "/dev/null"} {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		add(name, fd, err)
		fd, err = unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		add(name+"'s path", fd, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	add("UDP socket", fd, err)
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	add("unix socket", fd, err)
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	add("netlink socket", fd, err)
	if fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		add("TAP of no interface", fd, nil)
	}
	return m
}

// A traced agent cannot pass something else for what was asked for, nor leave
// descriptors behind.
func TestLyingAgent(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	good := Link{Kind: TAP, Name: "tap0", MAC: mac, MTU: 1500}
	fds := opened(t)
	open := func(r reply, fds ...int) func() error {
		return func() error {
			_, err := liar(t, r, fds...).OpenLink(LinkSpec{Kind: r.Link.Kind, Name: "tap0"})
			return err
		}
	}
	with := func(f func(*Link)) reply {
		l := good
		f(&l)
		return reply{Link: &l}
	}
	lies := map[string]func() error{
		"no descriptor":   open(reply{Link: &good}),
		"two descriptors": open(reply{Link: &good}, fds["pipe"], fds["file"]),
		"many descriptors": open(reply{Link: &good}, fds["pipe"], fds["file"], fds["pipe"], fds["file"],
			fds["pipe"], fds["file"]),
		"another name": open(with(func(l *Link) { l.Name = "tap0\x1b[2J" }), fds["device"]),
		"no MTU":       open(with(func(l *Link) { l.MTU = -1 }), fds["device"]),
		"a huge MTU":   open(with(func(l *Link) { l.MTU = 1 << 40 }), fds["device"]),
		"a short MAC":  open(with(func(l *Link) { l.MAC = mac[:3] }), fds["device"]),
		"no kind":      open(with(func(l *Link) { l.Kind = "" }), fds["device"]),
		"strange kind": open(with(func(l *Link) { l.Kind = "disk" }), fds["device"]),
		"ports": func() error {
			_, err := liar(t, reply{Listening: &Listening{Ports: []Ports{{Proto: unix.IPPROTO_ICMP, From: 1, To: 2, Four: true}}}}).Listening()
			return err
		},
		"ports upside down": func() error {
			_, err := liar(t, reply{Listening: &Listening{Ports: []Ports{{Proto: unix.IPPROTO_TCP, From: 2, To: 1, Four: true}}}}).Listening()
			return err
		},
	}
	for name, fd := range fds {
		for _, kind := range []LinkKind{TAP, Veth} {
			lies[name+" as "+string(kind)] = open(with(func(l *Link) { l.Kind = kind }), fd)
		}
		lies[name+" as the way to sockets"] = func() error {
			_, err := liar(t, reply{Inside: new(Inside)}, fd).Sockets()
			return err
		}
	}
	_ = lies["no MTU"]() // the poller's own descriptors
	for name, lie := range lies {
		before := countFDs()
		if err := lie(); err == nil {
			t.Errorf("%s is taken", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
		if after := countFDs(); after > before+2 { // the liar's, until the test ends
			t.Errorf("%s: %d descriptors before, %d after", name, before, after)
		}
	}
}

// What it says is printed, but upsets no terminal.
func TestLyingAgentsWords(t *testing.T) {
	r := reply{Error: "\x1b]0;owned\x07\nusernet: all is well", Errno: unix.EPERM}
	_, err := liar(t, r).SetUp()
	if err == nil || strings.ContainsAny(err.Error(), "\x1b\x07\n") || !errors.Is(err, unix.EPERM) {
		t.Errorf("%q", err)
	}
	status, err := liar(t, reply{Status: &Status{Warnings: []string{"a\rb", "c"}}}).SetUp()
	if err != nil || status.Warnings[0] != "a b" || status.Warnings[1] != "c" {
		t.Errorf("%+v, %v", status, err)
	}
}

func TestReadFailures(t *testing.T) {
	begin := func() (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(); w.Close() })
		return r, w
	}
	tell := func(w *os.File, f failure) {
		if _, err := w.Write((*[unsafe.Sizeof(f)]byte)(unsafe.Pointer(&f))[:]); err != nil {
			t.Fatal(err)
		}
	}
	r, w := begin()
	if _, err := readFailures(int(r.Fd()), 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("a child that stands still: %v", err)
	}
	tell(w, failure{stepRoot, unix.EACCES})
	w.Close()
	if seen, err := readFailures(int(r.Fd()), patience); err != nil || !errors.Is(seen, unix.EACCES) {
		t.Errorf("a step that is not needed: %v, %v", seen, err)
	}
	for _, f := range []failure{{stepExec, unix.EACCES}, {stepMounts, unix.ENOSPC}, {stepRoot, unix.ENOMEM}} {
		r, w := begin()
		tell(w, f)
		if _, err := readFailures(int(r.Fd()), patience); !errors.Is(err, f.errno) {
			t.Errorf("%+v: %v", f, err)
		}
	}
}
