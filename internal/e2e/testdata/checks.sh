# What the scripts beside this one have in common. Each check prints "ok NAME"
# or "FAIL NAME" and why.

# check NAME PATTERN... reads the text to look at; !PATTERN must not be in it.
check() {
	local name=$1 text pattern
	shift
	text=$(cat)
	for pattern in "$@"; do
		if [ "${pattern#!}" != "$pattern" ]; then
			! grep -qE -e "${pattern#!}" <<<"$text" && continue
		elif grep -qE -e "$pattern" <<<"$text"; then
			continue
		fi
		printf 'FAIL %s: not %s in: %s\n' "$name" "$pattern" "$(tr '\n' '|' <<<"$text")"
		return
	done
	echo "ok $name"
}

# patiently COMMAND... runs it until it succeeds, for a minute: what happens some
# time happens late on a machine that has much to do.
patiently() {
	local end=$((SECONDS + 60))
	until "$@"; do
		[ $SECONDS -lt $end ] || return
		sleep 0.1
	done
}

# none COMMAND... succeeds if it says nothing.
none() { [ -z "$("$@")" ]; }

# get URL asks until somebody answers, for a server takes a moment to listen.
get() {
	patiently timeout 5 busybox wget -q -O - "$1" 2>/dev/null || echo "nobody answers at $1"
}

# connect ADDRESS [SOCAT OPTION] reads from a TCP server as soon as there is one.
connect() {
	patiently hear "TCP:$1,connect-timeout=5${2:+,$2}" || echo "nobody answers at $1"
}
hear() { timeout 10 socat -u "$1" - 2>/dev/null | grep .; }

# tell ADDRESS [SOCAT OPTION] sends a datagram until somebody answers.
tell() {
	patiently shout "UDP:$1${2:+,$2}" || echo "nobody answers at $1"
}
shout() { echo hello | timeout 10 socat -t 1 - "$1" 2>/dev/null | grep .; }

# running lists the processes of program, its helpers included.
running() {
	local process real command
	real=$(realpath "$program")
	for process in /proc/[0-9]*; do
		command=$(tr '\0' ' ' 2>/dev/null <"$process/cmdline")
		# A helper may hide what it runs.
		if [ "$(readlink "$process/exe" 2>/dev/null)" = "$real" ] || [[ $command == usernet-* ]]; then
			echo "${process#/proc/} $command"
		fi
	done
}

# left NAME: no process of program stays.
left() {
	patiently none running
	running | check "$1" '!.'
}

# image FILE makes an image of busybox, with a page to serve. The host's
# programs run in it where its /usr is mounted.
image() {
	local applet
	mkdir -p image/bin image/etc image/tmp image/usr image/www
	ln -s usr/lib usr/lib64 image
	cp "$(command -v busybox)" image/bin/busybox
	for applet in sh ip wget nslookup httpd sleep cat echo nc ping; do ln -s busybox image/bin/$applet; done
	echo inside >image/www/index.html
	tar -C image -cf "$1" .
}
