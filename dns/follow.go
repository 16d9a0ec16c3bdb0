package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The pace of following resolv.conf.
const (
	settleTime   = 50 * time.Millisecond // from the first sign of a change until it is read
	glanceTime   = 30 * time.Second      // until it is read without a sign: remounts give none
	blindTime    = 500 * time.Millisecond
	maxLinks     = 40 // as in the kernel
	maxWatchDirs = 64
)

// follower is what a Server knows of resolv.conf.
type follower struct {
	path    string
	search  atomic.Pointer[[]string]
	current ResolvConf // the last valid one; used by New, then by Run's goroutine
	failing bool       // so is this
}

// watchers are told when the search domains change.
type watchers struct {
	mu   sync.Mutex // guards following
	list []func(search []string)
}

// Search returns the search domains of the host's resolv.conf. The caller must
// not change them.
func (s *Server) Search() []string {
	if p := s.follow.search.Load(); p != nil {
		return *p
	}
	return nil
}

// OnSearchChange has f called with the new search domains each time they
// change while Run runs. f must not block.
func (s *Server) OnSearchChange(f func(search []string)) {
	s.watchers.mu.Lock()
	defer s.watchers.mu.Unlock()
	s.watchers.list = append(s.watchers.list, f)
}

// reload reads resolv.conf. As long as the file is missing, empty or without
// a server, what it last said stays in force.
func (s *Server) reload() {
	f := &s.follow
	rc, err := ReadResolvConf(f.path)
	if err != nil {
		if !f.failing && len(s.cfg.Upstreams) == 0 && s.logged.allow(s.now()) {
			s.log.Warn("reading resolv.conf failed; keeping what it said before", "path", f.path, "err", err)
		}
		f.failing = true
		return
	}
	f.failing = false
	s.SetResolvConf(rc)
}

// SetResolvConf puts what a resolv.conf says in force. It is for a Server that
// does not read one itself (Config.Unread), and not for use by several
// goroutines at once.
func (s *Server) SetResolvConf(rc ResolvConf) {
	f := &s.follow
	if len(s.cfg.Upstreams) == 0 && !slices.Equal(rc.Servers, f.current.Servers) {
		s.setUpstreams(rc.Servers)
	}
	changed := !slices.Equal(rc.Search, f.current.Search)
	f.current = rc
	if !changed {
		return
	}
	f.search.Store(&rc.Search)
	s.watchers.mu.Lock()
	list := slices.Clone(s.watchers.list)
	s.watchers.mu.Unlock()
	for _, notify := range list {
		notify(rc.Search)
	}
}

// FollowResolvConf calls reload whenever the resolv.conf at an absolute path may
// have changed, and once at the beginning, until ctx is done.
func FollowResolvConf(ctx context.Context, path string, log *slog.Logger, reload func()) {
	w, err := newWatch(path)
	if err != nil {
		log.Warn("cannot watch resolv.conf; looking at it twice a second", "path", path, "err", err)
		for blind := time.Tick(blindTime); ; {
			reload()
			select {
			case <-blind:
			case <-ctx.Done():
				return
			}
		}
	}
	defer w.close()
	defer context.AfterFunc(ctx, w.close)()
	for ctx.Err() == nil {
		// Watches first: what changes while we read must show up.
		whole := w.arm()
		reload()
		patience := glanceTime
		if !whole {
			patience = blindTime
		}
		if !w.wait(patience) {
			return
		}
	}
}

// watch watches a file with inotify, and every directory and link that leads
// to it: any of them may be replaced, as /etc/resolv.conf often is by a link
// into /run.
type watch struct {
	path    string
	file    *os.File
	once    sync.Once
	watched map[int32]map[string]bool // by watch descriptor: names of interest; nil: all
	buf     []byte
}

func newWatch(path string) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	return &watch{
		path: path,
		file: os.NewFile(uintptr(fd), "inotify"),
		buf:  make([]byte, 16<<10),
	}, nil
}

func (w *watch) close() { w.once.Do(func() { w.file.Close() }) }

