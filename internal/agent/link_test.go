package agent

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// frame is an Ethernet frame to everybody, of a type that nobody knows, behind
// an empty virtio-net header where the link has them.
func frame(link Link) []byte {
	f := make([]byte, 60)
	copy(f, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5")
	if link.VnetHdr {
		f = append(make([]byte, 10), f...)
	}
	return f
}

// reads gives the errors of successive reads, frames left out.
func reads(link Link, n int) string {
	var errs []string
	b := make([]byte, 128<<10)
	for len(errs) < n {
		if _, err := unix.Read(link.FD, b); err != nil {
			errs = append(errs, errnoName(err))
		}
	}
	return strings.Join(errs, " ")
}

func write(link Link) string {
	_, err := unix.Write(link.FD, frame(link))
	return errnoName(err)
}

func errnoName(err error) string {
	if errno, ok := err.(unix.Errno); ok {
		return unix.ErrnoName(errno)
	}
	return fmt.Sprint(err)
}

// What reads and writes say when the container takes its end down, up again,
// and away. The reader of the link has to know, or it spins.
func TestLinkDownAndGone(t *testing.T) {
	for kind, want := range map[LinkKind]struct{ down, up, gone, later string }{
		TAP: {
			"read EAGAIN EAGAIN write EIO", "read EAGAIN EAGAIN write <nil>",
			"read EBADFD EBADFD write EBADFD", "read EBADFD EBADFD write EBADFD",
		},
		Veth: {
			"read EAGAIN EAGAIN write <nil>", "read EAGAIN EAGAIN write <nil>",
			"read ENETDOWN EAGAIN write ENXIO", "read EAGAIN EAGAIN write ENXIO",
		},
	} {
		t.Run(string(kind), func(t *testing.T) {
			c := startContainer(t, rootless("-Urn")...)
			a, link := attachHere(t, c, testLink(kind))
			defer unix.Close(link.FD)
			if _, err := a.Configure(*testAddresses); err != nil {
				t.Fatal(err)
			}
			check := func(state, want string) {
				t.Helper()
				got := "read " + reads(link, 2) + " write " + write(link)
				if state == "down" {
					// A veth loses the frame by itself until the kernel has
					// noticed the carrier, and says so after that.
					got = strings.Replace(got, "write ENOBUFS", "write <nil>", 1)
				}
				if got != want {
					t.Errorf("%s: %s, want %s", state, got, want)
				}
			}
			c.run(t, "ip", "link", "set", "tap0", "down")
			check("down", want.down)
			time.Sleep(100 * time.Millisecond)
			check("down", want.down)
			c.run(t, "ip", "link", "set", "tap0", "up")
			time.Sleep(100 * time.Millisecond)
			check("up", want.up)
			c.run(t, "ip", "link", "del", "tap0")
			check("gone", want.gone)
			check("gone", want.later)
		})
	}
}

// refusal wants OpenLink to fail.
func refusal(t *testing.T, a *Agent, spec LinkSpec, want ...string) {
	t.Helper()
	link, err := a.OpenLink(spec)
	if err == nil {
		unix.Close(link.FD)
		t.Fatalf("%+v: opened %+v", spec, link)
	}
	has(t, err.Error(), want...)
	hasNot(t, err.Error(), "\n")
}

func TestLinkNames(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	c.run(t, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
	c.run(t, "ip", "tuntap", "add", "tun0", "mode", "tun")
	a, link := attachHere(t, c, &LinkSpec{Name: "busy0", Kind: TAP, Offload: true})
	defer unix.Close(link.FD)
	for _, kind := range []LinkKind{Auto, TAP, Veth} {
		for _, offload := range []bool{true, false} {
			busy := "another process has this TAP open"
			if kind == Veth {
				busy = "is in use"
			}
			for name, want := range map[string]string{
				"sixteen-letters0": "16 bytes, the kernel takes 15",
				"":                 "needs a name",
				"a b":              "no spaces",
				"a/b":              "no spaces",
				"tap%d":            "no spaces",
				"..":               "no spaces",
				"lo":               "in use",
				"eth0":             "in use",
				"tun0":             "in use",
				"busy0":            busy,
			} {
				refusal(t, a, LinkSpec{Kind: kind, Name: name, Offload: offload}, want)
			}
		}
	}
	// The agent is none the worse for it.
	for _, kind := range []LinkKind{Veth, TAP} {
		link, err := a.OpenLink(LinkSpec{Kind: kind, Name: "tap0"})
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(link.FD)
	}
	refusal(t, a, LinkSpec{Kind: "bridge", Name: "tap0"}, "unknown kind")
	refusal(t, a, LinkSpec{Kind: TAP, Name: "tap0", MTU: 70000}, "set MTU of tap0 to 70000")
	refusal(t, a, LinkSpec{Kind: TAP, Name: "tap0", MAC: net.HardwareAddr{1, 2, 3, 4, 5, 6}}, "set MAC of tap0 to 01:02:03:04:05:06")
}

// TAPs that somebody else made are used, and left as persistent as they were.
func TestPersistentTAP(t *testing.T) {
	for name, options := range map[string]string{"single": "", "multi_queue": "multi_queue", "vnet_hdr": "vnet_hdr"} {
		for _, offload := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s-%v", name, offload), func(t *testing.T) {
				c := startContainer(t, rootless("-Urn")...)
				c.run(t, join([]string{"ip", "tuntap", "add", "tap0", "mode", "tap"}, strings.Fields(options))...)
				c.run(t, "ip", "link", "set", "tap0", "address", "02:00:00:00:00:17")
				for range 2 {
					spec := testLink(Auto)
					spec.Offload = offload
					a := attach(t, as(userID), helperOrder{PID: c.pid, Link: spec, Addresses: testAddresses}).must(t)
					if a.Link.Kind != TAP || !a.Link.Existing || a.Link.Offload != offload || a.Link.VnetHdr != offload || a.Link.MAC.String() != "02:00:00:00:00:17" {
						t.Errorf("%+v", a.Link)
					}
					has(t, c.run(t, "ip", "addr", "show", "tap0"), "10.0.2.100", "mtu 65520", "LOWER_UP")
					if err := a.end(); err != nil {
						t.Error(err)
					}
				}
				has(t, c.run(t, "ip", "-d", "link", "show", "tap0"), "persist on", "NO-CARRIER")
			})
		}
	}
}

