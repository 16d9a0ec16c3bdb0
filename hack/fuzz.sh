#!/usr/bin/env bash
# Run every fuzz target of the module, one after another.
#
#   hack/fuzz.sh TIME
set -euo pipefail
cd "$(dirname "$0")/.."
time="${1:-30s}"

go test -list '^Fuzz' -json ./... | sed -n 's/.*"Package":"\([^"]*\)","Output":"\(Fuzz[A-Za-z0-9_]*\)\\n".*/\1 \2/p' | sort |
	while read -r package target; do
		echo "== $package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 3s "$package" </dev/null
	done
