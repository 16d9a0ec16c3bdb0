package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/usernet/usernet"
)

// TestCNIFlags: what a configuration says, the command line of the daemon says.
func TestCNIFlags(t *testing.T) {
	for _, tt := range []struct{ conf, args, want string }{
		{`{}`, "", ""},
		{`{"mtu": 1500, "cidr": "10.9.0.0/24", "cidr6": "fd09::/64", "ipv6": "on", "hostLoopback": true}`, "",
			"--mtu 1500 --cidr 10.9.0.0/24 --cidr6 fd09::/64 --ipv6 on --host-loopback"},
		{`{"ipv6": false}`, "", "--ipv6 off"},
		{`{"ipv6": true}`, "", "--ipv6 on"},
		{`{"allow": ["192.0.2.0/24:80/tcp", "[2001:db8::/32]:443"], "deny": ["10.0.0.0/8"]}`, "",
			"--allow 192.0.2.0/24:80/tcp --allow [2001:db8::/32]:443 --deny 10.0.0.0/8"},
		{`{"dns": {"nameservers": ["192.0.2.53", "10.0.2.3", "fd75:736e:6574::3"], "search": ["a.test"]}}`, "",
			"--dns 192.0.2.53:53 --dns-search a.test"},
		{`{"dns": {"nameservers": ["192.0.2.53"], "search": ["a.test"]}, "runtimeConfig": {"dns": {"servers": ["192.0.2.54"], "searches": ["b.test"]}}}`, "",
			"--dns 192.0.2.54:53 --dns-search b.test"},
		{`{"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80}, {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "::1"},
			{"hostPort": 81, "containerPort": 81, "protocol": "tcp", "hostIP": "127.0.0.1"}]}}`, "",
			"--publish 8080:80/tcp --publish [::1]:53:5353/udp --publish 127.0.0.1:81:81/tcp"},
		{`{"runtimeConfig": {"ips": ["10.0.2.50/24", "fd75:736e:6574::50"], "mac": "02:00:00:00:00:01"}}`, "",
			"--mac 02:00:00:00:00:01 --ip 10.0.2.50 --ip fd75:736e:6574::50"},
		{`{"args": {"cni": {"ips": ["10.0.2.51"], "mac": "02:00:00:00:00:02"}}}`, "IP=10.0.2.52;MAC=02:00:00:00:00:03",
			"--mac 02:00:00:00:00:02 --ip 10.0.2.51"},
		{`{}`, "IgnoreUnknown=1;IP=10.0.2.52,fd75:736e:6574::52;MAC=02:00:00:00:00:03;X=Y", "--mac 02:00:00:00:00:03 --ip 10.0.2.52 --ip fd75:736e:6574::52"},
		{`{"name": "apps", "isolate": true, "dns": {"nameservers": ["192.0.2.53"], "search": ["a.test"]},
			"runtimeConfig": {"aliases": {"apps": ["Web", "c1"], "other": ["db"]}, "dns": {"servers": ["192.0.2.54"], "searches": ["b.test"]}, "ips": ["10.89.7.50/24"]}}`, "",
			"--network apps --name c1 --alias web --isolate --ip 10.89.7.50 --dns 192.0.2.53:53 --dns-search a.test"},
		{`{"name": "apps", "runtimeConfig": {"aliases": ["a", "a"]}}`, "IgnoreUnknown=1;K8S_POD_NAME=Web", "--network apps --name web --alias a"},
		{`{"name": "apps"}`, "IgnoreUnknown=1;K8S_POD_NAME=web;K8S_POD_NAMESPACE=default", "--network apps --name c1 --alias web"},
		{`{"name": "slirp", "type": "slirp", "isolate": true, "runtimeConfig": {"aliases": ["a"]}}`, "", "--mtu 1500 --ipv6 off --host-loopback"},
		{`{"type": "slirp"}`, "", "--mtu 1500 --ipv6 off --host-loopback"},
		{`{"type": "slirp", "mtu": 9000, "ipv6": true, "hostLoopback": false}`, "", "--mtu 9000 --ipv6 on"},
	} {
		c, err := parseCNI(&skel.CmdArgs{StdinData: []byte(tt.conf), Netns: "/run/netns/box", ContainerID: "c1", IfName: "eth0", Args: tt.args})
		if err != nil {
			t.Errorf("%s: %v", tt.conf, err)
			continue
		}
		if diff := cmp.Diff(tt.want, strings.Join(c.flags(), " ")); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.conf, diff)
		}
		if c.config.Network != "" {
			continue // whose subnet is the network's to say
		}
		// The daemon understands it the same way.
		var a attach
		flags := newFlagSet()
		for _, g := range a.groups() {
			flags.AddFlagSet(g.flags)
		}
		if err := flags.Parse(append([]string{"--netns", "/run/netns/box", "--ifname", "eth0"}, c.flags()...)); err != nil {
			t.Errorf("%s: %v", tt.conf, err)
			continue
		}
		if got, want := a.config.Addresses(), c.config.Addresses(); got != want {
			t.Errorf("%s: addresses %+v, want %+v", tt.conf, got, want)
		}
		if diff := cmp.Diff(c.config.Publish, a.config.Publish, cmp.Comparer(func(a, b usernet.Forward) bool { return a == b })); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.conf, diff)
		}
	}
}

