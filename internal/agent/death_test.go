package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

// ownDir makes a directory that uid owns and nobody else may touch.
func ownDir(t *testing.T, uid int) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "usernet-agent-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if os.Geteuid() == 0 && uid > 0 {
		if err := os.Chown(dir, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func touch(t *testing.T, path string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if dir, err := os.Stat(filepath.Dir(path)); err == nil && os.Geteuid() == 0 {
		if err := os.Chown(path, int(dir.Sys().(*syscall.Stat_t).Uid), -1); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// children lists the live processes that run this test's binary as agent or
// cleaner.
func children() []int {
	path, err := binaryCopy()
	if err != nil {
		return nil
	}
	own, err := os.Stat(path)
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir("/proc")
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// An agent's has no path.
		exe, err := os.Stat("/proc/" + e.Name() + "/exe")
		if err != nil || !os.SameFile(exe, own) {
			continue
		}
		b, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if name := strings.TrimRight(string(b), "\x00"); (name == agentName || name == cleanerName) && alive(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func noChildren(t *testing.T) {
	t.Helper()
	eventually(t, 2*time.Second, "no process left", func() bool { return len(children()) == 0 })
}

// A killed usernet takes everything along: agent, interface, files.
func TestParentKilled(t *testing.T) {
	type death struct {
		container, prefix []string
		dir               int  // whose directory the files are in; -1: everybody's
		root              bool // only root can arrange it
	}
	for name, test := range map[string]death{
		"rootless":             {rootless("-Urn"), as(userID), userID, false},
		"no root in map":       {rootless("-Un", "--map-current-user"), as(userID), userID, false},
		"root to rootless":     {rootless("-Urn"), nil, 0, true},
		"root to unmapped":     {rootless("-Un"), nil, 0, true},
		"root to root's":       {[]string{"unshare", "-n"}, nil, 0, true},
		"root, user's pidfile": {rootless("-Urn"), nil, userID, true},
		"sticky directory":     {rootless("-Urn"), as(userID), -1, false},
		"root, sticky":         {rootless("-Urn"), nil, -1, true},
	} {
		for _, kind := range []LinkKind{Auto, Veth} {
			t.Run(name+" "+string(kind), func(t *testing.T) {
				if test.root {
					needRoot(t)
				}
				c := startContainer(t, test.container...)
				dir := ownDir(t, test.dir)
				files := []string{touch(t, dir+"/pid"), touch(t, dir+"/socket")}
				if test.dir < 0 {
					if err := os.Chmod(dir, os.ModeSticky|0o777); err != nil {
						t.Fatal(err)
					}
					if test.prefix != nil {
						for _, f := range files {
							if err := os.Chown(f, userID, userID); err != nil {
								t.Fatal(err)
							}
						}
					}
				}
				a := attach(t, test.prefix, helperOrder{PID: c.pid, Link: testLink(kind), Addresses: testAddresses, Cleanup: files}).must(t)
				a.kill(t)
				eventually(t, time.Second, "agent gone", func() bool { return !alive(a.Agent) })
				eventually(t, time.Second, "files removed", func() bool { return !exists(files[0]) && !exists(files[1]) })
				eventually(t, time.Second, "interface gone", func() bool { return !c.hasLink("tap0") })
				noChildren(t)
			})
		}
	}
}

// kill kills the helper with no chance to do anything.
func (a *attachment) kill(t *testing.T) {
	t.Helper()
	// The prefix has executed the helper, so that this is it.
	if err := a.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = a.cmd.Wait()
}

// keep-id with a subordinate root: the agent is a user who owns nothing on the
// host, but may do in the user namespace what root may.
func TestParentKilledKeepID(t *testing.T) {
	needRoot(t)
	c := startContainer(t, rootless("-Un")...)
	writeMaps(t, c.pid, "0 500000 1000\n47000 47000 1\n")
	file := touch(t, ownDir(t, userID)+"/pid")
	a := attach(t, as(userID), helperOrder{PID: c.pid, Link: testLink(TAP), Cleanup: []string{file}}).must(t)
	a.kill(t)
	eventually(t, time.Second, "file removed", func() bool { return !exists(file) })
	noChildren(t)
}

// A killed usernet leaves nothing at whatever point of its start it was.
func TestParentKilledDuringStart(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	for range 60 {
		cmd := exec.Command(testBinary(t))
		if prefix := as(userID); prefix != nil {
			cmd = exec.Command(prefix[0], append(prefix[1:], testBinary(t))...)
		}
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), roleEnv+"=attach", orderEnv+`={"PID":`+strconv.Itoa(c.pid)+`,"Link":{"name":"tap0"}}`)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(15_000)) * time.Microsecond)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		stdin.Close()
	}
	noChildren(t)
	eventually(t, time.Second, "interface gone", func() bool { return !c.hasLink("tap0") })
}

// An orderly end removes no file: that is for usernet itself to do.
func TestCloseKeepsFiles(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	for _, prefix := range [][]string{as(userID), nil} { // with and without a cleaner, if root
		dir := ownDir(t, 0)
		if prefix != nil {
			dir = ownDir(t, userID)
		}
		file := touch(t, dir+"/pid")
		a := attach(t, prefix, helperOrder{PID: c.pid, Link: testLink(TAP), Cleanup: []string{file}}).must(t)
		if err := a.end(); err != nil {
			t.Error(err)
		}
		noChildren(t)
		if !exists(file) {
			t.Error("the file is gone")
		}
	}
}

// A successor's file is not the killed one's to remove.
func TestParentKilledKeepsSuccessorsFile(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	dir := ownDir(t, userID)
	file := touch(t, dir+"/pid")
	a := attach(t, as(userID), helperOrder{PID: c.pid, Link: testLink(TAP), Cleanup: []string{file}}).must(t)
	next := touch(t, dir+"/new")
	if err := os.Rename(next, file); err != nil {
		t.Fatal(err)
	}
	a.kill(t)
	noChildren(t)
	if !exists(file) {
		t.Error("the successor's file is gone")
	}
}

// Only its parent's end, or SIGKILL, ends an agent.
func TestAgentIgnoresSignals(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE} {
		if err := syscall.Kill(a.PID(), s); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Error(err)
	}
}

