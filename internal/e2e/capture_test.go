package e2e

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// TestCapture: what the guest sends and gets is captured as far as the filter
// goes, in files that tcpdump reads.
func TestCapture(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "tcpdump", "ping", "curl")
	eachLink(t, func(t *testing.T, w *world) {
		dir := shortDir(t)
		all := filepath.Join(dir, "all.pcapng")
		a := w.attach(t, "--pcap", all)
		capture := func(name string, args ...string) (p *rig.Proc, path string) {
			path = filepath.Join(dir, name)
			p = w.User.Exec(t, rig.Command{
				Args: append([]string{rig.Binary(t), "capture", "-w", path}, args...), Env: []string{runtimeDir},
			})
			if !rig.Poll(10*time.Second, func() bool { // the head is there
				return w.User.Run(t, "test", "-s", path).Code == 0
			}) {
				t.Fatalf("no %s: %s", path, p.Stderr())
			}
			return p, path
		}
		finish := func(p *rig.Proc) (frames int) {
			t.Helper()
			if code, ok := p.Wait(10 * time.Second); !ok || code != 0 {
				t.Errorf("status %d, ended %t: %s", code, ok, p.Stderr())
			}
			if n, err := fmt.Sscanf(p.Stderr(), "%d frames, 0 dropped\n", &frames); n != 1 || err != nil {
				t.Errorf("stderr: %s", p.Stderr())
			}
			return frames
		}
		read := func(path string) []string {
			t.Helper()
			return strings.Split(strings.TrimSpace(w.User.Must(t, "tcpdump", "-nr", path)), "\n")
		}

		// Some frames, until interrupted.
		pings, pingFile := capture("ping", "icmp", "and", "host", rig.Web4.String())
		web, webFile := capture("web", "-s", "96", "tcp port 80")
		two, twoFile := capture("two", "-c", "2", "udp or icmp")
		w.Guest.Must(t, "ping", "-c", "3", "-i", "0.2", rig.Web4.String())
		w.Guest.Must(t, "curl", "-sS", "-m", "20", "-o", "/dev/null", "http://"+web4("/data?n=3000000&seed=1"))
		time.Sleep(100 * time.Millisecond) // frames linger for a moment
		pings.Signal(syscall.SIGINT)
		web.Signal(syscall.SIGINT)
		if n, lines := finish(pings), read(pingFile); n != 6 || len(lines) != 6 || strings.Count(strings.Join(lines, "\n"), "echo reply") != 3 {
			t.Errorf("%d frames of three pings:\n%s", n, strings.Join(lines, "\n"))
		}
		if n := finish(two); n != 2 || len(read(twoFile)) != 2 {
			t.Errorf("%d frames for two", n)
		}
		// Frames are shown as they pass: up to 64 KiB at a time, the sum of which
		// is what was asked for.
		lines, sum, largest := read(webFile), 0, 0
		for _, m := range regexp.MustCompile(`\.80 > .* length (\d+)`).FindAllStringSubmatch(strings.Join(lines, "\n"), -1) {
			n, _ := strconv.Atoi(m[1])
			sum, largest = sum+n, max(largest, n)
		}
		if finish(web) != len(lines) || sum < 3000000 || sum > 3100000 || largest < 4000 {
			t.Errorf("%d frames with %d bytes, the largest %d", len(lines), sum, largest)
		}

		// Bad input.
		for _, tt := range []struct {
			args string
			want string
		}{
			{"-w x tcp and", "ends where a condition should follow"},
			{"-w x http", "there are tcp, udp"},
			{"-w x -s -1", "snap length -1"},
			{"-w /nowhere/x", "no such file or directory"},
		} {
			status, _, stderr := ctl(t, w.User, append([]string{"capture"}, strings.Fields(tt.args)...)...)
			if status != 1 || !strings.Contains(stderr, tt.want) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("capture %s: status %d: %s", tt.args, status, stderr)
			}
		}

		// The network's end is a capture's, and nothing of it is lost.
		last, lastFile := capture("last")
		w.Guest.Must(t, "ping", "-c", "10", "-i", "0.2", w.Gateway4.String()) // it may take a moment to begin
		a.Signal(syscall.SIGTERM)
		a.WantExit(t, 0, 5*time.Second)
		finish(last)
		if text := strings.Join(read(lastFile), "\n"); !strings.Contains(text, "echo reply") {
			t.Errorf("captured last:\n%s", text)
		}
		if text := strings.Join(read(all), "\n"); strings.Count(text, "echo reply") < 4 || !strings.Contains(text, ".80: Flags [S]") {
			t.Errorf("captured from the beginning:\n%.2000s", text)
		}
	})
}

// web4 is a URL's end at the web's address.
func web4(path string) string { return rig.Web4.String() + path }
