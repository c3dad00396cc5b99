# Everything runs from .venv, which the first target builds: python3 (3.11+) and make are enough.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install demo test test-gpu test-slow lint format clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED) ## make .venv with pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## train PHA and its attention-only twin on this Python's standard library
	$(BIN)/pha demo

test: $(INSTALLED) ## the fast tests
	$(BIN)/python -m pytest -n auto

test-gpu: $(INSTALLED) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

test-slow: $(INSTALLED) ## every test, the long ones too
	$(BIN)/python -m pytest -m 'not gpu'

lint: $(INSTALLED) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches, never runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
