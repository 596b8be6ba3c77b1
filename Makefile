# SPDX-License-Identifier: Apache-2.0
GO ?= go
DESTDIR ?=
PREFIX ?= /usr
SBINDIR ?= $(PREFIX)/sbin
BINDIR ?= $(PREFIX)/bin
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
DBUSDIR ?= $(PREFIX)/share/dbus-1
MANDIR ?= $(PREFIX)/share/man
DOCDIR ?= $(PREFIX)/share/doc/mendlet
DATADIR ?= $(PREFIX)/share/mender
# Whose files to install that start it: systemd, openrc, procd, sysv or none.
INIT ?= none
TAGS ?= nethttpomithttp2
# VERSION, and the commit behind it unless that is tagged; a tarball has both in the file, and its time.
VERSION ?= $(shell sh rig/version.sh)
SOURCE_DATE_EPOCH ?= $(shell if [ -e .git ]; then git log -1 --format=%ct; else date -r VERSION +%s; fi)
# Functions need not start at the linker's 32 bytes (amd64) or 16 (arm64), but where instructions may: 2 % of the size.
ALIGN = $$(case $$($(GO) env GOARCH) in (amd64) echo 1 ;; (*) echo 4 ;; esac)
LDFLAGS := -s -w -buildid= -X main.version=$(VERSION) -X main.buildTime=$(SOURCE_DATE_EPOCH)
# Only what the bytes of an image pass through is compiled with inlining: 8 % of the size.
HOT = . compress/flate crypto/internal/fips140/sha256 hash/crc32 github.com/ulikunitz/...
# The garbage collector that Go had up to 1.25, while Go offers it (1.26 does): 7 kB less, and no more memory.
EXPERIMENT ?= $(shell GOEXPERIMENT=nogreenteagc $(GO) env GOEXPERIMENT 2> /dev/null)
# What the compiler is asked for while it knows it: slices of a length known only when they are made go to the heap, as
# up to Go 1.24, and not to the stack if they are short; types of more than 200 bytes are called by a hash in the names
# of generic functions; where nothing is inlined, blocks are not ordered by guesses of what is likely: 12 kB of the
# compressed file.
known = $(shell for o in $(1); do $(GO) tool compile -d=$$o -V > /dev/null 2>&1 && echo -d=$$o; done)
ASKED = $(call known,variablemakehash=qn maxshapelen=200)
COLD = $(call known,ssa/likelyadjust/off)
BUILD = CGO_ENABLED=0 GOEXPERIMENT=$(EXPERIMENT) $(GO) build $(GOFLAGS) '-gcflags=all=-l $(ASKED) $(COLD)' \
	$(HOT:%='-gcflags=%=$(ASKED)') -trimpath -buildvcs=false -tags '$(TAGS)$(EXTRATAGS),nobuildinfo' \
	-ldflags "$(LDFLAGS) -funcalign=$(ALIGN)"
TARGETS = linux/amd64/ linux/arm/6 linux/arm/7 linux/arm64/ linux/mipsle/softfloat linux/riscv64/

# What finds mistakes by reading the code. It is not in go.mod, as the program does not need it.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: all mendlet check fmt vet staticcheck test test-all test-race test-nonet test-32 test-bench \
	test-cross demo session bench bench-peers bench-delta bench-connect corpus s3 install install-init \
	install-connect install-mender install-modules cross nonet size fuzz release reproducible packages packaging deb rig clean

all: mendlet

mendlet:
	$(BUILD) -o mendlet .

# What a change must pass before it is sent; CONTRIBUTING.md says what else.
check: fmt vet staticcheck test

fmt:
	@gofmt -l *.go rig | { ! grep .; } || { echo "not formatted; gofmt -w mends it"; exit 1; }

vet:
	$(GO) vet ./...
	$(GO) vet -tags nonet ./...
	$(GO) vet -tags nodbus ./...
	$(GO) vet -tags nodelta .
	$(GO) vet -tags nofleet ./...
	$(GO) vet -tags nopublish .
	$(GO) vet -tags noconnect ./...
	$(GO) vet -tags nomonitor ./...
	GOARCH=arm $(GO) vet ./...
	cd rig/bench && $(GO) vet .
	cd rig/driver && $(GO) vet .

# What one build does not use another may: both are looked at together.
staticcheck:
	printf 'net:\nnonet: -tags=nonet\nnodbus: -tags=nodbus\nnodelta: -tags=nodelta\nnofleet: -tags=nofleet\nnopublish: -tags=nopublish\nnoconnect: -tags=noconnect\nnomonitor: -tags=nomonitor\n' | $(GO) run $(STATICCHECK) -matrix ./...
	cd rig/bench && $(GO) run $(STATICCHECK) .
	cd rig/driver && $(GO) run $(STATICCHECK) .

