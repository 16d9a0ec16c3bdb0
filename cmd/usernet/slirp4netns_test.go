package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

func TestGetopt(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args     string
		given    []givenOption
		operands []string
		err      string
	}{
		{"-c 42 --api-socket S tap11", []givenOption{{"configure", ""}, {"api-socket", "S"}}, []string{"42", "tap11"}, ""},
		{"-c6r3 42 tap0", []givenOption{{"configure", ""}, {"enable-ipv6", ""}, {"ready-fd", "3"}}, []string{"42", "tap0"}, ""},
		{"-r 3 -m=1 42", []givenOption{{"ready-fd", "3"}, {"mtu", "=1"}}, []string{"42"}, ""},
		{"--mt=9000 --net path x", []givenOption{{"mtu", "9000"}, {"netns-type", "path"}}, []string{"x"}, ""},
		{"--outbound-addr=1.2.3.4", []givenOption{{"outbound-addr", "1.2.3.4"}}, nil, ""},
		{"-c -- -m 1", []givenOption{{"configure", ""}}, []string{"-m", "1"}, ""},
		{"- x", nil, []string{"-", "x"}, ""},
		{"--e", nil, nil, "option '--e' is ambiguous; possibilities: '--exit-fd' '--enable-ipv6' '--enable-sandbox' '--enable-seccomp'"},
		{"--nonsense", nil, nil, "unrecognized option '--nonsense'"},
		{"--configure=yes", nil, nil, "option '--configure' doesn't allow an argument"},
		{"--mtu", nil, nil, "option '--mtu' requires an argument"},
		{"-x", nil, nil, "invalid option -- 'x'"},
		{"-cr", nil, nil, "option requires an argument -- 'r'"},
	} {
		given, operands, err := getopt(strings.Fields(tt.args), slirpLongOptions)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != tt.err || !reflect.DeepEqual(given, tt.given) || !reflect.DeepEqual(operands, tt.operands) {
			t.Errorf("%q: %v %v %q", tt.args, given, operands, text)
		}
	}
}

func TestSlirpArguments(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ args, err string }{
		{"1 tap0", ""},
		{"-m 65521 1 tap0", ""},
		{"1", "TAPNAME is missing"},
		{"", "PID is missing"},
		{"-m 65522 1 tap0", "MTU must be a positive integer (< 65522)"},
		{"-m x 1 tap0", "MTU must be a positive integer (< 65522)"},
		{"-m 67 1 tap0", "slirp_new failed: the MTU is 67, IPv4 needs 68"},
		{"-r -1 1 tap0", "ready-fd must be a non-negative integer"},
		{"-e x 1 tap0", "exit-fd must be a non-negative integer"},
		{"0 tap0", "PID must be a positive integer"},
		{"--netns-type=path /nowhere tap0", "existing path expected when --netns-type=path: /nowhere"},
		{"--netns-type=word /nowhere tap0", "existing path expected when --netns-type=path: /nowhere"},
		{"--netns-type=tapfd -1x", "invalid option -- '1'"},
		{"--netns-type=tapfd x", "TAPFD must a file descriptor"},
		{"--userns-path=/nowhere 1 tap0", "userns path doesn't exist: /nowhere"},
		{"--target-type=vm 1 tap0", `--target-type must be either "netns" or "bess"`},
		{"--target-type=bess -c x", "--configure conflicts with --target-type=bess"},
		{"--target-type=bess x y", "too many arguments"},
		{"--macaddress=02:00:00:00:00:01 1 tap0", "--macaddr cannot be specified when --configure or -c is not specified"},
		{"--cidr=10.0.2.0 1 tap0", "invalid CIDR: 10.0.2.0"},
		{"--cidr=10.0.256.0/24 1 tap0", "invalid CIDR: 10.0.256.0/24"},
		{"--cidr=10.0.2.0/26 1 tap0", "invalid CIDR: prefix length needs to be 1-25, got 26"},
		{"--cidr=10.0.2.100/24 1 tap0", "invalid CIDR: CIDR needs to be a network address like 10.0.2.0/24, not like 10.0.2.100/24"},
		{"--cidr=11.0.0.0/8 1 tap0", ""},
		{"--outbound-addr=nowhere 1 tap0", "outbound-addr has to be valid ipv4 address or interface name."},
		{"--outbound-addr=lo 1 tap0", ""},
		{"--outbound-addr6=127.0.0.1 1 tap0", "outbound-addr6 has to be valid ipv6 address or interface name."},
		{"-a " + strings.Repeat("x", 108) + " 1 tap0", "the specified API socket path is too long (>= 108)"},
	} {
		_, err := parseSlirp("slirp4netns", strings.Fields(tt.args))
		text := ""
		if err != nil {
			text = strings.TrimPrefix(err.Error(), "slirp4netns: ")
		}
		if text != tt.err {
			t.Errorf("%q: %q, want %q", tt.args, text, tt.err)
		}
	}
}

