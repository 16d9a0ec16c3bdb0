package e2e

import (
	"flag"
	"net/netip"
	"strconv"
	"testing"

	"github.com/usernet/usernet/internal/rig"
)

func TestMain(m *testing.M) {
	// Most tests wait more than they work: more of them than processors may
	// run at the same time, unless the caller says how many.
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		flag.Set("test.parallel", "5")
	}
	rig.Main(m)
}

// A world is what most tests need: a Net, and a guest on one kind of link.
type world struct {
	*rig.Net
	Guest *rig.Node
	subject
	flags []string
}

// subject is the program under test, for its addresses.
type subject = rig.Subject

// links are the devices that usernet can put into a guest. Where it is veth,
// /dev/net/tun is closed.
var links = []struct {
	name  string
	tun   rig.Tun
	flags []string
}{
	{"tap", rig.TunOpen, []string{"--link=tap"}},
	{"veth", rig.TunClosed, []string{"--link=veth"}},
}

// eachLink runs a test on every kind of link, all at the same time.
func eachLink(t *testing.T, f func(t *testing.T, w *world)) {
	t.Parallel()
	eachLinkAlone(t, func(t *testing.T, w *world) { f(t, w) }, true)
}

// eachLinkAlone runs a test on every kind of link, one after another if not
// parallel.
func eachLinkAlone(t *testing.T, f func(t *testing.T, w *world), parallel bool) {
	for _, l := range links {
		t.Run(l.name, func(t *testing.T) {
			if l.name != "tap" {
				rig.NeedUsernet(t)
			}
			if parallel {
				t.Parallel()
			}
			w := newWorld(t, rig.Options{Tun: l.tun})
			w.flags = l.flags
			f(t, w)
		})
	}
}

// onTap makes a world with a TAP for a test that the link does not matter to.
func onTap(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	return newWorld(t, rig.Options{})
}

func newWorld(t *testing.T, o rig.Options) *world {
	t.Helper()
	n := rig.New(t, o)
	return &world{n, n.Guest(t), rig.Current(), []string{"--link=tap"}}
}

// attach gives the guest its network.
func (w *world) attach(t *testing.T, flags ...string) *rig.Attach {
	t.Helper()
	return w.Attach(t, w.Guest, append(append([]string(nil), w.flags...), flags...)...)
}

// at joins an address and a port.
func at(a netip.Addr, port int) string { return netip.AddrPortFrom(a, uint16(port)).String() }

// families are subtests for both IP versions.
func families(t *testing.T, f func(t *testing.T, six bool)) {
	t.Run("v4", func(t *testing.T) { f(t, false) })
	t.Run("v6", func(t *testing.T) { f(t, true) })
}

// pick chooses by family.
func pick[T any](six bool, v4, v6 T) T {
	if six {
		return v6
	}
	return v4
}

func itoa(n int) string { return strconv.Itoa(n) }
