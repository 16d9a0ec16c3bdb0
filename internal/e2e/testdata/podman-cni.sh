#!/usr/bin/env bash
# Run rootless podman with its CNI backend on networks of type usernet.
#
#   podman-cni.sh DIRECTORY-OF-THE-PLUGIN SLIRP4NETNS
set -uo pipefail
. "$(dirname "$0")/checks.sh"
program=$1/usernet
mkdir -p .config/containers .config/cni/net.d
printf '[storage]\ndriver = "vfs"\n' >.config/containers/storage.conf
cat >.config/containers/containers.conf <<END
[engine]
network_cmd_path = "$2"
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[containers]
log_driver = "k8s-file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["$1", "/usr/lib/cni"]
END
cat >.config/cni/net.d/apps.conflist <<END
{"cniVersion": "0.4.0", "name": "apps", "plugins": [{"type": "usernet", "mtu": 9000, "cidr": "10.0.2.0/24",
	"capabilities": {"portMappings": true, "aliases": true, "ips": true, "mac": true}}]}
END
image image.tar
podman import -q image.tar box >/dev/null || exit 1
podman info --format '{{.Host.NetworkBackend}}' | check backend '^cni$'

run() { timeout 60 podman run --rm --cgroups=disabled --network "$@" 2>&1; }
run apps box sh -c 'ip address show eth0; ip route; cat /etc/resolv.conf; wget -q -O - http://www.example.test:8000/' |
	check plain 'inet 10.0.2.100/24' 'mtu 9000' 'default via 10.0.2.2' 'nameserver 10.0.2.3' '^served$'
left left-after-run
run apps --ip 10.0.2.50 --mac-address 02:00:00:00:00:50 box ip address show eth0 | check address 'inet 10.0.2.50/24' '02:00:00:00:00:50'

timeout 60 podman run -d --cgroups=disabled --network apps -p 8201:80 --name web box httpd -f -p 80 -h /www >/dev/null
get http://127.0.0.1:8201/ | check publish '^inside$'
# Another container finds it by its name.
run apps box wget -q -O - http://web/ | check by-name '^inside$'
timeout 30 podman stop -t 1 web >/dev/null 2>&1
left left-after-stop
timeout 30 podman start web >/dev/null 2>&1
get http://127.0.0.1:8201/ | check again '^inside$'
# Its daemon is killed: podman still gets rid of the container.
kill -9 $(running | sed -n 's/^\([0-9]*\) usernet .*ifname.*/\1/p')
timeout 30 podman rm -f -t 0 web 2>&1 | check remove '^web$'
left left-after-kill
# Last, for podman keeps its namespace, and slirp4netns for it, after a failure.
run apps --ip 10.1.2.50 box true | check bad-address '10.1.2.50: it is not in its subnet'
find "$XDG_RUNTIME_DIR/usernet/cni" -type f -o -type s | check no-files '!.'
podman unshare rm -rf .local >/dev/null 2>&1
exit 0
