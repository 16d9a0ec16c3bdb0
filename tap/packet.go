package tap

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// packetBuffer is asked for in both directions of a packet socket. A super-frame
// counts with about 70 KiB, and nothing holds the sender back when there is no
// room: the frame is lost. Beyond net.core.rmem_max only root gets its wish.
const packetBuffer = 8 << 20

// OpenPacket opens a packet socket on the interface with that index in the
// calling thread's network namespace. It behaves as a TAP whose namespace is
// the one at the other end of the veth pair that the interface belongs to, with
// these differences. While that end is down, what is written is lost without an
// error (a TAP gives EIO). When the pair is deleted one read gives ENETDOWN, all
// later ones EAGAIN, and a write ENXIO (a TAP gives EBADFD for ever). A read may
// give EINVAL for a frame whose offload no virtio-net header can tell of, and
// the frame is lost. A frame longer than the buffer is cut short, as with a TAP.
func OpenPacket(index int) (Device, error) {
	d, err := openPacket(index)
	if err != nil {
		return Device{}, fmt.Errorf("tap: open packet socket: %w", err)
	}
	return d, nil
}

func openPacket(index int) (Device, error) {
	// Protocol 0 keeps the socket deaf until it is bound to its interface.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Device{}, err
	}
	if err := bindPacket(fd, index); err != nil {
		unix.Close(fd)
		return Device{}, err
	}
	return Device{FD: fd, VnetHdr: true, Offload: true, USO: packetUSO()}, nil
}

func bindPacket(fd, index int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("set PACKET_VNET_HDR: %w", err)
	}
	// Linux 4.20. Without it every frame written would come back as one read.
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return fmt.Errorf("set PACKET_IGNORE_OUTGOING: %w", err)
	}
	setBuffer(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
	setBuffer(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
	// The kernel wants the protocol in network order.
	all := binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff})
	addr := unix.SockaddrLinklayer{Protocol: all, Ifindex: index}
	if err := unix.Bind(fd, &addr); err != nil {
		return fmt.Errorf("bind to interface %d: %w", index, err)
	}
	return nil
}

// setBuffer enlarges a socket buffer as far as the caller may.
func setBuffer(fd, force, limited int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, packetBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, limited, packetBuffer)
	}
}

// packetUSO reports whether a virtio-net header can tell of UDP super-frames:
// since Linux 6.2, and nothing short of sending one tells otherwise.
func packetUSO() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 2)
}
