package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Ports of the servers on the host namespace's loopback. nginx has many: the
// sockets that a run of short connections leaves in TIME_WAIT would otherwise
// slow the next subject's run.
const (
	flowPort       = 7000
	nginxFirstPort = 8000
	nginxPorts     = 64
	firstPort      = 10000 // iperf3 servers and other numbers used once
	lastPort       = 32000 // below the ephemeral range
)

// port returns a number not used before.
func (b *bench) port() int {
	b.nextPort++
	if b.nextPort > lastPort {
		b.nextPort = firstPort
	}
	return b.nextPort
}

// webPort returns the next of nginx's ports.
func (b *bench) webPort() int {
	b.nextWeb++
	return nginxFirstPort + b.nextWeb%nginxPorts
}

// startServers starts nginx, dnsmasq and the flow server. They end with this
// process.
func (b *bench) startServers(ctx context.Context) error {
	if err := b.startNginx(ctx); err != nil {
		return err
	}
	if err := b.startDNS(ctx); err != nil {
		return err
	}
	_, err := b.flows.listen(net.JoinHostPort(loopback, strconv.Itoa(flowPort)))
	return err
}

const nginxConfig = `daemon off;
worker_processes 1;
pid %[1]s/nginx.pid;
error_log stderr error;
events { worker_connections 8192; }
http {
	access_log off;
	tcp_nodelay on;
	sendfile on;
	open_file_cache max=16;
	keepalive_requests 1000000000;
	client_body_temp_path %[1]s/nginx-body;
	proxy_temp_path %[1]s/nginx-proxy;
	fastcgi_temp_path %[1]s/nginx-fastcgi;
	uwsgi_temp_path %[1]s/nginx-uwsgi;
	scgi_temp_path %[1]s/nginx-scgi;
	server {
%[2]s		root %[1]s/www;
		location = /status { stub_status; }
	}
}
`

func (b *bench) startNginx(ctx context.Context) error {
	www := filepath.Join(b.work, "www")
	if err := os.MkdirAll(www, 0o755); err != nil {
		return fmt.Errorf("start nginx: %w", err)
	}
	file := strings.Repeat("usernet\n", 16)
	if err := os.WriteFile(filepath.Join(www, "small"), []byte(file), 0o644); err != nil {
		return fmt.Errorf("start nginx: %w", err)
	}
	var listen strings.Builder
	for i := range nginxPorts {
		fmt.Fprintf(&listen, "\t\tlisten %s:%d backlog=4096;\n", loopback, nginxFirstPort+i)
	}
	config := filepath.Join(b.work, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, nginxConfig, b.work, listen.String()), 0o644); err != nil {
		return fmt.Errorf("start nginx: %w", err)
	}
	return b.startServer(ctx, nginxFirstPort, "nginx", "-c", config, "-p", b.work, "-e", "stderr")
}

// startDNS serves any name below bench.test, with a TTL long enough for a
// cache to be allowed its work.
func (b *bench) startDNS(ctx context.Context) error {
	for file, count := range map[string]int{knownNames: 1000, newNames: 600_000} {
		var names strings.Builder
		for i := range count {
			fmt.Fprintf(&names, "%s%d.bench.test A\n", file, i)
		}
		if err := os.WriteFile(filepath.Join(b.work, file), []byte(names.String()), 0o644); err != nil {
			return fmt.Errorf("start dnsmasq: %w", err)
		}
	}
	args := []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts",
		"--listen-address=" + loopback, "--bind-interfaces", "--cache-size=0",
		"--address=/bench.test/192.0.2.7", "--local-ttl=300", "--log-facility=/dev/null",
	}
	return b.startServer(ctx, 53, "dnsmasq", args...)
}

// startServer starts a program and waits until it listens.
func (b *bench) startServer(ctx context.Context, port int, name string, args ...string) error {
	cmd := b.command(ctx, name, args...)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	return waitListening(cmd, port, name)
}

func waitListening(cmd *exec.Cmd, port int, name string) error {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if listening(port) {
			return nil
		}
		if !alive(cmd.Process.Pid) {
			return fmt.Errorf("start %s: it ended early; see its messages in the log", name)
		}
	}
	return fmt.Errorf("start %s: nothing listens on port %d", name, port)
}

// startIperf starts an iperf3 server that serves one client. The returned
// function ends it.
func (b *bench) startIperf(ctx context.Context) (port int, stop func(), err error) {
	port = b.port()
	cmd := b.command(ctx, "iperf3", "--server", "--one-off", "--bind", loopback, "--port", strconv.Itoa(port))
	if err := cmd.Start(); err != nil {
		return 0, nil, fmt.Errorf("start iperf3: %w", err)
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	if err := waitListening(cmd, port, "iperf3"); err != nil {
		stop()
		return 0, nil, err
	}
	return port, stop, nil
}

// requestsServed is nginx's own count of requests.
func requestsServed(ctx context.Context, port int) (int64, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(loopback, strconv.Itoa(port)))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /status HTTP/1.0\r\n\r\n"); err != nil {
		return 0, err
	}
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "server accepts handled requests") && lines.Scan() {
			f := strings.Fields(lines.Text())
			if len(f) == 3 {
				return strconv.ParseInt(f[2], 10, 64)
			}
		}
	}
	return 0, errors.New("read nginx status: no counters in it")
}

// The first byte on a connection to the flow server says what it is for.
const (
	flowEcho = 'E' // answer what is sent
	flowUp   = 'U' // take everything
	flowDown = 'D' // send for ever
)

// flowServer is the far end of the load that this program makes itself.
type flowServer struct {
	received atomic.Int64
}

// listen starts to serve and returns the address.
func (f *flowServer) listen(addr string) (string, error) {
	// Keepalive probes would wake a subject whose idleness is measured.
	config := net.ListenConfig{KeepAlive: -1}
	l, err := config.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return "", fmt.Errorf("start flow server: %w", err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(conn)
		}
	}()
	return l.Addr().String(), nil
}

func (f *flowServer) serve(conn net.Conn) {
	defer conn.Close()
	if conn.(*net.TCPConn).SetLinger(0) != nil {
		return
	}
	var kind [1]byte
	if _, err := io.ReadFull(conn, kind[:]); err != nil {
		return
	}
	switch kind[0] {
	case flowEcho:
		buf := make([]byte, 64)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			if _, err := conn.Write(buf[:n]); err != nil {
				return
			}
		}
	case flowUp:
		buf := make([]byte, flowBuffer)
		for {
			n, err := conn.Read(buf)
			f.received.Add(int64(n))
			if err != nil {
				return
			}
		}
	case flowDown:
		for {
			if _, err := conn.Write(flowZeros[:]); err != nil {
				return
			}
		}
	}
}
