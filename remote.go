package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/usernet/usernet/dhcp"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/forwarder"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/sandbox"
	"github.com/usernet/usernet/internal/worker"
	"github.com/usernet/usernet/tap"
)

// remote is a gateway in a process of its own, the worker. It keeps what a worker
// that has ended leaves behind, for the next one.
type remote struct {
	cfg  Config
	link agent.Link // whose descriptor stays its owner's
	log  *slog.Logger
	// What the agent does for a worker that follows another: open the way to
	// sockets inside, and cut off the guest's connections through the last.
	sockets func() (*agent.Sockets, error)
	cutOff  func() (int, error)
	wanted  func(guest netip.Addr) // the way to sockets inside
	rate    *rate.Limiter          // of the worker's log records
	// shared has the guests come and go: there is no link. restarted, if it is not
	// nil, is called when another worker has taken over.
	shared    bool
	restarted func()

	mu       sync.Mutex // guards following
	seed     seed
	level    slog.Level
	status   sandbox.Status
	current  *incarnation  // nil while there is none
	up       chan struct{} // closed when there is one again
	ports    map[uint64]*remotePort
	members  map[uint64]*remoteMember        // of a shared network
	learned  map[forwarder.Learned]time.Time // without their times, and those
	last     uint64                          // id of a port or member
	inside   []netip.Addr                    // that sockets inside can connect to, if they can be had
	restarts uint64
	lostLogs int
}

// A launch is a worker that is being started before it is known what for: that
// goes on while the link is made.
type launch struct {
	done chan struct{}
	p    *worker.Process
	err  error
}

func launchWorker() *launch {
	l := &launch{done: make(chan struct{})}
	go func() {
		l.p, l.err = worker.Start()
		close(l.done)
	}()
	return l
}

// process returns the worker.
func (l *launch) process() (*worker.Process, error) {
	<-l.done
	return l.p, l.err
}

// abandon ends the worker that nobody has taken.
func (l *launch) abandon() {
	if p, err := l.process(); err == nil {
		p.Close()
		p.Kill()
	}
}

// remotePort is a published port. Its sockets live longer than a worker.
type remotePort struct {
	publishOrder
	fds []int
	id  uint64 // as the worker knows it
}

// incarnation is one worker.
type incarnation struct {
	*worker.Process
	born   time.Time
	served chan struct{} // closed when nothing more comes from it

	mu     sync.Mutex
	ending *ending // what it has said about its end
	fault  error   // what was wrong with what it said
}

// How long a worker may take to start, and what comes between those that end
// early: the first one that does is replaced at once.
const (
	workerStartTime = 10 * time.Second
	firstPause      = 100 * time.Millisecond
	longestPause    = 30 * time.Second
	soundAge        = time.Minute
)

// maxLeases is how many leases of a family are kept for the next worker.
const maxLeases = 2048

// maxLearned is how many addresses that rules for names allow are kept for the next
// worker.
const maxLearned = 4096

// Bounds of what the log takes of a worker.
const (
	logsPerSecond = 100
	logBurst      = 1000
)

// startRemote has a worker serve a link.
func startRemote(ctx context.Context, c Config, at *attachment, s seed, first *launch, wanted func(netip.Addr)) (*remote, error) {
	r := newRemote(c, at.link, s)
	r.wanted = wanted
	if at.agent != nil {
		r.sockets, r.cutOff = at.agent.Sockets, at.agent.CutOff
	}
	if err := r.start(ctx, first); err != nil {
		return nil, err
	}
	return r, nil
}

// startShared has a worker serve a network whose guests come and go.
func startShared(ctx context.Context, c Config, link agent.Link, s seed, restarted func(), wanted func(netip.Addr)) (*remote, error) {
	r := newRemote(c, link, s)
	r.shared, r.restarted, r.wanted = true, restarted, wanted
	if err := r.start(ctx, launchWorker()); err != nil {
		return nil, err
	}
	return r, nil
}

