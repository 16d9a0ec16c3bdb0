package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// resolverSockets are those of services that look names up for a program's C
// library, in the host's network and past our DNS server: nscd, and
// systemd-resolved through nss-resolve. Without them the library reads
// resolv.conf.
var resolverSockets = []string{
	"/run/nscd/socket",
	"/var/run/nscd/socket",
	"/run/systemd/resolve/io.systemd.Resolve",
}

// mounts are the files that were put over those of the host.
type mounts struct{ covers []*cover }

// prepareMounts makes this process's mount namespace what s says. Nothing of it
// is seen outside.
func prepareMounts(s setup) (*mounts, error) {
	// Mounts of the host still come in, ours do not go out.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return nil, explainMount("make the mounts private", err)
	}
	m := &mounts{}
	if s.Hosts != nil {
		if err := m.put("/etc/hosts", s.Hosts); err != nil {
			return nil, err
		}
	}
	if s.ResolvConf == nil {
		return m, nil
	}
	if err := m.put("/etc/resolv.conf", s.ResolvConf); err != nil {
		return nil, err
	}
	for _, path := range resolverSockets {
		if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
			if err := bind(os.DevNull, path); err != nil {
				return nil, err
			}
		}
	}
	return m, nil
}

// put puts a file over path, wherever that leads.
func (m *mounts) put(path string, content []byte) error {
	target, err := filepath.EvalSymlinks(path)
	if err == nil {
		if info, err := os.Stat(target); err == nil && info.Mode().IsRegular() {
			c, err := newCover(path, target, content)
			m.covers = append(m.covers, c)
			return err
		}
	}
	// Missing, or a link that leads nowhere: no file to cover, and nobody but
	// the host's root may make one there.
	return rebuild(filepath.Dir(path), filepath.Base(path), content)
}

// within reports whether path is dir or below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}

// rebuild replaces a directory by one with the same entries and a file besides.
func rebuild(dir, name string, content []byte) error {
	old, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("add %s to %s: %w", name, dir, err)
	}
	defer old.Close()
	entries, err := old.ReadDir(-1)
	if err != nil {
		return fmt.Errorf("add %s to %s: %w", name, dir, err)
	}
	if err := unix.Mount("usernet", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return explainMount("mount a file system on "+dir, err)
	}
	// The covered directory has no path any more but this one.
	covered := "/proc/self/fd/" + strconv.Itoa(int(old.Fd()))
	for _, e := range entries {
		if e.Name() == name {
			continue
		}
		if err := transfer(filepath.Join(covered, e.Name()), filepath.Join(dir, e.Name()), e.Type()); err != nil {
			return err
		}
	}
	return writeFile(filepath.Join(dir, name), content)
}

// transfer makes from appear at to.
func transfer(from, to string, kind os.FileMode) error {
	switch {
	case kind&os.ModeSymlink != 0:
		link, err := os.Readlink(from)
		if err != nil {
			return fmt.Errorf("copy link %s: %w", to, err)
		}
		return os.Symlink(link, to)
	case kind.IsDir():
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
	default:
		if err := writeFile(to, nil); err != nil {
			return err
		}
	}
	return bind(from, to)
}

func writeFile(path string, content []byte) error {
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644) // whatever the umask
}

// bind makes from appear at to, with the mounts below it: a user namespace may
// not uncover what they cover.
func bind(from, to string) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return explainMount("bind a file over "+to, err)
	}
	return nil
}

func explainMount(what string, err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s: %w: user namespaces have no rights here: `usernet doctor` says what to change", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
