package forwarder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/congestion"
)

// Link is where the guest's frames come from. Receive delivers up to max
// frames, which calls the Handle methods, and returns how many it was; fewer
// than max means that no more are waiting.
type Link interface {
	FD() int
	Receive(max int) (int, error)
	// Held reports whether the link keeps acknowledgements back, in the hope
	// that a segment makes them superfluous; Flush sends those that are due.
	// NotifyHeld sets who is told of the first, from any goroutine. Flush is
	// called at the beginning of every turn.
	Held() bool
	NotifyHeld(func())
	Flush(now time.Time)
	// Recorded reports whether somebody wants to see all frames.
	Recorded() bool
}

// Clock is netstack's clock. It stands still during a turn, so that nobody has
// to ask the machine for the time of every segment.
type Clock interface {
	StopClock(now time.Time)
	ResumeClock()
}

// Guest is how datagrams, echo replies and errors reach the guest. Its methods
// must not keep the slices and must not block.
type Guest interface {
	// WriteUDP sends a datagram, or with gso > 0 a run of datagrams of that
	// size. Between Hold and Flush, which bracket what is handled at once, it
	// may wait for others.
	WriteUDP(src, dst netip.AddrPort, gso int, payload []byte) error
	Hold()
	Flush()
	// Established tells that a TCP connection of the guest has come about.
	Established()
	// WriteTCP sends a segment: a header without its checksum, and the payload. Where
	// the payload is longer than mss bytes, or than what the link takes, the link has
	// to cut it up.
	WriteTCP(src, dst netip.Addr, h header.TCP, mss int, payload []byte) error
	// SendEchoReply sends an echo reply with payload head+tail.
	SendEchoReply(src, dst netip.Addr, ttl uint8, id, seq uint16, head, tail []byte) error
	// SendICMPError reports what became of a packet of the guest.
	SendICMPError(ICMPError) error
}

// ICMPError describes a packet of the guest and what became of it.
type ICMPError struct {
	// Type and Code are those of ICMP or ICMPv6, by the guest's family.
	Type, Code uint8
	// Info is the second word of the message: the MTU where the packet was
	// too big, else 0.
	Info uint32
	// Router is who reports; the zero value means the gateway.
	Router netip.Addr
	// Guest and Remote are the packet's source and destination.
	Guest, Remote netip.Addr
	// Proto is its transport protocol, L4 at least the first 8 bytes of its
	// transport header.
	Proto uint8
	L4    []byte
}

// Config configures a Forwarder. Netstack, Link, Guest and Policy are required.
type Config struct {
	// Netstack terminates the guest's TCP.
	Netstack *stack.Stack
	Link     Link
	Guest    Guest
	Policy   *Policy
	Outbound Outbound
	Reverse  map[uint16]Server // by port of the gateway
	// DialPath, if not nil, connects to unix sockets in the forwarder's place,
	// as whoever may open no path has others do. It must not block, and done may
	// be called by any goroutine, once.
	DialPath func(path string, done func(fd int, errno unix.Errno))
	Clock    Clock // nil: netstack's clock is its own
	// NoHandover leaves all TCP connections with netstack.
	NoHandover bool
	// WantInside, if not nil, is called by the engine, once for each guest, when
	// connections of that guest's could be handed over if UseInside were called.
	// It must not block.
	WantInside func(guest netip.Addr)
	// Alone says that this process does nothing else, so that where GOMAXPROCS is 1
	// the engine may keep other goroutines waiting for a millisecond.
	Alone bool

	// MaxDials bounds connection attempts under way, default 16384; the
	// guest's kernel repeats what is dropped beyond.
	MaxDials int
	// MaxUDP and MaxEcho bound the flows, defaults 16384 and 256; the one
	// idle longest makes room for a new one.
	MaxUDP, MaxEcho int
	// UDPIdle and DNSIdle are how long a flow lives after its last datagram,
	// defaults 180 s (RFC 4787 §4.3 asks for more than 2 minutes) and, where
	// all went to port 53, 10 s.
	UDPIdle, DNSIdle time.Duration

	// Logger gets one record per event, none per packet; nil discards.
	Logger *slog.Logger
}

