#!/usr/bin/env bash
# Run the example of docs/systemd.md under a service manager of the user's.
#
# world: manager
#
#   systemd.sh DIRECTORY-OF-USERNET DIRECTORY-OF-THE-UNITS
set -uo pipefail
. "$(dirname "$0")/checks.sh"
program=$1/usernet
export PATH="$1:$PATH"
mkdir -p .config/systemd/user .config/usernet www
cp "$2"/*.service .config/systemd/user
cp "$2"/*.env .config/usernet
echo inside >www/page
# The server asks the host for something, too, which is closed by default.
sed -i 's/$/ --host-port 8000/' .config/usernet/web.env
cat >www/fetch.sh <<'END'
until ip route | grep -q default; do sleep 0.1; done
busybox wget -q -O "$HOME/fetched" "http://$(ip route | sed -n 's/^default via \([0-9.]*\) .*/\1/p'):8000/"
END
mkdir -p .config/systemd/user/web.service.d
printf '[Service]\nExecStart=\nExecStart=/bin/sh -c "/bin/sh %%h/www/fetch.sh; exec busybox httpd -f -p 8000 -h %%h/www"\n' >.config/systemd/user/web.service.d/test.conf
/lib/systemd/systemd --user --log-target=console >manager.log 2>&1 & # it ends everything besides, with itself
manager=$!
ctl() { timeout 60 systemctl --user --no-pager "$@"; }
up() { ctl is-system-running 2>/dev/null | grep -qE 'running|degraded' || ! kill -0 $manager 2>/dev/null; }
patiently up
if ! ctl list-units >/dev/null 2>&1; then
	echo "FAIL manager: $(tail -n 1 manager.log)"
	exit 0
fi

ctl set-environment PATH="$PATH"
ctl start web.service 2>&1 | check start '!.'
get http://127.0.0.1:8080/page | check publish '^inside$'
cat fetched 2>&1 | check fetch '^served$'
ctl is-active usernet@web.service 2>&1 | check active '^active$'
ctl show --property StatusText --value usernet@web.service | check status '^Serving$'
running | sed -n 's/ .*//p' | xargs -I{} sed -n 's/^Uid:\t\([0-9]*\).*/uid \1/p' /proc/{}/status | sort -u | check ordinary "^uid $(id -u)\$"

# Another service on the same network finds it by its name.
cat >www/look.sh <<'END'
until ip route | grep -q default; do sleep 0.1; done
dns=$(ip route | sed -n 's/^default via \([0-9.]*\)\.2 .*/\1.3/p')
web=$(busybox nslookup web "$dns" | sed -n 's/^Address: *\([0-9.]*\)$/\1/p' | tail -n 1)
busybox wget -q -O - "http://$web:8000/page" >"$HOME/looked" 2>&1
sleep 1000
END
cat >.config/systemd/user/look.service <<'END'
[Unit]
Wants=usernet@%N.service
[Service]
Type=exec
PrivateUsers=yes
PrivateNetwork=yes
ExecStart=/bin/sh %h/www/look.sh
END
echo 'FLAGS=--network apps --name look --host-port 8000' >.config/usernet/look.env
ctl daemon-reload
ctl start look.service
patiently [ -s looked ]
cat looked 2>&1 | check zone '^inside$'
ctl stop look.service

# usernet is killed: another takes its place.
first=$(ctl show --property MainPID --value usernet@web.service)
[ "$first" -gt 1 ] && kill -9 "$first"
replaced() {
	local second
	second=$(ctl show --property MainPID --value usernet@web.service)
	[ "$second" != "$first" ] && [ "$second" != 0 ] && ctl is-active usernet@web.service >/dev/null
}
patiently replaced
get http://127.0.0.1:8080/page | check restarted '^inside$'

# The network goes with the service, and comes with it.
ctl stop web.service
left left-after-stop
ctl is-active usernet@web.service | check stopped '^inactive$'
ctl start web.service
get http://127.0.0.1:8080/page | check again '^inside$'
ctl stop web.service
left left-at-end
exit 0
