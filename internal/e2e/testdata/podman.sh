#!/usr/bin/env bash
# Run rootless podman on a program in the place of slirp4netns. Each check
# prints "ok NAME" or "FAIL NAME" and why.
#
#   podman.sh PROGRAM
set -uo pipefail
mkdir -p .config/containers image/bin image/etc image/tmp image/www
printf '[storage]\ndriver = "vfs"\n' >.config/containers/storage.conf
cat >.config/containers/containers.conf <<END
[engine]
network_cmd_path = "$1"
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[containers]
log_driver = "k8s-file"
END
cp "$(command -v busybox)" image/bin/busybox
for applet in sh ip wget nslookup httpd sleep cat echo nc ping; do ln -s busybox image/bin/$applet; done
echo inside >image/www/index.html
tar -C image -cf image.tar .
podman import -q image.tar box >/dev/null || exit 1

run() { timeout 30 podman run --rm --cgroups=disabled --network "$@" 2>&1; }
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
# get URL: asks until somebody answers, for a container takes a moment to listen.
get() {
	local _
	for _ in $(seq 50); do
		timeout 2 busybox wget -q -O - "$1" 2>/dev/null && return
		sleep 0.1
	done
}
left() { # NAME: nothing of the network stays
	local _
	for _ in $(seq 50); do
		pgrep -u "$(id -u)" -f "^$program " >/dev/null || break
		sleep 0.1
	done
	pgrep -u "$(id -u)" -af "^$program " | sed "s/^/FAIL $1: /" | grep . || echo "ok $1"
}
program=$1

run slirp4netns box sh -c 'ip address show tap0; ip route; cat /etc/resolv.conf; nslookup www.example.test; wget -q -O - http://www.example.test:8000/' |
	check plain 'inet 10.0.2.100/24' 'mtu 65520' 'default via 10.0.2.2' 'nameserver 10.0.2.3' 'Address.*192.0.2.1' '^served$'
run slirp4netns:allow_host_loopback=false box sh -c 'wget -T 2 -q -O - http://10.0.2.2:8000/; echo status $?' | check closed 'status 1'
run slirp4netns:allow_host_loopback=true,cidr=10.77.0.0/24,mtu=1400 box sh -c 'ip address show tap0; wget -q -O - http://10.77.0.2:8000/' |
	check options 'inet 10.77.0.100/24' 'mtu 1400' '^served$'
run slirp4netns:enable_ipv6=true box sh -c 'for i in 1 2 3 4 5 6 7 8 9 10; do ip -6 route | grep -q default && break; sleep 0.3; done; ip address show tap0; ip -6 route; wget -q -O - http://[2001:db8::1]:8000/' |
	check ipv6 'inet6 fd00::' 'default via fe80' '^served$'
left left-after-run

port=8100
for handler in slirp4netns rootlesskit; do
	port=$((port + 1))
	id=$(timeout 30 podman run -d --cgroups=disabled --network "slirp4netns:port_handler=$handler" -p $port:80 box httpd -f -p 80 -h /www 2>&1)
	get http://127.0.0.1:$port/ | check "publish-$handler" '^inside$'
	timeout 20 podman rm -f -t 0 "$id" >/dev/null 2>&1
done
left left-after-rm

timeout 20 podman pod create --name pod --infra-image box --infra-command 'sleep 1000' --network slirp4netns -p 8110:80 >/dev/null 2>pod.err || cat pod.err
timeout 20 podman run -d --cgroups=disabled --pod pod --name web box httpd -f -p 80 -h /www >/dev/null 2>>pod.err
timeout 20 podman run --rm --cgroups=disabled --pod pod box wget -q -O - http://127.0.0.1/ 2>&1 | check pod-shares '^inside$'
get http://127.0.0.1:8110/ | check pod-publish '^inside$'
cat pod.err
timeout 30 podman pod rm -f -t 0 pod >/dev/null 2>&1
left left-after-pod

(run slirp4netns box wget -q -O - http://www.example.test:8000/ >one) &
run slirp4netns box wget -q -O - http://www.example.test:8000/ >two
wait $!
cat one two | tr -d '\n' | check both 'servedserved'
for i in $(seq "${ROUNDS:-3}"); do run slirp4netns box wget -q -O - http://www.example.test:8000/; done | tr -d '\n' | check row "^(served){${ROUNDS:-3}}\$"
left left-at-end
podman unshare rm -rf .local >/dev/null 2>&1
exit 0
