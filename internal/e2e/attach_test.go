package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
)

// wantNetwork checks that a guest's own programs get through: TCP and UDP.
func wantNetwork(t *testing.T, guest *rig.Node, six bool) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		r := rig.Dial.On(t, guest, rig.DialRequest{Network: network, Addr: web(six, rig.Services.Echo), Timeout: 5 * time.Second})
		if r.Errno != 0 || r.Timeout {
			t.Errorf("%s to %s: %v", network, web(six, rig.Services.Echo), r)
		}
	}
}

// TestAttachUnshare is the README's way: unshare -Urn, and usernet on the path
// of its namespace.
func TestAttachUnshare(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "curl", "nsenter")
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			n := rig.New(t, rig.Options{Tun: l.tun})
			guest := unshareGuest(t, n, "-Ur")
			n.AttachFrom(t, n.User, nil, rig.AttachOptions{Target: netnsPath(guest), Flags: l.flags})
			for _, six := range []bool{false, true} {
				out := n.User.Must(t, "nsenter", "-t", itoa(guest.PID), "-U", "-n", "--preserve-credentials",
					"curl", "-sS", "-m", "10", "-g", "http://"+web(six, rig.Services.HTTP)+"/ok")
				if out != "ok\n" {
					t.Errorf("curl: %q", out)
				}
			}
		})
	}
}

// TestAttachKeepID: a namespace in whose user namespace there is no uid 0.
func TestAttachKeepID(t *testing.T) {
	rig.NeedUsernet(t)
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			n := rig.New(t, rig.Options{Tun: l.tun})
			guest := n.GuestOf(t, n.User, rig.Spaces{User: true, UID: 1000, GID: 1000, Net: true})
			n.Attach(t, guest, l.flags...)
			families(t, func(t *testing.T, six bool) { wantNetwork(t, guest, six) })
		})
	}
}

// TestAttachAsRootOfUserNamespace: the caller is root in the namespace's user
// namespace already, as rootless runtimes are.
func TestAttachAsRootOfUserNamespace(t *testing.T) {
	rig.NeedUsernet(t)
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			n := rig.New(t, rig.Options{Tun: l.tun})
			runtime := n.User.Node(t, "runtime", rig.Spaces{User: true, Mount: true})
			guest := n.GuestOf(t, runtime, rig.Spaces{Net: true})
			a := n.AttachFrom(t, runtime, guest, rig.AttachOptions{Flags: l.flags})
			families(t, func(t *testing.T, six bool) { wantNetwork(t, guest, six) })
			a.HangUp()
			a.WantExit(t, 0, 2*time.Second)
			n.WantNothingLeft(t, 2*time.Second, "usernet")
		})
	}
}

// TestAttachAsRoot: root attaches to a namespace that "ip netns add" made, by
// its name and by its path.
func TestAttachAsRoot(t *testing.T) {
	rig.NeedUsernet(t)
	tests := map[string]rig.Options{
		"root of a user namespace": {},
		"the machine's root":       {Root: true},
	}
	for name, o := range tests {
		for _, target := range []string{"blue", "/run/netns/blue"} {
			t.Run(name+" "+target, func(t *testing.T) {
				if o.Root && os.Geteuid() != 0 {
					t.Skip("not root")
				}
				t.Parallel()
				n := rig.New(t, o)
				n.Host.Must(t, "ip", "netns", "add", "blue")
				a := n.AttachFrom(t, n.Host, nil, rig.AttachOptions{Target: []string{"--netns", target}})
				out := n.Host.Must(t, "ip", "netns", "exec", "blue", "curl", "-sS", "-m", "10", "http://"+web(false, rig.Services.HTTP)+"/ok")
				if out != "ok\n" {
					t.Errorf("curl: %q", out)
				}
				// The namespace has no process: its end is that of its name.
				n.Host.Must(t, "ip", "netns", "del", "blue")
				a.WantExit(t, 0, 2*time.Second)
			})
		}
	}
}

// TestAttachBindMount: a namespace that is known by a bind mount, made in the
// user's own mount namespace.
func TestAttachBindMount(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	n := rig.New(t, rig.Options{})
	runtime := n.User.Node(t, "runtime", rig.Spaces{User: true, Mount: true})
	guest := n.GuestOf(t, runtime, rig.Spaces{Net: true})
	path := filepath.Join(n.Dir, "bound netns")
	runtime.Must(t, "touch", path)
	runtime.Must(t, "mount", "--bind", guest.NetnsPath(), path)
	n.AttachFrom(t, runtime, nil, rig.AttachOptions{Target: []string{"--netns", path}})
	wantNetwork(t, guest, false)
}

