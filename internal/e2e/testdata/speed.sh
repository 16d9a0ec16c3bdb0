#!/usr/bin/env bash
# Measure what rootless podman's containers get from programs in the place of
# slirp4netns, in turn: to the host and back, and by a published port. Each
# figure is a line "speed WHAT PROGRAM BITS-PER-SECOND".
#
#   speed.sh ROUNDS SECONDS PROGRAM...
set -uo pipefail
. "$(dirname "$0")/checks.sh"
rounds=$1 seconds=$2
shift 2
mkdir -p .config/containers
printf '[storage]\ndriver = "vfs"\n' >.config/containers/storage.conf
printf '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n[containers]\nlog_driver = "k8s-file"\n' >.config/containers/containers.conf
image image.tar
podman import -q image.tar box >/dev/null || exit 1
container() { timeout 120 podman --network-cmd-path "$program" run --cgroups=disabled --network slirp4netns:port_handler=slirp4netns -v /usr:/usr:ro "$@"; }
listening() { podman logs served 2>&1 | grep -q listening; }
measure() { # WHAT COMMAND...
	local what=$1
	shift
	"$@" 2>err | python3 -c 'import json, sys; print("speed", *sys.argv[1:], json.load(sys.stdin)["end"]["sum_received"]["bits_per_second"])' "$what" "$program" || cat err
}
iperf3 -s -B 192.0.2.1 >/dev/null &
server=$!
for _ in $(seq "$rounds"); do
	for program; do
		measure out container --rm box /usr/bin/iperf3 -J -t "$seconds" -c 192.0.2.1
		measure in container --rm box /usr/bin/iperf3 -J -t "$seconds" -c 192.0.2.1 -R
		container --name served -d -p 5300:5201 box /usr/bin/iperf3 -s --forceflush >/dev/null
		patiently listening
		measure published-in iperf3 -J -t "$seconds" -c 192.0.2.1 -p 5300
		measure published-out iperf3 -J -t "$seconds" -c 192.0.2.1 -p 5300 -R
		podman rm -f -t 0 served >/dev/null
	done
done
kill $server
podman unshare rm -rf .local >/dev/null 2>&1
exit 0
