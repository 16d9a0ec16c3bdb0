package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/control"
	"github.com/usernet/usernet/internal/netns"
)

// cniNames are what the binary is called as a CNI plugin and nothing else.
var cniNames = []string{"usernet-cni", slirpType}

// Codes of our own in CNI's errors; those below 100 are the specification's.
const (
	cniFailed   = 100 // the container could not be given its network
	cniAttached = 101 // it has it already
	cniChanged  = 102 // CHECK found something else than ADD had left
)

// isCNI reports whether a runtime has started this process as its plugin.
func isCNI(args []string) bool {
	return os.Getenv("CNI_COMMAND") != "" || len(args) > 0 && slices.Contains(cniNames, filepath.Base(args[0]))
}

// runCNI is usernet as a CNI plugin: one command of the runtime, which is in the
// environment and on stdin. It returns the exit status.
func runCNI(ctx context.Context) int {
	if err := closeOnExecAll(); err != nil {
		return cniFail(cniError(types.ErrInternal, err))
	}
	command := func(f func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error { return f(ctx, args) }
	}
	// All versions: a configuration without one means 0.1.0.
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: command(cniAdd), Del: command(cniDel), Check: command(cniCheck), GC: command(cniGC), Status: command(cniStatus),
	}, cniversion.All, "CNI plugin "+version().String())
	if err != nil {
		return cniFail(err)
	}
	return exitOK
}

func cniFail(err *types.Error) int {
	if err := err.Print(); err != nil {
		fmt.Fprintf(os.Stderr, "usernet: answer the runtime: %v\n", err)
	}
	return exitFailure
}

// cniError puts an error into CNI's form, unless it has that.
func cniError(code uint, err error) *types.Error {
	var e *types.Error
	if errors.As(err, &e) {
		return e
	}
	return types.NewError(code, describe(err), "")
}

