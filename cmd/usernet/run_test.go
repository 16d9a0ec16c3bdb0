package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet/internal/rig"
)

// quickly bounds what has to happen at once, on a machine with other work.
const quickly = time.Minute

// usernetRun runs `usernet run` as an ordinary user to its end.
func usernetRun(t *testing.T, n *rig.Net, args ...string) rig.Output {
	t.Helper()
	return n.User.Run(t, append([]string{rig.Binary(t), "run"}, args...)...)
}

// startRun starts `usernet run` and waits for its command to write "up".
func startRun(t *testing.T, n *rig.Net, args ...string) *rig.Proc {
	t.Helper()
	p := n.User.Exec(t, rig.Command{Args: append([]string{rig.Binary(t), "run"}, args...)})
	p.WaitOutput(t, "up", quickly)
	return p
}

func TestRunStatus(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	script := filepath.Join(n.Dir, "script")
	if err := os.WriteFile(script, []byte("#!/no/such/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	text := filepath.Join(n.Dir, "text")
	if err := os.WriteFile(text, []byte("no program\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args   []string
		status int
		stderr string // one line, or nothing
	}{
		{[]string{"--", "true"}, 0, ""},
		{[]string{"true"}, 0, ""},
		{[]string{"--", "sh", "-c", "exit 42"}, 42, ""},
		{[]string{"sh", "-c", "exit 255"}, 255, ""},
		{[]string{"--", "sh", "-c", "kill -KILL $$"}, 128 + 9, ""},
		{[]string{"--", "sh", "-c", "kill -TERM $$"}, 128 + 15, ""},
		{[]string{"--", "no-such-command"}, 127, "not found in $PATH"},
		{[]string{"--", "./no-such-command"}, 127, "no such file"},
		{[]string{"--", script}, 127, "interpreter is missing"},
		{[]string{"--", "/etc/passwd"}, 126, "chmod +x"},
		{[]string{"--", n.Dir}, 126, "run " + n.Dir},
		{[]string{"--", text}, 126, "starts with #!"},
	} {
		out := usernetRun(t, n, tt.args...)
		if out.Code != tt.status || !strings.Contains(out.Stderr, tt.stderr) ||
			(tt.stderr == "") != (out.Stderr == "") || strings.Count(out.Stderr, "\n") > 1 {
			t.Errorf("run %q: status %d, want %d; stderr, which wants %q:\n%s", tt.args, out.Code, tt.status, tt.stderr, out.Stderr)
		}
	}
	n.WantNothingLeft(t, quickly, "usernet")
}

// TestRunNetwork: the command has its network from its first instruction on.
func TestRunNetwork(t *testing.T) {
	rig.NeedTools(t, "curl", "ping", "ip")
	t.Parallel()
	for _, tt := range []struct {
		name string
		tun  rig.Tun
		link string
	}{{"tap", rig.TunOpen, "tun"}, {"veth", rig.TunClosed, "veth"}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := rig.New(t, rig.Options{Tun: tt.tun})
			url := fmt.Sprintf("http://%v/data?n=1000&seed=1", netip.AddrPortFrom(rig.Web4, uint16(rig.Services.HTTP)))
			for _, args := range [][]string{
				{"curl", "-sS", "--fail", "-m", "10", "-o", "/dev/null", url},
				{"ping", "-c", "1", "-W", "5", "10.0.2.2"},
				{"ping", "-c", "1", "-W", "5", "fd75:736e:6574::2"},
			} {
				if out := usernetRun(t, n, args...); out.Code != 0 {
					t.Errorf("run %q: status %d\n%s%s", args, out.Code, out.Stdout, out.Stderr)
				}
			}
			if out := usernetRun(t, n, "ip", "-d", "link", "show", "tap0"); !strings.Contains(out.Stdout, tt.link) {
				t.Errorf("the link is no %s:\n%s%s", tt.link, out.Stdout, out.Stderr)
			}
			n.WantNothingLeft(t, quickly, "usernet")
		})
	}
}

// TestRunView: the command sees what was promised, and the host nothing of it.
func TestRunView(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	n.Host.WriteEtc(t, "resolv.conf", "nameserver 192.0.2.1\nsearch corp.example\noptions ndots:2\n")
	const ours = "nameserver 10.0.2.3\nnameserver fd75:736e:6574::3\n"
	before := n.User.Must(t, "sh", "-c", "cat /proc/self/mountinfo | wc -l; cat /etc/resolv.conf")
	for _, tt := range []struct{ name, command, want string }{
		{"root", "id -u; id -g", "0\n0\n"},
		{"resolv.conf", "cat /etc/resolv.conf", ours + "search corp.example\noptions ndots:2\n"},
		{"resolv.conf is no more than that", "test -f /etc/resolv.conf && echo yes", "yes\n"},
		{"/tmp is the host's", "test -d " + n.Dir + " && echo yes", "yes\n"},
		{"working directory", "pwd", n.User.Must(t, "pwd")},
		{"loopback", "ip -br addr show lo | tr -s ' '", "lo UNKNOWN 127.0.0.1/8 ::1/128 \n"},
	} {
		if out := usernetRun(t, n, "sh", "-c", tt.command); out.Stdout != tt.want {
			t.Errorf("%s:\n%s%s", tt.name, cmp.Diff(tt.want, out.Stdout), out.Stderr)
		}
	}
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"no-dns", []string{"--no-dns", "cat", "/etc/resolv.conf"}, "nameserver 192.0.2.1\nsearch corp.example\noptions ndots:2\n"},
		{"dns-search", []string{"--dns-search", "a.example,b.example", "cat", "/etc/resolv.conf"}, ours + "search a.example b.example\noptions ndots:2\n"},
		{"IPv6 off", []string{"--ipv6=off", "--cidr=10.9.0.0/24", "head", "-n1", "/etc/resolv.conf"}, "nameserver 10.9.0.3\n"},
		{"add-host", []string{"--add-host=db:192.0.2.9", "head", "-n1", "/etc/hosts"}, "192.0.2.9\tdb\n"},
		{"keep-id", []string{"--keep-id", "sh", "-c", "id -u; ip link set lo mtu 9000 && echo may"}, "1000\nmay\n"},
		{"ifname and mtu", []string{"--ifname=eth0", "--mtu=1400", "sh", "-c", "cat /proc/net/dev | grep -c eth0; ip link show eth0 | grep -o 'mtu 1400'"}, "1\nmtu 1400\n"},
	} {
		if out := usernetRun(t, n, tt.args...); out.Stdout != tt.want {
			t.Errorf("%s:\n%s%s", tt.name, cmp.Diff(tt.want, out.Stdout), out.Stderr)
		}
	}
	if after := n.User.Must(t, "sh", "-c", "cat /proc/self/mountinfo | wc -l; cat /etc/resolv.conf"); after != before {
		t.Errorf("the host looks otherwise than before:\n%s", cmp.Diff(before, after))
	}
}

