package control

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLiveSockets holds that sockets are listed as long as somebody listens,
// however many wait there.
func TestLiveSockets(t *testing.T) {
	run := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", run)
	dir := filepath.Join(run, "usernet")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if DefaultDir() != dir {
		t.Fatalf("sockets are in %s", DefaultDir())
	}
	path := func(name string) string { return filepath.Join(dir, name+".sock") }

	live, err := net.Listen("unix", path("live"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path("dead")})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()

	busy, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(busy)
	addr := &unix.SockaddrUnix{Name: path("busy")}
	if err := unix.Bind(busy, addr); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(busy, 0); err != nil {
		t.Fatal(err)
	}
	for full := false; !full; {
		c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(c)
		full = unix.Connect(c, addr) == unix.EAGAIN
	}

	got := Live()
	slices.Sort(got)
	if want := []string{path("busy"), path("live")}; !slices.Equal(got, want) {
		t.Errorf("live sockets %v, want %v", got, want)
	}
}
