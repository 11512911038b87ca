# Works from a fresh clone on a Debian machine that has Rust and apt; each target installs what it needs.
#
#   make build   the program, optimised: target/release/vb-ublk
#   make demo    the main job, shown step by step
#   make test    everything (what CI runs)
#   make unit    unit and integration tests
#   make e2e     end-to-end tests on a real ublk driver; TESTS="10 40" names some, KERNEL=6.12 another kernel
#   make soak    the long forms of the NBD tests
#   make bench   benchmarks
#   make lint    formatting, clippy, shellcheck, licenses; make fmt formats
#   make deny    licenses, sources, and the advisory database (wants a network)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: setup setup-% build test unit e2e soak demo bench lint fmt deny clean

CARGO ?= cargo
KERNEL ?=
TESTS ?=
DENY = "$${VB_CACHE:-target/guest}/cargo-deny-root/bin/cargo-deny"

setup:
	scripts/setup build test guest lint

setup-%:
	@scripts/setup $*

build: setup-build
	$(CARGO) build --release --locked

test:
	scripts/test

unit: setup-build setup-test
	$(CARGO) test --locked

e2e: build
	scripts/e2e/run --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk" $(if $(KERNEL),--kernel $(KERNEL)) $(TESTS)
	$(if $(TESTS),,scripts/e2e/boot --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk" $(if $(KERNEL),--kernel $(KERNEL)))

soak: setup-build setup-test
	VB_SOAK=1 $(CARGO) test --locked --no-fail-fast --test nbd --test nbd_hostile --test nbd_linear --test nbd_interop

demo: build
	scripts/demo --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk"

bench: build
	$(CARGO) bench --locked
	scripts/bench/guest

lint: setup-build setup-lint
	scripts/test lint

fmt:
	$(CARGO) fmt

deny: setup-lint
	$(DENY) check

clean:
	$(CARGO) clean
