# husk: every habit is one command; `make help` lists them.
#
# Slow things (guest kernel, test host, images) are kept outside of the checkout, in
# ${HUSK_CACHE:-~/.cache/husk}, keyed by what they are made from.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The product tree: what an installation has below its prefix.
TREE := target/husk
PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
# The guest's architecture, named explicitly so that static linking leaves proc-macros alone.
TRIPLE := x86_64-unknown-linux-gnu
STATIC := RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --locked --target $(TRIPLE)
TESTHOST := target/release/husk-testhost
IMAGES := target/release/husk-test-images

say = @printf '\n==> %s\n' '$(1)'

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: tools
tools: # Debian packages that building and testing on this machine need
	@scripts/need-packages gcc libc6-dev make e2fsprogs erofs-utils binutils docker-registry libcap-ng-dev

.PHONY: build
build: tools ## Build everything that is installed, into target/husk
	$(call say,husk and husk-fs)
	$(CARGO) build --locked --release -p husk -p husk-fs
	$(call say,husk-vmm and husk-agent; static)
	$(STATIC) --release -p husk-vmm
	$(STATIC) --profile guest -p husk-agent
	$(call say,guest kernel (about 8 minutes if the cache has none))
	mkdir -p $(TREE)/bin $(TREE)/share
	install -m 0644 "$$(guest-kernel-config/build)" $(TREE)/share/vmlinux.new
	mv $(TREE)/share/vmlinux.new $(TREE)/share/vmlinux
	$(call say,initramfs)
	scripts/make-initramfs target/$(TRIPLE)/guest/husk-agent $(TREE)/share/initramfs.cpio
	install -m 0755 target/release/husk target/release/husk-fs $(TREE)/bin/
	install -m 0755 target/$(TRIPLE)/release/husk-vmm $(TREE)/bin/

.PHONY: harness
harness: tools
	$(call say,test harness)
	$(CARGO) build --locked --release -p husk-harness -p husk-test-images

.PHONY: images
images: harness
	$(call say,test images)
	mkdir -p $(TREE)
	ln -sfn "$$($(IMAGES) build)" $(TREE)/images

.PHONY: demo
demo: build images ## Run examples/web.yaml in a microVM, here if KVM works, else in the test host
	@scripts/demo $(TREE) $(TESTHOST)

.PHONY: test
test: build images ## Run all tests: unit tests here, everything else in the test host
	$(call say,the table of POSIX cases for guests; static)
	$(STATIC) --release -p husk-test-files
	$(call say,unit and property tests)
	$(CARGO) test --locked --workspace --exclude husk-cases
	$(call say,guest kernel configuration)
	guest-kernel-config/test
	$(call say,tests in microVMs)
	@scripts/test-in-vms $(TREE) $(TESTHOST)

.PHONY: check
check: tools ## Formatting, lints, dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@scripts/need-packages g++
	@# Not --locked: what the workspace newly depends on gets into this lock file here.
	$(CARGO) clippy --manifest-path tests/fuzz/Cargo.toml --target-dir target -- -D warnings
	scripts/check-dependencies

FUZZ_SECONDS ?= 60
.PHONY: fuzz
fuzz: ## Fuzz every target of tests/fuzz for FUZZ_SECONDS (60) each; needs a nightly compiler
	@scripts/need-packages gcc g++ libc6-dev
	@scripts/fuzz $(FUZZ_SECONDS)

.PHONY: bench
bench: build images ## Measure husk against QEMU, crun and runc in the test host
	$(call say,benchmark)
	$(CARGO) build --locked --release -p husk-bench
	$(STATIC) --release -p husk-load
	@scripts/bench $(TREE) $(TESTHOST)

.PHONY: host-shell
host-shell: build harness ## Open a shell in the test host, with the built husk in it
	$(TESTHOST) sync $(TREE)
	$(TESTHOST) shell

.PHONY: install
install: build ## Install below DESTDIR and PREFIX (/usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/husk
	install -m 0755 $(TREE)/bin/* $(DESTDIR)$(PREFIX)/bin/
	install -m 0644 $(TREE)/share/vmlinux $(TREE)/share/initramfs.cpio $(DESTDIR)$(PREFIX)/share/husk/

.PHONY: clean
clean: ## Remove what was built here; the cache outside of the checkout stays
	-[ ! -x $(TESTHOST) ] || $(TESTHOST) down
	$(CARGO) clean
