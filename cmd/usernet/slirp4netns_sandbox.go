package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/sandbox"
)

// lockDown gives up what a network that is up does not need. The helper process
// in the namespace keeps what it has, and the one that faces the guest has less in
// any case.
func (s *slirp) lockDown() error {
	if !s.o.sandbox && !s.o.seccomp {
		return nil
	}
	if err := sandbox.NoNewPrivs(); err != nil {
		if !errors.Is(err, unix.ENOTSUP) {
			return err
		}
		s.log.Warn("this binary was linked with cgo, so it cannot confine itself: build it with CGO_ENABLED=0")
		return nil
	}
	if s.o.sandbox {
		if err := sandbox.DropCapabilities(1 << unix.CAP_NET_BIND_SERVICE); err != nil {
			return fmt.Errorf("create sandbox: %w", err)
		}
		switch version, err := sandbox.CloseFiles(s.openFiles()); {
		case err != nil:
			return fmt.Errorf("create sandbox: %w", err)
		case version == 0:
			s.log.Warn("the kernel has no Landlock (Linux 5.13), so the file system stays open to this process")
		}
	}
	if s.o.seccomp {
		if err := sandbox.ForbidSyscalls(); err != nil {
			return fmt.Errorf("enable seccomp: %w", err)
		}
	}
	return nil
}

// openFiles is what stays open of the file system: what the resolver's
// configuration is read from, the directory that the API socket is removed from,
// and what a worker that has crashed is started anew with.
func (s *slirp) openFiles() map[string]uint64 {
	open := map[string]uint64{
		"/etc": sandbox.Read, "/run": sandbox.Read,
		"/proc/self/exe": unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE,
		os.DevNull:       unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE,
	}
	if target, err := filepath.EvalSymlinks("/etc/resolv.conf"); err == nil {
		open[filepath.Dir(target)] = sandbox.Read
	}
	if s.o.apiSocket != "" {
		open[filepath.Dir(s.o.apiSocket)] |= unix.LANDLOCK_ACCESS_FS_REMOVE_FILE
	}
	return open
}
