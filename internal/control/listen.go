package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is how long the path of a unix socket can be (unix(7)).
const maxPath = 107

// DefaultDir is where sockets are unless a path is given, "" where the user has
// no runtime directory.
func DefaultDir() string {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) {
		return "" // the XDG base directory specification: ignore relative ones
	}
	return filepath.Join(dir, "usernet")
}

// DefaultPath is where the socket of a network namespace is, "" where the user
// has no runtime directory.
func DefaultPath(inode uint64) string {
	dir := DefaultDir()
	if dir == "" {
		return ""
	}
	return filepath.Join(dir, strconv.FormatUint(inode, 10)+".sock")
}

// MakeDefaultDir makes DefaultDir, for the user alone.
func MakeDefaultDir() error {
	dir := DefaultDir()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("control: make directory: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("control: make directory: %w", err)
	}
	switch {
	case !info.IsDir():
		return fmt.Errorf("control: use directory %s: it is none: remove it", dir)
	case info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()):
		return fmt.Errorf("control: use directory %s: it belongs to another user: remove it", dir)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("control: use directory %s: others may look into it: chmod 0700 it", dir)
	}
	return nil
}

// A Listener is a control socket.
type Listener struct {
	*net.UnixListener
	path string
	dev  uint64
	ino  uint64
}

// Listen makes a control socket at path. A socket of ours that nobody listens on
// is replaced, anything else that is there is left alone.
func Listen(path string) (*Listener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("control: listen on %s: the path of a unix socket has at most %d bytes: choose a shorter one", path, maxPath)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("control: listen: %w", err)
	}
	if err := clear(path); err != nil {
		return nil, fmt.Errorf("control: listen on %s: %w", path, err)
	}
	// The mode of the socket before bind becomes that of the file, less the
	// umask, which other threads may be using: at no time can others connect.
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	nl, err := cfg.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, listenError(path, err)
	}
	ul := nl.(*net.UnixListener)
	ul.SetUnlinkOnClose(false) // not what a successor has put there
	l := &Listener{UnixListener: ul, path: path}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		ul.Close()
		return nil, fmt.Errorf("control: listen on %s: somebody has replaced it", path)
	}
	l.dev, l.ino = uint64(st.Dev), st.Ino
	if st.Mode&0o777 != 0o600 {
		if err := os.Chmod(path, 0o600); err != nil {
			l.Close()
			return nil, fmt.Errorf("control: listen: %w", err)
		}
	}
	return l, nil
}

// clear makes way for a socket at path.
func clear(path string) error {
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return errors.New("it is a symbolic link: choose another path")
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return errors.New("it is no socket: choose another path")
	case st.Uid != uint32(os.Geteuid()):
		return errors.New("it is a socket of another user: choose another path")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return errors.New("another process listens there: choose another path")
	case errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("it may be in use: %w", err)
	}
	if err := unix.Unlink(path); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

func listenError(path string, err error) error {
	var hint string
	switch {
	case errors.Is(err, unix.ENOENT):
		hint = ": make its directory first"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		hint = ": choose a path where this user may write"
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		err = errno
	}
	return fmt.Errorf("control: listen on %s: %w%s", path, err, hint)
}

// Path returns where the socket is.
func (l *Listener) Path() string { return l.path }

// Close removes the socket, unless a successor has put its own there.
func (l *Listener) Close() error {
	var st unix.Stat_t
	if unix.Lstat(l.path, &st) == nil && uint64(st.Dev) == l.dev && st.Ino == l.ino {
		_ = unix.Unlink(l.path)
	}
	return l.UnixListener.Close()
}
