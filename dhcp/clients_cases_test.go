package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var clientCases = []clientCase{
	{"udhcpc", []string{"udhcpc", "ping"}, udhcpc},
	{"udhcpc-decline", []string{"udhcpc"}, udhcpcDecline},
	{"udhcpc-routes", []string{"udhcpc"}, udhcpcRoutes},
	{"udhcpc-reboot", []string{"udhcpc"}, udhcpcReboot},
	{"dhclient", []string{"dhclient", "ping"}, dhclient},
	{"dhclient-renew", []string{"dhclient"}, dhclientRenew},
	{"dhclient-nak", []string{"dhclient"}, dhclientNak},
	{"dhclient6", []string{"dhclient"}, dhclient6},
	{"dhclient6-stateless", []string{"dhclient"}, dhclient6Stateless},
	{"dhcpcd", []string{"dhcpcd", "ping"}, dhcpcd},
	{"dhcpcd-slaac", []string{"dhcpcd"}, dhcpcdSLAAC},
	{"networkd", []string{"/lib/systemd/systemd-networkd"}, networkd},
	{"kernel-slaac", nil, kernelSLAAC},
}

const udhcpcScript = `#!/bin/sh
echo "event $1"
env | grep -E '^(ip|subnet|mask|broadcast|router|dns|domain|search|mtu|lease|serverid|hostname|staticroutes)=' | sort
case $1 in
deconfig) ip addr flush dev guest0 ; ip link set guest0 up ;;
bound|renew)
	ip addr replace $ip/$mask broadcast $broadcast dev guest0
	ip link set guest0 mtu $mtu
	ip route replace default via $router
	echo "search $search" > /etc/resolv.conf
	echo "nameserver $dns" >> /etc/resolv.conf ;;
esac
`

// udhcpcLine is the command, up to the options of a case.
func (g *guest) udhcpcLine() string {
	return "udhcpc -i guest0 -f -n -q -t 3 -T 1 -s " + g.file("script", udhcpcScript) +
		" -O search -O mtu -O hostname -O staticroutes -x hostname:box "
}

// lines checks that out has all of the lines.
func lines(out string, want ...string) error {
	for _, l := range want {
		if !strings.Contains("\n"+out, "\n"+l+"\n") {
			return fmt.Errorf("no line %q", l)
		}
	}
	return nil
}

func udhcpc(g *guest) error {
	g.onlyIPv4()
	if err := g.serve(); err != nil {
		return err
	}
	out, err := g.sh(g.udhcpcLine())
	if err != nil {
		return err
	}
	ls := g.s4.Leases()
	err = first(
		lines(out, "event bound", "ip=10.0.2.100", "subnet=255.255.255.0", "broadcast=10.0.2.255", "router=10.0.2.2",
			"dns=10.0.2.3", "domain=usernet.internal", "search=usernet.internal corp.example.com example.com",
			"mtu=65520", "lease=3600", "serverid=10.0.2.2", "hostname=guest"),
		leased(ls, "10.0.2.100"),
		g.wait(0, "ip addr show guest0", "inet 10.0.2.100/24 brd 10.0.2.255", "mtu 65520"),
		g.wait(5*time.Second, "ping -c 1 -W 1 10.0.2.2", " 0% packet loss"),
	)
	if err != nil || ls[0].Hostname != "box" {
		return errors.Join(err, fmt.Errorf("hostname %q", ls[0].Hostname))
	}
	// As a daemon that is told to release its lease, and to go.
	line := strings.Replace(g.udhcpcLine(), "-q", "-p "+g.dir+"/pid", 1)
	log, pid := g.dir+"/daemon", g.dir+"/pid"
	if _, err := g.sh("(" + line + ") > " + log + " 2>&1 &"); err != nil {
		return err
	}
	defer g.sh("kill $(cat " + pid + ")")
	// Before it has its lease it would forget the signal.
	if err := g.wait(5*time.Second, "cat "+log, "lease of 10.0.2.100 obtained"); err != nil {
		return err
	}
	if _, err := g.sh("kill -USR2 $(cat " + pid + ")"); err != nil {
		return err
	}
	return g.released()
}

// released waits until there is no lease.
func (g *guest) released() error {
	return poll(5*time.Second, "release", func() bool {
		return len(g.s4.Leases()) == 0 && (g.s6 == nil || len(g.s6.Leases()) == 0)
	})
}

