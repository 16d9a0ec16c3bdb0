package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// A cniAttachment is one interface of one container in one network: what CNI
// tells additions apart by.
type cniAttachment struct {
	Network     string `json:"network"`
	ContainerID string `json:"container_id"`
	Ifname      string `json:"ifname"`
}

// key is the attachment's name among files. A socket's path has to be short.
func (a cniAttachment) key() string {
	sum := sha256.Sum256([]byte(a.Network + "\x00" + a.ContainerID + "\x00" + a.Ifname))
	return hex.EncodeToString(sum[:8])
}

// A cniRecord is what is remembered of an attachment.
type cniRecord struct {
	cniAttachment
	Netns  string `json:"netns"`
	Inode  uint64 `json:"netns_inode"`
	Socket string `json:"socket"`
	process
}

// A cniStore is the directory where attachments are remembered, each in files of
// its key: .json the record, .sock the control socket, .log what its daemon had
// to say, .lock who is at work on it.
type cniStore struct{ dir string }

// cniDir is where the store is: it has to be the same for all commands of one
// runtime, and to go with the boot.
func cniDir() (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if isHostRoot() || dir == "" && os.Geteuid() == 0 {
		dir = "/run" // whether from a login or from a service
	}
	if !filepath.IsAbs(dir) {
		return "", cniErrorf(types.ErrInvalidEnvironmentVariables, "find state: XDG_RUNTIME_DIR is not set: set it to a directory of this user that goes with the boot, as /run/user/%d", os.Geteuid())
	}
	return filepath.Join(dir, "usernet", "cni"), nil
}

// isHostRoot reports whether this process is root, and not just in a user
// namespace.
func isHostRoot() bool {
	b, _ := os.ReadFile("/proc/self/uid_map")
	return os.Geteuid() == 0 && strings.Join(strings.Fields(string(b)), " ") == "0 0 4294967295"
}

// openCNIStore makes the directory where it is not there.
func openCNIStore() (*cniStore, error) {
	dir, err := cniDir()
	if err != nil {
		return nil, err
	}
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := makeOwnDir(d); err != nil {
			return nil, cniErrorf(types.ErrIOFailure, "use state directory: %v", err)
		}
	}
	return &cniStore{dir}, nil
}

// makeOwnDir makes a directory that is this user's alone.
func makeOwnDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is none: remove it", dir)
	case info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()):
		return fmt.Errorf("%s belongs to another user: remove it", dir)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("others may look into %s: chmod 0700 it", dir)
	}
	return nil
}

func (s *cniStore) path(a cniAttachment, suffix string) string {
	return filepath.Join(s.dir, a.key()+suffix)
}

// runtimeDir is where the store's commands and daemons have what goes with the
// boot.
func (s *cniStore) runtimeDir() string { return filepath.Dir(filepath.Dir(s.dir)) }

func (s *cniStore) socket(a cniAttachment) string { return s.path(a, ".sock") }
func (s *cniStore) log(a cniAttachment) string    { return s.path(a, ".log") }

// lockTimeout is how long another command may be at work on the same attachment.
const lockTimeout = 30 * time.Second

// lock keeps other commands from an attachment until unlock is called.
func (s *cniStore) lock(ctx context.Context, a cniAttachment) (unlock func(), err error) {
	path := s.path(a, ".lock")
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, cniErrorf(types.ErrIOFailure, "lock state: %v", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) {
			return func() {
				_ = os.Remove(path) // while nobody else can have it
				f.Close()
			}, nil
		}
		f.Close()
		switch {
		case err == nil: // who had it has removed it
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, cniErrorf(types.ErrIOFailure, "lock state %s: %v", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, cniErrorf(types.ErrTryAgainLater, "lock state %s: another command is at work on this container", path)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// isAt reports whether f is what is at path.
func isAt(f *os.File, path string) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(info, there)
}

// load returns what is remembered of an attachment, nil if that is nothing.
func (s *cniStore) load(a cniAttachment) *cniRecord {
	r := readRecord(s.path(a, ".json"))
	if r == nil || r.cniAttachment != a {
		return nil
	}
	return r
}

func readRecord(path string) *cniRecord {
	b, err := os.ReadFile(path)
	r := new(cniRecord)
	if err != nil || json.Unmarshal(b, r) != nil {
		return nil
	}
	return r
}

// list returns all records.
func (s *cniStore) list() []*cniRecord {
	var all []*cniRecord
	paths, _ := filepath.Glob(filepath.Join(s.dir, "*.json"))
	for _, path := range paths {
		if r := readRecord(path); r != nil {
			all = append(all, r)
		}
	}
	return all
}

// save remembers an attachment: all of it, or nothing.
func (s *cniStore) save(r cniRecord) error {
	r.Socket = s.socket(r.cniAttachment)
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := s.path(r.cniAttachment, ".json")
	temp := path + ".new"
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return cniErrorf(types.ErrIOFailure, "write state: %v", err)
	}
	if err := os.Rename(temp, path); err != nil {
		os.Remove(temp)
		return cniErrorf(types.ErrIOFailure, "write state: %v", err)
	}
	return nil
}

// end ends an attachment's daemon and forgets it. The caller has the lock.
func (s *cniStore) end(a cniAttachment) error {
	r := s.load(a)
	if r == nil || !r.alive() {
		// A command that was killed may not have come to write its record, and
		// somebody may have cleared the directory.
		r = &cniRecord{process: findDaemon(s.dir, s.socket(a))}
	}
	if err := r.stop(); err != nil {
		return cniErrorf(cniFailed, "end process %d, which serves %s of container %s: %v", r.PID, a.Ifname, a.ContainerID, err)
	}
	for _, suffix := range []string{".sock", ".log", ".json.new", ".json"} { // the record last
		if err := os.Remove(s.path(a, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return cniErrorf(types.ErrIOFailure, "remove state: %v", err)
		}
	}
	return nil
}

// remove is end for one who does not have the lock.
func (s *cniStore) remove(ctx context.Context, a cniAttachment) error {
	unlock, err := s.lock(ctx, a)
	if err != nil {
		return err
	}
	defer unlock()
	return s.end(a)
}

// cniSockets are the control sockets of daemons that a plugin of this user has
// started for a network namespace.
func cniSockets(inode uint64) []string {
	dir, err := cniDir()
	if err != nil {
		return nil
	}
	var sockets []string
	for _, r := range (&cniStore{dir}).list() {
		if r.Inode == inode && r.alive() {
			sockets = append(sockets, r.Socket)
		}
	}
	return sockets
}
