package usernet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/dns"
)

// host knows what the host's routing and its resolv.conf say: which addresses are
// the host's own, whether IPv6 leads anywhere, and whom to ask for names.
type host struct {
	resolv  string // path of resolv.conf; empty if it does not matter
	needed  bool   // nobody else can be asked
	log     *slog.Logger
	updates chan netlink.RouteUpdate
	stop    chan struct{}
	notify  chan struct{}

	mu    sync.Mutex // guards following
	local []netip.Prefix
	def6  bool
	conf  dns.ResolvConf
	tell  hostListener // nil before it is told

	failing bool // resolv.conf cannot be used; run's
}

// A hostListener is told what changes.
type hostListener interface {
	setLocal(local []netip.Prefix)
	setResolvConf(rc dns.ResolvConf)
}

// settle is how long the host's routes must be quiet before they are read
// again: an interface that comes up changes several.
const settle = 50 * time.Millisecond

// watchHost reads the routes of this network namespace and subscribes to their
// changes, which run follows. A caller's sandbox may forbid netlink(7), as that of
// GNU Guix does; where addresses need no guard, IPv6 is then taken to work.
func watchHost(c Config, log *slog.Logger) (*host, error) {
	h := &host{log: log, updates: make(chan netlink.RouteUpdate, 64), stop: make(chan struct{}), notify: make(chan struct{}, 1)}
	err := netlink.RouteSubscribeWithOptions(h.updates, h.stop, netlink.RouteSubscribeOptions{
		ErrorCallback: func(err error) { log.Debug("route subscription", "err", err) },
	})
	if c.NoGuard && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT)) {
		log.Info("the host's routes cannot be read", "err", err)
		h.updates, h.def6 = nil, true
		return h, h.findResolvConf(c)
	}
	if err != nil {
		return nil, fmt.Errorf("watch the host's routes: %w", err)
	}
	if err := h.read(); err != nil {
		h.close()
		return nil, err
	}
	if err := h.findResolvConf(c); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// checkOutbound says early what every host socket would fail of.
func checkOutbound(c Config) error {
	if c.OutboundInterface != "" {
		if _, err := net.InterfaceByName(c.OutboundInterface); err != nil {
			return fmt.Errorf("use outbound interface %s: this host has none of that name, `ip link` lists them", c.OutboundInterface)
		}
	}
	for _, a := range []netip.Addr{c.OutboundAddr, c.OutboundAddr6} {
		if !a.IsValid() {
			continue
		}
		pc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
		if err != nil {
			return fmt.Errorf("use outbound address %v: no interface of this host has it, `ip address` lists them: %w", a, err)
		}
		pc.Close()
	}
	return nil
}

// read takes the routes in.
func (h *host) read() error {
	var local []netip.Prefix
	def6 := false
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family,
			&netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if err != nil {
			return fmt.Errorf("read the host's addresses: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil {
				continue
			}
			if a, ok := netip.AddrFromSlice(r.Dst.IP); ok {
				bits, _ := r.Dst.Mask.Size()
				local = append(local, netip.PrefixFrom(a.Unmap(), bits))
			}
		}
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6,
		&netlink.Route{Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	if err != nil {
		return fmt.Errorf("read the host's IPv6 routes: %w", err)
	}
	for _, r := range routes {
		def6 = def6 || r.Dst == nil || isDefault(r)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.Equal(local, h.local) && h.tell != nil {
		h.tell.setLocal(local)
	}
	h.local = local
	if def6 != h.def6 {
		h.def6 = def6
		select {
		case h.notify <- struct{}{}:
		default:
		}
	}
	return nil
}

func isDefault(r netlink.Route) bool {
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}

// findResolvConf reads resolv.conf for the first time, if it is needed.
func (h *host) findResolvConf(c Config) error {
	if c.NoDNS {
		return nil
	}
	path, err := filepath.Abs(c.ResolvConf)
	if err != nil {
		return fmt.Errorf("find resolv.conf: %w", err)
	}
	h.resolv, h.needed = path, len(c.DNS) == 0
	h.reload()
	return nil
}

// reload reads resolv.conf. As long as the file is missing, empty or without a
// server, what it last said stays in force.
func (h *host) reload() {
	rc, err := dns.ReadResolvConf(h.resolv)
	if err != nil {
		if !h.failing && h.needed {
			h.log.Warn("reading resolv.conf failed; keeping what it said before", "path", h.resolv, "err", err)
		}
		h.failing = true
		return
	}
	h.failing = false
	h.mu.Lock()
	defer h.mu.Unlock()
	if slices.Equal(rc.Servers, h.conf.Servers) && slices.Equal(rc.Search, h.conf.Search) {
		return
	}
	h.conf = rc
	if h.tell != nil {
		h.tell.setResolvConf(rc)
	}
}

// resolvers are the DNS servers that are asked.
func (h *host) resolvers(c Config) []netip.AddrPort {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(c.DNS) == 0 {
		return h.conf.Servers
	}
	list := slices.Clone(c.DNS)
	for i, a := range list {
		if a.Port() == 0 {
			list[i] = netip.AddrPortFrom(a.Addr(), dnsPort)
		}
	}
	return list
}

// sow fills in what the host says.
func (h *host) sow(s *seed) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.Local, s.ResolvConf = h.local, h.conf
}

// follow has e told what changes, and what has changed since sow.
func (h *host) follow(e hostListener) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tell = e
	e.setLocal(h.local)
	e.setResolvConf(h.conf)
}

// default6 reports whether the host has an IPv6 default route.
func (h *host) default6() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.def6
}

// changed receives after default6 has changed.
func (h *host) changed() <-chan struct{} { return h.notify }

// run follows the host until ctx is done.
func (h *host) run(ctx context.Context) error {
	if h.resolv != "" {
		var reading sync.WaitGroup
		reading.Go(func() { dns.FollowResolvConf(ctx, h.resolv, h.log, h.reload) })
		defer reading.Wait()
	}
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	updates := h.updates
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-updates:
			if !ok {
				h.log.Warn("the host's routes are no longer followed")
				updates = nil
				continue
			}
			timer.Reset(settle)
		case <-timer.C:
			if err := h.read(); err != nil {
				h.log.Warn("cannot read the host's routes", "err", err)
			}
		}
	}
}

func (h *host) close() { close(h.stop) }

// dupFile returns a descriptor of f that is the caller's.
func dupFile(f *os.File) (int, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	dup := -1
	cerr := c.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if cerr != nil {
		return -1, cerr
	}
	return dup, err
}

func closeFD(fd int) { unix.Close(fd) }
