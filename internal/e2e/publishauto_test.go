package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// listener listens on the ports of its arguments, as 4:8090/tcp, until it ends.
const listener = `
import socket, sys, time
all = []
for arg in sys.argv[1:]:
    family, rest = arg.split(":"); port, kind = rest.split("/")
    s = socket.socket(socket.AF_INET if family == "4" else socket.AF_INET6, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    if family == "6": s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("" if family == "4" else "::", int(port)))
    if kind == "tcp": s.listen()
    all.append(s)
print("listens", flush=True)
time.sleep(100)
`

func listenOn(t *testing.T, n *rig.Node, ports ...string) *rig.Proc {
	t.Helper()
	p := n.Exec(t, rig.Command{Args: append([]string{"python3", "-c", listener}, ports...)})
	p.WaitOutput(t, "listens", 10*time.Second)
	return p
}

// published returns the forwards as host=guest/protocol, with a star if they
// were made by themselves.
func published(t *testing.T, w *world) map[string]string {
	t.Helper()
	var l struct {
		Forwards []struct {
			ID, Protocol, Host, Guest string
			Auto                      bool
		}
	}
	if err := json.Unmarshal([]byte(mustCtl(t, w, "forward", "list", "--json")), &l); err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for _, f := range l.Forwards {
		star := ""
		if f.Auto {
			star = "*"
		}
		m[fmt.Sprintf("%s=%s/%s%s", f.Host, f.Guest, f.Protocol, star)] = f.ID
	}
	return m
}

// TestPublishAuto: what listens inside is published as long as it does, and
// nothing else is.
func TestPublishAuto(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "python3")
	w := onTap(t)
	w.Guest.ServeOn(t, false)
	listenOn(t, w.User, "4:8091/tcp")
	a := w.attach(t, "--publish-auto=all,~8095/tcp", "-p", "9090:8096")

	// What listens already is published when usernet is ready, and only that.
	want := []string{":9090=:8096/tcp"}
	for _, port := range []int{rig.Services.Talk, rig.Services.Whoami, rig.Services.Reset} {
		want = append(want, fmt.Sprintf(":%d=:%[1]d/tcp*", port))
	}
	want = append(want, fmt.Sprintf(":%d=:%[1]d/udp*", rig.Services.Whoami))
	got := published(t, w)
	for _, f := range want {
		if got[f] == "" {
			t.Errorf("%s is not published", f)
		}
	}
	if len(got) != len(want) {
		t.Errorf("published: %v", got)
	}
	families(t, func(t *testing.T, six bool) {
		for _, network := range []string{"tcp", "udp"} {
			client := netip.AddrPortFrom(pick(six, internet4, internet6), 43000).String()
			read := rig.ReadAll
			if network == "udp" {
				read = rig.Dial
			}
			r := read.On(t, w.Internet, rig.DialRequest{Network: network, Addr: host(six, rig.Services.Whoami), Source: client})
			if r.Text != client {
				t.Errorf("%s: the server saw %v, want %s", network, r, client)
			}
		}
	})

	// What begins to listen follows, in the families that it listens in, unless
	// it is left out, has been published by hand, or the host has no room for it.
	inside := listenOn(t, w.Guest, "4:8090/tcp", "6:8092/tcp", "4:8093/tcp", "6:8093/tcp", "4:8094/udp", "4:8095/tcp", "4:8096/tcp", "4:8091/tcp", "4:50000/udp")
	started := time.Now()
	want = append(want, "0.0.0.0:8090=:8090/tcp*", "[::]:8092=:8092/tcp*", ":8093=:8093/tcp*", "0.0.0.0:8094=:8094/udp*")
	all := func() bool {
		got = published(t, w)
		for _, f := range want {
			if got[f] == "" {
				return false
			}
		}
		return true
	}
	if !rig.Poll(10*time.Second, all) {
		t.Errorf("not all is published: %v", got)
	}
	t.Logf("published within %v", time.Since(started).Round(10*time.Millisecond))
	time.Sleep(time.Second) // two looks
	if got = published(t, w); len(got) != len(want) {
		t.Errorf("published: %v", got)
	}
	connect := func(six bool, port int) syscall.Errno {
		return rig.Dial.On(t, w.Internet, rig.DialRequest{Network: "tcp", Addr: host(six, port)}).Errno
	}
	for _, tt := range []struct {
		six  bool
		port int
		want syscall.Errno
	}{
		{false, 8090, 0}, {true, 8090, syscall.ECONNREFUSED}, {false, 8092, syscall.ECONNREFUSED}, {true, 8092, 0},
		{false, 8093, 0}, {true, 8093, 0}, {false, 8095, syscall.ECONNREFUSED}, {false, 9090, 0},
	} {
		if errno := connect(tt.six, tt.port); errno != tt.want {
			t.Errorf("port %d, six %t: %v, want %v", tt.port, tt.six, errno, tt.want)
		}
	}

	// What was removed by hand stays away.
	mustCtl(t, w, "forward", "remove", got["0.0.0.0:8090=:8090/tcp*"])
	time.Sleep(time.Second)
	if errno := connect(false, 8090); errno != syscall.ECONNREFUSED {
		t.Errorf("a removed forward: %v", errno)
	}

	// What ends is not published any more.
	inside.Kill()
	if !rig.Poll(10*time.Second, func() bool { got = published(t, w); return len(got) == 5 }) {
		t.Errorf("still published: %v", got)
	}
	if errno := connect(false, 8093); errno != syscall.ECONNREFUSED {
		t.Errorf("after its end port 8093: %v", errno)
	}
	listenOn(t, w.Guest, "4:8090/tcp")
	if !rig.Poll(10*time.Second, func() bool { return connect(false, 8090) == 0 }) {
		t.Error("what listens anew is not published")
	}
	if text := mustCtl(t, w, "forward", "list"); !strings.Contains(text, ":8090 (auto)") {
		t.Errorf("forwards:\n%s", text)
	}

	// Of what the host has no room for there is one note for each kind.
	log := a.Stderr()
	if n := strings.Count(log, "port 8091: address already in use: "); n != 1 {
		t.Errorf("%d notes of port 8091:\n%s", n, log)
	}
	if n := strings.Count(log, "ip_unprivileged_port_start"); n != 1 {
		t.Errorf("%d notes of privileged ports:\n%s", n, log)
	}
}
