package rig

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A Node is a helper process in a set of namespaces. It starts programs there
// and calls functions there, until the test ends.
type Node struct {
	Name string
	PID  int

	link *link
	dir  string        // where the files of its programs go
	done chan struct{} // closed when the link is
	// ended is closed when the process is over.
	ended <-chan struct{}

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan reply
}

// A reply is a response with the files that came with it.
type reply struct {
	response
	files []*os.File
}

// errNodeGone is what calls fail with when their node has ended.
var errNodeGone = errors.New("rig: the node has ended")

func newNode(name, dir string, l *link) *Node {
	n := &Node{Name: name, link: l, dir: dir, done: make(chan struct{}), waiting: make(map[uint64]chan reply)}
	go n.dispatch()
	return n
}

// startRoot starts the first node directly below the test.
func startRoot(name, dir string, spaces Spaces) (*Node, error) {
	near, far, err := newLinkPair()
	if err != nil {
		return nil, err
	}
	defer far.Close()
	log, err := os.Create(dir + "/" + name + ".log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	// When the test dies, this node sees the end of its link and still has to
	// end what others have left behind.
	spaces.orphan = true
	cmd, err := startCommand(nodeStart(keeper, dir, spaces), []*os.File{null, log, log, far})
	if err != nil {
		return nil, err
	}
	n := newNode(name, dir, near)
	n.PID = cmd.Process.Pid
	ended := make(chan struct{})
	n.ended = ended
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	return n, nil
}

func nodeStart(role, dir string, spaces Spaces) *startRequest {
	return &startRequest{
		Args: []string{"/proc/self/exe"},
		Env: []string{
			nodeVariable + "=" + role,
			// The race detector would let every node sleep for a second
			// before it exits.
			"GORACE=" + os.Getenv("GORACE") + " atexit_sleep_ms=0",
		},
		Dir:    dir,
		Spaces: spaces,
	}
}

// Node starts a node below n. It ends with the test, or with n.
func (n *Node) Node(t testing.TB, name string, spaces Spaces) *Node {
	t.Helper()
	near, far, err := newLinkPair()
	if err != nil {
		t.Fatal(err)
	}
	p, err := n.start(nodeStart(name, n.dir, spaces), name, nil, []*os.File{far})
	far.Close()
	if err != nil {
		near.conn.Close()
		t.Fatalf("start node %s: %v", name, err)
	}
	child := newNode(name, n.dir, near)
	child.PID, child.ended = p.PID, p.done
	t.Cleanup(child.close)
	return child
}

// close ends the node and waits until it has.
func (n *Node) close() {
	n.link.conn.Close()
	select {
	case <-n.ended:
	case <-time.After(10 * time.Second):
	}
}

// Exec starts a program in n and returns at once.
func (n *Node) Exec(t testing.TB, c Command) *Proc {
	t.Helper()
	p, err := n.TryExec(c)
	if err != nil {
		t.Fatalf("%s: %v", n.Name, err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("%s in %s: %s\n%s", p.Name, n.Name, p.state(), tail(p.Stdout()+p.Stderr(), 4000))
		}
	})
	return p
}

// A Command is a program to start in a node.
type Command struct {
	Args  []string
	Env   []string   // in addition to the node's
	Stdin *os.File   // nil: nothing to read
	Files []*os.File // descriptors 3 and up; they stay the caller's
	Spaces
}

// TryExec is Exec for a program that may not start. The caller ends it.
func (n *Node) TryExec(c Command) (*Proc, error) {
	r := &startRequest{Args: c.Args, Env: c.Env, Dir: n.dir, Spaces: c.Spaces}
	return n.start(r, c.Args[0], c.Stdin, c.Files)
}

// start starts r's program with its output in files of the node's directory.
func (n *Node) start(r *startRequest, name string, stdin *os.File, extra []*os.File) (*Proc, error) {
	if stdin == nil {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		defer null.Close()
		stdin = null
	}
	p := &Proc{Name: name[strings.LastIndexByte(name, '/')+1:], node: n, done: make(chan struct{})}
	stdout, err := os.CreateTemp(n.dir, p.Name+".*.out")
	if err != nil {
		return nil, err
	}
	defer stdout.Close()
	stderr, err := os.CreateTemp(n.dir, p.Name+".*.err")
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	p.stdout, p.stderr = stdout.Name(), stderr.Name()
	id, replies := n.expect(2)
	files := append([]*os.File{stdin, stdout, stderr}, extra...)
	if err := n.link.send(request{ID: id, Start: r}, files); err != nil {
		n.forget(id)
		return nil, fmt.Errorf("rig: ask %s: %w", n.Name, err)
	}
	first, ok := n.await(replies, 20*time.Second)
	if !ok {
		n.forget(id)
		return nil, errNodeGone
	}
	if first.Err != nil {
		n.forget(id)
		return nil, first.Err
	}
	p.PID = first.PID
	go func() {
		defer close(p.done)
		select {
		case last := <-replies:
			p.status = syscall.WaitStatus(last.Status)
		case <-n.done:
			p.status = syscall.WaitStatus(syscall.SIGKILL)
		}
		n.forget(id)
	}()
	return p, nil
}

