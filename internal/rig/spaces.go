package rig

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spaces says in which namespaces a process runs, relative to the one that
// starts it. The zero value is: in the same ones.
type Spaces struct {
	// User puts the process into a new user namespace, where it has the ids
	// UID and GID (0 is that namespace's root).
	User bool
	UID  int
	GID  int
	// Net and Mount give it namespaces of its own.
	Net   bool
	Mount bool
	// Drop, if not 0, is the ordinary uid and gid that a privileged starter
	// becomes. With User it is what UID and GID mean outside.
	Drop int

	// orphan lets the process outlive its parent; it has to notice by itself.
	orphan bool
}

// attributes translates s for os/exec.
func (s Spaces) attributes() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if s.orphan {
		a.Pdeathsig = 0
	}
	if s.Net {
		a.Cloneflags |= unix.CLONE_NEWNET
	}
	if s.Mount {
		a.Cloneflags |= unix.CLONE_NEWNS
	}
	if s.Drop != 0 {
		a.Credential = &syscall.Credential{Uid: uint32(s.Drop), Gid: uint32(s.Drop)}
	}
	if !s.User {
		return a
	}
	a.Cloneflags |= unix.CLONE_NEWUSER
	uid, gid := os.Geteuid(), os.Getegid()
	if s.Drop != 0 {
		uid, gid = s.Drop, s.Drop
		// The ids inside. Only a privileged starter may leave setgroups open,
		// and it has groups to lose.
		a.Credential = &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.GID)}
		a.GidMappingsEnableSetgroups = true
	}
	a.UidMappings = []syscall.SysProcIDMap{{ContainerID: s.UID, HostID: uid, Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{ContainerID: s.GID, HostID: gid, Size: 1}}
	return a
}
