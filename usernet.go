// Package usernet builds a network from the rooms; it is what a runtime embeds.
package usernet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/worker"
	"github.com/usernet/usernet/tap"
)

// A Network gives one namespace its network.
type Network struct {
	cfg   Config
	log   *slog.Logger
	ready chan struct{}
	once  sync.Once
	live  atomic.Pointer[live] // while Run serves

	publisher atomic.Pointer[publisher]  // likewise
	member    atomic.Pointer[membership] // likewise, on a shared network

	wanted chan struct{} // that somebody wants the way to sockets inside
}

// New checks c. It starts nothing.
func New(c Config) (*Network, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	return &Network{cfg: c, log: c.Logger, ready: make(chan struct{}), wanted: make(chan struct{}, 1)}, nil
}

// AgentMain takes over in usernet's helper processes; it has to be the first
// call in main. A program that serves nothing but a TapFile can do without: the
// gateway runs in its own process then, with no sandbox around it.
func AgentMain() {
	worker.Main(serveWorker)
	agent.Main()
	hubMain()
}

// Ready is closed when the guest can use the network.
func (n *Network) Ready() <-chan struct{} { return n.ready }

// errNamespaceGone ends a Network without being an error of it.
var errNamespaceGone = errors.New("the namespace is gone")

// Run attaches to the namespace and serves it until ctx is done or the
// namespace is gone, and returns nil then. It may be called once. What it has
// made is gone when it returns.
func (n *Network) Run(ctx context.Context) error {
	err := errors.New("usernet: run: a network runs only once")
	n.once.Do(func() { err = n.run(ctx) })
	return err
}

func (n *Network) run(ctx context.Context) error {
	for _, w := range n.cfg.Warnings() {
		n.log.Warn(w)
	}
	if err := checkOutbound(n.cfg); err != nil {
		return fmt.Errorf("usernet: %w", err)
	}
	var first *launch // of a worker; nil where there is none, or it is taken
	if agent.Wired() && n.cfg.Network == "" {
		first = launchWorker()
		defer func() {
			if first != nil {
				first.abandon()
			}
		}()
	}
	at, err := attach(ctx, n.cfg)
	if err != nil {
		return fmt.Errorf("usernet: %w", err)
	}
	defer at.close()
	if n.cfg.Network != "" {
		return n.runMember(ctx, at)
	}
	host, err := watchHost(n.cfg, n.log)
	if err != nil {
		return fmt.Errorf("usernet: %w", err)
	}
	defer host.close()
	taken := first
	first = nil
	eng, err := n.startEngine(ctx, at, host, taken)
	if err != nil {
		return fmt.Errorf("usernet: %w", err)
	}
	defer eng.close()
	host.follow(eng)
	n.live.Store(&live{at.link, at.inode(), eng, time.Now(), at.seesFiles()})
	defer n.live.Store(nil)
	pub := newPublisher(n.cfg, at, eng)
	n.publisher.Store(pub)
	defer func() {
		n.publisher.Store(nil)
		pub.stop()
	}()

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return eng.run(ctx) })
	g.Go(func() error { return host.run(ctx) })
	g.Go(func() error {
		pub.follow(ctx, n.ready)
		return nil
	})
	if n.cfg.Capture != nil {
		g.Go(func() error {
			// Nobody shall be without a network because a disk is full.
			if err := n.Capture(ctx, n.cfg.Capture, CaptureOptions{}); err != nil {
				n.log.Warn("frames are no longer written", "err", err)
			}
			return nil
		})
	}
	if at.ns != nil {
		g.Go(func() error {
			if at.ns.Watch(ctx) == nil {
				return errNamespaceGone
			}
			return nil
		})
	}
	g.Go(func() error {
		if err := n.serve(ctx, at, host, eng, pub); err != nil {
			return err
		}
		return nil
	})
	err = g.Wait()
	switch {
	case errors.Is(err, errNamespaceGone):
		n.log.Info("the namespace is gone")
		return nil
	case errors.Is(err, tap.ErrGone) && at.gone():
		n.log.Info("the namespace is gone") // and took its end of the link along
		return nil
	case errors.Is(err, tap.ErrGone):
		return at.deleted(err)
	case err != nil:
		return fmt.Errorf("usernet: %w", err)
	}
	return nil
}

// startEngine starts what serves the link: the worker, if there is one.
func (n *Network) startEngine(ctx context.Context, at *attachment, host *host, first *launch) (engine, error) {
	s := seed{Records: n.cfg.records(), Default6: n.default6(host)}
	host.sow(&s)
	if first != nil {
		r, err := startRemote(ctx, n.cfg, at, s, first, n.want)
		if err == nil {
			return r, nil
		}
		if !errors.Is(err, worker.ErrNoSockets) {
			return nil, err
		}
		n.log.Info("the gateway runs in this process, without a sandbox", "err", err)
	} else {
		n.log.Info("the gateway runs in this process, without a sandbox: the program does not begin with usernet.AgentMain")
	}
	at.owned = false // the gateway's, from here on
	gw, err := newGateway(n.cfg, at.link, s, hooks{wantInside: n.want})
	if err != nil {
		return nil, err
	}
	return gw, nil
}

// want asks for the way to sockets inside, whenever and how often that is.
func (n *Network) want(netip.Addr) {
	select {
	case n.wanted <- struct{}{}:
	default:
	}
}

// default6 reports whether the guest gets an IPv6 default route.
func (n *Network) default6(host *host) bool {
	return n.cfg.hasIPv6() && (n.cfg.IPv6 == IPv6On || host.default6())
}

// serve configures the guest's side, says that it is ready, and follows the
// host's IPv6 default route.
func (n *Network) serve(ctx context.Context, at *attachment, host *host, eng engine, pub *publisher) error {
	default6 := n.default6(host)
	eng.setDefaultRouter6(default6)
	if err := at.configure(n.cfg, default6); err != nil {
		return err
	}
	if err := pub.addAll(ctx); err != nil {
		return err
	}
	if err := pub.lookInside(ctx); err != nil {
		return err
	}
	pub.keepTidy()
	about := []any{"interface", at.link.Name, "link", at.link.Kind, "mtu", at.link.MTU,
		"offload", at.link.Offload, "addresses", n.cfg.Configure}
	if !n.cfg.NoDNS {
		about = append(about, "dns", host.resolvers(n.cfg))
	}
	n.log.Info("ready", about...)
	close(n.ready)

	changed := host.changed()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-at.agentDone():
			if ctx.Err() == nil {
				n.log.Warn("the helper process inside the namespace has ended; the network goes on, but follows no change of the host's IPv6 route")
			}
			at.forgetAgent()
		case <-n.wanted:
			go pub.handOver(ctx) // an agent that stands still holds up nobody else
		case <-changed:
			on := n.default6(host)
			if on == default6 {
				continue
			}
			default6 = on
			eng.setDefaultRouter6(on)
			set := make(chan error, 1)
			go func() { set <- at.setDefaultRoute6(on) }()
			select {
			case err := <-set:
				if err != nil {
					n.log.Warn("cannot change the IPv6 default route inside", "on", on, "err", err)
				}
			case <-ctx.Done(): // nobody waits for an agent that stands still
				return nil
			}
		}
	}
}

// goneWithin is how long the end of a link may precede the sign that its
// namespace has ended.
const goneWithin = time.Second
