# Everything runs in its own virtual environment, .venv, with wheels of the tested versions.
PYTHON ?= python3
BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"
QUICKSTART := $(foreach run,video audio score late bottleneck,launch/recipes/quickstart_$(run).toml)

.PHONY: help install quickstart test coverage lint acceptance clean

help:
	@echo "make quickstart   install, make the synthetic data set, train five models, write and print the report"
	@echo "make test         install, lint, check types, run the tests (7 to 12 minutes on 2 cores)"
	@echo "make coverage     the same with line coverage, at least 90 % (takes 1.5 times as long)"
	@echo "make acceptance   the long checks: kill and resume, three quickstart seeds, real clips (resumable)"
	@echo "make lint         install, lint and check types"

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

# With COVERAGE=1 also line coverage, as in CI: tracing makes Python-heavy tests more than 1.5 times as slow.
test: lint
	$(TESTS) $(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=90)

coverage:
	$(MAKE) test COVERAGE=1

acceptance: .venv/.installed-dev
	$(BIN)/python -m tests.acceptance $(ROWS)

clean:
	rm -rf data/synth runs/quickstart acceptance
