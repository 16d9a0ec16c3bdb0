package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/agent"
	"github.com/usernet/usernet/internal/netns"
)

// A verdict says how good what a check has found is.
type verdict string

const (
	good verdict = "ok"
	poor verdict = "warn" // usernet works, but not all of it
	bad  verdict = "fail" // something that usernet needs is missing
)

// A finding is what one check of the doctor has found.
type finding struct {
	Name    string  `json:"name"`
	Verdict verdict `json:"verdict"`
	Found   string  `json:"found"`
	Advice  string  `json:"advice,omitempty"`
}

// A report is what the doctor says.
type report struct {
	Works    bool      `json:"works"`
	Findings []finding `json:"findings"`
}

func newDoctor() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [--json]",
		Short: "Check whether usernet can work here, and say what to change",
		Long: `
Check whether usernet can work here, for this user, and say what to change.

What can be tried is tried: namespaces are made, and links opened in them.`,
		Annotations: map[string]string{footerKey: `
Exit status: 0 if usernet can work, warnings or not, 1 if it cannot.`},
		Args:                  noArguments,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := examine(cmd.Context())
			if err := r.print(cmd.OutOrStdout(), asJSON); err != nil {
				return fmt.Errorf("print report: %w", err)
			}
			if !r.Works {
				return &statusError{status: exitFailure}
			}
			return nil
		},
	}
	flags := newFlagSet()
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	addGroups(cmd, []group{{"Flags", flags}})
	return cmd
}

