package forwarder

import (
	"net/netip"
	"strings"
	"sync"
	"time"
)

// NameRule allows the addresses that a name is answered with: those of Name,
// in lower case and without the final dot, or where it begins with "*." those
// of all names below. Ports and Proto are as in Rule.
type NameRule struct {
	Name     string
	From, To uint16
	Proto    uint8
}

func (r NameRule) covers(name string) bool {
	if domain, ok := strings.CutPrefix(r.Name, "*"); ok {
		return len(name) > len(domain) && strings.HasSuffix(name, domain)
	}
	return name == r.Name
}

// How long an address stays allowed after an answer with it: for its TTL, within
// these bounds. Programs look up and connect later, and many ignore short TTLs.
const (
	minLearned = time.Minute
	maxLearned = 24 * time.Hour
)

// maxLearnedAddrs bounds what is remembered. Beyond it, one that would be
// forgotten soon makes room.
const maxLearnedAddrs = 4096

// names are the rules for names, and what they were answered with.
type names struct {
	rules []NameRule

	mu      sync.Mutex // guards following
	learned map[learnedAddr]time.Time
}

// A learnedAddr is an address that is allowed by a rule.
type learnedAddr struct {
	addr netip.Addr
	rule int
}

// allow reports whether dst is an address of a name that may be talked to.
func (n *names) allow(proto uint8, dst netip.AddrPort) bool {
	if len(n.rules) == 0 {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, r := range n.rules {
		if about(r.Proto, r.From, r.To, proto, dst.Port()) {
			if until, ok := n.learned[learnedAddr{dst.Addr(), i}]; ok && time.Now().Before(until) {
				return true
			}
		}
	}
	return false
}

// Learn tells the policy that the guest is about to be answered name, in lower
// case and without the final dot, with addrs, good for ttl. It may be called at
// any time.
func (p *Policy) Learn(name string, addrs []netip.Addr, ttl time.Duration) {
	n := &p.names
	for i, r := range n.rules {
		if !r.covers(name) {
			continue
		}
		until := time.Now().Add(min(max(ttl, minLearned), maxLearned))
		n.mu.Lock()
		if n.learned == nil {
			n.learned = make(map[learnedAddr]time.Time)
		}
		for _, a := range addrs {
			a, _ = p.loopback(a.Unmap())
			k := learnedAddr{a, i}
			old, known := n.learned[k]
			if !known && len(n.learned) >= maxLearnedAddrs {
				n.evictLocked()
			}
			if until.After(old) {
				n.learned[k] = until
			}
		}
		n.mu.Unlock()
	}
}

// evictLocked forgets the one that is next to go among a few.
func (n *names) evictLocked() {
	const sample = 16
	var victim learnedAddr
	var first time.Time
	seen := 0
	for k, until := range n.learned {
		if seen == 0 || until.Before(first) {
			victim, first = k, until
		}
		if seen++; seen == sample {
			break
		}
	}
	delete(n.learned, victim)
}

// Learned returns how many addresses are remembered.
func (p *Policy) Learned() int {
	p.names.mu.Lock()
	defer p.names.mu.Unlock()
	return len(p.names.learned)
}
