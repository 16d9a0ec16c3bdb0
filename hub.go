package usernet

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/hub"
	"github.com/usernet/usernet/internal/rights"
)

// hubSettings are what the members of a network have in common.
type hubSettings struct {
	Network       string           `json:"network"`
	MTU           int              `json:"mtu"`
	CIDR          netip.Prefix     `json:"cidr"`
	CIDR6         netip.Prefix     `json:"cidr6"`
	IPv6          IPv6Mode         `json:"ipv6"`
	DNS           []netip.AddrPort `json:"dns,omitempty"`
	DNSSearch     []string         `json:"dns_search,omitempty"`
	AddHosts      []Host           `json:"add_hosts,omitempty"`
	NoDNS         bool             `json:"no_dns"`
	ResolvConf    string           `json:"resolv_conf"`
	HostLoopback  bool             `json:"host_loopback"`
	HostPorts     []uint16         `json:"host_ports,omitempty"`
	Reverse       []Reverse        `json:"reverse,omitempty"`
	Allow         []Rule           `json:"allow,omitempty"`
	Deny          []Rule           `json:"deny,omitempty"`
	AllowNames    []NameRule       `json:"allow_names,omitempty"`
	NoPrivateDNS  bool             `json:"no_private_dns"`
	OutboundAddr  netip.Addr       `json:"outbound_addr"`
	OutboundAddr6 netip.Addr       `json:"outbound_addr6"`
	OutboundIf    string           `json:"outbound_if"`
	NoSandbox     bool             `json:"no_sandbox,omitempty"`
}

func (c Config) hubSettings() hubSettings {
	return hubSettings{
		Network: c.Network, MTU: c.MTU, CIDR: c.CIDR, CIDR6: c.CIDR6, IPv6: c.IPv6,
		DNS: c.DNS, DNSSearch: c.DNSSearch, AddHosts: c.AddHosts, NoDNS: c.NoDNS, ResolvConf: c.ResolvConf,
		HostLoopback: c.HostLoopback, HostPorts: c.HostPorts, Reverse: c.Reverse,
		Allow: c.Allow, Deny: c.Deny, AllowNames: c.AllowNames, NoPrivateDNS: c.NoPrivateDNS,
		OutboundAddr: c.OutboundAddr, OutboundAddr6: c.OutboundAddr6, OutboundIf: c.OutboundInterface,
		NoSandbox: c.NoSandbox,
	}
}

// apply writes the settings into c.
func (s hubSettings) apply(c Config) Config {
	c.Network, c.MTU, c.CIDR, c.CIDR6, c.IPv6 = s.Network, s.MTU, s.CIDR, s.CIDR6, s.IPv6
	c.DNS, c.DNSSearch, c.AddHosts, c.NoDNS, c.ResolvConf = s.DNS, s.DNSSearch, s.AddHosts, s.NoDNS, s.ResolvConf
	c.HostLoopback, c.HostPorts, c.Reverse = s.HostLoopback, s.HostPorts, s.Reverse
	c.Allow, c.Deny, c.AllowNames, c.NoPrivateDNS = s.Allow, s.Deny, s.AllowNames, s.NoPrivateDNS
	c.OutboundAddr, c.OutboundAddr6, c.OutboundInterface = s.OutboundAddr, s.OutboundAddr6, s.OutboundIf
	c.NoSandbox = s.NoSandbox
	return c
}

// A setting is one of hubSettings, as the user knows it.
type setting struct {
	flag      string
	theirs    any
	networks  any
	mayBeLess bool // who sets nothing takes what there is
}

