package usernet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/hub"
	"github.com/usernet/usernet/internal/rights"
	"github.com/usernet/usernet/tap"
)

// ErrRemoved is what Run returns when the shared network was removed.
var ErrRemoved = errors.New("usernet: the network was removed")

// errHubGone is for what a hub was asked and has not answered.
var errHubGone = errors.New("the hub of the network has ended: it is being replaced")

// Times of a member.
const (
	askTime     = 10 * time.Second // for the hub to answer
	rejoinEvery = 50 * time.Millisecond
	rejoinTime  = 30 * time.Second // for a new hub to take the members in
)

// membership is a guest's part in a shared network: what its process does, while
// the gateway is elsewhere.
type membership struct {
	log   *slog.Logger
	at    *attachment
	id    string
	place hub.Place

	mu     sync.Mutex // guards following
	cfg    Config     // with what the hub has assigned
	search []string   // where the guest shall look names up
	hub    *hubClient // nil while there is none
	opened []opened   // what a new hub has to be told of
	last   uint64
	inside *agent.Sockets
	own    []netip.Addr // of inside
}

// opened is a published port. This process keeps the sockets, for a new hub.
type opened struct {
	number uint64
	Forward
	in forwarder.Inbound
}

// runMember serves a guest on a shared network.
func (n *Network) runMember(ctx context.Context, at *attachment) error {
	if at.link.Kind == socketLink {
		return badConfig("join network %s: a socket does not tell what MAC address is behind it: use a TAP", n.cfg.Network)
	}
	base, err := hub.Base()
	if err != nil {
		return fmt.Errorf("usernet: join network %s: %w", n.cfg.Network, err)
	}
	m := &membership{log: n.log, at: at, cfg: n.cfg, id: newMemberID(), place: hub.At(base, n.cfg.Network)}
	defer m.close()
	joined, err := m.join(ctx)
	if err != nil {
		return fmt.Errorf("usernet: join network %s: %w", n.cfg.Network, err)
	}
	n.member.Store(m)
	n.live.Store(&live{link: at.link, inode: at.inode(), since: time.Now(), files: at.seesFiles()})
	defer func() {
		n.live.Store(nil)
		n.member.Store(nil)
	}()
	pub := newPublisher(m.config(), at, m)
	n.publisher.Store(pub)
	defer func() {
		n.publisher.Store(nil)
		pub.stop()
	}()

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		pub.follow(ctx, n.ready)
		return nil
	})
	if at.ns != nil {
		g.Go(func() error {
			if at.ns.Watch(ctx) == nil {
				return errNamespaceGone
			}
			return nil
		})
	}
	if n.cfg.Capture != nil {
		g.Go(func() error {
			// Nobody shall be without a network because a disk is full.
			if err := n.Capture(ctx, n.cfg.Capture, CaptureOptions{}); err != nil {
				n.log.Warn("frames are no longer written", "err", err)
			}
			return nil
		})
	}
	g.Go(func() error { return n.serveMember(ctx, m, joined, pub) })
	err = g.Wait()
	switch {
	case errors.Is(err, errNamespaceGone), errors.Is(err, tap.ErrGone) && at.gone():
		n.log.Info("the namespace is gone")
		return nil
	case errors.Is(err, tap.ErrGone):
		return at.deleted(err)
	case err != nil && !errors.Is(err, ErrRemoved) && !errors.Is(err, ErrConfig):
		return fmt.Errorf("usernet: %w", err)
	}
	return err
}