// udhcpcDecline has somebody else on the first two addresses of the pool.
func udhcpcDecline(g *guest) error {
	g.onlyIPv4()
	g.v4.Reservations = nil
	g.lan.taken[addr("10.0.2.15")] = true
	g.lan.taken[addr("10.0.2.16")] = true
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh(g.udhcpcLine() + "-a -t 6 -A 1"); err != nil {
		return err
	}
	return leased(g.s4.Leases(), "10.0.2.17")
}

func udhcpcRoutes(g *guest) error {
	g.onlyIPv4()
	g.v4.Routes = []Route{{Prefix: prefix("192.168.128.0/17")}}
	if err := g.serve(); err != nil {
		return err
	}
	out, err := g.sh(g.udhcpcLine())
	return first(err, lines(out, "staticroutes=192.168.128.0/17 10.0.2.2 0.0.0.0/0 10.0.2.2", "router=10.0.2.2"))
}

// udhcpcReboot asks for an address of a server that does not know the client.
func udhcpcReboot(g *guest) error {
	g.onlyIPv4()
	g.v4.Reservations = nil
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh(g.udhcpcLine() + "-r 10.0.2.27"); err != nil {
		return err
	}
	return leased(g.s4.Leases(), "10.0.2.27")
}

// dhclientLine is the command, up to the options of a case.
func (g *guest) dhclientLine() string {
	conf := g.file("dhclient.conf", `
option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;
send host-name "box";
request subnet-mask, broadcast-address, routers, domain-name, domain-name-servers, domain-search, host-name,
	interface-mtu, rfc3442-classless-static-routes, dhcp6.name-servers, dhcp6.domain-search;
timeout 10;
initial-interval 1;
`)
	return "dhclient -v -cf " + conf + " -lf " + g.dir + "/leases -pf " + g.dir + "/pid guest0 "
}

func dhclient(g *guest) error {
	g.onlyIPv4()
	g.v4.MTU = 9000
	g.v4.Routes = []Route{{Prefix: prefix("192.168.128.0/17")}}
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh(g.dhclientLine() + "-1"); err != nil {
		return err
	}
	ls := g.s4.Leases()
	err := first(
		leased(ls, "10.0.2.100"),
		g.wait(0, "ip addr show guest0", "inet 10.0.2.100/24 brd 10.0.2.255", "mtu 9000"),
		g.wait(0, "ip route", "default via 10.0.2.2", "192.168.128.0/17 via 10.0.2.2"),
		g.wait(0, "cat /etc/resolv.conf", "nameserver 10.0.2.3", "search usernet.internal. corp.example.com. example.com."),
		g.wait(5*time.Second, "ping -c 1 -W 1 10.0.2.2", " 0% packet loss"),
	)
	if err != nil || ls[0].Hostname != "box" {
		return errors.Join(err, fmt.Errorf("hostname %q", ls[0].Hostname))
	}
	if _, err := g.sh(g.dhclientLine() + "-r"); err != nil {
		return err
	}
	return g.released()
}

// dhclientRenew has a short lease, which the client renews (unicast); then the
// server forgets everything, and renewing works still.
func dhclientRenew(g *guest) error {
	g.onlyIPv4()
	g.v4.Reservations = nil
	g.minLease = 6 * time.Second
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh(g.dhclientLine() + "-1"); err != nil {
		return err
	}
	renewed := func() error {
		return poll(10*time.Second, "renewal", func() bool {
			ls := g.s4.Leases()
			return len(ls) == 1 && ls[0].Addr == addr("10.0.2.15") && ls[0].Expires.Sub(ls[0].Start) > 8*time.Second
		})
	}
	if err := renewed(); err != nil {
		return err
	}
	g.s4.mu.Lock()
	g.s4.pool.forget(g.s4.pool.byAddr[addr("10.0.2.15")])
	g.s4.mu.Unlock()
	return first(renewed(), leased(g.s4.Leases(), "10.0.2.15"))
}

// dhclientNak starts with a lease of another network (INIT-REBOOT).
func dhclientNak(g *guest) error {
	g.onlyIPv4()
	if err := g.serve(); err != nil {
		return err
	}
	g.file("leases", `lease {
  interface "guest0";
  fixed-address 192.168.1.5;
  option subnet-mask 255.255.255.0;
  option dhcp-lease-time 3600;
  option dhcp-server-identifier 192.168.1.1;
  renew 3 2060/01/01 00:00:00;
  rebind 4 2060/01/01 00:00:00;
  expire 5 2060/01/01 00:00:00;
}
`)
	out, err := g.sh(g.dhclientLine() + "-1")
	if err == nil && !strings.Contains(out, "DHCPNAK from 10.0.2.2") {
		err = errors.New("no NAK was seen")
	}
	return first(err, leased(g.s4.Leases(), "10.0.2.100"))
}

