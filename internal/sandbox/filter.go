package sandbox

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// auditArch is what the kernel calls the processor that this binary is for.
var auditArch = map[string]uint32{
	"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64, "riscv64": unix.AUDIT_ARCH_RISCV64,
	"ppc64le": unix.AUDIT_ARCH_PPC64LE, "s390x": unix.AUDIT_ARCH_S390X,
}

// x32Bit marks the system calls of another calling convention on amd64.
const x32Bit = 0x40000000

// Offsets in struct seccomp_data. Of an argument, the half that has the low 32
// bits is looked at: all the kernel does, where it takes an int.
const (
	seccompNumber = 0
	seccompArch   = 4
	seccompArgs   = 16
)

// A filter is a program that the kernel asks about every system call. It goes
// through the calls one by one: the kernel remembers the answer for those whose
// arguments do not matter (Linux 5.11).
//
// gVisor's seccomp package makes better programs, but takes tens of milliseconds and 3 MB for
// that, each time a process starts.
type filter []unix.SockFilter

// newFilter returns a filter that knows the calling convention.
func newFilter() (filter, error) {
	arch, ok := auditArch[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("there is no filter for %s", runtime.GOARCH)
	}
	return filter{
		load(seccompArch),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: arch, Jt: 1},
		give(unix.SECCOMP_RET_KILL_PROCESS),
		load(seccompNumber),
		skipUnless(unix.BPF_JGE, x32Bit, 1), give(unix.SECCOMP_RET_KILL_PROCESS),
	}, nil
}

func load(at uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
}

func give(verdict uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: verdict}
}

func skipUnless(how uint16, k uint32, n int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | how, K: k, Jf: uint8(n)}
}

// judge has a verdict on a call, whatever its arguments.
func (f *filter) judge(nr, verdict uint32) {
	*f = append(*f, skipUnless(unix.BPF_JEQ, nr, 1), give(verdict))
}

// An argument is one that has to have a value, in the bits of mask.
type argument struct {
	n           uint32
	mask, value uint32
}

// is wants an argument to have a value.
func is(n int, value uint32) argument { return argument{uint32(n), ^uint32(0), value} }

// A choice is a verdict on calls whose arguments are all as it wants.
type choice struct {
	args    []argument
	verdict uint32
}

// judgeArgs has the verdict of the first choice that fits, and otherwise that of
// dying.
func (f *filter) judgeArgs(nr uint32, choices ...choice) {
	var body filter
	for _, c := range choices {
		var one filter
		for i, a := range c.args {
			// What is left of this choice: 2 or 3 per argument, and the verdict.
			rest := 1
			for _, b := range c.args[i+1:] {
				rest += b.size()
			}
			one = append(one, load(seccompArgs+8*a.n+lowHalf))
			if a.mask != ^uint32(0) {
				one = append(one, unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: a.mask})
			}
			one = append(one, skipUnless(unix.BPF_JEQ, a.value, rest))
		}
		body = append(append(body, one...), give(c.verdict))
	}
	body = append(body, give(unix.SECCOMP_RET_KILL_PROCESS))
	// A conditional jump reaches 255 far, another one farther.
	*f = append(*f, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jt: 1},
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(body))})
	*f = append(*f, body...)
}

// size is how many instructions an argument takes.
func (a argument) size() int {
	if a.mask != ^uint32(0) {
		return 3
	}
	return 2
}

// lowHalf is where an argument has its low 32 bits.
var lowHalf = func() uint32 {
	one := uint64(1)
	if *(*uint32)(unsafe.Pointer(&one)) == 1 {
		return 0
	}
	return 4
}()

// install installs the filter for all threads. What it does not know gets the
// verdict otherwise.
func (f filter) install(otherwise uint32) error {
	f = append(f, give(otherwise))
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	switch {
	case errno != 0:
		return errno
	case r != 0:
		return fmt.Errorf("thread %d has a filter of its own", r)
	}
	return nil
}
