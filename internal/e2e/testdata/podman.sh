#!/usr/bin/env bash
# Run rootless podman on a program in the place of slirp4netns: one part of what
# there is to see.
#
#   podman.sh PROGRAM options|ports|pods|row
set -uo pipefail
. "$(dirname "$0")/checks.sh"
program=$1
part=$2
mkdir -p .config/containers
printf '[storage]\ndriver = "vfs"\n' >.config/containers/storage.conf
cat >.config/containers/containers.conf <<END
[engine]
network_cmd_path = "$program"
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[containers]
log_driver = "k8s-file"
END
image image.tar
podman import -q image.tar box >/dev/null || exit 1

run() { timeout 120 podman run --rm --cgroups=disabled --network "$@" 2>&1; }
start() { timeout 120 podman run -d --cgroups=disabled --network "$@" 2>&1; }
serve='httpd -f -p 80 -h /www'
who='SYSTEM:echo from $SOCAT_PEERADDR'

options() {
	socat TCP-LISTEN:7777,fork,reuseaddr "$who" &
	local whoami=$!
	run slirp4netns box sh -c 'ip address show tap0; ip route; cat /etc/resolv.conf; nslookup www.example.test; wget -q -O - http://www.example.test:8000/' |
		check plain 'inet 10.0.2.100/24' 'mtu 65520' 'default via 10.0.2.2' 'nameserver 10.0.2.3' 'Address.*192.0.2.1' '^served$'
	run slirp4netns:allow_host_loopback=false box sh -c 'wget -T 10 -q -O - http://10.0.2.2:8000/; echo status $?' | check closed 'status 1' '!^served'
	run slirp4netns:allow_host_loopback=true box wget -q -O - http://10.0.2.2:8000/ | check open '^served$'
	run slirp4netns:cidr=10.77.0.0/24 box sh -c 'ip address show tap0; ip route; cat /etc/resolv.conf; wget -q -O - http://www.example.test:8000/' |
		check cidr 'inet 10.77.0.100/24' 'default via 10.77.0.2' 'nameserver 10.77.0.3' '^served$'
	run slirp4netns:mtu=1400 box sh -c 'ip address show tap0; wget -q -O - http://www.example.test:8000/' | check mtu 'mtu 1400' '^served$'
	run slirp4netns:outbound_addr=192.0.2.9 -v /usr:/usr:ro box /usr/bin/socat -u TCP:192.0.2.1:7777 - | check outbound 'from 192.0.2.9'
	run slirp4netns:enable_ipv6=true box sh -c 'for i in $(seq 100); do ip -6 route | grep -q default && break; sleep 0.3; done; ip address show tap0; ip -6 route; wget -q -O - http://[2001:db8::1]:8000/' |
		check ipv6 'inet6 fd00::' 'default via fe80' '^served$'
	left left-after-run
	kill $whoami
	timeout 60 podman info 2>&1 | check info "executable: $program" 'slirp4netns version 1\.'
}

