package control

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"

	"github.com/usernet/usernet"
)

// Info is the body of GET /v1/info.
type Info struct {
	API     string `json:"api"`
	Version string `json:"version"`
	PID     int    `json:"pid"`
	usernet.Info
}

// Forward is how a [usernet.Forward] is written.
type Forward struct {
	ID       string `json:"id,omitempty"`
	Protocol string `json:"protocol"`
	// Host is ADDRESS:PORT, or :PORT on all addresses.
	Host     string `json:"host,omitempty"`
	HostPath string `json:"host_path,omitempty"`
	// Guest is ADDRESS:PORT, or :PORT of the guest's own address.
	Guest string `json:"guest"`
	// Proxy is the version of the PROXY protocol, 0 for none.
	Proxy int `json:"proxy,omitempty"`
	// Auto is set for what was published because it listens inside.
	Auto bool `json:"auto,omitempty"`
}

// newForward is the body of POST /v1/forwards: a Forward, or a specification as
// on the command line.
type newForward struct {
	Spec string `json:"spec"`
	Forward
}

// Bodies with one list.
type (
	forwardList struct {
		Forwards []Forward `json:"forwards"`
	}
	flowList struct {
		Flows []usernet.Flow `json:"flows"`
	}
	leaseList struct {
		Leases []usernet.Lease `json:"leases"`
	}
	recordList struct {
		Records []usernet.Record `json:"records"`
	}
	addressList struct {
		Addresses []netip.Addr `json:"addresses"`
	}
	levelBody struct {
		Level string `json:"level"`
	}
)

func (s *Server) getInfo(r *request) (int, any, error) {
	r.working()
	return http.StatusOK, Info{API: "v1", Version: s.cfg.Version, PID: os.Getpid(), Info: s.cfg.Network.Info()}, nil
}

func (s *Server) getStats(r *request) (int, any, error) {
	r.working()
	return http.StatusOK, s.cfg.Network.Stats(), nil
}

func (s *Server) getLeases(r *request) (int, any, error) {
	r.working()
	return http.StatusOK, leaseList{orEmpty(s.cfg.Network.Leases())}, nil
}

// orEmpty makes a list that is written as one also where it has nothing in it.
func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (s *Server) getFlows(r *request) (int, any, error) {
	r.working()
	ctx, cancel := context.WithTimeout(r.Context(), engineTime)
	defer cancel()
	flows, err := s.cfg.Network.Flows(ctx)
	return http.StatusOK, flowList{orEmpty(flows)}, err
}

func (s *Server) deleteFlow(r *request) (int, any, error) {
	r.working()
	ctx, cancel := context.WithTimeout(r.Context(), engineTime)
	defer cancel()
	return http.StatusNoContent, nil, s.cfg.Network.KillFlow(ctx, r.param)
}

func (s *Server) getForwards(r *request) (int, any, error) {
	r.working()
	list := []Forward{}
	for _, f := range s.cfg.Network.Forwards() {
		list = append(list, describeForward(f))
	}
	return http.StatusOK, forwardList{list}, nil
}

// postForward publishes ports: all that are asked for, or none.
func (s *Server) postForward(r *request) (int, any, error) {
	var body newForward
	if err := r.decode(&body); err != nil {
		return 0, nil, err
	}
	wanted, err := body.parse()
	if err != nil {
		return 0, nil, err
	}
	added := make([]Forward, 0, len(wanted))
	for _, f := range wanted {
		info, err := s.cfg.Network.AddForward(r.Context(), f)
		if err != nil {
			for _, a := range added {
				_ = s.cfg.Network.RemoveForward(a.ID)
			}
			return 0, nil, err
		}
		added = append(added, describeForward(info))
	}
	return http.StatusCreated, forwardList{added}, nil
}

