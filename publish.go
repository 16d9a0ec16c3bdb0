package usernet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
)

// ErrNoForward is the error of RemoveForward for an ID that no forward has.
var ErrNoForward = errors.New("usernet: no such forward")

// ErrNotRunning is the error of what only a running Network can do.
var ErrNotRunning = errors.New("usernet: the network is not running")

// AddForward publishes a port. It listens when AddForward returns. An error of
// the system is found by errors.Is: syscall.EADDRINUSE, syscall.EACCES.
func (n *Network) AddForward(ctx context.Context, f Forward) (ForwardInfo, error) {
	if err := f.check(); err != nil {
		return ForwardInfo{}, err
	}
	p := n.publisher.Load()
	if p == nil {
		return ForwardInfo{}, ErrNotRunning
	}
	info, err := p.add(ctx, f)
	if err != nil && !errors.Is(err, ErrConfig) && !errors.Is(err, ErrNotRunning) {
		err = fmt.Errorf("usernet: %w", err)
	}
	return info, err
}

// RemoveForward ends a forward. Connections that it has let in go on.
func (n *Network) RemoveForward(id string) error {
	p := n.publisher.Load()
	if p == nil {
		return ErrNotRunning
	}
	return p.remove(id)
}

// Forwards returns the forwards that are in effect, oldest first.
func (n *Network) Forwards() []ForwardInfo {
	p := n.publisher.Load()
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	infos := make([]ForwardInfo, len(p.published))
	for i, e := range p.published {
		infos[i] = e.ForwardInfo
	}
	return infos
}

// publisher keeps the forwards of a running network.
type publisher struct {
	cfg   Config
	log   *slog.Logger
	inlet inlet
	agent *agent.Agent // nil where the namespace is out of reach

	cleaner *agent.Cleaner

	mu        sync.Mutex // guards following
	published []published
	last      int  // number of the last ID
	warned    bool // of where there is no way inside
	opened    bool // the way inside
	noInside  error
	tidy      bool // files are removed if this process is killed
	stopped   bool

	auto autoTable // of one goroutine at a time
}

// published is a forward in effect.
type published struct {
	ForwardInfo
	number uint64 // for the forwarder
	inode  uint64 // of the unix socket
}

func newPublisher(c Config, at *attachment, in inlet) *publisher {
	return &publisher{cfg: c, log: c.Logger, inlet: in, agent: at.agent, cleaner: &at.cleaner}
}

// An inlet is what lets clients in: an engine, or that of a shared network.
type inlet interface {
	// publish takes in.FDs, whatever it returns.
	publish(ctx context.Context, f Forward, in forwarder.Inbound) (number uint64, err error)
	unpublish(ctx context.Context, number uint64) error
	useInside(ctx context.Context, s *agent.Sockets, own ...netip.Addr) error
}

