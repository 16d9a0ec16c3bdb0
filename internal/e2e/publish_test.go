package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// A way is a path of published TCP ports.
type way struct {
	name   string
	splice bool
}

var waysIn = []way{{"splice", true}, {"netstack", false}}

// eachWay runs a test on both paths, with servers in the guest.
func eachWay(t *testing.T, f func(t *testing.T, w *world, way way)) {
	rig.NeedUsernet(t)
	t.Parallel()
	for _, way := range waysIn {
		t.Run(way.name, func(t *testing.T) {
			w := onTap(t)
			if !way.splice {
				// The namespace will not be told to give answers the mark.
				w.Host.Must(t, "mount", "--bind", "/proc/sys", "/proc/sys")
				w.Host.Must(t, "mount", "-o", "remount,bind,ro", "/proc/sys")
			}
			w.Guest.ServeOn(t, false)
			f(t, w, way)
		})
	}
}

// publish attaches with ports published.
func (w *world) publish(t *testing.T, way way, specs ...string) *rig.Attach {
	t.Helper()
	var flags []string
	for _, s := range specs {
		flags = append(flags, "-p", s)
	}
	a := w.attach(t, flags...)
	if told := strings.Contains(a.Stderr(), "does not allow a faster way"); told == way.splice {
		t.Fatalf("on the path %s usernet said:\n%s", way.name, a.Stderr())
	}
	return a
}

// The internet's own addresses.
var (
	internet4 = netip.MustParseAddr("100.64.1.2")
	internet6 = netip.MustParseAddr("2001:db8:65::2")
)

// host is the host's address as clients outside know it.
func host(six bool, port int) string { return at(pick(six, rig.Host4, rig.Host6), port) }

// TestPublishClientAddress: the server sees who its client is.
func TestPublishClientAddress(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.publish(t, way, fmt.Sprintf("8080:%d", rig.Services.Whoami), fmt.Sprintf("8080:%d/udp", rig.Services.Whoami))
		families(t, func(t *testing.T, six bool) {
			gateway := pick(six, netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("fd75:736e:6574::2"))
			for _, tt := range []struct {
				name   string
				from   *rig.Node
				addr   string
				source netip.Addr
				want   netip.Addr
			}{
				{"from outside", w.Internet, host(six, 8080), pick(six, internet4, internet6), pick(six, internet4, internet6)},
				{"from the host", w.User, host(six, 8080), pick(six, rig.Host4, rig.Host6), pick(six, rig.Host4, rig.Host6)},
				{"from the loopback", w.User, at(pick(six, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()), 8080),
					pick(six, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()), gateway},
			} {
				for i, network := range []string{"tcp", "udp", "tcp"} {
					source := netip.AddrPortFrom(tt.source, uint16(41000+i))
					r := rig.DialRequest{Network: network, Addr: tt.addr, Source: source.String()}
					read := rig.ReadAll
					if network == "udp" {
						read = rig.Dial
					}
					got := read.On(t, tt.from, r)
					if want := netip.AddrPortFrom(tt.want, source.Port()).String(); got.Text != want {
						t.Errorf("%s, %s: the server saw %v, want %s", tt.name, network, got, want)
					}
				}
			}
		})
	})
}

// readMany has clients outside read what the server at port 8080 says of them.
func (w *world) readMany(t *testing.T, six bool, count int) {
	t.Helper()
	client := at(pick(six, internet4, internet6), 0)
	got := rig.ReadMany.On(t, w.Internet, rig.Many{
		Addr: host(six, 8080), Count: count, Workers: 8, Prefix: strings.TrimSuffix(client, "0"),
	})
	if got.Good != count {
		t.Errorf("%d of %d clients were seen as what they are: %v", got.Good, count, got.Errors)
	}
}

// TestPublishManyClients: most clients get a socket that was made before they came.
func TestPublishManyClients(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.publish(t, way, fmt.Sprintf("8080:%d", rig.Services.Whoami))
		families(t, func(t *testing.T, six bool) { w.readMany(t, six, 300) })
	})
}

// TestPublishAfterPause: a client who comes after a pause takes the way that those
// before have taken, and so keeps its port.
func TestPublishAfterPause(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	w.Guest.ServeOn(t, false)
	w.publish(t, waysIn[0], fmt.Sprintf("8080:%d", rig.Services.Whoami))
	w.readMany(t, false, 50) // from now on there are sockets ahead
	// A crowd may take 5 s to be let in; sockets that nobody needs may be closed as
	// soon after that.
	time.Sleep(5050 * time.Millisecond)
	for _, port := range []int{20000, 20001} {
		r := rig.ReadAll.On(t, w.Internet, rig.DialRequest{Network: "tcp", Addr: host(false, 8080), Source: at(internet4, port)})
		if r.Text != at(internet4, port) {
			t.Errorf("the server saw %v, want %s", r, at(internet4, port))
		}
	}
}