func (r report) print(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range r.Findings {
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Verdict, f.Name, f.Found)
		if f.Advice != "" {
			fmt.Fprintf(t, "\t\t→ %s\n", f.Advice)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	verdict := "usernet can work here."
	if !r.Works {
		verdict = "usernet cannot work here."
	}
	_, err := fmt.Fprintf(w, "\n%s\n", verdict)
	return err
}

// examine does all checks.
func examine(ctx context.Context) report {
	var r report
	add := func(f ...finding) { r.Findings = append(r.Findings, f...) }

	namespaces := checkNamespaces(ctx)
	add(namespaces)
	add(checkTun())
	linkWorks := false
	if namespaces.Verdict != bad {
		tap, veth := checkTAP(ctx), checkVeth(ctx)
		linkWorks = tap.Verdict != bad || veth.Verdict != bad
		if linkWorks { // one of them will do
			for _, f := range []*finding{&tap, &veth} {
				if f.Verdict == bad {
					f.Verdict = poor
				}
			}
		}
		add(tap, veth)
	}
	add(checkSandbox(ctx), checkPing(), checkPorts(), checkDescriptors(), checkResolvConf("/etc/resolv.conf"))
	r.Works = namespaces.Verdict != bad && linkWorks
	return r
}

// checkSandbox tries what the process that faces the guest can be kept from.
func checkSandbox(ctx context.Context) finding {
	f := finding{Name: "sandbox", Verdict: good}
	i, err := usernet.TrySandbox(ctx)
	switch {
	case err != nil:
		f.Verdict, f.Found = bad, describe(err)
		f.Advice = "usernet --no-sandbox works without"
	case i.Missing != "":
		f.Verdict, f.Found = poor, i.Missing
	case i.Landlock == 0:
		f.Verdict, f.Found = poor, "no rights, few system calls; the kernel has no Landlock to close the files as well"
		f.Advice = "Linux 5.13 has it, if landlock is among the modules in /sys/kernel/security/lsm"
	default:
		f.Found = fmt.Sprintf("no rights, few system calls, all files closed (Landlock %d)", i.Landlock)
	}
	return f
}

// probe makes namespaces as `usernet run` would, calls f with the process in
// them, and ends it.
func probe(ctx context.Context, f func(ctx context.Context, pid int) error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	files := setup{ResolvConf: []byte("# usernet doctor\n")}
	s, err := startSpaces(nil, false, files, streams{})
	if err != nil {
		return err
	}
	defer s.kill()
	select {
	case e, ok := <-s.events:
		if !ok || e.Error != "" {
			return errors.New(e.Error)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return f(ctx, s.cmd.Process.Pid)
}

// checkNamespaces makes user, network and mount namespaces and mounts in them.
func checkNamespaces(ctx context.Context) finding {
	f := finding{Name: "user namespaces", Verdict: good}
	err := probe(ctx, func(context.Context, int) error { return nil })
	if err == nil {
		f.Found = fmt.Sprintf("made and used by uid %d", os.Geteuid())
		return f
	}
	f.Verdict, f.Found = bad, describe(err)
	switch {
	case sysctl("kernel/unprivileged_userns_clone") == "0":
		f.Advice = "sysctl -w kernel.unprivileged_userns_clone=1"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		f.Advice = "sysctl -w user.max_user_namespaces=15000 user.max_net_namespaces=15000 user.max_mnt_namespaces=15000; every user namespace around this one has a limit too"
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
		f.Advice = "an AppArmor profile for usernet with the rule `userns,`, or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
	case inContainer():
		f.Advice = "the container forbids it: run it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined, or --privileged"
	default:
		f.Advice = "look into the kernel's log for seccomp, SELinux or AppArmor, and for CONFIG_USER_NS in its configuration"
	}
	return f
}

// inContainer reports whether a container engine has left its mark.
func inContainer() bool {
	for _, path := range []string{"/.dockerenv", "/run/.containerenv"} {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return os.Getenv("KUBERNETES_SERVICE_HOST") != ""
}

// sysctl returns a kernel setting, or "" where there is none.
func sysctl(name string) string {
	b, _ := os.ReadFile("/proc/sys/" + name)
	return strings.Join(strings.Fields(string(b)), " ")
}

func checkTun() finding {
	const path = "/dev/net/tun"
	f := finding{Name: path, Verdict: poor}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		f.Verdict, f.Found = good, "can be opened"
	case errors.Is(err, unix.ENOENT):
		f.Found, f.Advice = "missing", "modprobe tun; in a container, start it with --device /dev/net/tun"
	case errors.Is(err, unix.EACCES):
		f.Found, f.Advice = "closed to this user", "chmod 0666 /dev/net/tun, as distributions have it"
	case errors.Is(err, unix.EPERM):
		f.Found, f.Advice = "forbidden by the container's device rules", "start it with --device /dev/net/tun"
	default:
		f.Found, f.Advice = err.Error(), "modprobe tun"
	}
	return f
}

// openLink opens a link of a kind in a new namespace.
func openLink(ctx context.Context, kind agent.LinkKind) (link agent.Link, err error) {
	err = probe(ctx, func(ctx context.Context, pid int) error {
		ns, err := netns.OpenPID(pid)
		if err != nil {
			return err
		}
		defer ns.Close()
		a, err := agent.Start(ctx, ns, agent.Options{})
		if err != nil {
			return err
		}
		defer a.Close()
		link, err = a.OpenLink(agent.LinkSpec{Kind: kind, Name: usernet.DefaultIfname, MTU: usernet.DefaultMTU, Offload: true})
		if err != nil {
			return err
		}
		return unix.Close(link.FD)
	})
	return link, err
}

func checkTAP(ctx context.Context) finding {
	link, err := openLink(ctx, agent.TAP)
	return checkLink("TAP", "a kernel with CONFIG_TUN, and an open /dev/net/tun", link, err)
}

func checkVeth(ctx context.Context) finding {
	link, err := openLink(ctx, agent.Veth)
	return checkLink("veth", "modprobe veth: it stands in where there are no TAPs", link, err)
}

func checkLink(name, advice string, link agent.Link, err error) finding {
	f := finding{Name: name, Verdict: good}
	switch {
	case err != nil:
		f.Verdict, f.Found, f.Advice = bad, describe(err), advice
	case !link.Offload:
		f.Verdict, f.Found = poor, "works, without offload: slow"
		f.Advice = "a kernel with IFF_VNET_HDR and TUNSETOFFLOAD"
	case !link.USO:
		f.Found = "works, with checksum and TCP offload; UDP segmentation offload needs Linux 6.2"
	default:
		f.Found = "works, with checksum, TCP and UDP segmentation offload"
	}
	return f
}

// checkPing makes the sockets by which usernet sends echo requests.
func checkPing() finding {
	const name = "net/ipv4/ping_group_range"
	f := finding{Name: "ping", Verdict: good, Found: "ping sockets can be made"}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err == nil {
		unix.Close(fd)
		return f
	}
	f.Verdict = poor
	f.Found = fmt.Sprintf("guests can ping the gateway only: net.ipv4.ping_group_range is %q", sysctl(name))
	f.Advice = `sysctl -w net.ipv4.ping_group_range="0 2147483647"`
	return f
}

func checkPorts() finding {
	f := finding{Name: "low ports", Verdict: good}
	first, err := strconv.Atoi(sysctl("net/ipv4/ip_unprivileged_port_start"))
	switch {
	case err != nil || hasCapabilities(unix.CAP_NET_BIND_SERVICE) || first == 0:
		f.Found = "usernet can listen on all ports of the host"
	default:
		f.Found = fmt.Sprintf("usernet can listen on the host's ports from %d on", first)
		f.Advice = "for lower ones: sysctl -w net.ipv4.ip_unprivileged_port_start=80, or setcap cap_net_bind_service=+ep on the binary"
	}
	return f
}

// enoughDescriptors leaves room for the flows of a busy guest: each takes one.
const enoughDescriptors = 16384

func checkDescriptors() finding {
	f := finding{Name: "open files", Verdict: good}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		f.Verdict, f.Found = poor, err.Error()
		return f
	}
	f.Found = fmt.Sprintf("the hard limit of %d bounds the flows at one time", limit.Max)
	if limit.Max < enoughDescriptors {
		f.Verdict = poor
		f.Advice = fmt.Sprintf("raise it to %d or more: ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of containers", enoughDescriptors)
	}
	return f
}

func checkResolvConf(path string) finding {
	f := finding{Name: "resolv.conf", Verdict: poor, Advice: "add a nameserver line to " + path + ", or use --dns ADDR"}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Found = describe(err)
		return f
	}
	var servers []string
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "nameserver" {
			servers = append(servers, fields[1])
		}
	}
	if len(servers) == 0 {
		f.Found = path + " names no server"
		return f
	}
	return finding{Name: f.Name, Verdict: good, Found: "guests' questions go to " + strings.Join(servers, ", ")}
}
