package control

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestListenReplaces: a socket of ours that nobody listens on is replaced, and
// nothing else is.
func TestListenReplaces(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	live, err := Listen(filepath.Join(dir, "live"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(stale, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{stale, ""},
		{filepath.Join(dir, "new"), ""},
		{live.Path(), "another process listens there"},
		{file, "it is no socket"},
		{dir, "it is no socket"},
		{"/dev/null", "it is no socket"},
		{link, "symbolic link"},
		{filepath.Join(dir, "no", "such"), "make its directory first"},
		{filepath.Join(dir, strings.Repeat("x", 108)), "at most 107 bytes"},
	} {
		l, err := Listen(tt.path)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.path, err)
		case tt.want == "":
			if info, err := os.Stat(tt.path); err != nil || info.Mode() != os.ModeSocket|0o600 {
				t.Errorf("%s: mode %v, %v", tt.path, info.Mode(), err)
			}
			l.Close()
			if _, err := os.Lstat(tt.path); !os.IsNotExist(err) {
				t.Errorf("%s is left after Close", tt.path)
			}
		case err == nil || !strings.Contains(err.Error(), tt.want):
			t.Errorf("%s: %v, want %q", tt.path, err, tt.want)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file is now %q", b)
	}
	if c, err := net.Dial("unix", live.Path()); err != nil {
		t.Errorf("the live socket: %v", err)
	} else {
		c.Close()
	}
	if os.Geteuid() == 0 {
		alien := filepath.Join(dir, "alien")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: alien, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		os.Lchown(alien, 65534, 65534)
		if _, err := Listen(alien); err == nil || !strings.Contains(err.Error(), "another user") {
			t.Errorf("socket of another user: %v", err)
		}
	}
}

// TestListenMode: whatever the umask, the socket is the user's alone.
func TestListenMode(t *testing.T) {
	dir := t.TempDir()
	for _, mask := range []int{0, 0o022, 0o077, 0o777} {
		old := syscall.Umask(mask)
		l, err := Listen(filepath.Join(dir, "s"))
		syscall.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(l.Path()); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("umask %03o: mode %v, %v", mask, info.Mode(), err)
		}
		l.Close()
	}
}

// TestCloseLeavesSuccessors: what another process has put in our place stays.
func TestCloseLeavesSuccessors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	second, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	first.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket: %v", err)
	}
}

func TestDefaultDir(t *testing.T) {
	for value, want := range map[string]string{"": "", "relative": "", "/run/user/7": "/run/user/7/usernet"} {
		t.Setenv("XDG_RUNTIME_DIR", value)
		if got := DefaultDir(); got != want {
			t.Errorf("XDG_RUNTIME_DIR=%q: %q, want %q", value, got, want)
		}
	}
	run := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", run)
	for range 2 {
		if err := MakeDefaultDir(); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(filepath.Join(run, "usernet")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	os.Chmod(filepath.Join(run, "usernet"), 0o755)
	if err := MakeDefaultDir(); err == nil {
		t.Error("a directory that others look into is taken")
	}
	os.Remove(filepath.Join(run, "usernet"))
	os.Symlink("/tmp", filepath.Join(run, "usernet"))
	if err := MakeDefaultDir(); err == nil {
		t.Error("a symbolic link is taken")
	}
}
