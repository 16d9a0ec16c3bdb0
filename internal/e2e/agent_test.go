package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
)

// agentOf finds the agent, which has to be one that sees no files.
func agentOf(t *testing.T, w *world) int {
	t.Helper()
	var info struct {
		Sandbox struct {
			AgentFiles string `json:"agent_files"`
		}
	}
	if err := json.Unmarshal([]byte(mustCtl(t, w, "info", "--json")), &info); err != nil {
		t.Fatal(err)
	}
	switch why := info.Sandbox.AgentFiles; {
	case strings.Contains(why, "cgo"):
		t.Skip(why)
	case why != "":
		t.Errorf("the agent sees files: %s", why)
	}
	return helperOf(t, w)
}

// intrude tries what gives one process a look into another, and tells what has
// worked.
var intrude = rig.NewFunc("e2e.intrude", func(_ context.Context, pid int) ([]string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	proc := fmt.Sprintf("/proc/%d/", pid)
	attempts := map[string]func() error{
		"PTRACE_SEIZE": func() error {
			return withTrace(pid, func() error { return nil })
		},
		"PTRACE_ATTACH": func() error {
			if err := unix.PtraceAttach(pid); err != nil {
				return err
			}
			_, _ = unix.Wait4(pid, nil, unix.WALL, nil)
			return unix.PtraceDetach(pid)
		},
		"process_vm_readv": func() error {
			var b [8]byte
			_, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: 8}}, []unix.RemoteIovec{{Base: 0x400000, Len: 8}}, 0)
			return err
		},
		"pidfd_getfd": func() error {
			fd, err := stealFD(pid, 0)
			if err == nil {
				unix.Close(fd)
			}
			return err
		},
		"ns/net": func() error { return readable(proc + "ns/net") },
		"ns/mnt": func() error { return readable(proc + "ns/mnt") },
	}
	for _, name := range []string{"mem", "maps", "smaps", "environ", "auxv", "pagemap", "syscall", "stack"} {
		attempts[name] = func() error { return readable(proc + name) }
	}
	for _, name := range []string{"root", "cwd", "exe", "fd/0", "fd/1", "fd/2", "fd/3", "fd/4"} {
		attempts[name] = func() error { _, err := os.Readlink(proc + name); return err }
	}
	var worked []string
	for name, f := range attempts {
		// Other errors come from behind the door, but for that of a descriptor that
		// there is not.
		err := f()
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOENT) {
			worked = append(worked, fmt.Sprintf("%s: %v", name, err))
		}
	}
	return worked, nil
})

// readable opens a file and reads from it.
func readable(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if strings.Contains(path, "/ns/") {
		return nil
	}
	_, err = unix.Read(fd, make([]byte, 1))
	return err
}

// withTrace has f run while this thread traces pid, which has stopped.
func withTrace(pid int, f func() error) error {
	if err := unix.PtraceSeize(pid); err != nil {
		return err
	}
	if err := unix.PtraceInterrupt(pid); err != nil {
		return err
	}
	if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != nil {
		return err
	}
	return errors.Join(f(), unix.PtraceDetach(pid))
}

// stealFD copies a descriptor of another process.
func stealFD(pid, fd int) (int, error) {
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(p)
	return unix.PidfdGetfd(p, fd, 0)
}

// A view is what a process of the container sees through another.
type view struct {
	Root []string // all that there is below its root
	Out  []string // paths that lead to the file that was looked for
	FDs  []string // kinds of descriptors
}

type viewRequest struct {
	PID  int
	File string // of the host
}