func dhclient6(g *guest) error {
	g.ra.Managed = true
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh("ip link set guest0 up; " + g.dhclientLine() + "-6 -1"); err != nil {
		return err
	}
	const a = "fd75:736e:6574::100"
	err := first(
		leased(g.s6.Leases(), a),
		g.wait(0, "ip -6 addr show guest0", "inet6 "+a+"/128"),
		g.wait(0, "cat /etc/resolv.conf", "nameserver fd75:736e:6574::3", "search usernet.internal. example.com."),
		g.wait(5*time.Second, "ip -6 route", "default via fe80::5055:aff:fe00:202 dev guest0 proto ra"),
	)
	if err != nil {
		return err
	}
	if _, err := g.sh(g.dhclientLine() + "-6 -r"); err != nil {
		return err
	}
	return g.released()
}

func dhclient6Stateless(g *guest) error {
	g.ra.Other = true
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh("ip link set guest0 up; " + g.dhclientLine() + "-6 -S -1"); err != nil {
		return err
	}
	return g.wait(0, "cat /etc/resolv.conf", "nameserver fd75:736e:6574::3", "search usernet.internal. example.com.")
}

// dhcpcdLine is the command; conf is added to its configuration.
func (g *guest) dhcpcdLine(conf string) string {
	return "dhcpcd -d -t 10 --noarp -f " + g.file("dhcpcd.conf", `
persistent
hostname box
option domain_name_servers, domain_name, domain_search, classless_static_routes, interface_mtu, host_name
option rapid_commit
require dhcp_server_identifier
noipv4ll
slaac hwaddr
`+conf) + " "
}

// dhcpcd takes everything at once: DHCPv4 with rapid commit, the advertised
// prefix, and a DHCPv6 address.
func dhcpcd(g *guest) error {
	g.ra.Managed, g.ra.Other = true, true
	g.v4.MTU, g.ra.MTU = 9000, 9000
	if err := g.serve(); err != nil {
		return err
	}
	line := g.dhcpcdLine("")
	if _, err := g.sh(line + "-w guest0"); err != nil {
		return err
	}
	err := first(
		g.wait(10*time.Second, "ip addr show guest0", "inet 10.0.2.100/24 brd 10.0.2.255", "inet6 fd75:736e:6574::100/128",
			"inet6 fd75:736e:6574:0:5054:ff:fe00:64/64"),
		g.wait(0, "ip route; ip -6 route", "default via 10.0.2.2", "mtu 9000", "default via fe80::5055:aff:fe00:202"),
		g.wait(5*time.Second, "cat /etc/resolv.conf", "nameserver 10.0.2.3", "nameserver fd75:736e:6574::3", "usernet.internal"),
		leased(g.s4.Leases(), "10.0.2.100"),
		leased(g.s6.Leases(), "fd75:736e:6574::100"),
	)
	if err != nil {
		return err
	}
	if g.s4.Stats().Offers != 0 {
		return errors.New("there was no rapid commit")
	}
	// It takes its address away before the kernel has asked for the gateway's
	// link address, unless that is known.
	if _, err := g.sh("ping -c 1 -W 1 10.0.2.2; " + line + "-k guest0"); err != nil {
		return err
	}
	return g.released()
}

// dhcpcdSLAAC has IPv6 from the advertisements alone.
func dhcpcdSLAAC(g *guest) error {
	if err := g.serve(); err != nil {
		return err
	}
	if _, err := g.sh(g.dhcpcdLine("") + "-6 -w guest0"); err != nil {
		return err
	}
	return first(
		g.wait(5*time.Second, "ip -6 addr show guest0", "inet6 fd75:736e:6574:0:5054:ff:fe00:64/64"),
		g.wait(5*time.Second, "cat /etc/resolv.conf", "nameserver fd75:736e:6574::3", "usernet.internal"),
		leased(g.s6.Leases()),
	)
}

