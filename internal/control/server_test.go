package control

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestErrors: what is asked wrongly is answered with a fitting code, and changes
// nothing.
func TestErrors(t *testing.T) {
	s := newState()
	path := serve(t, s)
	do(t, path, "POST", "/v1/forwards", `{"spec":"127.0.0.1:8080:80"}`)
	deep := strings.Repeat("[", 10000)
	for _, tt := range []struct {
		method, target, body string
		status               int
		code                 string
	}{
		{"GET", "/", "", 404, "not-found"},
		{"GET", "/v1", "", 404, "not-found"},
		{"GET", "/v1/info/", "", 404, "not-found"},
		{"GET", "/v2/info", "", 404, "not-found"},
		{"GET", "/v1/../v1/info", "", 404, "not-found"},
		{"POST", "/v1/info", "{}", 405, "method-not-allowed"},
		{"OPTIONS", "/v1/info", "", 405, "method-not-allowed"},
		{"TRACE", "/v1/flows", "", 405, "method-not-allowed"},
		{"PUT", "/v1/forwards", "{}", 405, "method-not-allowed"},
		{"GET", "/v1/flows/1", "", 405, "method-not-allowed"},
		{"DELETE", "/v1/flows/9", "", 404, "not-found"},
		{"DELETE", "/v1/flows/", "", 404, "not-found"},
		{"DELETE", "/v1/flows/1/2", "", 404, "not-found"},
		{"DELETE", "/v1/forwards/9", "", 404, "not-found"},
		{"DELETE", "/v1/dns/b.test", "", 404, "not-found"},
		{"PUT", "/v1/dns/b.test", `{"addresses":[]}`, 400, "bad-request"},
		{"PUT", "/v1/dns/b.test", `{"addresses":["1.2.3"]}`, 400, "bad-request"},
		{"PUT", "/v1/dns/b.test", `{"addresses":"1.2.3.4"}`, 400, "bad-request"},
		{"PUT", "/v1/log-level", `{"level":"loud"}`, 400, "bad-request"},
		{"PUT", "/v1/log-level", `{"level":1}`, 400, "bad-request"},
		{"PUT", "/v1/log-level", `{}`, 400, "bad-request"},
		{"POST", "/v1/forwards", ``, 400, "bad-request"},
		{"POST", "/v1/forwards", `{`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `null`, 400, "bad-request"},
		{"POST", "/v1/forwards", `[]`, 400, "bad-request"},
		{"POST", "/v1/forwards", deep, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"a":` + deep, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:1"} {"spec":"2:2"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:1","spec":"2:2"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:1","SPEC":"2:2"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:1","more":1}`, 400, "bad-request"},
		{"POST", "/v1/forwards", "{\"spec\":\"\xff:1\"}", 400, "bad-request"},
		{"POST", "/v1/forwards", "{\"spec\":\"1:1\x00\"}", 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":NaN}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":1e999}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:0"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:65536"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:-1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"9-1:9-1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1-3:1-2"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"sctp","host":":1","guest":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"host":":1","guest":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"tcp","guest":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host":":65536","guest":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host":":3.7","guest":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host":":1","host_path":"/x","guest":":1"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host":":1","guest":":1","id":"7"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"1:1","protocol":"tcp"}`, 400, "bad-request"},
		{"POST", "/v1/forwards", `{"spec":"127.0.0.1:8080:80"}`, 409, "address-in-use"},
		{"POST", "/v1/forwards", `{"spec":"127.0.0.1:8078-8081:1-4"}`, 409, "address-in-use"}, // and 8078 is not kept
		{"POST", "/v1/forwards", `{"spec":"127.0.0.1:80:80"}`, 403, "not-permitted"},
		{"POST", "/v1/forwards", `{"spec":"` + strings.Repeat("1", maxBody) + `"}`, 413, "too-large"},
	} {
		status, body, header := do(t, path, tt.method, tt.target, tt.body)
		var e errorBody
		if err := json.Unmarshal([]byte(body), &e); err != nil || header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %s %.40q: no JSON: %q", tt.method, tt.target, tt.body, body)
			continue
		}
		if status != tt.status || e.Error.Code != tt.code || e.Error.Message == "" {
			t.Errorf("%s %s %.40q: %d %+v, want %d %s", tt.method, tt.target, tt.body, status, e.Error, tt.status, tt.code)
		}
		if status == 405 && header.Get("Allow") == "" {
			t.Errorf("%s %s: no Allow", tt.method, tt.target)
		}
	}
	if len(s.forwards) != 1 || len(s.flows) != 1 || len(s.records) != 1 {
		t.Errorf("something has changed: %+v", s)
	}
}

// TestChanges: what is asked rightly is done.
func TestChanges(t *testing.T) {
	s := newState()
	path := serve(t, s)
	for i, tt := range []struct {
		method, target, body string
		status               int
		want                 string
	}{
		{"POST", "/v1/forwards", `{"spec":"127.0.0.1:8080:80"}`, 201, `"host":"127.0.0.1:8080"`},
		{"POST", "/v1/forwards", `{"spec":"[::1]:9000-9001:90-91/udp"}`, 201, `"host":"[::1]:9001","guest":":91"`},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host":":7","guest":"10.0.2.15:7"}`, 201, `"host":":7","guest":"10.0.2.15:7"`},
		{"POST", "/v1/forwards", `{"protocol":"tcp","host_path":"/x","guest":":7"}`, 201, `"host_path":"/x"`},
		{"GET", "/v1/forwards", "", 200, `"id":"5"`},
		{"DELETE", "/v1/forwards/5", "", 204, ""},
		{"DELETE", "/v1/flows/1", "", 204, ""},
		{"GET", "/v1/flows", "", 200, `{"flows":[]}`},
		{"PUT", "/v1/dns/b.test", `{"addresses":["1.2.3.4","::1"]}`, 204, ""},
		{"GET", "/v1/dns", "", 200, `{"name":"b.test","addresses":["1.2.3.4","::1"]}`},
		{"POST", "/v1/dns/b.test", `{"addresses":["1.2.3.5"]}`, 204, ""},
		{"GET", "/v1/dns", "", 200, `{"name":"b.test","addresses":["1.2.3.4","::1","1.2.3.5"]}`},
		{"DELETE", "/v1/dns/a.test", "", 204, ""},
		{"PUT", "/v1/log-level", `{"level":"warn"}`, 204, ""},
		{"GET", "/v1/log-level", "", 200, `{"level":"warn"}`},
		{"HEAD", "/v1/info", "", 200, ""},
		{"GET", "/metrics", "", 200, "\nusernet_dropped_total{reason=\"spoofed\"} 5\n"},
		{"GET", "/metrics", "", 200, "\nusernet_flows_tcp 3\n"},
		{"GET", "/metrics", "", 200, "\nusernet_flows_tcp_total 7\n"},
		{"GET", "/metrics", "", 200, "\nusernet_dns_queries_total 9\n"},
		{"GET", "/metrics", "", 200, "\nusernet_forwards 2\n"},
	} {
		status, body, _ := do(t, path, tt.method, tt.target, tt.body)
		if status != tt.status || !strings.Contains(body, tt.want) || tt.status == 204 && body != "" {
			t.Errorf("%d: %s %s %s: %d %s, want %d %s", i, tt.method, tt.target, tt.body, status, body, tt.status, tt.want)
		}
	}
}

