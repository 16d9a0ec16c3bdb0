package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// debianPlugins is where Debian has CNI's own plugins.
const debianPlugins = "/usr/lib/cni"

// cniTool builds the release of cnitool that testdata/cnitool names, once. The
// directory is one for plugins too: usernet is there under two names.
var cniTool = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "cnitool-")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "cnitool"), "github.com/containernetworking/cni/cnitool")
	cmd.Dir = "testdata/cnitool"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return dir, os.Chmod(dir, 0o755)
})

// A cniWorld is a host whose runtime uses CNI.
type cniWorld struct {
	*rig.Net
	from    *rig.Node // where the runtime is
	bin     string    // with the plugin and cnitool
	conf    string    // with configurations
	runtime string    // the runtime directory, whose usernet/cni is the plugin's
}

// newCNI makes a world whose runtime is root in the user namespace of its host,
// or without root an ordinary user there.
func newCNI(t *testing.T, root bool, o rig.Options) *cniWorld {
	t.Helper()
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ip", "curl")
	tool, err := cniTool()
	if err != nil {
		rig.Missing(t, "cannot build cnitool: %v", err)
	}
	w := &cniWorld{Net: rig.New(t, o)}
	// cnitool remembers results there.
	w.Host.Must(t, "mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/var/lib")
	w.from, w.runtime = w.Host, "/run"
	if !root {
		w.from, w.runtime = w.User, "/run/user/1000"
	}
	w.bin, w.conf = filepath.Join(w.Dir, "cni-bin"), filepath.Join(w.Dir, "net.d")
	for _, dir := range []string{w.bin, w.conf} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"usernet": rig.Binary(t), "slirp": rig.Binary(t), "cnitool": filepath.Join(tool, "cnitool")} {
		if err := os.Symlink(to, filepath.Join(w.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// env is the environment of the runtime.
func (w *cniWorld) env(more ...string) []string {
	env := []string{"CNI_PATH=" + w.bin + ":" + debianPlugins, "NETCONFPATH=" + w.conf}
	if w.from == w.User {
		env = append(env, "XDG_RUNTIME_DIR="+w.runtime)
	}
	return append(env, more...)
}

// network writes a configuration, or a list of them.
func (w *cniWorld) network(t *testing.T, name string, plugins ...string) {
	t.Helper()
	file, text := name+".conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [%s]}`, name, strings.Join(plugins, ", "))
	if len(plugins) == 1 && strings.Contains(plugins[0], `"name"`) {
		file, text = name+".conf", plugins[0]
	}
	if err := os.WriteFile(filepath.Join(w.conf, file), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// tool runs cnitool, where is the name of a namespace to run it in.
func (w *cniWorld) tool(t *testing.T, where string, env []string, args ...string) rig.Output {
	t.Helper()
	var line []string
	if where != "" {
		line = []string{"ip", "netns", "exec", where}
	}
	line = append(append(append(line, "env"), w.env(env...)...), filepath.Join(w.bin, "cnitool"))
	return w.from.Run(t, append(line, args...)...)
}

// mustTool is tool for what has to succeed.
func (w *cniWorld) mustTool(t *testing.T, where string, env []string, args ...string) string {
	t.Helper()
	out := w.tool(t, where, env, args...)
	if out.Code != 0 {
		t.Fatalf("cnitool %v: status %d\n%s%s\n%v", args, out.Code, out.Stdout, out.Stderr, w.logs())
	}
	return out.Stdout
}

// A cniAnswer is a plugin's error, or its result.
type cniAnswer struct {
	Status     int `json:"-"`
	Code       int
	Msg        string
	CNIVersion string
	Interfaces []struct {
		Name, Mac, Sandbox string
		Mtu                int
	}
	IPs []struct {
		Address, Gateway string
		Interface        *int
	}
	Routes []struct{ Dst, GW string }
	DNS    struct{ Nameservers, Search, Options []string }
}

// plugin runs the plugin as a runtime does: orders in the environment, the
// configuration on stdin, the answer on stdout alone.
func (w *cniWorld) plugin(t *testing.T, command, container, netns, conf string, env ...string) (a cniAnswer, text string) {
	t.Helper()
	stdin, err := os.CreateTemp(w.Dir, "conf")
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if _, err := stdin.WriteString(conf); err != nil {
		t.Fatal(err)
	}
	if _, err := stdin.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	env = append([]string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + container, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0"}, env...)
	p := w.from.Exec(t, rig.Command{Args: []string{filepath.Join(w.bin, "usernet")}, Env: w.env(env...), Stdin: stdin})
	code, ok := p.Wait(20 * time.Second)
	if !ok {
		t.Fatalf("%s has not ended", command)
	}
	if p.Stderr() != "" {
		t.Errorf("%s wrote to stderr: %s", command, p.Stderr())
	}
	a.Status = code
	if text = p.Stdout(); text != "" {
		if err := json.Unmarshal([]byte(text), &a); err != nil {
			t.Fatalf("%s: %v: %q", command, err, text)
		}
	}
	return a, text
}

// logs are what daemons have said, for messages of tests.
func (w *cniWorld) logs() string {
	out, _ := w.from.TryExec(rig.Command{Args: []string{"sh", "-c", "ls -l " + w.runtime + "/usernet/cni; cat " + w.runtime + "/usernet/cni/*.log"}})
	if out == nil {
		return ""
	}
	out.Wait(5 * time.Second)
	return out.Stdout()
}

// wantClean ends the test if anything is left of attachments.
func (w *cniWorld) wantClean(t *testing.T) {
	t.Helper()
	w.WantNothingLeft(t, 3*time.Second, "usernet", "usernet-agent", "usernet-hub")
	var out string
	if !rig.Poll(time.Second, func() bool {
		out = w.from.Run(t, "find", w.runtime+"/usernet", "-mindepth", "1", "!", "-type", "d", "!", "-name", ".lock").Stdout
		return out == ""
	}) {
		t.Errorf("left below %s:\n%s", w.runtime, out)
	}
}

// netns makes network namespaces with names, and returns the path of the last.
func (w *cniWorld) netns(t *testing.T, names ...string) string {
	t.Helper()
	for _, name := range names {
		w.Host.Must(t, "ip", "netns", "add", name)
	}
	return "/run/netns/" + names[len(names)-1]
}

// TestCNI: a container in a chain of usernet and tuning, and in it two more on a
// bridge: they reach each other, the world by way of usernet, and are reached by
// way of two publishings. All of it is root in its user namespace at most.
func TestCNI(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"bridge", "portmap", "tuning"} {
		if _, err := os.Stat(filepath.Join(debianPlugins, name)); err != nil {
			rig.Missing(t, "CNI plugin %s of containernetworking-plugins: %v", name, err)
		}
	}
	rig.NeedTools(t, "iptables", "ping", "busybox")
	w := newCNI(t, true, rig.Options{})
	w.netns(t, "outer", "one", "two")
	w.network(t, "outer",
		`{"type": "usernet", "capabilities": {"portMappings": true, "mac": true}, "mtu": 9000, "cidr": "10.0.2.0/24", "cidr6": "fd75:736e:6574::/64", "dns": {"search": ["example.test"], "options": ["ndots:2"]}}`,
		`{"type": "tuning", "sysctl": {"net.core.somaxconn": "777"}, "mtu": 8000}`)
	w.network(t, "nested",
		`{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
		  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd88::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}`,
		`{"type": "portmap", "capabilities": {"portMappings": true}}`,
		`{"type": "tuning", "sysctl": {"net.core.somaxconn": "778"}}`)
	outerArgs := []string{`CAP_ARGS={"portMappings":[{"hostPort":18080,"containerPort":8080,"protocol":"tcp"}],"mac":"02:00:00:00:00:77"}`}
	oneArgs := []string{`CAP_ARGS={"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}`}

	var a cniAnswer
	if err := json.Unmarshal([]byte(w.mustTool(t, "", outerArgs, "add", "outer", "/run/netns/outer")), &a); err != nil {
		t.Fatal(err)
	}
	switch {
	case len(a.Interfaces) != 1 || a.Interfaces[0].Name != "eth0" || a.Interfaces[0].Sandbox != "/run/netns/outer" || a.Interfaces[0].Mac != "02:00:00:00:00:77":
		t.Errorf("interfaces: %+v", a.Interfaces)
	case len(a.IPs) != 2 || a.IPs[0].Address != "10.0.2.100/24" || a.IPs[0].Gateway != "10.0.2.2" || a.IPs[0].Interface == nil || *a.IPs[0].Interface != 0 ||
		a.IPs[1].Address != "fd75:736e:6574::100/64" || a.IPs[1].Gateway != "fd75:736e:6574::2":
		t.Errorf("ips: %+v", a.IPs)
	case len(a.Routes) != 2 || a.Routes[0].Dst != "0.0.0.0/0" || a.Routes[0].GW != "10.0.2.2" || a.Routes[1].Dst != "::/0":
		t.Errorf("routes: %+v", a.Routes)
	case !slices.Equal(a.DNS.Nameservers, []string{"10.0.2.3", "fd75:736e:6574::3"}) || !slices.Equal(a.DNS.Search, []string{"example.test"}) || !slices.Equal(a.DNS.Options, []string{"ndots:2"}):
		t.Errorf("dns: %+v", a.DNS)
	}
	w.mustTool(t, "outer", oneArgs, "add", "nested", "/run/netns/one")
	w.mustTool(t, "outer", nil, "add", "nested", "/run/netns/two")
	inside := func(where string, args ...string) string {
		t.Helper()
		return w.Host.Must(t, append([]string{"ip", "netns", "exec", where}, args...)...)
	}
	if got := inside("outer", "cat", "/proc/sys/net/core/somaxconn", "/sys/class/net/eth0/mtu"); got != "777\n8000\n" {
		t.Errorf("tuning left %q", got)
	}
	page := filepath.Join(w.Dir, "www")
	if err := os.Mkdir(page, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(page, "page"), []byte("inside\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w.Host.Exec(t, rig.Command{Args: []string{"ip", "netns", "exec", "one", "busybox", "httpd", "-f", "-p", "80", "-h", page}})
	address := strings.Fields(inside("one", "ip", "-4", "-o", "address", "show", "eth0"))[3]
	one := address[:strings.IndexByte(address, '/')]
	inside("two", "ping", "-c", "1", "-W", "5", one)
	if got := inside("two", "curl", "-sS", "-m", "5", "--retry", "5", "--retry-connrefused", "http://"+one+"/page"); got != "inside\n" {
		t.Errorf("two got %q of one", got)
	}
	families(t, func(t *testing.T, six bool) {
		for _, where := range []string{"outer", "one", "two"} {
			if got := inside(where, "curl", "-sS", "-g", "-m", "10", "http://"+web(six, rig.Services.HTTP)+"/ok"); got != "ok\n" {
				t.Errorf("%s got %q of the internet", where, got)
			}
		}
	})
	if got := w.Internet.Must(t, "curl", "-sS", "-m", "10", "http://"+at(rig.Host4, 18080)+"/page"); got != "inside\n" {
		t.Errorf("the internet got %q of one", got)
	}
	// The commands that look inside find the network by its namespace.
	if got := w.Host.Must(t, rig.Binary(t), "forward", "list", "--netns", "/run/netns/outer"); !strings.Contains(got, "18080") {
		t.Errorf("forward list: %s", got)
	}

	w.mustTool(t, "", outerArgs, "check", "outer", "/run/netns/outer")
	// Not of one: the CHECK of portmap 1.1 looks for its rules of IPv4 among those
	// of IPv6 too, and fails with any port.
	w.mustTool(t, "outer", nil, "check", "nested", "/run/netns/two")
	w.mustTool(t, "outer", nil, "del", "nested", "/run/netns/two")
	w.mustTool(t, "outer", oneArgs, "del", "nested", "/run/netns/one")
	w.mustTool(t, "", outerArgs, "del", "outer", "/run/netns/outer")
	if out := w.Host.Run(t, "ip", "-n", "outer", "link", "show", "eth0"); out.Code == 0 {
		t.Errorf("after del: %s", out.Stdout)
	}
	w.wantClean(t)
	w.mustTool(t, "", outerArgs, "del", "outer", "/run/netns/outer") // again
}

// TestCNISlirp: an ordinary user's configuration for the plugin that spawned
// slirp4netns, as its manual has it, with a container that is a process.
func TestCNISlirp(t *testing.T) {
	t.Parallel()
	w := newCNI(t, false, rig.Options{})
	w.network(t, "slirp", `{"name": "slirp", "type": "slirp", "mtu": 1500}`)
	guest := w.Guest(t)
	w.Host.ServeOn(t, false, "127.0.0.1")
	out := w.mustTool(t, "", nil, "add", "slirp", guest.NetnsPath())
	if !strings.Contains(out, "10.0.2.100") {
		t.Errorf("the result is %s", out)
	}
	if got := guest.Must(t, "cat", "/sys/class/net/eth0/mtu"); got != "1500\n" {
		t.Errorf("MTU %s", got)
	}
	for _, addr := range []string{web(false, rig.Services.HTTP), at(rig.Current().Gateway4, rig.Services.HTTP)} {
		if got := guest.Must(t, "curl", "-sS", "-m", "10", "http://"+addr+"/ok"); got != "ok\n" {
			t.Errorf("%s: %q", addr, got)
		}
	}
	w.mustTool(t, "", nil, "del", "slirp", guest.NetnsPath())
	w.wantClean(t)
}

// TestCNIRoot: the real root.
func TestCNIRoot(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	w := newCNI(t, true, rig.Options{Root: true})
	w.network(t, "net", `{"type": "usernet"}`)
	w.netns(t, "box")
	w.mustTool(t, "", []string{"XDG_RUNTIME_DIR=/run/user/1000"}, "add", "net", "/run/netns/box")
	if got := w.Host.Must(t, "ip", "netns", "exec", "box", "curl", "-sS", "-m", "10", "http://"+web(false, rig.Services.HTTP)+"/ok"); got != "ok\n" {
		t.Errorf("got %q", got)
	}
	if got := w.Host.Must(t, "stat", "-c", "%a", "/run/usernet", "/run/usernet/cni"); got != "700\n700\n" {
		t.Errorf("modes %q", got)
	}
	w.mustTool(t, "", nil, "check", "net", "/run/netns/box")
	w.mustTool(t, "", nil, "del", "net", "/run/netns/box")
	w.wantClean(t)
}

// TestCNILife: what a runtime meets when things go wrong.
func TestCNILife(t *testing.T) {
	t.Parallel()
	w := newCNI(t, true, rig.Options{})
	box := w.netns(t, "box")
	const conf = `{"cniVersion": "1.1.0", "name": "net", "type": "usernet", "cidr": "10.0.2.0/24", "runtimeConfig": {"portMappings": [{"hostPort": 18080, "containerPort": 80}]}}`
	with := func(field, value string) string { return fmt.Sprintf("%s, %q: %s}", conf[:len(conf)-1], field, value) }
	add := func() string {
		t.Helper()
		a, text := w.plugin(t, "ADD", "c1", box, conf)
		if a.Status != 0 {
			t.Fatalf("ADD: %s\n%s", text, w.logs())
		}
		return text
	}
	wantError := func(what string, code int, words string, a cniAnswer, text string) {
		t.Helper()
		if a.Status != 1 || a.Code != code || !strings.Contains(a.Msg, words) {
			t.Errorf("%s: status %d, %s; want code %d and %q", what, a.Status, text, code, words)
		}
	}
	mustPlugin := func(command, conf string) {
		t.Helper()
		if a, text := w.plugin(t, command, "c1", box, conf); a.Status != 0 || text != "" {
			t.Errorf("%s: status %d, %s", command, a.Status, text)
		}
	}
	daemon := func() string {
		t.Helper()
		var r struct {
			PID int `json:"pid"`
		}
		text := w.Host.Must(t, "sh", "-c", "cat /run/usernet/cni/*.json")
		if err := json.Unmarshal([]byte(text), &r); err != nil {
			t.Fatal(err)
		}
		return itoa(r.PID)
	}

	// Never added.
	mustPlugin("DEL", conf)
	mustPlugin("STATUS", conf)
	_, version := w.plugin(t, "VERSION", "", "", "")
	if !strings.Contains(version, `"supportedVersions"`) || !strings.Contains(version, `"0.3.1"`) || !strings.Contains(version, `"1.1.0"`) {
		t.Errorf("VERSION: %s", version)
	}

	result := add()
	a, text := w.plugin(t, "ADD", "c1", box, conf)
	wantError("ADD again", 101, "DEL it first", a, text)
	check := func() (cniAnswer, string) {
		t.Helper()
		return w.plugin(t, "CHECK", "c1", box, with("prevResult", result))
	}
	if a, text := check(); a.Status != 0 {
		t.Errorf("CHECK: %s", text)
	}
	a, text = w.plugin(t, "CHECK", "c2", box, with("prevResult", result))
	wantError("CHECK of another", 102, "was not added", a, text)
	a, text = w.plugin(t, "CHECK", "c1", box, conf)
	wantError("CHECK of nothing", 7, "prevResult", a, text)

	// What the daemon holds is not the runtime's: this is how it would be seen.
	if fds := w.Host.Must(t, "sh", "-c", "readlink /proc/"+daemon()+"/fd/[012]"); !strings.HasPrefix(fds, "/dev/null\n/dev/null\n/run/usernet/cni/") {
		t.Errorf("the daemon's descriptors are %q", fds)
	}
	if env := w.Host.Must(t, "sh", "-c", "tr '\\0' '\\n' </proc/"+daemon()+"/environ"); strings.Contains(env, "CNI_") {
		t.Errorf("the daemon's environment is %q", env)
	}

	// An address, a port, the interface and the daemon go, one after another.
	w.Host.Must(t, "ip", "-n", "box", "address", "del", "10.0.2.100/24", "dev", "eth0")
	a, text = check()
	wantError("CHECK without address", 102, "10.0.2.100/24 is gone", a, text)
	w.Host.Must(t, "ip", "-n", "box", "address", "add", "10.0.2.100/24", "dev", "eth0")
	a, text = check()
	wantError("CHECK without route", 102, "default route is gone", a, text)
	w.Host.Must(t, "ip", "-n", "box", "route", "add", "default", "via", "10.0.2.2")
	id := strings.Fields(w.Host.Must(t, "sh", "-c", rig.Binary(t)+" forward list --netns box | tail -n 1"))[0]
	w.Host.Must(t, rig.Binary(t), "forward", "remove", "--netns", "box", id)
	a, text = check()
	wantError("CHECK without port", 102, "no longer published", a, text)
	w.Host.Must(t, "kill", "-9", daemon())
	a, text = check()
	wantError("CHECK without daemon", 102, "has ended", a, text)
	mustPlugin("DEL", conf)
	w.wantClean(t)

	// An ADD needs no DEL after a crash, nor does the plugin's own crash leave
	// a daemon that nobody knows.
	add()
	w.Host.Must(t, "kill", "-9", daemon())
	add()
	w.Host.Must(t, "sh", "-c", "rm /run/usernet/cni/*.json")
	mustPlugin("DEL", `{"cniVersion": "1.1.0", "name": "net", "type": "usernet", "mtu": "bad"}`)
	w.wantClean(t)

	// The namespace goes first.
	add()
	w.Host.Must(t, "ip", "netns", "del", "box")
	w.WantNothingLeft(t, 3*time.Second, "usernet")
	mustPlugin("DEL", conf)
	w.wantClean(t)
	w.netns(t, "box", "other")

	// GC ends what is not valid, in this network alone.
	add()
	if a, text := w.plugin(t, "ADD", "c2", "/run/netns/other", strings.Replace(conf, "18080", "18081", 1)); a.Status != 0 {
		t.Fatalf("ADD: %s", text)
	}
	mustPlugin("GC", `{"cniVersion": "1.1.0", "name": "else", "type": "usernet", "cni.dev/valid-attachments": []}`)
	mustPlugin("GC", `{"cniVersion": "1.1.0", "name": "net", "type": "usernet", "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}`)
	if left := strings.Join(w.Leftovers(t, "usernet"), "\n"); !strings.Contains(left, "/run/netns/box") || strings.Contains(left, "/run/netns/other") {
		t.Errorf("GC left\n%s", left)
	}
	mustPlugin("GC", `{"cniVersion": "1.1.0", "name": "net", "type": "usernet", "cni.dev/valid-attachments": []}`)
	w.wantClean(t)

	for range 20 {
		add()
		mustPlugin("DEL", conf)
	}
	w.wantClean(t)
}

// TestCNIChain: what plugins before this one have given stays in the result.
func TestCNIChain(t *testing.T) {
	t.Parallel()
	w := newCNI(t, true, rig.Options{})
	box := w.netns(t, "box")
	const prev = `"prevResult": {"cniVersion": "0.3.1", "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": "/run/netns/box"}],
		"ips": [{"version": "4", "address": "127.0.0.1/8", "interface": 0}]}`
	a, text := w.plugin(t, "ADD", "c1", box, `{"cniVersion": "0.3.1", "name": "net", "type": "usernet", "cidr": "10.0.2.0/24", "ipv6": false, `+prev+`}`)
	if a.Status != 0 || a.CNIVersion != "0.3.1" || len(a.Interfaces) != 2 || len(a.IPs) != 2 || *a.IPs[1].Interface != 1 || a.IPs[1].Address != "10.0.2.100/24" {
		t.Errorf("ADD: %s", text)
	}
	// Addresses and names of the container's own, in each of the ways there are.
	conf := `{"cniVersion": "1.0.0", "name": "more", "type": "usernet", "cidr": "10.9.0.0/24", "cidr6": "fd09::/64",
		"dns": {"nameservers": ["10.9.0.3", "` + rig.Web4.String() + `"]},
		"runtimeConfig": {"ips": ["10.9.0.50/24", "fd09::50"], "mac": "02:00:00:00:00:09", "aliases": {"more": ["web"]}, "dns": {"searches": ["a.test"]}}}`
	w.netns(t, "two", "three")
	if a, text = w.plugin(t, "ADD", "c2", "/run/netns/two", conf); a.Status != 0 || a.IPs[0].Address != "10.9.0.50/24" || a.IPs[1].Address != "fd09::50/64" ||
		a.Interfaces[0].Mac != "02:00:00:00:00:09" || !slices.Equal(a.DNS.Search, []string{"a.test"}) {
		t.Errorf("ADD: %s", text)
	}
	if a, text = w.plugin(t, "ADD", "c3", "/run/netns/three", `{"cniVersion": "1.1.0", "name": "net", "type": "usernet", "ipv6": false}`,
		"CNI_ARGS=IgnoreUnknown=1;IP=10.0.2.77;MAC=02:00:00:00:00:08;K8S_POD_NAME=web;FOO=1"); a.Status != 0 || a.IPs[0].Address != "10.0.2.77/24" ||
		a.Interfaces[0].Mac != "02:00:00:00:00:08" || a.Interfaces[0].Mtu != 65520 {
		t.Errorf("ADD: %s", text)
	}
	for _, c := range []string{"c1 net", "c2 more", "c3 net"} {
		id, name, _ := strings.Cut(c, " ")
		if a, text := w.plugin(t, "DEL", id, box, `{"cniVersion": "1.0.0", "name": "`+name+`", "type": "usernet"}`); a.Status != 0 {
			t.Errorf("DEL: %s", text)
		}
	}
	w.wantClean(t)
}

// TestCNINetwork: containers of one network reach each other by name, those of
// another do not, and what one has another cannot have.
func TestCNINetwork(t *testing.T) {
	t.Parallel()
	rig.NeedTools(t, "ping", "dig")
	w := newCNI(t, true, rig.Options{})
	w.netns(t, "one", "two", "three", "four")
	conf := func(name, fields string) string {
		return `{"cniVersion": "1.1.0", "name": "` + name + `", "type": "usernet"` + fields + `}`
	}
	apps := conf("apps", `, "cidr": "10.44.0.0/24", "runtimeConfig": {"aliases": ["www"]}`)
	add := func(container, conf string, env ...string) cniAnswer {
		t.Helper()
		a, text := w.plugin(t, "ADD", container, "/run/netns/"+container, conf, env...)
		if a.Status != 0 {
			t.Fatalf("ADD %s: %s\n%s", container, text, w.logs())
		}
		return a
	}
	one := add("one", apps, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=web")
	two := add("two", conf("apps", ""))
	if one.IPs[0].Address != "10.44.0.100/24" || two.IPs[0].Gateway != "10.44.0.2" || two.IPs[0].Address == one.IPs[0].Address || len(two.IPs) != 2 {
		t.Errorf("addresses: %+v, %+v", one.IPs, two.IPs)
	}
	for _, name := range []string{"web", "www", "web.apps.usernet.internal"} {
		if got := w.Host.Must(t, "ip", "netns", "exec", "two", "dig", "+short", "+time=5", "@"+two.DNS.Nameservers[0], name); got != "10.44.0.100\n" {
			t.Errorf("%s is %q", name, got)
		}
	}
	w.Host.Must(t, "ip", "netns", "exec", "two", "ping", "-c", "1", "-W", "5", "10.44.0.100")
	for _, tt := range []struct {
		what, conf string
		env        []string
		code       int
		words      string
	}{
		{"subnet clash", conf("more", `, "cidr": "10.44.0.0/16"`), nil, 100, "10.44.0.0/24"},
		{"subnet of another", conf("apps", `, "cidr": "10.45.0.0/24"`), nil, 100, "10.44.0.0/24"},
		{"name taken", conf("apps", ""), []string{"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=web"}, 100, "the name web is taken"},
		{"address taken", conf("apps", `, "runtimeConfig": {"ips": ["10.44.0.100/24"]}`), nil, 100, "10.44.0.100"},
		{"name that is none", conf("Apps", ""), nil, 7, "Apps"},
	} {
		if a, text := w.plugin(t, "ADD", "three", "/run/netns/three", tt.conf, tt.env...); a.Status != 1 || a.Code != tt.code || !strings.Contains(a.Msg, tt.words) {
			t.Errorf("%s: status %d, %s", tt.what, a.Status, text)
		}
		if out := w.Host.Run(t, "ip", "-n", "three", "link", "show", "eth0"); out.Code == 0 {
			t.Errorf("%s left %s", tt.what, out.Stdout)
		}
	}
	add("three", conf("other", ""))
	add("four", conf("apps", `, "isolate": true`))
	// A port that nobody on the internet listens on, where every address is served.
	w.Host.Exec(t, rig.Command{Args: []string{"ip", "netns", "exec", "one", "busybox", "httpd", "-f", "-p", "8000", "-h", w.conf}})
	for where, want := range map[string]bool{"two": true, "three": false, "four": false} {
		out := w.Host.Run(t, "ip", "netns", "exec", where, "curl", "-s", "-o", "/dev/null", "-m", "2", "http://10.44.0.100:8000/")
		if got := out.Code == 0; got != want {
			t.Errorf("%s reaches one: %v, want %v", where, got, want)
		}
	}
	for _, c := range []string{"one", "two", "four"} {
		if a, text := w.plugin(t, "DEL", c, "/run/netns/"+c, conf("apps", "")); a.Status != 0 {
			t.Errorf("DEL: %s", text)
		}
	}
	if a, text := w.plugin(t, "DEL", "three", "", conf("other", "")); a.Status != 0 {
		t.Errorf("DEL: %s", text)
	}
	w.wantClean(t)
}

// TestCNIBad: every mistake has CNI's error with its code, and leaves nothing.
func TestCNIBad(t *testing.T) {
	t.Parallel()
	w := newCNI(t, true, rig.Options{})
	box := w.netns(t, "box")
	w.Host.Exec(t, rig.Command{Args: []string{"busybox", "httpd", "-f", "-p", "100.64.0.2:18080", "-h", w.Dir}})
	ports := func(port string) string { return `"runtimeConfig": {"portMappings": [` + port + `]}` }
	for _, tt := range []struct {
		fields string
		code   int
		words  string
	}{
		{`"mtu": "1500"`, 7, "use field mtu: it is a string, and has to be a whole number"},
		{`"mtu": 1500.5`, 7, "use field mtu"},
		{`"mtu": 0`, 7, "use field mtu"},
		{`"mtu": 100`, 7, "576"},
		{`"cidr": 10`, 7, "use field cidr: it is a number, and has to be a string"},
		{`"cidr": "10.0.2.0"`, 7, "use field cidr"},
		{`"cidr": "10.0.2.1/24"`, 7, "write 10.0.2.0/24"},
		{`"cidr": "8.8.8.0/24"`, 7, "private"},
		{`"cidr": "10.0.2.0/30"`, 7, "too small"},
		{`"cidr6": "fd00::/48"`, 7, "/64"},
		{`"cidr6": "10.0.2.0/24"`, 7, "not one of IPv6"},
		{`"ipv6": "perhaps"`, 7, "auto, on and off"},
		{`"ipv6": 6`, 7, "use field ipv6"},
		{`"isolate": "yes"`, 7, "use field isolate: it is a string, and has to be true or false"},
		{`"hostLoopback": 1`, 7, "use field hostLoopback"},
		{`"allow": "10.0.0.0/8"`, 7, "use field allow: it is a string, and has to be an array"},
		{`"allow": ["example"]`, 7, "use field allow"},
		{`"deny": ["10.0.0.0/8:99999"]`, 7, "use field deny"},
		{`"dns": {"nameservers": ["here"]}`, 7, "use field dns"},
		{`"dns": "10.0.2.3"`, 7, "use field dns: it is a string, and has to be an object"},
		{`"dns": {"search": ["-"]}`, 7, "not a domain name"},
		{`"ipam": {"type": "host-local"}`, 2, `"host-local"`},
		{`"runtimeConfig": {"mac": "x"}`, 7, "use field mac"},
		{`"runtimeConfig": {"mac": "03:00:00:00:00:01"}`, 7, "group"},
		{`"runtimeConfig": {"ips": ["10.0.3.5"]}`, 7, "not in its subnet"},
		{`"runtimeConfig": {"ips": ["10.0.2.5/16"]}`, 7, "write /24"},
		{`"runtimeConfig": {"ips": ["10.0.2.2"]}`, 7, "the gateway"},
		{`"runtimeConfig": {"ips": ["10.0.2.50", "10.0.2.51"]}`, 7, "already"},
		{`"runtimeConfig": {"ips": ["x"]}`, 7, "use field ips"},
		{`"runtimeConfig": {"aliases": 1}`, 7, "use field runtimeConfig.aliases"},
		{ports(`{"hostPort": 0, "containerPort": 80}`), 7, "hostPort 0"},
		{ports(`{"hostPort": 80, "containerPort": 70000}`), 7, "containerPort 70000"},
		{ports(`{"hostPort": "80", "containerPort": 80}`), 7, "hostPort"},
		{ports(`{"hostPort": 80, "containerPort": 80, "protocol": "sctp"}`), 7, `"sctp"`},
		{ports(`{"hostPort": 80, "containerPort": 80, "hostIP": "host"}`), 7, `hostIP "host"`},
		{ports(`{"hostPort": 81, "containerPort": 80}, {"hostPort": 81, "containerPort": 81}`), 7, "already"},
		{ports(`{"hostPort": 18080, "containerPort": 80, "hostIP": "100.64.0.2"}`), 100, "18080"}, // taken by the server above
		{ports(`{"hostPort": 18081, "containerPort": 80, "hostIP": "192.0.2.1"}`), 100, "192.0.2.1"},
		{`"prevResult": {"ips": 1}`, 6, "prevResult"},
		{`"name": "net/1"`, 7, "invalid characters"},
		{`"cniVersion": "9.0.0"`, 1, "incompatible"},
	} {
		conf := `{"cniVersion": "1.1.0", "name": "net", "type": "usernet", "unknown": 1, "cidr": "10.0.2.0/24", ` + tt.fields + `}`
		a, text := w.plugin(t, "ADD", "c1", box, conf)
		if a.Status != 1 || a.Code != tt.code || !strings.Contains(a.Msg, tt.words) || strings.Contains(a.Msg, "\n") {
			t.Errorf("%s: status %d, %s; want code %d and %q", tt.fields, a.Status, text, tt.code, tt.words)
		}
	}
	const conf = `{"cniVersion": "1.1.0", "name": "net", "type": "usernet"}`
	for _, tt := range []struct {
		container, netns, conf string
		env                    []string
		code                   int
		words                  string
	}{
		{"c1", "/run/netns/none", conf, nil, 8, "/run/netns/none"},
		{"c1", "/proc/self/ns/net", conf, nil, 8, "namespace of this process"},
		{"c1", "/proc/self/ns/user", conf, nil, 8, "not a network namespace"},
		{"c1", "box", conf, nil, 8, "absolute path"},
		{"", box, conf, nil, 4, "CNI_CONTAINERID"},
		{"c/1", box, conf, nil, 4, "containerID"},
		{"c1", box, conf, []string{"CNI_ARGS=FOO=1"}, 4, "FOO"},
		{"c1", box, conf, []string{"CNI_IFNAME=lo"}, 7, "lo"},
		{"c1", box, `{"name"`, nil, 6, "JSON"},
		{"c1", box, conf, []string{"CNI_COMMAND=DANCE"}, 4, "DANCE"},
	} {
		a, text := w.plugin(t, "ADD", tt.container, tt.netns, tt.conf, tt.env...)
		if a.Status != 1 || a.Code != tt.code || !strings.Contains(a.Msg+text, tt.words) {
			t.Errorf("%+v: status %d, %s", tt, a.Status, text)
		}
	}
	// An interface of that name is there.
	w.Host.Must(t, "ip", "-n", "box", "link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
	if a, text := w.plugin(t, "ADD", "c1", box, conf); a.Code != 100 || !strings.Contains(a.Msg, "eth0") {
		t.Errorf("interface taken: %s", text)
	}
	w.wantClean(t)
}

// TestCNIStatus: where no link can be made, no container can be added, and
// those whose daemon has ended have no network.
func TestCNIStatus(t *testing.T) {
	t.Parallel()
	w := newCNI(t, true, rig.Options{})
	box := w.netns(t, "box")
	const conf = `{"cniVersion": "1.1.0", "name": "net", "type": "usernet"}`
	if a, text := w.plugin(t, "ADD", "c1", box, conf); a.Status != 0 {
		t.Fatalf("ADD: %s", text)
	}
	w.Host.Must(t, "mount", "-t", "tmpfs", "tmpfs", "/dev/net")
	if a, text := w.plugin(t, "STATUS", "", "", conf); a.Status != 0 {
		t.Errorf("with veth pairs: %s", text)
	}
	w.Host.Must(t, "sh", "-c", "echo 0 >/proc/sys/user/max_net_namespaces")
	a, text := w.plugin(t, "STATUS", "", "", conf)
	if a.Status != 1 || a.Code != 50 || !strings.Contains(a.Msg, "/dev/net/tun is missing") {
		t.Errorf("without links: %s", text)
	}
	// Killed as well, its hub would have no time to clear its directory.
	for _, line := range w.Leftovers(t, "usernet") {
		if strings.Contains(line, "ifname") {
			w.Host.Must(t, "kill", "-9", strings.Fields(line)[0])
		}
	}
	w.WantNothingLeft(t, 2*time.Second, "usernet")
	if a, text = w.plugin(t, "STATUS", "", "", conf); a.Status != 1 || a.Code != 51 {
		t.Errorf("without links and daemon: %s", text)
	}
	if a, text := w.plugin(t, "DEL", "c1", box, conf); a.Status != 0 {
		t.Errorf("DEL: %s", text)
	}
	w.wantClean(t)
}

// TestCNIPodman: rootless podman, whose CNI plugins run in a namespace between
// host and containers that slirp4netns, or usernet by that name, connects.
func TestCNIPodman(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	rig.NeedTools(t, "podman", "conmon", "crun")
	dir := worldDir(t)
	// A copy, whose processes can be told from those in the place of slirp4netns.
	binary, err := os.ReadFile(rig.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "usernet"), binary, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, why := range inWorld(t, "podman-cni.sh", dir, asSlirp4netns(t)) {
		if why != "" {
			t.Errorf("%s:%s", name, why)
		}
	}
}

// TestCNIName: as a plugin without orders it says what it is.
func TestCNIName(t *testing.T) {
	w := newCNI(t, true, rig.Options{})
	p := w.Host.Exec(t, rig.Command{Args: []string{filepath.Join(w.bin, "slirp")}})
	p.WantExit(t, 0, 5*time.Second)
	if p.Stdout() != "" || !strings.Contains(p.Stderr(), "CNI plugin usernet") || !strings.Contains(p.Stderr(), "1.1.0") {
		t.Errorf("stdout %q, stderr %q", p.Stdout(), p.Stderr())
	}
}