// FuzzCNI: whatever a configuration holds, there is an error or flags that the
// command line takes.
func FuzzCNI(f *testing.F) {
	f.Add(`{"name": "n", "mtu": 1500, "ipv6": true, "allow": ["10.0.0.0/8"]}`, "IP=10.0.2.5")
	f.Add(`{"name": "n"}`, "IP=10.9.0.5") // in a subnet that only the network knows
	f.Add(`{"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 2, "hostIP": "::ffff:1.2.3.4"}], "aliases": {"n": ["a"]}}}`, "MAC=02:00:00:00:00:03")
	f.Add(`{"cniVersion": "0.4.0", "prevResult": {"ips": [{"version": "4", "address": "10.0.2.5/24", "interface": 7}]}}`, "")
	f.Add(`{"dns": {"nameservers": ["fe80::1%eth0"], "search": ["a,b"]}, "runtimeConfig": {"ips": ["::ffff:10.0.2.7/24"]}}`, "")
	f.Fuzz(func(t *testing.T, conf, args string) {
		c, err := parseCNI(&skel.CmdArgs{StdinData: []byte(conf), Netns: "/run/netns/box", IfName: "eth0", Args: args})
		if err != nil {
			if strings.ContainsRune(cniError(0, err).Msg, '\n') {
				t.Errorf("%q is not one line", err)
			}
			return
		}
		var a attach
		var cmd cobra.Command
		for _, g := range a.groups() {
			cmd.Flags().AddFlagSet(g.flags)
		}
		if err := cmd.ParseFlags(append([]string{"--netns", "/run/netns/box", "--ifname", "eth0"}, c.flags()...)); err != nil {
			t.Errorf("%q: %v", c.flags(), err)
			return
		}
		a.settle(&cmd)
		if err := a.config.Validate(); err != nil {
			t.Errorf("%q: %v", c.flags(), err)
		}
	})
}

// TestCNIStore: records are found again, and one command at a time has one.
func TestCNIStore(t *testing.T) {
	s := &cniStore{t.TempDir()}
	a := cniAttachment{"net", "c1", "eth0"}
	if s.load(a) != nil || len(s.list()) != 0 {
		t.Error("an empty store is not empty")
	}
	r := cniRecord{cniAttachment: a, Netns: "/run/netns/box", Inode: 5, process: processOf(os.Getpid())}
	if err := s.save(r); err != nil {
		t.Fatal(err)
	}
	r.Socket = s.socket(a)
	if got := s.load(a); got == nil || *got != r || !got.alive() {
		t.Errorf("got %+v, want %+v", got, r)
	}
	if s.load(cniAttachment{"net", "c1", "eth1"}) != nil {
		t.Error("another attachment has the record")
	}
	// Half a record is none.
	if err := os.WriteFile(s.path(a, ".json"), []byte(`{"network": "net"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.load(a) != nil || len(s.list()) != 0 {
		t.Error("half a record counts")
	}
	if err := s.remove(t.Context(), a); err != nil {
		t.Error(err)
	}

	var inside, most int
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			unlock, err := s.lock(t.Context(), a)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			inside++
			most = max(most, inside)
			mu.Unlock()
			time.Sleep(5 * time.Millisecond)
			mu.Lock()
			inside--
			mu.Unlock()
			unlock()
		})
	}
	all.Wait()
	if most != 1 {
		t.Errorf("%d had the lock at a time", most)
	}
	unlock, err := s.lock(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.lock(ctx, a); cniError(0, err).Code != 11 {
		t.Errorf("the lock was had: %v", err)
	}
	unlock()
	if entries, _ := os.ReadDir(s.dir); len(entries) != 0 {
		t.Errorf("left %v", entries)
	}
}

// TestCNIProcess: a number that was used again is another process.
func TestCNIProcess(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := processOf(cmd.Process.Pid)
	other := process{p.PID, p.Start + 1}
	if !p.alive() || other.alive() {
		t.Errorf("alive: %v, of another start %v", p.alive(), other.alive())
	}
	if err := other.stop(); err != nil || !p.alive() {
		t.Errorf("stopped another: %v", err)
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	// It is a zombie until somebody waits for it.
	if p.alive() {
		t.Error("alive after its end")
	}
	_ = cmd.Wait()
	if err := p.stop(); err != nil || p.alive() || (process{}).alive() {
		t.Errorf("after its end: %v", err)
	}
}

// TestCNIEnvironment: the daemon gets nothing that is meant for the plugin or
// its runtime.
func TestCNIEnvironment(t *testing.T) {
	got := daemonEnv([]string{"XDG_RUNTIME_DIR=/run/user/0", "PATH=/bin", "CNI_COMMAND=ADD", "NOTIFY_SOCKET=/run/n", "LISTEN_FDS=1", "LISTEN_PID=1", "WATCHDOG_USEC=1"}, "/run")
	if diff := cmp.Diff([]string{"PATH=/bin", "XDG_RUNTIME_DIR=/run"}, got); diff != "" {
		t.Error(diff)
	}
}

// TestCNIRecord: a record is JSON with the names that other programs may read.
func TestCNIRecord(t *testing.T) {
	b, err := json.Marshal(cniRecord{cniAttachment{"net", "c1", "eth0"}, "/run/netns/box", 5, "/run/s", process{1, 2}})
	const want = `{"network":"net","container_id":"c1","ifname":"eth0","netns":"/run/netns/box","netns_inode":5,"socket":"/run/s","pid":1,"start":2}`
	if err != nil || string(b) != want {
		t.Errorf("got %s, %v", b, err)
	}
}
