package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/vishvananda/netlink"
)

// A guest is a process that holds a user and network namespace open, made by
// the ordinary user that also runs the subject: a rootless container without
// the container.
type guest struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	pid   int
}

// startGuest makes the namespaces and returns once loopback is up in them.
func (b *bench) startGuest(ctx context.Context) (*guest, error) {
	return runGuest(b.command(ctx, "unshare", "--user", "--map-root-user", "--net", "--", filepath.Join(b.work, selfFile), roleGuest, b.opts.Congestion))
}

// runGuest starts the command of a guest.
func runGuest(cmd *exec.Cmd) (*guest, error) {
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start guest: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start guest: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start guest: %w", err)
	}
	g := &guest{cmd: cmd, stdin: stdin, pid: cmd.Process.Pid}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		g.stop()
		return nil, fmt.Errorf("start guest: it ended early: %w", err)
	}
	return g, nil
}

func (g *guest) stop() {
	g.stdin.Close()
	g.cmd.Process.Kill()
	g.cmd.Wait()
}

// command prepares a program on the host side, as the ordinary user.
func (b *bench) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: b.cred}
	cmd.Stderr = b.log
	return cmd
}

// commandIn prepares a program inside the guest, as its root.
func (b *bench) commandIn(ctx context.Context, g *guest, name string, args ...string) *exec.Cmd {
	if g == nil {
		return b.command(ctx, name, args...)
	}
	enter := []string{"--target", strconv.Itoa(g.pid), "--user", "--net", "--preserve-credentials", "--", name}
	return b.command(ctx, "nsenter", append(enter, args...)...)
}

// guestMain is the process that holds the guest's namespaces.
func guestMain(args []string) error {
	if len(args) != 1 {
		return errUsage
	}
	if err := setCongestion(args[0]); err != nil {
		return fmt.Errorf("guest: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("guest: find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("guest: bring loopback up: %w", err)
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
