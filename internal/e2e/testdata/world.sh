#!/usr/bin/env bash
# Prepare a place where rootless podman and rootlesskit can work, whatever the
# machine looks like, and run a command there as an ordinary user. Root is
# needed for that alone: a network namespace stands in for the host, and mounts
# that nobody else sees for its cgroups and its list of subordinate ids.
#
#   world.sh DIR COMMAND [ARGUMENT]...
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
dir=$1
shift
if [ -z "${WORLD_MADE:-}" ]; then
	WORLD_MADE=1 exec unshare --net --mount --pid --fork --mount-proc --kill-child "$0" "$dir" "$@"
fi
ip link set lo up
ip address add 192.0.2.1/24 dev lo
ip route add local 0.0.0.0/0 dev lo
ip -6 route add local ::/0 dev lo
# What lies behind some of the host's routes cannot be reached.
ip route add unreachable 203.0.113.0/26
ip route add prohibit 203.0.113.64/26
ip route add blackhole 203.0.113.128/26
ip link add uplink type veth peer name elsewhere
ip address add 192.0.2.33/32 dev uplink
ip link set uplink up
ip link set elsewhere up
ip route add 239.0.0.0/8 dev uplink
ip -6 address add 2001:db8::9/128 dev lo
sysctl -qw net.ipv4.ping_group_range="0 2147483647"
mount -t cgroup2 cgroup2 /sys/fs/cgroup
uid=1000
user=$(getent passwd $uid | cut -d: -f1)
if [ -z "$user" ]; then
	user=guest
	cp /etc/passwd /etc/group "$dir"
	echo "guest:x:$uid:$uid::$dir/home:/bin/sh" >>"$dir/passwd"
	echo "guest:x:$uid:" >>"$dir/group"
	mount --bind "$dir/passwd" /etc/passwd
	mount --bind "$dir/group" /etc/group
fi
echo "$user:100000:65536" >"$dir/sub"
touch /etc/subuid /etc/subgid
mount --bind "$dir/sub" /etc/subuid
mount --bind "$dir/sub" /etc/subgid
echo "nameserver 127.0.0.1" >"$dir/resolv.conf"
mount --bind "$dir/resolv.conf" "$(realpath /etc/resolv.conf)"
mkdir -p "$dir/home" "$dir/run" "$dir/tmp"
chmod 0755 "$dir"
chmod 0700 "$dir/run"
chown -R $uid:$uid "$dir/home" "$dir/run" "$dir/tmp"
dnsmasq --keep-in-foreground --port=53 --listen-address=127.0.0.1 --bind-interfaces --conf-file=/dev/null \
	--no-resolv --no-hosts --user= --group= --pid-file= --log-facility=/dev/null --host-record=www.example.test,192.0.2.1 &
mkdir -p "$dir/www"
echo served >"$dir/www/index.html"
head -c 1000000 /dev/urandom >"$dir/www/large"
busybox httpd -f -p 8000 -h "$dir/www" &
# A service manager of the user's wants a control group that it may divide, and
# believes only a machine that systemd has booted. A script that starts one says so.
group=
if grep -qs '^# world: manager' "$1"; then
	group=/sys/fs/cgroup/$(basename "$dir")
	mkdir "$group"
	chown -R $uid:$uid "$group"
	mount -t tmpfs tmpfs /run
	mkdir -p /run/systemd/system
fi
cd "$dir/home"
export HOME="$dir/home" XDG_RUNTIME_DIR="$dir/run" TMPDIR="$dir/tmp" USER=$user
unset DBUS_SESSION_BUS_ADDRESS XDG_CONFIG_HOME XDG_DATA_HOME
status=0
(
	[ -z "$group" ] || echo $BASHPID >"$group/cgroup.procs"
	exec setpriv --reuid=$uid --regid=$uid --clear-groups --inh-caps=-all "$@"
) || status=$?
if [ -n "$group" ]; then
	echo 1 >"$group/cgroup.kill"
	for _ in $(seq 300); do
		find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
		sleep 0.1
	done
fi
exit $status
