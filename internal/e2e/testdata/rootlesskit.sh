#!/usr/bin/env bash
# Run rootlesskit on a program in the place of slirp4netns.
#
#   rootlesskit.sh PROGRAM [ROOTLESSKIT]
set -uo pipefail
. "$(dirname "$0")/checks.sh"
program=$1
rootlesskit=${2:-rootlesskit}
mkdir -p www
echo inside >www/index.html
kit() { exec timeout 300 "$rootlesskit" --net=slirp4netns --slirp4netns-binary="$program" --copy-up=/etc --copy-up=/run "$@" 2>&1; }
look='ip address show tap0; ip route; cat /etc/resolv.conf; busybox nslookup www.example.test; busybox wget -q -O - http://www.example.test:8000/'
await6='for i in $(seq 100); do ip -6 address show tap0 | grep "fd00::" | grep -vq tentative && break; sleep 0.3; done'

(kit --mtu=65520 sh -c "$look; busybox wget -q -O - http://10.0.2.2:8000/") |
	check plain 'inet 10.0.2.100/24' 'mtu 65520' 'default via 10.0.2.2' 'nameserver 10.0.2.3' 'Address.*192.0.2.1' '^served$'
(kit --mtu=65520 --disable-host-loopback --slirp4netns-sandbox=true --slirp4netns-seccomp=true \
	sh -c "$look; socat -u TCP:10.0.2.2:8000,connect-timeout=20 -") |
	check locked 'Address.*192.0.2.1' '^served$' 'Network is unreachable'
(kit --mtu=1500 --cidr=10.41.0.0/16 --slirp4netns-sandbox=auto --slirp4netns-seccomp=auto sh -c "$look") |
	check cidr 'inet 10.41.0.100/16' 'mtu 1500' 'default via 10.41.0.2' 'nameserver 10.41.0.3' '^served$'
(kit --ipv6 sh -c "$await6; ip address show tap0; busybox wget -q -O - http://[2001:db8::1]:8000/") | check ipv6 'inet6 fd00::' '^served$'
left left-after-run

inner="busybox httpd -f -p 80 -h $PWD/www & exec socat UDP-RECVFROM:81,fork SYSTEM:'echo from \$SOCAT_PEERADDR'"
declare -A spawned=(
	[slirp4netns]='--mtu 1500 -r 3 --disable-host-loopback --api-socket [^ ]+/\.s4nn\.sock --enable-sandbox --enable-seccomp [0-9]+ tap0'
	[builtin]='--mtu 65520 -r 3 [0-9]+ tap0'
	[detached-slirp4netns]='--mtu 65520 -r 3 --disable-host-loopback --api-socket [^ ]+/\.s4nn\.sock --enable-seccomp --userns-path=/proc/[0-9]+/ns/user --netns-type=path /proc/[0-9]+/root/[^ ]+/netns tap0'
	[detached-builtin]='--mtu 65520 -r 3 --userns-path=/proc/[0-9]+/ns/user --netns-type=path /proc/[0-9]+/root/[^ ]+/netns tap0'
)
port=8200
publish() { # NAME OPTION...: who comes in by published ports, and what stays at the end
	local name=$1 pid
	shift
	port=$((port + 2))
	(kit "$@" -p 0.0.0.0:$port:80/tcp -p 0.0.0.0:$((port + 1)):81/udp sh -c "$inner") >"log.$name" &
	pid=$!
	get http://127.0.0.1:$port/ >got
	running | check spawned-$name "${spawned[$name]}"
	cat got "log.$name" | check publish-$name '^inside$'
	tell 192.0.2.1:$((port + 1)) | check publish-udp-$name 'from '
	kill $pid
	wait $pid 2>/dev/null
	left left-after-publish-$name
}
publish slirp4netns --port-driver=slirp4netns --mtu=1500 --disable-host-loopback --slirp4netns-sandbox=auto --slirp4netns-seccomp=auto
publish builtin --port-driver=builtin --mtu=65520

# Ports can come and go, and the client's address is kept.
(kit --state-dir="$PWD/state" --port-driver=slirp4netns socat TCP-LISTEN:80,fork,reuseaddr SYSTEM:'echo from $SOCAT_PEERADDR') >log.ports &
pid=$!
ports() { # the API takes a moment to be there
	patiently timeout 10 rootlessctl --socket state/api.sock "$@" 2>>log.ports
}
ports add-ports 0.0.0.0:8290:80/tcp | check port-add '^1$'
connect 192.0.2.1:8290 bind=192.0.2.9 | check port-client 'from 192.0.2.9'
ports remove-ports 1 | check port-remove '^1$'
timeout 30 socat -u TCP:192.0.2.1:8290 - 2>&1 | check port-gone 'Connection refused'
# It is killed, and cannot say good-bye.
kill -9 "$(cat state/child_pid)" "$(pgrep -P $pid)" 2>/dev/null
wait $pid 2>/dev/null
left left-after-kill

if "$rootlesskit" --help | grep -q detach-netns; then
	enter='nsenter --net=$ROOTLESSKIT_STATE_DIR/netns'
	(kit --detach-netns --ipv6 --slirp4netns-seccomp=true --disable-host-loopback sh -c \
		"ip link; exec $enter sh -c '$await6; ip address show tap0; busybox nslookup www.example.test 10.0.2.3; busybox wget -q -O - http://192.0.2.1:8000/; busybox wget -q -O - http://[2001:db8::1]:8000/; socat -u TCP:10.0.2.2:8000,connect-timeout=20 -'") |
		check detached 'inet 10.0.2.100/24' 'inet6 fd00::' 'Address.*192.0.2.1' '^served$' 'Network is unreachable'
	echo "$inner" >inner.sh
	inner="exec $enter sh $PWD/inner.sh"
	publish detached-builtin --detach-netns --port-driver=builtin --mtu=65520
	# As containerd-rootless.sh does.
	publish detached-slirp4netns --detach-netns --port-driver=slirp4netns --mtu=65520 --disable-host-loopback --slirp4netns-sandbox=auto --slirp4netns-seccomp=auto
fi
exit 0
