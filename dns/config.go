package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// Config says what a Server serves and whom it asks. The zero value of every
// field is usable.
type Config struct {
	// PacketConns and Listeners are where guests ask. Run owns them and
	// closes them when it ends. Conns with the methods
	// ReadFromUDPAddrPort and WriteToUDPAddrPort of net.UDPConn save an
	// allocation per message; those with a method
	// Handle(take func(b []byte, from netip.AddrPort), done func()) besides,
	// which has take called for each message and done after all those that
	// came at once, a goroutine's awakening.
	PacketConns []net.PacketConn
	Listeners   []net.Listener

	// Upstreams are the resolvers to ask, in order of preference; port 0
	// means 53. If there are none, those of ResolvConf are asked, as they
	// change.
	Upstreams []netip.AddrPort

	// ResolvConf is the path of the host's resolv.conf, followed while Run
	// runs: for its servers where Upstreams is empty and for its search
	// domains. Empty means /etc/resolv.conf.
	ResolvConf string
	// Unread leaves ResolvConf to others, who call SetResolvConf.
	Unread bool

	// Records are the names answered here and their addresses, in any
	// letter case, without the final dot. PTR records follow from them.
	Records map[string][]netip.Addr

	// Zones are domains of which there is nothing but Records: other names in
	// them do not exist, and no upstream hears of them.
	Zones []string

	// Permit is asked before every query to an upstream; an error keeps it
	// from being sent. It must be quick. Nil permits all.
	Permit func(netip.AddrPort) error

	// Answered, if not nil, is told before a guest gets an answer with
	// addresses: the name it asked for, in lower case without the final dot,
	// the addresses at the end of its chain of aliases, and for how long all
	// that is good. It must be quick, and must not keep the slice.
	Answered func(name string, addrs []netip.Addr, ttl time.Duration)

	// NoPrivate keeps answers of upstreams that hold a private, loopback or
	// link-local address from guests, who get one without records. Local
	// records are not concerned.
	NoPrivate bool

	// Bind, if not nil, prepares each socket to an upstream between its
	// making and its connecting, e.g. binds it to an address or interface.
	Bind func(fd int, upstream netip.AddrPort) error

	// Dial, if not nil, opens the connections to upstreams, network being
	// "udp" or "tcp", and Bind is not used. It costs about twice as much
	// per query as the Server's own way.
	Dial func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)

	// Watch, if not nil, has ready called whenever fd, which is the Server's,
	// is readable, by one goroutine at a time, until stop is called; when
	// that returns no call is under way. So the goroutine that moves the
	// guests' traffic can take answers in too, without waking another. Nil
	// means that the Server waits itself.
	Watch func(fd int, ready func()) (stop func(), err error)

	// MaxInFlight is how many queries may wait for upstreams; what exceeds
	// it is answered SERVFAIL. 0 means 512.
	MaxInFlight int

	// CacheEntries and CacheBytes bound the cache. 0 means 8192 entries and
	// 4 MiB; negative means no cache.
	CacheEntries, CacheBytes int

	// Logger gets a record when upstreams change, fail and return. Nil
	// discards.
	Logger *slog.Logger
}

// withDefaults fills in what was left out.
func (c Config) withDefaults() Config {
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.MaxInFlight <= 0 {
		c.MaxInFlight = 512
	}
	if c.CacheEntries == 0 {
		c.CacheEntries = 8192
	}
	if c.CacheBytes == 0 {
		c.CacheBytes = 4 << 20
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}
