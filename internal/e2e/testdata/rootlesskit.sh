#!/usr/bin/env bash
# Run rootlesskit on a program in the place of slirp4netns. Each check prints
# "ok NAME" or "FAIL NAME" and why.
#
#   rootlesskit.sh PROGRAM
set -uo pipefail
program=$1
mkdir -p www
echo inside >www/index.html
check() { # NAME PATTERN... reads the text to look at
	local name=$1 text pattern
	shift
	text=$(cat)
	for pattern in "$@"; do
		if ! grep -qE -e "$pattern" <<<"$text"; then
			printf 'FAIL %s: no %s in: %s\n' "$name" "$pattern" "$(tr '\n' '|' <<<"$text")"
			return
		fi
	done
	echo "ok $name"
}
kit() { exec timeout 30 rootlesskit --net=slirp4netns --slirp4netns-binary="$program" --copy-up=/etc --copy-up=/run "$@" 2>&1; }

kit --mtu=65520 sh -c 'ip address show tap0; ip route; cat /etc/resolv.conf; busybox nslookup www.example.test; busybox wget -q -O - http://10.0.2.2:8000/' |
	check plain 'inet 10.0.2.100/24' 'mtu 65520' 'default via 10.0.2.2' 'nameserver 10.0.2.3' 'Address.*192.0.2.1' '^served$'
kit --mtu=65520 --disable-host-loopback --slirp4netns-sandbox=true --slirp4netns-seccomp=true \
	sh -c 'busybox wget -q -O - http://www.example.test:8000/; socat -u TCP:10.0.2.2:8000,connect-timeout=2 -' |
	check locked '^served$' 'Network is unreachable'
kit --mtu=1500 --cidr=10.41.0.0/16 sh -c 'ip address show tap0; busybox wget -q -O - http://www.example.test:8000/' |
	check cidr 'inet 10.41.0.100/16' '^served$'
kit --ipv6 sh -c 'for i in 1 2 3 4 5 6 7 8 9 10; do ip -6 address show tap0 | grep "fd00::" | grep -vq tentative && break; sleep 0.3; done; busybox wget -q -O - http://[2001:db8::1]:8000/' |
	check ipv6 '^served$'
port=8200
for driver in slirp4netns builtin; do
	port=$((port + 1))
	kit --port-driver=$driver -p 0.0.0.0:$port:80/tcp busybox httpd -f -p 80 -h "$PWD/www" >log.$driver &
	kit=$!
	for _ in $(seq 50); do
		timeout 2 busybox wget -q -O - http://127.0.0.1:$port/ >page 2>/dev/null && break
		sleep 0.1
	done
	cat page log.$driver | check "publish-$driver" '^inside$'
	kill $kit
	wait $kit 2>/dev/null
done
for _ in $(seq 50); do
	pgrep -u "$(id -u)" -f "^$program " >/dev/null || break
	sleep 0.1
done
pgrep -u "$(id -u)" -af "^$program " | sed "s/^/FAIL left-at-end: /" | grep . || echo "ok left-at-end"
exit 0
