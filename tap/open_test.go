package tap

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/vnet"
)

// inNamespace runs the test anew as an ordinary user, in a user and network
// namespace that are his own, and returns true there.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const mark = "USERNET_TEST_RERUN"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), mark+"="+t.Name())
	uid, gid := os.Geteuid(), os.Getegid()
	if uid == 0 {
		uid, gid = 47000, 47000
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}},
		Credential:  &syscall.Credential{NoSetGroups: true},
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		t.Fatalf("%s", out)
	case err != nil && os.Getenv("USERNET_REQUIRE_NETNS") != "1":
		t.Skipf("cannot make namespaces: %v", err)
	case err != nil:
		t.Fatalf("cannot make namespaces: %v", err)
	}
	return false
}

func TestCheckName(t *testing.T) {
	for name, want := range map[string]string{
		"tap0":             "",
		"fifteen-letters":  "",
		"é":                "",
		"sixteen-letters0": "16 bytes, the kernel takes 15",
		"":                 "needs a name",
		".":                "no spaces",
		"..":               "no spaces",
		"a b":              "no spaces",
		"a\tb":             "no spaces",
		"a/b":              "no spaces",
		"a:1":              "no spaces",
		"tap%d":            "no spaces",
	} {
		err := CheckName(name)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("CheckName(%q) = %v, want %q", name, err, want)
		}
	}
}

func setUpLink(t *testing.T, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func TestOpen(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	if err := unix.Access(devicePath, unix.R_OK|unix.W_OK); err != nil {
		t.Skipf("%s: %v", devicePath, err)
	}
	for _, offload := range []bool{true, false} {
		d, err := Open("tap0", offload)
		if err != nil {
			t.Fatal(err)
		}
		if d.Name != "tap0" || d.VnetHdr != offload || d.Offload != offload || d.Persistent {
			t.Errorf("%+v", d)
		}
		checkFlags(t, d.FD)
		if _, err := Open("tap0", offload); err == nil || !strings.Contains(err.Error(), "another process has this TAP open") {
			t.Errorf("opened twice: %v", err)
		}
		setUpLink(t, "tap0")
		// The device works with the runtime's poller.
		file := os.NewFile(uintptr(d.FD), "tap0")
		b := make([]byte, 65536)
		n, err := file.Read(b) // the kernel greets its IPv6 neighbours
		head := 0
		if offload {
			head = vnet.Size
		}
		if err != nil || n < head+14 || !bytes.Equal(b[head:head+2], []byte{0x33, 0x33}) {
			t.Errorf("read % x, %v", b[:n], err)
		}
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := Open("lo", true); !errors.Is(err, ErrNameTaken) {
		t.Errorf("lo: %v", err)
	}
}

func checkFlags(t *testing.T, fd int) {
	t.Helper()
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, %v: want O_NONBLOCK", flags, err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor flags %#x, %v: want close-on-exec", flags, err)
	}
}

// A packet socket hears the other end of the pair, not itself, and speaks to it.
func TestOpenPacket(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	runtime.LockOSThread()
	pair := netlink.NewVeth(netlink.LinkAttrs{Name: "near", MTU: 1500, TxQLen: -1})
	pair.PeerName = "far"
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatal(err)
	}
	near, far := setUpLink(t, "near"), setUpLink(t, "far")
	awaitCarrier(t, "near", "far")
	d, err := OpenPacket(far.Attrs().Index)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(d.FD)
	if !d.VnetHdr || !d.Offload || d.Name != "" {
		t.Errorf("%+v", d)
	}
	checkFlags(t, d.FD)
	other, err := OpenPacket(near.Attrs().Index)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other.FD)

	frame := func(text string) []byte {
		f := append(make([]byte, vnet.Size), net.HardwareAddr{2, 0, 0, 0, 0, 1}...)
		f = append(append(f, 2, 0, 0, 0, 0, 2, 0x88, 0xb5), text...)
		return append(f, make([]byte, 60)...)
	}
	for _, way := range [][2]Device{{d, other}, {other, d}} {
		sent := frame("over there")
		if _, err := unix.Write(way[0].FD, sent); err != nil {
			t.Fatal(err)
		}
		for _, end := range []struct {
			fd   int
			want int
		}{{way[0].FD, 0}, {way[1].FD, 1}} {
			if got := count(end.fd, "over there"); got != end.want {
				t.Errorf("%d frames, want %d", got, end.want)
			}
		}
	}
	if _, err := OpenPacket(12345); err == nil {
		t.Error("bound to an interface that is not there")
	}
}

// awaitCarrier waits until the kernel sends through the interfaces.
func awaitCarrier(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			link, err := netlink.LinkByName(name)
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("%s does not come up: %v", name, err)
			}
			if link.Attrs().OperState == netlink.OperUp {
				break
			}
		}
	}
}

// count reads all frames and counts those with text.
func count(fd int, text string) (n int) {
	b := make([]byte, 65536)
	for {
		size, err := unix.Read(fd, b)
		if err != nil {
			return n
		}
		if bytes.Contains(b[:size], []byte(text)) {
			n++
		}
	}
}
