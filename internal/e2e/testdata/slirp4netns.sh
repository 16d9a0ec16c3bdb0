#!/usr/bin/env bash
# Check what users of slirp4netns count on, on a program of that name: the
# original, or usernet.
#
#   slirp4netns.sh PROGRAM
set -uo pipefail
here=$(dirname "$(realpath "$0")")
. "$here/checks.sh"
program=$1
guest=
network=
inside() { nsenter -t "$guest" --user --net --preserve-credentials "$@"; }
# start ARGUMENT...: a new guest, and the program on it, where GUEST stands for
# its process. It returns when the program is ready.
start() {
	newGuest
	launch "$program" "$@"
}
newGuest() {
	unshare --user --map-root-user --net sleep 1000 &
	guest=$!
	patiently sleeps $guest
}
sleeps() { [ "$(cat /proc/$1/comm)" = sleep ]; }
ready() { [ -s ready ] || ! kill -0 $network 2>/dev/null; }
launch() { # COMMAND...
	rm -f ready gate
	mkfifo gate
	: >ready
	"${@/GUEST/$guest}" -r 3 -e 4 3>ready 4<gate >out 2>err &
	network=$!
	exec 5>gate
	patiently ready
	[ -s ready ] || echo "FAIL launch $*: $(cat out err | tr '\n' '|')"
}
finish() {
	exec 5>&-
	wait $network 2>/dev/null
	status=$?
	kill "$guest" 2>/dev/null
	wait "$guest" 2>/dev/null
}
status() { "$program" "$@" >out 2>err; echo "status $?"; cat err; sed 's/^/out: /' out; }
ask() { printf '%s' "$1" | timeout 20 ncat -U api 2>/dev/null; echo; }
serve() { # PORT: says who asks
	socat "TCP-LISTEN:$1,fork,reuseaddr" SYSTEM:'echo from $SOCAT_PEERADDR' &
}
serveInside() { # PORT
	(inside socat "TCP-LISTEN:$1,fork,reuseaddr" SYSTEM:'echo from $SOCAT_PEERADDR') 5>&- &
	inner=$!
}
talkSoon() { patiently answered "$1"; } # as talk, once the server is there
answered() { talk "$1" | grep from; }
talk() { timeout 20 socat -u "TCP:$1,connect-timeout=20" - 2>&1; }
listens() { inside ss -Hltn "sport = :$1" | grep -q .; }
serve 7777
server=$!
socat TCP6-LISTEN:7778,fork,reuseaddr SYSTEM:'echo from $SOCAT_PEERADDR' &
server="$server $!"
large=$here/www/large

status --help | check help 'status 0' 'out: .*--netns-type' 'out: .*--enable-sandbox' '!^slirp'
status --version | check version 'status 0' 'out: slirp4netns version 1\.' 'out: commit: ' 'out: SLIRP_CONFIG_VERSION_MAX: [0-9]'
status --nonsense | check unknown-option 'status 1' "unrecognized option '--nonsense'" 'out: Usage'
status | check no-arguments 'status 1' 'out: Usage'
status 1 | check no-tapname 'status 1' 'out: Usage'
status -m 65522 1 tap0 | check mtu-too-large 'status 1' 'MTU must be a positive integer'
status -r -1 1 tap0 | check bad-ready-fd 'status 1' 'ready-fd must be a non-negative integer'
status -c --cidr=10.0.2.100/24 1 tap0 | check bad-cidr 'status 1' 'CIDR needs to be a network address like 10.0.2.0/24, not like 10.0.2.100/24'
status -c --cidr=10.0.2.0/26 1 tap0 | check small-cidr 'status 1' 'prefix length needs to be 1-25'
status -c --outbound-addr=nowhere 1 tap0 | check bad-outbound 'status 1' 'outbound-addr has to be valid ipv4 address or interface name'
status --macaddress=02:00:00:00:00:01 1 tap0 | check mac-without-c 'status 1' 'cannot be specified when --configure'
status --netns-type=path /nowhere tap0 | check no-path 'status 1' 'existing path expected'
status --target-type=bess -c x | check bess-conflict 'status 1' 'conflicts with --target-type=bess'
status -e x 1 tap0 | check bad-exit-fd 'status 1' 'exit-fd must be a non-negative integer' 'out: Usage'
status --target-type=vm x | check bad-target 'status 1' '--target-type must be either "netns" or "bess"'
status --userns-path=/nowhere 1 tap0 | check no-userns 'status 1' "userns path doesn't exist: /nowhere"
status -c 2147483647 tap0 | check no-process 'status 1' '^child failed\(1\)' '!Starting slirp'

