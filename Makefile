# nodewrap: build, install and test. `make` alone prints the targets.
#
# The privileged programs are compiled here, by a few visible lines with pinned flags and no Python involved; setuptools and cffi build the
# extension of the Python package from the same C files (csrc/core.list). Nothing is built outside build/, and `make install` needs no network
# once `make build` has run.

SHELL := /bin/sh
ROOT  := $(filter 0,$(shell id -u))

PREFIX     ?= /usr/local
DESTDIR    ?=
# A prefix of the system keeps configuration and state in the system's places; any other one keeps everything below itself.
SYSTEM     := $(filter /usr /usr/local,$(PREFIX))
SYSCONFDIR ?= $(if $(SYSTEM),/etc,$(PREFIX)/etc)
STATEDIR   ?= $(if $(SYSTEM),/var/lib/nodewrap,$(PREFIX)/var/lib/nodewrap)
LOGDIR     ?= $(if $(SYSTEM),/var/log/nodewrap,$(PREFIX)/var/log/nodewrap)
RUNDIR     ?= $(if $(SYSTEM),/run/nodewrap,$(PREFIX)/run/nodewrap)
MANDIR     ?= $(PREFIX)/share/man
LIBEXEC    := $(PREFIX)/libexec/nodewrap
LIB        := $(PREFIX)/lib/nodewrap

# The real path: the launcher refuses an interpreter that is reached through a link somebody else owns.
PYTHON     ?= $(shell readlink -f /usr/bin/python3 2>/dev/null || command -v python3)
ifeq ($(origin CC),default)
CC         := gcc
endif
# packaging/musl-cc: with musl for a C library, which starts faster where a virtual machine's monitor answers cpuid slowly (docs/benchmarks.md).
LAUNCHER_CC ?= $(CC)
PANDOC     ?= $(shell command -v pandoc 2>/dev/null)
# setuid needs root to install; without root there is the user-namespace launcher.
LAUNCHER   ?= $(if $(ROOT),setuid,userns)
SERVICE_USER ?= nodewrap
CALLERS    ?= nodewrap-callers

BUILD      ?= build
OBJDIR     ?= $(BUILD)/c
VENV       ?= $(BUILD)/venv
WHEELS     ?= $(BUILD)/wheels
VERSION    := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' nodewrap/__init__.py)
VPY        := $(VENV)/bin/python

# ---- compiler flags: the OpenSSF hardening guide's, as far as this compiler knows them ----

# packaging/ccflags.sh tries each option; asked once per make run, and only when something is compiled (a variable that replaces itself).
WARNINGS   := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wformat=2
HARDENING   = $(eval HARDENING := $$(shell packaging/ccflags.sh cflags $(LAUNCHER_CC)))$(HARDENING)
HARDLINK    = $(eval HARDLINK := $$(shell packaging/ccflags.sh ldflags $(LAUNCHER_CC)))$(HARDLINK)
CFLAGS     ?= -O2
, := ,
DEFINES    := -DNW_VERSION='"$(VERSION)"' -DNW_GUARD='"$(SYSCONFDIR)/nodewrap/guard"' -DNW_LIBEXEC='"$(LIBEXEC)"' \
              -DNW_PYTHON_CLI='"$(LIB)/venv/bin/python3"'
EARLY      := $(if $(findstring musl,$(LAUNCHER_CC)),-Wl$(,)--wrap=__libc_start_main)
FLAGS      := -std=gnu11 $(CFLAGS) $(WARNINGS) $(DEFINES)

# V=1 shows the compiler's whole command lines.
Q          := $(if $(V),,@)

