package dhcp

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

// maxIAs is how many identity associations of one message are looked at.
const maxIAs = 4

// ia is an identity association for addresses, of a client.
type ia struct {
	id    [4]byte
	addrs []netip.Addr
}

// request6 is what a client's message says.
type request6 struct {
	client // of the client; the key of an IA is made from it
	kind   dhcpv6.MessageType
	xid    dhcpv6.TransactionID
	ias    []ia
	// others are options that ask for what there is not: temporary addresses
	// and prefixes.
	others []dhcpv6.Option
	rapid  bool
	asked  dhcpv6.OptionCodes // nil if the client has no option request option
}

var (
	errServerID  = errors.New("for another server, or its server identifier has no business there")
	errNoClient  = errors.New("no client identifier")
	errDUID      = errors.New("malformed DUID")
	errNotLocal  = errors.New("not from a link-local address")
	errTooManyIA = errors.New("too many identity associations")
	errIAInInfo  = errors.New("information request with an identity association")
	errWrongKind = errors.New("not a message for a server")
)

// parse6 parses a client's message. It holds the messages to RFC 8415 §16,
// which says what to discard.
func parse6(b []byte, from netip.Addr, duid []byte) (request6, error) {
	var q request6
	if !from.IsLinkLocalUnicast() || !from.Is6() {
		return q, errNotLocal
	}
	kind, opts, err := decode6(b)
	if err != nil {
		return q, err
	}
	q.kind = kind
	copy(q.xid[:], b[1:4])
	q.id = duidOf(opts, dhcpv6.OptionClientID)
	server := duidOf(opts, dhcpv6.OptionServerID)
	if err := valid6(kind, q.id, server, duid); err != nil {
		return q, err
	}
	q.key = string(q.id)
	q.mac = linkAddr6(q.id, from)
	for _, o := range opts {
		switch o := o.(type) {
		case *dhcpv6.OptIANA:
			q.ias = append(q.ias, iaOf(o))
		case *dhcpv6.OptIATA, *dhcpv6.OptIAPD:
			q.others = append(q.others, o)
		case *dhcpv6.OptFQDN:
			if o.DomainName != nil && len(o.DomainName.Labels) > 0 {
				q.hostname = hostname([]byte(o.DomainName.Labels[0]))
			}
		}
		if o.Code() == dhcpv6.OptionRapidCommit {
			q.rapid = true
		}
	}
	q.asked = dhcpv6.MessageOptions{Options: opts}.RequestedOptions()
	switch {
	case len(q.ias)+len(q.others) > maxIAs:
		return q, errTooManyIA
	case kind == dhcpv6.MessageTypeInformationRequest && len(q.ias)+len(q.others) > 0:
		return q, errIAInInfo // RFC 8415 §16.12
	}
	return q, nil
}

// valid6 checks the presence of identifiers (RFC 8415 §16.2–16.12).
func valid6(kind dhcpv6.MessageType, client, server, duid []byte) error {
	ours := bytes.Equal(server, duid)
	switch kind {
	case dhcpv6.MessageTypeSolicit, dhcpv6.MessageTypeConfirm, dhcpv6.MessageTypeRebind:
		if server != nil {
			return errServerID
		}
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeDecline, dhcpv6.MessageTypeRelease:
		if !ours {
			return errServerID
		}
	case dhcpv6.MessageTypeInformationRequest:
		if server != nil && !ours {
			return errServerID
		}
		if client == nil {
			return nil // RFC 8415 §18.2.6 lets it stay anonymous
		}
	default:
		return errWrongKind
	}
	// RFC 8415 §11.1: a type of two bytes, then 1 to 128 bytes.
	switch {
	case client == nil:
		return errNoClient
	case len(client) < 3 || len(client) > 130:
		return errDUID
	}
	return nil
}

// decode6 decodes a message. A message that would make the codec panic is
// malformed.
func decode6(b []byte) (kind dhcpv6.MessageType, opts dhcpv6.Options, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("decode message: %v", r)
		}
	}()
	if len(b) < dhcpv6.MessageHeaderSize {
		return 0, nil, fmt.Errorf("message of %d bytes", len(b))
	}
	err = opts.FromBytesWithParser(b[4:], option6)
	return dhcpv6.MessageType(b[0]), opts, err
}

// option6 parses the options that matter and leaves the others alone. A DUID
// stays opaque (RFC 8415 §11): the codec would be choosy about the content.
func option6(code dhcpv6.OptionCode, b []byte) (dhcpv6.Option, error) {
	switch code {
	case dhcpv6.OptionIANA, dhcpv6.OptionIATA, dhcpv6.OptionIAPD, dhcpv6.OptionORO:
		return dhcpv6.ParseOption(code, b)
	case dhcpv6.OptionFQDN:
		// A name nobody needs is no reason to refuse a client.
		if o, err := dhcpv6.ParseOption(code, b); err == nil {
			return o, nil
		}
	}
	return &dhcpv6.OptionGeneric{OptionCode: code, OptionData: bytes.Clone(b)}, nil
}