// TestRunResolvConf: whatever the host has at /etc/resolv.conf, the command
// finds ours there, and goes on finding it when the host replaces its own.
func TestRunResolvConf(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	shell := func(command string) { t.Helper(); n.Host.Must(t, "sh", "-ec", command) }
	const ours = "nameserver 10.0.2.3\n"
	for _, tt := range []struct{ name, prepare, replace string }{
		{"file", "", "echo nameserver 192.0.2.1 >/etc/x; mv /etc/x /etc/resolv.conf"},
		{"link", "mkdir /run/dir; echo nameserver 192.0.2.1 >/run/dir/stub; ln -sf ../run/dir/stub /etc/resolv.conf",
			"echo nameserver 192.0.2.2 >/run/dir/x; mv /run/dir/x /run/dir/stub"},
		{"link to elsewhere", "", "echo nameserver 192.0.2.3 >/run/other; ln -sf /run/other /etc/x; mv /etc/x /etc/resolv.conf"},
		{"link to nowhere", "ln -sf /run/no/such/file /etc/resolv.conf", ""},
		{"missing", "rm /etc/resolv.conf", ""},
	} {
		if tt.prepare != "" {
			shell(tt.prepare)
		}
		p := startRun(t, n, "--ipv6=off", "--dns=192.0.2.53", "--", "sh", "-c",
			`echo up; trap 'cat /etc/resolv.conf; getent passwd user >/dev/null || echo incomplete; exit' TERM; while :; do sleep 0.1; done`)
		if tt.replace != "" {
			shell(tt.replace)
			time.Sleep(200 * time.Millisecond) // for inotify's word; there is nothing to ask
		}
		p.Signal(syscall.SIGTERM)
		p.WantExit(t, 0, quickly)
		if got, want := p.Stdout(), "up\n"+ours; got != want {
			t.Errorf("%s: the command finds %q, want %q\n%s", tt.name, got, want, p.Stderr())
		}
	}
}

