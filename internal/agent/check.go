package agent

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/tap"
)

// The agent may be in the hands of the container's root (see hide.go), so an
// answer is taken for what the kernel says that it is.

// maxMTU is what no interface exceeds.
const maxMTU = 1 << 16

// check makes sure that the link is what was asked for, and fd one of its kind. What
// the kernel knows of it is put in the place of what the agent says.
func (l *Link) check(spec LinkSpec, fd int) error {
	switch {
	case l.Name != spec.Name:
		return fmt.Errorf("it is called %q", l.Name)
	case l.Kind != spec.Kind && spec.Kind != Auto:
		return fmt.Errorf("it is a %q", l.Kind)
	case len(l.MAC) != 6:
		return fmt.Errorf("its MAC is %v", l.MAC)
	case l.MTU <= 0 || l.MTU > maxMTU:
		return fmt.Errorf("its MTU is %d", l.MTU)
	}
	switch l.Kind {
	case TAP:
		return l.checkTAP(fd)
	case Veth:
		return l.checkPacket(fd)
	}
	return fmt.Errorf("it is a %q", l.Kind)
}

func (l *Link) checkTAP(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return errors.New("its descriptor is no device")
	}
	d, err := tap.Adopt(fd, l.Offload)
	if err != nil {
		return err
	}
	l.VnetHdr, l.Offload, l.USO, l.Existing = d.VnetHdr, d.Offload, d.USO, d.Persistent
	return nil
}

func (l *Link) checkPacket(fd int) error {
	if err := checkSocket(fd, unix.AF_PACKET, unix.SOCK_RAW); err != nil {
		return err
	}
	header, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR)
	if err != nil {
		return err
	}
	l.VnetHdr = header != 0
	return unix.SetNonblock(fd, true)
}

// checkSocket makes sure that fd is a socket of a kind.
func checkSocket(fd, domain, kind int) error {
	d, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	k, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err == nil && (d != domain || k != kind) {
		err = fmt.Errorf("its descriptor is a socket of domain %d and type %d", d, k)
	}
	return err
}

// check makes sure that the ports are some.
func (l *Listening) check() error {
	for _, p := range l.Ports {
		if p.Proto != unix.IPPROTO_TCP && p.Proto != unix.IPPROTO_UDP || p.From > p.To {
			return fmt.Errorf("the answer has bad ports: %+v", p)
		}
	}
	return nil
}

// clean takes from the texts what could upset a terminal.
func (r *reply) clean() {
	texts := []*string{&r.Error}
	if r.Link != nil {
		texts = append(texts, &r.Link.NoTAP)
		for i := range r.Link.Warnings {
			texts = append(texts, &r.Link.Warnings[i])
		}
	}
	if r.Status != nil {
		for i := range r.Status.Warnings {
			texts = append(texts, &r.Status.Warnings[i])
		}
	}
	if r.Inside != nil {
		texts = append(texts, &r.Inside.Error4, &r.Inside.Error6)
	}
	for _, t := range texts {
		*t = strings.Map(func(c rune) rune {
			if !unicode.IsPrint(c) {
				return ' '
			}
			return c
		}, *t)
	}
}