# Options after the operands, bundled and abbreviated.
start GUEST tap11 -c --mt=65520 --api-sock=api --macaddress=0e:d4:18:d9:38:fb
[ "$(cat ready)" = 1 ] && [ "$(stat -c %s ready)" = 1 ] && echo "ok ready-byte" || echo "FAIL ready-byte: $(od -c ready)"
inside ip address show | check configured 'lo: .*UP' 'tap11: .*UP.* mtu 65520' '0e:d4:18:d9:38:fb' 'inet 10.0.2.100/24 brd 10.0.2.255'
inside ip route | check route 'default via 10.0.2.2 dev tap11'
talkSoon 127.0.0.1:7777 >/dev/null
talkSoon '[::1]:7778' >/dev/null
inside timeout 20 socat -u TCP:10.0.2.2:7777 - | check host-loopback 'from 127.0.0.1'
inside timeout 20 socat -u TCP:169.254.169.254:7777 - | check link-local 'from'
inside timeout 20 socat -u TCP:192.0.2.1:7777 - | check own-address 'from'
inside timeout 20 socat -u TCP:10.0.2.2:9,connect-timeout=20 - 2>&1 | check refused 'Connection refused'
inside timeout 20 socat -u TCP:203.0.113.1:9,connect-timeout=20 - 2>&1 | check unreachable 'No route to host'
inside timeout 20 socat -u TCP:203.0.113.65:9,connect-timeout=20 - 2>&1 | check prohibited 'Network is unreachable'
inside timeout 20 socat -u TCP:203.0.113.129:9,connect-timeout=20 - 2>&1 | check blackhole 'Network is unreachable'
socat UDP-RECVFROM:7779,ip-add-membership=239.1.2.3:uplink,fork,reuseaddr SYSTEM:'echo from $SOCAT_PEERADDR' 5>&- &
group=$!
greet() {
	inside timeout 5 python3 -c 'if 1:
		import socket
		s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
		s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 4)
		s.sendto(b"hello", ("239.1.2.3", 7779))
		data, peer = s.recvfrom(100)
		print(data.decode().strip(), "by", peer[0])'
}
patiently greet | check multicast 'from 192.0.2.33 by 192.0.2.33'
kill $group
inside timeout 20 dig +short +tries=3 +time=5 @10.0.2.3 www.example.test | check dns-udp '^192.0.2.1$'
inside timeout 20 dig +short +tcp +tries=3 +time=5 @10.0.2.3 www.example.test | check dns-tcp '^192.0.2.1$'
inside ping -c 1 -W 10 10.0.2.2 | check ping-gateway '1 received'
inside ping -c 1 -W 10 10.0.2.3 | check ping-dns '1 received'
inside ping -c 1 -W 10 192.0.2.7 | check ping-outside '1 received'
inside timeout 20 ping -c 1 -W 10 203.0.113.1 2>&1 | check ping-unreachable 'From 10.0.2.2 .*Host Unreachable'
echo hello | inside timeout 20 socat -t 5 - UDP:10.0.2.2:9 2>&1 | check udp-refused 'Connection refused'
inside timeout 20 ping -c 1 -W 10 10.0.2.50 2>&1 | check no-neighbour 'Unreachable|100% packet loss'
grep . out err | check banner 'Starting slirp' '\* MTU:             65520$' '\* Network:         10.0.2.0$' '\* Netmask:         255.255.255.0$' '\* Gateway:         10.0.2.2$' \
	'\* DNS:             10.0.2.3$' '\* DHCP begin:      10.0.2.15$' '\* DHCP end:        10.0.2.30$' '\* Recommended IP:  10.0.2.100$' \
	'\* API Socket:      api$' '\* MAC address:     0e:d4:18:d9:38:fb$' 'WARNING: 127.0.0.1'
