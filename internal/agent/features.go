package agent

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Features of a network device by the names that ethtool has for them
// (net/ethtool/common.c), for the namespace's end of a veth pair.
var (
	tcpFeatures = []string{"tx-checksum-ip-generic", "tx-scatter-gather", "tx-generic-segmentation",
		"tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation"}
	udpFeatures = []string{"tx-udp-segmentation"}
	// What a virtio-net header cannot tell of: a frame that leaves with one of
	// them is lost at the packet socket.
	strangeFeatures = []string{"tx-vlan-hw-insert", "tx-vlan-stag-hw-insert", "tx-gso-partial", "tx-gso-list",
		"tx-gre-segmentation", "tx-gre-csum-segmentation", "tx-ipxip4-segmentation", "tx-ipxip6-segmentation",
		"tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation", "tx-sctp-segmentation", "tx-checksum-sctp",
		"tx-esp-segmentation",
		"tx-tcp-accecn-segmentation", "tx-tcp-mangleid-segmentation", "tx-tunnel-remcsum-segmentation", "tx-fcoe-segmentation"}
)

// setFeatures switches the offloads of an interface on or off.
func setFeatures(name string, tcp, udp bool) error {
	want := make(map[string]bool)
	for _, f := range tcpFeatures {
		want[f] = tcp
	}
	for _, f := range udpFeatures {
		want[f] = udp
	}
	for _, f := range strangeFeatures {
		want[f] = false
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := featureNames(fd, name)
	if err != nil {
		return fmt.Errorf("list features: %w", err)
	}
	return requestFeatures(fd, name, names, want)
}

// featureNames lists the kernel's features in the order of their bits.
func featureNames(fd int, device string) ([]string, error) {
	const featureSet, nameLen = 4, 32 // ETH_SS_FEATURES, ETH_GSTRING_LEN
	info := struct {
		cmd, reserved uint32
		mask          uint64
		length        uint32
	}{cmd: unix.ETHTOOL_GSSET_INFO, mask: 1 << featureSet}
	if err := ethtool(fd, device, unsafe.Pointer(&info)); err != nil {
		return nil, err
	}
	// struct ethtool_gstrings: command, set, length, then the names.
	const head = 12
	b := make([]uint32, (head+int(info.length)*nameLen)/4)
	b[0], b[1], b[2] = unix.ETHTOOL_GSTRINGS, featureSet, info.length
	if err := ethtool(fd, device, unsafe.Pointer(&b[0])); err != nil {
		return nil, err
	}
	text := unsafe.Slice((*byte)(unsafe.Pointer(&b[0])), len(b)*4)[head:]
	names := make([]string, info.length)
	for i := range names {
		names[i] = unix.ByteSliceToString(text[i*nameLen : (i+1)*nameLen])
	}
	return names, nil
}

// requestFeatures asks for the features in want, those of them that there are.
func requestFeatures(fd int, device string, names []string, want map[string]bool) error {
	// struct ethtool_sfeatures: command, blocks, then valid and requested bits.
	blocks := (len(names) + 31) / 32
	b := make([]uint32, 2+2*blocks)
	b[0], b[1] = unix.ETHTOOL_SFEATURES, uint32(blocks)
	for i, name := range names {
		on, ok := want[name]
		if !ok {
			continue
		}
		b[2+i/32*2] |= 1 << (i % 32)
		if on {
			b[2+i/32*2+1] |= 1 << (i % 32)
		}
	}
	err := ethtool(fd, device, unsafe.Pointer(&b[0]))
	// The kernel refuses features that the driver cannot change at all.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("change features: %w", err)
	}
	return err
}

func ethtool(fd int, device string, data unsafe.Pointer) error {
	var ifr struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(ifr.name[:unix.IFNAMSIZ-1], device)
	ifr.data = data
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifr)))
	if errno != 0 {
		return errno
	}
	return nil
}
