package control

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet"
)

// state is a Network that only remembers: this package is about who asks what.
// The tests with a real network are in internal/e2e.
type state struct {
	mu       sync.Mutex
	forwards []usernet.ForwardInfo
	records  []usernet.Record
	flows    []usernet.Flow
	next     int
	err      error // of everything that can fail
}

func newState() *state {
	at := netip.MustParseAddrPort("10.0.2.100:5000")
	return &state{
		flows:   []usernet.Flow{{ID: "1", Protocol: "tcp", Direction: "outbound", Guest: at, Remote: at, Host: at, State: "established"}},
		records: []usernet.Record{{Name: "a.test", Addrs: []netip.Addr{at.Addr()}}},
	}
}

func (s *state) Info() usernet.Info {
	a := usernet.Config{}.Addresses()
	return usernet.Info{
		Ready: true, Netns: "/proc/1/ns/net", PID: 1, NetnsInode: 1, Interface: "tap0", Link: "tap", MAC: "02:00:00:00:00:01",
		IPv4: usernet.Subnet{Prefix: a.Prefix4, Gateway: a.Gateway4, DNS: a.DNS4, Guest: a.Guest4},
		IPv6: &usernet.Subnet{Prefix: a.Prefix6, Gateway: a.Gateway6, DNS: a.DNS6, Guest: a.Guest6}, HostPorts: []uint16{1},
	}
}

func (s *state) Stats() usernet.Stats {
	return usernet.Stats{Flows: usernet.FlowStats{TCP: 7, TCPNow: 3}, Dropped: usernet.DropStats{Spoofed: 5}, DNS: &usernet.DNSStats{Queries: 9}, DHCP6: &usernet.DHCPStats{}, Forwards: 2}
}

func (s *state) Flows(context.Context) ([]usernet.Flow, error) { return s.flows, s.err }

func (s *state) KillFlow(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.flows)
	s.flows = slices.DeleteFunc(s.flows, func(f usernet.Flow) bool { return f.ID == id })
	if len(s.flows) == before {
		return usernet.ErrNoFlow
	}
	return s.err
}

func (s *state) Leases() []usernet.Lease {
	return []usernet.Lease{{Addr: netip.MustParseAddr("10.0.2.15"), MAC: "02:00:00:00:00:01", Client: "01", Hostname: "guest"}}
}

func (s *state) Records() ([]usernet.Record, error) { return s.records, s.err }

func (s *state) SetRecord(name string, addrs ...netip.Addr) error {
	if len(addrs) == 0 {
		return fmt.Errorf("no address: %w", usernet.ErrConfig)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = append(s.records, usernet.Record{Name: name, Addrs: addrs})
	return s.err
}

func (s *state) AddRecord(name string, addrs ...netip.Addr) error {
	if len(addrs) == 0 {
		return fmt.Errorf("no address: %w", usernet.ErrConfig)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.records {
		if s.records[i].Name == name {
			s.records[i].Addrs = append(s.records[i].Addrs, addrs...)
			return s.err
		}
	}
	s.records = append(s.records, usernet.Record{Name: name, Addrs: addrs})
	return s.err
}

func (s *state) RemoveRecord(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.records)
	s.records = slices.DeleteFunc(s.records, func(r usernet.Record) bool { return r.Name == name })
	if len(s.records) == before {
		return usernet.ErrNoRecord
	}
	return s.err
}

func (s *state) Forwards() []usernet.ForwardInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.forwards)
}

func (s *state) AddForward(_ context.Context, f usernet.Forward) (usernet.ForwardInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, have := range s.forwards {
		if have.Host == f.Host && have.HostPath == f.HostPath {
			return usernet.ForwardInfo{}, fmt.Errorf("listen: %w", syscall.EADDRINUSE)
		}
	}
	if f.Host.Port() == 80 {
		return usernet.ForwardInfo{}, fmt.Errorf("listen: %w", syscall.EACCES)
	}
	s.next++
	info := usernet.ForwardInfo{ID: fmt.Sprint(s.next), Forward: f}
	if s.err == nil {
		s.forwards = append(s.forwards, info)
	}
	return info, s.err
}

func (s *state) Capture(_ context.Context, w io.Writer, o usernet.CaptureOptions) error {
	if o.Filter == "bad" {
		return fmt.Errorf("filter: %w", usernet.ErrConfig)
	}
	if s.err != nil {
		return s.err
	}
	_, err := io.WriteString(w, "frames")
	return err
}
func (s *state) LogLevelChanged() {}

func (s *state) RemoveForward(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.forwards)
	s.forwards = slices.DeleteFunc(s.forwards, func(f usernet.ForwardInfo) bool { return f.ID == id })
	if len(s.forwards) == before {
		return usernet.ErrNoForward
	}
	return s.err
}

// serve serves a network on a real socket, whose path it returns.
func serve(t testing.TB, n Network, edit ...func(*Config)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Network: n, Version: "test", Level: new(slog.LevelVar)}
	for _, e := range edit {
		e(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- New(cfg).Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("the server does not end")
		}
	})
	return path
}

// do does one request on a connection of its own.
func do(t testing.TB, path, method, target, body string) (status int, answer string, header http.Header) {
	t.Helper()
	c := NewClient(path)
	defer c.http.CloseIdleConnections()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "http://x"+target, r)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	return resp.StatusCode, string(b), resp.Header
}

func dial(t testing.TB, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
