package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rig"
)

// A dialogue is what somebody types at a terminal with a shell, and what is to
// be seen before that.
type dialogue struct {
	Shell []string
	Lines []line
}

type line struct{ Await, Type string }

const (
	ctrlC = "\x03"
	ctrlD = "\x04"
	ctrlZ = "\x1a"
)

// talkToShell holds a dialogue in a node, and returns what was on the screen.
var talkToShell = rig.NewFunc("cmd.talkToShell", func(ctx context.Context, d dialogue) (string, error) {
	master, slave, err := openTerminal()
	if err != nil {
		return "", err
	}
	defer master.Close()
	cmd := exec.Command(d.Shell[0], d.Shell[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.Env = append(os.Environ(), "PS1=$ ", "TERM=dumb", "HISTFILE=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return "", err
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	deadline, _ := ctx.Deadline()
	master.SetReadDeadline(deadline.Add(-time.Second))
	var screen strings.Builder
	seen := 0
	buf := make([]byte, 4096)
	for _, l := range d.Lines {
		for {
			if i := strings.Index(screen.String()[seen:], l.Await); i >= 0 {
				seen += i + len(l.Await)
				break
			}
			n, err := master.Read(buf)
			screen.Write(buf[:n])
			if err != nil {
				return "", fmt.Errorf("wait for %q: %w; on the screen:\n%s", l.Await, err, screen.String())
			}
		}
		if _, err := master.WriteString(l.Type); err != nil {
			return "", err
		}
	}
	return screen.String(), nil
})

// openTerminal opens the two ends of a new pseudo-terminal.
func openTerminal() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(fd), "terminal")
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)); err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

// TestTerminal: at a terminal, `usernet run` behaves like the command itself,
// job control included.
func TestTerminal(t *testing.T) {
	rig.NeedTools(t, "bash")
	t.Parallel()
	n := rig.New(t, rig.Options{})
	run := rig.Binary(t) + " run --log-level=error -- "
	bash := []string{"bash", "--norc", "--noprofile", "--noediting", "-i"}
	for _, tt := range []struct {
		name  string
		shell []string
		lines []line
	}{
		{"input", bash, []line{
			{"$ ", run + `sh -c 'echo u""p; read x; echo "got $x"'` + "\n"},
			{"up\r\n", "something\n"},
			{"got something\r\n", "exit\n"},
		}},
		{"Ctrl-C", bash, []line{
			{"$ ", run + `sh -c 'echo u""p; exec sleep 60'; echo "st""atus $?"` + "\n"},
			{"up\r\n", ctrlC},
			{"status 130\r\n", "exit\n"},
		}},
		{"Ctrl-C is once", bash, []line{
			{"$ ", run + `bash -c 'trap "echo INT" INT; sh -c "echo u\"\"p; exec sleep 60"; sleep 0.3; echo en""d'` + "\n"},
			{"up\r\n", ctrlC},
			{"INT\r\nend\r\n", "exit\n"},
		}},
		{"Ctrl-Z, fg", bash, []line{
			{"$ ", run + "cat\n"},
			{"\n", "one\n"},
			{"one\r\none\r\n", ctrlZ},
			{"Stopped", ""},
			{"cat\r\n", "fg\n"},
			{"cat\r\n", "two\n"},
			{"two\r\ntwo\r\n", ctrlD},
			{"$ ", "exit\n"},
		}},
		{"Ctrl-Z, bg", bash, []line{
			// No child that the stop could meet on its way from vfork to exec,
			// which would hold the parent up with or without usernet.
			{"$ ", run + `bash -c 'echo u""p; for ((i=0; i<400000; i++)); do :; done; echo do""ne; exit 3'` + "\n"},
			{"up\r\n", ctrlZ},
			{"Stopped", "bg; wait %1; echo \"st\"\"atus $?\"\n"},
			{"done\r\n", ""},
			{"status 3\r\n", "exit\n"},
		}},
		{"background reads", bash, []line{
			{"$ ", run + "cat &\n"},
			// The shell tells of the stop before its next prompt.
			{"$ ", "while ! jobs | grep -q Stopped; do sleep 0.1; done; echo \"sto\"\"pped\"\n"},
			{"stopped\r\n", "fg\n"},
			{"cat\r\n", "three\n"},
			{"three\r\nthree\r\n", ctrlD},
			{"$ ", "exit\n"},
		}},
		{"shell in it", bash, []line{
			{"$ ", run + "env PS1=in\"ner:\" bash --norc --noprofile --noediting -i\n"},
			{"inner:", `sh -c 'echo u""p; exec sleep 60'` + "\n"},
			{"up\r\n", ctrlC},
			{"inner:", "cat\n"},
			{"cat\r\n", "five\n"},
			{"five\r\nfive\r\n", ctrlZ},
			{"Stopped", ""},
			{"inner:", "fg\n"},
			{"cat\r\n", ctrlD},
			{"inner:", "exit 7\n"},
			{"$ ", "echo \"st\"\"atus $?\"\n"},
			{"status 7\r\n", "exit\n"},
		}},
		{"shell in it suspends", bash, []line{
			{"$ ", run + "env PS1=in\"ner:\" bash --norc --noprofile --noediting -i\n"},
			{"inner:", "suspend\n"},
			{"Stopped", "echo \"out\"\"side\"\n"},
			{"outside\r\n", "fg\n"},
			{"\r\n", "echo \"in\"\"side\"\n"},
			{"inside\r\n", "exit\n"},
			{"exit\r\n", "exit\n"},
		}},
		{"no shell around it", []string{"sh", "-c", "exec " + run + `sh -c 'echo u""p; read x; echo "got $x"'`}, []line{
			{"up\r\n", ctrlZ}, // nobody could send it on
			{"", "four\n"},
			{"got four\r\n", ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			screen := talkToShell.On(t, n.User, dialogue{Shell: tt.shell, Lines: tt.lines})
			if strings.Contains(screen, "usernet:") {
				t.Errorf("usernet complains:\n%s", screen)
			}
		})
	}
	n.WantNothingLeft(t, quickly, "usernet", "sleep", "cat")
}
