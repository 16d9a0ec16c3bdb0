package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// etcMount is where the machine's /etc is mounted below a Net's directory.
const etcMount = "etc"

// hostMounts gives the Net an /etc and a /run of its own.
func hostMounts(s hostSetup) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := mountEtc(filepath.Join(s.Dir, etcMount)); err != nil {
		return err
	}
	if err := writeEtc("resolv.conf", "nameserver "+Web4.String()+"\n"); err != nil {
		return err
	}
	if err := mountTmpfs("/run", "netns", "lock", "user/1000"); err != nil {
		return err
	}
	if err := os.Chown("/run/user/1000", userID(), userID()); err != nil {
		return err
	}
	switch s.Tun {
	case TunMissing:
		return mountTmpfs("/dev/net")
	case TunClosed:
		return closeDevices("/dev/net")
	}
	return nil
}

// userID is what the ordinary user's id is for the first node.
func userID() int {
	if b, err := os.ReadFile("/proc/self/uid_map"); err == nil && strings.Contains(string(b), "4294967295") {
		return freeUID()
	}
	return 0
}

// closeDevices makes opening the devices in dir fail with EACCES, which is
// what nodev means.
func closeDevices(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	// Flags that the machine has set cannot be cleared below it.
	keep := uintptr(st.Flags) & (unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME | unix.MS_RDONLY)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NODEV|keep, ""); err != nil {
		return fmt.Errorf("close devices in %s: %w", dir, err)
	}
	return nil
}

func mountTmpfs(dir string, children ...string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	for _, child := range children {
		if err := os.MkdirAll(filepath.Join(dir, child), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// mountEtc puts a fresh directory in the place of /etc, so that files in it can
// be replaced by rename: all entries are links to the machine's /etc, bound at
// old, except for those that writeEtc replaces.
func mountEtc(old string) error {
	if err := os.MkdirAll(old, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/etc", old, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind /etc: %w", err)
	}
	if err := mountTmpfs("/etc"); err != nil {
		return err
	}
	return linkEtc(old)
}

func linkEtc(old string) error {
	entries, err := os.ReadDir(old)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Symlink(filepath.Join(old, e.Name()), filepath.Join("/etc", e.Name())); err != nil {
			return err
		}
	}
	users, err := os.ReadFile(filepath.Join(old, "passwd"))
	if err != nil {
		return err
	}
	user := "user:x:1000:1000:ordinary user:/tmp:/bin/sh\n"
	return errors.Join(
		writeEtc("passwd", user+string(users)),
		writeEtc("hostname", "host\n"),
		writeEtc("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
	)
}

// writeEtc replaces a file of the private /etc.
func writeEtc(name, text string) error {
	path := filepath.Join("/etc", name)
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// A guestSetup tells a guest's node how to shape its mounts.
type guestSetup struct{ Dir string }

var setUpGuest = NewFunc("rig.setUpGuest", func(_ context.Context, s guestSetup) (struct{}, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return struct{}{}, step("mounts", err)
	}
	// Best effort: only some clients look for interfaces in /sys, and a
	// container's masked /sys cannot be mounted again.
	unix.Mount("sysfs", "/sys", "sysfs", 0, "")
	old := filepath.Join(s.Dir, etcMount)
	if err := os.MkdirAll(old, 0o755); err != nil {
		return struct{}{}, err
	}
	if _, err := os.Stat(filepath.Join(old, "passwd")); err != nil {
		// A plain Net: this is the first /etc of our own.
		if err := unix.Mount("/etc", old, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return struct{}{}, step("bind of /etc", err)
		}
	}
	return struct{}{}, errors.Join(
		mountTmpfs("/etc"),
		linkEtc(old),
		writeEtc("resolv.conf", "nameserver 10.0.2.3\n"),
		mountTmpfs("/run", "netns", "lock", "dhcpcd", "systemd/netif"),
		mountTmpfs("/var/lib", "dhcp", "dhcpcd", "misc"),
	)
})

// WriteEtc replaces a file in a node's private /etc by rename.
func (n *Node) WriteEtc(t testing.TB, name, text string) {
	t.Helper()
	if _, err := writeEtcFile.Try(n, etcFile{Name: name, Text: text}); err != nil {
		t.Fatalf("write /etc/%s in %s: %v", name, n.Name, err)
	}
}

type etcFile struct{ Name, Text string }

var writeEtcFile = NewFunc("rig.writeEtc", func(_ context.Context, f etcFile) (struct{}, error) {
	return struct{}{}, writeEtc(f.Name, f.Text)
})
