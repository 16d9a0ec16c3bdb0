package agent

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Ordinary users for tests that are started by root. They need no account.
const (
	userID      = 47000
	otherUserID = 47001
)

// needRoot skips what only root can arrange.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to arrange")
	}
}

// cannot skips a test for lack of something in the machine, or fails it where
// the machine is known to have everything.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("USERNET_REQUIRE_NETNS") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// binaryCopy is a copy of the test binary that every user may run: the original
// lies in a directory of the user who started the tests.
var binaryCopy = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "usernet-agent-test")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "agent.test")
	return path, os.WriteFile(path, b, 0o755)
})

var binaryUsed bool

func testBinary(t *testing.T) string {
	t.Helper()
	binaryUsed = true
	path, err := binaryCopy()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func removeBinary() {
	if path, err := binaryCopy(); binaryUsed && err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
}

// as returns a command prefix that runs what follows as an ordinary user; when
// the tests are run by one, as that one.
func as(uid int) []string {
	if os.Geteuid() != 0 {
		return nil
	}
	id := strconv.Itoa(uid)
	return []string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--"}
}

func join(parts ...[]string) []string {
	var all []string
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// within returns a command prefix that runs what follows inside the namespaces
// of process pid, kinds being options of nsenter.
func within(pid int, kinds ...string) []string {
	return join([]string{"nsenter", "-t", strconv.Itoa(pid), "--preserve-credentials"}, kinds, []string{"--"})
}

// A container is a process in namespaces of its own. It lives until the test
// ends, or the test process.
type container struct {
	pid int
	cmd *exec.Cmd
}

// startContainer runs prefix, which makes the namespaces, and waits until it is
// done with that.
func startContainer(t *testing.T, prefix ...string) *container {
	t.Helper()
	// The shell's process is what unshare was, so the pid is right as long as
	// nothing forks.
	cmd := exec.Command(prefix[0], append(prefix[1:], "sh", "-c", "echo ready; exec cat >/dev/null")...)
	cmd.Dir = "/"
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		cannot(t, "%v: %v", prefix, err)
	}
	c := &container{pid: cmd.Process.Pid, cmd: cmd}
	t.Cleanup(func() {
		stdin.Close()
		c.kill()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		_ = cmd.Wait()
		cannot(t, "%v: %v: %s", prefix, err, stderr.String())
	}
	return c
}

func (c *container) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// run runs a command in the container's user and network namespaces.
func (c *container) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.try(args...)
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

func (c *container) try(args ...string) (string, error) {
	out, err := c.command(args...).CombinedOutput()
	return string(out), err
}

// command prepares a command in the container's namespaces, as its user.
func (c *container) command(args ...string) *exec.Cmd {
	prefix := within(c.pid, "-n")
	ours, _ := os.Readlink("/proc/self/ns/user")
	theirs, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", c.pid))
	if ours != theirs {
		prefix = join(as(userID), within(c.pid, "-U", "-n"))
	}
	args = join(prefix, args)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	return cmd
}

// start starts a program there, until the test ends, and waits for its first
// line.
func (c *container) start(t *testing.T, line string, args ...string) {
	t.Helper()
	cmd := c.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if got, err := bufio.NewReader(stdout).ReadString('\n'); strings.TrimSpace(got) != line {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("%v: %q, %v: %s", args, got, err, stderr.String())
	}
}

// hasLink reports whether the container has the interface.
func (c *container) hasLink(name string) bool {
	_, err := c.try("ip", "link", "show", "dev", name)
	return err == nil
}

// An attachment is a helper process that has attached itself to a container.
type attachment struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	out    *bufio.Reader
	stderr *bytes.Buffer
	helperResult
}

// attach starts a helper behind prefix. Whether it could attach is in the result.
func attach(t *testing.T, prefix []string, order helperOrder) *attachment {
	t.Helper()
	b, err := json.Marshal(order)
	if err != nil {
		t.Fatal(err)
	}
	args := append(prefix[:len(prefix):len(prefix)], testBinary(t))
	a := &attachment{cmd: exec.Command(args[0], args[1:]...), stderr: new(bytes.Buffer)}
	a.cmd.Dir = "/"
	a.cmd.Stderr = a.stderr
	a.cmd.Env = append(os.Environ(), roleEnv+"=attach", orderEnv+"="+string(b))
	if a.stdin, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := a.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.end() })
	a.out = bufio.NewReader(stdout)
	a.helperResult = a.result(t)
	return a
}

// ask sends the helper one command.
func (a *attachment) ask(t *testing.T, command string) helperResult {
	t.Helper()
	if _, err := io.WriteString(a.stdin, command+"\n"); err != nil {
		t.Fatal(err)
	}
	return a.result(t)
}

func (a *attachment) result(t *testing.T) helperResult {
	t.Helper()
	line, err := a.out.ReadBytes('\n')
	if err != nil {
		t.Fatalf("%v: helper ended: %v: %s", a.cmd.Args, err, a.stderr)
	}
	var r helperResult
	if err := json.Unmarshal(line, &r); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return r
}

// must fails the test if the helper could not attach.
func (a *attachment) must(t *testing.T) *attachment {
	t.Helper()
	if a.Err != "" {
		t.Fatalf("%v: %s", a.cmd.Args, a.Err)
	}
	return a
}

// end ends the helper in an orderly way.
func (a *attachment) end() error {
	_ = a.stdin.Close()
	err := a.cmd.Wait()
	if err != nil && strings.Contains(err.Error(), "already") {
		return nil
	}
	return err
}

// patience is what a machine with much to do may need for anything.
const patience = time.Minute

// eventually waits for something that takes a moment. More than limit is only
// worth a line: it says as much of the machine.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > patience {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if took := time.Since(began); took > limit {
		t.Logf("%s: after %v, want at most %v on a machine of its own", what, took, limit)
	}
}

// alive reports whether the process is there. A zombie whose parent was killed
// is init's to reap, and gone.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// rerun runs the current test anew behind prefix and returns true there; the
// caller is done where it returns false.
func rerun(t *testing.T, prefix ...string) bool {
	t.Helper()
	const mark = "USERNET_TEST_RERUN"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	if out, err := exec.Command("unshare", "-Urm", "true").CombinedOutput(); err != nil {
		cannot(t, "no user namespaces: %v: %s", err, out)
	}
	args := append(prefix, testBinary(t), "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), mark+"="+t.Name())
	out, err := cmd.CombinedOutput()
	switch {
	case err != nil:
		t.Fatalf("%v: %v\n%s", prefix, err, out)
	case bytes.Contains(out, []byte("--- SKIP")):
		cannot(t, "%s", out)
	case testing.Verbose():
		t.Logf("%s", out)
	}
	return false
}