// refuse tells a newcomer which setting of it is not that of the network. What
// the gateway may be used for has to be the same, whether more or less.
func (s hubSettings) refuse(n hubSettings) error {
	for _, x := range []setting{
		{"--mtu", n.MTU, s.MTU, false},
		{"--cidr", n.CIDR, s.CIDR, true},
		{"--cidr6", n.CIDR6, s.CIDR6, true},
		{"--ipv6", n.IPv6, s.IPv6, n.IPv6 == IPv6Auto},
		{"--dns", n.DNS, s.DNS, true},
		{"--dns-search", n.DNSSearch, s.DNSSearch, true},
		{"--add-host", n.AddHosts, s.AddHosts, true},
		{"--no-dns", n.NoDNS, s.NoDNS, false},
		{"--host-loopback", n.HostLoopback, s.HostLoopback, false},
		{"--host-port", n.HostPorts, s.HostPorts, false},
		{"--reverse", n.Reverse, s.Reverse, false},
		{"--allow", n.Allow, s.Allow, false},
		{"--deny", n.Deny, s.Deny, false},
		{"--allow-name", n.AllowNames, s.AllowNames, false},
		{"--dns-rebind-protection", n.NoPrivateDNS, s.NoPrivateDNS, false},
		{"--outbound-addr", n.OutboundAddr, s.OutboundAddr, true},
		{"--outbound-addr6", n.OutboundAddr6, s.OutboundAddr6, true},
		{"--outbound-if", n.OutboundIf, s.OutboundIf, true},
		{"--no-sandbox", n.NoSandbox, s.NoSandbox, false},
	} {
		unset := reflect.ValueOf(x.theirs).IsZero() || x.flag == "--ipv6"
		if reflect.DeepEqual(x.theirs, x.networks) || x.mayBeLess && unset || emptySlices(x.theirs, x.networks) {
			continue
		}
		return fmt.Errorf("%s is %s, that of the network is %s, as its first member said: give the same, or choose another network",
			x.flag, settingText(x.theirs), settingText(x.networks))
	}
	return nil
}

func emptySlices(a, b any) bool {
	v, w := reflect.ValueOf(a), reflect.ValueOf(b)
	return v.Kind() == reflect.Slice && v.Len() == 0 && w.Len() == 0
}

func settingText(v any) string {
	text := strings.Trim(fmt.Sprint(v), "[]")
	if text == "" || text == "invalid Prefix" || text == "invalid IP" {
		return "not set"
	}
	return text
}

// Operations that a hub is asked for.
const (
	opJoin      = "join"
	opPublish   = "publish"
	opUnpublish = "unpublish"
	opInside    = "inside"
	opFlows     = "flows"
	opKillFlow  = "kill-flow"
	opLeases    = "leases"
	opRecords   = "records"
	opSetRecord = "set-record"
	opAddRecord = "add-record"
	opRemRecord = "remove-record"
	opStats     = "stats"
	opInspect   = "inspect"
	opSandbox   = "sandbox"
	opEnd       = "end"
)

// Events that a hub tells its members of.
const (
	eventDefault6 = "default6" // whether there is an IPv6 default route
	eventEnd      = "end"      // the network was removed
	eventGone     = "gone"     // the member's interface was
	eventWorker   = "worker"   // there is another one, which needs a way into the guest
	eventWant     = "want"     // the way into the guest could serve it
)

type hubRequest struct {
	ID     uint64         `json:"id"`
	Op     string         `json:"op"`
	Join   *joinRequest   `json:"join,omitempty"`
	Proto  Protocol       `json:"proto,omitempty"`
	Proxy  int            `json:"proxy,omitempty"`
	Guest4 netip.AddrPort `json:"guest4,omitzero"`
	Guest6 netip.AddrPort `json:"guest6,omitzero"`
	Number uint64         `json:"number,omitempty"`
	Inside *agent.Inside  `json:"inside,omitempty"`
	Addrs  []netip.Addr   `json:"addrs,omitempty"`
	Text   string         `json:"text,omitempty"`
	Force  bool           `json:"force,omitempty"`

	Capture *CaptureOptions `json:"capture,omitempty"`
}

