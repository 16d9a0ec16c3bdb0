package tap

import (
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/vnet"
)

// Adopt takes a TAP that somebody else has opened and attached (TUNSETIFF), as
// it is: with offload if it has virtio-net headers. The descriptor becomes
// non-blocking; it stays the caller's if there is an error.
func Adopt(fd int, offload bool) (Device, error) {
	ifr, err := unix.NewIfreq("")
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr)
	}
	if err != nil {
		return Device{}, fmt.Errorf("tap: adopt: the descriptor is no attached TAP: %w", err)
	}
	flags := ifr.Uint16()
	if flags&unix.IFF_TAP == 0 || flags&unix.IFF_NO_PI == 0 {
		return Device{}, fmt.Errorf("tap: adopt: %s is no TAP with IFF_TAP and IFF_NO_PI", ifr.Name())
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return Device{}, fmt.Errorf("tap: adopt: %w", err)
	}
	unix.CloseOnExec(fd)
	d := Device{FD: fd, Name: ifr.Name(), VnetHdr: flags&unix.IFF_VNET_HDR != 0, Persistent: persistent(fd)}
	if d.VnetHdr {
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnet.Size); err != nil {
			return Device{}, fmt.Errorf("tap: adopt: set the header size: %w", err)
		}
		if offload {
			d.Offload, d.USO = setOffload(fd)
		}
	}
	return d, nil
}

// HardwareAddr returns the link address of the interface behind a TAP.
func HardwareAddr(fd int) (net.HardwareAddr, error) {
	var ifr struct {
		name   [unix.IFNAMSIZ]byte
		family uint16
		addr   [14]byte
		_      [8]byte
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFHWADDR, uintptr(unsafe.Pointer(&ifr))); errno != 0 {
		return nil, fmt.Errorf("tap: read link address: %w", errno)
	}
	return net.HardwareAddr(append([]byte(nil), ifr.addr[:6]...)), nil
}