// TestPublishPortTakenInside: a client whose port the guest uses itself gets in
// from another one.
func TestPublishPortTakenInside(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.publish(t, way, fmt.Sprintf("8080:%d", rig.Services.Whoami))
		taken := w.Guest.ServeOn(t, true).Talk
		families(t, func(t *testing.T, six bool) {
			w.readMany(t, six, 8) // from now on there are sockets ahead
			client := pick(six, internet4, internet6)
			r := rig.ReadAll.On(t, w.Internet, rig.DialRequest{
				Network: "tcp", Addr: host(six, 8080), Source: at(client, taken),
			})
			seen, err := netip.ParseAddrPort(r.Text)
			if err != nil || seen.Addr() != client {
				t.Errorf("the server saw %v, want %v at any port", r, client)
			}
		})
	})
}

// TestPublishPassedOn: a guest may pass a published port's connections on, as
// Docker does to a container on its bridge. Such a container's answers take the
// guest's routes, not the mark's.
func TestPublishPassedOn(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "nft")
	w := onTap(t)
	w.attach(t, "-p", "8080:8080")
	container := w.Guest.Node(t, "container", rig.Spaces{Net: true})
	w.Guest.Must(t, "sh", "-ec", fmt.Sprintf(`
		ip link add bridge type bridge mcast_snooping 0
		ip address add 172.17.0.1/16 dev bridge
		ip address add fd00:17::1/64 dev bridge nodad
		ip link add port type veth peer name eth0 netns /proc/%d/ns/net
		ip link set port master bridge
		ip link set port up
		ip link set bridge up
		echo 1 >/proc/sys/net/ipv4/ip_forward
		echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		nft -f - <<-END
			table inet nat {
				chain prerouting {
					type nat hook prerouting priority -100;
					jump in
				}
				chain output {
					type nat hook output priority -100;
					ip daddr != 127.0.0.0/8 jump in
					ip6 daddr != ::1 jump in
				}
				chain in {
					fib daddr type local tcp dport 8080 dnat ip to 172.17.0.2:%[2]d
					fib daddr type local tcp dport 8080 dnat ip6 to [fd00:17::2]:%[2]d
				}
			}
		END`, container.PID, rig.Services.Whoami))
	container.Must(t, "sh", "-ec", `
		ip link set lo up
		ip address add 172.17.0.2/16 dev eth0
		ip address add fd00:17::2/64 dev eth0 nodad
		ip link set eth0 up
		ip route add default via 172.17.0.1
		ip route add default via fd00:17::1`)
	container.ServeOn(t, false)
	families(t, func(t *testing.T, six bool) {
		client := pick(six, internet4, internet6)
		for range 3 {
			r := rig.ReadAll.On(t, w.Internet, rig.DialRequest{Network: "tcp", Addr: host(six, 8080), Source: at(client, 0)})
			if seen, err := netip.ParseAddrPort(r.Text); err != nil || seen.Addr() != client {
				t.Errorf("the server saw %v, want %v", r, client)
			}
		}
	})
}

