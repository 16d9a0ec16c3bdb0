package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
	"github.com/usernet/usernet/tap"
)

// TestEnd: every way to end usernet ends it with status 0 and leaves nothing.
func TestEnd(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	for _, tt := range []struct {
		name string
		end  func(*rig.Attach, *rig.Node)
	}{
		{"SIGTERM", func(a *rig.Attach, _ *rig.Node) { a.Signal(syscall.SIGTERM) }},
		{"SIGINT", func(a *rig.Attach, _ *rig.Node) { a.Signal(syscall.SIGINT) }},
		{"SIGHUP", func(a *rig.Attach, _ *rig.Node) { a.Signal(syscall.SIGHUP) }},
		{"hang-up", func(a *rig.Attach, _ *rig.Node) { a.HangUp() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			guest := n.Guest(t)
			file := filepath.Join(n.Dir, "pid")
			a := n.Attach(t, guest, "--pid-file", file)
			if b, err := os.ReadFile(file); err != nil || string(b) != fmt.Sprintf("%d\n", a.PID) {
				t.Errorf("the PID file has %q, %v; want %d", b, err, a.PID)
			}
			tt.end(a, guest)
			a.WantExit(t, exitOK, time.Second)
			if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the PID file is left: %v", err)
			}
			if links := guest.Must(t, "ip", "-br", "link"); strings.Contains(links, "tap0") {
				t.Errorf("the link is left:\n%s", links)
			}
			n.WantNothingLeft(t, time.Second, "usernet")
		})
	}
}

// TestKilled: even killed, usernet leaves neither process nor file.
func TestKilled(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	guest := n.Guest(t)
	file := filepath.Join(n.Dir, "pid")
	a := n.Attach(t, guest, "--pid-file", file)
	a.Signal(syscall.SIGKILL)
	a.WantExit(t, 128+9, quickly)
	n.WantNothingLeft(t, time.Second, "usernet")
	if !rig.Poll(time.Second, func() bool { _, err := os.Stat(file); return errors.Is(err, os.ErrNotExist) }) {
		t.Error("the PID file is left")
	}
	if links := guest.Must(t, "ip", "-br", "link"); strings.Contains(links, "tap0") {
		t.Errorf("the link is left:\n%s", links)
	}
}

// TestReadyFD: the descriptor gets exactly "1" and is closed then, or is closed
// without it on failure.
func TestReadyFD(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	guest := n.Guest(t)
	for _, tt := range []struct {
		name   string
		target []string
		want   string
	}{
		{"ready", []string{"--netns", guest.NetnsPath()}, "1"},
		{"failure", []string{"--netns", n.Dir}, ""},
		{"usage", []string{"--netns", guest.NetnsPath(), "--mtu=1"}, ""},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		p := n.User.Exec(t, rig.Command{Args: append([]string{rig.Binary(t), "--ready-fd=3"}, tt.target...), Files: []*os.File{w}})
		w.Close()
		r.SetReadDeadline(time.Now().Add(quickly))
		got, err := io.ReadAll(r)
		if err != nil || string(got) != tt.want {
			t.Errorf("%s: the ready-fd gave %q, %v, want %q and its end\n%s", tt.name, got, err, tt.want, p.Stderr())
		}
		p.Kill()
	}
}

// TestReadyFDReader: usernet serves although nobody waits for it any more, and
// refuses a descriptor that it cannot write to.
func TestReadyFDReader(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	guest := n.Guest(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	args := []string{rig.Binary(t), "--netns", guest.NetnsPath(), "--ready-fd=3"}
	p := n.User.Exec(t, rig.Command{Args: args, Files: []*os.File{r}})
	p.WantExit(t, exitUsage, quickly)
	p.WantOneLine(t, "open for reading only")
	r.Close()
	p = n.User.Exec(t, rig.Command{Args: args, Files: []*os.File{w}})
	w.Close()
	p.WaitOutput(t, "nobody waits for usernet", quickly)
	p.Signal(syscall.SIGTERM)
	p.WantExit(t, exitOK, time.Second)
}

// TestTapFD: an open TAP can be handed over.
func TestTapFD(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	guest := n.Guest(t)
	_, files, err := openTAP.TryFiles(guest, "tap0")
	if err != nil || len(files) != 1 {
		t.Fatalf("open a TAP in the guest: %v", err)
	}
	p := n.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "--tap-fd=3"}, Files: files})
	p.WaitOutput(t, "msg=ready", quickly)
	files[0].Close()
	guest.Must(t, "sh", "-ec", `
		ip addr add 10.0.2.100/24 dev tap0; ip link set tap0 up; ip link set lo up; ip route add default via 10.0.2.2
		ping -c1 -W5 10.0.2.2`)
	p.Signal(syscall.SIGTERM)
	p.WantExit(t, exitOK, time.Second)

	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, tt := range []struct {
		flags  []string
		status int
		words  string
	}{
		{nil, exitFailure, "TAP"},
		{[]string{"--ifname=x"}, exitUsage, "--ifname"},
		{[]string{"--configure=static"}, exitUsage, "--configure"},
		{[]string{"--ready-fd=3"}, exitUsage, "is --ready-fd already"},
	} {
		p := n.User.Exec(t, rig.Command{Args: append([]string{rig.Binary(t), "--tap-fd=3"}, tt.flags...), Files: []*os.File{null}})
		p.WantExit(t, tt.status, quickly)
		p.WantOneLine(t, tt.words)
	}
}

