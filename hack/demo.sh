#!/usr/bin/env bash
# Show usernet at work, as an ordinary user: a namespace gets a network by DHCP,
# resolves a name, downloads a file and pings. Nothing leaves this machine: the
# servers that it talks to are started here, on the loopback interface.
#
#   hack/demo.sh PATH-OF-USERNET
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

usernet=$(realpath "${1:?path of usernet}")
if [ "$(id -u)" = 0 ] && [ -z "${USERNET_DEMO_DIR:-}" ]; then
	# Root would prove nothing: go on as nobody, in a place that nobody can read.
	dir=$(mktemp -d)
	trap 'rm -rf "$dir"' EXIT
	install -m 0755 "$usernet" "$0" "$dir"
	chown -R nobody: "$dir"
	export USERNET_DEMO_DIR=$dir HOME=$dir
	setpriv --reuid=nobody --regid="$(id -g nobody)" --clear-groups "$dir/$(basename "$0")" "$dir/$(basename "$usernet")"
	exit
fi

dir=$(mktemp -d)
cd "$dir"
pids=()
finish() {
	[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
	wait
	rm -rf "$dir"
}
trap finish EXIT
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() {
	local line="${*//$'\n'/}"
	line=${line//$dir\//}
	printf '  $ %s\n' "${line//$usernet/usernet}"
	"$@" 2>&1 | awk '{ print "    " $0 }'
}

if ! "$usernet" doctor >doctor.txt; then
	cat doctor.txt
	exit 1
fi
start=$(date +%s%N)

say "1. Servers of this host, on its loopback: a web server and a resolver"
head -c 50000000 /dev/urandom >file
read -r web dns < <(python3 -c '
import socket
s = [socket.socket() for _ in range(2)]
for x in s: x.bind(("127.0.0.1", 0))
print(*(x.getsockname()[1] for x in s))')
python3 -m http.server --bind 127.0.0.1 "$web" >/dev/null 2>&1 &
pids+=($!)
dnsmasq --keep-in-foreground --port="$dns" --listen-address=127.0.0.1 --bind-interfaces --conf-file=/dev/null \
	--no-resolv --no-hosts --user= --group= --pid-file= --log-facility="$dir/dnsmasq.log" \
	--host-record=www.example.test,10.0.2.2 &
pids+=($!)
for _ in $(seq 100); do
	curl -s -o /dev/null "http://127.0.0.1:$web/doctor.txt" && break
	sleep 0.05
done
echo "  http://127.0.0.1:$web/file, and www.example.test at 127.0.0.1 port $dns"

say "2. A namespace, as $(id -un) (uid $(id -u)), without privileges"
unshare --user --map-root-user --net --mount sleep 600 &
guest=$!
pids+=("$guest")
for _ in $(seq 100); do
	[ "$(cat /proc/$guest/comm)" = sleep ] && break
	sleep 0.05
done
inside() { nsenter -t "$guest" --user --net --mount --preserve-credentials "$@"; }
show inside ip -brief address

say "3. usernet attaches to it, opens the web server's port, and leaves addresses to DHCP"
mkfifo ready
echo "  $ usernet --pid $guest --configure=none --host-port $web --dns 127.0.0.1:$dns --ready-fd 7"
"$usernet" --pid "$guest" --configure=none --host-port "$web" --dns "127.0.0.1:$dns" --ready-fd 7 7>ready 2>log &
network=$!
pids+=("$network")
if [ "$(head -c 1 ready)" != 1 ]; then
	cat log
	exit 1
fi
sed 's/^/    /' log

say "4. A lease by DHCP"
cat >lease <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via "$router"
END
chmod +x lease
show inside udhcpc -i tap0 -n -q -f -s "$dir/lease"

say "5. A name, by UDP and by TCP"
show inside dig +short @10.0.2.3 www.example.test
show inside dig +short +tcp @10.0.2.3 host.usernet.internal AAAA

say "6. 50 MB by HTTP"
show inside curl -sS -o "$dir/copy" -w '%{size_download} bytes, %{speed_download} bytes/s' "http://10.0.2.2:$web/file"
cmp file copy && echo "    the same as the original"

say "7. A ping, and a port of this host that stays closed"
show inside ping -c 2 -i 0.2 10.0.2.2
show inside curl -sS -m 5 http://10.0.2.2:9/ || true

say "8. The same in one command, which sets the addresses by itself"
show "$usernet" run --host-port "$web" --dns "127.0.0.1:$dns" -- curl -sS -o /dev/null -w '%{http_code} from %{remote_ip}' "http://www.example.test:$web/file"

say "9. When the namespace ends, usernet ends, and nothing is left"
kill "$guest"
wait "$network" && echo "  usernet has ended with status $?"
printf '\nThat took %d seconds.\n' $((($(date +%s%N) - start) / 1000000000))
