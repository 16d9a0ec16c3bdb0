package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/usernet/usernet/internal/rig"
)

// TestScript runs testdata/script: the binary as an ordinary user calls it.
func TestScript(t *testing.T) {
	binary := rig.Binary(t)
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(e *testscript.Env) error {
			e.Vars = append(e.Vars, "USERNET="+binary)
			return chownTree(e.WorkDir)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"refused": refused,
			"fifo": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(syscall.Mkfifo(ts.MkAbs(args[0]), 0o600))
				ts.Check(chownTree(ts.MkAbs(".")))
			},
		},
	})
}

// ordinaryUID is whom the binary runs as if the tests run as root.
const ordinaryUID = 65534

func chownTree(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	// The directories above belong to the test, and are closed to others.
	for d := dir; strings.HasPrefix(d, os.TempDir()+"/"); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			return err
		}
	}
	return filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, ordinaryUID, ordinaryUID)
	})
}

// refused is the script command
//
//	refused STATUS PATTERN ARGUMENT...
//
// It runs usernet as an ordinary user. It has to exit with STATUS at once, with
// nothing on stdout and one line on stderr that matches PATTERN, and to leave
// nothing in its working directory.
func refused(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: refused status pattern argument...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	pattern := regexp.MustCompile(args[1])
	args = args[2:]
	dir := ts.MkAbs(".")
	before := listing(ts, dir)

	var stdout, stderr bytes.Buffer
	cmd := exec.Command(ts.Getenv("USERNET"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+ts.Getenv("XDG_RUNTIME_DIR"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: ordinaryUID, Gid: ordinaryUID}
	}
	ts.Check(cmd.Start())
	stuck := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer stuck.Stop()
	_ = cmd.Wait()

	line := stderr.String()
	switch {
	case cmd.ProcessState.ExitCode() != want:
		ts.Fatalf("usernet %q: %v, want status %d; stderr:\n%s", args, cmd.ProcessState, want, line)
	case stdout.Len() > 0:
		ts.Fatalf("usernet %q wrote to stdout:\n%s", args, stdout.String())
	case strings.Count(line, "\n") != 1 || !strings.HasPrefix(line, "usernet: "):
		ts.Fatalf("usernet %q: stderr is not one line of usernet's:\n%s", args, line)
	case !pattern.MatchString(line):
		ts.Fatalf("usernet %q: stderr does not match %q:\n%s", args, pattern, line)
	}
	if after := listing(ts, dir); after != before {
		ts.Fatalf("usernet %q left something behind: %s before, %s now", args, before, after)
	}
}

func listing(ts *testscript.TestScript, dir string) string {
	entries, err := os.ReadDir(dir)
	ts.Check(err)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return strings.Join(names, " ")
}
