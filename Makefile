# Targets are documented with "##" behind their name; `make help` prints them.
# PYTHON picks the interpreter the virtual environment is made with, ARGS is handed to pytest, the demo or the benches.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
ARGS ?=
BENCHES := bench/build.py bench/host.py bench/fuse.py bench/store.py bench/ready.py

# Daemons and tools are started hundreds of times: each would compile all of our modules where somebody has set this.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint vmtest vmtest-all bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing: system packages (apt-get, needs root or sudo) and .venv
	@PYTHON='$(PYTHON)' packaging/setup

demo: setup ## Build an image, mount it with the kernel's EROFS and run Python from it (needs root)
	@$(VENV)/bin/python examples/demo.py $(ARGS)

test: setup ## Run the whole test suite, lint and types included (mounts need root); ARGS="-k name" for a part
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup ## Run the linters, the type checker and the import contracts only
	@$(VENV)/bin/python -m pytest -q tests/test_lint.py $(ARGS)

vmtest: setup ## Run the kernel tests in QEMU on two kernels; ARGS="--kernel 6.1 -k name" for others, see docs/vmtests.md
	@packaging/setup vm
	@vmtests/run $(ARGS)

vmtest-all: setup ## Run the kernel tests on every kernel and write docs/conformance.md (hours)
	@packaging/setup vm
	@vmtests/run --all $(ARGS)

bench: setup ## Run every benchmark (makes 5 GB of images the first time); ARGS=--quick for a smoke run
	@packaging/setup bench
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench,plot]' </dev/null
	@for script in $(BENCHES); do $(VENV)/bin/python "$$script" $(ARGS) || exit; done

clean: ## Unmount what was left mounted, remove .cache, .venv and tool caches
	@packaging/clean
