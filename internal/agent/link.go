package agent

import (
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/tap"
)

// txQueueLen is how many frames a TAP queues for its reader; more are dropped.
// The kernel's default of 1000 is less than a fast sender's burst of datagrams.
const txQueueLen = 4096

// openLink opens a link of the kind asked for. What a predecessor had is waited
// for: a veth pair goes some time after its owner, and a TAP is busy as long as
// its owner is dying.
func (n *network) openLink(spec LinkSpec) (Link, error) {
	if err := tap.CheckName(spec.Name); err != nil {
		return Link{}, fmt.Errorf("interface name %q: %w", spec.Name, err)
	}
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		link, err := n.openKind(spec)
		waited := time.Since(began)
		switch {
		case errors.Is(err, tap.ErrNameTaken) && n.passing(spec.Name) && waited < goneTimeout:
		case errors.Is(err, unix.EBUSY) && waited < busyTimeout:
		default:
			return link, err
		}
	}
}

// passing reports whether the interface is one of ours: its owner may be gone
// and the kernel about to take the pair away.
func (n *network) passing(name string) bool {
	l, err := n.handle.LinkByName(name)
	return err != nil || l.Attrs().ParentIndex == farIndex
}

func (n *network) openKind(spec LinkSpec) (Link, error) {
	switch spec.Kind {
	case TAP:
		return n.openTAP(spec)
	case Veth:
		return n.openVeth(spec)
	case Auto:
		link, err := n.openTAP(spec)
		if !errors.Is(err, tap.ErrNoTun) {
			return link, err
		}
		link, vethErr := n.openVeth(spec)
		if vethErr != nil {
			return Link{}, fmt.Errorf("%w; nor a veth pair: %w", err, vethErr)
		}
		link.NoTAP = err.Error()
		return link, nil
	}
	return Link{}, fmt.Errorf("unknown kind of link %q: there are tap and veth", spec.Kind)
}

func (n *network) openTAP(spec LinkSpec) (Link, error) {
	d, err := tap.Open(spec.Name, spec.Offload)
	if err != nil {
		return Link{}, err
	}
	link := Link{
		FD: d.FD, Kind: TAP, Name: d.Name, Existing: d.Persistent,
		VnetHdr: d.VnetHdr, Offload: d.Offload, USO: d.USO,
	}
	if spec.Offload && !d.Offload {
		link.Warnings = append(link.Warnings, "the kernel has no offload for this TAP: expect a fraction of the speed")
	}
	if err := n.prepareTAP(spec, &link); err != nil {
		unix.Close(d.FD)
		return Link{}, err
	}
	return link, nil
}

// prepareTAP sets what can be set before the interface is up.
func (n *network) prepareTAP(spec LinkSpec, link *Link) error {
	l, err := n.handle.LinkByName(link.Name)
	if err != nil {
		return fmt.Errorf("find %s: %w", link.Name, err)
	}
	if spec.MTU != 0 {
		if err := n.handle.LinkSetMTU(l, spec.MTU); err != nil {
			return fmt.Errorf("set MTU of %s to %d: %w", link.Name, spec.MTU, err)
		}
		l.Attrs().MTU = spec.MTU
	}
	if spec.MAC != nil {
		if err := n.handle.LinkSetHardwareAddr(l, spec.MAC); err != nil {
			return fmt.Errorf("set MAC of %s to %v: %w", link.Name, spec.MAC, err)
		}
		l.Attrs().HardwareAddr = spec.MAC
	}
	if l.Attrs().TxQLen < txQueueLen {
		if err := n.handle.LinkSetTxQLen(l, txQueueLen); err != nil {
			link.Warnings = append(link.Warnings, fmt.Sprintf("cannot set the queue length of %s: %v", link.Name, err))
		}
	}
	n.link = l
	link.MAC, link.MTU = l.Attrs().HardwareAddr, l.Attrs().MTU
	return nil
}

// The far end of a veth pair is alone in its namespace, but for lo. Its index is
// one that the namespace's end will not have: where they are equal, the kernel
// takes the two for one and may be a second late to tell of the carrier
// (linkwatch_urgent_event in net/core/link_watch.c).
const (
	farName  = "usernet0"
	farIndex = 1 << 24
)

