package dhcp

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// maxMessage is the longest message that is looked at. Clients' messages fit in
// the smallest MTU; the codecs are not made for much longer hostile ones (the
// names of a list can be hundreds of times as long as their encoding).
const maxMessage = 2048

// serve reads datagrams from conn, which it closes when ctx ends, and sends what
// handle answers.
func serve(ctx context.Context, conn net.PacketConn, log *slog.Logger, handle func(now time.Time, b []byte, from netip.Addr) ([]byte, net.Addr)) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	buf := make([]byte, maxMessage+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("dhcp: read message: %w", err)
		}
		if n > maxMessage {
			continue
		}
		answer, to := handle(time.Now(), buf[:n], addrOf(from))
		if answer == nil {
			continue
		}
		if _, err := conn.WriteTo(answer, to); err != nil {
			log.Debug("answer not sent", "to", to, "err", err)
		}
	}
}

// addrOf returns the IP address of a conn's peer.
func addrOf(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap()
	case *net.IPAddr:
		ip, _ := netip.AddrFromSlice(a.IP)
		return ip.Unmap().WithZone(a.Zone)
	}
	return netip.Addr{}
}

func ipOf(a netip.Addr) net.IP { return net.IP(a.AsSlice()) }

func ipsOf(as []netip.Addr) []net.IP {
	ips := make([]net.IP, len(as))
	for i, a := range as {
		ips[i] = ipOf(a)
	}
	return ips
}

func orDiscard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// note is a line for the log, about what was decided.
type note struct {
	level slog.Level
	text  string
}

// rate bounds events to perSecond after a burst, since what causes them comes
// from guests.
type rate struct {
	burst, perSecond float64
	left             float64
	last             time.Time
	refused          int
}

// allow reports whether one more event is in the bounds.
func (r *rate) allow(now time.Time) bool {
	if r.last.IsZero() {
		r.left = r.burst
	} else {
		r.left = min(r.burst, r.left+now.Sub(r.last).Seconds()*r.perSecond)
	}
	r.last = now
	if r.left < 1 {
		r.refused++
		return false
	}
	r.left--
	return true
}

// write logs n if the rate allows it, and how many lines were left out before.
func (r *rate) write(now time.Time, log *slog.Logger, n note, args ...any) {
	if n.text == "" || !log.Enabled(context.Background(), n.level) || !r.allow(now) {
		return
	}
	if n := len(args) - 2; n >= 0 && args[n+1] == (netip.Addr{}) {
		args = args[:n] // there is no address to tell
	}
	if r.refused > 0 {
		args = append(args, "suppressed", r.refused)
		r.refused = 0
	}
	log.Log(context.Background(), n.level, n.text, args...)
}
