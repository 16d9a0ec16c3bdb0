package capture

import (
	"encoding/binary"
	"net/netip"
)

// EtherTypes and protocol numbers, as IANA has assigned them.
const (
	typeIPv4 = 0x0800
	typeARP  = 0x0806
	typeIPv6 = 0x86dd

	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

// packet is what filters ask of a frame. What the frame does not have is zero.
type packet struct {
	kind             uint16 // EtherType
	proto            uint8  // above IP
	hasPorts         bool
	srcPort, dstPort uint16
	src, dst         netip.Addr
}

// parse reads the headers that b, an Ethernet frame or the beginning of one, has.
func (p *packet) parse(b []byte) {
	*p = packet{}
	const ethernet = 14
	if len(b) < ethernet {
		return
	}
	p.kind = binary.BigEndian.Uint16(b[12:])
	b = b[ethernet:]
	switch p.kind {
	case typeIPv4:
		p.parseIPv4(b)
	case typeIPv6:
		p.parseIPv6(b)
	case typeARP: // RFC 826, of Ethernet and IPv4
		if len(b) >= 28 && b[4] == 6 && b[5] == 4 {
			p.src, p.dst = netip.AddrFrom4([4]byte(b[14:18])), netip.AddrFrom4([4]byte(b[24:28]))
		}
	}
}

func (p *packet) parseIPv4(b []byte) { // RFC 791
	if len(b) < 20 {
		return
	}
	p.src, p.dst, p.proto = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9]
	head := int(b[0]&15) * 4
	if later := binary.BigEndian.Uint16(b[6:])&0x1fff != 0; !later && head >= 20 && head <= len(b) {
		p.parsePorts(b[head:])
	}
}

func (p *packet) parseIPv6(b []byte) { // RFC 8200
	if len(b) < 40 {
		return
	}
	p.src, p.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	next := b[6]
	b = b[40:]
	for {
		const hopByHop, routing, fragment, options = 0, 43, 44, 60
		size := 8
		switch next {
		case hopByHop, routing, options:
			if len(b) >= 2 {
				size += int(b[1]) * 8
			}
		case fragment:
			if len(b) >= 8 && binary.BigEndian.Uint16(b[2:])&^7 != 0 {
				p.proto = b[0]
				return // a later one
			}
		default:
			p.proto = next
			p.parsePorts(b)
			return
		}
		if len(b) < size {
			return
		}
		next, b = b[0], b[size:]
	}
}

func (p *packet) parsePorts(b []byte) {
	if p.hasPorts = len(b) >= 4 && (p.proto == protoTCP || p.proto == protoUDP); p.hasPorts {
		p.srcPort, p.dstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	}
}
