package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Server answers guests' queries. Make one with New.
type Server struct {
	cfg     Config
	log     *slog.Logger
	epoch   time.Time
	permit  func(netip.AddrPort) error
	bind    func(int, netip.AddrPort) error
	dial    func(context.Context, string, netip.AddrPort) (net.Conn, error)
	dialer  net.Dialer
	own     []netip.AddrPort // host sockets where we answer
	locals  locals
	cache   cache
	flights flights
	ids     idSource

	upstreams atomic.Pointer[upstreams]
	inFlight  atomic.Int64 // clients that wait
	lingering atomic.Int64 // flights
	stats     counters
	logged    limiter

	// Of Run.
	running atomic.Bool
	ctx     context.Context
	sockets sockets
	tasks   sync.WaitGroup
	closed  atomic.Bool
	streams streams

	follow   follower
	watchers watchers
}

// New returns a Server for cfg. It reads resolv.conf once, and starts nothing.
func New(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	s := &Server{
		cfg: cfg, log: cfg.Logger, epoch: time.Now(),
		permit: cfg.Permit, bind: cfg.Bind, dial: cfg.Dial,
	}
	s.cache.maxEntries, s.cache.maxBytes = cfg.CacheEntries, cfg.CacheBytes
	s.streams.patience = streamPatience
	s.dialer = net.Dialer{ControlContext: s.control}
	if err := s.locals.setZones(cfg.Zones); err != nil {
		return nil, fmt.Errorf("dns: set zone: %w", err)
	}
	if err := s.locals.set(cfg.Records); err != nil {
		return nil, fmt.Errorf("dns: set record: %w", err)
	}
	for _, c := range cfg.PacketConns {
		if _, ok := c.(*net.UDPConn); ok {
			s.own = append(s.own, addrPort(c.LocalAddr()))
		}
	}
	for _, l := range cfg.Listeners {
		if _, ok := l.(*net.TCPListener); ok {
			s.own = append(s.own, addrPort(l.Addr()))
		}
	}
	fixed := make([]netip.AddrPort, 0, len(cfg.Upstreams))
	for _, a := range cfg.Upstreams {
		a = withPort(a)
		if !a.IsValid() || a.Addr().IsUnspecified() || a.Addr().IsMulticast() {
			return nil, fmt.Errorf("dns: use upstream %v: not the address of a server", a)
		}
		fixed = append(fixed, a)
	}
	s.upstreams.Store(new(upstreams))
	if len(fixed) > 0 {
		s.setUpstreams(fixed)
	}
	var err error
	if s.follow.path, err = filepath.Abs(cfg.ResolvConf); err != nil {
		return nil, fmt.Errorf("dns: find resolv.conf: %w", err)
	}
	if !cfg.Unread {
		s.reload()
	}
	return s, nil
}