ports() {
	# Of the two handlers of ports, slirp4netns's shows who the client is.
	declare -A seen=([slirp4netns]='from 192.0.2.9' [rootlesskit]='from ')
	declare -A socket=([slirp4netns]='--api-socket [^ ]+ ' [rootlesskit]='')
	port=8100
	for handler in slirp4netns rootlesskit; do
		port=$((port + 1))
		id=$(start "slirp4netns:port_handler=$handler" -p $port:80 -p $((port + 10)):82 -p $port:81/udp -v /usr:/usr:ro box \
			sh -c "$serve & /usr/bin/socat TCP-LISTEN:82,fork '$who' & exec /usr/bin/socat UDP-RECVFROM:81,fork '$who'")
		get http://127.0.0.1:$port/ | check publish-$handler '^inside$'
		running | check spawned-$handler "--disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp --enable-ipv6 -c -e [0-9]+ -r [0-9]+ ${socket[$handler]}--netns-type=path [^ ]+ tap0"
		connect 192.0.2.1:$((port + 10)) bind=192.0.2.9 | check publish-client-$handler "${seen[$handler]}"
		tell 192.0.2.1:$port bind=192.0.2.9 | check publish-udp-$handler "${seen[$handler]}"
		timeout 30 podman stop -t 1 "$id" >/dev/null 2>&1
		left left-after-stop-$handler
		timeout 30 podman rm -f -t 0 "$id" >/dev/null 2>&1
	done

	# A container whose monitor is killed takes its network along.
	start slirp4netns --name orphan box sleep 1000 >/dev/null
	kill -9 "$(podman inspect --format '{{.State.ConmonPid}}' orphan)"
	left left-after-kill
	timeout 30 podman rm -f -t 0 orphan >/dev/null 2>&1

	# Networks of one's own share one program, which podman ends by a signal. Podman 5
	# has another one for them.
	if podman --version | grep -q ' [34]\.' && timeout 60 podman network create own >/dev/null 2>network.err; then
		start own --name web -p 8120:80 box $serve >/dev/null
		get http://127.0.0.1:8120/ | check network-publish '^inside$'
		run own box wget -q -O - http://192.0.2.1:8000/ | check network-out '^served$'
		running | check network-spawned '--disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp --enable-ipv6 -c -r [0-9]+ --netns-type=path .*/rootless-netns-[0-9a-f]+ tap0'
		timeout 30 podman rm -f -t 0 web >/dev/null 2>&1
		left left-after-network
	fi
}

one-network() { [ "$(running | grep -c ' tap0')" = 1 ]; }
pods() {
	timeout 60 podman pod create --name pod --infra-image box --infra-command 'sleep 1000' --network slirp4netns -p 8130:80 >/dev/null 2>pod.err || cat pod.err
	timeout 120 podman run -d --cgroups=disabled --pod pod --name web box $serve >/dev/null 2>>pod.err
	timeout 120 podman run --rm --cgroups=disabled --pod pod box sh -c 'for i in $(seq 100); do wget -q -O - http://127.0.0.1/ && break; sleep 0.3; done; wget -q -O - http://www.example.test:8000/' 2>&1 |
		check pod-shares '^inside$' '^served$'
	get http://127.0.0.1:8130/ | check pod-publish '^inside$'
	patiently one-network
	one-network && echo ok pod-one-network || echo "FAIL pod-one-network: $(running)"
	cat pod.err
	timeout 30 podman pod rm -f -t 0 pod >/dev/null 2>&1
	left left-after-pod

	(run slirp4netns box wget -q -O - http://www.example.test:8000/ >one) &
	run slirp4netns box wget -q -O - http://www.example.test:8000/ >two
	wait $!
	cat one two | tr -d '\n' | check both 'servedserved'
	left left-after-both
}

row() {
	# Many in a row leave nothing: no process, no file. What podman does after a
	# container's end goes on behind it: only at rest there is something to compare.
	processes() { ps -u "$(id -u)" -o comm= | grep -E '^(catatonit|conmon|crun|podman|rootlessport|slirp4netns|usernet)'; }
	state() { (processes; find "$XDG_RUNTIME_DIR" "$TMPDIR" 2>/dev/null) | sort; }
	more() { comm -13 <(echo "$before") <(state); }
	run slirp4netns box true # makes directories that stay
	patiently none processes-but-pause
	before=$(state)
	for _ in $(seq "${ROUNDS:-20}"); do run slirp4netns:port_handler=slirp4netns -p 8140:80 box wget -q -O - http://www.example.test:8000/; done | tr -d '\n' | check row "^(served){${ROUNDS:-20}}\$"
	left left-at-end
	patiently none more
	more | check row-leaves-nothing '!.'
}
# Podman's own process stays, to keep the namespaces.
processes-but-pause() { processes | grep -vE '^(catatonit|podman pause)$'; }

$part
podman unshare rm -rf .local >/dev/null 2>&1
exit 0