ask '{"execute":"list_hostfwd"}' | check api-list-empty '"entries": *\[ *\]'
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":8301,"guest_addr":"10.0.2.100","guest_port":80}}' | check api-add '"return".*"id": *1 *\}'
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"","host_port":8301,"guest_addr":"","guest_port":80}}' | check api-taken '"error".*slirp_add_hostfwd failed'
ask '{"execute":"add_hostfwd","arguments":{"proto":"udp","host_port":8302,"guest_port":81}}' | check api-add-udp '"id": *2 *\}'
ask '{"execute":"list_hostfwd"}' | check api-list '"entries": *\[ *\{ *"id": *1, *"proto": *"tcp", *"host_addr": *"0.0.0.0", *"host_port": *8301, *"guest_addr": *"10.0.2.100", *"guest_port": *80 *\}'
ask '{"execute":"list_hostfwd"}' | check api-list-manual '"return": *\{ *"entries"'
ask x | check api-no-json 'bad request: cannot parse JSON'
ask '[]' | check api-no-object 'bad request: json_object\(\) failed'
ask '{}' | check api-no-execute 'bad request: no execute found'
ask '{"execute":"x"}' | check api-unknown 'bad request: unknown execute'
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":"8304","guest_port":80}}' | check api-port-text 'bad arguments.host_port'
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8304}}' | check api-no-guest-port 'bad arguments.guest_port'
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"nowhere","host_port":8304,"guest_port":80}}' | check api-host-addr 'bad arguments.host_addr'
ask '{"execute":"remove_hostfwd","arguments":{"id":"1"}}' | check api-id-text 'remove_hostfwd: bad arguments.id'
ask '{"execute":"list_hostfwd"}trailing' | check api-trailing '"entries"'
ask '{"execute":"add_hostfwd","arguments":{"proto":"sctp"}}' | check api-proto 'bad arguments.proto'
# What never ends to write may not come to read.
flood() { timeout 5 ncat -U api </dev/zero 2>/dev/null | grep .; }
patiently flood | check api-too-large 'bad request: too large message'
serveInside 80
(inside socat UDP-RECVFROM:81,fork SYSTEM:'echo from $SOCAT_PEERADDR') 5>&- &
talkSoon 192.0.2.1:8301,bind=192.0.2.9 | check forward-source 'from 192.0.2.9'
talk 127.0.0.1:8301 | check forward-loopback 'from 10.0.2.2'
tell 192.0.2.1:8302 bind=192.0.2.9 | check forward-udp 'from 192.0.2.9'
(inside socat TCP-LISTEN:82 PIPE) 5>&- &
patiently listens 82
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8305,"guest_port":82}}' >id
mkfifo words
timeout 150 socat - TCP:192.0.2.1:8305 <words >talked 5>&- &
talker=$!
exec 6>words
echo before >&6
patiently grep -q before talked
ask "{\"execute\":\"remove_hostfwd\",\"arguments\":{\"id\":$(grep -oE '[0-9]+' id)}}" >/dev/null
ask '{"execute":"remove_hostfwd","arguments":{"id":1}}' | check api-remove '"return": *\{ *\}'
echo after >&6
patiently grep -q after talked
exec 6>&-
wait $talker
check forward-lives-on before after <talked
ask '{"execute":"remove_hostfwd","arguments":{"id":1}}' | check api-remove-again 'slirp_remove_hostfwd failed'
talk 127.0.0.1:8301 | check forward-removed 'Connection refused'
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp6","host_addr":"::1","host_port":8303,"guest_port":80}}' | check api-add-ipv6 '"id": *[0-9]'
talk '[::1]:8303' | check forward-ipv6 'from '
ask '{"execute":"add_hostfwd","arguments":{"proto":"udp6","host_port":8307,"guest_port":81}}' >/dev/null
tell6() { echo hello | timeout 20 socat -t 1 - UDP6:[2001:db8::9]:8307 2>/dev/null | grep .; }
patiently tell6 | check forward-ipv6-udp 'from 10.0.2.2'
echo data >&5
sleep 0.2
kill -0 $network 2>/dev/null && echo "ok exit-fd-data" || echo "FAIL exit-fd-data: it has ended"
finish
echo "status $status" | check exit-fd 'status 0'
[ -e api ] && echo "FAIL api-socket-removed: it is there" || echo "ok api-socket-removed"
kill $inner 2>/dev/null

