# volcal: `make demo` runs the main job, `make test` runs every test; both set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null)
STAMP := $(VENV)/.stamp-installed
BENCH_STAMP := $(VENV)/.stamp-bench
NOTEBOOKS := $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path '*/_*' -not -path 'nbs/apps/*' -not -path 'nbs/benchmarks/*' | sort)
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo test export-check clean-check lint types notebooks-test pytest notebooks bench readme docs preview clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## make the environment in .venv

$(STAMP): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit("volcal needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.x") if sys.version_info < (3, 11) else None'
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev]'
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
endif
	@touch $@

demo: $(STAMP) ## calibrate the sample harvest and leave a report
	$(BIN)/volcal demo

test: $(STAMP) ## every test: export, clean, lint, types, notebooks, pytest
	@$(MAKE) --no-print-directory export-check
	@$(MAKE) --no-print-directory clean-check
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory notebooks-test
	@$(MAKE) --no-print-directory pytest

# The exported modules and the notebooks are compared with copies, so that the check works in any tree, committed or not.
export-check: $(STAMP)
	@echo "== nbdev_export leaves no diff"
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	cp -R volcal "$$tmp/before"; $(BIN)/nbdev_export; \
	diff -r -x __pycache__ -x jobs "$$tmp/before" volcal || { echo "volcal/ differed from its notebooks: commit what nbdev_export just wrote"; exit 1; }

clean-check: $(STAMP)
	@echo "== nbdev_clean leaves no diff"
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	cp -RL nbs "$$tmp/before"; $(BIN)/nbdev_clean; \
	diff -r -q -x .ipynb_checkpoints -x __pycache__ "$$tmp/before" nbs || { echo "notebooks were not clean: commit what nbdev_clean just wrote"; exit 1; }

lint: $(STAMP)
	@echo "== ruff"
	@$(BIN)/ruff check nbs tests

types: $(STAMP)
	@echo "== mypy"
	@$(BIN)/mypy volcal

notebooks-test: $(STAMP)
	@echo "== nbdev_test"
	@timeout 1500 $(BIN)/nbdev_test --n_workers 2

pytest: $(STAMP)
	@echo "== pytest"
	@if [ -z "$${VOLCAL_TEST_DATABASE_URL:-}" ]; then \
	  for url in postgresql+psycopg://postgres@127.0.0.1:5432/test postgresql+psycopg://root@127.0.0.1:5432/test; do \
	    if $(BIN)/python -c "import sys, psycopg; psycopg.connect(sys.argv[1].replace('+psycopg', ''), connect_timeout=2).close()" "$$url" 2>/dev/null; then \
	      export VOLCAL_TEST_DATABASE_URL="$$url"; break; fi; done; fi; \
	if [ -z "$${VOLCAL_TEST_DATABASE_URL:-}" ]; then \
	  echo "!! no PostgreSQL answers on 127.0.0.1:5432 and VOLCAL_TEST_DATABASE_URL is unset: the PostgreSQL tests are SKIPPED"; \
	else echo "PostgreSQL tests run"; fi; \
	if command -v chromium chromium-browser google-chrome >/dev/null 2>&1; then echo "browser tests run"; \
	else echo "!! no Chromium is installed: the browser tests are SKIPPED; on Debian or Ubuntu: apt-get install chromium"; fi; \
	$(BIN)/python -m pytest tests

notebooks: $(STAMP) ## execute every notebook but the benchmarks in place and clean it
	@for nb in $(NOTEBOOKS); do echo "$$nb"; $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace "$$nb"; done
	$(BIN)/nbdev_clean

$(BENCH_STAMP): $(STAMP)
ifneq ($(UV),)
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev,bench]'
else
	$(BIN)/python -m pip install --quiet -e '.[dev,bench]'
endif
	@touch $@

bench: $(BENCH_STAMP) ## every benchmark against its peers, executed in place; the ratios are of this machine and this run
	@for nb in $(sort $(wildcard nbs/benchmarks/*.ipynb)); do echo "$$nb"; $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace "$$nb"; $(BIN)/nbdev_clean --fname "$$nb"; done

readme: $(STAMP) ## README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py

docs: $(STAMP) ## the documentation site (needs Quarto)
	@command -v quarto >/dev/null || { echo "quarto is not installed, so the site is built by the docs workflow; make preview writes its pages without it"; exit 1; }
	touch README.md  # made by tests/readme.py: nbdev leaves one alone that is newer than its notebook
	$(BIN)/nbdev_docs

preview: $(STAMP) ## the pages of the site as plain HTML under _docs (without Quarto)
	$(BIN)/python tests/preview.py

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find volcal tests -name __pycache__ -type d -prune -exec rm -rf {} +
