# Everything runs from .venv, which the first target builds: python3 (3.11+) and make are enough.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TOOLS := build/tools/bin

.PHONY: help install demo test test-gpu test-slow test-ecosystem test-lowest test-highest docs tutorials lint format wheel-check audit lock clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED) ## make .venv with pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## train PHA, PHA+ and attention alone on this Python's standard library
	$(BIN)/pha demo

test: $(INSTALLED) ## the fast tests
	$(BIN)/python -m pytest -n auto

test-gpu: $(INSTALLED) ## the tests that need a GPU, in one process
	$(BIN)/python -m pytest -m gpu -n 0 --durations 10

test-slow: $(INSTALLED) ## every test, the long ones too
	$(BIN)/python -m pytest -m 'not gpu'

test-ecosystem: $(INSTALLED) ## other people's tools on a small model; installs them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ecosystem]'
	$(BIN)/python -m pytest -n 0 -m 'not gpu' tests/ecosystem tests/evals/test_harness.py \
	    tests/sharing/test_serving.py

test-lowest: $(TOOLS)/uv ## the fast tests with the lowest versions that pyproject.toml allows
	$(TOOLS)/uv venv --clear --quiet --python $(PYTHON) build/lowest
	$(TOOLS)/uv pip install --quiet --python build/lowest --resolution lowest-direct -e '.[dev]'
	build/lowest/bin/python -m pytest -n auto

test-highest: $(TOOLS)/uv ## the fast tests with the newest versions that pyproject.toml allows
	$(TOOLS)/uv venv --clear --quiet --python $(PYTHON) build/highest
	$(TOOLS)/uv pip install --quiet --python build/highest --upgrade -e '.[dev]'
	build/highest/bin/python -m pytest -n auto

docs: tutorials ## build the site into build/site: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

tutorials: .venv/.docs ## run the tutorials into notebooks in build/tutorials
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/run_tutorials.py build/tutorials

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

lint: $(INSTALLED) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-check: ## rehearse a release: build, check, install into an empty environment, use
	$(PYTHON) scripts/check_release.py > /dev/null
	scripts/check_wheel.sh $(PYTHON)

audit: $(TOOLS)/uv ## look for known weaknesses of the pinned packages; needs the network
	$(TOOLS)/pip-audit --strict --disable-pip -r requirements.lock

lock: $(TOOLS)/uv ## write requirements.lock, the hashes of the pinned packages
	$(TOOLS)/uv pip compile pyproject.toml --extra dev --extra harness --extra ecosystem --extra docs -c constraints.txt --universal \
	    --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --quiet \
	    --custom-compile-command 'make lock' -o requirements.lock

$(TOOLS)/uv:
	$(PYTHON) -m venv build/tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check uv pip-audit

clean: ## remove the environment and caches, never runs/
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache
