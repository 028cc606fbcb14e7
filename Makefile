# `make` lists what there is.
MESSAGES ?= 10000000
MINUTES ?= 10

.PHONY: help setup build demo test test-windows test-csharp bench bench-full lint install uninstall deb fuzz soak realworld

help:
	@echo "make demo    sort 512 MiB of this machine's text within 64 MiB of RAM (FMALLOC_DEMO_MIB=... for another size)"
	@echo "make realworld  programs of the distribution within a third of the RAM that they need, beside kernel swap (REALWORLD=options)"
	@echo "make test    all tests; run it as root, for a full userfaultfd"
	@echo "make test-windows  the client's tests for Windows, under wine (the first time it installs what that needs: Debian 12)"
	@echo "make test-csharp  the tests of the C# binding, under mono"
	@echo "make bench   fmalloc beside kernel swap and others, within 20 minutes (BENCH=--quick: 3 minutes; BENCH=--help for more)"
	@echo "make bench-full  the same with compressible and random data in more and less RAM: takes long"
	@echo "make fuzz    ten million generated messages against the decoder, and as many against a live daemon (MESSAGES=...)"
	@echo "make soak    a crowd of clients, well-behaved and not, for MINUTES=10; ends with a table (SEED=... repeats one)"
	@echo "make lint    formatting, clippy, documentation, licences"
	@echo "make build   release binaries, in target/release"
	@echo "make install the programs, the service, man pages and completions, after make build (DESTDIR=, PREFIX=/usr/local)"
	@echo "make uninstall"
	@echo "make deb     a Debian package, in target/deb"
	@echo "make setup   install what the build needs; the others do this first"

setup:
	@.ci/setup

build: setup
	cargo build --release --workspace --lib --bins --examples

demo: build
	@tests/demo/run.sh

realworld: build
	target/release/fmalloc-realworld $(REALWORLD)

# In the dev profile, which is optimised a little and has overflow checks and debug assertions. The daemon and the
# helper programs are built first: tests of one package run binaries of another.
test: setup
	@[ -w /dev/userfaultfd ] || echo "test: no access to /dev/userfaultfd: tests that need it say so and are skipped (with CI=true they fail)"
	cargo build --workspace --lib --bins --examples
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --workspace --all-targets --no-fail-fast; \
	else set -x; cargo test --workspace --all-targets --no-fail-fast; fi
	cargo test --workspace --doc
	tests/lesser

fuzz: setup
	FMALLOC_FUZZ_MESSAGES=$(MESSAGES) cargo test -p fmalloc-proto --test fuzz -- --nocapture
	FMALLOC_FUZZ_MESSAGES=$(MESSAGES) cargo test -p fmallocd --test control fuzz -- --nocapture

soak: setup
	cargo build --workspace --bins
	target/debug/fmalloc-soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# A directory of its own: these are built by another compiler.
test-windows: setup
	CARGO_TARGET_DIR=target/windows .ci/windows/run .ci/windows/test

test-csharp: setup
	cargo build -p fmallocd -p fmalloc-capi
	@client/csharp/test

# As root, on a machine with nothing else to do.
bench: setup
	cargo build --release -p fmallocd -p fmalloc-tests --bin fmallocd --bin fmalloc-bench
	cargo run --quiet --release -p fmalloc-tests --bin fmalloc-bench -- --within 20 $(BENCH)

bench-full: setup
	cargo build --release -p fmallocd -p fmalloc-tests --bin fmallocd --bin fmalloc-bench
	cargo run --quiet --release -p fmalloc-tests --bin fmalloc-bench -- --scenario all $(BENCH)

lint: setup
	@.ci/lint

# No build here: it may run as a root that has no cargo.
install:
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install

uninstall:
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install uninstall

deb: build
	@systemd/make-deb
