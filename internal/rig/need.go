package rig

import (
	"os"
	"sync"
	"testing"
)

// Require names the variable that turns every skip for want of a tool or a
// permission into a failure.
const Require = "USERNET_REQUIRE_NETNS"

// Missing ends the test for want of something that the machine should have: a
// skip, or where Require is set, a failure.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv(Require) == "1" {
		t.Fatalf("missing: "+format, args...)
	}
	t.Skipf("missing: "+format, args...)
}

// NeedTools ends the test as Missing does unless all programs are there.
func NeedTools(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := look(name); err != nil {
			Missing(t, "program %s", name)
		}
	}
}

// NeedTun ends the test as Missing does unless everybody may open /dev/net/tun.
func NeedTun(t testing.TB) {
	t.Helper()
	info, err := os.Stat("/dev/net/tun")
	if err != nil {
		Missing(t, "/dev/net/tun: %v", err)
	}
	if info.Mode().Perm()&0o006 != 0o006 {
		Missing(t, "permission on /dev/net/tun (%v): chmod 0666 /dev/net/tun", info.Mode().Perm())
	}
}

// namespaceError says, once per run, why namespaces cannot be made.
var namespaceError = sync.OnceValue(func() error {
	dir, err := makeDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	n, err := startRoot("probe", dir, Spaces{User: true, Net: true, Mount: true, Drop: dropUID()})
	if err != nil {
		return err
	}
	defer n.close()
	_, err = ping.Try(n, struct{}{})
	return err
})

// NeedNamespaces ends the test as Missing does unless an ordinary user can
// make user namespaces.
func NeedNamespaces(t testing.TB) {
	t.Helper()
	if err := namespaceError(); err != nil {
		Missing(t, "user namespaces: %v", err)
	}
}