type hubReply struct {
	ID    uint64          `json:"id,omitempty"` // 0: an event
	Error string          `json:"error,omitempty"`
	Code  string          `json:"code,omitempty"`
	Event string          `json:"event,omitempty"`
	On    bool            `json:"on,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
}

// joinRequest is who wants to be a member. The link's descriptor comes beside it.
type joinRequest struct {
	MemberID  string           `json:"member_id"` // of its own choice, at random
	Settings  hubSettings      `json:"settings"`
	Name      string           `json:"name,omitempty"`
	Aliases   []string         `json:"aliases,omitempty"`
	Isolate   bool             `json:"isolate,omitempty"`
	AnySource bool             `json:"any_source,omitempty"`
	MAC       net.HardwareAddr `json:"mac"`
	Link      agent.Link       `json:"link"`
	Want4     netip.Addr       `json:"want4,omitzero"`
	Want6     netip.Addr       `json:"want6,omitzero"`
	Static    bool             `json:"static"` // it configures its guest by itself
	GuestPID  int              `json:"guest_pid,omitempty"`
	Netns     string           `json:"netns,omitempty"`
	Level     slog.Level       `json:"level"`
}

type joinReply struct {
	Settings hubSettings `json:"settings"`
	Addr4    netip.Addr  `json:"addr4"`
	Addr6    netip.Addr  `json:"addr6,omitzero"`
	Default6 bool        `json:"default6"`
	Search   []string    `json:"search,omitempty"`
}

// hubState is what a hub's successor reads.
type hubState struct {
	Settings hubSettings        `json:"settings"`
	Members  map[string]keepFor `json:"members"`
}

// keepFor is what is kept for a member that comes again.
type keepFor struct {
	Name  string     `json:"name,omitempty"`
	Addr4 netip.Addr `json:"addr4"`
	Addr6 netip.Addr `json:"addr6,omitzero"`
}

// newMemberID returns a name for one that comes again.
func newMemberID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

const (
	// hubIdle is how long a hub waits for its first member.
	hubIdle = 10 * time.Second
	// comeAgain is how long it keeps the addresses of its predecessor's.
	comeAgain = 10 * time.Second
	// hubCall bounds what the engine is asked for.
	hubCall = 5 * time.Second
)

// hubMain takes over, and does not return, if this process is a hub.
func hubMain() {
	if len(os.Args) != 3 || os.Args[0] != hub.ProcessName {
		return
	}
	// As the gateway of one guest runs: see cmd/usernet/runtime.go.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	h := &hubServer{place: hub.At(os.Args[1], os.Args[2]), done: make(chan error, 4)}
	if err := h.main(); err != nil {
		fmt.Fprintf(os.Stderr, "usernet: hub: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// hubServer is the process that a network runs in.
type hubServer struct {
	place hub.Place
	log   *slog.Logger
	level slog.LevelVar
	done  chan error // the end, and why

	mu       sync.Mutex // guards following
	ended    bool
	members  []*member
	since    time.Time
	settings hubSettings
	cfg      Config
	addrs    Addresses
	link     agent.Link // what the members' links have in common
	gw       *remote
	host     *host
	default6 bool
	stop     context.CancelFunc
	stopped  chan struct{} // the gateway has
	kept     map[string]keepFor
	keptTill time.Time
}

// A member is one guest of a hub.
type member struct {
	joinRequest
	conn   *hub.Conn
	pid    int
	since  time.Time
	addr4  netip.Addr
	addr6  netip.Addr
	number uint64                // as the worker knows it
	ports  map[uint64]hubForward // by the member's own numbers
	wanted bool                  // the way into it, by the worker
}

type hubForward struct {
	id   uint64
	text string
}

func (m *member) addresses() []netip.Addr {
	if !m.addr6.IsValid() {
		return []netip.Addr{m.addr4}
	}
	return []netip.Addr{m.addr4, m.addr6}
}

func (m *member) names() []string {
	if m.Name == "" {
		return m.Aliases
	}
	return append([]string{m.Name}, m.Aliases...)
}

// title is how the log calls it.
func (m *member) title() string {
	if m.Name != "" {
		return m.Name
	}
	return m.addr4.String()
}

func (h *hubServer) main() error {
	h.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: &h.level}))
	l, err := hub.Listen(h.place)
	if err != nil {
		return err
	}
	defer l.Close()
	h.restore()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go h.accept(l)
	idle := time.AfterFunc(hubIdle, h.endIfIdle)
	defer idle.Stop()
	select {
	case err = <-h.done:
	case s := <-signals:
		h.log.Info("ending", "signal", s)
	}
	h.mu.Lock()
	h.ended = true
	h.stopGateway()
	h.mu.Unlock()
	return err
}

// restore keeps what the members of a hub that was killed had.
func (h *hubServer) restore() {
	var s hubState
	if b := h.place.ReadState(); b == nil || json.Unmarshal(b, &s) != nil {
		return
	}
	h.kept, h.keptTill = s.Members, time.Now().Add(comeAgain)
	h.settings = s.Settings
}

// save writes what a successor has to know.
func (h *hubServer) save() {
	s := hubState{h.settings, make(map[string]keepFor)}
	if time.Now().Before(h.keptTill) {
		for id, k := range h.kept {
			s.Members[id] = k
		}
	}
	for _, m := range h.members {
		s.Members[m.MemberID] = keepFor{m.Name, m.addr4, m.addr6}
	}
	b, err := json.Marshal(s)
	if err == nil {
		err = h.place.WriteState(b)
	}
	if err != nil {
		h.log.Warn("members would lose their addresses if this process were killed", "err", err)
	}
}

func (h *hubServer) endIfIdle() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.endIfEmpty()
}

// endIfEmpty ends a hub without members.
func (h *hubServer) endIfEmpty() {
	if len(h.members) == 0 && !h.ended {
		h.ended = true
		h.done <- nil
	}
}

func (h *hubServer) accept(l *hub.Listener) {
	for {
		c, pid, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			h.log.Warn("cannot let anybody in", "err", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go h.serve(c, pid)
	}
}

// serve answers one process until it has gone.
func (h *hubServer) serve(c *hub.Conn, pid int) {
	defer c.Close()
	var m *member
	tried := false // to become one
	captures, end := context.WithCancel(context.Background())
	var running sync.WaitGroup
	defer func() {
		end()
		running.Wait()
	}()
	for {
		var q hubRequest
		fds, err := c.Receive(&q)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				h.log.Debug("a connection has ended", "pid", pid, "err", err)
			}
			break
		}
		if q.Op == opCapture {
			// It ends with the connection, at the latest.
			running.Go(func() {
				err := h.capture(captures, &q, fds)
				if c.Send(replyOf(q.ID, err)) != nil {
					c.Close()
				}
			})
			continue
		}
		r := hubReply{ID: q.ID}
		var body any
		if q.Op == opJoin {
			tried = true
			if m != nil {
				rights.Close(fds)
				err = errors.New("it is a member already")
			} else {
				m, body, err = h.join(c, pid, q.Join, fds)
			}
		} else {
			body, err = h.answer(m, &q, fds)
		}
		if err == nil && body != nil {
			r.Body, err = json.Marshal(body)
		}
		if err != nil {
			r = replyOf(q.ID, err)
		}
		if c.Send(r) != nil {
			break
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if m != nil {
		h.leave(m)
	}
	if tried {
		h.endIfEmpty()
	}
}

func replyOf(id uint64, err error) hubReply {
	if err == nil {
		return hubReply{ID: id}
	}
	return hubReply{ID: id, Error: err.Error(), Code: errorCode(err)}
}

// capture writes the network's frames to a pipe.
func (h *hubServer) capture(ctx context.Context, q *hubRequest, fds []int) error {
	if len(fds) != 1 || q.Capture == nil {
		rights.Close(fds)
		return errors.New("the request is incomplete")
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		rights.Close(fds)
		return err
	}
	to := os.NewFile(uintptr(fds[0]), "capture")
	defer to.Close()
	h.mu.Lock()
	gw, name := h.gw, h.settings.Network
	h.mu.Unlock()
	if gw == nil {
		return ErrNotRunning
	}
	// At its end there is only so much time for who reads.
	stop := context.AfterFunc(ctx, func() { _ = to.SetWriteDeadline(time.Now().Add(engineTime)) })
	defer stop()
	return gw.capture(ctx, to, name, *q.Capture)
}

// join makes a process that asks for it a member.
func (h *hubServer) join(c *hub.Conn, pid int, q *joinRequest, fds []int) (m *member, r *joinReply, err error) {
	defer func() {
		if err != nil {
			rights.Close(fds)
		}
	}()
	if q == nil || len(fds) != 1 || len(q.MAC) != 6 {
		return nil, nil, errors.New("the request is incomplete")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return nil, nil, errHubEnds
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, err
	}
	if h.gw == nil {
		if err := h.open(q); err != nil {
			return nil, nil, err
		}
		defer func() {
			if err != nil {
				h.endIfEmpty()
			}
		}()
	} else if err := h.settings.refuse(q.Settings); err != nil {
		return nil, nil, err
	}
	if err := h.admit(q); err != nil {
		return nil, nil, err
	}
	m = &member{joinRequest: *q, conn: c, pid: pid, since: time.Now(), ports: make(map[uint64]hubForward)}
	if m.addr4, m.addr6, err = h.assign(q); err != nil {
		return nil, nil, err
	}
	h.members = append(h.members, m)
	h.setNames(m.names())
	ctx, cancel := context.WithTimeout(context.Background(), hubCall)
	defer cancel()
	var search []string
	m.number, search, err = h.gw.addMember(ctx, memberOrder{
		MAC: q.MAC, Addrs: m.addresses(), AnySource: q.AnySource, Isolated: q.Isolate,
	}, fds[0], func() { go c.Send(hubReply{Event: eventGone}) })
	if err != nil {
		h.members = slices.Delete(h.members, len(h.members)-1, len(h.members))
		h.setNames(m.names())
		return nil, nil, err
	}
	delete(h.kept, m.MemberID)
	h.save()
	h.log.Info("joined", "member", m.title(), "address", m.addr4, "pid", pid)
	return m, &joinReply{h.settings, m.addr4, m.addr6, h.default6, search}, nil
}

// errHubEnds is for those who come too late; they come again.
var errHubEnds = errors.New("the network is about to end")

// open makes the gateway, with the settings of the first member.
func (h *hubServer) open(q *joinRequest) error {
	h.level.Set(q.Level)
	c := q.Settings.apply(Config{Logger: h.log, Configure: ConfigureNone}).withDefaults()
	all, err := hub.LockAll(h.base())
	if err != nil {
		return err
	}
	defer all.Close()
	if s := h.settings; s.CIDR.IsValid() && s.Network == c.Network {
		setDefault(&c.CIDR, s.CIDR)
		setDefault(&c.CIDR6, s.CIDR6)
	}
	if c.CIDR, c.CIDR6, err = c.chooseSubnets(h.taken()); err != nil {
		return err
	}
	if err := checkOutbound(c); err != nil {
		return err
	}
	if h.host, err = watchHost(c, h.log); err != nil {
		return err
	}
	link := q.Link
	link.MAC, link.FD, link.MTU = nil, -1, c.MTU
	h.addrs = c.Addresses()
	s := seed{Records: c.records(), Default6: c.hasIPv6() && (c.IPv6 == IPv6On || h.host.default6())}
	h.host.sow(&s)
	ctx, cancel := context.WithCancel(context.Background())
	gw, err := startShared(ctx, c, link, s, h.tellRestart, h.tellWanted)
	if err != nil {
		cancel()
		h.host.close()
		return err
	}
	h.cfg, h.settings, h.link, h.gw, h.since = c, c.hubSettings(), link, gw, time.Now()
	h.default6 = s.Default6
	h.host.follow(gw)
	h.stop, h.stopped = cancel, make(chan struct{})
	go func() {
		defer close(h.stopped)
		err := gw.run(ctx)
		gw.close()
		if ctx.Err() == nil {
			h.done <- fmt.Errorf("serve: %w", err)
		}
	}()
	go func() { _ = h.host.run(ctx) }()
	go h.followHost(ctx)
	h.save()
	return nil
}

func (h *hubServer) base() string { return strings.TrimSuffix(h.place.Dir(), "/"+h.place.Name()) }

// taken lists the subnets of the other networks that live.
func (h *hubServer) taken() []netip.Prefix {
	places, _ := hub.List(h.base())
	var ps []netip.Prefix
	for _, p := range places {
		var s hubState
		if p.Name() == h.place.Name() || json.Unmarshal(p.ReadState(), &s) != nil || !p.Live() {
			continue
		}
		for _, q := range []netip.Prefix{s.Settings.CIDR, s.Settings.CIDR6} {
			if q.IsValid() {
				ps = append(ps, q)
			}
		}
	}
	return ps
}

// tellRestart has the members give another worker what it cannot have from the last.
func (h *hubServer) tellRestart() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.members {
		go m.conn.Send(hubReply{Event: eventWorker})
	}
}

// tellWanted has a member give the worker the way into it, once.
func (h *hubServer) tellWanted(guest netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.members {
		if !m.wanted && slices.Contains(m.addresses(), guest) {
			m.wanted = true
			go m.conn.Send(hubReply{Event: eventWant})
		}
	}
}

// followHost tells the members whether there is an IPv6 default route.
func (h *hubServer) followHost(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.host.changed():
		}
		h.mu.Lock()
		on := h.cfg.hasIPv6() && (h.cfg.IPv6 == IPv6On || h.host.default6())
		if on != h.default6 {
			h.default6 = on
			h.gw.setDefaultRouter6(on)
			for _, m := range h.members {
				go m.conn.Send(hubReply{Event: eventDefault6, On: on})
			}
		}
		h.mu.Unlock()
	}
}

func (h *hubServer) stopGateway() {
	if h.gw == nil {
		return
	}
	h.stop()
	<-h.stopped
	h.host.close()
}

// admit looks at what no two members may have in common.
func (h *hubServer) admit(q *joinRequest) error {
	l, own := q.Link, h.link
	if l.VnetHdr != own.VnetHdr || l.Offload != own.Offload || l.USO != own.USO {
		return fmt.Errorf("its link passes %s, those of the others %s: use the same --link and --offload", offloads(l), offloads(own))
	}
	if h.cfg.NoDNS && len(q.Name)+len(q.Aliases) > 0 {
		return errors.New("the network has no DNS, as its first member said: leave the names out")
	}
	names := q.Aliases
	if q.Name != "" {
		names = append([]string{q.Name}, names...)
	}
	for _, m := range h.members {
		switch {
		case m.MemberID == q.MemberID:
			return errors.New("it is a member already")
		case string(m.MAC) == string(q.MAC):
			return fmt.Errorf("MAC address %v is %s's: choose another", q.MAC, m.title())
		case q.Name != "" && slices.Contains(m.names(), q.Name):
			return fmt.Errorf("the name %s is taken, by the member with address %v: choose another", q.Name, m.addr4)
		case m.Name != "" && slices.Contains(q.Aliases, m.Name):
			return fmt.Errorf("the alias %s is taken, as the name of the member with address %v: choose another", m.Name, m.addr4)
		}
	}
	for _, name := range names {
		for _, k := range h.cfg.AddHosts {
			if strings.EqualFold(strings.TrimSuffix(k.Name, "."), name) {
				return fmt.Errorf("the name %s is taken, by --add-host: choose another", name)
			}
		}
		if strings.HasSuffix("."+name, "."+networkDomain) || h.cfg.records()[name] != nil {
			return fmt.Errorf("the alias %s is the network's own: choose another", name)
		}
	}
	return nil
}

func offloads(l agent.Link) string {
	switch {
	case l.Offload && l.USO:
		return "super-frames of TCP and UDP"
	case l.Offload:
		return "super-frames of TCP"
	case l.VnetHdr:
		return "single packets behind headers"
	}
	return "single packets"
}

// assign gives a newcomer its addresses.
func (h *hubServer) assign(q *joinRequest) (a4, a6 netip.Addr, err error) {
	taken := make(map[netip.Addr]string)
	for _, m := range h.members {
		for _, a := range m.addresses() {
			taken[a] = m.title()
		}
	}
	if time.Now().Before(h.keptTill) {
		for id, k := range h.kept {
			if id != q.MemberID {
				taken[k.Addr4], taken[k.Addr6] = k.Name, k.Name
			}
		}
		if k, ok := h.kept[q.MemberID]; ok {
			setDefault(&q.Want4, k.Addr4)
			setDefault(&q.Want6, k.Addr6)
		}
	}
	if a4, err = h.choose(q.Want4, addrIn(h.addrs.Prefix4, guestHost), h.addrs.Prefix4, taken); err != nil {
		return a4, a6, err
	}
	if !h.addrs.Prefix6.IsValid() {
		if q.Want6.IsValid() {
			err = fmt.Errorf("address %v: the network has no IPv6", q.Want6)
		}
		return a4, a6, err
	}
	a6, err = h.choose(q.Want6, addrIn(h.addrs.Prefix6, guestHost6), h.addrs.Prefix6, taken)
	return a4, a6, err
}

// choose returns the address that is wanted, or the first that is free.
func (h *hubServer) choose(want, from netip.Addr, subnet netip.Prefix, taken map[netip.Addr]string) (netip.Addr, error) {
	a := h.addrs
	special := func(x netip.Addr) bool {
		return x == subnet.Addr() || x.Is4() && x == lastAddr(subnet) ||
			slices.Contains([]netip.Addr{a.Gateway4, a.DNS4, a.Gateway6, a.DNS6}, x) ||
			x.Is4() && a.PoolStart.Compare(x) <= 0 && x.Compare(a.PoolEnd) <= 0
	}
	if want.IsValid() {
		who, used := taken[want]
		switch {
		case !subnet.Contains(want):
			return want, fmt.Errorf("address %v: it is not in the network's subnet %v: choose one there, or leave it out", want, subnet)
		case special(want):
			return want, fmt.Errorf("address %v: it has a meaning of its own on the network: choose one from %v on, or leave it out", want, from)
		case used && who != "" && who != want.String():
			return want, fmt.Errorf("address %v is taken, by %s: choose another, or leave it out", want, who)
		case used:
			return want, fmt.Errorf("address %v is taken: choose another, or leave it out", want)
		}
		return want, nil
	}
	x := from
	for range 2 * (len(taken) + maxSpecial) {
		if !subnet.Contains(x) {
			x = addrIn(subnet, poolEndHost+1)
		}
		if _, used := taken[x]; !used && !special(x) {
			return x, nil
		}
		x = x.Next()
	}
	return x, fmt.Errorf("no address is left in the network's subnet %v: a larger --cidr has more", subnet)
}

// maxSpecial is more than there are addresses in a subnet that no member gets.
const maxSpecial = 64

// leave takes back all that a member has.
func (h *hubServer) leave(m *member) {
	i := slices.Index(h.members, m)
	if i < 0 {
		return
	}
	h.members = slices.Delete(h.members, i, i+1)
	h.setNames(m.names())
	for _, f := range m.ports {
		h.gw.forget(f.id)
	}
	h.gw.removeMember(m.number)
	h.save()
	h.log.Info("left", "member", m.title(), "address", m.addr4)
}

// setNames has the DNS server know who bears these names now.
func (h *hubServer) setNames(names []string) {
	if h.cfg.NoDNS {
		return
	}
	for _, name := range names {
		var addrs []netip.Addr
		for _, m := range h.members {
			if slices.Contains(m.names(), name) {
				addrs = append(addrs, m.addresses()...)
			}
		}
		for _, full := range []string{name, name + "." + h.settings.Network + "." + networkDomain} {
			h.gw.noteRecord(full, addrs)
		}
	}
}

// memberOf returns who has an address.
func (h *hubServer) memberOf(a netip.Addr) string {
	for _, m := range h.members {
		if slices.Contains(m.addresses(), a) {
			return m.title()
		}
	}
	return ""
}

// answer does what a member, or another process of the user, asks for.
func (h *hubServer) answer(m *member, q *hubRequest, fds []int) (body any, err error) {
	handed := false
	defer func() {
		if !handed {
			rights.Close(fds)
		}
	}()
	h.mu.Lock()
	defer h.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), hubCall)
	defer cancel()
	switch q.Op {
	case opInspect:
		return h.inspect(), nil
	case opEnd:
		return nil, h.end(q.Force)
	}
	if h.gw == nil {
		return nil, ErrNotRunning
	}
	n := h.network()
	switch q.Op {
	case opFlows:
		flows, err := n.Flows(ctx)
		for i := range flows {
			flows[i].Member = h.memberOf(flows[i].Guest.Addr())
		}
		return flows, err
	case opKillFlow:
		return nil, n.KillFlow(ctx, q.Text)
	case opLeases:
		leases := n.Leases()
		for i := range leases {
			leases[i].Member = h.memberOf(leases[i].Addr)
		}
		return leases, nil
	case opRecords:
		return n.Records()
	case opSetRecord:
		return nil, n.SetRecord(q.Text, q.Addrs...)
	case opAddRecord:
		return nil, n.AddRecord(q.Text, q.Addrs...)
	case opRemRecord:
		return nil, n.RemoveRecord(q.Text)
	case opStats:
		s := n.Stats()
		s.Forwards = 0
		for _, m := range h.members {
			s.Forwards += len(m.ports)
		}
		if s.Switch != nil {
			s.Switch.Members = len(h.members)
		}
		return s, nil
	case opSandbox:
		return h.gw.sandboxInfo(), nil
	}
	if m == nil || !slices.Contains(h.members, m) {
		return nil, errors.New("it is no member")
	}
	switch q.Op {
	case opPublish:
		if q.Proto != TCP && q.Proto != UDP || len(fds) == 0 {
			return nil, errors.New("the request is incomplete")
		}
		for _, g := range []netip.AddrPort{q.Guest4, q.Guest6} {
			if g.IsValid() && !slices.Contains(m.addresses(), g.Addr()) {
				return nil, badConfig("publish %v: on a shared network a guest publishes its own addresses: leave the address out", q.Text)
			}
		}
		in := forwarder.Inbound{FDs: fds, Guest4: q.Guest4, Guest6: q.Guest6}
		handed = true
		id, err := h.gw.publish(ctx, Forward{Protocol: q.Proto, Proxy: q.Proxy}, in)
		if err == nil {
			m.ports[q.Number] = hubForward{id, q.Text}
		}
		return nil, err
	case opUnpublish:
		f, ok := m.ports[q.Number]
		if !ok {
			return nil, ErrNoForward
		}
		delete(m.ports, q.Number)
		return nil, h.gw.unpublish(ctx, f.id)
	case opInside:
		if q.Inside == nil || len(fds) != 1 {
			return nil, errors.New("the request is incomplete")
		}
		for _, a := range q.Addrs {
			if !slices.Contains(m.addresses(), a) {
				return nil, errors.New("that address is not the member's")
			}
		}
		handed = true
		return nil, h.gw.openMember(ctx, insideOrder{m.number, *q.Inside, q.Addrs}, fds[0])
	}
	return nil, fmt.Errorf("unknown request %q", q.Op)
}

// network is the gateway as a Network knows it.
func (h *hubServer) network() *Network {
	n := &Network{cfg: h.cfg, log: h.log, ready: make(chan struct{})}
	n.live.Store(&live{link: h.link, engine: h.gw, since: h.since})
	return n
}

func (h *hubServer) inspect() SharedNetwork {
	n := SharedNetwork{Name: h.place.Name(), HubPID: os.Getpid(), Members: []MemberInfo{}}
	if h.gw == nil {
		return n
	}
	a := h.addrs
	n.Since, n.MTU, n.Offload, n.DNS = h.since.Round(0), h.settings.MTU, h.link.Offload, !h.cfg.NoDNS
	n.IPv4 = Subnet{Prefix: a.Prefix4, Gateway: a.Gateway4, DNS: a.DNS4}
	if a.Prefix6.IsValid() {
		n.IPv6 = &Subnet{Prefix: a.Prefix6, Gateway: a.Gateway6, DNS: a.DNS6}
	}
	n.HostLoopback, n.HostPorts = h.cfg.HostLoopback, h.cfg.HostPorts
	n.Sandbox = h.gw.sandboxInfo()
	ctx, cancel := context.WithTimeout(context.Background(), engineTime)
	defer cancel()
	if s, err := h.gw.stats(ctx); err == nil && s.Switch != nil {
		n.Switch = s.Switch
		n.Switch.Members = len(h.members)
	}
	for _, m := range h.members {
		i := MemberInfo{
			Name: m.Name, Aliases: m.Aliases, Addrs: m.addresses(), MAC: m.MAC.String(), Link: string(m.Link.Kind),
			Isolated: m.Isolate, AnySource: m.AnySource, PID: m.pid, GuestPID: m.GuestPID, Netns: m.Netns, Since: m.since.Round(0),
		}
		for _, f := range m.ports {
			i.Forwards = append(i.Forwards, f.text)
		}
		slices.Sort(i.Forwards)
		n.Members = append(n.Members, i)
	}
	return n
}

// end ends the network, with force even if it has members.
func (h *hubServer) end(force bool) error {
	if len(h.members) > 0 && !force {
		names := make([]string, len(h.members))
		for i, m := range h.members {
			names[i] = m.title()
		}
		return fmt.Errorf("it has members, %s: end them first, or use --force", strings.Join(names, ", "))
	}
	var told sync.WaitGroup
	for _, m := range h.members {
		told.Go(func() { _ = m.conn.Send(hubReply{Event: eventEnd}) })
	}
	told.Wait()
	h.members = nil
	h.endIfEmpty()
	return nil
}
