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

# get URL asks until somebody answers, for a server takes a moment to listen.
get() {
	local _
	for _ in $(seq 100); do
		timeout 2 busybox wget -q -O - "$1" 2>/dev/null && return
		sleep 0.1
	done
	echo "nobody answers at $1"
}

# connect ADDRESS [SOCAT OPTION] reads from a TCP server as soon as there is one.
connect() {
	local _
	for _ in $(seq 50); do
		timeout 5 socat -u "TCP:$1,connect-timeout=2${2:+,$2}" - 2>/dev/null | grep . && return
		sleep 0.1
	done
	echo "nobody answers at $1"
}

# tell ADDRESS [SOCAT OPTION] sends a datagram until somebody answers.
tell() {
	local _ answer
	for _ in $(seq 30); do
		answer=$(echo hello | timeout 5 socat -t 0.3 - "UDP:$1${2:+,$2}" 2>/dev/null)
		[ -n "$answer" ] && echo "$answer" && return
	done
	echo "nobody answers at $1"
}

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
	local _ found
	for _ in $(seq 100); do
		found=$(running)
		[ -z "$found" ] && echo "ok $1" && return
		sleep 0.1
	done
	echo "FAIL $1: $found"
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
