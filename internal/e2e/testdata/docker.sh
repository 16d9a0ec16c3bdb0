#!/usr/bin/env bash
# Run rootless Docker, on rootlesskit, on a program in the place of slirp4netns.
#
#   docker.sh PROGRAM [ROOTLESSKIT]
set -uo pipefail
. "$(dirname "$0")/checks.sh"
program=$1
mkdir bin
ln -s "$program" bin/slirp4netns
[ -z "${2:-}" ] || ln -s "$2" bin/rootlesskit
export PATH="$PWD/bin:$PATH:/usr/share/docker.io/contrib"
export DOCKER_HOST="unix://$XDG_RUNTIME_DIR/docker.sock"
image image.tar
mkdir context
printf 'FROM box\nRUN wget -q -O - http://www.example.test:8000/\n' >context/Dockerfile
client=$(command -v /usr/bin/docker docker | head -n 1)
docker() { timeout 120 "$client" "$@"; }
build() { # by BuildKit, for which newer clients want a plugin
	DOCKER_BUILDKIT=1 docker build --no-cache --progress=plain context >log.build 2>&1 && return
	grep -q buildx log.build && DOCKER_BUILDKIT=0 docker build --no-cache context >log.build 2>&1
}

up() { docker version >/dev/null 2>&1 || ! kill -0 $dockerd 2>/dev/null; }

port=8300
for driver in builtin slirp4netns; do
	DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER=$driver dockerd-rootless.sh --storage-driver=vfs --exec-opt native.cgroupdriver=cgroupfs >"log.$driver" 2>&1 &
	dockerd=$!
	patiently up
	if ! docker import image.tar box >/dev/null; then
		echo "FAIL start-$driver: $(tail -n 20 "log.$driver" | tr '\n' '|')"
		kill $dockerd 2>/dev/null
		wait $dockerd
		continue
	fi
	running | check spawned-$driver '--disable-host-loopback.*--enable-sandbox --enable-seccomp [0-9]+ tap0'
	docker run --rm box sh -c 'ip address; ip route; nslookup www.example.test; wget -q -O - http://www.example.test:8000/; wget -T 10 -q -O - http://10.0.2.2:8000/ || echo closed' 2>&1 |
		check bridge-$driver 'inet 172.17.0.' 'default via 172.17.0.1' 'Address.*192.0.2.1' '^served$' '^closed'
	port=$((port + 2))
	docker run -d --name web -p $port:80 box httpd -f -p 80 -h /www >/dev/null
	get http://127.0.0.1:$port/ | check publish-$driver '^inside$'
	get http://192.0.2.1:$port/ | check publish-again-$driver '^inside$'
	docker rm -f web >/dev/null
	build
	check build-$driver '(^|[0-9] )served$' <log.build
	kill $dockerd
	wait $dockerd
	left left-$driver
done
# What belongs to others than us goes as they do.
rootlesskit rm -rf .local
exit 0
