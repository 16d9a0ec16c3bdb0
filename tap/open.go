package tap

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/vnet"
)

// devicePath is where every distribution has the TUN/TAP clone device.
const devicePath = "/dev/net/tun"

// ErrNoTun means that no TAP can be had here, whatever its name: the clone
// device is missing, closed to this user, or not what it should be.
var ErrNoTun = errors.New("no TAP device to be had")

// ErrNameTaken means that the namespace has an interface of that name already,
// and no TAP that could be used.
var ErrNameTaken = errors.New("the name is in use: choose another interface name")

// A Device is an open link, seen from its far end: what is read from it the
// namespace has sent, what is written to it the namespace receives. One read or
// write is one Ethernet frame, behind a virtio-net header of vnet.Size bytes
// where VnetHdr is set.
type Device struct {
	FD         int    // non-blocking, close-on-exec; the caller owns it
	Name       string // interface in the namespace; empty for a packet socket
	VnetHdr    bool   // frames carry a virtio-net header
	Offload    bool   // checksums are left open and TCP comes and goes in super-frames
	USO        bool   // UDP does, too
	Persistent bool   // the interface was there before and stays
}

// Open opens the TAP called name in the calling thread's network namespace, and
// makes it unless somebody made it before. Without offload it is a plain one,
// as it is where the kernel knows no virtio-net headers.
func Open(name string, offload bool) (Device, error) {
	if err := CheckName(name); err != nil {
		return Device{}, fmt.Errorf("tap: open %q: %w", name, err)
	}
	var d Device
	err := errPlain
	if offload {
		d, err = openVnet(name)
	}
	if errors.Is(err, errPlain) {
		d, err = openPlain(name)
	}
	if err != nil {
		return Device{}, fmt.Errorf("tap: open %s: %w", name, err)
	}
	return d, nil
}

// errPlain sends Open to a TAP without headers.
var errPlain = errors.New("the kernel has no virtio-net headers")

// openVnet opens a TAP that takes super-frames from the kernel and gives them
// to it. It speaks to the kernel itself because water cannot ask for headers.
func openVnet(name string) (Device, error) {
	// Non-blocking from the start: the runtime's poller refuses a TAP that was
	// not set up yet, and a blocking one cannot be woken by its closing.
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return Device{}, explainOpen(err)
	}
	d, err := setUp(fd, name)
	if err != nil {
		unix.Close(fd)
		return Device{}, err
	}
	return d, nil
}

func setUp(fd int, name string) (Device, error) {
	const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	ifr, err := attach(fd, name, flags)
	if errors.Is(err, unix.EINVAL) {
		// Somebody's multi-queue TAP lets only those in who say so. A kernel
		// without the flag refuses a name that is free.
		if !exists(name) {
			return Device{}, errPlain
		}
		ifr, err = attach(fd, name, flags|unix.IFF_MULTI_QUEUE)
	}
	if err != nil {
		return Device{}, explainAttach(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnet.Size); err != nil {
		return Device{}, fmt.Errorf("set the header size: %w", err)
	}
	d := Device{FD: fd, Name: ifr.Name(), VnetHdr: true, Persistent: persistent(fd)}
	d.Offload, d.USO = setOffload(fd)
	return d, nil
}

func attach(fd int, name string, flags uint16) (*unix.Ifreq, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	ifr.SetUint16(flags)
	return ifr, unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
}

// setOffload asks for all that the kernel knows. UDP segmentation came later
// (Linux 6.2), and only for both families at once.
func setOffload(fd int) (offload, uso bool) {
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	const udp = unix.TUN_F_USO4 | unix.TUN_F_USO6
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|udp) == nil {
		return true, true
	}
	return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp) == nil, false
}

// openPlain opens a TAP that carries bare frames.
func openPlain(name string) (Device, error) {
	// water sets or clears the persistence, so it has to be told of a TAP that
	// somebody made persistent.
	config := water.Config{DeviceType: water.TAP}
	config.Name = name
	config.Persist = exists(name)
	ifce, err := water.New(config)
	if errors.Is(err, unix.EINVAL) && config.Persist {
		config.MultiQueue = true
		ifce, err = water.New(config)
	}
	if err != nil {
		if _, openErr := os.Stat(devicePath); openErr != nil || errors.Is(err, unix.EACCES) {
			return Device{}, explainOpen(err)
		}
		return Device{}, explainAttach(err)
	}
	defer ifce.Close()
	file, ok := ifce.ReadWriteCloser.(*os.File)
	if !ok {
		return Device{}, fmt.Errorf("water gave a %T, not a file", ifce.ReadWriteCloser)
	}
	return takePlain(file, ifce.Name(), config.Persist)
}

// takePlain takes the descriptor out of water's file.
func takePlain(file *os.File, name string, persistent bool) (Device, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return Device{}, err
	}
	fd := -1
	var opErr error
	err = raw.Control(func(old uintptr) {
		// A TAP that somebody left with headers or offloads keeps the latter.
		_ = unix.IoctlSetInt(int(old), unix.TUNSETOFFLOAD, 0)
		fd, opErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, opErr); err != nil {
		return Device{}, fmt.Errorf("duplicate descriptor: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return Device{}, fmt.Errorf("set non-blocking: %w", err)
	}
	return Device{FD: fd, Name: name, Persistent: persistent}, nil
}

// persistent reports whether the TAP open at fd outlives it.
func persistent(fd int) bool {
	ifr, err := unix.NewIfreq("")
	if err != nil || unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr) != nil {
		return false
	}
	return ifr.Uint16()&unix.IFF_PERSIST != 0
}

// exists reports whether the namespace has an interface of that name.
func exists(name string) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	return err == nil && unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr) == nil
}

func explainOpen(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: %s is missing: mount it into this container, or use a veth link", ErrNoTun, devicePath)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: the kernel has no tun driver: `modprobe tun` as root, or use a veth link", ErrNoTun)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %s is closed to this user: `chmod 0666 %s` as root, or use a veth link", ErrNoTun, devicePath, devicePath)
	}
	return fmt.Errorf("open %s: %w", devicePath, err)
}

func explainAttach(err error) error {
	switch {
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: %s is something else: mount the real one, or use a veth link", ErrNoTun, devicePath)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: another process has this TAP open: end it, or choose another interface name", err)
	case errors.Is(err, unix.EINVAL):
		return ErrNameTaken
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: making a TAP is forbidden: %w: it takes CAP_NET_ADMIN in the namespace, and the security module's leave", ErrNoTun, err)
	}
	return fmt.Errorf("make the TAP: %w", err)
}

// CheckName refuses interface names that the kernel would refuse, or read as a
// pattern.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("an interface needs a name")
	case len(name) >= unix.IFNAMSIZ:
		return fmt.Errorf("the interface name has %d bytes, the kernel takes %d", len(name), unix.IFNAMSIZ-1)
	case name == ".", name == "..", strings.ContainsFunc(name, forbidden):
		return errors.New("an interface name has no spaces, control characters, slashes, colons or percent signs")
	}
	return nil
}

func forbidden(r rune) bool {
	return r <= ' ' || r == 0x7f || r == '/' || r == ':' || r == '%'
}