func newRemote(c Config, link agent.Link, s seed) *remote {
	return &remote{
		cfg: c, link: link, log: c.Logger, rate: rate.NewLimiter(logsPerSecond, logBurst), seed: s, level: levelOf(c.Logger),
		up: make(chan struct{}), ports: make(map[uint64]*remotePort), members: make(map[uint64]*remoteMember),
		learned: make(map[forwarder.Learned]time.Time),
	}
}

// levelOf finds the lowest of the usual levels that a logger takes.
func levelOf(log *slog.Logger) slog.Level {
	for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn} {
		if log.Enabled(context.Background(), l) {
			return l
		}
	}
	return slog.LevelError
}

// start starts a worker and gives it all that there is to know.
func (r *remote) start(ctx context.Context, l *launch) error {
	ctx, cancel := context.WithTimeout(ctx, workerStartTime)
	defer cancel()
	p, err := l.process()
	if err != nil {
		return err
	}
	w := &incarnation{Process: p, born: time.Now(), served: make(chan struct{})}
	go func() {
		err := p.Serve(func(q *worker.Request) (any, []int, error) { return r.answer(w, q) })
		w.mu.Lock()
		w.fault = err
		w.mu.Unlock()
		close(w.served)
		if err != nil {
			p.Kill() // what makes no sense comes from a worker that is not itself any more
		}
	}()
	if err := r.instruct(ctx, w); err != nil {
		p.Close()
		p.Kill()
		<-w.served
		if errors.Is(err, worker.ErrEnded) {
			err = w.obituary()
		}
		return err
	}
	return nil
}

// instruct tells a worker what to do.
func (r *remote) instruct(ctx context.Context, w *incarnation) error {
	r.mu.Lock()
	o := startOrder{Config: r.cfg, Link: r.link, Seed: r.seed, Level: r.level, Seal: !r.cfg.NoSandbox, Shared: r.shared}
	o.Config.TapFile, o.Config.Logger, o.Config.Publish, o.Config.Cleanup = nil, nil, nil, nil
	o.Config.Capture, o.Config.PublishAuto = nil, nil
	o.Config.AddHosts = nil // they are among the seed's records
	o.Seed.Learned = r.learnedLocked()
	r.mu.Unlock()
	var status sandbox.Status
	var link []int
	if !r.shared {
		link = []int{r.link.FD}
	}
	if _, err := w.Call(ctx, opStart, o, &status, link...); err != nil {
		return decoded(err)
	}
	members, err := r.takeIn(ctx, w)
	if err != nil {
		return err
	}
	r.mu.Lock()
	own, ports := r.inside, maps.Clone(r.ports)
	r.mu.Unlock()
	if own != nil {
		in, err := r.openSockets()
		if err == nil {
			err = r.openInside(ctx, w, in, own)
		}
		if err != nil {
			r.log.Warn(noSplice, "err", err)
		}
	}
	ids := make(map[uint64]uint64) // as the worker knows the ports
	for _, id := range slices.Sorted(maps.Keys(ports)) {
		var number uint64
		if _, err := w.Call(ctx, opPublish, ports[id].publishOrder, &number, ports[id].fds...); err != nil {
			return decoded(err)
		}
		ids[id] = number
	}
	// What has changed meanwhile.
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, number := range ids {
		if p, ok := r.ports[id]; ok {
			p.id = number
		} else {
			_ = w.Note(opUnpublish, number)
		}
	}
	for number := range members {
		if r.members[number] == nil {
			_ = w.Note(opLeave, number)
		}
	}
	tellRecords(w, o.Seed.Records, r.seed.Records)
	_ = w.Note(opLocal, r.seed.Local)
	_ = w.Note(opDefault6, r.seed.Default6)
	_ = w.Note(opResolvConf, r.seed.ResolvConf)
	r.status, r.current = status, w
	close(r.up)
	return nil
}

