# Everything runs in the virtual environment .venv, made on first use and again when a pin changes.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart hub-adapters test test-full lint bench clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

quickstart: .venv/.installed  ## Train, evaluate and save small mixtures on the CPU; ROUTER=comol, QUICKSTART_ARGS="--steps 20"
	.venv/bin/python recipes/quickstart.py --out out/quickstart $(if $(ROUTER),--router $(ROUTER)) $(QUICKSTART_ARGS)

hub-adapters: .venv/.installed  ## Train eight unlike PEFT adapters in out/hub_adapters, for the recipes hub_experts_*
	.venv/bin/python -m moelora.recipes.hub_adapters --out out/hub_adapters

test: .venv/.installed  ## Run the tests; PYTEST_ARGS="tests/routers -k meteora"
	.venv/bin/python -m pytest $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/triton_kernels)

test-full: .venv/.installed  ## Run the tests, and those with many repetitions, too; their counts are printed
	.venv/bin/python -m pytest -m "" $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/triton_kernels)

lint: .venv/.installed  ## Check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.installed  ## Measure layers and whole models into docs/bench/cpu.*; BENCH_ARGS="--help"
	.venv/bin/python -m tests.bench.cpu --out docs/bench $(BENCH_ARGS)

clean:  ## Remove build results, caches and out/quickstart; .venv and other results stay
	rm -rf build dist *.egg-info out/quickstart .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and at its exact version, so that nothing else decides which build of it is fetched.
.venv/.installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	@test -x .venv/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "moelora needs Python 3.10 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing moelora and its tools into .venv; the first time takes some minutes."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) setuptools wheel torch
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
