package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// Limits of one client.
const (
	requestTime = 5 * time.Second        // for a whole request to arrive, and for its answer to be read
	idleTime    = 60 * time.Second       // between two requests of a connection
	engineTime  = 3 * time.Second        // for the engine to look at its flows
	streamEnd   = 500 * time.Millisecond // for the last of a stream to be read
	maxHeader   = 8 << 10
	maxBody     = 64 << 10
)

// A Network is what is controlled: a [usernet.Network].
type Network interface {
	Info() usernet.Info
	Stats() usernet.Stats
	Flows(context.Context) ([]usernet.Flow, error)
	KillFlow(ctx context.Context, id string) error
	Leases() []usernet.Lease
	Records() ([]usernet.Record, error)
	SetRecord(name string, addrs ...netip.Addr) error
	AddRecord(name string, addrs ...netip.Addr) error
	RemoveRecord(name string) error
	Forwards() []usernet.ForwardInfo
	AddForward(context.Context, usernet.Forward) (usernet.ForwardInfo, error)
	RemoveForward(id string) error
	Capture(context.Context, io.Writer, usernet.CaptureOptions) error
	LogLevelChanged()
}

// Config says what a Server serves. Network is required.
type Config struct {
	Network Network
	// Version is what GET /v1/info reports as the program's version.
	Version string
	// Level is what the log level is set by; nil: it cannot be.
	Level *slog.LevelVar
	// Netns is the guest's network namespace, Userns the user namespace that
	// owns it, by their inodes: clients from there are refused. 0 is none.
	Netns, Userns uint64
	Logger        *slog.Logger // nil discards
}

// A Server answers requests.
type Server struct {
	cfg     Config
	log     *slog.Logger
	routes  []route
	warned  atomic.Bool  // of a client that was refused
	streams atomic.Int32 // those that are being sent
}

// New returns a server that Run starts.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.routes = s.table()
	return s
}

// connKey finds a request's connection in its context.
type connKey struct{}

// Run answers requests on l until ctx is done, and closes l. What is being
// answered then is cut off, but streams may end in peace.
func (s *Server) Run(ctx context.Context, l *Listener) error {
	c := newConns(l, s.admit)
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      requestTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		DisableGeneralOptionsHandler: true,
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		c.Close()
		for range 20 {
			if s.streams.Load() == 0 {
				break
			}
			time.Sleep(streamEnd / 20)
		}
		srv.Close()
	})
	err := srv.Serve(c)
	c.Close()
	if !stop() {
		<-ended
		return nil
	}
	return fmt.Errorf("control: serve: %w", err)
}

// admit lets in this process's user and root, but for those inside the network.
func (s *Server) admit(c *net.UnixConn) error {
	p, err := peer(c)
	if err != nil {
		return fmt.Errorf("control: admit client: %w", err)
	}
	own := uint32(os.Geteuid())
	if p.Uid != own && p.Uid != 0 {
		err = fmt.Errorf("it is of user %d", p.Uid)
	} else if p.Uid == own {
		err = s.outside(int(p.Pid))
	}
	if err != nil {
		level := slog.LevelDebug
		if s.warned.CompareAndSwap(false, true) {
			level = slog.LevelWarn // once: a guest shall not fill the log
		}
		s.log.Log(context.Background(), level, "control client refused", "pid", p.Pid, "err", err)
	}
	return err
}

// outside returns an error for a process that is in the guest's namespaces, or
// in one below, or may be.
func (s *Server) outside(pid int) error {
	if s.cfg.Netns == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st); err != nil {
		return fmt.Errorf("cannot tell its network namespace: %w", err)
	}
	if st.Ino == s.cfg.Netns {
		return errors.New("it is inside the network")
	}
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &own); err != nil {
		return fmt.Errorf("cannot tell our user namespace: %w", err)
	}
	if s.cfg.Userns == 0 || s.cfg.Userns == own.Ino {
		return nil
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	// The way up ends at our own namespace, or where it may not be seen, which
	// is above it. The kernel nests them 32 deep.
	for range 40 {
		if err != nil {
			break
		}
		err = unix.Fstat(fd, &st)
		if err == nil && (st.Ino == own.Ino || st.Ino == s.cfg.Userns) {
			unix.Close(fd)
			if st.Ino == own.Ino {
				return nil
			}
			return errors.New("it is inside the guest's user namespace")
		}
		parent, perr := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		unix.Close(fd)
		if errors.Is(perr, unix.EPERM) {
			return nil
		}
		fd, err = parent, perr
	}
	return fmt.Errorf("cannot tell its user namespace: %w", err)
}

// A route is a method on a path. An element of the path in braces matches any.
type route struct {
	method, path string
	handle       func(*request) (status int, body any, err error)
}

// request is a request as handlers see it.
type request struct {
	*http.Request
	param string // what the element in braces is
	w     http.ResponseWriter
}

func (s *Server) table() []route {
	return []route{
		{"GET", "/v1/info", s.getInfo},
		{"GET", "/v1/forwards", s.getForwards},
		{"POST", "/v1/forwards", s.postForward},
		{"DELETE", "/v1/forwards/{id}", s.deleteForward},
		{"GET", "/v1/flows", s.getFlows},
		{"DELETE", "/v1/flows/{id}", s.deleteFlow},
		{"GET", "/v1/leases", s.getLeases},
		{"GET", "/v1/stats", s.getStats},
		{"GET", "/v1/log-level", s.getLevel},
		{"PUT", "/v1/log-level", s.putLevel},
		{"GET", "/v1/dns", s.getRecords},
		{"PUT", "/v1/dns/{name}", s.putRecord},
		{"POST", "/v1/dns/{name}", s.postRecord},
		{"DELETE", "/v1/dns/{name}", s.deleteRecord},
		{"GET", "/v1/capture", s.getCapture},
		{"GET", "/metrics", s.getMetrics},
	}
}

// match reports whether path is of the pattern, and what is in its braces.
func match(pattern, path string) (param string, ok bool) {
	before, _, braces := strings.Cut(pattern, "{")
	if !braces {
		return "", pattern == path
	}
	param, ok = strings.CutPrefix(path, before)
	return param, ok && param != "" && !strings.Contains(param, "/")
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		// A body that never comes shall not keep the place: it is read first.
		defer c.finish()
	}
	var methods []string
	for _, rt := range s.routes {
		param, ok := match(rt.path, r.URL.Path)
		switch {
		case !ok:
		case rt.method == r.Method, rt.method == "GET" && r.Method == "HEAD":
			s.answer(w, r, rt, param)
			return
		default:
			methods = append(methods, rt.method)
		}
	}
	if methods != nil {
		slices.Sort(methods)
		w.Header().Set("Allow", strings.Join(methods, ", "))
		writeError(w, &apiError{http.StatusMethodNotAllowed, "method-not-allowed", fmt.Sprintf("%s is not for %s: use %s", r.Method, r.URL.Path, strings.Join(methods, ", "))})
		return
	}
	writeError(w, &apiError{http.StatusNotFound, "not-found", fmt.Sprintf("there is no %q", r.URL.Path)})
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, rt route, param string) {
	req := &request{Request: r, param: param, w: w}
	status, body, err := rt.handle(req)
	if err != nil {
		writeError(w, err)
		return
	}
	if body, ok := body.(stream); ok {
		s.streams.Add(1)
		defer s.streams.Add(-1)
		body.serve(w, r)
		return
	}
	writeBody(w, status, body)
}

// working tells that all of the request has arrived: its connection does not
// have to make room for others any more.
func (r *request) working() {
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		c.begin()
	}
}
