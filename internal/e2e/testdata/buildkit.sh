#!/usr/bin/env bash
# Build an image by rootless BuildKit, on rootlesskit, on a program in the place of
# slirp4netns.
#
#   buildkit.sh PROGRAM
set -uo pipefail
. "$(dirname "$0")/checks.sh"
program=$1
image image.tar
mkdir context
cp image.tar context
cat >context/Dockerfile <<'END'
FROM scratch
ADD image.tar /
RUN ip address show tap0; ip route; cat /etc/resolv.conf; wget -q -O - http://www.example.test:8000/
END
timeout 120 rootlesskit --net=slirp4netns --slirp4netns-binary="$program" --copy-up=/etc --copy-up=/run --disable-host-loopback --mtu=65520 \
	buildkitd --root "$PWD/.local" --addr "unix://$PWD/socket" --oci-worker-snapshotter native --oci-worker-no-process-sandbox \
	--oci-worker-net host --containerd-worker=false >log 2>&1 &
kit=$!
patiently [ -S socket ]
running | check spawned '--mtu 65520 -r 3 --disable-host-loopback [0-9]+ tap0'
timeout 60 buildctl --addr "unix://$PWD/socket" build --progress plain --no-cache --frontend dockerfile.v0 --local context=context --local dockerfile=context >log.build 2>&1
cat log.build log | check build 'inet 10.0.2.100/24' 'mtu 65520' 'default via 10.0.2.2' 'nameserver 10.0.2.3' ' served$'
kill $kit
wait $kit
left left
rootlesskit rm -rf .local
exit 0