// TestAttachPID: --pid is a shorter way to say it.
func TestAttachPID(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Target: []string{"--pid", itoa(w.Guest.PID)}, Flags: w.flags})
	wantNetwork(t, w.Guest, false)
}

// openTap makes a TAP in a guest and hands over its descriptor.
var openTap = rig.NewFunc("e2e.openTap", func(ctx context.Context, name string) (struct{}, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return struct{}{}, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return struct{}{}, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return struct{}{}, fmt.Errorf("TUNSETIFF: %w", err)
	}
	rig.SendFile(ctx, os.NewFile(uintptr(fd), name))
	return struct{}{}, nil
})

// TestAttachTapFile: usernet never comes near the guest's namespaces, but is
// given an open TAP.
func TestAttachTapFile(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "udhcpc")
	w := onTap(t)
	_, files, err := openTap.TryFiles(w.Guest, "tap9")
	if err != nil || len(files) != 1 {
		t.Fatalf("open TAP: %v, %d files", err, len(files))
	}
	a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Target: []string{"--tap-fd", "5"}, Files: files})
	files[0].Close()
	w.Guest.Must(t, "ip", "link", "set", "tap9", "up")
	w.Guest.Must(t, "udhcpc", "-f", "-n", "-q", "-i", "tap9", "-s", "/etc/udhcpc/default.script")
	wantNetwork(t, w.Guest, false)
	a.HangUp()
	a.WantExit(t, 0, 2*time.Second)
}

// TestAttachPersistentTap: a TAP of the name that is there already is used,
// and stays.
func TestAttachPersistentTap(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.Guest.Must(t, "ip", "tuntap", "add", "tap0", "mode", "tap")
	w.Guest.Must(t, "ip", "link", "set", "tap0", "address", "02:00:00:00:00:77")
	a := w.attach(t)
	families(t, func(t *testing.T, six bool) { wantNetwork(t, w.Guest, six) })
	a.Signal(unix.SIGTERM)
	a.WantExit(t, 0, 3*time.Second)
	w.Guest.Must(t, "ip", "link", "show", "tap0")
	w.attach(t)
	wantNetwork(t, w.Guest, false)
}

// TestAttachMTU: the guest's interface has the MTU asked for, and carries both
// small and large traffic with it.
func TestAttachMTU(t *testing.T) {
	eachLink(t, func(t *testing.T, w *world) {
		for _, mtu := range []string{"576", "1280", "1500", "9000", "65520"} {
			t.Run(mtu, func(t *testing.T) {
				guest := w.Net.Guest(t)
				a := w.Attach(t, guest, append([]string{"--mtu", mtu}, w.flags...)...)
				if got := guest.Must(t, "ip", "link", "show", "tap0"); !strings.Contains(got, "mtu "+mtu+" ") {
					t.Errorf("the interface is\n%s", got)
				}
				families(t, func(t *testing.T, six bool) {
					if six && mtu == "576" {
						if out := guest.Run(t, "ip", "-6", "addr", "show", "dev", "tap0").Stdout; strings.Contains(out, "inet6") {
							t.Errorf("IPv6 on an MTU that is too small for it:\n%s", out)
						}
						if !strings.Contains(a.Stderr(), "IPv6") && w.Name == "usernet" {
							t.Errorf("no warning that IPv6 is off:\n%s", a.Stderr())
						}
						return
					}
					talk := rig.Talk{
						Addr:   web(six, rig.Services.Talk),
						Client: []rig.Step{rig.Exchange(2<<20, 1)},
						Server: []rig.Step{rig.Exchange(2<<20, 2)},
					}
					all, err := talk.Do(guest, w.Internet, 20*time.Second)
					if err != nil {
						t.Fatal(err)
					}
					wantSame(t, "MTU "+mtu, all[0], 2<<20, 2<<20)
					failed := rig.EchoUDP.On(t, guest, rig.UDPEcho{Addr: web(six, rig.Services.Echo), Sizes: []int{0, 500, 1400, 20000, 65507}})
					for _, f := range failed {
						t.Error("UDP: " + f)
					}
				})
			})
		}
	})
}

