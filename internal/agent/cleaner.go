package agent

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// A registered file, and what it was at the time.
type registered struct {
	path     string
	dev, ino uint64 // 0 where it did not exist yet
}

func register(path string) registered {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return registered{path: path}
	}
	return registered{path, uint64(st.Dev), st.Ino}
}

// remove unlinks the file, unless a successor has made its own in its place.
func (r registered) remove() {
	var st unix.Stat_t
	if unix.Lstat(r.path, &st) != nil || r.ino != 0 && (uint64(st.Dev) != r.dev || st.Ino != r.ino) {
		return
	}
	_ = unix.Unlink(r.path)
}

// removable reports whether this process may unlink the file, as far as that
// can be told without trying.
func removable(path string) bool {
	dir := filepath.Dir(path)
	var in, it unix.Stat_t
	if unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS) != nil || unix.Stat(dir, &in) != nil {
		return false
	}
	// In a sticky directory such as /tmp it takes the file's owner, or its own.
	uid := uint32(os.Geteuid())
	return in.Mode&unix.S_ISVTX == 0 || in.Uid == uid || unix.Lstat(path, &it) == nil && it.Uid == uid
}

// A cleaner is a second process that removes the files the agent cannot, for
// it has become another user: root attached to somebody's container.
type cleaner struct {
	pipe io.WriteCloser
	cmd  *exec.Cmd
}

// clean starts the cleaner for paths.
func (a *Agent) clean(paths []string) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{cleanerName}
	cmd.Env = environment()
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	c := &cleaner{pipe, cmd}
	if err := json.NewEncoder(pipe).Encode(paths); err != nil {
		c.dismiss()
		return err
	}
	a.replaceCleaner(c)
	return nil
}

// replaceCleaner puts c, which may be nil, in the place of the cleaner there is.
func (a *Agent) replaceCleaner(c *cleaner) {
	a.cleanMu.Lock()
	old := a.cleaner
	a.cleaner = c
	a.cleanMu.Unlock()
	if old != nil {
		old.dismiss()
	}
}

// dismiss ends the cleaner with nothing removed.
func (c *cleaner) dismiss() {
	_ = c.cmd.Process.Kill()
	_ = c.pipe.Close()
	_ = c.cmd.Wait()
}

// runCleaner is the cleaner's process: it reads the paths and waits for the
// pipe's end, which without a kill before it means that the parent was killed.
func runCleaner() error {
	ignoreSignals()
	in := json.NewDecoder(os.Stdin)
	var paths []string
	if err := in.Decode(&paths); err != nil {
		return err
	}
	files := make([]registered, len(paths))
	for i, p := range paths {
		files[i] = register(p)
	}
	if err := in.Decode(&paths); !errors.Is(err, io.EOF) {
		return err
	}
	for _, f := range files {
		f.remove()
	}
	return nil
}
