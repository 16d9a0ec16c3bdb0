package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

const (
	roleEnv  = "USERNET_TEST_ROLE"
	orderEnv = "USERNET_TEST_ORDER"
)

// helper is what a copy of the test binary does instead of testing.
func helper(role string) error {
	switch role {
	case "attach":
		return helpAttach()
	case "source":
		return helpSource()
	case "sink":
		return helpSink()
	case "listen":
		return helpListen()
	case "features":
		return helpFeatures()
	}
	return fmt.Errorf("unknown role %q", role)
}

// A helperOrder says what to attach to, and how.
type helperOrder struct {
	Path      string // or a process:
	PID       int
	Link      *LinkSpec
	Addresses *Addresses
	SetUp     bool
	Cleanup   []string
}

type helperResult struct {
	Err    string
	Agent  int
	Link   Link
	Status Status
	FD     int // again, for it is no part of the link on the wire
	FDs    int
	Took   time.Duration

	cleaner *Cleaner
}

var testAddresses = &Addresses{
	Addr4:    netip.MustParsePrefix("10.0.2.100/24"),
	Gateway4: netip.MustParseAddr("10.0.2.2"),
	Addr6:    netip.MustParsePrefix("fd75:736e:6574::100/64"),
	Gateway6: netip.MustParseAddr("fd75:736e:6574::2"),
	Default6: true,
}

func testLink(kind LinkKind) *LinkSpec {
	return &LinkSpec{Kind: kind, Name: "tap0", MTU: 65520, Offload: true}
}

// helpAttach attaches, reports, and then obeys its standard input until that
// ends.
func helpAttach() error {
	var order helperOrder
	if err := json.Unmarshal([]byte(os.Getenv(orderEnv)), &order); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	r := helperResult{cleaner: new(Cleaner)}
	a, err := r.attach(order)
	if err != nil {
		r.Err = err.Error()
	}
	if err := out.Encode(r); err != nil {
		return err
	}
	if a != nil {
		defer a.Close()
		cleaner := r.cleaner
		defer cleaner.Close()
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		fd := r.FD
		r = helperResult{}
		switch command, arg, _ := strings.Cut(in.Text(), " "); command {
		case "default6":
			err = a.SetDefaultRoute6(arg == "on")
		case "churn": // attach and detach again and again
			err = r.churn(order)
		case "close":
			err = errors.Join(unix.Close(fd), a.Close())
		default:
			err = fmt.Errorf("unknown command %q", command)
		}
		if err != nil {
			r.Err = err.Error()
		}
		r.FDs = countFDs()
		if err := out.Encode(r); err != nil {
			return err
		}
	}
	return in.Err()
}

func (r *helperResult) attach(order helperOrder) (*Agent, error) {
	began := time.Now()
	ns, err := order.open()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	a, err := Start(context.Background(), ns, Options{})
	if err != nil {
		return nil, err
	}
	r.Agent = a.PID()
	if err := r.use(a, order); err != nil {
		a.Close()
		return nil, err
	}
	r.Took = time.Since(began)
	return a, nil
}

func (o helperOrder) open() (*netns.Namespace, error) {
	if o.Path != "" {
		return netns.Open(o.Path)
	}
	return netns.OpenPID(o.PID)
}

func (r *helperResult) use(a *Agent, order helperOrder) (err error) {
	if order.Link != nil {
		if r.Link, err = a.OpenLink(*order.Link); err != nil {
			return err
		}
		r.FD = r.Link.FD
	}
	if order.Addresses != nil {
		if r.Status, err = a.Configure(*order.Addresses); err != nil {
			return err
		}
	}
	if order.SetUp {
		if r.Status, err = a.SetUp(); err != nil {
			return err
		}
	}
	if order.Cleanup != nil {
		return r.cleaner.OnDeath(order.Cleanup)
	}
	return nil
}

func (r *helperResult) churn(order helperOrder) error {
	for range 10 {
		a, err := r.attach(order)
		if err != nil {
			return err
		}
		if err := a.Close(); err != nil {
			return err
		}
		if r.Link.FD > 0 {
			unix.Close(r.Link.FD)
		}
	}
	return nil
}

func countFDs() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries) - 1 // but for the directory itself
}
