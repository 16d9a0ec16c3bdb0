package main

import (
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A job is the command in a process group of its own, as a shell would start
// it: keys like Ctrl-C reach it by the terminal alone and signals to usernet by
// usernet alone, each once.
//
// Where there is a terminal, it goes to the command's group whenever usernet's
// own group (usernet and who shares it) has it, and back when the command stops
// or ends:
//
//	shell's fg ─► usernet's group ─start, resume─► command's group
//	        ◄─────────────────────◄─stopped, ended─┘
//
// The command cannot have it before there is one, and by then it may have told
// somebody to press a key. So while it starts the terminal is this process's, in
// whose group nobody else is, and the keys are passed on.
type job struct {
	process *os.Process
	home    int // usernet's group

	mu    sync.Mutex // guards following
	tty   *os.File   // controlling terminal, or nil
	given bool       // the terminal was given to the command
}

// start runs the command. Where that fails it returns the status to exit with.
func (j *job) start(command []string) (status int, err error) {
	path, status, err := lookCommand(command[0])
	if err != nil {
		return status, err
	}
	if j.home, err = unix.Getpgid(os.Getppid()); err != nil {
		return exitFailure, err
	}
	j.tty, _ = os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	keys := make(chan os.Signal, 8)
	notify(keys, []syscall.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGTSTP})
	own := unix.Getpgrp()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.give(j.home, own)
	j.process, err = os.StartProcess(path, command, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL},
	})
	if err != nil {
		j.take()
		return startError(command[0], err)
	}
	if !j.given {
		signal.Stop(keys)
		return 0, nil
	}
	j.give(own, j.process.Pid)
	go j.passKeys(keys)
	return 0, nil
}

// give hands the terminal from one group to another if it has it. To the command
// that may be late: one that has asked for it before is stopped, which stopped sees.
func (j *job) give(from, to int) {
	if j.tty != nil && foreground(j.tty) == from {
		setForeground(j.tty, to)
		j.given = true
	}
}

// lateKeys is how long the signal of a key may be on its way to this process.
const lateKeys = time.Second

// passKeys passes on what keys were pressed while the command started.
func (j *job) passKeys(keys chan os.Signal) {
	late := time.After(lateKeys)
	for {
		select {
		case s := <-keys:
			j.signalGroup(s.(syscall.Signal))
		case <-late:
			signal.Stop(keys)
			return
		}
	}
}

// take takes the terminal back.
func (j *job) take() {
	if j.tty != nil && j.given {
		setForeground(j.tty, j.home)
		j.given = false
	}
}

// stopped decides what a stop of the command means. It reports whether usernet
// has to stop too, as a job does for its shell.
func (j *job) stopped(by syscall.Signal) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.tty == nil {
		return false // somebody's business who sends SIGCONT too
	}
	if fg := foreground(j.tty); by == unix.SIGTTIN || by == unix.SIGTTOU {
		if fg == j.home || fg == j.process.Pid {
			j.give(j.home, j.process.Pid)
			j.signalGroup(unix.SIGCONT)
			return false
		}
	}
	j.take()
	return true
}

// resume goes on after a stop, in the foreground if the shell says so.
func (j *job) resume() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.give(j.home, j.process.Pid)
	j.signalGroup(unix.SIGCONT)
}

func (j *job) ended() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.take()
}

func (j *job) signalGroup(s syscall.Signal) { _ = unix.Kill(-j.process.Pid, s) }

// foreground returns the process group that has the terminal, or 0.
func foreground(tty *os.File) int {
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	if err != nil {
		return 0
	}
	return group
}

// setForeground gives a process group the terminal. Who is in the background
// would be stopped for that, unless SIGTTOU is blocked; to ignore it would be
// for all threads and for the command.
func setForeground(tty *os.File, group int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var block, old unix.Sigset_t
	block.Val[0] = 1 << (unix.SIGTTOU - 1)
	if unix.PthreadSigmask(unix.SIG_BLOCK, &block, &old) != nil {
		return
	}
	_ = unix.IoctlSetPointerInt(int(tty.Fd()), unix.TIOCSPGRP, group)
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
}
