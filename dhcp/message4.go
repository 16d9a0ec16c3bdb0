package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

// request4 is what a client's message says.
type request4 struct {
	client
	kind   dhcpv4.MessageType
	ciaddr netip.Addr // the zero Addr where the message has 0.0.0.0
	want   netip.Addr // requested address option
	server netip.Addr // server identifier option
	lease  time.Duration
	rapid  bool
	params []byte // parameter request list
	room   int    // bytes for options that the client accepts
	head   header4
}

// header4 is what an answer repeats.
type header4 struct {
	xid       dhcpv4.TransactionID
	flags     uint16
	chaddr    net.HardwareAddr
	hasClient bool // has a client identifier option
}

// Lengths in bytes: of the fixed part with the cookie, and of the datagram's
// IP and UDP headers, which count for the maximum message size (RFC 2131 §2).
const (
	fixed4   = 240
	headers4 = 28
)

var errRelay = errors.New("message of a relay")

// parse4 parses a client's message.
func parse4(b []byte) (request4, error) {
	var q request4
	m, err := decode4(b)
	if err != nil {
		return q, err
	}
	switch {
	case m.OpCode != dhcpv4.OpcodeBootRequest:
		return q, fmt.Errorf("opcode %d is no request", m.OpCode)
	case m.HWType != iana.HWTypeEthernet || len(m.ClientHWAddr) != 6:
		return q, fmt.Errorf("client's link address of type %d with %d bytes", m.HWType, len(m.ClientHWAddr))
	case !m.GatewayIPAddr.IsUnspecified():
		return q, errRelay
	}
	q.kind = m.MessageType()
	q.mac = m.ClientHWAddr
	q.ciaddr = addr4(m.ClientIPAddr)
	q.want = addr4(m.Options.Get(dhcpv4.OptionRequestedIPAddress))
	q.server = addr4(m.Options.Get(dhcpv4.OptionServerIdentifier))
	q.rapid = m.Options.Has(dhcpv4.GenericOptionCode(optRapidCommit))
	q.hostname = hostname(m.Options.Get(dhcpv4.OptionHostName))
	if l := m.Options.Get(dhcpv4.OptionIPAddressLeaseTime); len(l) == 4 {
		q.lease = time.Duration(binary.BigEndian.Uint32(l)) * time.Second
	}
	q.params = m.Options.Get(dhcpv4.OptionParameterRequestList)

	// Who does not name itself goes by type and link address; RFC 2132 §9.14
	// has clients name themselves the same way.
	q.id = m.Options.Get(dhcpv4.OptionClientIdentifier)
	q.head.hasClient = len(q.id) > 0
	if len(q.id) < 2 {
		q.id = append([]byte{byte(iana.HWTypeEthernet)}, q.mac...)
		q.head.hasClient = false
	}
	if len(q.id) > 255 {
		return q, fmt.Errorf("client identifier of %d bytes", len(q.id))
	}
	q.key = string(q.id)

	// RFC 2132 §9.10: at least 576. More than a frame of 1500 is not used.
	size := 576
	if l := m.Options.Get(dhcpv4.OptionMaximumDHCPMessageSize); len(l) == 2 {
		size = min(max(size, int(binary.BigEndian.Uint16(l))), 1500)
	}
	q.room = size - headers4 - fixed4 - 1 // for the end option
	q.head.xid, q.head.flags, q.head.chaddr = m.TransactionID, m.Flags, m.ClientHWAddr
	return q, nil
}