func TestAgentKilled(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	if err := syscall.Kill(a.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.Done():
	case <-time.After(patience):
		t.Fatal("not seen")
	}
	_, err := a.Configure(*testAddresses)
	if err == nil {
		t.Fatal("a dead agent answers")
	}
	has(t, err.Error(), "the agent process has ended")
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// A stopped agent must not hold up the end.
func TestCloseStoppedAgent(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	if err := syscall.Kill(a.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 2*closeTimeout+patience {
		t.Errorf("took %v", took)
	}
}

func TestStartCancelled(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	ns, err := netns.OpenPID(c.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	for i := range 30 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*200*time.Microsecond)
		a, err := Start(ctx, ns, Options{})
		cancel()
		switch {
		case err == nil:
			a.Close()
		case !errors.Is(err, context.DeadlineExceeded):
			t.Error(err)
		}
	}
	noOwnChildren(t)
}

// noOwnChildren makes sure that this process has no agents left, zombies neither.
func noOwnChildren(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children")
	if err != nil {
		t.Skip(err)
	}
	for _, f := range strings.Fields(string(b)) {
		cmdline, _ := os.ReadFile("/proc/" + f + "/cmdline")
		if len(cmdline) == 0 || strings.HasPrefix(string(cmdline), agentName) {
			t.Errorf("process %s is left: %q", f, cmdline)
		}
	}
}

// Many agents come and go: no descriptor, no process, no thread of the runtime
// in the wrong state is left.
func TestStartMany(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	before := countFDs()
	stop := make(chan struct{})
	var busy sync.WaitGroup
	for range 2 { // the fork has to cope with a runtime in full swing
		busy.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = make([]byte, 64<<10)
				}
			}
		})
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 10 {
				if err := startAndClose(t.Context(), c.pid, "tap"+strconv.Itoa(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	busy.Wait()
	noOwnChildren(t)
	if after := countFDs(); after > before+2 { // the poller's own, at the first use
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func startAndClose(ctx context.Context, pid int, name string) error {
	ns, err := netns.OpenPID(pid)
	if err != nil {
		return err
	}
	defer ns.Close()
	a, err := Start(ctx, ns, Options{})
	if err != nil {
		return err
	}
	defer a.Close()
	link, err := a.OpenLink(LinkSpec{Name: name})
	if err != nil {
		return err
	}
	return unix.Close(link.FD)
}

// The same with a single processor, where a thread that holds it in a fork must
// not need another one.
func TestStartOnOneProcessor(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	prefix := join(as(userID), []string{"env", "GOMAXPROCS=1"})
	a := attach(t, prefix, helperOrder{PID: c.pid, Link: testLink(Auto), Addresses: testAddresses}).must(t)
	if r := a.ask(t, "close"); r.Err != "" {
		t.Fatal(r.Err)
	}
	before := a.ask(t, "churn")
	after := a.ask(t, "churn")
	if before.Err != "" || after.Err != "" || before.FDs != after.FDs {
		t.Errorf("%+v, %+v", before, after)
	}
}

// What the caller has open stays with the caller.
func TestAgentInheritsNothing(t *testing.T) {
	needRoot(t) // to look
	read, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer w.Close()
	// A runtime's pipe comes without close-on-exec.
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	c := startContainer(t, rootless("-Urn")...)
	a, link := attachHere(t, c, testLink(Auto))
	defer unix.Close(link.FD)
	if err := a.SetDefaultRoute6(false); err != nil { // it has closed the link by now
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc/" + strconv.Itoa(a.PID()) + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, _ := os.Readlink("/proc/" + strconv.Itoa(a.PID()) + "/fd/" + e.Name())
		if e.Name() != "2" && (strings.HasPrefix(target, "pipe:") || strings.Contains(target, "tun")) {
			t.Errorf("%s -> %s", e.Name(), target)
		}
	}
	cwd, _ := os.Readlink("/proc/" + strconv.Itoa(a.PID()) + "/cwd")
	if want := map[bool]string{true: "/", false: "/proc/sys/net"}[a.SeesFiles() == nil]; cwd != want {
		t.Errorf("works in %s, want %s: %v", cwd, want, a.SeesFiles())
	}
}

// The agent is bound to the life of a thread, but not to that of the caller's.
func TestStartingThreadEnds(t *testing.T) {
	c := startContainer(t, rootless("-Urn")...)
	var a *Agent
	var link Link
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		a, link = attachHere(t, c, testLink(Auto))
	}()
	<-done
	defer unix.Close(link.FD)
	time.Sleep(100 * time.Millisecond)
	if _, err := a.Configure(*testAddresses); err != nil {
		t.Error(err)
	}
}

// A program that forgot to call Main would start itself again and again.
func TestStartNeedsMain(t *testing.T) {
	wired.Store(false)
	defer wired.Store(true)
	ns, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if _, err := Start(t.Context(), ns, Options{}); err == nil || !strings.Contains(err.Error(), "call it first in main") {
		t.Error(err)
	}
}