// TestAttachInterface: name, MAC, addresses, and the routes that come of them.
func TestAttachInterface(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		w.attach(t, "--ifname", "uplink0", "--mac", "02:aa:bb:cc:dd:ee", "--cidr", "172.31.7.0/24", "--cidr6", "fd12:3456:789a:bcde::/64")
		link := w.Guest.Must(t, "ip", "addr", "show", "uplink0")
		for _, want := range []string{"02:aa:bb:cc:dd:ee", "inet 172.31.7.100/24", "inet6 fd12:3456:789a:bcde::100/64", "LOWER_UP"} {
			if !strings.Contains(link, want) {
				t.Errorf("the interface has no %q:\n%s", want, link)
			}
		}
		if got := w.Guest.Must(t, "ip", "route"); !strings.Contains(got, "default via 172.31.7.2 ") {
			t.Errorf("routes:\n%s", got)
		}
		if got := w.Guest.Must(t, "ip", "-6", "route"); !strings.Contains(got, "default via fd12:3456:789a:bcde::2 ") {
			t.Errorf("IPv6 routes:\n%s", got)
		}
		if got := w.Guest.Must(t, "ip", "addr", "show", "lo"); !strings.Contains(got, "127.0.0.1/8") || !strings.Contains(got, ",UP") {
			t.Errorf("loopback:\n%s", got)
		}
		families(t, func(t *testing.T, six bool) { wantNetwork(t, w.Guest, six) })
	})
}

// TestAttachRandomMAC: without --mac it is a locally administered one, and
// another one each time.
func TestAttachRandomMAC(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	seen := make(map[string]bool)
	for range 3 {
		guest := w.Net.Guest(t)
		w.Attach(t, guest, w.flags...)
		m := regexp.MustCompile(`link/ether ([0-9a-f])([26ae]):[0-9a-f:]+`).FindString(guest.Must(t, "ip", "link", "show", "tap0"))
		if m == "" || seen[m] {
			t.Errorf("MAC %q, want a local one that was not there before", m)
		}
		seen[m] = true
	}
}

// TestIPv6Off: nothing of IPv6 is there.
func TestIPv6Off(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.attach(t, "--ipv6=off")
	if out := w.Guest.Run(t, "ip", "-6", "addr", "show", "dev", "tap0", "scope", "global").Stdout; strings.Contains(out, "inet6") {
		t.Errorf("addresses:\n%s", out)
	}
	wantNetwork(t, w.Guest, false)
}

// TestLinkAuto: where /dev/net/tun is closed or missing, the guest gets a veth
// pair without being asked, and one line of the log says so.
func TestLinkAuto(t *testing.T) {
	rig.NeedUsernet(t)
	for name, tt := range map[string]struct {
		tun  rig.Tun
		link string
	}{"open": {rig.TunOpen, "tap"}, "closed": {rig.TunClosed, "veth"}, "missing": {rig.TunMissing, "veth"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, rig.Options{Tun: tt.tun})
			w.flags = nil
			a := w.attach(t)
			kind := "tun"
			if tt.link == "veth" {
				kind = "veth"
			}
			if out := w.Guest.Must(t, "ip", "-d", "link", "show", "tap0"); !strings.Contains(out, kind) {
				t.Errorf("the interface is no %s:\n%s", kind, out)
			}
			if !strings.Contains(a.Stderr(), "link="+tt.link) {
				t.Errorf("the log does not name the link %s:\n%s", tt.link, a.Stderr())
			}
			wantNetwork(t, w.Guest, false)
		})
	}
}

// TestAttachOwn: usernet does not attach to the namespace that it is in, not
// even with the right to: its own packets would come back to it.
func TestAttachOwn(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	n := rig.New(t, rig.Options{})
	before := n.Host.Must(t, "ip", "-br", "link")
	for _, target := range [][]string{{"--netns", "/proc/self/ns/net"}, {"--pid", itoa(n.Host.PID)}} {
		a := n.AttachFrom(t, n.Host, nil, rig.AttachOptions{Target: target, NoWait: true})
		a.WantExit(t, 1, 5*time.Second)
		a.WantOneLine(t, "itself is in", "container")
	}
	if after := n.Host.Must(t, "ip", "-br", "link"); after != before {
		t.Errorf("interfaces before:\n%s\nand after:\n%s", before, after)
	}
}

