package bench

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// The host's TCP servers run in a process of their own, as they do outside: in
// this one they would share the scheduler with the engine.

// hostRole names the variable that makes a process of this binary a server.
const hostRole = "USERNET_BENCH_HOST"

// message is the length of a request and of an answer.
const message = 100

// servers are what a connection gets.
var servers = map[string]func(net.Conn) error{
	"sink": func(c net.Conn) error {
		buf := make([]byte, 1<<20)
		for {
			if _, err := c.Read(buf); err != nil {
				return err
			}
		}
	},
	"source": func(c net.Conn) error {
		buf := make([]byte, 1<<20)
		for {
			if _, err := c.Write(buf); err != nil {
				return err
			}
		}
	},
	"echo": func(c net.Conn) error {
		buf := make([]byte, message)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return err
			}
			if _, err := c.Write(buf); err != nil {
				return err
			}
		}
	},
	"close": func(net.Conn) error { return nil },
}

func TestMain(m *testing.M) {
	if role := os.Getenv(hostRole); role != "" {
		if err := serveHost(servers[role]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serveHost serves on loopback until the input ends.
func serveHost(handle func(net.Conn) error) error {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr().(*net.TCPAddr).Port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// startHost starts a server and returns its port.
func startHost(t testing.TB, role string) uint16 {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), hostRole+"="+role)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.ParseUint(strings.TrimSpace(line), 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(port)
}