// arm brings the watches in line with the way to the file as it is now. It
// reports whether all of it is watched.
func (w *watch) arm() bool {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return false
	}
	whole := false
	if err := raw.Control(func(fd uintptr) { whole = w.armFD(int(fd)) }); err != nil {
		return false
	}
	return whole
}

func (w *watch) armFD(fd int) bool {
	const inDir = unix.IN_ONLYDIR | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
		unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	// The file itself, too: one that is bind-mounted is changed elsewhere.
	const inFile = unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	// The way may change between looking and watching: go it again until it
	// is the same twice.
	for range 5 {
		way := findWay(w.path)
		watched := make(map[int32]map[string]bool)
		whole := true
		for dir, names := range way.dirs {
			wd, err := unix.InotifyAddWatch(fd, dir, inDir)
			if err != nil {
				whole = false
				continue
			}
			if watched[int32(wd)] == nil {
				watched[int32(wd)] = make(map[string]bool)
			}
			maps.Copy(watched[int32(wd)], names)
		}
		if way.file != "" {
			wd, err := unix.InotifyAddWatch(fd, way.file, inFile)
			if err != nil {
				whole = false
			} else {
				watched[int32(wd)] = nil
			}
		}
		for wd := range w.watched {
			if _, ok := watched[wd]; !ok {
				unix.InotifyRmWatch(fd, uint32(wd))
			}
		}
		w.watched = watched
		if way.equal(findWay(w.path)) {
			return whole && !way.broken
		}
	}
	return false
}

// wait waits for a sign of a change, and then a little for what may follow, or
// for patience to end. It returns false after close.
func (w *watch) wait(patience time.Duration) bool {
	w.file.SetReadDeadline(time.Now().Add(patience))
	changed := false
	for {
		n, err := w.file.Read(w.buf)
		if err != nil {
			return errors.Is(err, os.ErrDeadlineExceeded)
		}
		if w.concerns(w.buf[:n]) && !changed {
			changed = true
			w.file.SetReadDeadline(time.Now().Add(settleTime))
		}
	}
}

// concerns reports whether one of the events is about the way to the file.
func (w *watch) concerns(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		if end > len(events) {
			return true
		}
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		events = events[end:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
		names, ok := w.watched[wd]
		if ok && (names == nil || name == "" || names[name]) {
			return true
		}
	}
	return false
}

// way is what leads to a file.
type way struct {
	dirs   map[string]map[string]bool // names looked up in each directory
	file   string                     // without links; empty if there is none
	broken bool                       // it could not be gone to its end
}

func (w way) equal(o way) bool {
	return w.file == o.file && w.broken == o.broken &&
		maps.EqualFunc(w.dirs, o.dirs, func(a, b map[string]bool) bool { return maps.Equal(a, b) })
}

// findWay goes the absolute path as the kernel would.
func findWay(path string) way {
	w := way{dirs: make(map[string]map[string]bool)}
	dir, links := "/", 0
	for rest := path; ; {
		var name string
		name, rest, _ = strings.Cut(strings.TrimLeft(rest, "/"), "/")
		switch name {
		case "":
			return w // a directory
		case ".":
			continue
		case "..":
			dir = filepath.Dir(dir) // dir has no links
			continue
		}
		if w.dirs[dir] == nil {
			if len(w.dirs) == maxWatchDirs {
				w.broken = true
				return w
			}
			w.dirs[dir] = make(map[string]bool)
		}
		w.dirs[dir][name] = true
		full := filepath.Join(dir, name)
		info, err := os.Lstat(full)
		switch {
		case err != nil:
			// What is missing will be seen to come; what is forbidden not.
			w.broken = !errors.Is(err, fs.ErrNotExist)
			return w
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(full)
			if links++; err != nil || links > maxLinks {
				// A loop ends when one of its links is replaced.
				return w
			}
			if filepath.IsAbs(target) {
				dir = "/"
			}
			rest = target + "/" + rest
		case info.IsDir():
			dir = full
		default:
			if strings.Trim(rest, "/") == "" {
				w.file = full
			}
			return w
		}
	}
}
