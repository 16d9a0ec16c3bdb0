package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A cover is a file that was bound over one of the host's.
//
// When the host replaces its file, as a DHCP client does with a resolv.conf, the
// kernel takes the mount away along with the old file (detach_mounts in
// fs/namespace.c, since Linux 3.18). So there is a spare to put in its place.
type cover struct {
	path  string      // as programs know it
	info  os.FileInfo // of our file
	spare int         // a mount of our file that is nowhere yet, or -1
}

// newCover binds a new file with this content over target, to which path leads.
func newCover(path, target string, content []byte) (*cover, error) {
	// The new file's file system is mounted over some directory only until its
	// file is bound to where it belongs.
	var stage string
	for _, dir := range []string{"/tmp", "/mnt", "/run", "/var", "/srv"} {
		if info, err := os.Stat(dir); err == nil && info.IsDir() && !within(target, dir) {
			stage = dir
			break
		}
	}
	if stage == "" {
		return nil, fmt.Errorf("cover %s: no directory to prepare a file in: make /tmp", target)
	}
	if err := unix.Mount("usernet", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755"); err != nil {
		return nil, explainMount("mount a file system for "+target, err)
	}
	defer func() { _ = unix.Unmount(stage, unix.MNT_DETACH) }()
	file := filepath.Join(stage, filepath.Base(target))
	if err := writeFile(file, content); err != nil {
		return nil, err
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	c := &cover{path: path, info: info, spare: -1}
	if err := bind(file, target); err != nil {
		return nil, err
	}
	c.makeSpare(target)
	return c, nil
}

// makeSpare copies the mount at target (since Linux 5.2; an older kernel has no
// spare, and programs see what the host has put there).
func (c *cover) makeSpare(target string) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		fd = -1
	}
	c.spare = fd
}

// restore covers what path leads to now.
func (c *cover) restore() {
	target, err := filepath.EvalSymlinks(c.path)
	if err != nil || c.spare < 0 {
		return
	}
	info, err := os.Stat(target)
	if err != nil || os.SameFile(info, c.info) || !info.Mode().IsRegular() {
		return
	}
	if unix.MoveMount(c.spare, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH) != nil {
		return
	}
	unix.Close(c.spare)
	c.makeSpare(target)
}

// keep restores the covers whenever the host has replaced one's file. It runs
// until the process ends.
func (m *mounts) keep() {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	buf := make([]byte, 4096)
	for {
		for _, c := range m.covers {
			c.restore()
			// A link may lead to another directory by now; a watch that is
			// there already stays one.
			target, _ := filepath.EvalSymlinks(c.path)
			for _, dir := range []string{filepath.Dir(c.path), filepath.Dir(target)} {
				_, _ = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO)
			}
		}
		// What the events are about does not matter: a look costs little.
		if _, err := events.Read(buf); err != nil {
			return
		}
	}
}