// takeIn has a new worker serve the guests of the last.
func (r *remote) takeIn(ctx context.Context, w *incarnation) (map[uint64]*remoteMember, error) {
	r.mu.Lock()
	members := maps.Clone(r.members)
	r.mu.Unlock()
	for number, m := range members {
		_, err := w.Call(ctx, opMember, m.memberOrder, nil, m.fd)
		if err == nil {
			continue
		}
		r.mu.Lock()
		still := r.members[number] != nil
		r.mu.Unlock()
		if still {
			return nil, decoded(err)
		}
	}
	return members, nil
}

// run looks after the worker until ctx is done or the link is gone.
func (r *remote) run(ctx context.Context) error {
	pause := time.Duration(0)
	for {
		r.mu.Lock()
		w := r.current
		r.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-w.Done():
			<-w.served
		}
		w.Close()
		if w.gone() {
			return fmt.Errorf("%w", tap.ErrGone)
		}
		r.mu.Lock()
		r.current, r.up = nil, make(chan struct{})
		r.mu.Unlock()
		if time.Since(w.born) > soundAge {
			pause = 0
		}
		r.reset(ctx)
		why := w.obituary()
		r.log.Error("the worker has ended, another one takes its place: connections through it are cut off",
			"cause", why, "in", pause, "last words", w.lastWords())
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			pause = min(max(2*pause, firstPause), longestPause)
			if err := r.start(ctx, launchWorker()); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				r.log.Error("no worker: trying again", "err", err, "in", pause)
				continue
			}
			break
		}
		r.mu.Lock()
		r.restarts++
		n := r.restarts
		r.mu.Unlock()
		r.log.Info("a new worker serves the guest", "restarts", n)
		if r.restarted != nil {
			go r.restarted()
		}
	}
}

// cutOffTime is how long the next worker waits for the guest's connections to be
// cut off.
const cutOffTime = 200 * time.Millisecond

// reset has the guest know that its connections have lost their other ends. One
// that only waits for data would never find out.
func (r *remote) reset(ctx context.Context) {
	if r.cutOff == nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := r.cutOff(); err != nil {
			r.log.Debug("connections of the guest notice their end only when they send", "err", err)
		}
	}()
	select {
	case <-done:
	case <-time.After(cutOffTime):
	case <-ctx.Done():
	}
}

// gone reports whether a worker has ended because its link has.
func (w *incarnation) gone() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ending != nil && w.ending.Gone
}

// obituary says why a worker has ended.
func (w *incarnation) obituary() error {
	<-w.Done()
	w.mu.Lock()
	defer w.mu.Unlock()
	how, words := w.End()
	first, _, _ := strings.Cut(words, "\n")
	switch {
	case w.ending != nil:
		return errors.New(w.ending.Error)
	case w.fault != nil:
		return w.fault
	case w.Violated():
		return errors.New("it has made a system call that its sandbox does not allow: --no-sandbox shows whether the sandbox is to blame")
	case first != "":
		return fmt.Errorf("%s: %s", how, first)
	}
	return errors.New(how)
}

// lastWords is what a worker has written about its end.
func (w *incarnation) lastWords() string {
	_, words := w.End()
	return words
}

// close ends the worker for good.
func (r *remote) close() {
	r.mu.Lock()
	w := r.current
	r.current = nil
	ports, members := r.ports, r.members
	r.ports, r.members = nil, nil
	r.mu.Unlock()
	if w != nil {
		w.Close()
		w.Kill()
		<-w.served
		if words := w.lastWords(); words != "" {
			r.log.Warn("the worker's last words", "text", words)
		}
	}
	for _, p := range ports {
		closeAll(p.fds)
	}
	for _, m := range members {
		closeFD(m.fd)
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		closeFD(fd)
	}
}