// serveMember configures the guest, says that it is ready, and does what the hub
// tells of.
func (n *Network) serveMember(ctx context.Context, m *membership, joined *joinReply, pub *publisher) error {
	cfg := m.config()
	if err := m.at.configure(cfg, joined.Default6); err != nil {
		return err
	}
	if err := pub.addAll(ctx); err != nil {
		return err
	}
	if err := pub.lookInside(ctx); err != nil {
		return err
	}
	pub.keepTidy()
	n.log.Info("ready", "interface", m.at.link.Name, "link", m.at.link.Kind, "mtu", m.at.link.MTU,
		"offload", m.at.link.Offload, "addresses", cfg.Configure, "network", cfg.Network, "address", cfg.Guest4)
	close(n.ready)
	for {
		c := m.client()
		select {
		case <-ctx.Done():
			return nil
		case <-m.at.agentDone():
			if ctx.Err() == nil {
				n.log.Warn("the helper process inside the namespace has ended; the network goes on, but follows no change of the host's IPv6 route")
			}
			m.at.forgetAgent()
		case e := <-c.events:
			switch e.Event {
			case eventEnd:
				return ErrRemoved
			case eventGone:
				return tap.ErrGone
			case eventWorker:
				m.openAgain(ctx)
			case eventWant:
				pub.handOver(ctx)
			case eventDefault6:
				if err := m.at.setDefaultRoute6(e.On); err != nil {
					n.log.Warn("cannot change the IPv6 default route inside", "on", e.On, "err", err)
				}
			}
		case <-c.gone:
			if len(c.events) > 0 && ctx.Err() == nil {
				continue // its last words
			}
			n.log.Warn("the hub of the network has ended; starting another")
			joined, err := m.rejoin(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return fmt.Errorf("join network %s again: %w", cfg.Network, err)
			}
			if err := m.at.setDefaultRoute6(joined.Default6); err != nil {
				n.log.Warn("cannot change the IPv6 default route inside", "on", joined.Default6, "err", err)
			}
			n.log.Info("joined again", "network", cfg.Network)
		}
	}
}

func (m *membership) config() Config {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cfg
}

func (m *membership) client() *hubClient {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.hub
}

// join connects to the hub, which it starts if need be, and becomes a member.
func (m *membership) join(ctx context.Context) (*joinReply, error) {
	for {
		r, err := m.tryJoin(ctx)
		var e *hubError
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, errHubGone), errors.As(err, &e) && e.code == codeEnds:
			// It was about to end: another one follows.
			time.Sleep(rejoinEvery)
			continue
		}
		return r, err
	}
}

