// Package sandbox gives up what a process does not need any more.
package sandbox

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Status says what a sealed process is kept from.
type Status struct {
	// NoNewPrivs: an exec gains no rights; NoCapabilities: there are none;
	// NotDumpable: no process of the same user may look into this one.
	NoNewPrivs     bool `json:"no_new_privs"`
	NoCapabilities bool `json:"no_capabilities"`
	NotDumpable    bool `json:"not_dumpable"`
	// Seccomp: of the system calls only those that moving packets takes are
	// left, and another one ends the process.
	Seccomp bool `json:"seccomp"`
	// Landlock is the version by which the whole file system is closed, 0 if
	// the kernel has none. Seccomp leaves no call that takes a path either.
	Landlock int `json:"landlock"`
	// Missing says why something is not in force.
	Missing string `json:"missing,omitempty"`
}

// Seal leaves a process that has opened what it needs to its open descriptors, its
// memory, and sockets of TCP, UDP and ICMP.
func Seal() (Status, error) {
	var s Status
	switch err := NoNewPrivs(); {
	case errors.Is(err, syscall.ENOTSUP):
		s.Missing = "this binary was linked with cgo, so it cannot confine itself: build it with CGO_ENABLED=0"
		return s, nil
	case err != nil:
		return s, fmt.Errorf("sandbox: %w", err)
	}
	s.NoNewPrivs = true
	if err := DropCapabilities(0); err != nil {
		return s, fmt.Errorf("sandbox: %w", err)
	}
	s.NoCapabilities = true
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return s, fmt.Errorf("sandbox: forbid to be looked into: %w", err)
	}
	s.NotDumpable = true
	var err error
	if s.Landlock, err = CloseFiles(nil); err != nil {
		return s, fmt.Errorf("sandbox: %w", err)
	}
	if err := allowSyscalls(); err != nil {
		return s, fmt.Errorf("sandbox: limit system calls: %w", err)
	}
	s.Seccomp = true
	return s, nil
}