// A plain TAP carries bare frames, and no super-frames.
func TestPlainTAP(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	spec := &LinkSpec{Name: "tap0", MTU: 1500}
	a, link := attachHere(t, c, spec)
	defer unix.Close(link.FD)
	if link.Kind != TAP || link.VnetHdr || link.Offload || link.USO || len(link.Warnings) != 0 {
		t.Errorf("%+v", link)
	}
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(link.FD), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, %v: want O_NONBLOCK", flags, err)
	}
	has(t, c.run(t, "ip", "-d", "link", "show", "tap0"), "vnet_hdr off", "persist off")
	reads(link, 1)
	// Anything will do; it begins with the Ethernet header.
	c.try("ping", "-c1", "-W1", "10.0.2.77")
	b := make([]byte, 2048)
	n, err := unix.Read(link.FD, b)
	if err != nil || n < 42 || !bytes.Equal(b[6:12], link.MAC) {
		t.Errorf("read % x, %v", b[:max(n, 0)], err)
	}
}

func TestLinkAttributes(t *testing.T) {
	for _, kind := range []LinkKind{TAP, Veth} {
		t.Run(string(kind), func(t *testing.T) {
			c := startContainer(t, rootless("-Urn")...)
			mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x42}
			_, link := attachHere(t, c, &LinkSpec{Kind: kind, Name: "eth0", MTU: 9000, MAC: mac, Offload: true})
			defer unix.Close(link.FD)
			if link.Name != "eth0" || link.MTU != 9000 || !bytes.Equal(link.MAC, mac) || link.Kind != kind {
				t.Errorf("%+v", link)
			}
			out := c.run(t, "ip", "link", "show", "eth0")
			has(t, out, "mtu 9000", mac.String())
			if kind == TAP {
				has(t, out, "qlen 4096")
				return
			}
			// What a virtio-net header can tell of is on, all else is off.
			features := listFeatures(t, c)
			has(t, features, "tx-scatter-gather", "tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation", "tx-generic-segmentation")
			hasNot(t, features, append(strangeFeatures, "gre", "tnl", "sctp", "vlan-hw-insert")...)
		})
	}
}

