# Two commands matter: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check

MINUTES ?= 30
# Tests side by side; those that wait for a clock stay in one chain (tests/conftest.py). JOBS=0: no other process.
JOBS ?= 2
COVERAGE_TESTS := tests/protocol tests/cloud/test_cloud_kv.py $(wildcard tests/cloud/test_cloud_scheduler*.py)

.PHONY: help install demo test coverage fuzz chaos soak edge-size lint format clean

help:
	@echo "make demo     install, pull and build the model, start edge and cloud, ask by all three routes, kill the cloud in mid-answer, then the web chat"
	@echo "make test     install and run every test"
	@echo "make coverage branch coverage of the protocol and of the cloud's page and scheduling rules"
	@echo "make fuzz     10^6 mutated inputs to every decoder; make test runs a quarter of that"
	@echo "make chaos    kill clouds and break links everywhere; make test runs a sample of it"
	@echo "make soak     requests under faults for MINUTES=30, then a report; more with SOAK_ARGS='--seed 1 --model smollm2-135m'"
	@echo "make edge-size  install the edge alone in a new environment, and say how much that is"
	@echo "make lint     mypy --strict and ruff"
	@echo "make install  create .venv with the edge, the cloud and the development tools"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Isthmus needs Python 3.11 or newer, this is %s. Say which with: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@# The pip that comes with Python may be years old: it would fetch a whole wheel to learn where it lies.
	$(PIP) install --quiet --upgrade --constraint $(CONSTRAINTS) pip

$(VENV)/.cloud: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[cloud]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@ $(VENV)/.cloud

install: $(VENV)/.dev

demo: $(VENV)/.cloud
	$(BIN)/python demos/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder $(PYTEST_ARGS)

# Rules are tested alone, so their own tests are what must cover them, not the rest that passes by.
coverage: $(VENV)/.dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q $(COVERAGE_TESTS) $(PYTEST_ARGS)
	@status=0; for wanted in '*/protocol/*=100' '*/cloud/kv.py=95' '*/cloud/scheduler.py=95'; do \
	  $(BIN)/coverage report --skip-covered --include="$${wanted%=*}" --fail-under="$${wanted##*=}" || status=1; \
	done; exit $$status

fuzz: $(VENV)/.dev
	FUZZ_CASES=1000000 $(BIN)/python -m pytest tests/attacks/test_attacks_fuzz.py $(PYTEST_ARGS)

chaos: $(VENV)/.dev
	CHAOS=full $(BIN)/python -m pytest -m chaos tests/chaos $(PYTEST_ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES) $(SOAK_ARGS)

edge-size: $(BIN)/python
	rm -rf build/edge
	$(PYTHON) -m venv --without-pip build/edge
	$(PIP) --python build/edge/bin/python install --quiet --constraint $(CONSTRAINTS) .
	build/edge/bin/isthmus --version
	@du -sm build/edge/lib/python*/site-packages/* | sort -rn | head -n 8
	@du -sm build/edge | awk '{print "edge install: " $$1 " MB"}'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests demos

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