func TestRunSignals(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	t.Run("passed on once", func(t *testing.T) {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2} {
			p := startRun(t, n, "--", "sh", "-c",
				fmt.Sprintf(`n=0; trap 'n=$((n+1))' %d; echo up; while [ $n = 0 ]; do sleep 0.05; done; sleep 0.3; exit $((40+n))`, sig))
			p.Signal(sig)
			p.WantExit(t, 41, quickly)
		}
	})
	t.Run("deadly", func(t *testing.T) {
		p := startRun(t, n, "--", "sh", "-c", "echo up; exec sleep 60")
		p.Signal(syscall.SIGTERM)
		p.WantExit(t, 128+15, quickly)
	})
	t.Run("continued", func(t *testing.T) {
		p := startRun(t, n, "--", "sh", "-c", "echo up; kill -STOP $$; echo goes on; exec sleep 60")
		time.Sleep(300 * time.Millisecond) // a stop that nobody is told of
		p.Signal(syscall.SIGCONT)
		p.WaitOutput(t, "goes on", quickly)
		p.Signal(syscall.SIGTERM)
		p.WantExit(t, 128+15, quickly)
	})
	t.Run("ended while stopped", func(t *testing.T) { // as timeout(1) and service managers do
		p := startRun(t, n, "--", "sh", "-c", "echo up; kill -STOP $$; exec sleep 60")
		time.Sleep(300 * time.Millisecond)
		p.Signal(syscall.SIGTERM)
		p.Signal(syscall.SIGCONT)
		p.WantExit(t, 128+15, quickly)
	})
	t.Run("killed", func(t *testing.T) {
		p := startRun(t, n, "--", "sh", "-c", "sleep 9876 & setsid sleep 9876 & echo up; exec sleep 9876")
		p.Signal(syscall.SIGKILL)
		p.WantExit(t, 128+9, quickly)
	})
	n.WantNothingLeft(t, quickly, "usernet", "sleep")
}

// TestRunDaemons: what the command leaves running ends with its network, in
// order if it can.
func TestRunDaemons(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	out := usernetRun(t, n, "sh", "-c", `
		(trap 'echo in order; exit' TERM; echo ready >`+n.Dir+`/mark; while :; do sleep 0.05; done) &
		setsid sh -c 'trap "" TERM; while :; do sleep 9876; done' &
		while [ ! -e `+n.Dir+`/mark ]; do sleep 0.05; done; exit 5`)
	if out.Code != 5 || out.Stdout != "in order\n" {
		t.Errorf("status %d, stdout %q, stderr %q", out.Code, out.Stdout, out.Stderr)
	}
	n.WantNothingLeft(t, quickly, "usernet", "sleep", "sh")
}