// TestSlirpTexts: what programs look for before they use slirp4netns.
func TestSlirpTexts(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"/usr/bin/slirp4netns", "--help"}, nil, &out, &errs); status != 0 || errs.Len() != 0 {
		t.Errorf("status %d, stderr %q", status, errs.String())
	}
	for _, o := range []string{
		"netns-type", "disable-host-loopback", "mtu", "enable-sandbox", "enable-seccomp", "cidr", "outbound-addr", "enable-ipv6", "api-socket",
	} {
		if !strings.Contains(out.String(), "--"+o+" ") && !strings.Contains(out.String(), "--"+o+"=") {
			t.Errorf("no --%s in the help", o)
		}
	}
	out.Reset()
	if status := run(t.Context(), []string{"usernet", "slirp4netns", "-v"}, nil, &out, &errs); status != 0 {
		t.Errorf("status %d", status)
	}
	lines := strings.Split(out.String(), "\n")
	if strings.Count(out.String(), "version") != 1 || !strings.HasPrefix(lines[0], "slirp4netns version 1.") ||
		!strings.HasPrefix(lines[1], "commit: ") || !strings.Contains(out.String(), "\nSLIRP_CONFIG_VERSION_MAX: 6\n") {
		t.Errorf("version:\n%s", out.String())
	}
	out.Reset()
	if status := run(t.Context(), []string{"slirp4netns", "--bad"}, nil, &out, &errs); status != 1 ||
		!strings.HasPrefix(out.String(), "Usage: ") || !strings.Contains(errs.String(), "unrecognized option '--bad'") {
		t.Errorf("status %d, %q, %q", status, out.String(), errs.String())
	}
}

// forwards keeps what it is asked for.
type forwards map[string]usernet.Forward

func (f forwards) AddForward(_ context.Context, g usernet.Forward) (usernet.ForwardInfo, error) {
	if g.Host.Port() == 666 {
		return usernet.ForwardInfo{}, unix.EADDRINUSE
	}
	id := g.String()
	f[id] = g
	return usernet.ForwardInfo{ID: id, Forward: g}, nil
}

func (f forwards) RemoveForward(id string) error {
	if _, ok := f[id]; !ok {
		return errors.New("none")
	}
	delete(f, id)
	return nil
}

func newTestForwards() *slirpForwards {
	return &slirpForwards{n: forwards{}, addrs: usernet.Config{}.Addresses(), ids: make(map[int]slirpForward)}
}