var openTAP = rig.NewFunc("cmd.openTAP", func(ctx context.Context, name string) (struct{}, error) {
	d, err := tap.Open(name, true)
	if err != nil {
		return struct{}{}, err
	}
	rig.SendFile(ctx, os.NewFile(uintptr(d.FD), name))
	return struct{}{}, nil
})

// TestServiceManager: systemd is told of readiness and end, by sd_notify(3).
func TestServiceManager(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	path := filepath.Join(n.Dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	a := n.AttachFrom(t, n.User, n.Guest(t), rig.AttachOptions{Env: []string{"NOTIFY_SOCKET=" + path}})
	want := func(state string) {
		t.Helper()
		conn.SetReadDeadline(time.Now().Add(quickly))
		buf := make([]byte, 1024)
		size, err := conn.Read(buf)
		if lines := strings.Split(string(buf[:size]), "\n"); err != nil || lines[0] != state {
			t.Errorf("got %q, %v, want %s first", lines, err, state)
		}
	}
	want("READY=1")
	a.Signal(syscall.SIGTERM)
	want("STOPPING=1")
	a.WantExit(t, exitOK, time.Second)
}

// TestLog: the log is as the flags ask for.
func TestLog(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	a := n.Attach(t, n.Guest(t), "--log-format=json", "--log-level=info")
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, exitOK, time.Second)
	links := 0
	for line := range strings.Lines(a.Stderr()) {
		var record struct{ Level, Msg, Link string }
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Level == "" || record.Msg == "" {
			t.Errorf("not a record: %v: %s", err, line)
		}
		if record.Link == "tap" {
			links++
		}
	}
	if links != 1 {
		t.Errorf("%d records say what the link is, want 1:\n%s", links, a.Stderr())
	}
	a = n.Attach(t, n.Guest(t), "--log-level=error")
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, exitOK, time.Second)
	if s := a.Stderr(); s != "" {
		t.Errorf("there is something to log at level error: %s", s)
	}
}

func TestWaitHangup(t *testing.T) {
	t.Run("hang-up of a pipe", func(t *testing.T) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		done := make(chan error, 1)
		go func() { done <- waitHangup(context.Background(), r) }()
		w.WriteString("what is written does not matter")
		select {
		case err := <-done:
			t.Fatalf("ended early: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		w.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if b, err := io.ReadAll(r); err != nil || !bytes.HasPrefix(b, []byte("what is")) {
			t.Errorf("what was written is gone: %q, %v", b, err)
		}
	})
	t.Run("hang-up of a socket", func(t *testing.T) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fds[0]), "socket")
		defer f.Close()
		unix.Close(fds[1])
		if err := waitHangup(context.Background(), f); err != nil {
			t.Error(err)
		}
	})
	t.Run("context", func(t *testing.T) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		if err := waitHangup(ctx, r); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// TestPIDFile: a file of the same name that is another process's by now stays.
func TestPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	for range 2 { // one left from earlier is no hindrance
		if _, err := writePIDFile(path); err != nil {
			t.Fatal(err)
		}
	}
	f, err := writePIDFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path+"2", []byte("1\n"), 0o644), os.Rename(path+"2", path)); err != nil {
		t.Fatal(err)
	}
	f.remove()
	if b, err := os.ReadFile(path); err != nil || string(b) != "1\n" {
		t.Errorf("the other's file: %q, %v", b, err)
	}
}