# Many tests wait for clocks and children, so more of them run at a time than there are cores.
test:
	$(GO) test $(GOFLAGS) -parallel 6 -timeout 30m $(TESTFLAGS) ./...

# With what "make test" leaves out: every crash state followed to its end, every system call as a place to
# die, 5 GiB, Debian's modules.
test-all: export MENDLET_TEST_ALL = 1
test-all: test

test-race:
	$(GO) test -race -short -timeout 40m .

# The recovery build runs the same tests, less the network's.
test-nonet:
	$(GO) test -tags nonet -short -timeout 30m ./...

# The tests as a program for 32 bits, and an image of 5 GiB in it.
test-32:
	@[ "$$($(GO) env GOHOSTARCH)" = amd64 ] || { echo "skipped: not amd64"; exit 0; }; set -ex; \
	export GOARCH=386 CGO_ENABLED=0; \
	$(GO) test -short -timeout 30m .; MENDLET_TEST_ALL=1 $(GO) test -run TestBeyond4GiB .

# The comparison with other updaters has tests of its own.
test-bench:
	cd rig/bench && $(GO) test .

demo: mendlet
	@sh rig/demo.sh ./mendlet testdata

# The picture of a session in README.md; a test holds it against what the program prints.
session: mendlet
	sh rig/session.sh ./mendlet testdata > doc/session.svg.new && mv doc/session.svg.new doc/session.svg

bench:
	$(GO) test $(GOFLAGS) -run '^$$' -bench . -benchmem .

# The same image with this program and with Debian's mender-client, rauc and swupdate; needs root.
# Half an hour; RUNS, ROWS and PEERS make it less.
bench-peers: mendlet
	sh rig/bench-peers.sh

# What updates of a small Debian cost over a slow line, by delta and otherwise; needs root. PAIRS, KINDS, FILES and
# PEERS make it less than an hour.
bench-delta: mendlet
	sh rig/bench-delta.sh '$(GO)'

# Troubleshooting, beside Debian's mender-connect; needs root. Both are left alone for IDLE seconds.
IDLE = 120
bench-connect: mendlet
	MENDLET_BENCH_CONNECT=$(IDLE) $(GO) test -count 1 -run TestBenchConnect -v .

# What depends on word size and byte order, for the other targets, under qemu-user.
test-cross:
	@sh rig/test-cross.sh '$(GO)'