func TestSlirpRequests(t *testing.T) {
	t.Parallel()
	h := newTestForwards()
	add := func(args string) string { return `{"execute":"add_hostfwd","arguments":{` + args + `}}` }
	const bad = `{"error":{"desc":"bad request: `
	for _, tt := range []struct{ request, reply string }{
		{`x`, bad + `cannot parse JSON"}}`},
		{``, bad + `cannot parse JSON"}}`},
		{`[]`, bad + `json_object() failed"}}`},
		{`{}`, bad + `no execute found"}}`},
		{`{"execute":1}`, bad + `no execute found"}}`},
		{`{"execute":"x"}`, bad + `unknown execute"}}`},
		{`{"execute":"add_hostfwd"}`, bad + `add_hostfwd: bad arguments.proto"}}`},
		{add(`"proto":"sctp"`), bad + `add_hostfwd: bad arguments.proto"}}`},
		{add(`"proto":"tcp","host_addr":"x"`), bad + `add_hostfwd: bad arguments.host_addr"}}`},
		{add(`"proto":"tcp","host_port":"80"`), bad + `add_hostfwd: bad arguments.host_port"}}`},
		{add(`"proto":"tcp","host_port":65536`), bad + `add_hostfwd: bad arguments.host_port"}}`},
		{add(`"proto":"tcp","host_port":80,"guest_addr":5`), bad + `add_hostfwd: bad arguments.guest_addr"}}`},
		{add(`"proto":"tcp","host_port":80`), bad + `add_hostfwd: bad arguments.guest_port"}}`},
		{`{"execute":"list_hostfwd"}`, `{"entries":[],"return":{"entries":[]}}`},
		{"\xef\xbb\xbf" + add(`"proto":"tcp","host_port":8080,"guest_port":80`) + "\n", `{"return":{"id":1}}`},
		{add(`"proto":"udp","host_addr":"::1","host_port":53,"guest_addr":"0.0.0.0","guest_port":53`) + "garbage", `{"return":{"id":2}}`},
		{add(`"proto":"tcp6","host_addr":"127.0.0.1","host_port":1,"guest_port":1`), bad + `add_hostfwd: bad arguments.host_addr"}}`},
		{add(`"proto":"tcp","host_port":666,"guest_port":1`), `{"error":{"cause":"address already in use","desc":"bad request: add_hostfwd: slirp_add_hostfwd failed"}}`},
		{`{"execute":"remove_hostfwd","arguments":{"id":1}}`, `{"return":{}}`},
		{`{"execute":"remove_hostfwd","arguments":{"id":1}}`, bad + `remove_hostfwd: slirp_remove_hostfwd failed"}}`},
		{`{"execute":"remove_hostfwd","arguments":{"id":"2"}}`, bad + `remove_hostfwd: bad arguments.id"}}`},
		{`{"execute":"remove_hostfwd"}`, bad + `remove_hostfwd: bad arguments.id"}}`},
	} {
		b, err := json.Marshal(h.answer(t.Context(), []byte(tt.request)))
		if err != nil || string(b) != tt.reply {
			t.Errorf("%s\n got %s\nwant %s", tt.request, b, tt.reply)
		}
	}
	b, _ := json.Marshal(h.answer(t.Context(), []byte(`{"execute":"list_hostfwd"}`)))
	const entry = `[{"id":2,"proto":"udp","host_addr":"::1","host_port":53,"guest_addr":"0.0.0.0","guest_port":53}]`
	if string(b) != `{"entries":`+entry+`,"return":{"entries":`+entry+`}}` {
		t.Errorf("list: %s", b)
	}
}

func FuzzSlirpRequest(f *testing.F) {
	f.Add([]byte(`{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8080,"guest_port":80}}`))
	f.Add([]byte(`{"execute":"remove_hostfwd","arguments":{"id":1e300}}`))
	f.Add([]byte(`{"execute":"list_hostfwd"}{`))
	f.Fuzz(func(t *testing.T, request []byte) {
		reply := newTestForwards().answer(context.Background(), request)
		if (reply["error"] == nil) == (reply["return"] == nil) {
			t.Errorf("%q: %v", request, reply)
		}
	})
}

// TestSlirpSocket: clients that write in pieces, too much or nothing.
func TestSlirpSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	if err := os.WriteFile(path, nil, 0o600); err != nil { // from earlier
		t.Fatal(err)
	}
	api, err := listenSlirpAPI(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		api.serve(ctx, forwards{}, usernet.Config{}.Addresses(), nil)
	}()
	dial := func() net.Conn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		return c
	}
	ask := func(pieces ...string) string {
		c := dial()
		defer c.Close()
		for _, p := range pieces {
			if _, err := c.Write([]byte(p)); err != nil {
				t.Error(err)
			}
		}
		b := make([]byte, 2048) // and one read, as Podman does
		n, err := c.Read(b)
		if err != nil {
			t.Error(err)
		}
		return string(b[:n])
	}
	silent := dial()
	defer silent.Close()
	if got := ask(`{"execute":"add_host`, `fwd","arguments":{"proto":"tcp",`, `"host_port":8080,"guest_port":80}}`); got != `{"return":{"id":1}}` {
		t.Errorf("in pieces: %s", got)
	}
	if got := ask(strings.Repeat(" ", 2*slirpMaxRequest)); !strings.Contains(got, "too large message") {
		t.Errorf("too much: %s", got)
	}
	c := dial()
	defer c.Close()
	if _, err := c.Write(bytes.Repeat([]byte(" "), 2*slirpMaxRequest)); err != nil {
		t.Error(err)
	}
	_ = c.(*net.UnixConn).CloseWrite()
	if got, err := io.ReadAll(c); err != nil || !strings.Contains(string(got), "too large message") {
		t.Errorf("too much, to the end: %s, %v", got, err)
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("a silent client holds the server up")
	}
	api.close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}
