package rig

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A SYNFlood asks a guest's node to begin connections that it never completes, from
// ever new ports, as fast as its interface takes them.
type SYNFlood struct {
	Interface string
	Gateway   netip.Addr // whose link address they go to
	From      netip.Addr // IPv4
	To        []netip.AddrPort
	For       time.Duration
}

// SendSYNs sends them and returns how many were taken. Without destinations it only
// keeps a processor as busy.
var SendSYNs = NewFunc("rig.sendSYNs", func(ctx context.Context, f SYNFlood) (int, error) {
	iface, mac, fd, err := openInterface(f.Interface, f.Gateway)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	ll := &unix.SockaddrLinklayer{Ifindex: iface.Index}
	var frames [][]byte
	for _, to := range f.To {
		frames = append(frames, synFrame(iface.HardwareAddr, mac, f.From, to))
	}
	sent := 0
	for n, until := 0, time.Now().Add(f.For); time.Now().Before(until) && ctx.Err() == nil; {
		for range 1024 {
			n++
			if len(frames) == 0 {
				FixChecksums(synFrame(iface.HardwareAddr, mac, f.From, netip.AddrPortFrom(f.Gateway, 1)))
				continue
			}
			frame := frames[n%len(frames)]
			binary.BigEndian.PutUint16(frame[ethLen+20:], uint16(1024+n%60000))
			binary.BigEndian.PutUint32(frame[ethLen+24:], uint32(n)*2654435761)
			FixChecksums(frame)
			switch err := unix.Sendto(fd, frame, 0, ll); err {
			case nil:
				sent++
			case unix.ENOBUFS, unix.EAGAIN:
			default:
				return sent, fmt.Errorf("send frame: %w", err)
			}
		}
	}
	return sent, ctx.Err()
})

// synFrame returns a frame with a SYN, but for its port, number and checksums.
func synFrame(from, to net.HardwareAddr, src netip.Addr, dst netip.AddrPort) []byte {
	f := make([]byte, ethLen+40)
	copy(f, to)
	copy(f[6:], from)
	binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IP)
	ip, tcp := f[ethLen:], f[ethLen+20:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], 40)
	copy(ip[12:], src.AsSlice())
	copy(ip[16:], dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(tcp[2:], dst.Port())
	tcp[12], tcp[13] = 5<<4, 2 // SYN
	binary.BigEndian.PutUint16(tcp[14:], 65535)
	return f
}

// A Pace asks for the times that messages take to an echo server and back, one
// after the other on one connection.
type Pace struct {
	Addr string
	For  time.Duration
}

// Times are those of a Pace. P50 and P99 are quantiles.
type Times struct {
	Count              int
	P50, P99, Greatest time.Duration
}

// MeasurePace measures them.
var MeasurePace = NewFunc("rig.measurePace", func(ctx context.Context, p Pace) (Times, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.Addr)
	if err != nil {
		return Times{}, err
	}
	defer c.Close()
	var all []time.Duration
	b := make([]byte, 64)
	for until := time.Now().Add(p.For); time.Now().Before(until); {
		began := time.Now()
		if err := c.SetDeadline(began.Add(Patience)); err != nil {
			return Times{}, err
		}
		if _, err := c.Write(b); err != nil {
			return Times{}, err
		}
		for got := 0; got < len(b); {
			n, err := c.Read(b[got:])
			if err != nil {
				return Times{}, err
			}
			got += n
		}
		all = append(all, time.Since(began))
		time.Sleep(time.Millisecond)
	}
	if len(all) == 0 {
		return Times{}, nil
	}
	slices.Sort(all)
	return Times{Count: len(all), P50: all[len(all)/2], P99: all[len(all)*99/100], Greatest: all[len(all)-1]}, nil
})