func (m *membership) tryJoin(ctx context.Context) (*joinReply, error) {
	conn, err := hub.ConnectOrStart(ctx, m.place, hubEnvironment())
	if err != nil {
		return nil, err
	}
	c := newHubClient(conn)
	cfg := m.config()
	q := joinRequest{
		MemberID: m.id, Settings: cfg.hubSettings(), Name: cfg.Name, Aliases: cfg.Aliases, Isolate: cfg.Isolate, AnySource: cfg.AnySource,
		MAC: m.at.link.MAC, Link: m.at.link, Want4: cfg.Guest4, Want6: cfg.Guest6, Static: cfg.Configure == ConfigureStatic,
		GuestPID: cfg.PID, Netns: cfg.NetnsPath, Level: slog.LevelInfo,
	}
	q.Link.Warnings = nil
	if m.log.Enabled(ctx, slog.LevelDebug) {
		q.Level = slog.LevelDebug
	}
	var r joinReply
	if err := c.ask(ctx, hubRequest{Op: opJoin, Join: &q}, &r, m.at.link.FD); err != nil {
		c.conn.Close()
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cfg = r.Settings.apply(m.cfg)
	m.cfg.Guest4, m.cfg.Guest6 = r.Addr4, r.Addr6
	m.hub, m.search = c, r.Search
	return &r, nil
}

// rejoin becomes a member of a new hub, with all that it had.
func (m *membership) rejoin(ctx context.Context) (r *joinReply, err error) {
	m.client().conn.Close()
	for began := time.Now(); time.Since(began) < rejoinTime; {
		if r, err = m.join(ctx); err == nil {
			if err = m.reopen(ctx); err == nil {
				return r, nil
			}
			m.client().conn.Close()
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		m.log.Debug("cannot join again", "err", err)
		time.Sleep(10 * rejoinEvery)
	}
	return nil, err
}

// reopen publishes with a new hub what was published with the last.
func (m *membership) reopen(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.renewInside(ctx); err != nil {
		return err
	}
	for _, o := range m.opened {
		if err := m.tellOpened(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

func (m *membership) tellOpened(ctx context.Context, o opened) error {
	q := hubRequest{Op: opPublish, Text: o.String(), Proto: o.Protocol, Proxy: o.Proxy, Guest4: o.in.Guest4, Guest6: o.in.Guest6, Number: o.number}
	return m.hub.ask(ctx, q, nil, o.in.FDs...)
}

func (m *membership) tellInside(ctx context.Context) error {
	return m.hub.ask(ctx, hubRequest{Op: opInside, Inside: &m.inside.Inside, Addrs: m.own}, nil, m.inside.FD())
}

// publish implements inlet.
func (m *membership) publish(ctx context.Context, f Forward, in forwarder.Inbound) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last++
	o := opened{m.last, f, in}
	if err := m.tellOpened(ctx, o); err != nil {
		rights.Close(in.FDs)
		return 0, err
	}
	m.opened = append(m.opened, o)
	return o.number, nil
}

// unpublish implements inlet.
func (m *membership) unpublish(ctx context.Context, number uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.IndexFunc(m.opened, func(o opened) bool { return o.number == number })
	if i < 0 {
		return ErrNoForward
	}
	rights.Close(m.opened[i].in.FDs)
	m.opened = slices.Delete(m.opened, i, i+1)
	return m.hub.ask(ctx, hubRequest{Op: opUnpublish, Number: number}, nil)
}

// useInside implements inlet.
func (m *membership) useInside(ctx context.Context, s *agent.Sockets, own ...netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inside, m.own = s, own
	if len(own) == 0 {
		return nil
	}
	return m.tellInside(ctx)
}

// openAgain opens another way inside, for another worker.
func (m *membership) openAgain(ctx context.Context) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.renewInside(ctx); err != nil && ctx.Err() == nil {
		m.log.Warn(noSplice, "err", err)
	}
}

// renewInside opens another way inside and hands it over: in the one that there
// is, answers for whoever had it may be under way. Without an agent there is none.
func (m *membership) renewInside(ctx context.Context) error {
	if m.inside == nil || len(m.own) == 0 || m.at.agent == nil {
		return nil
	}
	in, err := m.at.agent.Sockets()
	if err != nil {
		m.log.Warn(noSplice, "err", err)
		return nil
	}
	m.inside.Close()
	m.inside = in
	return m.tellInside(ctx)
}

// sandboxInfo tells what the network's process that faces the guests is kept from.
func (m *membership) sandboxInfo() (i SandboxInfo) {
	if err := m.ask(context.Background(), hubRequest{Op: opSandbox}, &i); err != nil {
		i.Missing = err.Error()
	}
	return i
}

func (m *membership) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.hub != nil {
		m.hub.conn.Close()
	}
	for _, o := range m.opened {
		rights.Close(o.in.FDs)
	}
	m.opened = nil
	if m.inside != nil {
		m.inside.Close()
	}
}

// ask asks the hub.
func (m *membership) ask(ctx context.Context, q hubRequest, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	return m.client().ask(ctx, q, answer)
}

// hubEnvironment is what a hub inherits: what a test binary built for coverage or
// with the race detector reads, and what sets up the Go runtime.
func hubEnvironment() []string {
	var env []string
	for _, name := range []string{"GOCOVERDIR", "GORACE", "GOTRACEBACK", "GOMAXPROCS", "GOGC", "GODEBUG", "TMPDIR"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// A hubClient is a connection to a hub.
type hubClient struct {
	conn   *hub.Conn
	events chan hubReply
	gone   chan struct{} // closed when the connection is

	mu      sync.Mutex // guards following
	last    uint64
	waiting map[uint64]chan hubReply
	ended   bool
	why     error
}

func newHubClient(conn *hub.Conn) *hubClient {
	c := &hubClient{conn: conn, events: make(chan hubReply, 16), gone: make(chan struct{}), waiting: make(map[uint64]chan hubReply)}
	go c.listen()
	return c
}

// listen passes replies and events on until the hub has gone.
func (c *hubClient) listen() {
	var why error
	for {
		var r hubReply
		fds, err := c.conn.Receive(&r)
		rights.Close(fds)
		if err != nil {
			break
		}
		switch {
		case r.Event != "":
			select {
			case c.events <- r:
			default: // nobody looks: what it is about will come again
			}
			continue
		case r.ID == 0:
			if r.Error != "" {
				why = errors.New(r.Error) // it does not let us in
			}
			continue
		}
		c.mu.Lock()
		w := c.waiting[r.ID]
		delete(c.waiting, r.ID)
		c.mu.Unlock()
		if w != nil {
			w <- r
		}
	}
	c.mu.Lock()
	c.ended, c.why = true, why
	for _, w := range c.waiting {
		close(w)
	}
	clear(c.waiting)
	c.mu.Unlock()
	close(c.gone)
}

// lost says why there is no answer.
func (c *hubClient) lost() error {
	if c.why != nil {
		return c.why
	}
	return errHubGone
}

// ask sends a request, with descriptors beside it, and waits for its answer.
func (c *hubClient) ask(ctx context.Context, q hubRequest, answer any, fds ...int) error {
	w := make(chan hubReply, 1)
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return c.lost()
	}
	c.last++
	q.ID = c.last
	c.waiting[q.ID] = w
	c.mu.Unlock()
	if err := c.conn.Send(q, fds...); err != nil {
		<-c.gone // with what it says to those that it does not let in
		return c.lost()
	}
	var (
		r  hubReply
		ok bool
	)
	select {
	case r, ok = <-w:
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(askTime):
		return errors.New("the hub of the network does not answer")
	}
	switch {
	case !ok:
		return c.lost()
	case r.Error != "":
		return &hubError{r.Error, r.Code}
	case answer != nil:
		return json.Unmarshal(r.Body, answer)
	}
	return nil
}

// hubError is an error that happened in the hub.
type hubError struct{ text, code string }

func (e *hubError) Error() string { return e.text }

// codeEnds is that of errHubEnds.
const codeEnds = "ends"

// hubErrors are the errors that keep their meaning on the way from a hub.
var hubErrors = map[string]error{
	"config": ErrConfig, "no-flow": ErrNoFlow, "no-record": ErrNoRecord, "no-dns": ErrNoDNS,
	"not-running": ErrNotRunning, "no-forward": ErrNoForward, codeEnds: errHubEnds, "no-descriptors": unix.EMFILE, "captures": ErrCaptures,
}

// Is finds what the error meant in the hub.
func (e *hubError) Is(target error) bool { return target != nil && hubErrors[e.code] == target }

func errorCode(err error) string {
	for code, known := range hubErrors {
		if errors.Is(err, known) {
			return code
		}
	}
	return ""
}

// captureShared writes the frames of a network until ctx is done or the hub has
// ended.
func captureShared(ctx context.Context, p hub.Place, w io.Writer, o CaptureOptions) error {
	conn, err := hub.Connect(p) // whose end is that of the capture
	if err != nil {
		return err
	}
	defer conn.Close()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	from := os.NewFile(uintptr(pipe[0]), "capture")
	defer from.Close()
	err = conn.Send(hubRequest{ID: 1, Op: opCapture, Capture: &o}, pipe[1])
	closeFD(pipe[1])
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() }) // what the pipe has comes still
	defer stop()
	if _, err := io.Copy(w, from); err != nil {
		return err
	}
	var r hubReply
	fds, err := conn.Receive(&r)
	rights.Close(fds)
	switch {
	case ctx.Err() != nil, errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	case r.Error != "":
		return decodedHub(r)
	}
	return nil
}

// decodedHub finds the error that a hub has answered with.
func decodedHub(r hubReply) error {
	if known := hubErrors[r.Code]; known != nil && r.Code != "config" {
		return known
	}
	return &hubError{r.Error, r.Code}
}

// A SharedNetwork is a network of several guests of this user.
type SharedNetwork struct {
	Name         string       `json:"name"`
	HubPID       int          `json:"hub_pid"`
	Since        time.Time    `json:"since"`
	MTU          int          `json:"mtu"`
	Offload      bool         `json:"offload"`
	DNS          bool         `json:"serves_dns"`
	IPv4         Subnet       `json:"ipv4"`
	IPv6         *Subnet      `json:"ipv6,omitempty"`
	HostLoopback bool         `json:"host_loopback"`
	HostPorts    []uint16     `json:"host_ports,omitempty"`
	Members      []MemberInfo `json:"members"`
	Switch       *SwitchStats `json:"switch,omitempty"`
	Sandbox      SandboxInfo  `json:"sandbox"`
}

// MemberInfo tells of one guest of a shared network.
type MemberInfo struct {
	Name      string       `json:"name,omitempty"`
	Aliases   []string     `json:"aliases,omitempty"`
	Addrs     []netip.Addr `json:"addresses"`
	MAC       string       `json:"mac"`
	Link      string       `json:"link"`
	Isolated  bool         `json:"isolated"`
	AnySource bool         `json:"any_source"`
	Forwards  []string     `json:"forwards,omitempty"` // as ParseForward takes them
	PID       int          `json:"pid"`                // of its usernet
	GuestPID  int          `json:"guest_pid,omitempty"`
	Netns     string       `json:"netns,omitempty"`
	Since     time.Time    `json:"since"`
}

// SwitchStats count frames from one guest of a shared network to others.
type SwitchStats struct {
	Members        int    `json:"members_now"`
	Forwarded      uint64 `json:"forwarded"`
	ForwardedBytes uint64 `json:"forwarded_bytes"`
	Flooded        uint64 `json:"flooded"`       // to groups
	FloodLimited   uint64 `json:"flood_limited"` // to groups, above the bound
	Spoofed        uint64 `json:"spoofed"`       // a source that is not the guest's
	Isolated       uint64 `json:"isolated"`      // from or to a guest that is kept apart
	Unknown        uint64 `json:"unknown"`       // nobody has that MAC address
	Refused        uint64 `json:"refused"`       // the other interface did not take it
}

// ErrNoNetwork is the error for the name of a shared network that there is not.
var ErrNoNetwork = errors.New("usernet: no such network")

// SharedNetworks lists the networks of this user.
func SharedNetworks(ctx context.Context) ([]SharedNetwork, error) {
	base, err := hub.Base()
	if err != nil {
		return nil, fmt.Errorf("usernet: list networks: %w", err)
	}
	places, err := hub.List(base)
	if err != nil {
		return nil, fmt.Errorf("usernet: %w", err)
	}
	var all []SharedNetwork
	for _, p := range places {
		n, err := InspectNetwork(ctx, p.Name())
		switch {
		case errors.Is(err, ErrNoNetwork): // what a killed one has left
		case err != nil:
			return nil, err
		default:
			all = append(all, n)
		}
	}
	return all, nil
}

// InspectNetwork tells of a shared network of this user.
func InspectNetwork(ctx context.Context, name string) (SharedNetwork, error) {
	var n SharedNetwork
	err := askHub(ctx, name, hubRequest{Op: opInspect}, &n)
	return n, err
}

// RemoveNetwork ends a shared network of this user: its members end too. With
// members it takes force.
func RemoveNetwork(ctx context.Context, name string, force bool) error {
	err := askHub(ctx, name, hubRequest{Op: opEnd, Force: force}, nil)
	if errors.Is(err, ErrNoNetwork) {
		base, _ := hub.Base()
		p := hub.At(base, name)
		if _, statErr := os.Stat(p.Dir()); statErr == nil && p.Clear() == nil {
			return nil // what a killed one has left
		}
	}
	return err
}

func askHub(ctx context.Context, name string, q hubRequest, answer any) error {
	if err := CheckNetworkName(name); err != nil {
		return err
	}
	base, err := hub.Base()
	if err != nil {
		return fmt.Errorf("usernet: find network %s: %w", name, err)
	}
	conn, err := hub.Connect(hub.At(base, name))
	if errors.Is(err, hub.ErrNoHub) {
		return fmt.Errorf("%w: %s: `usernet network list` shows those there are", ErrNoNetwork, name)
	}
	if err != nil {
		return fmt.Errorf("usernet: find network %s: %w", name, err)
	}
	defer conn.Close()
	if err := newHubClient(conn).ask(ctx, q, answer); err != nil {
		return fmt.Errorf("usernet: network %s: %w", name, err)
	}
	return nil
}