// networkd runs systemd-networkd as in a container: with a read-only /sys it
// does not wait for udev. It tells what it learned in a file.
func networkd(g *guest) error {
	g.ra.Managed = true
	g.v4.MTU = 9000
	g.v4.Routes = []Route{{Prefix: prefix("192.168.128.0/17")}}
	if err := g.serve(); err != nil {
		return err
	}
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := errors.Join(
		unix.Mount("/sys", "/sys", "", unix.MS_BIND|unix.MS_REC, ""),
		unix.Mount("", "/sys", "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""),
		os.MkdirAll("/run/systemd/network", 0o755),
		os.MkdirAll("/run/systemd/netif", 0o755),
		os.WriteFile("/run/systemd/network/guest0.network", []byte(`[Match]
Name=guest0
[Network]
DHCP=yes
IPv6AcceptRA=yes
[DHCPv4]
UseDomains=yes
UseMTU=yes
[DHCPv6]
UseDomains=yes
[IPv6AcceptRA]
UseDomains=yes
`), 0o644))
	if err != nil {
		return err
	}
	if _, err := g.sh("SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console /lib/systemd/systemd-networkd > log 2>&1 & sleep 1"); err != nil {
		return err
	}
	err = first(
		g.wait(15*time.Second, "ip addr show guest0", "inet 10.0.2.100/24", "brd 10.0.2.255", "mtu 9000",
			"inet6 fd75:736e:6574::100/128", "inet6 fd75:736e:6574:0:5054:ff:fe00:64/64"),
		g.wait(5*time.Second, "ip route; ip -6 route", "default via 10.0.2.2", "192.168.128.0/17 via 10.0.2.2", "default via fe80::5055:aff:fe00:202"),
		g.wait(5*time.Second, "cat /run/systemd/netif/links/*", "DNS=10.0.2.3 fd75:736e:6574::3", "usernet.internal"),
		leased(g.s4.Leases(), "10.0.2.100"),
		leased(g.s6.Leases(), "fd75:736e:6574::100"),
	)
	if err != nil {
		g.sh("tail -n 100 log")
	}
	return err
}

// kernelSLAAC has no client at all: what the kernel takes from advertisements,
// the default route that comes and goes, and the name servers that it passes on.
func kernelSLAAC(g *guest) error {
	g.ra.MTU = 9000
	nd, err := listenRDNSS()
	if err != nil {
		return err
	}
	if err := g.serve(); err != nil {
		return err
	}
	begin := time.Now()
	if _, err := g.sh("ip link set guest0 up"); err != nil {
		return err
	}
	const (
		address = "inet6 fd75:736e:6574:0:5054:ff:fe00:64/64 scope global dynamic mngtmpaddr"
		route   = "default via fe80::5055:aff:fe00:202 dev guest0 proto ra metric 1024 expires 1"
	)
	if err := g.wait(5*time.Second, "ip -6 addr show guest0", address); err != nil {
		return err
	}
	fmt.Println("address after", time.Since(begin))
	if err := first(g.wait(time.Second, "ip -6 route", route, "sec mtu 9000 hoplimit 64"), nd("fd75:736e:6574::3", "usernet.internal")); err != nil {
		return err
	}
	gone := func(what string) error {
		return poll(2*time.Second, what, func() bool {
			out, _ := exec.Command("ip", "-6", "route").Output()
			return !strings.Contains(string(out), "default")
		})
	}
	g.adv.SetDefaultRouter(false)
	if err := gone("no default route"); err != nil {
		return err
	}
	g.adv.SetDefaultRouter(true)
	if err := g.wait(2*time.Second, "ip -6 route", "default via"); err != nil {
		return err
	}
	return first(g.stop(), gone("no default route after the end"), g.wait(0, "ip -6 addr show guest0", address))
}

// listenRDNSS returns a function that waits until the kernel has passed on an
// option with name server dns, and one with a domain whose labels are domain's.
func listenRDNSS() (func(dns, domain string) error, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_ND_USEROPT - 1)}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}),
	)
	return func(dns, domain string) error {
		var server, search bool
		buf := make([]byte, 4096)
		for !server || !search {
			n, err := unix.Read(fd, buf)
			if err != nil {
				return fmt.Errorf("wait for options of advertisements: %w", err)
			}
			const header = 16 + 16 // nlmsghdr, nduseroptmsg
			if n < header+8 || binary.NativeEndian.Uint16(buf[4:]) != unix.RTM_NEWNDUSEROPT {
				continue
			}
			switch o := buf[header:n]; o[0] {
			case optRDNSS:
				a, _ := netip.AddrFromSlice(o[8:24])
				server = server || a == addr(dns)
			case optDNSSL:
				search = search || strings.HasPrefix(string(o[8:]), string(appendName(nil, domain)))
			}
		}
		fmt.Println("the kernel passed on", dns, "and", domain)
		return nil
	}, err
}

// poll waits until f is true.
func poll(limit time.Duration, what string, f func() bool) error {
	for deadline := time.Now().Add(max(limit, patience)); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("no %s in %v", what, max(limit, patience))
		}
	}
	return nil
}
