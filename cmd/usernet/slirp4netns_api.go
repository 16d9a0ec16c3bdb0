package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/usernet/usernet"
)

// slirpAPI takes requests for forwards at a unix socket, one per connection.
type slirpAPI struct {
	listener *net.UnixListener
	info     os.FileInfo
	path     string
}

// listenSlirpAPI puts the socket in the place of what is at path.
func listenSlirpAPI(path string) (*slirpAPI, error) {
	_ = os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen at API socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	info, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return nil, err
	}
	return &slirpAPI{l, info, path}, nil
}

// close removes the socket, unless another one has taken its place.
func (a *slirpAPI) close() {
	a.listener.Close()
	if info, err := os.Lstat(a.path); err == nil && os.SameFile(info, a.info) {
		os.Remove(a.path)
	}
}

// Bounds of what one client can hold.
const (
	slirpMaxRequest = 4096             // as large, a request is refused
	slirpMaxExcess  = 1 << 20          // of a refused one is read at most
	slirpPatience   = 10 * time.Second // for a client to say something
	slirpMaxClients = 64
)

// serve answers until ctx is done. A silent client keeps nobody waiting.
func (a *slirpAPI) serve(ctx context.Context, n slirpForwarder, addrs usernet.Addresses, log *slog.Logger) {
	var clients sync.WaitGroup
	defer clients.Wait()
	stop := context.AfterFunc(ctx, func() { a.listener.Close() })
	defer stop()
	h := &slirpForwards{n: n, addrs: addrs, ids: make(map[int]slirpForward)}
	slots := make(chan struct{}, slirpMaxClients)
	failing := false
	for {
		slots <- struct{}{}
		conn, err := a.listener.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			if !failing {
				log.Warn("cannot accept at the API socket", "err", err)
			}
			failing = true
			time.Sleep(100 * time.Millisecond) // short of descriptors: it passes
			<-slots
			continue
		}
		failing = false
		clients.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			hangup := context.AfterFunc(ctx, func() { conn.Close() })
			defer hangup()
			_ = conn.SetDeadline(time.Now().Add(slirpPatience))
			request, tooLarge := readSlirpRequest(conn)
			reply := slirpFault("bad request: too large message")
			if !tooLarge {
				reply = h.answer(ctx, request)
			}
			b, _ := json.Marshal(reply)
			// Clients read once: the reply is one write.
			_, _ = conn.Write(b)
			_ = conn.CloseWrite()
			if tooLarge {
				// To close on bytes that nobody has read is an error to who sent them.
				_, _ = io.CopyN(io.Discard, conn, slirpMaxExcess)
			}
		})
	}
}

// readSlirpRequest reads until there is a whole JSON value, the client has no
// more to say, or it says too much. Clients need not close their half, and may
// write in pieces.
func readSlirpRequest(conn net.Conn) (request []byte, tooLarge bool) {
	b := make([]byte, slirpMaxRequest)
	size := 0
	for size < len(b) {
		n, err := conn.Read(b[size:])
		size += n
		if size == len(b) {
			return nil, true
		}
		if err != nil {
			break
		}
		var v json.RawMessage
		if e := json.NewDecoder(bytes.NewReader(trimBOM(b[:size]))).Decode(&v); e == nil || isSyntax(e) {
			break
		}
	}
	return b[:size], false
}

// isSyntax reports whether more bytes cannot make an error of JSON good.
func isSyntax(err error) bool {
	var s *json.SyntaxError
	return errors.As(err, &s)
}