// addAll publishes what the configuration names.
func (p *publisher) addAll(ctx context.Context) error {
	for _, f := range p.cfg.Publish {
		if _, err := p.add(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

func (p *publisher) add(ctx context.Context, f Forward) (ForwardInfo, error) {
	info, err := p.open(ctx, ForwardInfo{Forward: f})
	if err == nil || errors.Is(err, ErrConfig) || errors.Is(err, ErrNotRunning) {
		return info, err
	}
	return info, p.explain(f, err)
}

// open publishes a port. Errors of the system are as they came.
func (p *publisher) open(ctx context.Context, info ForwardInfo) (ForwardInfo, error) {
	f := info.Forward
	in, err := p.inbound(f)
	if err != nil {
		return ForwardInfo{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return ForwardInfo{}, ErrNotRunning
	}
	e := published{ForwardInfo: info}
	if f.HostPath != "" {
		in.FDs, e.inode, err = listenUnix(f.HostPath)
	} else {
		in.FDs, e.Host, err = listen(f)
	}
	if err != nil {
		return ForwardInfo{}, err
	}
	if f.Protocol == TCP {
		p.prepare(ctx)
	}
	if e.number, err = p.inlet.publish(ctx, e.Forward, in); err != nil {
		e.unlink()
		return ForwardInfo{}, err
	}
	p.last++
	e.ID = "f" + strconv.Itoa(p.last)
	p.published = append(p.published, e)
	if e.HostPath != "" {
		p.cleanUpOnDeath()
	}
	p.log.Debug("published", "forward", e.ID, "spec", e.Forward)
	return e.ForwardInfo, nil
}

// inbound tells the forwarder where a forward leads.
func (p *publisher) inbound(f Forward) (forwarder.Inbound, error) {
	a := p.cfg.Addresses()
	own4 := p.own4()
	in := forwarder.Inbound{Proto: uint8(f.Protocol)}
	if f.Proxy != 0 {
		in.Preface = proxyHeader(f.Proxy)
	}
	port := f.Guest.Port()
	switch g := f.Guest.Addr(); {
	case !g.IsValid():
		in.Guest4 = netip.AddrPortFrom(own4, port)
		if a.Guest6.IsValid() {
			in.Guest6 = netip.AddrPortFrom(a.Guest6, port)
		}
	case slices.Contains([]netip.Addr{a.Gateway4, a.DNS4, a.Gateway6, a.DNS6}, g):
		return in, badConfig("publish %v: %v is this side's, not the guest's", f, g)
	case a.Prefix4.Contains(g):
		in.Guest4 = f.Guest
	case a.Prefix6.IsValid() && a.Prefix6.Contains(g):
		in.Guest6 = f.Guest
	default:
		return in, badConfig("publish %v: the guest's subnet has no address %v: leave it out for the guest's own, which is %v", f, g, own4)
	}
	return in, nil
}

// own4 is the IPv4 address of the guest's own interface.
func (p *publisher) own4() netip.Addr {
	a := p.cfg.Addresses()
	if p.cfg.Configure == ConfigureNone && p.cfg.Network == "" {
		return a.PoolStart // what is leased to it
	}
	return a.Guest4
}

// noSplice is what is logged where there is no way inside.
const noSplice = "published TCP ports go by the interface: the namespace does not allow a faster way"

// prepare readies the namespace for fast forwards, once.
func (p *publisher) prepare(ctx context.Context) {
	if p.warned {
		return
	}
	p.warned = true
	if p.agent == nil {
		p.log.Info("published TCP ports go by the TAP: its namespace is out of reach for a faster way")
		return
	}
	p.openInside(ctx)
	if p.noInside != nil {
		p.log.Warn(noSplice, "err", p.noInside)
	}
}

// handOver readies the namespace for connections of the guest's own that are handed
// over. Where that cannot be, they stay where they are.
func (p *publisher) handOver(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.agent == nil || p.stopped {
		return
	}
	p.openInside(ctx)
	if p.noInside != nil {
		p.log.Debug("connections of the guest's are not handed over", "err", p.noInside)
	}
}

// openInside opens the way to sockets inside, once.
func (p *publisher) openInside(ctx context.Context) {
	if p.opened {
		return
	}
	p.opened = true
	s, err := p.agent.Sockets()
	if err != nil {
		p.noInside = err
		return
	}
	var own []netip.Addr
	for _, f := range []struct {
		why  string
		addr netip.Addr
	}{{s.Error4, p.own4()}, {s.Error6, p.cfg.Addresses().Guest6}} {
		switch {
		case f.why != "":
			p.noInside = errors.New(f.why)
		case f.addr.IsValid():
			own = append(own, f.addr)
		}
	}
	if err := p.inlet.useInside(ctx, s, own...); err != nil {
		p.noInside = err
	}
}

func (p *publisher) remove(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, e := range p.published {
		if e.ID == id {
			p.published = slices.Delete(p.published, i, i+1)
			e.unlink()
			ctx, cancel := context.WithTimeout(context.Background(), engineTime)
			defer cancel()
			if p.inlet.unpublish(ctx, e.number) != nil {
				return ErrNotRunning
			}
			return nil
		}
	}
	return fmt.Errorf("%w: %s", ErrNoForward, id)
}

// stop leaves no file behind. The forwarder closes the sockets at its end.
func (p *publisher) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	for _, e := range p.published {
		e.unlink()
	}
	p.published = nil
}

// unlink removes the unix socket, if the file is still that.
func (e *published) unlink() {
	if e.HostPath == "" {
		return
	}
	var st unix.Stat_t
	if unix.Lstat(e.HostPath, &st) == nil && st.Ino == e.inode {
		_ = unix.Unlink(e.HostPath)
	}
}

// keepTidy sees to it that no file stays if this process is killed. It starts
// another one, for which there is more time when all else has begun.
func (p *publisher) keepTidy() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tidy = p.agent != nil
	p.cleanUpOnDeath()
}

// cleanUpOnDeath names the files of now.
func (p *publisher) cleanUpOnDeath() {
	if !p.tidy {
		return
	}
	paths := slices.Clone(p.cfg.Cleanup)
	for _, e := range p.published {
		if e.HostPath != "" {
			paths = append(paths, e.HostPath)
		}
	}
	if err := p.cleaner.OnDeath(paths); err != nil {
		p.log.Warn("files would stay if usernet were killed", "err", err)
	}
}

// listen opens the sockets of a forward, all on the same port.
func listen(f Forward) (fds []int, host netip.AddrPort, err error) {
	if f.Host.Addr().IsValid() {
		fd, got, err := forwarder.Listen(uint8(f.Protocol), f.Host)
		return []int{fd}, got, err
	}
	// A port that is free in one family may be taken in the other.
	const tries = 64
	for range tries {
		if fds, host, err = listenBoth(f); err == nil || f.Host.Port() != 0 || !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return fds, host, err
}

// listenBoth listens in both families, if there are two.
func listenBoth(f Forward) ([]int, netip.AddrPort, error) {
	fd4, got, err := forwarder.Listen(uint8(f.Protocol), netip.AddrPortFrom(netip.IPv4Unspecified(), f.Host.Port()))
	if err != nil {
		return nil, f.Host, err
	}
	host := netip.AddrPortFrom(netip.Addr{}, got.Port())
	fd6, _, err := forwarder.Listen(uint8(f.Protocol), netip.AddrPortFrom(netip.IPv6Unspecified(), got.Port()))
	switch {
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL):
		return []int{fd4}, host, nil // a host without IPv6
	case err != nil:
		unix.Close(fd4)
		return nil, f.Host, err
	}
	return []int{fd4, fd6}, host, nil
}

// listenUnix opens a listening unix socket, in place of one that nobody listens
// on any more.
func listenUnix(path string) (fds []int, inode uint64, err error) {
	fd, err := forwarder.ListenUnix(path)
	if errors.Is(err, unix.EADDRINUSE) && isStale(path) {
		if unix.Unlink(path) == nil {
			fd, err = forwarder.ListenUnix(path)
		}
	}
	if err != nil {
		return nil, 0, err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		unix.Close(fd)
		return nil, 0, err
	}
	return []int{fd}, st.Ino, nil
}

// isStale reports whether path is a socket whose owner has ended.
func isStale(path string) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	var st unix.Stat_t
	return errors.Is(err, unix.ECONNREFUSED) && unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK
}

// explain says what to do about a port that cannot be had.
func (p *publisher) explain(f Forward, err error) error {
	port := f.Host.Port()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case f.HostPath != "" && errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("publish %v: %w: there is such a file: remove it, or choose another path", f, err)
	case f.HostPath != "" && errors.Is(err, unix.ENOENT):
		return fmt.Errorf("publish %v: %w: make its directory first", f, err)
	case f.HostPath != "" && errors.Is(err, unix.EACCES):
		return fmt.Errorf("publish %v: %w: choose a path where this user may write", f, err)
	case f.HostPath != "":
		return fmt.Errorf("publish %v: %w", f, err)
	case errors.Is(err, unix.EADDRINUSE):
		for _, e := range p.published {
			if e.Protocol == f.Protocol && e.Host.Port() == port {
				return fmt.Errorf("publish %v: port %d: %w: forward %s (%v) has it: remove that, or choose another port", f, port, err, e.ID, e.Forward)
			}
		}
		return fmt.Errorf("publish %v: port %d: %w: %s: choose another port, or 0 for any free one", f, port, err, holder(f.Protocol, port))
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("publish %v: port %d: %w: only root may have ports below %s: choose a higher one, or lower net.ipv4.ip_unprivileged_port_start by sysctl",
			f, port, err, unprivilegedPorts())
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("publish %v: %w: no interface of this host has the address %v, `ip address` lists them", f, err, f.Host.Addr())
	}
	return fmt.Errorf("publish %v: %w", f, err)
}