// Stats are live counters.
type Stats struct {
	TCPActive, UDPActive, EchoActive, Dialing atomic.Int64
	TCPTotal, UDPTotal, EchoTotal             atomic.Uint64
	// HandedOver counts TCP connections that went on without netstack.
	HandedOver atomic.Uint64
	// Predicted counts segments, in both directions, that went past netstack because
	// they were what was expected next.
	Predicted atomic.Uint64
	// Refused counts dials that the far side or the network refused.
	Refused atomic.Uint64
	// Denied counts by Reason what the policy closed; DeniedSource datagrams
	// from outside whose sender the guest may not talk to.
	Denied       [reasons]atomic.Uint64
	DeniedSource atomic.Uint64
	// DialsDropped and UDPEvicted count what the bounds cost.
	DialsDropped, UDPEvicted, EchoEvicted atomic.Uint64
	// UDPDropped counts datagrams that a host socket did not take.
	UDPDropped atomic.Uint64
	// BytesUp and BytesDown count TCP payload from and to the guest.
	BytesUp, BytesDown atomic.Uint64
	// UDPBytesUp and UDPBytesDown count what datagrams carried that a flow took.
	UDPBytesUp, UDPBytesDown atomic.Uint64
}

// Forwarder is the engine that owns all flows.
type Forwarder struct {
	cfg    Config
	log    *slog.Logger
	policy *Policy
	guest  Guest
	stats  Stats

	poll     *poller
	wake     waker
	spin     spinner
	activity activity
	nap      napper

	linkReady bool
	linkBatch int
	epoch     time.Time // when the engine was made
	now       time.Time // of the current turn
	nextSweep time.Time
	// nextSources is when idle sources are looked for, which takes a look at all
	// flows: not at every sweep.
	nextSources time.Time

	// Flows that something was said of by other goroutines, which append.
	queueMu sync.Mutex
	queue   []*tcpFlow
	spare   []*tcpFlow // the other half of the double buffer
	calls   []*call    // what Do was given
	ended   bool       // no call will be taken any more

	// Flows that have something to move, in the order of their turns.
	ready fifo

	// congestion is for host sockets whose other end is on this host.
	congestion string

	tcp  tcpTable
	udp  udpTable
	echo echoTable

	inbound inboundTable

	denials  denialLog
	scarcity time.Time // when the log last said that there are no descriptors
}

// New makes a forwarder. Its Handle methods are to be called by whatever
// Link.Receive calls, and by nothing else.
func New(cfg Config) (*Forwarder, error) {
	if cfg.Netstack == nil || cfg.Link == nil || cfg.Guest == nil || cfg.Policy == nil {
		return nil, errors.New("forwarder: new: netstack, link, guest and policy are required")
	}
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&cfg.MaxDials, 16384)
	def(&cfg.MaxUDP, 16384)
	def(&cfg.MaxEcho, 256)
	if cfg.UDPIdle == 0 {
		cfg.UDPIdle = 180 * time.Second
	}
	if cfg.DNSIdle == 0 {
		cfg.DNSIdle = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Forwarder{cfg: cfg, log: cfg.Logger, policy: cfg.Policy, guest: cfg.Guest, linkBatch: 1, epoch: time.Now(),
		congestion: congestion.Local()}
	f.now = f.epoch
	var err error
	if f.poll, err = newPoller(); err != nil {
		return nil, err
	}
	f.poll.guest, f.poll.woken, f.wake.poll = cfg.Guest, f.setTime, f.poll
	cfg.Link.NotifyHeld(f.wake.wake)
	f.tcp.init(f)
	f.udp.init(f)
	f.echo.init(f)
	f.inbound.init(f)
	return f, nil
}

// Stats returns the live counters.
func (f *Forwarder) Stats() *Stats { return &f.stats }

// linkEvents receives the link's epoll events.
type linkEvents struct{ f *Forwarder }

func (l linkEvents) ready(uint32) { l.f.linkReady = true }

// Run moves traffic until ctx is done or the link fails. It closes all host
// sockets before it returns, but not the link.
func (f *Forwarder) Run(ctx context.Context) error {
	defer f.close()
	if _, err := f.poll.add(f.cfg.Link.FD(), unix.EPOLLIN, linkEvents{f}); err != nil {
		return fmt.Errorf("forwarder: watch link: %w", err)
	}
	f.nap.allowed = f.cfg.Alone && runtime.GOMAXPROCS(0) == 1
	stop := context.AfterFunc(ctx, func() { f.wake.wake() })
	defer stop()
	for ctx.Err() == nil {
		if err := f.turn(ctx); err != nil {
			return err
		}
	}
	return nil
}

// maxBatch is how many frames are taken off the link before anything else gets
// its turn.
const maxBatch = 64

// turn does a bounded amount of what is ready now, or waits until something is.
func (f *Forwarder) turn(ctx context.Context) error {
	f.setTime()
	f.cfg.Link.Flush(f.now)
	worked := f.linkReady
	if f.linkReady {
		if err := f.receive(); err != nil {
			return err
		}
		// The frames are with netstack's goroutines now. Twice, because
		// every 61st turn the scheduler takes from its global queue
		// first, where the engine waits but they do not.
		runtime.Gosched()
		runtime.Gosched()
	}
	if !f.now.Before(f.nextSweep) {
		f.sweep()
	}
	f.takeQueue()
	f.runFlows()
	waits := f.tcp.sendBurst()
	f.tcp.handOver()
	if worked || waits || f.ready.n > 0 {
		f.poll.wait()
		return nil
	}
	if f.spin.due() && !f.activity.many() && (f.poll.wait() > 0 || f.spinUntilEvent()) {
		return nil
	}
	until := f.nextSweep
	if f.cfg.Link.Held() {
		until = f.now.Add(heldTimeout)
	}
	if f.nap.due && until.Sub(f.now) >= napTime {
		f.takeNap()
		return nil
	}
	// Before sleeping is set: wake has the last word about the time.
	f.poll.arm(until)
	f.wake.sleeping.Store(true)
	if f.queueLen() == 0 && ctx.Err() == nil {
		if f.cfg.Clock != nil {
			f.cfg.Clock.ResumeClock()
		}
		start := f.now
		if f.poll.sleep() {
			slept := time.Since(start)
			f.spin.woken(slept)
			f.nap.woken(slept)
		}
	}
	f.wake.sleeping.Store(false)
	return nil
}

// setTime makes it the time of this turn, and of what ends its sleep.
func (f *Forwarder) setTime() {
	f.now = time.Now()
	if f.cfg.Clock != nil {
		f.cfg.Clock.StopClock(f.now)
	}
}

const (
	// heldTimeout is how long the engine sleeps while the link keeps
	// acknowledgements back.
	heldTimeout = 2 * time.Millisecond
	// turnBudget is how many bytes all flows together may move before the
	// link is looked at again: acknowledgements wait there, and without
	// them netstack takes its segments for lost.
	turnBudget = 512 << 10
	// flowQuantum is what one flow may move in each direction of it.
	flowQuantum = maxRead
	// flowCost is what a flow's turn counts at least, so that many small
	// ones end a turn as well.
	flowCost = turnBudget / 64
)

// runFlows gives flows their turns until the budget is spent.
func (f *Forwarder) runFlows() {
	for budget := turnBudget; budget > 0; {
		fl := f.ready.pop()
		if fl == nil {
			return
		}
		budget -= max(fl.pump(), flowCost)
	}
}

// makeReady gives a flow its next turn.
func (f *Forwarder) makeReady(fl *tcpFlow) {
	if !fl.waiting && !fl.done {
		fl.waiting = true
		f.ready.push(fl)
	}
}

// receive takes one batch off the link. The batch grows while the guest keeps
// it full, so that a lone request costs no second read that finds nothing.
func (f *Forwarder) receive() error {
	f.guest.Hold()
	n, err := f.cfg.Link.Receive(f.linkBatch)
	f.udp.flush()
	f.guest.Flush()
	f.linkReady = false // level-triggered: the next wait says so again
	if err != nil {
		return err
	}
	f.linkBatch = nextBatch(n, f.linkBatch, maxBatch)
	return nil
}