// answer does what a worker asks: next to nothing, for it may be the guest's.
func (r *remote) answer(w *incarnation, q *worker.Request) (any, []int, error) {
	switch q.Op {
	case opLog:
		var rec worker.Record
		if err := q.Decode(&rec); err != nil {
			return nil, nil, err
		}
		r.write(rec)
	case opEnded:
		var e ending
		if err := q.Decode(&e); err != nil {
			return nil, nil, err
		}
		w.mu.Lock()
		w.ending = &e
		w.mu.Unlock()
	case opLeases4, opLeases6:
		var l []dhcp.SavedLease
		if err := q.Decode(&l); err != nil {
			return nil, nil, err
		}
		l = l[:min(len(l), maxLeases)]
		r.mu.Lock()
		if q.Op == opLeases4 {
			r.seed.Leases4 = l
		} else {
			r.seed.Leases6 = l
		}
		r.mu.Unlock()
	case opLearned:
		var l []forwarder.Learned
		if err := q.Decode(&l); err != nil {
			return nil, nil, err
		}
		r.learn(l)
	case opWant:
		var guest netip.Addr
		if err := q.Decode(&guest); err != nil {
			return nil, nil, err
		}
		r.wanted(guest)
	case opGone:
		var number uint64
		if err := q.Decode(&number); err != nil {
			return nil, nil, err
		}
		r.mu.Lock()
		m := r.members[number]
		r.mu.Unlock()
		if m != nil {
			m.gone()
		}
	case opDial:
		var path string
		if err := q.Decode(&path); err != nil {
			return nil, nil, err
		}
		fd, err := r.dial(path)
		if err != nil {
			return nil, nil, err
		}
		return nil, []int{fd}, nil
	default:
		return nil, nil, errors.New("unknown request")
	}
	return nil, nil, nil
}

// learn keeps addresses for the next worker. Where there are too many, any one
// makes room.
func (r *remote) learn(fresh []forwarder.Learned) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range fresh {
		until := l.Until
		l.Until = time.Time{}
		if _, known := r.learned[l]; !known && len(r.learned) >= maxLearned {
			for k := range r.learned {
				delete(r.learned, k)
				break
			}
		}
		r.learned[l] = until
	}
}

// learnedLocked returns the addresses that were kept.
func (r *remote) learnedLocked() []forwarder.Learned {
	all := make([]forwarder.Learned, 0, len(r.learned))
	for l, until := range r.learned {
		l.Until = until
		all = append(all, l)
	}
	return all
}

