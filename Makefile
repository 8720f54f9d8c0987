# Everything runs in a virtual environment of its own, .venv, from plain wheels at the tested versions.
PYTHON ?= python3
BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"
QUICKSTART := $(foreach run,video audio score late bottleneck,launch/recipes/quickstart_$(run).toml)

.PHONY: help install quickstart test coverage lint acceptance clean

help:
	@echo "make quickstart   install, make the data set, train five models, print and write the report"
	@echo "make test         install, lint, type-check and test (about 25 minutes on 2 cores)"
	@echo "make coverage     the same tests with a line by line account, 90 % at least (half as long again)"
	@echo "make acceptance   the long checks: kill and resume, three quickstart seeds, real clips (resumable)"

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[dev,bench]"
	@touch $@

quickstart: install
	$(BIN)/fastav synth data/synth
	$(BIN)/fastav train $(QUICKSTART)
	$(BIN)/fastav report runs/quickstart

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(TESTS)

# Tracing costs Python-heavy tests more than half again: it is done apart from the proof that all is well.
coverage: .venv/.installed-dev
	$(TESTS) --cov --cov-report=term --cov-fail-under=90

acceptance: .venv/.installed-dev
	$(BIN)/python -m tests.acceptance $(ROWS)

clean:
	rm -rf data/synth runs/quickstart acceptance
