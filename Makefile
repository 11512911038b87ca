# Works from a fresh clone on a Debian machine that has Rust and apt; each target installs what it needs.
#
#   make build   the program, optimised: target/release/vb-ublk
#   make demo    the main job, shown step by step
#   make test    everything but the long forms (what CI runs)
#   make unit    unit and integration tests
#   make e2e     end-to-end tests on a real ublk driver; TESTS="10 40" names some, KERNEL=6.12 another kernel
#   make soak    the long forms of the NBD and store tests, many seeds of the simulation, and soak-guest
#   make soak-guest  kills, outages, power cuts and memory pressure on a real ublk driver, an hour; SOAK="--short kills" for less
#   make mutants the program broken on purpose, one thing at a time: the tests have to notice
#   make fuzz    each fuzz target for FUZZ_SECONDS (60), from seeds that the real encoders make; bounded memory
#   make bench   benchmarks: the maps, NBD beside other servers, the way to S3, beside others over S3, images, snapshots, boots, scale,
#                and ublk in the guest; and the plots of docs/PERFORMANCE.md. An hour and a half, alone on the machine
#   make lint    formatting, clippy, shellcheck, licenses; make fmt formats
#   make deny    licenses, sources, and the advisory database (wants a network)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: setup setup-% build test unit e2e soak soak-guest mutants fuzz demo bench lint fmt deny clean

CARGO ?= cargo
KERNEL ?=
TESTS ?=
SOAK ?=
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= nbd_handshake nbd_session log replay chunk checkpoint manifest viperblock
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

soak: setup-build setup-test setup-garage
	VB_SOAK=1 $(CARGO) test --locked --no-fail-fast --test nbd --test nbd_hostile --test nbd_linear --test nbd_interop \
		--test store_conformance --test store_crash_cycle --test volume_rewrite
	VB_SOAK=1 VB_LIVES=0..100 $(CARGO) test --locked --test volume -- lives:: dependants::
	VB_SIM_SEEDS=0..10000 $(CARGO) test --locked --test sim
	$(MAKE) build
	scripts/e2e/run --long --store file --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk" 30 40 45
	scripts/e2e/run --store s3 --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk"
	scripts/e2e/boot --clones --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk"
	$(MAKE) soak-guest

soak-guest: build
	scripts/soak/run --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk" $(SOAK)

mutants: setup-build
	scripts/mutants

fuzz: setup-build setup-fuzz
	cd fuzz && $(CARGO) run --locked --example seeds
	cd fuzz && for t in $(FUZZ_TARGETS); do \
		len=8192; case $$t in chunk | replay) len=32768 ;; esac; \
		PATH="$$(realpath -m "$${VB_CACHE:-../target/guest}")/cargo-fuzz-root/bin:$$PATH" RUSTC_BOOTSTRAP=1 \
		cargo fuzz run $$t -- -max_total_time=$(FUZZ_SECONDS) -max_len=$$len -rss_limit_mb=1024 -malloc_limit_mb=64; \
	done

demo: build
	scripts/demo --bin "$${CARGO_TARGET_DIR:-target}/release/vb-ublk"

bench: build
	scripts/setup test guest bench peers
	$(CARGO) bench --locked
	scripts/bench/counts
	scripts/bench/nbd
	scripts/bench/s3
	scripts/bench/import
	scripts/bench/snapshot
	scripts/bench/peers
	scripts/bench/boot
	scripts/bench/scale
	scripts/bench/guest
	scripts/bench/plot

lint: setup-build setup-lint
	scripts/test lint deny

fmt:
	$(CARGO) fmt

deny: setup-deny
	$(DENY) check

clean:
	$(CARGO) clean