// TestMetricsFormat holds GET /metrics to the rules of the text format: help and
// type before the samples, names and values of the right form, none twice.
func TestMetricsFormat(t *testing.T) {
	_, body, header := do(t, serve(t, newState()), "GET", "/metrics", "")
	if !strings.HasPrefix(header.Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Errorf("Content-Type is %q", header.Get("Content-Type"))
	}
	seen, typed := make(map[string]bool), ""
	for line := range strings.Lines(body) {
		line = strings.TrimSuffix(line, "\n")
		var name, kind string
		if n, _ := fmt.Sscanf(line, "# TYPE %s %s", &name, &kind); n == 2 {
			if typed = name; seen["# "+name] || kind != "gauge" && kind != "counter" || (kind == "counter") != strings.HasSuffix(name, "_total") {
				t.Errorf("line %q", line)
			}
			seen["# "+name] = true
			continue
		}
		if strings.HasPrefix(line, "# HELP ") {
			continue
		}
		sample, value, ok := strings.Cut(line, " ")
		if strings.Contains(line, "{") {
			i := strings.LastIndex(line, "} ") + 1
			sample, value, ok = line[:i], line[i+1:], i > 0
		}
		base, _, _ := strings.Cut(sample, "{")
		var v float64
		if _, err := fmt.Sscanf(value, "%g", &v); err != nil || !ok || base != typed || seen[sample] || !strings.HasPrefix(base, "usernet_") {
			t.Errorf("line %q after type %q: %v", line, typed, err)
		}
		seen[sample] = true
	}
}

// slowly sends a request byte by byte until the connection ends or the test does.
func slowly(t *testing.T, path string, text string, stop chan struct{}, wg *sync.WaitGroup) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return // the queue of the socket is full
	}
	wg.Go(func() {
		defer c.Close()
		for i := 0; ; i = (i + 1) % len(text) {
			if _, err := c.Write([]byte{text[i]}); err != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
		}
	})
}

// TestSlowClients: 200 clients that send a byte a second, or nothing, or read
// nothing, do not keep another one waiting, and hold no more than their bound.
func TestSlowClients(t *testing.T) {
	path := serve(t, newState())
	before := runtime.NumGoroutine()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	for i := range 200 {
		text := "GET /v1/info HTTP/1.1\r\nX: " + strings.Repeat("y", 1000)
		if i%4 == 0 {
			text = "POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n{"
		}
		slowly(t, path, text, stop, &wg)
	}
	for range 50 {
		start := time.Now()
		status, _, _ := do(t, path, "GET", "/v1/flows", "")
		if took := time.Since(start); status != 200 || took > time.Minute {
			t.Fatalf("status %d after %v", status, took)
		}
	}
	// Two goroutines for each connection here, one for each client.
	if n := runtime.NumGoroutine(); n > before+200+3*maxConns+20 {
		t.Errorf("%d goroutines, %d before", n, before)
	}
}

