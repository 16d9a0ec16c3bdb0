package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

const units = "../../dist/systemd"

// TestSystemdUnits: systemd finds nothing to say about the units.
func TestSystemdUnits(t *testing.T) {
	t.Parallel()
	rig.NeedTools(t, "systemd-analyze")
	dir := t.TempDir()
	// A unit for the instance to belong to, and the directories that systemd
	// would have.
	config := filepath.Join(dir, "config", "systemd", "user")
	if err := os.MkdirAll(config, 0o755); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(units + "/*.service")
	if err != nil || len(files) != 2 {
		t.Fatalf("units: %q, %v", files, err)
	}
	for _, f := range files {
		copyFile(t, f, filepath.Join(config, filepath.Base(f)), 0o644)
	}
	n := rig.New(t, rig.Options{Plain: true})
	os.Chmod(dir, 0o755)
	os.Chmod(filepath.Dir(dir), 0o755)
	p := n.User.Exec(t, rig.Command{
		Args: []string{"systemd-analyze", "verify", "--user", "--man=no", "--recursive-errors=yes", filepath.Join(config, "usernet@web.service"), filepath.Join(config, "web.service")},
		Env:  []string{"XDG_RUNTIME_DIR=" + n.Dir, "XDG_CONFIG_HOME=" + filepath.Join(dir, "config"), "HOME=" + n.Dir},
	})
	code, ok := p.Wait(20 * time.Second)
	if !ok || code != 0 || p.Stdout()+p.Stderr() != "" {
		t.Errorf("status %d: %s%s", code, p.Stdout(), p.Stderr())
	}
}

func copyFile(t *testing.T, from, to string, mode os.FileMode) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, mode); err != nil {
		t.Fatal(err)
	}
}

// TestSystemd runs the example under a service manager of an ordinary user.
func TestSystemd(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	rig.NeedTools(t, "systemctl")
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		rig.Missing(t, "/lib/systemd/systemd: %v", err)
	}
	dir := worldDir(t)
	copyFile(t, rig.Binary(t), filepath.Join(dir, "usernet"), 0o755)
	files, err := filepath.Glob(units + "/*")
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(dir, "units")
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		copyFile(t, f, filepath.Join(own, filepath.Base(f)), 0o644)
	}
	for name, why := range inWorld(t, "systemd.sh", dir, own) {
		if name == "manager" && why != "" {
			t.Skipf("missing: a service manager of the user's:%s", why) // as where there are no control groups to divide
		}
		if why != "" {
			t.Errorf("%s:%s", name, why)
		}
	}
}

// TestSystemdCommand runs the command of the unit as an ordinary user whose
// systemctl knows one process, and is told by sd_notify when it is ready.
func TestSystemdCommand(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	rig.NeedTools(t, "curl")
	b, err := os.ReadFile(filepath.Join(units, "usernet@.service"))
	if err != nil {
		t.Fatal(err)
	}
	_, line, ok := strings.Cut(string(b), "\nExecStart=/bin/sh -c '")
	line, _, closed := strings.Cut(line, "'\n")
	if !ok || !closed {
		t.Fatalf("the unit has no such command:\n%s", b)
	}
	line = strings.NewReplacer("%i", "web", "$$", "$").Replace(line)
	bin := filepath.Join(w.Dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(rig.Binary(t), filepath.Join(bin, "usernet")); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\n[ \"$*\" = \"--user show --property MainPID --value web.service\" ] && echo %d\n", w.Guest.PID)
	if err := os.WriteFile(filepath.Join(bin, "systemctl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	notify := filepath.Join(w.Dir, "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := os.Chmod(notify, 0o666); err != nil {
		t.Fatal(err)
	}
	p := w.User.Exec(t, rig.Command{
		Args: []string{"/bin/sh", "-c", line},
		Env:  []string{"PATH=" + bin + ":/usr/bin:/bin", "NOTIFY_SOCKET=" + notify, "FLAGS=-p 127.0.0.1:18080:80 --mtu 1500"},
	})
	c.SetReadDeadline(time.Now().Add(rig.Patience))
	state := make([]byte, 4096)
	n, err := c.Read(state)
	if !strings.Contains(string(state[:n]), "READY=1") {
		t.Fatalf("got %q, %v, want READY=1\n%s", state[:n], err, p.Stderr())
	}
	if got := w.Guest.Must(t, "curl", "-sS", "-m", "10", "http://"+web(false, rig.Services.HTTP)+"/ok"); got != "ok\n" {
		t.Errorf("got %q", got)
	}
	w.Guest.ServeOn(t, false)
	if got := w.User.Must(t, "curl", "-sS", "-m", "10", "http://127.0.0.1:18080/ok"); got != "ok\n" {
		t.Errorf("published: got %q", got)
	}
	p.Signal(syscall.SIGTERM)
	p.WantExit(t, 0, 3*time.Second)
}
