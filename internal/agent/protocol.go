package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// One request and its reply are one packet each on a SOCK_SEQPACKET socket, as
// JSON, with at most maxFDs descriptors beside it. The socket is one end of a
// pair, so that nobody but the parent can send on it.
const (
	maxMessage = 16 << 10
	maxFDs     = 4
)

// What can be asked of the agent.
const (
	opLink      = "link"
	opConfigure = "configure"
	opSetUp     = "set-up"
	opLook      = "look"
	opRoute6    = "default-route6"
	opSockets   = "sockets"
	opListening = "listening"
	opCutOff    = "cut-off"
	opBye       = "bye"
)

type request struct {
	Op        string     `json:"op"`
	Link      *LinkSpec  `json:"link,omitempty"`
	Addresses *Addresses `json:"addresses,omitempty"`
	On        bool       `json:"on,omitempty"`
	Name      string     `json:"name,omitempty"`
	// Addrs are of opListening: where clients of the servers come to.
	Addrs []netip.Addr `json:"addrs,omitempty"`
}

type reply struct {
	Error     string        `json:"error,omitempty"`
	Errno     syscall.Errno `json:"errno,omitempty"`
	Link      *Link         `json:"link,omitempty"`
	Status    *Status       `json:"status,omitempty"`
	Inside    *Inside       `json:"inside,omitempty"`
	View      *View         `json:"view,omitempty"`
	Count     int           `json:"count,omitempty"`
	Listening *Listening    `json:"listening,omitempty"`
}

// LinkKind chooses the device that a namespace gets.
type LinkKind string

// The kinds. The zero value is Auto.
const (
	Auto LinkKind = ""     // a TAP, or a veth pair where none is to be had
	TAP  LinkKind = "tap"  // a TAP
	Veth LinkKind = "veth" // a veth pair with a packet socket on its far end
)

// LinkSpec says what link to open.
type LinkSpec struct {
	Kind    LinkKind         `json:"kind,omitempty"`
	Name    string           `json:"name"`          // interface in the namespace
	MTU     int              `json:"mtu,omitempty"` // 0 leaves the kernel's default
	MAC     net.HardwareAddr `json:"mac,omitempty"` // of the interface; nil leaves the one it has, a random one where it is made
	Offload bool             `json:"offload,omitempty"`
}

// Link is an open link. Reading FD gives what the namespace sends.
type Link struct {
	FD      int              `json:"-"` // non-blocking, close-on-exec; the caller owns it
	Kind    LinkKind         `json:"kind"`
	Name    string           `json:"name"`
	MAC     net.HardwareAddr `json:"mac"` // of the interface in the namespace
	MTU     int              `json:"mtu"`
	VnetHdr bool             `json:"vnet_hdr"` // frames carry a virtio-net header
	Offload bool             `json:"offload"`  // checksum and TCP segmentation offload, both ways
	USO     bool             `json:"uso"`      // UDP segmentation offload, both ways
	// Existing is set for an interface that was there before and will stay.
	Existing bool `json:"existing"`
	// Buffer is the receive buffer of a veth link's socket in bytes, as the kernel
	// counts. What overflows it is lost, where a TAP would queue it.
	Buffer int `json:"buffer,omitempty"`
	// NoTAP says why Auto has become Veth, which is as good.
	NoTAP string `json:"no_tap,omitempty"`
	// Warnings tell what is not as asked for.
	Warnings []string `json:"warnings,omitempty"`
}

// Addresses is a static configuration. A zero prefix leaves the family out.
type Addresses struct {
	Addr4    netip.Prefix `json:"addr4,omitzero"`
	Gateway4 netip.Addr   `json:"gateway4,omitzero"`
	Addr6    netip.Prefix `json:"addr6,omitzero"`
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	Default6 bool         `json:"default6,omitempty"` // set the IPv6 default route; SetDefaultRoute6 changes it later
	// Yield sets no default route of a family that has one by another interface.
	Yield bool `json:"yield,omitempty"`
}

// Status tells what became of a configuration.
type Status struct {
	IPv6     bool     `json:"ipv6"`               // the interface speaks IPv6
	Warnings []string `json:"warnings,omitempty"` // what could not be done, and why
}

// A View is what an interface in the namespace looks like.
type View struct {
	Up       bool             `json:"up"`
	MAC      net.HardwareAddr `json:"mac"`
	MTU      int              `json:"mtu"`
	Addrs    []netip.Prefix   `json:"addrs"`             // without the link-local ones
	Gateway4 netip.Addr       `json:"gateway4,omitzero"` // of a default route by this interface
	Gateway6 netip.Addr       `json:"gateway6,omitzero"`
}

// remoteError is an error that happened in the agent.
type remoteError struct {
	text  string
	errno syscall.Errno
}

func (e *remoteError) Error() string { return e.text }

func (e *remoteError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// failed makes a reply of an error.
func failed(err error) reply {
	r := reply{Error: err.Error()}
	errors.As(err, &r.Errno)
	return r
}

// send writes one message in a single packet.
func send(fd int, message any, fds []int) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("message of %d bytes: at most %d pass", len(b), maxMessage)
	}
	return sendTo(fd, b, fds)
}

// sendTo writes b and descriptors in a single packet.
func sendTo(fd int, b []byte, fds []int) error {
	control := rights.Encode(fds)
	for {
		err := unix.Sendmsg(fd, b, control, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// decode reads one message out of what a receive gave.
func decode(b []byte, flags int, message any) error {
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return errors.New("message too long")
	}
	return json.Unmarshal(b, message)
}
