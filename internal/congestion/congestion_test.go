package congestion

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLocal: where BBR is the default, a socket can be taken off it.
func TestLocal(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	get := func() string {
		name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	before, name := get(), Local()
	if paces := strings.HasPrefix(before, "bbr"); paces != (name != "") {
		t.Errorf("with %q the choice is %q", before, name)
	}
	Set(fd, name)
	if name == "" {
		name = before
	}
	if after := get(); after != name {
		t.Errorf("the socket has %q, want %q", after, name)
	}
	Set(fd, "reno")
	if after := get(); after != "reno" {
		t.Errorf("the socket has %q, want reno", after)
	}
}