// parse returns what the body asks for.
func (f *newForward) parse() ([]usernet.Forward, error) {
	if f.Spec != "" {
		if f.Forward != (Forward{}) {
			return nil, badRequest("give either spec or the other members")
		}
		return usernet.ParseForward(f.Spec)
	}
	var (
		out usernet.Forward
		err error
	)
	switch f.Protocol {
	case "tcp":
		out.Protocol = usernet.TCP
	case "udp":
		out.Protocol = usernet.UDP
	default:
		return nil, badRequest("protocol %q: choose one of tcp, udp", f.Protocol)
	}
	switch {
	case f.Auto:
		return nil, badRequest("auto: it is set for what listens inside, leave it out")
	case f.ID != "":
		return nil, badRequest("id: it is chosen here, leave it out")
	case f.Guest == "":
		return nil, badRequest("guest: it is missing: write ADDRESS:PORT or :PORT")
	case (f.Host == "") == (f.HostPath == ""):
		return nil, badRequest("give one of host and host_path")
	}
	if out.Guest, err = parseAddrPort("guest", f.Guest); err != nil {
		return nil, err
	}
	out.Proxy = f.Proxy
	if out.HostPath = f.HostPath; f.Host != "" {
		if out.Host, err = parseAddrPort("host", f.Host); err != nil {
			return nil, err
		}
	}
	return []usernet.Forward{out}, nil
}

// parseAddrPort reads ADDRESS:PORT or :PORT.
func parseAddrPort(name, text string) (netip.AddrPort, error) {
	full := text
	if strings.HasPrefix(text, ":") {
		full = "0.0.0.0" + text
	}
	a, err := netip.ParseAddrPort(full)
	if err != nil {
		return a, badRequest("%s %q: write ADDRESS:PORT or :PORT", name, text)
	}
	if full != text {
		a = netip.AddrPortFrom(netip.Addr{}, a.Port())
	}
	return a, nil
}

func describeForward(f usernet.ForwardInfo) Forward {
	out := Forward{ID: f.ID, Protocol: f.Protocol.String(), HostPath: f.HostPath, Guest: writeAddrPort(f.Guest), Proxy: f.Proxy, Auto: f.Auto}
	if f.HostPath == "" {
		out.Host = writeAddrPort(f.Host)
	}
	return out
}

// writeAddrPort is the inverse of parseAddrPort.
func writeAddrPort(a netip.AddrPort) string {
	if a.Addr().IsValid() {
		return a.String()
	}
	return strings.TrimPrefix(netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port()).String(), "0.0.0.0")
}

func (s *Server) deleteForward(r *request) (int, any, error) {
	r.working()
	return http.StatusNoContent, nil, s.cfg.Network.RemoveForward(r.param)
}

func (s *Server) getRecords(r *request) (int, any, error) {
	r.working()
	records, err := s.cfg.Network.Records()
	return http.StatusOK, recordList{orEmpty(records)}, err
}

func (s *Server) putRecord(r *request) (int, any, error) {
	var body addressList
	if err := r.decode(&body); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, s.cfg.Network.SetRecord(r.param, body.Addresses...)
}

func (s *Server) postRecord(r *request) (int, any, error) {
	var body addressList
	if err := r.decode(&body); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, s.cfg.Network.AddRecord(r.param, body.Addresses...)
}

func (s *Server) deleteRecord(r *request) (int, any, error) {
	r.working()
	return http.StatusNoContent, nil, s.cfg.Network.RemoveRecord(r.param)
}

// levels are the words of the log level.
var levels = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}

func (s *Server) getLevel(r *request) (int, any, error) {
	r.working()
	if s.cfg.Level == nil {
		return 0, nil, errNoLevel
	}
	return http.StatusOK, levelBody{strings.ToLower(s.cfg.Level.Level().String())}, nil
}

func (s *Server) putLevel(r *request) (int, any, error) {
	var body levelBody
	if err := r.decode(&body); err != nil {
		return 0, nil, err
	}
	level, ok := levels[body.Level]
	switch {
	case s.cfg.Level == nil:
		return 0, nil, errNoLevel
	case !ok:
		return 0, nil, badRequest("level %q: choose one of debug, info, warn, error", body.Level)
	}
	s.cfg.Level.Set(level)
	s.cfg.Network.LogLevelChanged()
	return http.StatusNoContent, nil, nil
}

func (s *Server) getMetrics(r *request) (int, any, error) {
	r.working()
	return http.StatusOK, metrics{s.cfg.Version, s.cfg.Network.Info(), s.cfg.Network.Stats()}, nil
}
