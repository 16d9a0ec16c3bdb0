package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/memory"
)

// A registered file, and what it was at the time.
type registered struct {
	Path     string
	Dev, Ino uint64 // 0 where it did not exist yet
}

func register(path string) registered {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return registered{Path: path}
	}
	return registered{path, uint64(st.Dev), st.Ino}
}

// remove unlinks the file, unless a successor has made its own in its place.
func (r registered) remove() {
	var st unix.Stat_t
	if unix.Lstat(r.Path, &st) != nil || r.Ino != 0 && (uint64(st.Dev) != r.Dev || st.Ino != r.Ino) {
		return
	}
	_ = unix.Unlink(r.Path)
}

// A Cleaner removes files if this process is killed without a chance to do so
// itself. It is a process of its own, since the agent sees no files. The zero value
// has none to remove.
type Cleaner struct {
	mu      sync.Mutex // guards following
	process *cleaning  // nil: there are none
	closed  bool
}

// cleaning is the process, and the pipe at whose end it cleans up.
type cleaning struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

// OnDeath names the files, in the place of those that were named before. They
// should exist: a file that another process has put in the place of one of them
// meanwhile is left alone.
func (c *Cleaner) OnDeath(paths []string) error {
	files := make([]registered, len(paths))
	for i, p := range paths {
		absolute, err := filepath.Abs(p)
		if err != nil {
			return fmt.Errorf("agent: register file: %w", err)
		}
		files[i] = register(absolute)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	var next *cleaning
	if len(paths) > 0 {
		var err error
		if next, err = startCleaning(files); err != nil {
			return fmt.Errorf("agent: register file: %w", err)
		}
	}
	c.process.dismiss()
	c.process = next
	return nil
}

// Close removes nothing. OnDeath does nothing from then on.
func (c *Cleaner) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.process.dismiss()
	c.process, c.closed = nil, true
}

// startCleaning starts the process. It need not be up for the files to be removed:
// what it has to know waits in the pipe.
func startCleaning(files []registered) (*cleaning, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{cleanerName}
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &cleaning{cmd, pipe}
	if err := json.NewEncoder(pipe).Encode(files); err != nil {
		c.dismiss()
		return nil, err
	}
	return c, nil
}

// dismiss ends the process with nothing removed.
func (c *cleaning) dismiss() {
	if c == nil {
		return
	}
	_ = c.cmd.Process.Kill()
	_ = c.pipe.Close()
	_ = c.cmd.Wait()
}

// runCleaner is the cleaner's process: it reads the files and waits for the
// pipe's end, which without a kill before it means that the parent was killed.
func runCleaner() error {
	ignoreSignals()
	in := json.NewDecoder(os.Stdin)
	var files []registered
	if err := in.Decode(&files); err != nil {
		return err
	}
	memory.Trim() // it waits as long as the container lives
	if err := in.Decode(new(any)); !errors.Is(err, io.EOF) {
		return err
	}
	for _, f := range files {
		f.remove()
	}
	return nil
}
