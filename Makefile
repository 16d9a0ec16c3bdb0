# `make demo` shows usernet at work, `make test` runs all tests; both install
# what they need on Debian or Ubuntu with Go.

GO ?= go
T ?= 30s
PREFIX ?= /usr/local

.PHONY: build demo test check vuln fuzz malformed flood flows soak bench compare cover install clean

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o usernet ./cmd/usernet

demo:
	hack/setup.sh demo
	$(MAKE) --no-print-directory build
	hack/demo.sh ./usernet

# As root the tests drop to an ordinary user where they can.
test:
	hack/setup.sh test
	$(GO) vet ./...
	cd bench/compare/chart && $(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) test -race -timeout 15m ./...

check:
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) fix -diff ./...
	$(GO) test -run 'TestFormat|TestImports|TestPackageComments' .

# Known vulnerabilities in what is used; asks the Go vulnerability database.
vuln:
	$(GO) tool govulncheck ./...

# Every fuzz target for the time T.
fuzz:
	hack/fuzz.sh $(T)

# What a hostile guest may try: FRAMES malformed frames, a flood of SYNs for the time
# T, FLOWS flows of TCP and as many of UDP, as far as there are descriptors, and all
# kinds of traffic at once for the time T.
FRAMES ?= 1000000
FLOWS ?= 10000

malformed:
	USERNET_FRAMES=$(FRAMES) $(GO) test ./internal/e2e -count=1 -v -timeout 30m -run '^TestMalformedFrames$$'

flood:
	USERNET_FLOOD=$(T) $(GO) test ./internal/e2e -count=1 -v -timeout 24h -run '^TestSYNFlood$$'

flows:
	USERNET_FLOWS=$(FLOWS) $(GO) test ./internal/e2e -count=1 -v -timeout 30m -run '^TestManyFlows$$'

soak:
	USERNET_SOAK=$(T) $(GO) test ./internal/e2e -count=1 -v -timeout 24h -run '^TestSoak$$'

bench:
	$(GO) test -run '^$$' -bench . -benchmem ./...

# Side by side with slirp4netns and pasta, 21 minutes on a machine that is
# otherwise idle; `go run ./bench/compare -quick` takes 3.
compare:
	hack/setup.sh test
	$(GO) run ./bench/compare

cover:
	$(GO) test -coverprofile=cover.out ./... && $(GO) tool cover -func=cover.out | tail -n 1

install: build
	install -D -m 0755 usernet $(DESTDIR)$(PREFIX)/bin/usernet
	install -D -m 0644 dist/systemd/usernet@.service $(DESTDIR)$(PREFIX)/lib/systemd/user/usernet@.service

clean:
	rm -f usernet cover.out
