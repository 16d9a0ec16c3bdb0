// Package memory gives back what a process took and does not need any more.
package memory

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Trimmer gives back memory.
type Trimmer struct{ program [][2]uintptr }

// New finds out where the program is, for which it has to read a file.
func New() *Trimmer {
	t := new(Trimmer)
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return t
	}
	defer f.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return t
	}
	var from, to uintptr
	var mode string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if !strings.HasSuffix(lines.Text(), " "+exe) {
			continue
		}
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); n == 3 && !strings.Contains(mode, "w") {
			t.program = append(t.program, [2]uintptr{from, to})
		}
	}
	return t
}

// Trim gives back free memory of the heap, and lets go of the program's pages
// that nothing has changed: most of them only starting needed. Those that are
// needed again come back from the page cache by themselves.
func (t *Trimmer) Trim() {
	debug.FreeOSMemory()
	for _, p := range t.program {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, p[0], p[1]-p[0], unix.MADV_DONTNEED)
	}
}

// Trim is New and Trim.
func Trim() { New().Trim() }

const (
	// settledAfter is when a process has started.
	settledAfter = time.Second
	// restAfter is how long a process must have had next to nothing to do.
	restAfter = 10 * time.Second
	// restWork is what counts as that.
	restWork = 1000
	// restLooks is how often that is looked at, at most, until nothing more can be
	// found: what idles may be kept for minutes.
	restLooks = 32
)

// Keep trims until ctx is done: a moment from now, and whenever the process comes
// to rest after it was busy, then, and less and less often for some minutes. work
// counts what it does, such as frames.
func (t *Trimmer) Keep(ctx context.Context, work func() uint64) {
	r := rest{seen: work()}
	for wait := settledAfter; ; wait = restAfter {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		if r.due(work()) {
			runtime.GC() // pools let go of what two collections find unused
			t.Trim()
		}
	}
}

// rest tells when a process that was busy is at rest.
type rest struct {
	seen  uint64 // the count when last looked at
	looks int    // that have found it at rest, since it was busy
}

// due reports whether the process, its work being counted as n, has come to rest
// or been there for twice as long as the last time.
func (r *rest) due(n uint64) bool {
	idle := n-r.seen <= restWork
	r.seen = n
	if !idle {
		r.looks = 0
		return false
	}
	r.looks = min(r.looks+1, restLooks+1)
	return r.looks <= restLooks && r.looks&(r.looks-1) == 0
}
