package netns

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const userID = 47000

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inside runs the test anew as root of a user namespace with a mount namespace,
// or as an ordinary user without, and returns true there.
func inside(t *testing.T, attr *syscall.SysProcAttr) bool {
	t.Helper()
	const mark = "USERNET_TEST_RERUN"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), mark+"="+t.Name())
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		t.Fatalf("%s", out)
	case err != nil && os.Getenv("USERNET_REQUIRE_NETNS") != "1":
		t.Skipf("cannot make namespaces: %v", err)
	case err != nil:
		t.Fatalf("cannot make namespaces: %v", err)
	}
	return false
}

func ordinaryUser() *syscall.SysProcAttr {
	if os.Geteuid() != 0 {
		return nil
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: userID}}
}

func rootInside() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
}

// start runs a command that says "ready" and lives until it is told otherwise.
func start(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(args[0], append(args[1:], "sh", "-c", "echo ready; exec cat")...)
	cmd.Dir = "/"
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	if line, _ := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		if os.Getenv("USERNET_REQUIRE_NETNS") == "1" {
			t.Fatalf("%v: no namespaces", args)
		}
		t.Skipf("%v: no namespaces", args)
	}
	return cmd
}

func TestOpen(t *testing.T) {
	if !inside(t, ordinaryUser()) {
		return
	}
	cmd := start(t, "unshare", "-Urn")
	pid := cmd.Process.Pid
	for _, path := range []string{fmt.Sprintf("/proc/%d/ns/net", pid), fmt.Sprintf("/proc/%d/task/%d/ns/net", pid, pid)} {
		ns, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		link, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("net:[%d]", ns.Inode()); link != want {
			t.Errorf("inode: %s, want %s", want, link)
		}
		if ns.IsOwn() {
			t.Errorf("%s is taken for this process's own", path)
		}
		if ns.Owner() == nil || ns.OwnerUID() != os.Geteuid() || ns.Path() != path {
			t.Errorf("%s: owner %v, uid %d", path, ns.Owner(), ns.OwnerUID())
		}
		checkFDs(t, ns)
	}
	ns, err := OpenPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(ns.Close(), ns.Close()); err != nil {
		t.Error(err)
	}
	// One's own.
	own, err := Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if !own.IsOwn() {
		t.Error("this process's own namespace is taken for another")
	}
	if own.Owner() != nil {
		t.Error("this process's own user namespace is not the owner's")
	}
}

func checkFDs(t *testing.T, ns *Namespace) {
	t.Helper()
	for _, f := range []*os.File{ns.net, ns.owner} {
		if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: flags %#x, %v: want close-on-exec", f.Name(), flags, err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	zombie := exec.Command("true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = zombie.Wait() }()
	for state := ""; state != "Z"; time.Sleep(time.Millisecond) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", zombie.Process.Pid))
		_, rest, _ := strings.Cut(string(b), ") ")
		state = rest[:1]
	}
	pidErr := func(pid int) error { return second(OpenPID(pid)) }
	pathErr := func(path string) error { return second(Open(path)) }
	for name, test := range map[string]struct {
		err  error
		want []string
	}{
		"empty":            {pathErr(""), []string{"empty path", "/proc/PID/ns/net"}},
		"missing":          {pathErr(dir + "/none"), []string{dir + "/none", "no such file", "running container"}},
		"below a file":     {pathErr(file("f", "x") + "/ns"), []string{"not a directory", "running container"}},
		"no name":          {pathErr("no-such-name"), []string{"/run/netns/no-such-name", "ip netns list"}},
		"empty file":       {pathErr(file("e", "")), []string{"empty file", "anew"}},
		"text":             {pathErr(file("t", "text")), []string{"not a network namespace: give"}},
		"directory":        {pathErr(dir), []string{"not a network namespace: give"}},
		"device":           {pathErr("/dev/null"), []string{"not a network namespace: give"}},
		"fifo":             {pathErr(fifo), []string{"not a network namespace: give"}},
		"user namespace":   {pathErr("/proc/self/ns/user"), []string{"a user namespace", "/ns/net"}},
		"mount namespace":  {pathErr("/proc/self/ns/mnt"), []string{"a mount namespace", "/ns/net"}},
		"process 0":        {pidErr(0), []string{"process 0", "positive"}},
		"negative process": {pidErr(-4), []string{"process -4", "positive"}},
		"dead process":     {pidErr(dead.Process.Pid), []string{"no process " + strconv.Itoa(dead.Process.Pid), "it has ended"}},
		"dead path":        {pathErr(fmt.Sprintf("/proc/%d/ns/net", dead.Process.Pid)), []string{"no process", "it has ended"}},
		"zombie":           {pidErr(zombie.Process.Pid), []string{"has ended", "start the container anew"}},
	} {
		if test.err == nil {
			t.Errorf("%s: opened", name)
			continue
		}
		text := test.err.Error()
		if !strings.HasPrefix(text, "netns: open ") || strings.Contains(text, "\n") {
			t.Errorf("%s: %s", name, text)
		}
		for _, w := range test.want {
			if !strings.Contains(text, w) {
				t.Errorf("%s: %s: want %q", name, text, w)
			}
		}
		if testing.Verbose() {
			t.Log(test.err)
		}
	}
}