# Nobody reads what it says, and who would end it has gone before it began.
newGuest
mkfifo said
sleep 0.2 <said &
: >ready
"$program" -c -a api -r 3 "$guest" tap0 3>ready >said 2>&1 &
network=$!
patiently ready
sleep 0.3
ask x | check broken-pipe 'cannot parse JSON'
kill -0 $network 2>/dev/null && echo "ok broken-pipe-lives" || echo "FAIL broken-pipe-lives: it has ended"
kill $network
wait $network 2>/dev/null
timeout 20 "$program" -c -e 4 "$guest" tap0 >out 2>err 4< <(true)
echo "status $?" | check exit-fd-gone 'status 0'
kill "$guest"

start -c --disable-host-loopback --cidr=10.41.0.0/16 -m 1400 GUEST tap0
inside ip address show tap0 | check cidr 'inet 10.41.0.100/16' 'mtu 1400'
inside timeout 20 socat -u TCP:10.41.0.2:7777,connect-timeout=20 - 2>&1 | check closed-loopback 'Network is unreachable'
inside ping -c 1 -W 10 10.41.0.2 | check closed-ping '1 received'
inside timeout 20 socat -u TCP:192.0.2.1:7777 - | check closed-own-address 'from'
inside timeout 20 dig +short +tries=3 +time=5 @10.41.0.3 www.example.test | check closed-dns '^192.0.2.1$'
kill $network
wait $network
echo "status $?" | check sigterm 'status 143'
finish

# Its caller is root in the user namespace, as Buildah is.
newGuest
: >ready
nsenter -t "$guest" --user --preserve-credentials unshare --net sleep 1000 &
sleeper=$!
patiently sleeps $sleeper
nsenter -t "$guest" --user --preserve-credentials "$program" --mtu 65520 -r 3 -c $sleeper tap0 3>ready >out 2>err &
network=$!
patiently ready
nsenter -t $sleeper --user --net --preserve-credentials timeout 20 socat -u TCP:192.0.2.1:7777 - | cat - err | check within-userns 'from'
kill $network $sleeper "$guest"
wait $network $sleeper "$guest" 2>/dev/null

start -c --disable-dns --outbound-addr=192.0.2.9 GUEST tap0
inside timeout 20 dig +tries=1 +time=1 @10.0.2.3 www.example.test 2>&1 | check no-dns 'timed out|no servers could be reached'
inside timeout 20 socat -u TCP:192.0.2.1:7777 - | check outbound-addr 'from 192.0.2.9'
inside timeout 20 socat -u TCP:10.0.2.2:7777 - | check outbound-addr-loopback 'from 192.0.2.9'
finish

# The interface of the host is looked at once, and IPv6 stays out without -6.
start -c --outbound-addr=uplink -m 68 GUEST tap0
inside timeout 20 socat -u TCP:192.0.2.1:7777 - | check outbound-interface 'from 192.0.2.33'
inside ip address show tap0 | check mtu-least 'mtu 68'
inside timeout 100 busybox wget -q -O - http://192.0.2.1:8000/large | cmp - "$large" 2>&1 | check mtu-least-transfer '!.'
finish
start -c -m 65521 GUEST tap0
inside ip address show tap0 | check mtu-most 'mtu 65521' '!inet6 fd00'
inside timeout 100 busybox wget -q -O - http://192.0.2.1:8000/large | cmp - "$large" 2>&1 | check mtu-most-transfer '!.'
finish

start -6 --outbound-addr6=2001:db8::9 --netns-type=path --userns-path=/proc/GUEST/ns/user /proc/GUEST/ns/net tap0
inside ip address | check untouched '!10\.0\.2' '!tap0:.*UP' '!lo:.*UP'
printf '#!/bin/sh\n[ "$1" = bound ] && env\n' >show
chmod +x show
inside sh -c 'ip link set lo up; ip link set tap0 up; busybox udhcpc -i tap0 -t 10 -O mtu -O serverid -n -q -f -s ./show' >leased 2>&1
check dhcp 'lease of 10.0.2.15 obtained' '^ip=10.0.2.15$' '^subnet=255.255.255.0$' '^router=10.0.2.2$' '^dns=10.0.2.3$' '^serverid=10.0.2.2$' '!^domain=' '!^hostname=' <leased
check dhcp-more '^lease=3600$' '^mtu=1500$' '^broadcast=10.0.2.255$' '!^siaddr=' <leased
addressed6() { inside ip -6 address show "$1" | grep 'fd00::' | grep -vq tentative; }
patiently addressed6 tap0
inside ip -6 address show tap0 | check slaac 'inet6 fd00::'
inside ip -6 route | check ipv6-route 'default via fe80::2 '
(inside ip -6 address show tap0; inside ip -6 route) | check ipv6-lifetimes 'fd00::.*/64 scope global' 'valid_lft 8[56][0-9]{3}sec preferred_lft 1[34][0-9]{3}sec' 'default .* expires 1[678][0-9]{2}sec'
inside ping -c 1 -W 10 fd00::3 | check ipv6-ping '1 received'
inside timeout 20 socat -u TCP:[fd00::2]:7778 - | check ipv6-loopback 'from '
inside timeout 20 socat -u TCP:[2001:db8::1]:7778 - | check ipv6-outbound 'from .*2001:0?db8:.*:0*9.?$'
inside timeout 100 busybox wget -q -O - 'http://[2001:db8::1]:8000/' | check ipv6-out '^served$'
finish