// TestStuckClients: who stops in the middle, or reads nothing, is cut off.
func TestStuckClients(t *testing.T) {
	t.Parallel()
	path := serve(t, newState())
	for _, text := range []string{
		"", "G", "GET /v1/info HTTP/1.1\r\n",
		"POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
	} {
		t.Run(fmt.Sprintf("%q", text), func(t *testing.T) {
			t.Parallel()
			c := dial(t, path)
			c.Write([]byte(text))
			start := time.Now()
			c.SetReadDeadline(start.Add(time.Minute))
			if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Error(err)
			}
			if took := time.Since(start); took > time.Minute-time.Second {
				t.Errorf("cut off after %v", took)
			}
		})
	}
	t.Run("reads nothing", func(t *testing.T) {
		t.Parallel()
		c := dial(t, path)
		c.SetWriteDeadline(time.Now().Add(time.Minute))
		start := time.Now()
		for {
			if _, err := c.Write([]byte("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
				break
			}
		}
		if took := time.Since(start); took > time.Minute-time.Second {
			t.Errorf("cut off after %v", took)
		}
	})
}

// TestGarbage: nothing that is sent makes the server end, or much memory of it.
func TestGarbage(t *testing.T) {
	path := serve(t, newState())
	big := bytes.Repeat([]byte("A"), 1<<20)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for _, text := range []string{
		"\x00\x01\x02\x03\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET /v1/info HTTP/1.1\r\n\r\n", // no Host
		"GET /v1/info HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
		"POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"GET /" + string(big) + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /v1/info HTTP/1.1\r\nHost: x\r\nX: " + string(big) + "\r\n\r\n",
	} {
		c := dial(t, path)
		c.SetDeadline(time.Now().Add(time.Minute))
		go c.Write([]byte(text))
		io.Copy(io.Discard, c)
		c.Close()
	}
	// 100 MiB of body: refused by its length, and as chunks.
	for _, head := range []string{
		"POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n",
		"POST /v1/forwards HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n6400000\r\n",
	} {
		c := dial(t, path)
		c.SetDeadline(time.Now().Add(time.Minute))
		go func() {
			c.Write([]byte(head))
			for range 100 {
				if _, err := c.Write(big); err != nil {
					return
				}
			}
		}()
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("a huge body is answered %v, %v", resp, err)
		}
		c.Close()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 1<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
	if status, _, _ := do(t, path, "GET", "/v1/info", ""); status != 200 {
		t.Errorf("status %d in the end", status)
	}
}

// TestPieces: a request may come in any pieces, and two in one.
func TestPieces(t *testing.T) {
	path := serve(t, newState())
	c := dial(t, path)
	c.SetDeadline(time.Now().Add(time.Minute))
	for _, b := range []byte("GET /v1/leases HTTP/1.1\r\nHost: x\r\n\r\n") {
		c.Write([]byte{b})
	}
	r := bufio.NewReader(c)
	next := func() {
		t.Helper()
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
			t.Errorf("status %d, %v", resp.StatusCode, err)
		}
	}
	next()
	c.Write([]byte(strings.Repeat("GET /v1/info HTTP/1.1\r\nHost: x\r\n\r\n", 2)))
	next()
	next()
}

// TestStrangers: other users are refused by the kernel's word, should they get as
// far as the socket.
func TestStrangers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become others")
	}
	path := serve(t, newState())
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const stranger = 65534
	ask := func() (answer string, err error) {
		done := make(chan struct{})
		go func() { // and its thread ends with it
			defer close(done)
			runtime.LockOSThread()
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, stranger, stranger, stranger); errno != 0 {
				err = errno
				return
			}
			var fd int
			if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return
			}
			defer unix.Close(fd)
			if err = unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				return
			}
			unix.Write(fd, []byte("GET /v1/info HTTP/1.1\r\nHost: x\r\n\r\n"))
			b := make([]byte, 4096)
			n, _ := unix.Read(fd, b)
			answer = string(b[:max(n, 0)])
		}()
		<-done
		return answer, err
	}
	if answer, err := ask(); err != syscall.EACCES {
		t.Errorf("connect to the socket of another user: %q, %v", answer, err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if answer, err := ask(); err != nil || !strings.HasPrefix(answer, "HTTP/1.1 403 ") || strings.Contains(answer, "tap0") {
		t.Errorf("a stranger is answered %q, %v", answer, err)
	}
}

// TestInsiders: whoever is in the guest's namespaces is refused.
func TestInsiders(t *testing.T) {
	inode := func(kind string) uint64 {
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+kind, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	// This process is the client.
	path := serve(t, newState(), func(c *Config) { c.Netns = inode("net") })
	if status, body, _ := do(t, path, "GET", "/v1/info", ""); status != 403 || !strings.Contains(body, "forbidden") {
		t.Errorf("from inside: %d %s", status, body)
	}
	path = serve(t, newState(), func(c *Config) { c.Netns, c.Userns = 1, 1 })
	if status, _, _ := do(t, path, "GET", "/v1/info", ""); status != 200 {
		t.Errorf("from outside: %d", status)
	}
}