// Run answers until parent is done, then returns nil; or until a conn fails,
// then returns its error. It can be called once.
func (s *Server) Run(parent context.Context) error {
	defer s.closeConns()
	if err := s.sockets.start(s); err != nil {
		return fmt.Errorf("dns: %w", err)
	}
	s.running.Store(true)
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	var stop context.CancelFunc
	s.ctx, stop = context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var engine, readers sync.WaitGroup
	unwatch := s.watchSockets()
	if unwatch == nil {
		unwatch = func() {}
		engine.Go(s.sockets.run)
	}
	if !s.cfg.Unread {
		readers.Go(func() { FollowResolvConf(ctx, s.follow.path, s.log, s.reload) })
	}
	for _, c := range s.cfg.PacketConns {
		readers.Go(func() { cancel(s.servePackets(ctx, c)) })
	}
	for _, l := range s.cfg.Listeners {
		readers.Go(func() { cancel(s.serveListener(ctx, l)) })
	}
	<-ctx.Done()
	s.closeConns()
	s.closed.Store(true)
	stop()
	s.abort()
	readers.Wait()
	s.abort() // what came in between
	s.tasks.Wait()
	unwatch()
	s.sockets.close()
	engine.Wait()
	if parent.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// watchSockets has somebody else wait for answers, nil if nobody does.
func (s *Server) watchSockets() (stop func()) {
	if s.cfg.Watch == nil {
		return nil
	}
	stop, err := s.cfg.Watch(s.sockets.fd, func() { s.sockets.poll() })
	if err != nil {
		s.log.Debug("waiting for answers alone", "err", err) // the other is at its end
		return nil
	}
	return stop
}

// control runs the Bind hook for sockets of the net package.
func (s *Server) control(_ context.Context, _, address string, conn syscall.RawConn) error {
	if s.bind == nil {
		return nil
	}
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if cerr := conn.Control(func(fd uintptr) { err = s.bind(int(fd), addr) }); cerr != nil {
		return cerr
	}
	return err
}

// closeConns closes what guests ask through.
func (s *Server) closeConns() {
	for _, c := range s.cfg.PacketConns {
		c.Close()
	}
	for _, l := range s.cfg.Listeners {
		l.Close()
	}
	s.streams.close()
}

// abort ends all flights.
func (s *Server) abort() {
	var all []*flight
	s.sockets.mu.Lock()
	for _, sock := range s.sockets.all {
		for _, a := range sock.open {
			all = append(all, a.f) // lingering
		}
	}
	s.sockets.mu.Unlock()
	for _, f := range append(all, s.flights.all()...) {
		f.mu.Lock()
		if !f.done {
			f.finishLocked(nil, 0)
		}
		f.closeLocked(0, false)
		f.unlock()
	}
}

// now returns the time since the Server was made.
func (s *Server) now() time.Duration { return time.Since(s.epoch) }

// SetRecord makes addrs the addresses of the local name, replacing those it
// had. No addresses take the name away.
func (s *Server) SetRecord(name string, addrs ...netip.Addr) error {
	if err := s.locals.set(map[string][]netip.Addr{name: addrs}); err != nil {
		return fmt.Errorf("dns: set record: %w", err)
	}
	return nil
}

// AddRecord gives the local name addresses beside those it has, and returns all.
func (s *Server) AddRecord(name string, addrs ...netip.Addr) ([]netip.Addr, error) {
	all, err := s.locals.add(name, addrs)
	if err != nil {
		return nil, fmt.Errorf("dns: add record: %w", err)
	}
	return all, nil
}

// RemoveRecord takes the local name away and reports whether there was one.
func (s *Server) RemoveRecord(name string) bool { return s.locals.remove(name) }

// Records returns the local names and their addresses.
func (s *Server) Records() map[string][]netip.Addr { return s.locals.snapshot() }

// Upstreams returns the resolvers asked now, in order of preference.
func (s *Server) Upstreams() []netip.AddrPort {
	var addrs []netip.AddrPort
	for _, up := range s.upstreams.Load().list {
		addrs = append(addrs, up.addr)
	}
	return addrs
}

// setUpstreams makes addrs the upstreams. It reports whether they changed.
func (s *Server) setUpstreams(addrs []netip.AddrPort) bool {
	usable := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		a = withPort(a)
		if s.isOwn(a) {
			s.log.Warn("ignoring an upstream that is this server itself", "upstream", a)
			continue
		}
		if !slices.Contains(usable, a) && len(usable) < maxUpstreams {
			usable = append(usable, a)
		}
	}
	// Fixed ones are set once, those of resolv.conf by one goroutine.
	old := s.upstreams.Load()
	if slices.EqualFunc(usable, old.list, func(a netip.AddrPort, up *upstream) bool { return up.addr == a }) {
		return false
	}
	set := makeUpstreams(usable, old)
	s.upstreams.Store(set)
	// Others may know other names, and answer who waits for the old ones.
	s.cache.flush()
	s.redirect(set)
	if s.running.Load() && s.logged.allow(s.now()) {
		s.log.Info("upstreams changed", "upstreams", usable)
	}
	return true
}

