package main

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"syscall"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/control"
	"github.com/usernet/usernet/internal/netns"
)

// noSocket is the path that stands for none.
const noSocket = "none"

// socketUsage describes the flag that sets the path.
const socketUsage = "control socket for other usernet commands, or none (default: $XDG_RUNTIME_DIR/usernet/NETNS-INODE.sock)"

// A socket is where other commands speak to this process. Its listener is nil
// where there is none.
type socket struct {
	listener      *control.Listener
	netns, userns uint64
}

// listen makes the control socket at path, or at its default place, where it is
// welcome but not needed. It is there before the network is, so that who is told
// of the one finds the other.
func listen(path string, c usernet.Config, log *slog.Logger) (*socket, error) {
	s := new(socket)
	if path == noSocket {
		return s, nil
	}
	s.find(c)
	chosen := path != ""
	if !chosen {
		if path = control.DefaultPath(s.netns); path == "" || s.netns == 0 {
			return s, nil
		}
		if err := control.MakeDefaultDir(); err != nil {
			log.Info("no control socket", "err", err)
			return s, nil
		}
	}
	l, err := control.Listen(path)
	switch {
	case err == nil:
		s.listener = l
	case chosen:
		return nil, err
	default:
		log.Info("no control socket", "err", err)
	}
	return s, nil
}

// find notes which namespaces are the guest's. If there are none, attaching will
// say why.
func (s *socket) find(c usernet.Config) {
	var (
		ns  *netns.Namespace
		err error
	)
	switch {
	case c.PID != 0:
		ns, err = netns.OpenPID(c.PID)
	case c.NetnsPath != "":
		ns, err = netns.Open(c.NetnsPath)
	default:
		return
	}
	if err != nil {
		return
	}
	defer ns.Close()
	s.netns = ns.Inode()
	if owner := ns.Owner(); owner != nil {
		if info, err := owner.Stat(); err == nil {
			s.userns = info.Sys().(*syscall.Stat_t).Ino
		}
	}
}

// paths are the files that shall not outlive this process.
func (s *socket) paths() []string {
	if s.listener == nil {
		return nil
	}
	return []string{s.listener.Path()}
}

// serve answers other commands until stop is called.
func (s *socket) serve(ctx context.Context, n *usernet.Network, level *slog.LevelVar, log *slog.Logger) (stop func()) {
	if s.listener == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	server := control.New(control.Config{
		Network: n, Version: version().Version, Level: level, Netns: s.netns, Userns: s.userns, Logger: log,
	})
	var done sync.WaitGroup
	done.Go(func() {
		if err := server.Run(ctx, s.listener); err != nil {
			log.Warn("the control socket has ended", "err", err)
		}
	})
	return func() {
		cancel()
		done.Wait()
	}
}

// close removes the socket.
func (s *socket) close() {
	if s.listener != nil {
		s.listener.Close()
	}
}

// runtimeDirHint says why there may be no default place.
func runtimeDirHint() string {
	if os.Getenv("XDG_RUNTIME_DIR") == "" {
		return "XDG_RUNTIME_DIR is not set, so give --api-socket PATH"
	}
	return "give --api-socket PATH"
}