// TestRunInherits: descriptors of the caller's reach the command, as make's job
// server needs, and usernet's own do not.
func TestRunInherits(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	const list = `sh -c 'cat <&3; cat <&8; ls /proc/self/fd'`
	const open = `echo three >three; echo eight >eight; exec 3<three 8<eight; `
	want := n.User.Must(t, "sh", "-c", open+list)
	if got := n.User.Must(t, "sh", "-c", open+rig.Binary(t)+" run -- "+list); got != want {
		t.Errorf("the command finds other files open than without usernet:\n%s", cmp.Diff(want, got))
	}
}

// TestRunAsRoot: root keeps everybody's ids in the command's user namespace.
func TestRunAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("for root only")
	}
	t.Parallel()
	n := rig.New(t, rig.Options{Root: true})
	out := n.Host.Run(t, rig.Binary(t), "run", "--", "sh", "-c", "id -u; setpriv --reuid=1234 --clear-groups id -u; ping -qc1 10.0.2.2 >/dev/null && echo reached")
	if want := "0\n1234\nreached\n"; out.Stdout != want {
		t.Errorf("got %q, want %q\n%s", out.Stdout, want, out.Stderr)
	}
}

// TestRunNested: root of a user namespace, as in a rootless container, is an
// ordinary user as well; so is the command of another `usernet run`.
func TestRunNested(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	root := n.GuestOf(t, n.User, rig.Spaces{User: true, Net: true})
	inner := []string{rig.Binary(t), "run", "--", "sh", "-c", "id -u; ping -qc1 10.0.2.2 >/dev/null && exit 9"}
	for _, args := range [][]string{inner, append([]string{rig.Binary(t), "run", "--"}, inner...)} {
		if out := root.Run(t, args...); out.Code != 9 || out.Stdout != "0\n" {
			t.Errorf("run %q: status %d, %q\n%s", args, out.Code, out.Stdout, out.Stderr)
		}
	}
}

// TestRunForbidden: where there are no user namespaces, one line says so.
func TestRunForbidden(t *testing.T) {
	t.Parallel()
	n := rig.New(t, rig.Options{})
	n.Host.Must(t, "sh", "-c", "echo 0 >/proc/sys/user/max_user_namespaces")
	p := n.User.Exec(t, rig.Command{Args: []string{rig.Binary(t), "run", "--", "true"}})
	p.WantExit(t, exitFailure, quickly)
	p.WantOneLine(t, "usernet: make namespaces:", "user.max_user_namespaces")
}

func TestResolvConf(t *testing.T) {
	four, six := netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd75:736e:6574::3")
	for _, tt := range []struct {
		name, host string
		servers    []netip.Addr
		search     []string
		want       string
	}{
		{"empty", "", []netip.Addr{four, {}}, nil, "nameserver 10.0.2.3\n"},
		{"both", "", []netip.Addr{four, six}, nil, "nameserver 10.0.2.3\nnameserver fd75:736e:6574::3\n"},
		{"search stays", "nameserver 1.2.3.4\nsearch a b\n# c\noptions edns0", []netip.Addr{four}, nil,
			"nameserver 10.0.2.3\nsearch a b\noptions edns0\n"},
		{"domain stays", "domain\ta\r\n", []netip.Addr{four}, nil, "nameserver 10.0.2.3\ndomain\ta\n"},
		{"search replaced", "search a b\ndomain c\noptions\tndots:2\n", []netip.Addr{four}, []string{"x", "y"},
			"nameserver 10.0.2.3\nsearch x y\noptions\tndots:2\n"},
		{"rest goes", "sortlist 1.2.3.4\n; x\n\nsearchx y\n", []netip.Addr{four}, nil, "nameserver 10.0.2.3\n"},
	} {
		if got := string(resolvConf(tt.host, tt.servers, tt.search)); got != tt.want {
			t.Errorf("%s: %s", tt.name, cmp.Diff(tt.want, got))
		}
	}
}
