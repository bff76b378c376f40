# Two commands: `make demo` shows the main job at work, `make test` proves it. Both set up everything they need.

SHELL := /bin/bash
VENV  := .venv
# The newest Python >= 3.12 that really runs (a pyenv shim answers 127): PATH first, then pyenv's versions, then uv's.
PYTHON := $(shell scripts/find-python)

.PHONY: setup demo test check bench soak fuzz format clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## make .venv with .venv/bin/outgate

$(VENV)/.ready: pyproject.toml requirements/dev.txt | find-python
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	$(VENV)/bin/python -m compileall -q proxy addons pki policies
	@touch $@

.PHONY: find-python
find-python:
	@[ -n "$(PYTHON)" ] || { echo "outgate needs Python 3.12 or newer: install python3.12 (Debian, Ubuntu), 'pyenv install 3.13' or 'uv python install 3.13', then run make again" >&2; exit 2; }

demo: setup ## the main job: a request let through and a request refused, on real TLS (no root, no network)
	@$(VENV)/bin/python scripts/demo.py

# Three at a time, a file each: most of them wait for clients, kernels and clocks. Those that wait most come first.
PYTEST := $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: system ## every test
	$(PYTEST)

check: system ## format, lint, types, tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST)

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup ## ratios against a peer measured in the same run
	$(VENV)/bin/python -m pytest --benchmark-only --override-ini addopts="-p no:anyio --import-mode=importlib" -s tests/bench

soak: setup ## a million short connections, a thousand idle ones, ever new names: is memory flat? (N=1000000)
	$(VENV)/bin/python -m scripts.soak $(N)

fuzz: setup ## the lane's grammar against h11 and llhttp: heads and bodies nobody wrote (N=1000000)
	@$(VENV)/bin/python -m tests.fuzz $(N)

.PHONY: system
system: setup ## install the system programs that tests use when root, else name them
	@scripts/system-packages
	@scripts/javascript-runtimes $(VENV)/js

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
