package usernet

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/dhcp"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/memory"
	"github.com/usernet/usernet/internal/sandbox"
	"github.com/usernet/usernet/internal/worker"
	"github.com/usernet/usernet/tap"
)

// What the two processes ask each other.
const (
	opSeal       = "seal"  // and nothing else
	opStart      = "start" // with the link
	opLocal      = "local"
	opDefault6   = "default6"
	opResolvConf = "resolv-conf"
	opLogLevel   = "log-level"
	opCapture    = "capture" // with the pipe to write to
	opEndCapture = "end-capture"

	// Where a network is shared.
	opMember     = "member" // with its link
	opLeave      = "leave"
	opOpenMember = "open-member" // with the way into it

	// Of the worker.
	opLog     = "log"
	opEnded   = "ended"
	opLeases4 = "leases4"
	opLeases6 = "leases6"
	opLearned = "learned" // addresses that rules for names allow
	opDial    = "dial"    // a unix socket of the host
	opGone    = "gone"    // the link of a member
	opWant    = "want"    // the way into a guest, for connections to be handed over
)

// startOrder is what a worker begins with.
type startOrder struct {
	Config Config
	Link   agent.Link
	Seed   seed
	Level  slog.Level
	Seal   bool
	Shared bool // guests come and go: there is no link
}

// ending tells why a gateway has ended.
type ending struct {
	Error string
	Gone  bool // the link is
}

// recordOrder changes a name.
type recordOrder struct {
	Name  string
	Addrs []netip.Addr
}

// publishOrder is a forward whose sockets come along.
type publishOrder struct {
	Forward        Forward
	Guest4, Guest6 netip.AddrPort // where its clients go, by family
}

// captureOrder is a capture, by a number to end it.
type captureOrder struct {
	Number uint64
	Name   string
	CaptureOptions
}

// names of errors that callers look for.
var errorCodes = map[string]error{
	"no-flow": ErrNoFlow, "no-record": ErrNoRecord, "no-dns": ErrNoDNS, "not-running": ErrNotRunning, "config": ErrConfig,
	"captures": ErrCaptures,
}

// coded gives an error its name.
func coded(err error) error {
	for code, is := range errorCodes {
		if errors.Is(err, is) {
			return &worker.Error{Code: code, Text: err.Error()}
		}
	}
	return err
}

// decoded finds the error that a name stands for.
func decoded(err error) error {
	var e *worker.Error
	if !errors.As(err, &e) || e.Code == "" {
		return err
	}
	if e.Code == "config" {
		return &configError{strings.TrimPrefix(e.Text, "usernet: ")}
	}
	if is, ok := errorCodes[e.Code]; ok {
		return is
	}
	return err
}

// workerServer is the worker's side: a gateway in a process of its own.
type workerServer struct {
	conn  *worker.Conn
	log   *slog.Logger
	sends *worker.LogHandler

	mu      sync.Mutex // guards following
	gateway *gateway
	config  Config
	dials   int
	ends    map[uint64]context.CancelFunc // of captures

	learned lessons
}

// lessons are learned addresses that the supervisor has yet to be told of. A guest
// can have many learned in no time.
type lessons struct {
	mu      sync.Mutex // guards following
	list    []forwarder.Learned
	telling bool
	tell    func([]forwarder.Learned)
}

// add has addresses told soon, unless too many wait already.
func (q *lessons) add(fresh []forwarder.Learned) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.list)+len(fresh) > maxLearned {
		return
	}
	q.list = append(q.list, fresh...)
	if !q.telling {
		q.telling = true
		go q.run()
	}
}

func (q *lessons) run() {
	const most = 256 // in one message
	for {
		q.mu.Lock()
		n := min(len(q.list), most)
		some := q.list[:n:n]
		q.list = q.list[n:]
		q.telling = n > 0
		q.mu.Unlock()
		if n == 0 {
			return
		}
		q.tell(some)
	}
}

// tellLast returns a function that has its argument told soon, and does not wait:
// one after the other, and of those that come meanwhile only the last.
func tellLast[T any](tell func(T)) func(T) {
	var (
		mu      sync.Mutex // guards following
		next    *T
		telling bool
	)
	run := func() {
		for {
			mu.Lock()
			v := next
			next, telling = nil, v != nil
			mu.Unlock()
			if v == nil {
				return
			}
			tell(*v)
		}
	}
	return func(v T) {
		mu.Lock()
		defer mu.Unlock()
		next = &v
		if !telling {
			telling = true
			go run()
		}
	}
}

// serveWorker is the worker's process. It ends when its parent does.
func serveWorker(c *worker.Conn) error {
	s := &workerServer{conn: c, sends: worker.NewLogHandler(), ends: make(map[uint64]context.CancelFunc)}
	s.log = slog.New(s.sends)
	s.learned.tell = func(l []forwarder.Learned) { _ = c.Note(opLearned, l) }
	return c.Serve(s.handle)
}

var errNotStarted = errors.New("this worker was told nothing yet")

func (s *workerServer) handle(r *worker.Request) (any, []int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), engineTime)
	defer cancel()
	switch r.Op {
	case opStart:
		status, err := s.start(r)
		return status, nil, err
	case opSeal:
		status, err := sandbox.Seal()
		return status, nil, err
	}
	s.mu.Lock()
	g := s.gateway
	s.mu.Unlock()
	if g == nil {
		return nil, nil, errNotStarted
	}
	body, err := s.ask(ctx, g, r)
	return body, nil, coded(err)
}

func (s *workerServer) ask(ctx context.Context, g *gateway, r *worker.Request) (any, error) {
	switch r.Op {
	case opLocal:
		return nil, with(r, func(p []netip.Prefix) error { g.setLocal(p); return nil })
	case opDefault6:
		return nil, with(r, func(on bool) error { g.setDefaultRouter6(on); return nil })
	case opResolvConf:
		return nil, with(r, func(rc dns.ResolvConf) error { g.setResolvConf(rc); return nil })
	case opLogLevel:
		return nil, with(r, func(l slog.Level) error { s.sends.SetLevel(l); return nil })
	case opPublish:
		var o publishOrder
		if err := r.Decode(&o); err != nil {
			return nil, err
		}
		in := forwarder.Inbound{Proto: uint8(o.Forward.Protocol), Guest4: o.Guest4, Guest6: o.Guest6}
		if o.Forward.Proxy != 0 {
			in.Preface = proxyHeader(o.Forward.Proxy)
		}
		for fd := r.TakeFD(); fd >= 0; fd = r.TakeFD() {
			in.FDs = append(in.FDs, fd)
		}
		return g.publish(ctx, o.Forward, in)
	case opUnpublish:
		return nil, with(r, func(id uint64) error { return g.unpublish(ctx, id) })
	case opInside:
		return nil, with(r, func(own []netip.Addr) error {
			sockets := agent.NewSockets(r.TakeFD(), agent.Inside{})
			sockets.MakeSpares() // this process serves but one guest
			return g.useInside(ctx, sockets, own...)
		})
	case opMember:
		return s.member(g, r)
	case opLeave:
		return nil, with(r, func(number uint64) error { g.leave(ctx, number); return nil })
	case opOpenMember:
		return nil, with(r, func(o insideOrder) error { return g.openMember(ctx, o, r.TakeFD()) })
	case opFlows:
		return g.flows(ctx)
	case opKillFlow:
		return nil, with(r, func(id string) error { return g.killFlow(ctx, id) })
	case opLeases:
		return g.leases(ctx)
	case opRecords:
		return g.records(ctx)
	case opSetRecord:
		return nil, with(r, func(o recordOrder) error { return g.setRecord(ctx, o.Name, o.Addrs) })
	case opAddRecord:
		var o recordOrder
		if err := r.Decode(&o); err != nil {
			return nil, err
		}
		return g.addRecord(ctx, o.Name, o.Addrs)
	case opRemRecord:
		return nil, with(r, func(name string) error { return g.removeRecord(ctx, name) })
	case opStats:
		return g.stats(ctx)
	case opCapture:
		var o captureOrder
		if err := r.Decode(&o); err != nil {
			return nil, err
		}
		return nil, s.capture(g, o, r.TakeFD())
	case opEndCapture:
		return nil, with(r, func(number uint64) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			if end := s.ends[number]; end != nil {
				end()
			}
			return nil
		})
	}
	return nil, errors.New("unknown request " + r.Op)
}

// member takes a guest of a shared network in, and says where it shall look names
// up.
func (s *workerServer) member(g *gateway, r *worker.Request) ([]string, error) {
	var o memberOrder
	if err := r.Decode(&o); err != nil {
		return nil, err
	}
	fd := r.TakeFD()
	if fd < 0 {
		return nil, errors.New("no link")
	}
	again, err := g.join(o, fd, func() { s.tell(opGone, o.Number) })
	if again || err != nil {
		closeFD(fd)
	}
	return g.search(s.config)(), err
}

// capture writes frames to a pipe until it is told to end, or nobody reads them.
func (s *workerServer) capture(g *gateway, o captureOrder, fd int) error {
	if fd < 0 {
		return errors.New("no pipe")
	}
	f := os.NewFile(uintptr(fd), "capture")
	defer f.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.mu.Lock()
	s.ends[o.Number] = cancel
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.ends, o.Number)
		s.mu.Unlock()
	}()
	return g.capture(ctx, f, o.Name, o.CaptureOptions)
}

// with reads what f needs.
func with[T any](r *worker.Request, f func(T) error) error {
	var v T
	if err := r.Decode(&v); err != nil {
		return err
	}
	return f(v)
}

// start makes the gateway, and gives up what it does not need.
func (s *workerServer) start(r *worker.Request) (*sandbox.Status, error) {
	var o startOrder
	if err := r.Decode(&o); err != nil {
		return nil, err
	}
	open := newGateway
	if o.Shared {
		open = newSharedGateway
	} else if o.Link.FD = r.TakeFD(); o.Link.FD < 0 {
		return nil, errors.New("no link")
	}
	tuneWorker()
	s.sends.SetLevel(o.Level)
	go s.sends.Send(s.conn, opLog)
	o.Config.Logger = s.log
	g, err := open(o.Config, o.Link, o.Seed, hooks{
		alone:    true,
		dialPath: s.dialPath,
		leases4:  tellLast(func(l []dhcp.SavedLease) { _ = s.conn.Note(opLeases4, l) }),
		leases6:  tellLast(func(l []dhcp.SavedLease) { _ = s.conn.Note(opLeases6, l) }),
		learned:  s.learned.add,

		wantInside: func(guest netip.Addr) { s.tell(opWant, guest) },
	})
	if err != nil {
		return nil, err
	}
	trim := memory.New() // sealed, no file can be read
	status := &sandbox.Status{Missing: "--no-sandbox"}
	if o.Seal {
		sealed, err := sandbox.Seal()
		if err != nil {
			return nil, err
		}
		status = &sealed
	}
	s.mu.Lock()
	s.gateway, s.config = g, o.Config
	s.mu.Unlock()
	go trim.Keep(context.Background(), g.work)
	go s.run(g)
	return status, nil
}

// run serves the guest. The end of the gateway is that of the process.
func (s *workerServer) run(g *gateway) {
	err := g.run(context.Background())
	e := ending{Error: "it has nothing left to do", Gone: errors.Is(err, tap.ErrGone)}
	if err != nil {
		e.Error = err.Error()
	}
	_ = s.conn.Note(opEnded, e)
	os.Exit(0)
}

// tell tells the supervisor something, without waiting for it.
func (s *workerServer) tell(op string, body any) {
	go func() { _ = s.conn.Note(op, body) }()
}

// maxPathDials bounds the connections to unix sockets that are being made.
const maxPathDials = 256

// dialPath has the supervisor connect to a unix socket, for this process may open
// no path.
func (s *workerServer) dialPath(path string, done func(fd int, errno unix.Errno)) {
	s.mu.Lock()
	full := s.dials >= maxPathDials
	if !full {
		s.dials++
	}
	s.mu.Unlock()
	if full {
		go done(-1, unix.EAGAIN)
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), engineTime)
		defer cancel()
		fds, err := s.conn.Call(ctx, opDial, path, nil)
		s.mu.Lock()
		s.dials--
		s.mu.Unlock()
		var errno unix.Errno
		switch {
		case err == nil && len(fds) == 1:
			done(fds[0], 0)
		case errors.As(err, &errno):
			done(-1, errno)
		default:
			for _, fd := range fds {
				unix.Close(fd)
			}
			done(-1, unix.ETIMEDOUT)
		}
	}()
}
