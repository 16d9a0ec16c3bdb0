package e2e

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/rig"
)

// TestSYNFlood: while the guest begins connections at full speed that it never
// completes, another connection of it lives on, and afterwards new ones are made.
// USERNET_FLOOD is for how long; the times of the other connection are
// measured beside those at rest and with a processor kept busy otherwise.
func TestSYNFlood(t *testing.T) {
	rig.NeedUsernet(t)
	rig.NeedTools(t, "ping", "dig")
	length := span(t, "USERNET_FLOOD")
	duration := max(length, time.Second)
	w := onTap(t)
	w.attach(t)
	worker := workerOf(t, w)
	pace := rig.Pace{Addr: web(false, rig.Services.Echo), For: duration}
	flood := rig.SYNFlood{Interface: "tap0", Gateway: w.Gateway4, From: w.Guest4, For: duration + time.Second}
	limit := 2*duration + rig.Patience
	measure := func(what string, busy bool) (rig.Times, int) {
		var work sync.WaitGroup
		sent := 0
		if busy {
			work.Go(func() {
				var err error
				if sent, err = rig.SendSYNs.Within(limit).Try(w.Guest, flood); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(500 * time.Millisecond)
		}
		times := rig.MeasurePace.Within(limit).On(t, w.Guest, pace)
		work.Wait()
		t.Logf("%-20s %6d messages there and back: median %v, p99 %v, longest %v; %d SYNs", what, times.Count, times.P50, times.P99, times.Greatest, sent)
		return times, sent
	}
	if length > 0 {
		measure("at rest", false)
		measure("processor busy", true)
	}
	open, refused := rig.Services.Echo, 4
	flood.To = []netip.AddrPort{
		netip.AddrPortFrom(rig.Web4, uint16(open)), netip.AddrPortFrom(rig.Web4, uint16(refused)),
	}
	if _, sent := measure("flood", true); sent == 0 {
		t.Error("no SYN was sent")
	}
	alive(t, w, worker)
	t.Log(dropped(t, w))
}