func cniErrorf(code uint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// cniHold is a container's attachment while nobody else works on it.
type cniHold struct {
	conf       *cniConf
	ns         *netns.Namespace
	store      *cniStore
	attachment cniAttachment
	release    func()
}

// holdCNI reads what a runtime asks for, and waits until the attachment is free.
func holdCNI(ctx context.Context, args *skel.CmdArgs) (h *cniHold, err error) {
	h = &cniHold{attachment: cniAttachment{ContainerID: args.ContainerID, Ifname: args.IfName}}
	if h.conf, err = parseCNI(args); err != nil {
		return nil, err
	}
	h.attachment.Network = h.conf.Name
	if h.ns, err = cniNamespace(args); err != nil {
		return nil, err
	}
	unlock := func() {}
	if h.store, err = openCNIStore(); err == nil {
		unlock, err = h.store.lock(ctx, h.attachment)
	}
	if err != nil {
		h.ns.Close()
		return nil, err
	}
	h.release = func() {
		unlock()
		h.ns.Close()
	}
	return h, nil
}

// cniAdd gives a container an interface, and starts who serves it.
func cniAdd(ctx context.Context, args *skel.CmdArgs) error {
	h, err := holdCNI(ctx, args)
	if err != nil {
		return err
	}
	defer h.release()
	conf, ns, store, a := h.conf, h.ns, h.store, h.attachment
	if old := store.load(a); old != nil && old.alive() {
		return cniErrorf(cniAttached, "attach container %s: process %d serves its %s in network %s already: DEL it first", args.ContainerID, old.PID, args.IfName, conf.Name)
	}
	if err := store.end(a); err != nil {
		return cniError(cniFailed, err)
	}
	result, err := cniStart(ctx, store, a, conf, ns)
	if err == nil {
		// Nobody else knows that the container has its network if the runtime
		// does not learn of it.
		err = types.PrintResult(result, conf.version)
	}
	if err != nil {
		return errors.Join(cniError(cniFailed, err), store.end(a))
	}
	return nil
}

// cniStart starts the daemon of an attachment, and tells what it has made.
func cniStart(ctx context.Context, store *cniStore, a cniAttachment, conf *cniConf, ns *netns.Namespace) (*current.Result, error) {
	flags := append([]string{"--netns", ns.Path(), "--ifname", a.Ifname, "--api-socket", store.socket(a)}, conf.flags()...)
	err := startDaemon(ctx, flags, store.runtimeDir(), store.log(a), func(p process) error {
		return store.save(cniRecord{cniAttachment: a, Netns: ns.Path(), Inode: ns.Inode(), process: p})
	})
	if err != nil {
		return nil, err
	}
	view, err := look(ctx, ns, a.Ifname)
	if err != nil {
		return nil, err
	}
	info, err := control.NewClient(store.socket(a)).Info(ctx)
	if err != nil {
		return nil, err
	}
	return conf.result(a.Ifname, ns.Path(), view, info), nil
}

// look tells what an interface of a namespace is like.
func look(ctx context.Context, ns *netns.Namespace, ifname string) (agent.View, error) {
	a, err := agent.Start(ctx, ns, agent.Options{})
	if err != nil {
		return agent.View{}, err
	}
	defer a.Close()
	return a.Look(ifname)
}

// cniNamespace opens the container's network namespace.
func cniNamespace(args *skel.CmdArgs) (*netns.Namespace, error) {
	if !filepath.IsAbs(args.Netns) {
		return nil, cniErrorf(types.ErrInvalidNetNS, "open namespace %q: CNI_NETNS has to be an absolute path", args.Netns)
	}
	ns, err := netns.Open(args.Netns)
	if err != nil {
		return nil, cniError(types.ErrInvalidNetNS, err)
	}
	// Not by netns.Open, for it may belong to a user namespace outside of this one.
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err == nil && own.Ino == ns.Inode() {
		ns.Close()
		return nil, cniErrorf(types.ErrInvalidNetNS, "attach to %s: it is the namespace of this process, whose connections would come back to it: run the plugin outside of the container", args.Netns)
	}
	return ns, nil
}

// result tells the runtime what a container has got, after what plugins before
// this one have given it.
func (c *cniConf) result(ifname, sandbox string, view agent.View, info control.Info) *current.Result {
	r := &current.Result{}
	if c.prev != nil {
		r = c.prev
	}
	r.CNIVersion = current.ImplementedSpecVersion
	r.Interfaces = append(r.Interfaces, &current.Interface{Name: ifname, Mac: view.MAC.String(), Mtu: view.MTU, Sandbox: sandbox})
	index := len(r.Interfaces) - 1
	dns := types.DNS{Domain: c.DNS.Domain, Search: c.search(), Options: c.options()}
	for _, p := range view.Addrs {
		subnet := info.IPv4
		if p.Addr().Is6() {
			if info.IPv6 == nil {
				continue
			}
			subnet = *info.IPv6
		}
		r.IPs = append(r.IPs, &current.IPConfig{Interface: current.Int(index), Address: ipNet(p), Gateway: subnet.Gateway.AsSlice()})
		if info.DNS {
			dns.Nameservers = append(dns.Nameservers, subnet.DNS.String())
		}
	}
	for _, gateway := range []netip.Addr{view.Gateway4, view.Gateway6} {
		if gateway.IsValid() {
			all := netip.PrefixFrom(gateway, 0).Masked()
			r.Routes = append(r.Routes, &types.Route{Dst: ipNet(all), GW: gateway.AsSlice()})
		}
	}
	if len(c.servers) > 0 {
		dns.Nameservers = c.servers
	}
	if r.DNS.IsEmpty() {
		r.DNS = dns
	}
	return r
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// cniDel takes a container's interface away. There may be nothing left of it, or
// nothing may ever have been, and the configuration may have become a bad one.
func cniDel(ctx context.Context, args *skel.CmdArgs) error {
	name, err := cniName(args.StdinData)
	if err != nil {
		return err
	}
	store, err := openCNIStore()
	if err != nil {
		return err
	}
	return store.remove(ctx, cniAttachment{Network: name, ContainerID: args.ContainerID, Ifname: args.IfName})
}

// cniGC ends the attachments of a network that the runtime knows nothing of.
func cniGC(ctx context.Context, args *skel.CmdArgs) error {
	conf, err := parseCNI(args)
	if err != nil {
		return err
	}
	store, err := openCNIStore()
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range store.list() {
		valid := slices.ContainsFunc(conf.ValidAttachments, func(v types.GCAttachment) bool {
			return v.ContainerID == r.ContainerID && v.IfName == r.Ifname
		})
		if r.Network == conf.Name && !valid {
			errs = append(errs, store.remove(ctx, r.cniAttachment))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return cniError(cniFailed, err)
	}
	return nil
}

// cniCheck finds out whether a container still has what it was given.
func cniCheck(ctx context.Context, args *skel.CmdArgs) error {
	h, err := holdCNI(ctx, args)
	if err != nil {
		return err
	}
	defer h.release()
	conf, ns, store, a := h.conf, h.ns, h.store, h.attachment
	if conf.prev == nil {
		return cniErrorf(types.ErrInvalidNetworkConfig, "check container %s: there is no prevResult to compare with", args.ContainerID)
	}
	bad := func(format string, values ...any) error {
		return cniErrorf(cniChanged, "check "+args.IfName+" of container "+args.ContainerID+": "+format, values...)
	}
	r := store.load(a)
	switch {
	case r == nil:
		return bad("network %s was not added: ADD it", conf.Name)
	case r.Inode != ns.Inode():
		return bad("%s is another namespace than the one that was added: DEL and ADD it", args.Netns)
	case !r.alive():
		return bad("the process that served it, %d, has ended: DEL and ADD it: %s", r.PID, lastWords(store.log(a)))
	}
	view, err := look(ctx, ns, args.IfName)
	switch {
	case errors.Is(err, syscall.ENODEV):
		return bad("the interface is gone: DEL and ADD it")
	case err != nil:
		return cniError(cniChanged, err)
	case !view.Up:
		return bad("the interface is down")
	}
	if why := conf.compare(args, view); why != "" {
		return bad("%s", why)
	}
	forwards, err := control.NewClient(store.socket(a)).Forwards(ctx)
	if err != nil {
		return cniError(cniChanged, err)
	}
	for _, f := range conf.config.Publish {
		host := f.Host.String()
		if !f.Host.Addr().IsValid() {
			host = fmt.Sprintf(":%d", f.Host.Port())
		}
		if !slices.ContainsFunc(forwards, func(g control.Forward) bool {
			return g.Protocol == f.Protocol.String() && g.Host == host && strings.HasSuffix(g.Guest, fmt.Sprintf(":%d", f.Guest.Port()))
		}) {
			return bad("port %v is no longer published: DEL and ADD it", f)
		}
	}
	return nil
}

// compare says how the interface differs from what prevResult has of it. The
// plugins behind this one may have changed it, and prevResult with it.
func (c *cniConf) compare(args *skel.CmdArgs, view agent.View) string {
	index := slices.IndexFunc(c.prev.Interfaces, func(i *current.Interface) bool {
		return i.Name == args.IfName && i.Sandbox == args.Netns
	})
	if index < 0 {
		return fmt.Sprintf("prevResult has no such interface in %s", args.Netns)
	}
	was := c.prev.Interfaces[index]
	switch {
	case was.Mac != "" && !strings.EqualFold(was.Mac, view.MAC.String()):
		return fmt.Sprintf("its MAC address is %v, and was %s", view.MAC, was.Mac)
	case was.Mtu != 0 && was.Mtu != view.MTU:
		return fmt.Sprintf("its MTU is %d, and was %d", view.MTU, was.Mtu)
	}
	for _, ip := range c.prev.IPs {
		if ip.Interface == nil || *ip.Interface != index {
			continue
		}
		ones, _ := ip.Address.Mask.Size()
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		if p := netip.PrefixFrom(a.Unmap(), ones); !slices.Contains(view.Addrs, p) {
			return fmt.Sprintf("the address %v is gone", p)
		}
		if a.Unmap().Is4() && !view.Gateway4.IsValid() {
			return "the default route is gone"
		}
	}
	return ""
}

// statusTimeout bounds the probes of STATUS.
const statusTimeout = 20 * time.Second

// cniStatus tells whether a container could be given a network now.
func cniStatus(ctx context.Context, args *skel.CmdArgs) error {
	conf, err := parseCNI(args)
	if err != nil {
		return err
	}
	store, err := openCNIStore()
	if err != nil {
		return cniError(types.ErrPluginNotAvailable, errors.New(err.Error()))
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	tun := checkTun()
	if tun.Verdict == good {
		return nil
	}
	veth := checkVeth(ctx)
	if veth.Verdict != bad {
		return nil
	}
	// Those who have their network keep it, unless it has ended by itself.
	code := types.ErrPluginNotAvailable
	for _, r := range store.list() {
		if r.Network == conf.Name && !r.alive() {
			code = types.ErrLimitedConnectivity
		}
	}
	return cniErrorf(code, "no link can be made: /dev/net/tun is %s (%s), and a veth pair cannot be made: %s (%s)", tun.Found, tun.Advice, veth.Found, veth.Advice)
}