// TestPublishEnds: how a connection ends on one side is how the other sees it.
func TestPublishEnds(t *testing.T) {
	const mib = 1 << 20
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.publish(t, way, fmt.Sprintf("8080:%d", rig.Services.Talk), "8081:4", fmt.Sprintf("8082:%d", rig.Services.Reset))
		for _, tt := range []struct {
			name                 string
			client, server       []rig.Step
			up, down             int64
			clientEnd, serverEnd string
		}{
			{
				"client closes first",
				[]rig.Step{rig.Send(mib, 1), rig.CloseWrite(), rig.Receive()},
				[]rig.Step{rig.Receive(), rig.Sleep(300 * time.Millisecond), rig.Send(10*mib, 2), rig.CloseWrite()},
				mib, 10 * mib, "eof", "eof",
			},
			{
				"server closes first",
				[]rig.Step{rig.Receive(), rig.Sleep(300 * time.Millisecond), rig.Send(10*mib, 1), rig.CloseWrite()},
				[]rig.Step{rig.Send(mib, 2), rig.CloseWrite(), rig.Receive()},
				10 * mib, mib, "eof", "eof",
			},
			{
				"client resets",
				[]rig.Step{rig.Send(1000, 1), rig.ReceiveN(10), rig.Reset()},
				[]rig.Step{rig.ReceiveN(1000), rig.Send(10, 2), rig.Receive()},
				1000, 10, "", "reset",
			},
			{
				"server resets",
				[]rig.Step{rig.Send(1000, 1), rig.Receive()},
				[]rig.Step{rig.ReceiveN(1000), rig.Reset()},
				1000, 0, "reset", "",
			},
			{
				"client is slow",
				[]rig.Step{rig.Sleep(2 * time.Second), rig.Receive(), rig.CloseWrite()},
				[]rig.Step{rig.Send(32*mib, 3), rig.CloseWrite(), rig.Receive()},
				0, 32 * mib, "eof", "eof",
			},
			{
				"server is slow",
				[]rig.Step{rig.Send(32*mib, 3), rig.CloseWrite(), rig.Receive()},
				[]rig.Step{rig.Sleep(2 * time.Second), rig.Receive(), rig.CloseWrite()},
				32 * mib, 0, "eof", "eof",
			},
			{
				"urgent data",
				[]rig.Step{rig.Send(100, 7), rig.Urgent("abc"), rig.Send(100, 8), rig.CloseWrite(), rig.Receive()},
				[]rig.Step{rig.Receive(), rig.CloseWrite()},
				203, 0, "eof", "eof",
			},
		} {
			t.Run(tt.name, func(t *testing.T) {
				families(t, func(t *testing.T, six bool) {
					talk := rig.Talk{Addr: host(six, 8080), Client: tt.client, Server: tt.server}
					all, err := talk.Do(w.Internet, w.Guest, 40*time.Second)
					if err != nil {
						t.Fatal(err)
					}
					r := all[0]
					wantSame(t, tt.name, r, tt.up, tt.down)
					if r.Client.End != tt.clientEnd || r.Server.End != tt.serverEnd {
						t.Errorf("client saw the end as %q, server as %q; want %q and %q", r.Client.End, r.Server.End, tt.clientEnd, tt.serverEnd)
					}
				})
			})
		}
		t.Run("refused", func(t *testing.T) {
			families(t, func(t *testing.T, six bool) {
				for _, port := range []int{8081, 8082} {
					r := rig.ReadAll.On(t, w.Internet, rig.DialRequest{Network: "tcp", Addr: host(six, port)})
					if r.Errno != syscall.ECONNRESET || r.Took > 2*time.Second {
						t.Errorf("port %d: %v after %v, want a reset", port, r, r.Took)
					}
				}
			})
		})
	})
}

// TestPublishParallelStreams: bytes arrive as they were sent, however many at once.
func TestPublishParallelStreams(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.publish(t, way, fmt.Sprintf("8080:%d", rig.Services.Talk))
		for _, streams := range []int{1, 64} {
			families(t, func(t *testing.T, six bool) {
				size := int64(32<<20) / int64(streams)
				talk := rig.Talk{
					Addr: host(six, 8080), Streams: streams,
					Client: []rig.Step{rig.Exchange(size, 1)}, Server: []rig.Step{rig.Exchange(size, 1000)},
				}
				all, err := talk.Do(w.Internet, w.Guest, 60*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				for i, r := range all {
					wantSame(t, fmt.Sprintf("%d of %d streams", i+1, streams), r, size, size)
				}
			})
		}
	})
}

// TestPublishUDP: datagrams of all sizes come and go.
func TestPublishUDP(t *testing.T) {
	w := onTap(t)
	rig.NeedUsernet(t)
	w.Guest.ServeOn(t, false)
	w.attach(t, "-p", fmt.Sprintf("5353:%d/udp", rig.Services.Echo))
	families(t, func(t *testing.T, six bool) {
		r := rig.UDPEcho{Addr: host(six, 5353), Sizes: []int{0, 1, 100, 1200, 1472, 1473, 4000, 16000, 60000}}
		if failed := rig.EchoUDP.On(t, w.Internet, r); len(failed) > 0 {
			t.Errorf("failed: %v", failed)
		}
	})
}