// nextBatch is how many to look for after there were n of batch: twice as many where
// there may be more, up to most, and as many as there were otherwise.
func nextBatch(n, batch, most int) int {
	if n == batch {
		return min(2*batch, most)
	}
	return max(n, 1)
}

// enqueue puts a flow on the run queue. It is called from any goroutine.
func (f *Forwarder) enqueue(t *tcpFlow) {
	f.queueMu.Lock()
	f.queue = append(f.queue, t)
	f.queueMu.Unlock()
	f.wake.wake()
}

func (f *Forwarder) queueLen() int {
	f.queueMu.Lock()
	defer f.queueMu.Unlock()
	return len(f.queue) + len(f.calls)
}

// takeQueue takes in what other goroutines have said.
func (f *Forwarder) takeQueue() {
	f.queueMu.Lock()
	q := f.queue
	f.queue = f.spare[:0]
	calls := f.calls
	f.calls = nil
	f.queueMu.Unlock()
	for i, fl := range q {
		q[i] = nil
		fl.take()
	}
	f.spare = q[:0]
	f.takeCalls(calls)
}

// sweepEvery is how often idle flows are looked for, and how long the engine
// sleeps at most.
const sweepEvery = 5 * time.Second

// sweep ends what has been idle too long.
func (f *Forwarder) sweep() {
	f.nextSweep = f.now.Add(sweepEvery)
	if !f.now.Before(f.nextSources) {
		f.nextSources = f.now.Add(unreadTime)
		f.sweepSources()
	}
	f.tcp.sweep()
	f.udp.sweep()
	f.echo.sweep()
	f.inbound.sweep()
}

// sweepIn makes the next sweep come no later than in d.
func (f *Forwarder) sweepIn(d time.Duration) {
	if t := f.now.Add(d); t.Before(f.nextSweep) {
		f.nextSweep = t
	}
}

func (f *Forwarder) close() {
	if f.cfg.Clock != nil {
		f.cfg.Clock.ResumeClock()
	}
	f.endCalls()
	f.tcp.close()
	f.udp.close()
	f.echo.close()
	f.inbound.close()
	f.poll.close()
}

// scarcityEvery is how often the log says that there are no descriptors.
const scarcityEvery = time.Minute

// scarce reports whether errno means that there are no descriptors left. The log
// says that once in a while, whatever the guest tries meanwhile.
func (f *Forwarder) scarce(errno unix.Errno) bool {
	if errno != unix.EMFILE && errno != unix.ENFILE {
		return false
	}
	if f.scarcity.IsZero() || f.now.Sub(f.scarcity) >= scarcityEvery {
		f.scarcity = f.now
		f.log.Warn("no descriptors are left: new flows are refused until others end; `ulimit -Hn` sets how many there are", "err", errno)
	}
	return true
}

// icmpFor is the function of that name, where the policy has a say in what a
// guest is told about what the host itself may not reach.
func (f *Forwarder) icmpFor(dst netip.Addr, errno unix.Errno) (typ, code uint8, ok bool) {
	if errno == unix.EACCES || errno == unix.EPERM {
		errno = f.policy.refusal()
	}
	return icmpFor(dst, errno)
}

// icmpFor returns the type and code that tell a guest of dst's family what
// errno told us, and false where nothing is told: no answer stays no answer.
func icmpFor(dst netip.Addr, errno unix.Errno) (typ, code uint8, ok bool) {
	const (
		noRoute = iota
		noHost
		noPort
		prohibited
	)
	var kind int
	switch errno {
	case unix.ENETUNREACH, unix.ENETDOWN, unix.EAFNOSUPPORT, unix.EADDRNOTAVAIL,
		unix.EINVAL: // a blackhole of the host's routing
		kind = noRoute
	case unix.EHOSTUNREACH, unix.EHOSTDOWN, unix.ENODEV:
		kind = noHost
	case unix.EACCES, unix.EPERM:
		kind = prohibited
	case unix.ECONNREFUSED:
		kind = noPort
	default:
		return 0, 0, false
	}
	if dst.Is4() {
		return 3, [...]uint8{0, 1, 3, 13}[kind], true
	}
	return 1, [...]uint8{0, 3, 4, 1}[kind], true
}