// lookThrough looks at the host through a process, by what /proc offers to those
// who may trace it: the same that the process could be forced to look at.
var lookThrough = rig.NewFunc("e2e.lookThrough", func(_ context.Context, r viewRequest) (v view, err error) {
	proc := fmt.Sprintf("/proc/%d/", r.PID)
	root := proc + "root/"
	if err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if len(v.Root) == 20 {
			return filepath.SkipAll // it is not empty
		}
		v.Root = append(v.Root, strings.TrimPrefix(path, root))
		return nil
	}); err != nil {
		return v, err
	}
	up := strings.Repeat("/..", 20)
	for _, way := range []string{"root", "root" + up, "cwd", "cwd" + up, "exe" + up} {
		if _, err := os.Stat(proc + way + r.File); err == nil {
			v.Out = append(v.Out, way)
		}
	}
	for fd := range 64 {
		link, err := os.Readlink(fmt.Sprintf("%sfd/%d", proc, fd))
		if err != nil {
			continue
		}
		stolen, err := stealFD(r.PID, fd)
		if err != nil {
			return v, err
		}
		defer unix.Close(stolen)
		var st unix.Stat_t
		if err := unix.Fstat(stolen, &st); err != nil {
			return v, err
		}
		kind := "?"
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			kind = "directory"
		case unix.S_IFREG:
			kind = "file"
			if strings.HasPrefix(link, "net:[") {
				kind = "namespace"
			}
		case unix.S_IFCHR:
			kind = fmt.Sprintf("device %d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
		case unix.S_IFSOCK:
			kind = "socket"
		case unix.S_IFIFO:
			kind = "pipe"
		case 0:
			kind = "anonymous"
		}
		v.FDs = append(v.FDs, fmt.Sprintf("%d %s (%s)", fd, kind, link))
		for _, way := range []string{"", up} {
			if _, err := os.Stat(fmt.Sprintf("%sfd/%d%s%s", proc, fd, way, r.File)); err == nil {
				v.Out = append(v.Out, fmt.Sprintf("fd/%d%s", fd, way))
			}
		}
	}
	// Root of the agent's user namespace may also go where the agent is.
	var joined error
	wait := make(chan struct{})
	go func() {
		defer close(wait)
		runtime.LockOSThread() // and end it
		fd, err := unix.Open(proc+"ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			joined = err
			return
		}
		defer unix.Close(fd)
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			joined = err
			return
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNS); err != nil {
			return // it may not
		}
		if _, err := os.Stat(r.File); err == nil {
			v.Out = append(v.Out, "setns")
		}
	}()
	<-wait
	return v, joined
})

// TestAgentLookedInto: root of the container who can name usernet's processes gets
// nothing of the host's, neither by looking into them nor through the agent, into
// which it can.
func TestAgentLookedInto(t *testing.T) {
	rig.NeedUsernet(t)
	eachLink(t, func(t *testing.T, w *world) {
		w.Guest.ServeOn(t, false)
		a := w.attach(t, "-p", "8090:"+itoa(rig.Services.Talk))
		agent := agentOf(t, w)
		for name, pid := range map[string]int{
			"usernet": a.PID, "usernet-worker": workerOf(t, w), "usernet-cleaner": processOf(t, w, "usernet-cleaner"),
		} {
			if worked := intrude.On(t, w.Guest, pid); len(worked) > 0 {
				t.Errorf("the guest can look into %s: %v", name, worked)
			}
		}
		if worked := intrude.On(t, w.Guest, agent); len(worked) == 0 {
			t.Error("the guest cannot look into the agent: this test tests nothing")
		}
		secret := filepath.Join(w.Dir, "secret")
		w.User.Must(t, "sh", "-c", "echo secret > "+secret)
		w.Guest.Must(t, "cat", secret) // this guest has the host's files; others may not
		v := lookThrough.On(t, w.Guest, viewRequest{agent, secret})
		if len(v.Out) > 0 {
			t.Errorf("the host's files are seen through the agent: by %v", v.Out)
		}
		if got := strings.Join(v.Root, " "); got != " dev dev/net dev/net/tun" && got != " dev dev/net" {
			t.Errorf("its root has %q", v.Root)
		}
		for _, fd := range v.FDs {
			switch _, kind, _ := strings.Cut(fd, " "); {
			case strings.HasPrefix(kind, "device 1:3"), strings.HasPrefix(kind, "socket"), strings.HasPrefix(kind, "pipe"),
				strings.HasPrefix(kind, "namespace"), strings.HasPrefix(kind, "anonymous"):
			default:
				t.Errorf("it has descriptor %s", fd)
			}
		}
		// It still does its work.
		mustCtl(t, w, "forward", "add", "8091:"+itoa(rig.Services.Talk))
		families(t, func(t *testing.T, six bool) { wantNetwork(t, w.Guest, six) })
	})
}

// keptBinary is what the guest has kept of the agent's binary.
var keptBinary int

var keepBinary = rig.NewFunc("e2e.keepBinary", func(_ context.Context, pid int) (struct{}, error) {
	var err error
	keptBinary, err = unix.Open(fmt.Sprintf("/proc/%d/exe", pid), unix.O_PATH|unix.O_CLOEXEC, 0)
	return struct{}{}, err
})