// TestPublishFreePort: what was chosen is told before usernet is ready, a unix
// socket is there, and nothing is left behind.
func TestPublishFreePort(t *testing.T) {
	w := onTap(t)
	rig.NeedUsernet(t)
	w.Guest.ServeOn(t, false)
	path := filepath.Join(shortDir(t), "web.sock")
	a := w.attach(t, "-p", fmt.Sprintf(":%d", rig.Services.Whoami), "-p", "127.0.0.1::9000-9001/udp", "-p", fmt.Sprintf("unix:%s:%d", path, rig.Services.Whoami))
	lines := regexp.MustCompile(`(?m)^published (?:127\.0\.0\.1:)?(\d+):(\d+)/(tcp|udp)$`).FindAllStringSubmatch(a.Stdout(), -1)
	if len(lines) != 3 || lines[0][2] != itoa(rig.Services.Whoami) || lines[1][2] != "9000" || lines[2][2] != "9001" {
		t.Fatalf("stdout: %q", a.Stdout())
	}
	port, _ := strconv.Atoi(lines[0][1])
	families(t, func(t *testing.T, six bool) {
		r := rig.ReadAll.On(t, w.Internet, rig.DialRequest{Network: "tcp", Addr: host(six, port)})
		if seen, err := netip.ParseAddrPort(r.Text); err != nil || !seen.IsValid() {
			t.Errorf("port %d: %v", port, r)
		}
	})
	r := rig.ReadAll.On(t, w.User, rig.DialRequest{Network: "unix", Addr: path})
	if !strings.HasPrefix(r.Text, "10.0.2.2:") {
		t.Errorf("by the unix socket the server saw %v, want the gateway", r)
	}
	a.Signal(syscall.SIGTERM)
	a.WantExit(t, 0, 5*time.Second)
	if _, err := os.Lstat(path); err == nil {
		t.Errorf("%s is left", path)
	}
	rules := w.Guest.Must(t, "ip", "rule") + w.Guest.Must(t, "ip", "-6", "rule")
	if strings.Contains(rules, "fwmark") {
		t.Errorf("rules are left:\n%s", rules)
	}
	if v := w.Guest.Must(t, "sysctl", "-n", "net.ipv4.tcp_fwmark_accept"); strings.TrimSpace(v) != "0" {
		t.Errorf("tcp_fwmark_accept is left at %s", v)
	}
}

// TestPublishFailures: a port that cannot be had ends usernet with an error
// that says why.
func TestPublishFailures(t *testing.T) {
	w := onTap(t)
	rig.NeedUsernet(t)
	used := w.User.ServeOn(t, true, "0.0.0.0")
	for _, tt := range []struct {
		name, spec string
		words      []string
	}{
		{"taken", fmt.Sprintf("%d:80", used.Talk), []string{fmt.Sprintf("port %d: address already in use: ", used.Talk), "has it", "choose another port"}},
		{"privileged", "80:80", []string{"port 80: permission denied", "ports below 1024", "net.ipv4.ip_unprivileged_port_start"}},
		{"not this host's", "192.0.2.77:8080:80", []string{"192.0.2.77", "no interface of this host"}},
		{"no directory", "unix:/nowhere/x:80", []string{"/nowhere/x", "no such file", "make its directory first"}},
		{"no right to the directory", "unix:/usr/x:80", []string{"/usr/x", "choose a path where this user may write"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{
				Flags: append([]string{"-p", tt.spec}, w.flags...), NoWait: true,
			})
			a.WantExit(t, 1, 10*time.Second)
			a.WantOneLine(t, append([]string{"usernet: publish " + strings.TrimSuffix(tt.spec, "/tcp")}, tt.words...)...)
		})
	}
}

// shortDir is a directory for unix sockets, whose paths are short.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "un")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestPublishProxyProtocol: a server that asks for it is told the client's
// address ahead of what the client sends, even if that is nothing.
func TestPublishProxyProtocol(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		rig.NeedTools(t, "socat")
		echo := rig.Services.Echo
		socket := filepath.Join(shortDir(t), "socket")
		w.publish(t, way, fmt.Sprintf("8081:%d,proxy=v1", echo), fmt.Sprintf("8082:%d,proxy=v2", echo),
			fmt.Sprintf("unix:%s:%d,proxy=v1", socket, echo))
		const v2 = "\r\n\r\n\x00\r\nQUIT\n"
		ask := func(from *rig.Node, text, to string) string {
			return from.Must(t, "sh", "-c", fmt.Sprintf("printf '%s' | timeout 20 socat -t 5 - %s", text, to))
		}
		families(t, func(t *testing.T, six bool) {
			client, here := pick(six, internet4, internet6), pick(six, rig.Host4, rig.Host6)
			family := pick(six, "TCP4", "TCP6")
			port := 42000
			for _, text := range []string{"", "hello"} {
				port++
				got := ask(w.Internet, text, fmt.Sprintf("%s:%s,bind=%s,reuseaddr", family, host(six, 8081), at(client, port)))
				if want := fmt.Sprintf("PROXY %s %v %v %d 8081\r\n%s", family, client, here, port, text); got != want {
					t.Errorf("version 1: the server got %q, want %q", got, want)
				}
				port++
				got = ask(w.Internet, text, fmt.Sprintf("%s:%s,bind=%s,reuseaddr", family, host(six, 8082), at(client, port)))
				want := v2 + pick(six, "\x21\x11\x00\x0c", "\x21\x21\x00\x24") +
					string(client.AsSlice()) + string(here.AsSlice()) +
					string([]byte{byte(port >> 8), byte(port), 8082 >> 8, 8082 & 0xff}) + text
				if got != want {
					t.Errorf("version 2: the server got %q, want %q", got, want)
				}
			}
		})
		if got := ask(w.User, "hello", "UNIX:"+socket); got != "PROXY UNKNOWN\r\nhello" {
			t.Errorf("from a unix socket the server got %q", got)
		}
	})
}
