// Package memory gives back what a process took and does not need any more.
package memory

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Trimmer gives back memory.
type Trimmer struct{ program [][2]uintptr }

// New finds out where the program is.
func New() *Trimmer {
	t := new(Trimmer)
	vector, err := unix.Auxv()
	if err != nil {
		return t
	}
	const header, size, count = 3, 4, 5 // AT_PHDR, AT_PHENT, AT_PHNUM
	auxv := make(map[uintptr]uintptr)
	for _, v := range vector {
		auxv[v[0]] = v[1]
	}
	at := auxv[header]
	if at == 0 || auxv[size] != unsafe.Sizeof(programHeader{}) {
		return t
	}
	headers := unsafe.Slice(*(**programHeader)(unsafe.Pointer(&at)), auxv[count])
	var base uintptr // of a program that may be anywhere
	for _, h := range headers {
		if h.Type == segmentHeaders {
			base = at - h.Vaddr
		}
	}
	page := uintptr(os.Getpagesize())
	for _, h := range headers {
		// Pages that a writable segment could have a share in are left out.
		from, to := (base+h.Vaddr+page-1)&^(page-1), (base+h.Vaddr+h.Memsz)&^(page-1)
		if h.Type == segmentLoad && h.Flags&segmentWritable == 0 && from < to {
			t.program = append(t.program, [2]uintptr{from, to})
		}
	}
	return t
}

// programHeader is Elf64_Phdr of elf(5).
type programHeader struct {
	Type, Flags           uint32
	_, Vaddr, _, _, Memsz uintptr
	_                     uintptr
}

const (
	segmentLoad     = 1 // PT_LOAD
	segmentHeaders  = 6 // PT_PHDR
	segmentWritable = 2 // PF_W
)

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
	settledAfter = time.Second / 2
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