func unprivilegedPorts() string {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return "1024"
	}
	return strings.TrimSpace(string(b))
}

// holder says who has a port of the host.
func holder(proto Protocol, port uint16) string {
	inode, uid := portOwner(proto, port)
	if inode == "" {
		return "another program has it"
	}
	links, _ := os.ReadDir("/proc")
	for _, d := range links {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + d.Name() + "/fd/"
		fds, _ := os.ReadDir(dir) // those of other users are closed to us
		for _, fd := range fds {
			if to, err := os.Readlink(dir + fd.Name()); err == nil && to == "socket:["+inode+"]" {
				name, _ := os.ReadFile("/proc/" + d.Name() + "/comm")
				return fmt.Sprintf("%s (process %d) has it", strings.TrimSpace(string(name)), pid)
			}
		}
	}
	return fmt.Sprintf("a program of uid %s has it, `ss -lntup` as root tells which", uid)
}

// portOwner finds the socket that is bound to a port (proc_net_tcp.rst).
func portOwner(proto Protocol, port uint16) (inode, uid string) {
	suffix := fmt.Sprintf(":%04X", port)
	for _, six := range []string{"", "6"} {
		table, err := os.ReadFile("/proc/net/" + proto.String() + six)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(table)) {
			const local, state, owner, number = 1, 3, 7, 9
			f := strings.Fields(line)
			if len(f) > number && strings.HasSuffix(f[local], suffix) && (proto == UDP || f[state] == "0A") {
				return f[number], f[owner]
			}
		}
	}
	return "", ""
}