// Output is what a finished program wrote.
type Output struct {
	Stdout, Stderr string
	Code           int // exit status, or 128 + signal
}

// Run runs a program in n until its end, at most a minute.
func (n *Node) Run(t testing.TB, args ...string) Output {
	t.Helper()
	return n.RunFor(t, time.Minute, args...)
}

// RunFor is Run with another limit. A program that is still running then is a
// failure of the test.
func (n *Node) RunFor(t testing.TB, limit time.Duration, args ...string) Output {
	t.Helper()
	p, err := n.TryExec(Command{Args: args})
	if err != nil {
		t.Fatalf("%s: %v", n.Name, err)
	}
	defer p.Kill()
	code, ok := p.Wait(limit)
	out := Output{Stdout: p.Stdout(), Stderr: p.Stderr(), Code: code}
	if !ok {
		t.Fatalf("%s: %s still runs after %v\n%s", n.Name, strings.Join(args, " "), limit, tail(out.Stdout+out.Stderr, 4000))
	}
	return out
}

// Must is Run for a program that has to succeed. It returns the output.
func (n *Node) Must(t testing.TB, args ...string) string {
	t.Helper()
	out := n.Run(t, args...)
	if out.Code != 0 {
		t.Fatalf("%s: %s: exit status %d\n%s", n.Name, strings.Join(args, " "), out.Code, tail(out.Stdout+out.Stderr, 4000))
	}
	return out.Stdout
}

// call runs a registered function in n.
func (n *Node) call(name string, arg json.RawMessage, timeout time.Duration) (json.RawMessage, []*os.File, error) {
	id, replies := n.expect(1)
	defer n.forget(id)
	r := request{ID: id, Call: &callRequest{Name: name, Arg: arg, Timeout: timeout}}
	if err := n.link.send(r, nil); err != nil {
		return nil, nil, fmt.Errorf("rig: ask %s: %w", n.Name, err)
	}
	got, ok := n.await(replies, timeout+10*time.Second)
	if !ok {
		return nil, nil, errNodeGone
	}
	if got.Err != nil {
		return nil, got.files, got.Err
	}
	return got.Result, got.files, nil
}

// signal signals a process that n started. ESRCH: it has ended.
func (n *Node) signal(pid int, sig syscall.Signal) error {
	id, replies := n.expect(1)
	defer n.forget(id)
	if err := n.link.send(request{ID: id, Signal: &signalRequest{PID: pid, Signal: int(sig)}}, nil); err != nil {
		return err
	}
	got, ok := n.await(replies, 10*time.Second)
	if !ok {
		return errNodeGone
	}
	if got.Err != nil {
		return got.Err
	}
	return nil
}

// expect makes room for the replies to a new request.
func (n *Node) expect(replies int) (uint64, chan reply) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next++
	c := make(chan reply, replies)
	n.waiting[n.next] = c
	return n.next, c
}

func (n *Node) forget(id uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.waiting, id)
}

func (n *Node) await(c <-chan reply, limit time.Duration) (reply, bool) {
	select {
	case r := <-c:
		return r, true
	case <-n.done:
	case <-time.After(limit):
	}
	return reply{}, false
}

// dispatch hands the node's responses to those who wait for them.
func (n *Node) dispatch() {
	defer close(n.done)
	for {
		var r reply
		var err error
		if r.files, err = n.link.receive(&r.response); err != nil {
			return
		}
		n.mu.Lock()
		c := n.waiting[r.ID]
		n.mu.Unlock()
		select {
		case c <- r:
		default: // nobody waits any more, or c is nil
			closeFiles(r.files)
		}
	}
}

// look finds a program in the PATH that nodes use.
func look(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if path, err := exec.LookPath(dir + "/" + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("rig: no program %s", name)
}

// tail gives the last n bytes of s.
func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}