var writeBinary = rig.NewFunc("e2e.writeBinary", func(context.Context, struct{}) (string, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", keptBinary), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err.Error(), nil
	}
	unix.Close(fd)
	return "", nil
})

// TestAgentBinary: the guest cannot change the binary for the next who executes it,
// even if it belongs to the user.
func TestAgentBinary(t *testing.T) {
	rig.NeedUsernet(t)
	w := onTap(t)
	own := filepath.Join(w.Dir, "usernet-own")
	w.User.Must(t, "cp", rig.Binary(t), own)
	a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{Prefix: []string{"sh", "-c", `shift; exec ` + own + ` "$@"`, "sh"}})
	agent := agentOf(t, w)
	keepBinary.On(t, w.Guest, agent)
	a.HangUp()
	a.WantExit(t, 0, 2*time.Second)
	w.Guest.Must(t, "test", "-w", own) // by its path, as long as it has one
	if why := writeBinary.On(t, w.Guest, struct{}{}); why != unix.EROFS.Error() {
		t.Errorf("the binary can be opened to write: %q", why)
	}
}

// TestAgentHeld: a guest that stops the agent, or keeps it by tracing it, stops
// nothing else, and usernet ends in time.
func TestAgentHeld(t *testing.T) {
	rig.NeedUsernet(t)
	for name, hold := range map[string]func(t *testing.T, w *world, pid int){
		"stopped": func(t *testing.T, w *world, pid int) { w.Guest.Must(t, "kill", "-STOP", itoa(pid)) },
		"traced":  func(t *testing.T, w *world, pid int) { holdByTrace.On(t, w.Guest, pid) },
	} {
		t.Run(name, func(t *testing.T) {
			w := onTap(t)
			a := w.attach(t)
			hold(t, w, helperOf(t, w))
			mustCtl(t, w, "info")
			wantNetwork(t, w.Guest, false)
			a.Signal(syscall.SIGTERM)
			t.Logf("ended after %v", a.WantExit(t, 0, 5*time.Second))
		})
	}
}

// holdByTrace traces a process until this one ends.
var holdByTrace = rig.NewFunc("e2e.holdByTrace", func(_ context.Context, pid int) (struct{}, error) {
	held := make(chan error)
	go func() {
		runtime.LockOSThread()
		held <- unix.PtraceSeize(pid)
		select {}
	}()
	return struct{}{}, <-held
})

// TestAgentLimited: a container that leaves no room for the agent's mount namespace
// does not get one that sees files.
func TestAgentLimited(t *testing.T) {
	rig.NeedUsernet(t)
	if strings.Contains(os.Getenv("USERNET_RIG_BUILD"), "-race") {
		t.Skip("the race detector brings cgo, and that files to begin with")
	}
	w := onTap(t)
	w.Guest.Must(t, "sh", "-c", "echo 0 > /proc/sys/user/max_mnt_namespaces")
	a := w.AttachFrom(t, w.User, w.Guest, rig.AttachOptions{NoWait: true})
	if code, ok := a.Wait(10 * time.Second); !ok || code != 1 {
		t.Fatalf("status %d, ended %v: %s", code, ok, a.Stderr())
	}
	a.WantOneLine(t, "make a mount namespace", "max_mnt_namespaces")
}

// TestAgentSeesFiles: where the host forbids mount namespaces all goes on, and
// `usernet info` says it.
func TestAgentSeesFiles(t *testing.T) {
	rig.NeedUsernet(t)
	t.Parallel()
	n := rig.New(t, rig.Options{})
	guest := n.GuestOf(t, n.Host, rig.Spaces{User: true, Net: true})
	n.Host.Must(t, "sh", "-c", "echo 0 > /proc/sys/user/max_mnt_namespaces")
	a := n.AttachFrom(t, n.Host, guest, rig.AttachOptions{})
	wantNetwork(t, guest, false)
	_, text, _ := ctl(t, n.Host, "info", "--json")
	if !strings.Contains(text, "max_mnt_namespaces is 0") && !strings.Contains(text, "cgo") {
		t.Errorf("info:\n%s", text)
	}
	a.HangUp()
	a.WantExit(t, 0, 2*time.Second)
}