// redirect asks set, too, what is being asked.
func (s *Server) redirect(set *upstreams) {
	now := s.now()
	for _, f := range s.flights.all() {
		f.mu.Lock()
		if !f.done {
			f.extendLocked(set, now)
		}
		f.unlock()
	}
}

// isOwn reports whether a is an address that this server answers at on the
// host. Conns of a network in memory do not count: a host inside a network like
// ours has the address of our guests' server for its own resolver.
func (s *Server) isOwn(a netip.AddrPort) bool {
	return slices.ContainsFunc(s.own, func(own netip.AddrPort) bool {
		return own == a ||
			own.Port() == a.Port() && own.Addr().IsUnspecified() && a.Addr().IsLoopback()
	})
}

// down notes that up failed.
func (s *Server) down(up *upstream, t transport, now time.Duration, err error) {
	if !s.closed.Load() && up.health[t].fail(now) && s.logged.allow(now) {
		s.log.Warn("upstream fails", "upstream", up.addr, "network", t.String(), "err", err)
	}
}

// up notes that up answered.
func (s *Server) up(up *upstream, t transport, now time.Duration) {
	if up.health[t].succeed(now) && s.logged.allow(now) {
		s.log.Info("upstream answers again", "upstream", up.addr, "network", t.String())
	}
}

// scratch is what a reader works with.
type scratch struct {
	q   query
	out []byte
}

// handle answers msg, from here if it can, else by a flight. It reports false
// if c will get no answer. It keeps nothing of msg.
func (s *Server) handle(msg []byte, c client, t transport, w *scratch) bool {
	s.stats.queries.Add(1)
	q := &w.q
	switch q.parse(msg) {
	case drop:
		s.stats.dropped.Add(1)
		return false
	case formErr:
		s.stats.malformed.Add(1)
		c.send(q.appendReply(w.out[:0], rcodeFormErr, edeNone))
		return true
	case notImp:
		s.stats.malformed.Add(1)
		c.send(q.appendReply(w.out[:0], rcodeNotImp, edeNone))
		return true
	}
	c.id = q.id()
	limit := q.size
	if t == overTCP {
		limit = maxMessage
	}
	if out, ok := s.locals.answer(w.out[:0], q); ok {
		s.stats.local.Add(1)
		w.out = out
		s.tell(out, q.end)
		c.send(truncate(out, q.end, limit))
		return true
	}
	if q.plain {
		now := s.now()
		if e := s.cache.get(q.key(), now); e != nil {
			s.stats.hits.Add(1)
			w.out = e.render(w.out[:0], q, now)
			s.tell(w.out, q.end)
			c.send(truncate(w.out, q.end, limit))
			return true
		}
	}
	if s.inFlight.Add(1) > int64(s.cfg.MaxInFlight) {
		s.inFlight.Add(-1)
		s.stats.overload.Add(1)
		c.send(q.appendReply(w.out[:0], rcodeServFail, edeNone))
		return true
	}
	if t == overTCP && (q.qtype == typeAXFR || q.qtype == typeIXFR) {
		if s.cfg.NoPrivate { // many messages, each of which would be to judge
			s.inFlight.Add(-1)
			c.send(q.appendReply(w.out[:0], rcodeRefused, edeFiltered))
			return true
		}
		s.transfer(q, c)
	} else {
		s.forward(q, c, t)
	}
	return true
}

// limiter bounds how much is logged, whatever upstreams and files do.
type limiter struct {
	mu     sync.Mutex // guards following
	window time.Duration
	count  int
}

// allow reports whether one more record may be logged: 30 a minute may.
func (l *limiter) allow(now time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := now / time.Minute; w != l.window {
		l.window, l.count = w, 0
	}
	l.count++
	return l.count <= 30
}

// addrPort returns the netip form of a UDP or TCP address.
func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.UDPAddr:
		ap = a.AddrPort()
	case *net.TCPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// withPort returns a with the DNS port where it has none, and unmapped.
func withPort(a netip.AddrPort) netip.AddrPort {
	port := a.Port()
	if port == 0 {
		port = 53
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), port)
}
