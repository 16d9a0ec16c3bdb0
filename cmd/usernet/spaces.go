package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// spacesName is the name, as argv[0], of the process that `usernet run` starts
// in new user, network and mount namespaces. It prepares the files there,
// becomes the parent of the command, and takes its terminal's part.
const spacesName = "usernet-spaces"

// An order is what that process is told, by a stream of JSON on a socket. The
// socket's end is an order too: to kill everything and end.
type order struct {
	Setup    *setup         `json:"setup,omitempty"`    // with the first, and what is known later with Start
	Start    bool           `json:"start,omitempty"`    // run the command
	Signal   syscall.Signal `json:"signal,omitempty"`   // pass this signal on
	Continue bool           `json:"continue,omitempty"` // go on after a stop
}

// A setup is what the new mount namespace is to look like.
type setup struct {
	ResolvConf []byte `json:"resolv_conf,omitempty"` // nil: leave it alone
	Hosts      []byte `json:"hosts,omitempty"`       // nil: leave it alone
}

// An event is what the process tells.
type event struct {
	Ready   bool           `json:"ready,omitempty"`   // the namespaces are made
	Stopped syscall.Signal `json:"stopped,omitempty"` // the terminal's user wants us to stop
	Error   string         `json:"error,omitempty"`
	Status  int            `json:"status,omitempty"` // to exit with, beside an error
}

// spaces are the namespaces, and the process in them, as seen from outside.
type spaces struct {
	cmd    *exec.Cmd
	conn   *os.File
	orders *json.Encoder
	events chan event    // closed when no more can come
	done   chan struct{} // closed when the process has ended
}

// maxEvents is how many events may wait. Before it is told to go on, a process
// has no more than two to tell of.
const maxEvents = 8

// Standard streams of a command.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// startSpaces makes the namespaces. With keepID the user's id inside is that
// outside, otherwise it is root's.
func startSpaces(command []string, keepID bool, s setup, std streams) (*spaces, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket pair: %w", err)
	}
	conn := os.NewFile(uintptr(fds[0]), "spaces")
	defer unix.Close(fds[1])
	// Not at a number of our choice: the command may have inherited that one
	// from the caller, as make's jobs do.
	fd, err := unix.FcntlInt(uintptr(fds[1]), unix.F_DUPFD, 3)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("duplicate a descriptor: %w", err)
	}
	defer unix.Close(fd)

	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{spacesName, strconv.Itoa(fd)}, command...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = std.in, std.out, std.err
	cmd.SysProcAttr, err = spacesAttributes(keepID)
	if err == nil {
		// Streams that are no files are copied; a daemon that the command
		// leaves behind may hold them for ever.
		cmd.WaitDelay = time.Second
		err = cmd.Start()
	}
	if err != nil {
		conn.Close()
		return nil, explainNamespaces(err)
	}
	p := &spaces{
		cmd: cmd, conn: conn, orders: json.NewEncoder(conn),
		events: make(chan event, maxEvents), done: make(chan struct{}),
	}
	go p.listen()
	go p.wait()
	if err := p.send(order{Setup: &s}); err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// spacesAttributes says what namespaces to make and who to be in them.
func spacesAttributes(keepID bool) (*syscall.SysProcAttr, error) {
	a := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		// Signals to our group are for us to pass on, once.
		Setpgid: true,
	}
	uid, gid := os.Geteuid(), os.Getegid()
	if uid == 0 && hasCapabilities(unix.CAP_SETUID, unix.CAP_SETGID) {
		// Root keeps everybody's ids: otherwise it could neither read their
		// files nor give them any.
		var err error
		if a.UidMappings, err = identity("/proc/self/uid_map"); err != nil {
			return nil, err
		}
		if a.GidMappings, err = identity("/proc/self/gid_map"); err != nil {
			return nil, err
		}
		// Where it is denied, it stays so in all namespaces below.
		allowed, _ := os.ReadFile("/proc/self/setgroups")
		a.GidMappingsEnableSetgroups = strings.TrimSpace(string(allowed)) != "deny"
		return a, nil
	}
	// A user may map the own ids without the help of newuidmap, and so needs no
	// /etc/subuid.
	a.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{HostID: gid, Size: 1}}
	if keepID && uid != 0 {
		a.UidMappings[0].ContainerID, a.GidMappings[0].ContainerID = uid, gid
		// Only root's capabilities survive an exec by themselves.
		a.AmbientCaps = append([]uintptr{unix.CAP_SYS_ADMIN}, keptCapabilities...)
	}
	return a, nil
}

// keptCapabilities are those that a command has under --keep-id: to use its
// network as root could.
var keptCapabilities = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE}

// identity maps every id of this user namespace to itself.
func identity(path string) ([]syscall.SysProcIDMap, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var maps []syscall.SysProcIDMap
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var inside, outside, size int
		if _, err := fmt.Sscan(lines.Text(), &inside, &outside, &size); err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		maps = append(maps, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: size})
	}
	return maps, nil
}

// hasCapabilities reports whether all of them are in force.
func hasCapabilities(caps ...int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	return !slices.ContainsFunc(caps, func(c int) bool { return data[c/32].Effective&(1<<(c%32)) == 0 })
}

// explainNamespaces says what to do where namespaces are refused.
func explainNamespaces(err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("make namespaces: %w", err)
	}
	hint := "`usernet doctor` tells more"
	switch errno {
	case unix.EPERM, unix.EACCES:
		hint = "this user may make none here: `usernet doctor` says what to change"
	case unix.ENOSPC, unix.EUSERS:
		hint = "there are too many, or none are allowed: raise user.max_user_namespaces with sysctl"
	case unix.EINVAL, unix.ENOSYS:
		hint = "the kernel has no user namespaces: use one with CONFIG_USER_NS"
	}
	return fmt.Errorf("make namespaces: %w: %s", errno, hint)
}

// listen passes events on until the process closes its end, or kill does ours.
func (p *spaces) listen() {
	defer close(p.events)
	for in := json.NewDecoder(p.conn); ; {
		var e event
		if in.Decode(&e) != nil {
			return
		}
		p.events <- e
	}
}

func (p *spaces) wait() {
	_ = p.cmd.Wait()
	close(p.done)
}

func (p *spaces) send(o order) error {
	if err := p.orders.Encode(o); err != nil {
		return fmt.Errorf("talk to the process in the namespace: %w", err)
	}
	return nil
}

// killTimeout is how long the process has to end what is below it.
const killTimeout = 2 * time.Second

// kill ends the process and everything that it has started.
func (p *spaces) kill() {
	p.conn.Close()
	select {
	case <-p.done:
	case <-time.After(killTimeout):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// status is that of the ended process, which is the command's.
func (p *spaces) status() int {
	state := p.cmd.ProcessState
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return signalStatus(ws.Signal())
	}
	return state.ExitCode()
}

// signalStatus is how shells tell of a signal.
func signalStatus(s syscall.Signal) int { return 128 + int(s) }

// children lists the processes whose parent is this one, dead ones included.
func children() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	self := strconv.Itoa(os.Getpid())
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// pid (name) state ppid …, and the name may have any character in it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) > 1 && fields[1] == self {
			pids = append(pids, pid)
		}
	}
	return pids
}