func second(_ *Namespace, err error) error { return err }

func TestOpenForbidden(t *testing.T) {
	if os.Getenv("USERNET_TEST_RERUN") == "" && os.Geteuid() != 0 {
		t.Skip("needs root to be another user")
	}
	if !inside(t, ordinaryUser()) {
		return
	}
	err := second(OpenPID(1))
	if err == nil {
		t.Fatal("opened init's namespace")
	}
	if text := err.Error(); !strings.Contains(text, "permission denied") || !strings.Contains(text, "belongs to uid 0: run usernet as that user or as root") {
		t.Error(text)
	}
}

// watch starts a Watch and returns its result and when it came.
func watch(ctx context.Context, t *testing.T, ns *Namespace) func() (time.Time, error) {
	t.Helper()
	type result struct {
		err error
		at  time.Time
	}
	c := make(chan result, 1)
	go func() { c <- result{ns.Watch(ctx), time.Now()} }()
	time.Sleep(50 * time.Millisecond) // it shall be under way
	return func() (time.Time, error) {
		select {
		case r := <-c:
			return r.at, r.err
		case <-time.After(time.Minute):
			t.Error("the watch does not end")
			return time.Now(), errors.New("no end")
		}
	}
}

// endsBy watches while something happens and wants the end seen soon.
func endsBy(t *testing.T, path string, limit time.Duration, happen func()) {
	t.Helper()
	ns, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	wait := watch(t.Context(), t, ns)
	began := time.Now()
	happen()
	at, err := wait()
	if err != nil {
		t.Error(err)
	}
	if late := at.Sub(began); late < 0 {
		t.Errorf("seen %v before it happened", -late)
	} else if late > limit {
		t.Logf("seen after %v, want %v at most on a machine of its own", late, limit)
	}
}

func TestWatchProcess(t *testing.T) {
	if !inside(t, ordinaryUser()) {
		return
	}
	cmd := start(t, "unshare", "-Urn")
	endsBy(t, fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), 100*time.Millisecond, func() {
		// Not reaped: a zombie is as dead as can be.
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
	})
}

// A process may leave its network namespace alive.
func TestWatchProcessMoves(t *testing.T) {
	if !inside(t, ordinaryUser()) {
		return
	}
	cmd := exec.Command("unshare", "-Urn", "sh", "-c", "echo ready; read x; exec unshare -n cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = cmd.Wait()
	}()
	if line, _ := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Skip("no namespaces")
	}
	endsBy(t, fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), moveInterval+2*time.Second, func() {
		if _, err := stdin.Write([]byte("go\n")); err != nil {
			t.Fatal(err)
		}
	})
}

func TestWatchMount(t *testing.T) {
	if !inside(t, rootInside()) {
		return
	}
	path := filepath.Join(t.TempDir(), "ns")
	bind := func() {
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("/proc/self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	unmount := func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	bind()
	endsBy(t, path, 500*time.Millisecond, unmount)
	bind()
	endsBy(t, path, 500*time.Millisecond, func() {
		unmount()
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	})
}

// The name of another namespace in the same place is not ours.
func TestWatchMountReplaced(t *testing.T) {
	if !inside(t, rootInside()) {
		return
	}
	cmd := start(t, "unshare", "-n")
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/proc/self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	endsBy(t, path, 500*time.Millisecond, func() {
		if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), path, "", unix.MS_BIND, ""); err != nil {
			t.Error(err)
		}
	})
	for range 2 {
		_ = unix.Unmount(path, unix.MNT_DETACH)
	}
}

func TestWatchName(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to name a namespace")
	}
	name := fmt.Sprintf("usernet-watch-%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Skipf("ip netns add: %v: %s", err, out)
	}
	endsBy(t, name, 500*time.Millisecond, func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func TestWatchContext(t *testing.T) {
	if !inside(t, ordinaryUser()) {
		return
	}
	cmd := start(t, "unshare", "-Urn")
	ns, err := OpenPID(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	goroutines := runtime.NumGoroutine()
	ctx, cancel := context.WithCancel(t.Context())
	first, next := watch(ctx, t, ns), watch(ctx, t, ns)
	ns.Close() // a watch goes on without
	time.Sleep(2 * moveInterval)
	cancel()
	for _, wait := range []func() (time.Time, error){first, next} {
		if _, err := wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want context.Canceled", err)
		}
	}
	n := runtime.NumGoroutine()
	for end := time.Now().Add(time.Minute); n > goroutines && time.Now().Before(end); n = runtime.NumGoroutine() {
		time.Sleep(10 * time.Millisecond) // those of watch itself have yet to return
	}
	if n > goroutines {
		t.Errorf("%d goroutines before, %d after", goroutines, n)
	}
}

func TestPathPID(t *testing.T) {
	for path, want := range map[string]int{
		"/proc/17/ns/net":         17,
		"/proc//17/./ns/net":      17,
		"/proc/self/ns/net":       0,
		"/proc/17/task/18/ns/net": 0,
		"/proc/17/fd/3":           0,
		"/proc/-1/ns/net":         0,
		"proc/17/ns/net":          0,
		"/run/17/ns/net":          0,
		"":                        0,
	} {
		if got := pathPID(path); got != want {
			t.Errorf("pathPID(%q) = %d, want %d", path, got, want)
		}
	}
}