func trimBOM(b []byte) []byte { return bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")) }

// slirpForwarder is the part of a usernet.Network that makes forwards.
type slirpForwarder interface {
	AddForward(context.Context, usernet.Forward) (usernet.ForwardInfo, error)
	RemoveForward(id string) error
}

// A slirpForward is a forward as the list shows it.
type slirpForward struct {
	ID        int    `json:"id"`
	Proto     string `json:"proto"`
	HostAddr  string `json:"host_addr"`
	HostPort  int    `json:"host_port"`
	GuestAddr string `json:"guest_addr"`
	GuestPort int    `json:"guest_port"`
	id        string
}

// slirpForwards are the forwards that were asked for at the socket.
type slirpForwards struct {
	n     slirpForwarder
	addrs usernet.Addresses

	mu   sync.Mutex // guards following
	ids  map[int]slirpForward
	last int
}

type object map[string]any

func slirpFault(text string) object { return object{"error": object{"desc": text}} }

// answer returns the reply to a request.
func (h *slirpForwards) answer(ctx context.Context, request []byte) object {
	var v any
	if err := json.NewDecoder(bytes.NewReader(trimBOM(request))).Decode(&v); err != nil {
		return slirpFault("bad request: cannot parse JSON")
	}
	r, ok := v.(map[string]any)
	if !ok {
		return slirpFault("bad request: json_object() failed")
	}
	execute, ok := r["execute"].(string)
	if !ok {
		return slirpFault("bad request: no execute found")
	}
	args, _ := r["arguments"].(map[string]any)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch execute {
	case "add_hostfwd":
		return h.add(ctx, args)
	case "list_hostfwd":
		entries := []slirpForward{}
		for _, id := range slices.Sorted(maps.Keys(h.ids)) {
			entries = append(entries, h.ids[id])
		}
		// The one shape is that of the manual, the other that of the program.
		return object{"return": object{"entries": entries}, "entries": entries}
	case "remove_hostfwd":
		return h.remove(args)
	case "get_info":
		return h.info()
	}
	return slirpFault("bad request: unknown execute")
}

// add makes a forward.
func (h *slirpForwards) add(ctx context.Context, args map[string]any) object {
	const what = "bad request: add_hostfwd: "
	proto, _ := args["proto"].(string)
	f := usernet.Forward{Protocol: usernet.TCP}
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	hostAny, family := any4, 0
	switch proto {
	case "tcp":
	case "udp":
		f.Protocol = usernet.UDP
	case "tcp6", "udp6":
		hostAny, family = any6, 6
		if proto == "udp6" {
			f.Protocol = usernet.UDP
		}
	default:
		return slirpFault(what + "bad arguments.proto")
	}
	host, ok := slirpAddr(args["host_addr"], hostAny)
	if !ok || family == 6 && host.Is4() {
		return slirpFault(what + "bad arguments.host_addr")
	}
	hostPort, ok := slirpPort(args["host_port"])
	if !ok {
		return slirpFault(what + "bad arguments.host_port")
	}
	guest, ok := slirpAddr(args["guest_addr"], h.addrs.Guest4)
	if !ok {
		return slirpFault(what + "bad arguments.guest_addr")
	}
	asked := guest
	if guest == any4 {
		guest = h.addrs.PoolStart
	}
	guestPort, ok := slirpPort(args["guest_port"])
	if !ok {
		return slirpFault(what + "bad arguments.guest_port")
	}
	f.Host, f.Guest = netip.AddrPortFrom(host, hostPort), netip.AddrPortFrom(guest, guestPort)
	info, err := h.n.AddForward(ctx, f)
	if err != nil {
		fault := slirpFault(what + "slirp_add_hostfwd failed")
		fault["error"].(object)["cause"] = describe(err)
		return fault
	}
	h.last++
	h.ids[h.last] = slirpForward{h.last, proto, host.String(), int(hostPort), asked.String(), int(guestPort), info.ID}
	return object{"return": object{"id": h.last}}
}

// remove ends a forward.
func (h *slirpForwards) remove(args map[string]any) object {
	const what = "bad request: remove_hostfwd: "
	id, ok := args["id"].(float64)
	if !ok || id != float64(int(id)) {
		return slirpFault(what + "bad arguments.id")
	}
	f, ok := h.ids[int(id)]
	if !ok || h.n.RemoveForward(f.id) != nil {
		return slirpFault(what + "slirp_remove_hostfwd failed")
	}
	delete(h.ids, f.ID)
	return object{"return": object{}}
}

// info tells what the network looks like.
func (h *slirpForwards) info() object {
	a := h.addrs
	ipv4 := object{
		"network": a.Prefix4.String(), "gateway": a.Gateway4.String(), "dns": a.DNS4.String(),
		"dhcp_begin": a.PoolStart.String(), "dhcp_end": a.PoolEnd.String(), "recommended": a.Guest4.String(),
	}
	info := object{"ipv4": ipv4, "version": slirpVersion, "usernet": version().Version}
	if a.Prefix6.IsValid() {
		info["ipv6"] = object{"network": a.Prefix6.String(), "gateway": a.Gateway6.String(), "dns": a.DNS6.String()}
	}
	return object{"return": info}
}

// slirpAddr understands an address; missing and empty are the default.
func slirpAddr(v any, otherwise netip.Addr) (netip.Addr, bool) {
	switch s := v.(type) {
	case nil:
		return otherwise, true
	case string:
		if s == "" {
			return otherwise, true
		}
		a, err := netip.ParseAddr(s)
		return a.Unmap(), err == nil && a.Zone() == ""
	}
	return netip.Addr{}, false
}

// slirpPort understands a port, which is a number.
func slirpPort(v any) (uint16, bool) {
	f, ok := v.(float64)
	if !ok {
		return 0, false
	}
	p, err := strconv.ParseUint(strconv.FormatFloat(f, 'f', -1, 64), 10, 16)
	return uint16(p), err == nil && p != 0
}
