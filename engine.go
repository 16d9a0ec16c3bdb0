package usernet

import (
	"context"
	"io"
	"net/netip"
	"time"

	"github.com/usernet/usernet/dns"
)

// engine is a gateway at work on a link: a [gateway] in this process, or a
// [remote] one in a process of its own.
type engine interface {
	inlet
	run(ctx context.Context) error
	close()

	// What the host has to say.
	setLocal(local []netip.Prefix)
	setDefaultRouter6(on bool)
	setResolvConf(rc dns.ResolvConf)

	// What people ask.
	flows(ctx context.Context) ([]Flow, error)
	killFlow(ctx context.Context, id string) error
	leases(ctx context.Context) ([]Lease, error)
	records(ctx context.Context) ([]Record, error)
	setRecord(ctx context.Context, name string, addrs []netip.Addr) error
	addRecord(ctx context.Context, name string, addrs []netip.Addr) (all []netip.Addr, err error)
	removeRecord(ctx context.Context, name string) error
	stats(ctx context.Context) (Stats, error)
	// capture writes frames of the link called name until ctx is done.
	capture(ctx context.Context, w io.Writer, name string, o CaptureOptions) error
}

// engineTime is how long an engine may take for a question.
const engineTime = 3 * time.Second