// TestAttachErrors: what cannot work ends at once, with one line that says why,
// and leaves nothing behind.
func TestAttachErrors(t *testing.T) {
	rig.NeedUsernet(t)
	dead := func(t *testing.T, w *world) string {
		p := w.User.Exec(t, rig.Command{Args: []string{"true"}})
		p.Wait(5 * time.Second)
		return itoa(p.PID)
	}
	tests := []struct {
		name   string
		tun    rig.Tun
		target func(t *testing.T, w *world) []string // nil: the guest
		flags  []string
		code   int
		words  []string
	}{
		{name: "missing path", code: 1, target: func(*testing.T, *world) []string { return []string{"--netns", "/nonexistent/ns"} }, words: []string{"/nonexistent/ns"}},
		{name: "not a namespace", code: 1, target: func(*testing.T, *world) []string { return []string{"--netns", "/etc/passwd"} }, words: []string{"/etc/passwd"}},
		{name: "another kind of namespace", code: 1, target: func(_ *testing.T, w *world) []string {
			return []string{"--netns", fmt.Sprintf("/proc/%d/ns/mnt", w.Guest.PID)}
		}, words: []string{"ns/mnt"}},
		{name: "missing name", code: 1, target: func(*testing.T, *world) []string { return []string{"--netns", "nobody-made-this"} }, words: []string{"nobody-made-this"}},
		{name: "dead process", code: 1, target: func(t *testing.T, w *world) []string { return []string{"--pid", dead(t, w)} }},
		{name: "no permission", code: 1, target: func(*testing.T, *world) []string { return []string{"--pid", "1"} }},
		{name: "namespace of an outer user namespace", code: 1, target: func(_ *testing.T, w *world) []string { return []string{"--netns", w.User.NetnsPath()} }, words: []string{"run usernet where"}},
		{name: "no right over the namespace", code: 1, target: func(_ *testing.T, w *world) []string {
			return []string{"--netns", fmt.Sprintf("/proc/%d/ns/net", w.Internet.PID)}
		}, words: []string{"run usernet as"}},
		{name: "no target", code: 2, target: func(*testing.T, *world) []string { return []string{} }},
		{name: "two targets", code: 2, flags: []string{"--pid", "1"}},
		{name: "unknown flag", code: 2, flags: []string{"--no-such-flag"}, words: []string{"no-such-flag"}},
		{name: "MTU too small", code: 2, flags: []string{"--mtu", "575"}, words: []string{"575"}},
		{name: "MTU too big", code: 2, flags: []string{"--mtu", "65521"}, words: []string{"65521"}},
		{name: "name too long", code: 2, flags: []string{"--ifname", "sixteen-letters-"}, words: []string{"sixteen-letters-"}},
		{name: "bad MAC", code: 2, flags: []string{"--mac", "01:00:5e:00:00:01"}},
		{name: "small subnet", code: 2, flags: []string{"--cidr", "10.0.2.0/30"}, words: []string{"10.0.2.0/30"}},
		{name: "overlapping subnets", code: 2, flags: []string{"--cidr6", "10.0.2.0/24"}},
		{name: "used name", code: 1, flags: []string{"--ifname", "eth9"}, words: []string{"eth9"}},
		{name: "the loopback's name", code: 2, flags: []string{"--ifname", "lo"}, words: []string{"lo"}},
		{name: "TAP where /dev/net/tun is closed", tun: rig.TunClosed, code: 1, flags: []string{"--link=tap"}, words: []string{"/dev/net/tun"}},
		{name: "TAP where /dev/net/tun is missing", tun: rig.TunMissing, code: 1, flags: []string{"--link=tap"}, words: []string{"/dev/net/tun"}},
	}
	t.Parallel()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, rig.Options{Tun: tt.tun})
			var target []string
			if tt.target != nil {
				target = tt.target(t, w)
			}
			w.Guest.Must(t, "ip", "link", "add", "eth9", "type", "veth", "peer", "eth8")
			before := w.Guest.Must(t, "ip", "-br", "link")
			pidFile := filepath.Join(w.Dir, "usernet.pid")
			a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Target: target, Flags: append(tt.flags, "--pid-file", pidFile), NoWait: true})
			code, ok := a.Wait(10 * time.Second)
			if !ok || code != tt.code {
				t.Errorf("ended %v with status %d, want %d", ok, code, tt.code)
			}
			a.WantOneLine(t, append(tt.words, "usernet: ")...)
			t.Log(strings.TrimSpace(a.Stderr()))
			w.WantNothingLeft(t, 2*time.Second, "usernet")
			if after := w.Guest.Must(t, "ip", "-br", "link"); after != before {
				t.Errorf("interfaces before:\n%s\nand after:\n%s", before, after)
			}
			if _, err := os.Stat(pidFile); err == nil {
				t.Error("the PID file is still there")
			}
		})
	}
}
