package netns

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// watchInterval bounds how late the end of a namespace without a process of its
// own is seen. An inotify watch would tell sooner, but neither of an umount in
// another mount namespace nor of anything below /proc.
const watchInterval = 250 * time.Millisecond

// moveInterval is the same for a process that lives on in another namespace; the
// end of one is known at once. Each look wakes a sleeping process up.
const moveInterval = 900 * time.Millisecond

// Watch blocks until the process that the path names has ended, or the path
// leads to this namespace no more; then it returns nil. When ctx ends first it
// returns ctx.Err(). An open TAP holds the namespace for ever, so that nothing
// read from it would tell.
func (n *Namespace) Watch(ctx context.Context) error {
	ended := make(chan struct{})
	interval := watchInterval
	if n.pidfd != nil {
		interval = moveInterval
		pidfd, err := dup(n.pidfd)
		if err != nil {
			return fmt.Errorf("netns: watch %s: %w", n.path, err)
		}
		waited := make(chan struct{})
		go func() { // ends when the process does, or by the Close below
			defer close(waited)
			if waitExit(pidfd) == nil {
				close(ended)
			}
		}()
		defer func() {
			pidfd.Close()
			<-waited
		}()
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
			return nil
		case <-tick.C:
			if n.moved() {
				return nil
			}
		}
	}
}

// moved reports whether the path leads elsewhere, or nowhere.
func (n *Namespace) moved() bool {
	var st unix.Stat_t
	err := unix.Stat(n.path, &st)
	switch {
	case err == nil:
		return uint64(st.Dev) != n.dev || st.Ino != n.ino
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH):
		return true
	}
	// A process that changed its credentials closes its /proc/PID/ns to us
	// (EACCES, EPERM), yet lives; its pidfd tells the end.
	return false
}