// duidOf returns the DUID in the option, nil if there is none.
func duidOf(opts dhcpv6.Options, code dhcpv6.OptionCode) []byte {
	o := opts.GetOne(code)
	if o == nil {
		return nil
	}
	return append([]byte{}, o.ToBytes()...)
}

// linkAddr6 returns the client's link address, from a DUID of type LLT or LL
// (RFC 8415 §11.2, §11.4), else from an EUI-64 interface identifier (RFC 4291
// appendix A), else nil.
func linkAddr6(duid []byte, from netip.Addr) net.HardwareAddr {
	ethernet := func(n int) bool { return len(duid) == n+6 && duid[2] == 0 && duid[3] == byte(iana.HWTypeEthernet) }
	if len(duid) > 4 && duid[0] == 0 {
		switch {
		case duid[1] == byte(dhcpv6.DUID_LLT) && ethernet(8):
			return bytes.Clone(duid[8:])
		case duid[1] == byte(dhcpv6.DUID_LL) && ethernet(4):
			return bytes.Clone(duid[4:])
		}
	}
	if x := from.As16(); x[11] == 0xff && x[12] == 0xfe {
		return net.HardwareAddr{x[8] ^ 2, x[9], x[10], x[13], x[14], x[15]}
	}
	return nil
}

func iaOf(o *dhcpv6.OptIANA) ia {
	a := ia{id: o.IaId}
	for _, x := range o.Options.Addresses() {
		if ip, ok := netip.AddrFromSlice(x.IPv6Addr); ok {
			a.addrs = append(a.addrs, ip)
		}
	}
	return a
}

// marshal6 makes the message of an answer.
func marshal6(cfg *Config6, duid []byte, search []string, q request6, a answer6) []byte {
	m := &dhcpv6.Message{MessageType: a.kind, TransactionID: q.xid}
	if q.id != nil {
		m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionClientID, OptionData: q.id})
	}
	m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionServerID, OptionData: duid})
	if a.rapid {
		m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit})
	}
	if a.kind == dhcpv6.MessageTypeAdvertise {
		// RFC 8415 §18.2.1: nobody else will answer, so it need not wait.
		m.AddOption(dhcpv6.OptPreference(255))
	}
	if a.hasStatus {
		m.AddOption(&dhcpv6.OptStatusCode{StatusCode: a.status})
	}
	for _, x := range a.ias {
		m.AddOption(x.option())
	}
	for _, o := range a.others {
		m.AddOption(o)
	}
	if a.parameters {
		parameters6(m, cfg, search, q)
	}
	return m.ToBytes()
}

// parameters6 adds what the client asks for, or all if it does not say.
func parameters6(m *dhcpv6.Message, cfg *Config6, search []string, q request6) {
	asked := func(c dhcpv6.OptionCode) bool { return q.asked == nil || q.asked.Contains(c) }
	if len(cfg.DNS) > 0 && asked(dhcpv6.OptionDNSRecursiveNameServer) {
		m.AddOption(dhcpv6.OptDNS(ipsOf(cfg.DNS)...))
	}
	if asked(dhcpv6.OptionDomainSearchList) {
		// What fits in the smallest MTU without fragments.
		n, room := 0, 1280-40-8-len(m.ToBytes())-16
		for n < len(search) && room-len(search[n])-2 > 0 {
			room -= len(search[n]) + 2
			n++
		}
		if n > 0 {
			m.AddOption(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: search[:n]}))
		}
	}
	if q.kind == dhcpv6.MessageTypeInformationRequest {
		m.AddOption(dhcpv6.OptInformationRefreshTime(cfg.LeaseTime)) // RFC 8415 §21.23
	}
}

// option encodes what becomes of an identity association.
func (x *iaAnswer) option() dhcpv6.Option {
	o := &dhcpv6.OptIANA{IaId: x.id}
	if x.addr.IsValid() {
		// T1 and T2 as RFC 8415 §21.4 recommends.
		o.T1, o.T2 = x.lease/2, x.lease*4/5
		o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: ipOf(x.addr), PreferredLifetime: x.lease, ValidLifetime: x.lease})
	}
	for _, a := range x.ended {
		o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: ipOf(a)})
	}
	if x.status != iana.StatusSuccess {
		o.Options.Add(&dhcpv6.OptStatusCode{StatusCode: x.status})
	}
	return o
}

// refuse returns the IA_TA or IA_PD option o with a status code.
func refuse(o dhcpv6.Option, addr, prefix iana.StatusCode) dhcpv6.Option {
	switch o := o.(type) {
	case *dhcpv6.OptIATA:
		r := &dhcpv6.OptIATA{IaId: o.IaId}
		r.Options.Add(&dhcpv6.OptStatusCode{StatusCode: addr})
		return r
	case *dhcpv6.OptIAPD:
		r := &dhcpv6.OptIAPD{IaId: o.IaId}
		r.Options.Add(&dhcpv6.OptStatusCode{StatusCode: prefix})
		return r
	}
	panic("dhcp: refuse an option that is no association")
}
