package rig

import (
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// subjectVariable names another program to run the tests on, where the tests
// themselves are in doubt: slirp4netns, pasta, or kernel.
const subjectVariable = "USERNET_RIG_SUBJECT"

// A Subject is a program that gives a guest its network, and the addresses
// that it does it with.
type Subject struct {
	Name                   string
	Guest4, Gateway4, DNS4 netip.Addr
	Guest6, Gateway6, DNS6 netip.Addr
	command                func(t testing.TB, guest *Node, o AttachOptions) (args, env []string)
}

// Subjects are those that Current chooses from.
var Subjects = []Subject{usernet, slirp4netns, pasta, kernel}

// Current is the subject of this run.
func Current() Subject {
	name := os.Getenv(subjectVariable)
	for _, s := range Subjects {
		if s.Name == name {
			return s
		}
	}
	return usernet
}

// settle waits for what other subjects do not have at the time they say they
// are ready: addresses from router advertisements.
func (s Subject) settle(t testing.TB, guest *Node) {
	if s.Name == "usernet" || s.Name == "kernel" {
		return
	}
	Poll(5*time.Second, func() bool {
		return strings.Contains(guest.Run(t, "ip", "-6", "route").Stdout, "default") &&
			!strings.Contains(guest.Run(t, "ip", "-6", "addr").Stdout, "tentative")
	})
}

// NeedUsernet skips the test when another subject runs.
func NeedUsernet(t testing.TB) {
	t.Helper()
	if name := Current().Name; name != "usernet" {
		t.Skipf("not for %s", name)
	}
}

var usernet = Subject{
	Name:     "usernet",
	Guest4:   netip.MustParseAddr("10.0.2.100"),
	Gateway4: netip.MustParseAddr("10.0.2.2"),
	DNS4:     netip.MustParseAddr("10.0.2.3"),
	Guest6:   netip.MustParseAddr("fd75:736e:6574::100"),
	Gateway6: netip.MustParseAddr("fd75:736e:6574::2"),
	DNS6:     netip.MustParseAddr("fd75:736e:6574::3"),
	command: func(t testing.TB, guest *Node, o AttachOptions) (args, env []string) {
		target := o.Target
		if target == nil {
			target = []string{"--netns", guest.NetnsPath()}
		}
		args = append([]string{Binary(t)}, target...)
		args = append(args, "--ready-fd", "3", "--exit-fd", "4")
		return append(args, o.Flags...), []string{"XDG_RUNTIME_DIR=/run/user/1000", "HOME=/tmp"}
	},
}

// slirp4netns knows the host's loopback open or closed, but nothing of names.
var slirp4netns = Subject{
	Name:     "slirp4netns",
	Guest4:   usernet.Guest4,
	Gateway4: usernet.Gateway4,
	DNS4:     usernet.DNS4,
	Guest6:   netip.MustParseAddr("fd00::100"),
	Gateway6: netip.MustParseAddr("fd00::2"),
	DNS6:     netip.MustParseAddr("fd00::3"),
	command: func(t testing.TB, guest *Node, o AttachOptions) (args, env []string) {
		args = []string{
			"slirp4netns", "-r", "3", "-e", "4", "--enable-ipv6", "--netns-type=path",
			"--userns-path=/proc/" + strconv.Itoa(guest.PID) + "/ns/user", "--mtu", flagValue(o.Flags, "--mtu", "65520"),
		}
		if flagValue(o.Flags, "--configure", "") != "none" {
			args = append(args, "-c")
		}
		if !slices.Contains(o.Flags, "--host-loopback") {
			args = append(args, "--disable-host-loopback")
		}
		return append(args, guest.NetnsPath(), "tap0"), nil
	},
}

// pasta writes its PID file when the guest is ready; a shell makes that the
// ready-fd's signal.
var pasta = Subject{
	Name:     "pasta",
	Guest4:   usernet.Guest4,
	Gateway4: usernet.Gateway4,
	DNS4:     usernet.DNS4,
	Guest6:   usernet.Guest6,
	Gateway6: usernet.Gateway6,
	DNS6:     usernet.DNS6,
	command: func(t testing.TB, guest *Node, o AttachOptions) (args, env []string) {
		args = []string{
			"pasta", "-f", "-q", "-I", "tap0", "--no-netns-quit",
			"-a", "10.0.2.100", "-n", "24", "-g", "10.0.2.2", "--dns-forward", "10.0.2.3",
			"-a", usernet.Guest6.String(), "-g", usernet.Gateway6.String(), "--dns-forward", usernet.DNS6.String(),
			"-t", "none", "-u", "none", "-T", "none", "-U", "none",
			"-m", flagValue(o.Flags, "--mtu", "65520"),
			"--userns", "/proc/" + strconv.Itoa(guest.PID) + "/ns/user", "--netns", guest.NetnsPath(),
		}
		if flagValue(o.Flags, "--configure", "") != "none" {
			args = append(args, "--config-net")
		}
		if !slices.Contains(o.Flags, "--host-loopback") {
			args = append(args, "--no-map-gw")
		}
		script := `f=$(mktemp -u /run/user/1000/pasta.XXXXXX); "$@" -P $f & p=$!
trap 'kill $p' TERM INT; while ! [ -s $f ]; do sleep 0.02; kill -0 $p || exit 1; done; echo -n 1 >&3; wait $p`
		return append([]string{"sh", "-c", script, "sh"}, args...), nil
	},
}

// kernel is no program: a wire between guest and host, and the kernel's own
// forwarding and NAT. Where a test of the path fails on it, the test is wrong.
var kernel = Subject{
	Name:     "kernel",
	Guest4:   usernet.Guest4,
	Gateway4: usernet.Gateway4,
	DNS4:     usernet.DNS4,
	Guest6:   usernet.Guest6,
	Gateway6: usernet.Gateway6,
	DNS6:     usernet.DNS6,
	command: func(t testing.TB, guest *Node, o AttachOptions) (args, env []string) {
		script := `set -e
g="nsenter -t $1 -n"
ip link add tap0 mtu $2 netns $1 type veth peer name guest0 mtu $2
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
ip addr add 10.0.2.2/24 dev guest0
ip addr add fd75:736e:6574::2/64 dev guest0 nodad
ip link set guest0 up
$g ip link set lo up
$g ip link set tap0 up
$g ip addr add 10.0.2.100/24 dev tap0
$g ip addr add fd75:736e:6574::100/64 dev tap0 nodad
$g ip route add default via 10.0.2.2
$g ip route add default via fd75:736e:6574::2
nft add table inet nat
nft add chain inet nat post '{ type nat hook postrouting priority srcnat; }'
nft add rule inet nat post oifname eth0 masquerade
echo -n 1 >&3
exec sleep 600`
		return []string{"sh", "-c", script, "sh", strconv.Itoa(guest.PID), flagValue(o.Flags, "--mtu", "65520")}, nil
	},
}

// flagValue finds "--name value" or "--name=value".
func flagValue(flags []string, name, otherwise string) string {
	for i, f := range flags {
		if f == name && i+1 < len(flags) {
			return flags[i+1]
		}
		if v, ok := strings.CutPrefix(f, name+"="); ok {
			return v
		}
	}
	return otherwise
}
