package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Usage is what a process holds, and all that it has started. Files are only of
// those that let themselves be looked at.
type Usage struct {
	Files, Threads int
	RSS            int // KiB
	CPU            time.Duration
}

// UsageOf measures a process and all below it. One that ends meanwhile counts for
// nothing.
var UsageOf = NewFunc("rig.usage", func(_ context.Context, pid int) (Usage, error) {
	all, err := usageOf(pid)
	if err != nil {
		return all, err
	}
	tree := parents()
	for child := range tree {
		if child == pid || !descends(tree, child, pid) {
			continue
		}
		u, err := usageOf(child)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
			continue
		case err != nil:
			return all, err
		}
		all.Files += u.Files
		all.Threads += u.Threads
		all.RSS += u.RSS
		all.CPU += u.CPU
	}
	return all, nil
})

func usageOf(pid int) (Usage, error) {
	var u Usage
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return u, err
	}
	u.Files = len(files)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for line := range bytes.Lines(status) {
		fmt.Sscanf(string(line), "Threads: %d", &u.Threads)
		fmt.Sscanf(string(line), "VmRSS: %d", &u.RSS)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	var user, system int
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	fields := bytes.Fields(rest)
	fmt.Sscan(string(fields[11]), &user)
	fmt.Sscan(string(fields[12]), &system)
	u.CPU = time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
	return u, nil
}
