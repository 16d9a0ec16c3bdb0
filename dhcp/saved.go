package dhcp

import (
	"bytes"
	"net/netip"
	"time"
)

// SavedLease is a lease that outlives its server: the next one for the same link
// takes it up.
type SavedLease struct {
	Key      []byte // identifies the client
	Client   []byte
	MAC      []byte
	Hostname string
	Addr     netip.Addr
	Start    time.Time
	Expires  time.Time
}

// save returns the leases that run.
func (p *pool) save(now time.Time) []SavedLease {
	saved := []SavedLease{}
	for _, e := range p.byAddr {
		if e.state == bound && now.Before(e.until) {
			saved = append(saved, SavedLease{
				Key: []byte(e.key), Client: bytes.Clone(e.id), MAC: bytes.Clone(e.mac), Hostname: e.hostname,
				Addr: e.addr, Start: e.start.Round(0), Expires: e.until.Round(0),
			})
		}
	}
	return saved
}

// restore takes up leases that another pool has saved, as far as they are such
// as this one might have given.
func (p *pool) restore(now time.Time, saved []SavedLease) {
	for _, l := range saved {
		c := client{key: string(l.Key), id: l.Client, mac: l.MAC, hostname: l.Hostname}
		if !now.Before(l.Expires) || !p.grantable(now, c, l.Addr) {
			continue
		}
		p.bind(now, c, l.Addr, l.Expires.Sub(now))
		p.byAddr[l.Addr].start = l.Start
	}
	p.changed = false
}

// tell calls f with the leases, if one of them has changed.
func (p *pool) tell(now time.Time, f func([]SavedLease)) {
	if p.changed && f != nil {
		f(p.save(now))
	}
	p.changed = false
}
