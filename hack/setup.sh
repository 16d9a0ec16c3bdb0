#!/usr/bin/env bash
# Install what a purpose needs on Debian or Ubuntu: nothing that is there
# already, no service started, quiet unless there is something to say.
#
#   hack/setup.sh demo|test
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# Packages for the demo.
demo=(
	ca-certificates # for modules over HTTPS
	curl            # the guest's web client
	bind9-dnsutils  # dig
	dnsmasq-base    # the demo's resolver
	iproute2        # ip
	iputils-ping
	python3         # the demo's web server
	udhcpc          # the guest's DHCP client
	util-linux      # unshare, nsenter, setpriv
)
# Packages for the tests besides.
test=(
	gcc libc6-dev   # the race detector
	busybox-static
	containernetworking-plugins # beside usernet as a CNI plugin
	conmon crun podman # a client of slirp4netns, as is rootlesskit
	dnsperf
	ethtool
	iperf3
	iptables # for Docker
	ncat
	netcat-openbsd
	nftables
	nginx-light
	nmap
	procps
	rootlesskit
	slirp4netns
	socat
	tcpdump
	uidmap
	wrk
)
# Docker is another client. Where there is one already, another would replace it.
if ! command -v dockerd >/dev/null; then
	test+=(docker.io)
fi
# Packages for tests that not every release has.
optional=(isc-dhcp-client dhcpcd-base passt systemd)

case "${1:-}" in
demo) wanted=("${demo[@]}") maybe=() ;;
test) wanted=("${demo[@]}" "${test[@]}") maybe=("${optional[@]}") ;;
*)
	echo "usage: hack/setup.sh demo|test" >&2
	exit 2
	;;
esac

if ! command -v go >/dev/null; then
	echo "setup: Go is missing: install it from https://go.dev/dl/" >&2
	exit 1
fi

installed() {
	[ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]
}

missing=()
for p in "${wanted[@]}" "${maybe[@]}"; do
	installed "$p" || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "setup: this is neither Debian nor Ubuntu: install the counterparts of: ${missing[*]}" >&2
	exit 1
fi
root=()
if [ "$(id -u)" != 0 ]; then
	if ! command -v sudo >/dev/null; then
		echo "setup: run as root: apt-get install --no-install-recommends ${missing[*]}" >&2
		exit 1
	fi
	root=(sudo)
	[ -t 0 ] || root+=(-n) # nobody to ask for a password
fi

log=$(mktemp)
# Packages such as nginx start their service when they are installed, unless
# this file says no.
policy=/usr/sbin/policy-rc.d made=
finish() {
	[ -z "$made" ] || "${root[@]}" rm -f "$policy"
	rm -f "$log"
}
trap finish EXIT
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$policy" >/dev/null
	"${root[@]}" chmod 0755 "$policy"
	made=yes
fi

apt() {
	if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" </dev/null >"$log" 2>&1; then
		cat "$log" >&2
		echo "setup: apt-get $1 failed" >&2
		return 1
	fi
}

apt update
install=()
for p in "${missing[@]}"; do
	if [[ " ${maybe[*]} " != *" $p "* ]] || apt-cache show "$p" >/dev/null 2>&1; then
		install+=("$p")
	fi
done
[ ${#install[@]} -gt 0 ] || exit 0
echo "setup: installing ${install[*]}"
apt install --no-install-recommends "${install[@]}"