// decode4 decodes a message with the options that are in the sname and file
// fields, which the codec leaves out. A message that would make the codec panic
// is malformed.
func decode4(b []byte) (m *dhcpv4.DHCPv4, err error) {
	defer func() {
		if r := recover(); r != nil {
			m, err = nil, fmt.Errorf("decode message: %v", r)
		}
	}()
	if m, err = dhcpv4.FromBytes(b); err != nil {
		return nil, err
	}
	// RFC 2131 §4.1: the file field comes first. 108 and 44 are the offsets.
	if o := m.Options.Get(dhcpv4.OptionOptionOverload); len(o) == 1 {
		if o[0]&1 != 0 {
			err = m.Options.FromBytes(b[108:236])
		}
		if o[0]&2 != 0 && err == nil {
			err = m.Options.FromBytes(b[44:108])
		}
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// addr4 returns an address field or option, the zero Addr if it has none.
func addr4(b []byte) netip.Addr {
	a, ok := netip.AddrFromSlice(b)
	if !ok || !a.Is4() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

const optRapidCommit = 80 // RFC 4039

// marshal4 makes the message of an answer.
func marshal4(cfg *Config4, search []string, q request4, a answer4) []byte {
	m := &dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootReply,
		HWType:        iana.HWTypeEthernet,
		TransactionID: q.head.xid,
		Flags:         q.head.flags,
		ClientIPAddr:  net.IPv4zero,
		YourIPAddr:    net.IPv4zero,
		ServerIPAddr:  net.IPv4zero,
		GatewayIPAddr: net.IPv4zero,
		ClientHWAddr:  q.head.chaddr,
	}
	if a.addr.IsValid() {
		m.YourIPAddr = ipOf(a.addr)
	}
	if a.kind == dhcpv4.MessageTypeAck && q.ciaddr.IsValid() {
		m.ClientIPAddr = ipOf(q.ciaddr) // RFC 2131 table 3
	}
	o := options4{list: make(dhcpv4.Options), room: q.room}
	o.add(53, []byte{byte(a.kind)})
	o.add(54, cfg.Gateway.AsSlice())
	if q.head.hasClient {
		o.add(61, q.id) // RFC 6842
	}
	if a.rapid {
		o.add(optRapidCommit, nil)
	}
	if a.kind == dhcpv4.MessageTypeNak {
		o.add(56, []byte(a.text))
	} else {
		if a.lease > 0 {
			o.seconds(51, a.lease)
			o.seconds(58, a.lease/2) // T1 and T2: RFC 2131 §4.4.5
			o.seconds(59, a.lease*7/8)
		}
		o.parameters(cfg, search, q.params)
	}
	m.Options = o.list
	return m.ToBytes()
}

// options4 is a list of options that has a bound.
type options4 struct {
	list dhcpv4.Options
	room int
}

// add adds an option if it fits and is not there yet.
func (o *options4) add(code uint8, v []byte) {
	n := len(v) + 2*max(1, (len(v)+254)/255) // RFC 3396: in pieces of 255
	if n > o.room || o.list.Has(dhcpv4.GenericOptionCode(code)) {
		return
	}
	o.room -= n
	o.list[code] = v
}

func (o *options4) seconds(code uint8, d time.Duration) {
	o.add(code, binary.BigEndian.AppendUint32(nil, uint32(d/time.Second)))
}

// all4 are the parameters for a client that asks for none, in the order in
// which they matter.
var all4 = []byte{1, 3, 6, 26, 28, 12, 15, 121, 119}

// parameters adds what the client asks for, in its order until the message is
// full (RFC 2132 §9.8). It always gets the mask, without which the address is
// of no use, before everything else (RFC 2132 §3.3 wants it before the router).
func (o *options4) parameters(cfg *Config4, search []string, params []byte) {
	if len(params) == 0 {
		params = all4
	}
	o.add(1, net.CIDRMask(cfg.Prefix.Bits(), 32))
	if slices.Contains(params, 121) {
		o.parameter(cfg, search, 121) // RFC 3442: before 3, which it replaces
	}
	for _, p := range params {
		o.parameter(cfg, search, p)
	}
}

func (o *options4) parameter(cfg *Config4, search []string, code uint8) {
	switch code {
	case 3:
		o.add(3, cfg.Gateway.AsSlice())
	case 6:
		if len(cfg.DNS) > 0 {
			var b []byte
			for _, a := range cfg.DNS {
				b = append(b, a.AsSlice()...)
			}
			o.add(6, b)
		}
	case 12:
		if cfg.Hostname != "" {
			o.add(12, []byte(cfg.Hostname))
		}
	case 15:
		domain := cfg.Domain
		if domain == "" && len(search) > 0 && len(search[0]) <= 253 {
			domain = search[0]
		}
		if domain != "" {
			o.add(15, []byte(domain))
		}
	case 26:
		if cfg.MTU > 0 {
			o.add(26, binary.BigEndian.AppendUint16(nil, uint16(cfg.MTU)))
		}
	case 28:
		o.add(28, lastAddr(cfg.Prefix).AsSlice())
	case 119:
		// As many names as fit, if the option is not split more than needed.
		if b := compressed(search, o.room-2*(o.room/255+1)); len(b) > 0 {
			o.add(119, b)
		}
	case 121:
		if len(cfg.Routes) > 0 {
			o.add(121, routes4(cfg))
		}
	}
}

// routes4 encodes the configured routes and the default route.
func routes4(cfg *Config4) []byte {
	var b []byte
	def := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	rs := cfg.Routes
	if !slices.ContainsFunc(rs, func(r Route) bool { return r.Prefix.Bits() == 0 }) {
		rs = append(slices.Clone(rs), Route{def, cfg.Gateway})
	}
	for _, r := range rs {
		n := r.Prefix.Bits()
		b = append(b, byte(n))
		b = append(b, r.Prefix.Masked().Addr().AsSlice()[:(n+7)/8]...)
		b = append(b, r.Via.AsSlice()...)
	}
	return b
}