newGuest
(inside python3 "$here/bess.py" "$PWD/bess" eth0) 5>&- &
card=$!
launch "$program" --target-type=bess --api-sock=api "$PWD/bess"
[ "$(cat ready)" = 1 ] && echo "ok bess-ready" || echo "FAIL bess-ready: $(od -c ready)"
grep . out err | check bess-banner 'WARNING: BESS mode is experimental' 'Waiting for connection to'
patiently inside ip link show eth0 >/dev/null 2>&1
inside sh -ec 'ip link set lo up; ip link set eth0 up; ip address add 10.0.2.100/24 dev eth0; ip route add default via 10.0.2.2'
inside ping -c 1 -W 10 10.0.2.2 | check bess-ping '1 received'
inside timeout 20 dig +short +tries=3 +time=5 @10.0.2.3 www.example.test | check bess-dns '^192.0.2.1$'
inside timeout 100 busybox wget -q -O - http://192.0.2.1:8000/large | cmp - "$large" 2>&1 | check bess-transfer '!.'
serveInside 80
ask '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8306,"guest_port":80}}' >/dev/null
talkSoon 192.0.2.1:8306,bind=192.0.2.9 | check bess-forward 'from 192.0.2.9'
finish
echo "status $status" | check bess-exit 'status 0'
kill $card $inner 2>/dev/null

if "$program" --help | grep -q tapfd; then # since 1.3
	newGuest
	launch python3 "$here/tapfd.py" "$guest" tap7 "$program" --netns-type=tapfd --enable-ipv6 --enable-sandbox -m 1500 9
	inside sh -ec 'ip link set lo up; ip link set tap7 up; ip address add 10.0.2.100/24 dev tap7; ip route add default via 10.0.2.2'
	inside timeout 20 dig +short +tries=3 +time=5 @10.0.2.3 www.example.test | check tapfd-dns '^192.0.2.1$'
	inside timeout 20 socat -u TCP:10.0.2.2:7777 - | check tapfd-tcp 'from 127.0.0.1'
	inside ip address show tap7 | check tapfd-untouched 'mtu 1500'
	patiently addressed6 tap7
	inside timeout 100 busybox wget -q -O - 'http://[2001:db8::1]:8000/' | check tapfd-ipv6 '^served$'
	finish
	echo "status $status" | check tapfd-exit 'status 0'
fi

start -c --enable-sandbox --enable-seccomp --disable-host-loopback GUEST tap0
inside timeout 20 dig +short +tries=3 +time=5 @10.0.2.3 www.example.test | check locked-dns '^192.0.2.1$'
inside timeout 20 socat -u TCP:192.0.2.1:7777 - | check locked-tcp 'from'
grep -E '^(Cap|NoNew|Seccomp)' /proc/$network/status | check locked 'CapEff:\s*0*400|CapEff:\s*0*$' 'NoNewPrivs:\s*1' 'Seccomp:\s*2'
# One that is locked can still replace the process that faces the guest.
worker=$(running | awk '/usernet-worker/ { print $1 }')
[ -z "$worker" ] || kill -9 $worker
named() { inside timeout 20 dig +short +tries=3 +time=5 @10.0.2.3 www.example.test | grep 192; }
patiently named | check locked-again '^192.0.2.1$'
finish
echo "status $status" | check locked-exit 'status 0'
kill $server
exit 0