// dial connects to a unix socket of the host, if it is one that the guest may
// reach.
func (r *remote) dial(path string) (int, error) {
	if path == "" || !slices.ContainsFunc(r.cfg.Reverse, func(v Reverse) bool { return v.HostPath == path }) {
		return -1, unix.EACCES
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// write writes a log record of the worker's, unless there are too many.
func (r *remote) write(rec worker.Record) {
	out := rec.Slog()
	if !r.log.Enabled(context.Background(), out.Level) {
		return
	}
	if !r.rate.Allow() {
		r.mu.Lock()
		r.lostLogs++
		r.mu.Unlock()
		return
	}
	r.mu.Lock()
	lost := r.lostLogs
	r.lostLogs = 0
	r.mu.Unlock()
	if lost > 0 {
		r.log.Warn("log records of the worker were left out: there were too many", "records", lost)
	}
	_ = r.log.Handler().Handle(context.Background(), out)
}

// conn returns the worker, and waits for the next one if there is none.
func (r *remote) conn(ctx context.Context) (*incarnation, error) {
	for {
		r.mu.Lock()
		w, up := r.current, r.up
		r.mu.Unlock()
		if w != nil {
			return w, nil
		}
		select {
		case <-up:
		case <-ctx.Done():
			return nil, ErrNotRunning
		}
	}
}

// call asks the worker.
func (r *remote) call(ctx context.Context, op string, in, out any, fds ...int) error {
	w, err := r.conn(ctx)
	if err != nil {
		return err
	}
	_, err = w.Call(ctx, op, in, out, fds...)
	if errors.Is(err, worker.ErrEnded) {
		return ErrNotRunning
	}
	return decoded(err)
}

// note tells the worker, if there is one; the next one gets it from the seed.
func (r *remote) note(op string, body any, keep func(*seed)) {
	r.mu.Lock()
	keep(&r.seed)
	w := r.current
	r.mu.Unlock()
	if w != nil {
		_ = w.Note(op, body)
	}
}

func (r *remote) setLocal(local []netip.Prefix) {
	r.note(opLocal, local, func(s *seed) { s.Local = local })
}

func (r *remote) setDefaultRouter6(on bool) {
	r.note(opDefault6, on, func(s *seed) { s.Default6 = on })
}

func (r *remote) setResolvConf(rc dns.ResolvConf) {
	r.note(opResolvConf, rc, func(s *seed) { s.ResolvConf = rc })
}

// setLogLevel passes on what is worth logging.
func (r *remote) setLogLevel() {
	l := levelOf(r.log)
	r.note(opLogLevel, l, func(*seed) { r.level = l })
}

func (r *remote) publish(ctx context.Context, f Forward, in forwarder.Inbound) (uint64, error) {
	fds := in.FDs
	p := &remotePort{publishOrder: publishOrder{f, in.Guest4, in.Guest6}, fds: fds}
	if err := r.call(ctx, opPublish, p.publishOrder, &p.id, fds...); err != nil {
		closeAll(fds)
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ports == nil {
		closeAll(fds)
		return 0, ErrNotRunning
	}
	r.last++
	r.ports[r.last] = p
	return r.last, nil
}

func (r *remote) unpublish(ctx context.Context, id uint64) error {
	r.mu.Lock()
	p, ok := r.ports[id]
	delete(r.ports, id)
	r.mu.Unlock()
	if !ok {
		return ErrNotRunning
	}
	closeAll(p.fds)
	err := r.call(ctx, opUnpublish, p.id, nil)
	return err
}

func (r *remote) useInside(ctx context.Context, in *agent.Sockets, own ...netip.Addr) error {
	w, err := r.conn(ctx)
	if err != nil {
		in.Close()
		return err
	}
	if err := r.openInside(ctx, w, in, own); err != nil {
		return err
	}
	r.mu.Lock()
	r.inside = own
	r.mu.Unlock()
	return nil
}

// openInside passes the way inside on.
// openSockets opens another way to sockets inside. The guest waits for it, so an
// agent that stands still gets no more time than a worker.
func (r *remote) openSockets() (*agent.Sockets, error) {
	type answer struct {
		in  *agent.Sockets
		err error
	}
	got := make(chan answer, 1)
	go func() {
		in, err := r.sockets()
		got <- answer{in, err}
	}()
	select {
	case a := <-got:
		return a.in, a.err
	case <-time.After(engineTime):
	}
	go func() {
		if a := <-got; a.err == nil {
			a.in.Close()
		}
	}()
	return nil, errors.New("the agent does not answer")
}

func (r *remote) openInside(ctx context.Context, w *incarnation, in *agent.Sockets, own []netip.Addr) error {
	_, err := w.Call(ctx, opInside, own, nil, in.FD())
	in.Close()
	return decoded(err)
}

func (r *remote) flows(ctx context.Context) (list []Flow, err error) {
	err = r.call(ctx, opFlows, nil, &list)
	return list, err
}

func (r *remote) killFlow(ctx context.Context, id string) error {
	return r.call(ctx, opKillFlow, id, nil)
}

func (r *remote) leases(ctx context.Context) (list []Lease, err error) {
	err = r.call(ctx, opLeases, nil, &list)
	for i := range list {
		// A worker knows no time zone.
		list[i].Since, list[i].Expires = list[i].Since.Local(), list[i].Expires.Local()
	}
	return list, err
}

func (r *remote) records(ctx context.Context) (list []Record, err error) {
	err = r.call(ctx, opRecords, nil, &list)
	return list, err
}

func (r *remote) setRecord(ctx context.Context, name string, addrs []netip.Addr) error {
	if err := r.call(ctx, opSetRecord, recordOrder{name, addrs}, nil); err != nil {
		return err
	}
	r.keepRecord(name, addrs)
	return nil
}

func (r *remote) addRecord(ctx context.Context, name string, addrs []netip.Addr) (all []netip.Addr, err error) {
	if err := r.call(ctx, opAddRecord, recordOrder{name, addrs}, &all); err != nil {
		return nil, err
	}
	r.keepRecord(name, all)
	return all, nil
}

func (r *remote) removeRecord(ctx context.Context, name string) error {
	if err := r.call(ctx, opRemRecord, name, nil); err != nil {
		return err
	}
	r.keepRecord(name, nil)
	return nil
}

// keepRecord notes what the next worker shall answer.
func (r *remote) keepRecord(name string, addrs []netip.Addr) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seed.Records = maps.Clone(r.seed.Records)
	if len(addrs) == 0 {
		delete(r.seed.Records, name)
		return
	}
	r.seed.Records[name] = addrs
}

// capture goes on with the next worker, in a new section.
func (r *remote) capture(ctx context.Context, to io.Writer, name string, o CaptureOptions) error {
	for {
		w, err := r.conn(ctx)
		if err == nil {
			err = r.captureFrom(ctx, w, to, captureOrder{Name: name, CaptureOptions: o})
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case !errors.Is(err, worker.ErrEnded):
			return err
		}
		select {
		case <-w.Done():
		case <-ctx.Done():
		}
	}
}

// captureFrom copies what a worker writes to a pipe.
func (r *remote) captureFrom(ctx context.Context, w *incarnation, to io.Writer, o captureOrder) error {
	r.mu.Lock()
	r.last++
	o.Number = r.last
	r.mu.Unlock()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	from := os.NewFile(uintptr(pipe[0]), "capture")
	defer from.Close()
	stop := context.AfterFunc(ctx, func() {
		_ = w.Note(opEndCapture, o.Number)
		_ = from.SetReadDeadline(time.Now().Add(engineTime)) // for its last words
	})
	defer stop()
	ended := make(chan error, 1)
	go func() {
		_, err := w.Call(context.WithoutCancel(ctx), opCapture, o, nil, pipe[1])
		closeFD(pipe[1])
		ended <- decoded(err)
	}()
	_, err := io.Copy(to, from)
	from.Close()
	if e := <-ended; e != nil && err == nil {
		err = e
	}
	return err
}

func (r *remote) stats(ctx context.Context) (s Stats, err error) {
	err = r.call(ctx, opStats, nil, &s)
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Process.Restarts = r.restarts
	return s, err
}

// sandboxInfo tells what is in force.
func (r *remote) sandboxInfo() SandboxInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := infoOf(r.status)
	if r.current != nil {
		i.WorkerPID = r.current.PID()
	}
	return i
}

func infoOf(s sandbox.Status) SandboxInfo {
	return SandboxInfo{
		NoNewPrivs: s.NoNewPrivs, NoCapabilities: s.NoCapabilities, NotDumpable: s.NotDumpable,
		Seccomp: s.Seccomp, Landlock: s.Landlock, Missing: s.Missing,
	}
}

// TrySandbox starts a process like the one that would face a guest, and tells what
// that can be kept from here.
func TrySandbox(ctx context.Context) (SandboxInfo, error) {
	p, err := worker.Start()
	if err != nil {
		return SandboxInfo{}, fmt.Errorf("usernet: try sandbox: %w", err)
	}
	go func() {
		_ = p.Serve(func(*worker.Request) (any, []int, error) { return nil, nil, errors.New("unknown request") })
	}()
	defer func() {
		p.Close()
		p.Kill()
	}()
	ctx, cancel := context.WithTimeout(ctx, workerStartTime)
	defer cancel()
	var s sandbox.Status
	if _, err := p.Call(ctx, opSeal, nil, &s); err != nil {
		return SandboxInfo{}, fmt.Errorf("usernet: try sandbox: %w", err)
	}
	return infoOf(s), nil
}