PROGRAMS   := $(wildcard csrc/launch_*.c) csrc/front.c
SHARED     := $(filter-out $(PROGRAMS),$(wildcard csrc/*.c))
LAUNCHERS  := $(patsubst csrc/launch_%.c,nodewrap-%,$(wildcard csrc/launch_*.c))
BINARIES   := $(addprefix $(OBJDIR)/,$(LAUNCHERS) nodewrap)
MANPAGES   := $(if $(PANDOC),$(patsubst docs/man/%.md,$(BUILD)/man/%,$(wildcard docs/man/*.md)))

.PHONY: help
help: ## print this
	@echo "nodewrap $(VERSION): make TARGET [PREFIX=$(PREFIX)] [DESTDIR=] [SYSCONFDIR=$(SYSCONFDIR)] [PYTHON=$(PYTHON)] [LAUNCHER=$(LAUNCHER)]"
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14 | sed 's/^/  /'

.PHONY: deps
deps: ## install what is missing to build, run and test (root: apt-get or dnf; else: say what is missing)
	@packaging/deps.sh

# ---- build ----

.PHONY: build
build: launchers wheels man ## compile the launchers, build the Python package and the man pages, all below build/

.PHONY: launchers
launchers: $(BINARIES)

# Rewritten only when its content changes: a different PREFIX or flag recompiles, the same one does not. Not named by a pid: another make at work here
# may have the same one in a pid namespace of its own.
rewrite = new=$$(mktemp $@.XXXXXX) && printf '%s\n' $(1) >$$new; if cmp -s $$new $@; then rm $$new; else mv $$new $@; fi

$(OBJDIR)/flags: FORCE
	@mkdir -p $(OBJDIR)
	@$(call rewrite,'$(subst ','\'',$(LAUNCHER_CC) $(FLAGS))')

$(OBJDIR)/%.o: csrc/%.c $(OBJDIR)/flags
	@echo 'cc $<'
	$(Q)$(LAUNCHER_CC) $(FLAGS) $(HARDENING) -MMD -MP -c -o $@ $<

$(OBJDIR)/nodewrap-%: $(OBJDIR)/launch_%.o $(patsubst csrc/%.c,$(OBJDIR)/%.o,$(SHARED))
	@echo 'link $@'
	$(Q)$(LAUNCHER_CC) $(HARDLINK) $(EARLY) -o $@ $^

$(OBJDIR)/nodewrap: $(OBJDIR)/front.o
	@echo 'link $@'
	$(Q)$(LAUNCHER_CC) $(HARDLINK) -o $@ $^

.SECONDARY:
-include $(wildcard $(OBJDIR)/*.d)

# ---- the Python side: one private environment to build with, and a directory of wheels to install from ----

$(BUILD)/python: FORCE
	@mkdir -p $(BUILD)
	@$(call rewrite,'$(PYTHON)')

$(VENV)/.base: $(BUILD)/python
	$(PYTHON) -m venv --clear $(VENV)
	$(VPY) -m pip install -q 'pip>=22.3' 'setuptools>=61' wheel 'cffi>=1.14.5'
	@touch $@

$(WHEELS)/.deps: pyproject.toml $(VENV)/.base
	rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	$(VPY) packaging/requirements.py | $(VPY) -m pip wheel -q -w $(WHEELS) -r /dev/stdin
	@touch $@

PYFILES = $(shell find nodewrap -name '*.py') setup.py pyproject.toml $(wildcard csrc/*.[ch]) csrc/core.list
# Locked and renamed: two make runs in one checkout (tests of two people) neither build in each other's directory nor install half a wheel.
$(WHEELS)/.own: $(WHEELS)/.deps $(PYFILES)
	flock $(BUILD) sh -ec 'rm -rf $(BUILD)/py; $(VPY) -m pip wheel -q --no-deps --no-build-isolation -w $(BUILD)/py/out .; \
	    mv -f $(BUILD)/py/out/nodewrap-$(VERSION)-*.whl $(WHEELS)/'
	@touch $@

.PHONY: wheels
wheels: $(WHEELS)/.own

# `pip install` only when pyproject.toml changed; the extension only when its C files did.
$(VENV)/.test: pyproject.toml $(VENV)/.base
	$(VPY) packaging/requirements.py test | $(VPY) -m pip install -q -r /dev/stdin
	@touch $@

$(VENV)/.core: $(VENV)/.test setup.py nodewrap/_build_core.py csrc/core.list $(wildcard csrc/*.[ch])
	flock $(BUILD) $(VPY) -W ignore setup.py -q build_ext --inplace
	@touch $@

.PHONY: man
man: $(MANPAGES) ## man pages from docs/man (skipped without pandoc)
	$(if $(PANDOC),,@echo 'man pages are left out: pandoc is missing (it is optional)')

$(BUILD)/man/%: docs/man/%.md
	@mkdir -p $(@D)
	$(PANDOC) -s -t man -V footer='nodewrap $(VERSION)' -o $@ $<

# ---- install ----

INSTALL_ENV = DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' STATEDIR='$(STATEDIR)' LOGDIR='$(LOGDIR)' RUNDIR='$(RUNDIR)' \
              MANDIR='$(MANDIR)' LIB='$(LIB)' LIBEXEC='$(LIBEXEC)' PYTHON='$(PYTHON)' LAUNCHER='$(LAUNCHER)' SERVICE_USER='$(SERVICE_USER)' \
              CALLERS='$(CALLERS)' OBJDIR='$(OBJDIR)' WHEELS='$(WHEELS)' VPY='$(VPY)' MANPAGES='$(MANPAGES)' PURGE='$(PURGE)'

.PHONY: install
install: build ## install below PREFIX (root: LAUNCHER=setuid; else LAUNCHER=userns alone)
	@$(INSTALL_ENV) packaging/install.sh install

.PHONY: uninstall
uninstall: ## remove what install made; policy, audit log and state stay unless PURGE=1
	@$(INSTALL_ENV) packaging/install.sh uninstall

# ---- try, check, measure ----

.PHONY: demo
demo: deps $(VENV)/.core build ## a multi-user pilot with real proxies, step by step (KEEP=1 leaves it in place)
	@demo/run

TESTS ?= tests
.PHONY: test
test: $(VENV)/.core build ## every test; as non-root what that can run (NODEWRAP_MUST_WORK=1: a skip is a failure)
	@$(if $(ROOT),,echo 'not root: the tests that switch accounts are left out; run make test as root for them')
	$(VPY) -m pytest $(TESTS) $(PYTEST_ARGS)

# KERNEL_ARGS="--kvm", TESTS="tests/integration/test_limits.py -k memory": see tests/kernel/boot.py
.PHONY: test-kernel
test-kernel: $(VENV)/.core build ## tests on a distribution's kernel with all of cgroup v2, in QEMU (root; minutes)
	$(VPY) -m tests.kernel.boot $(KERNEL_ARGS) -- $(if $(filter tests,$(TESTS)),tests/integration/test_limits.py,$(TESTS)) $(PYTEST_ARGS)

# DISTRIBUTION_ARGS="--tests -- tests/integration/test_limits.py", "-- --mode switch --profile strict --only A": see tests/kernel/distribution.py
.PHONY: test-distribution
test-distribution: $(VENV)/.core build ## the escape suite on Debian with systemd, AppArmor and Yama, made from its packages, in QEMU (root; an hour)
	$(VPY) -m tests.kernel.distribution $(DISTRIBUTION_ARGS)

.PHONY: lint
lint: $(VENV)/.core ## ruff, mypy, gcc -fanalyzer, cppcheck, clang-tidy, shellcheck, man pages, sizes, error codes
	$(VPY) -m pytest tests/lint $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/.core build ## start-up cost beside bare exec, bwrap, sudo, firejail, crun
	$(VPY) -m bench $(BENCH_ARGS)

.PHONY: isolation-table
isolation-table: $(VENV)/.core build ## measure what payloads reach and leave, here and in other tools, into docs/isolation.md (root)
	$(VPY) packaging/probe_table.py

# ESCAPE_ARGS="--only C --profile strict -v", "--report json --output FILE": see tests/escape/suite.py
.PHONY: escape
escape: $(VENV)/.core build ## hostile payloads against every launcher, mode and profile, each shown to work where nothing stops it (root: all of it)
	$(VPY) -m tests.escape.suite $(ESCAPE_ARGS)

.PHONY: escape-peers
escape-peers: $(VENV)/.core build ## the same payloads under bwrap, firejail, apptainer, sudo and a plain switch of uid, into docs/escape.md
	$(VPY) -m tests.escape.suite --peers --table docs/escape.md $(ESCAPE_ARGS)

.PHONY: escape-oracles
escape-oracles: $(VENV)/.core build ## what unhide, stress-ng, debsums (and LTP, CDK, ... where named) say after hostile payloads (root)
	$(VPY) -m tests.escape.oracles

# CRASH_ARGS="--sample 2000", "--case 'setuid/*' --kills": see tests/crash/matrix.py
.PHONY: crash
crash: $(VENV)/.core build ## kill every process of a run, and fail every call, at every system call (root; hours)
	$(VPY) -m tests.crash.matrix $(or $(CRASH_ARGS),--all)

# SOAK_ARGS="--seconds 60 --runs 16 --seed 7": see tests/crash/soak.py
.PHONY: soak
soak: $(VENV)/.core build ## 64 runs at once for ten minutes while everything is killed and disks fill up (root)
	$(VPY) -m tests.crash.soak $(SOAK_ARGS)

.PHONY: fuzz
fuzz: ## libFuzzer on the C parsers, FUZZ_SECONDS=60 each (needs clang)
	packaging/fuzz.sh $(or $(FUZZ_SECONDS),60)

.PHONY: asan
asan: $(VENV)/.core ## property and differential tests with the C core under ASan and UBSan
	packaging/asan.sh $(VPY)

.PHONY: dist
dist: ## source archive of HEAD
	@mkdir -p $(BUILD)
	git archive --format=tar.gz --prefix=nodewrap-$(VERSION)/ -o $(BUILD)/nodewrap-$(VERSION).tar.gz HEAD
	@echo $(BUILD)/nodewrap-$(VERSION).tar.gz

.PHONY: clean
clean: ## remove build/ and the extension in the checkout
	rm -rf $(BUILD) nodewrap/_core.*.so nodewrap/_core.c

.PHONY: FORCE
FORCE:
