package usernet

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/tap"
)

// attachment is the open link and who helps inside the namespace. Both helper
// and namespace are nil where a TAP was handed in.
type attachment struct {
	cfg   Config
	ns    *netns.Namespace
	agent *agent.Agent
	link  agent.Link
	owned bool // link.FD is ours to close

	cleaner agent.Cleaner
}

// attach opens the link of c.
func attach(ctx context.Context, c Config) (at *attachment, err error) {
	at = &attachment{cfg: c}
	defer func() {
		if err != nil {
			at.close()
		}
	}()
	if c.TapFile != nil {
		return at, at.adopt()
	}
	if c.PID != 0 {
		at.ns, err = netns.OpenPID(c.PID)
	} else {
		at.ns, err = netns.Open(c.NetnsPath)
	}
	if err != nil {
		return at, err
	}
	if at.ns.IsOwn() {
		return at, fmt.Errorf("attach to %s: it is the namespace that usernet itself is in, whose network would lead back to itself: give that of a container", at.ns.Path())
	}
	if at.agent, err = agent.Start(ctx, at.ns, agent.Options{Logger: c.Logger}); err != nil {
		return at, err
	}
	spec := agent.LinkSpec{Name: c.Ifname, MTU: c.MTU, MAC: c.MAC, Offload: !c.NoOffload}
	if c.Configure == ConfigureKeep {
		spec.MTU = 0
	}
	switch c.Link {
	case LinkTAP:
		spec.Kind = agent.TAP
	case LinkVeth:
		spec.Kind = agent.Veth
	}
	if at.link, err = at.agent.OpenLink(spec); err != nil {
		return at, err
	}
	at.owned = true
	if c.Configure == ConfigureKeep {
		at.link.MTU = c.MTU // which the interface has yet to get
	}
	if at.link.NoTAP != "" {
		c.Logger.Info("a veth pair takes the place of a TAP", "why", at.link.NoTAP)
	}
	for _, w := range at.link.Warnings {
		c.Logger.Warn(w)
	}
	return at, nil
}

// adopt takes the TAP that was handed in.
func (at *attachment) adopt() error {
	fd, err := dupFile(at.cfg.TapFile)
	if err != nil {
		return fmt.Errorf("take over TAP: %w", err)
	}
	at.link.FD, at.owned = fd, true
	if kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil {
		return at.adoptSocket(kind)
	}
	d, err := tap.Adopt(fd, !at.cfg.NoOffload)
	if err != nil {
		return fmt.Errorf("take over %s: %w", at.cfg.TapFile.Name(), err)
	}
	mac, err := tap.HardwareAddr(fd)
	if err != nil {
		return err
	}
	at.cfg.TapFile.Close()
	at.link = agent.Link{
		FD: fd, Kind: agent.TAP, Name: d.Name, MAC: mac, MTU: at.cfg.MTU,
		VnetHdr: d.VnetHdr, Offload: d.Offload, USO: d.USO, Existing: true,
	}
	return nil
}

// socketLink is the kind of a link that is a socket.
const socketLink agent.LinkKind = "socket"

// adoptSocket takes a socket whose packets are frames, such as a virtual
// machine has.
func (at *attachment) adoptSocket(kind int) error {
	if kind != unix.SOCK_SEQPACKET {
		return fmt.Errorf("take over %s: a socket has to keep frames apart: make it one of SOCK_SEQPACKET", at.cfg.TapFile.Name())
	}
	fd := at.link.FD
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("take over %s: %w", at.cfg.TapFile.Name(), err)
	}
	at.cfg.TapFile.Close()
	// Frames that come before the peer's address is known go to all.
	broadcast := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	at.link = agent.Link{FD: fd, Kind: socketLink, Name: "socket", MAC: broadcast, MTU: at.cfg.MTU, Existing: true}
	return nil
}

// configure sets the link up, with addresses and routes where that is ours to do.
func (at *attachment) configure(c Config, default6 bool) error {
	if at.agent == nil || c.Configure == ConfigureKeep {
		return nil
	}
	var status agent.Status
	var err error
	if c.Configure == ConfigureNone {
		status, err = at.agent.SetUp()
	} else {
		a := c.Addresses()
		set := agent.Addresses{Addr4: netip.PrefixFrom(a.Guest4, a.Prefix4.Bits()), Gateway4: a.Gateway4}
		if a.Prefix6.IsValid() && !c.SLAAC {
			set.Addr6, set.Gateway6, set.Default6 = netip.PrefixFrom(a.Guest6, a.Prefix6.Bits()), a.Gateway6, default6
		}
		if set.Yield = c.Network != ""; c.NoDefaultRoute {
			set.Gateway4, set.Gateway6, set.Default6 = netip.Addr{}, netip.Addr{}, false
		}
		status, err = at.agent.Configure(set)
	}
	for _, w := range status.Warnings {
		c.Logger.Warn(w)
	}
	return err
}

// setDefaultRoute6 sets or removes the route that configure has set.
func (at *attachment) setDefaultRoute6(on bool) error {
	if at.agent == nil || at.cfg.Configure != ConfigureStatic || at.cfg.SLAAC {
		return nil // router advertisements do it
	}
	return at.agent.SetDefaultRoute6(on)
}

// agentDone is closed when the helper has ended; it blocks for ever without one.
func (at *attachment) agentDone() <-chan struct{} {
	if at.agent == nil {
		return nil
	}
	return at.agent.Done()
}

func (at *attachment) forgetAgent() {
	at.agent.Close()
	at.agent = nil
}

// inode is the number that the kernel knows the namespace by, 0 where there is
// only its TAP.
func (at *attachment) inode() uint64 {
	if at.ns == nil {
		return 0
	}
	return at.ns.Inode()
}

// seesFiles tells why the helper sees the host's files, if it does.
func (at *attachment) seesFiles() string {
	if at.agent == nil || at.agent.SeesFiles() == nil {
		return ""
	}
	return at.agent.SeesFiles().Error()
}

// gone reports whether the namespace ends about now.
func (at *attachment) gone() bool {
	if at.ns == nil {
		return at.link.Kind == socketLink
	}
	ctx, cancel := context.WithTimeout(context.Background(), goneWithin)
	defer cancel()
	return at.ns.Watch(ctx) == nil
}

// deleted says of err, which is tap.ErrGone, what to do about it.
func (at *attachment) deleted(err error) error {
	if at.cfg.TapFile != nil {
		return fmt.Errorf("usernet: %w: open another and start usernet on it", err)
	}
	return fmt.Errorf("usernet: interface %s: %w by somebody in the namespace: start usernet again, which makes another", at.link.Name, err)
}

func (at *attachment) close() {
	at.cleaner.Close()
	if at.owned {
		closeFD(at.link.FD)
	}
	if at.agent != nil {
		at.agent.Close()
	}
	if at.ns != nil {
		at.ns.Close()
	}
}
