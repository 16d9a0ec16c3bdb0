package stack

import (
	"net/netip"
	"testing"
)

// TestFixedNeighbor: what is set is not learned anew, nor evicted.
func TestFixedNeighbor(t *testing.T) {
	var n neighbors
	mac := func(b byte) [6]byte { return [6]byte{2, 0, 0, 0, 0, b} }
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	n.learn(at(1), mac(1))
	n.set(at(1), mac(2))
	n.learn(at(1), mac(3))
	if got := n.lookup(at(1)); got != mac(2) {
		t.Errorf("%x", got)
	}
	for i := range 3 * maxNeighbors {
		n.learn(at(i+2), mac(9))
	}
	if got := n.lookup(at(1)); got != mac(2) || len(n.m) > maxNeighbors {
		t.Errorf("%x among %d", got, len(n.m))
	}
	n.forget(at(1))
	if got := n.lookup(at(1)); got != n.fallback {
		t.Errorf("forgotten, it is %x", got)
	}
}