# A script that says who this device is stays: with another it would be another device to the server.
IDENTITY = $(DESTDIR)$(DATADIR)/identity/mender-device-identity
install: mendlet install-init
	install -D -m 0755 mendlet $(DESTDIR)$(SBINDIR)/mendlet
	install -D -m 0644 doc/mendlet.8 $(DESTDIR)$(MANDIR)/man8/mendlet.8
	install -D -m 0644 doc/mender.conf.5 $(DESTDIR)$(MANDIR)/man5/mender.conf.5
	install -D -m 0644 packaging/mender.conf.example $(DESTDIR)$(DOCDIR)/examples/mender.conf
	install -D -m 0644 packaging/crontab $(DESTDIR)$(DOCDIR)/examples/crontab
	install -d $(DESTDIR)$(DOCDIR)/examples/stick
	install -m 0644 packaging/stick/* $(DESTDIR)$(DOCDIR)/examples/stick/
	if [ -e $(IDENTITY) ] && ! cmp -s support/identity/mender-device-identity $(IDENTITY); then \
		echo "$(IDENTITY) is another and stays"; \
	else install -D -m 0755 support/identity/mender-device-identity $(IDENTITY); fi
	install -d $(DESTDIR)$(DATADIR)/inventory
	install -m 0755 support/inventory/* $(DESTDIR)$(DATADIR)/inventory/
	install -d $(DESTDIR)$(SYSCONFDIR)/mendlet/checks.d

install-init:
	case '$(INIT)' in \
	none) ;; \
	systemd) install -d $(DESTDIR)$(UNITDIR) && \
		install -m 0644 packaging/mendlet.service packaging/mendlet.timer $(DESTDIR)$(UNITDIR)/ ;; \
	openrc | procd | sysv) install -D -m 0755 packaging/mendlet.$(INIT) $(DESTDIR)$(SYSCONFDIR)/init.d/mendlet ;; \
	*) echo "INIT=$(INIT): want systemd, openrc, procd, sysv or none" >&2; exit 1 ;; \
	esac

# What starts "mendlet connect" by mender-connect.conf.
install-connect:
	case '$(INIT)' in \
	systemd) install -D -m 0644 packaging/mendlet-connect.service $(DESTDIR)$(UNITDIR)/mendlet-connect.service ;; \
	openrc | procd) \
		install -D -m 0755 packaging/mendlet-connect.$(INIT) $(DESTDIR)$(SYSCONFDIR)/init.d/mendlet-connect ;; \
	*) echo "INIT=$(INIT): want systemd, openrc or procd" >&2; exit 1 ;; \
	esac

# The names of Mender's client. Under other inits than systemd the daemon of "make install" is enough.
install-mender:
	install -d $(DESTDIR)$(BINDIR)
	for name in mender mender-update mender-auth mender-setup mender-snapshot; do \
		ln -sf $(SBINDIR)/mendlet $(DESTDIR)$(BINDIR)/$$name || exit 1; done
	[ '$(INIT)' != systemd ] || { install -d $(DESTDIR)$(UNITDIR) && \
		install -m 0644 packaging/mender-updated.service $(DESTDIR)$(UNITDIR)/ && \
		install -m 0644 packaging/mendlet-auth.service $(DESTDIR)$(UNITDIR)/mender-authd.service; }
	for f in $(wildcard packaging/io.mender.*.conf packaging/*/io.mender.*.conf); do \
		install -D -m 0644 $$f $(DESTDIR)$(DBUSDIR)/system.d/$${f##*/} || exit 1; done
	for f in $(wildcard packaging/io.mender.*.service packaging/*/io.mender.*.service); do \
		install -D -m 0644 $$f $(DESTDIR)$(DBUSDIR)/system-services/$${f##*/} || exit 1; done

install-modules:
	install -d $(DESTDIR)$(DATADIR)/modules/v3
	for m in modules/*; do install -m 0755 $$m $(DESTDIR)$(DATADIR)/modules/v3/ || exit 1; done

# Binaries of every target, in out/mendlet-OS-ARCH[-VARIANT].
cross:
	@mkdir -p out
	@for t in $(TARGETS); do \
		os=$${t%%/*}; rest=$${t#*/}; arch=$${rest%%/*}; var=$${rest#*/}; \
		if [ $$arch = arm ]; then kind=GOARM; else kind=GOMIPS; fi; export GOOS=$$os GOARCH=$$arch; \
		env $${var:+$$kind=$$var} $(BUILD) -o out/$(NAME)-$$os-$$arch$${var:+-$$var} . || exit 1; \
	done
NAME = mendlet

# Without TLS, HTTP and pack, for recovery systems: out/mendlet-nonet-OS-ARCH[-VARIANT].
nonet:
	@$(MAKE) --no-print-directory cross NAME=mendlet-nonet EXTRATAGS=,nonet

# Raw and compressed sizes in bytes; fails over the budget.
size: cross nonet
	@$(MAKE) --no-print-directory cross NAME=mendlet-nodbus EXTRATAGS=,nodbus TARGETS=linux/arm/6
	@$(MAKE) --no-print-directory cross NAME=mendlet-noconnect EXTRATAGS=,noconnect TARGETS=linux/arm/6
	@sh rig/size.sh out

# Source tarball with all that it depends on, binaries of every target and recovery build, and their
# SHA-256, in out/release. Of the tag that VERSION names, or as "0.1.0+d8f7ea9" of any commit.
release:
	@sh rig/release.sh '$(GO)' out/release

# Two releases made in two places must be the same to the bit.
reproducible:
	@sh rig/reproducible.sh '$(GO)'

FUZZTIME ?= 10s
fuzz:
	@sh rig/fuzz.sh '$(GO)' $(FUZZTIME)

# What XZ Utils and zstd test their own decoders with, from Debian's source packages.
corpus:
	@sh rig/corpus.sh out/corpus

# The S3 server that tests put artifacts on, from its sources; a minute.
s3:
	GOBIN=$(CURDIR)/out $(GO) install github.com/versity/versitygw/cmd/versitygw@v1.8.0

# Debian packages that the tests want; needs root. Tests say what they skip without them.
packages:
	@sh rig/packages.sh

# What is in packaging/ and support/, as far as it can be tried here.
packaging: mendlet
	@sh rig/packaging.sh
	@sh rig/recipes.sh '$(GO)'

# Debian packages in out/debian; as root they are tried in a small Debian, which is thrown away.
deb:
	@sh rig/debian.sh '$(GO)'

# A/B device in QEMU with real U-Boot and kernel; needs root and Debian.
rig:
	bash rig/run.sh

clean:
	rm -rf mendlet out
