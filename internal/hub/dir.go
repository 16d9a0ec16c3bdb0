package hub

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names of the files in a network's directory.
const (
	lockName  = "lock"   // held by the hub as long as it lives
	startName = "start"  // held by the member that starts a hub
	sockName  = "socket" // where the hub listens
	stateName = "state"  // what a successor has to know
	logName   = "log"    // the hub's
)

// ErrNoDir means that the user has no directory for what runs.
var ErrNoDir = errors.New("XDG_RUNTIME_DIR is not set: set it to a directory of this user's own, such as /run/user/$(id -u)")

// Base returns the directory of all networks of this user.
func Base() (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) {
		return "", ErrNoDir
	}
	return filepath.Join(dir, "usernet", "networks"), nil
}

// A Place is the directory of one network.
type Place struct{ base, name string }

// At returns the place of a network below base, which Base returns.
func At(base, name string) Place { return Place{base, name} }

// Name returns the network's name.
func (p Place) Name() string { return p.name }

// Dir returns the directory.
func (p Place) Dir() string { return filepath.Join(p.base, p.name) }

func (p Place) path(file string) string { return filepath.Join(p.base, p.name, file) }

// Make makes the directory, and those above it, for the user alone.
func (p Place) Make() error {
	for _, dir := range []string{filepath.Dir(p.base), p.base, p.Dir()} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("hub: make directory: %w", err)
		}
		info, err := os.Lstat(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist) && dir == p.Dir():
			return err // a hub that ends has removed it: the caller comes again
		case err != nil:
			return fmt.Errorf("hub: use directory: %w", err)
		case !info.IsDir():
			return fmt.Errorf("hub: use directory %s: it is none: remove it", dir)
		case info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()):
			return fmt.Errorf("hub: use directory %s: it belongs to another user: remove it", dir)
		case info.Mode().Perm()&0o077 != 0:
			return fmt.Errorf("hub: use directory %s: others may look into it: chmod 0700 it", dir)
		}
	}
	return nil
}

// List returns the places below base.
func List(base string) ([]Place, error) {
	entries, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("hub: list networks: %w", err)
	}
	var ps []Place
	for _, e := range entries {
		if e.IsDir() {
			ps = append(ps, Place{base, e.Name()})
		}
	}
	return ps, nil
}

// Live reports whether a hub holds the place.
func (p Place) Live() bool {
	f, err := os.Open(p.path(lockName))
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}

// lock takes a lock of the place, if it is free in time. The file is removed by
// its last holder, so that one which has lost its name does not count.
func (p Place) lock(file string, patience time.Duration) (*os.File, error) {
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		f, err := os.OpenFile(p.path(file), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrNotExist) && time.Since(began) < patience {
			_ = p.Make() // a hub that has ended took the directory along
			continue
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			var held, named unix.Stat_t
			if unix.Fstat(int(f.Fd()), &held) == nil && unix.Stat(p.path(file), &named) == nil && held.Ino == named.Ino {
				return f, nil
			}
		}
		f.Close()
		if time.Since(began) > patience {
			return nil, fmt.Errorf("take the lock %s: %w", p.path(file), unix.EBUSY)
		}
	}
}

// ReadState returns what the last hub has written, nil if there is nothing.
func (p Place) ReadState() []byte {
	b, err := os.ReadFile(p.path(stateName))
	if err != nil {
		return nil
	}
	return b
}

// WriteState writes what a successor has to know.
func (p Place) WriteState(b []byte) error {
	next := p.path(stateName + ".new")
	if err := os.WriteFile(next, b, 0o600); err != nil {
		return err
	}
	return os.Rename(next, p.path(stateName))
}

// Clear removes what a hub leaves behind that was killed, and whose members have
// ended too. It does nothing while one lives.
func (p Place) Clear() error {
	f, err := p.lock(lockName, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p.remove()
	return nil
}

// remove removes the directory. The caller holds the lock.
func (p Place) remove() {
	for _, name := range []string{sockName, stateName, stateName + ".new", logName, startName, lockName} {
		_ = unix.Unlink(p.path(name))
	}
	_ = unix.Rmdir(p.Dir())
}

// LockAll keeps other hubs from choosing their subnets until the file is closed.
func LockAll(base string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(base, ".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