const (
	goneTimeout = time.Second            // how long a veth pair may stay after its owner
	busyTimeout = 250 * time.Millisecond // how long a TAP may
)

// openVeth makes a veth pair with one end here and the far one in a network
// namespace of its own, which lives as long as the packet socket in it, and
// takes the pair along when that is closed.
func (n *network) openVeth(spec LinkSpec) (Link, error) {
	d, err := n.farEnd(spec)
	if err != nil {
		return Link{}, err
	}
	link := Link{
		FD: d.FD, Kind: Veth, Name: spec.Name,
		VnetHdr: d.VnetHdr, Offload: spec.Offload, USO: spec.Offload && d.USO,
	}
	link.Buffer, _ = unix.GetsockoptInt(d.FD, unix.SOL_SOCKET, unix.SO_RCVBUF)
	l, err := n.handle.LinkByName(spec.Name)
	if err != nil {
		unix.Close(d.FD)
		return Link{}, fmt.Errorf("find %s: %w", spec.Name, err)
	}
	if err := setFeatures(spec.Name, link.Offload, link.USO); err != nil {
		unix.Close(d.FD)
		return Link{}, fmt.Errorf("set offloads of %s: %w", spec.Name, err)
	}
	n.link = l
	link.MAC, link.MTU = l.Attrs().HardwareAddr, l.Attrs().MTU
	return link, nil
}

// farEnd visits a new network namespace, and makes the pair from there.
func (n *network) farEnd(spec LinkSpec) (d tap.Device, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return d, fmt.Errorf("make a second network namespace: %w", err)
	}
	defer func() {
		if back := netns.Enter(netnsFD); back != nil {
			// Requests would be answered in the wrong namespace from now on.
			panic(fmt.Sprintf("agent: return to the network namespace: %v", back))
		}
	}()
	disable6()
	h, err := newHandle()
	if err != nil {
		return d, err
	}
	defer h.Close()
	pair := netlink.NewVeth(netlink.NewLinkAttrs())
	pair.Name, pair.Index = farName, farIndex
	pair.MTU, pair.PeerMTU = spec.MTU, uint32(spec.MTU)
	pair.PeerName, pair.PeerHardwareAddr, pair.PeerNamespace = spec.Name, spec.MAC, netlink.NsFd(netnsFD)
	switch err := h.LinkAdd(pair); {
	case errors.Is(err, unix.EEXIST):
		return d, fmt.Errorf("make a veth pair %s: %w", spec.Name, tap.ErrNameTaken)
	case errors.Is(err, unix.EOPNOTSUPP):
		return d, fmt.Errorf("make a veth pair: %w: `modprobe veth` as root", err)
	case err != nil:
		return d, fmt.Errorf("make a veth pair: %w", err)
	}
	far, err := h.LinkByName(farName)
	if err != nil {
		return d, fmt.Errorf("find the far end: %w", err)
	}
	// A failure from here on leaves a pair whose far end nobody uses. It goes
	// with its namespace, when this thread leaves it.
	if err := silence(h, far); err != nil {
		return d, fmt.Errorf("silence the far end: %w", err)
	}
	// Up before the socket is bound, or the first read would fail (ENETDOWN).
	// Nothing can be missed: the namespace's end is still down.
	if err := h.LinkSetUp(far); err != nil {
		return d, fmt.Errorf("set the far end up: %w", err)
	}
	return tap.OpenPacket(far.Attrs().Index)
}

// disable6 switches IPv6 off for interfaces to come in the thread's network
// namespace. /proc/sys may be read-only; silence does the same by netlink.
func disable6() {
	for _, conf := range []string{"all", "default"} {
		_ = writeFile("ipv6/conf/"+conf+"/disable_ipv6", "1")
	}
}

// silence keeps the kernel at the far end from taking part: it has no address
// that it could answer for, neither ARP nor a link-local address nor multicast
// groups to report.
func silence(h *netlink.Handle, far netlink.Link) error {
	const addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE
	err := h.LinkSetIP6AddrGenMode(far, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if err := h.LinkSetARPOff(far); err != nil {
		return err
	}
	return h.LinkSetMulticastOff(far)
}
