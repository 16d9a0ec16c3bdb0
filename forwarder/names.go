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

// toldAgain is how much longer an address must be allowed to be told of again.
const toldAgain = minLearned / 2

// Learned is an address that a rule for names allows, for a time.
type Learned struct {
	Addr  netip.Addr
	Rule  int // its place in the list
	Until time.Time
}

// names are the rules for names, and what they were answered with.
type names struct {
	rules []NameRule
	told  func([]Learned) // nil: nobody

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

// TellLearned has f called with addresses as they are learned, for who wants to
// Restore them in another policy with the same rules. It must not block. It is to
// be set before Learn is called.
func (p *Policy) TellLearned(f func([]Learned)) { p.names.told = f }

// Restore takes up what another policy has told.
func (p *Policy) Restore(learned []Learned) {
	n := &p.names
	n.mu.Lock()
	defer n.mu.Unlock()
	latest := time.Now().Add(maxLearned)
	for _, l := range learned {
		if l.Rule >= 0 && l.Rule < len(n.rules) && l.Until.Before(latest) {
			n.addLocked(learnedAddr{l.Addr, l.Rule}, l.Until)
		}
	}
}

// addLocked allows an address until then, and reports whether that was to be told.
func (n *names) addLocked(k learnedAddr, until time.Time) bool {
	if n.learned == nil {
		n.learned = make(map[learnedAddr]time.Time)
	}
	old, known := n.learned[k]
	if !until.After(old) {
		return false
	}
	if !known && len(n.learned) >= maxLearnedAddrs {
		n.evictLocked()
	}
	n.learned[k] = until
	return until.Sub(old) >= toldAgain
}

// Learn tells the policy that the guest is about to be answered name, in lower
// case and without the final dot, with addrs, good for ttl. It may be called at
// any time.
func (p *Policy) Learn(name string, addrs []netip.Addr, ttl time.Duration) {
	n := &p.names
	var fresh []Learned
	for i, r := range n.rules {
		if !r.covers(name) {
			continue
		}
		until := time.Now().Add(min(max(ttl, minLearned), maxLearned))
		n.mu.Lock()
		for _, a := range addrs {
			a, _ = p.loopback(a.Unmap())
			if n.addLocked(learnedAddr{a, i}, until) {
				fresh = append(fresh, Learned{a, i, until})
			}
		}
		n.mu.Unlock()
	}
	if len(fresh) > 0 && n.told != nil {
		n.told(fresh)
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