func TestVethWithoutOffload(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	_, link := attachHere(t, c, &LinkSpec{Kind: Veth, Name: "eth0"})
	defer unix.Close(link.FD)
	if !link.VnetHdr || link.Offload || link.USO {
		t.Errorf("%+v", link)
	}
	hasNot(t, listFeatures(t, c), "tx-checksum", "tx-tcp", "tx-udp", "tx-generic-segmentation")
}

// listFeatures lists the features of eth0 in a container that are on.
func listFeatures(t *testing.T, c *container) string {
	t.Helper()
	out, err := c.helper(t, "features", "eth0").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func helpFeatures() error {
	device := os.Getenv(orderEnv)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	names, err := featureNames(fd, device)
	if err != nil {
		return err
	}
	// struct ethtool_gfeatures: blocks of available, requested, active and
	// never changed bits.
	blocks := (len(names) + 31) / 32
	b := make([]uint32, 2+4*blocks)
	b[0], b[1] = unix.ETHTOOL_GFEATURES, uint32(blocks)
	if err := ethtool(fd, device, unsafe.Pointer(&b[0])); err != nil {
		return err
	}
	for i, name := range names {
		if b[2+i/32*4+2]&(1<<(i%32)) != 0 {
			fmt.Println(name)
		}
	}
	return nil
}

// Where no TAP is to be had a veth pair takes its place, and says why.
func TestNoTun(t *testing.T) {
	for name, test := range map[string]struct{ arrange, why string }{
		"missing":      {"d=$(mktemp -d) && mount --bind $d /dev/net && rmdir $d", "is missing"},
		"null":         {"mount --bind /dev/null /dev/net/tun", "is something else"},
		"regular file": {"d=$(mktemp -d) && mount -t tmpfs none $d && touch $d/f && mount --bind $d/f /dev/net/tun && umount $d && rmdir $d", "is something else"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := os.Stat("/dev/net"); err != nil {
				t.Skip("this machine is without to begin with")
			}
			// A user namespace for the mount namespace; what the test does is
			// one level deeper.
			if !rerun(t, "unshare", "-Urm", "sh", "-c", test.arrange+`; exec "$0" "$@"`) {
				return
			}
			withoutTun(t, test.why)
		})
	}
}

// A device node that only root may open, which many machines have.
func TestClosedTun(t *testing.T) {
	needRoot(t)
	script := `mount -t tmpfs -o mode=755 none /dev/net && mknod -m 600 /dev/net/tun c 10 200 && exec "$0" "$@"`
	prefix := join([]string{"unshare", "-m", "sh", "-c", script}, as(userID))
	if out, err := exec.Command("unshare", "-m", "sh", "-c", script, "true").CombinedOutput(); err != nil {
		cannot(t, "%v: %s", err, out)
	}
	c := startContainer(t, rootless("-Urn")...)
	a := attach(t, prefix, helperOrder{PID: c.pid, Link: testLink(TAP)})
	has(t, a.Err, "closed to this user", "chmod 0666 /dev/net/tun")
	a = attach(t, prefix, helperOrder{PID: c.pid, Link: testLink(Auto), Addresses: testAddresses}).must(t)
	if a.Link.Kind != Veth || len(a.Link.Warnings) != 0 {
		t.Errorf("%+v", a.Link)
	}
	has(t, a.Link.NoTAP, "closed to this user")
	a.must(t)
}

func withoutTun(t *testing.T, why string) {
	c := startContainer(t, "unshare", "-Urn")
	forced := attach(t, nil, helperOrder{PID: c.pid, Link: testLink(TAP)})
	has(t, forced.Err, why, "veth")
	plain := testLink(TAP)
	plain.Offload = false
	has(t, attach(t, nil, helperOrder{PID: c.pid, Link: plain}).Err, why, "veth")

	a := attach(t, nil, helperOrder{PID: c.pid, Link: testLink(Auto), Addresses: testAddresses}).must(t)
	if a.Link.Kind != Veth || len(a.Link.Warnings) != 0 {
		t.Errorf("%+v", a.Link)
	}
	has(t, a.Link.NoTAP, why)
	if err := a.end(); err != nil {
		t.Error(err)
	}
}
