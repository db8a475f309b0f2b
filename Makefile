# rabatch: `make help` lists the targets. Needs make and Python 3.11 or newer; everything else goes into .venv.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The interpreter that makes .venv: the first on the PATH that is new enough. Override: make PYTHON=/path/to/python3
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$name"; break; }; done)
# More options for pip, e.g. an index that has torch without CUDA.
PIP_FLAGS ?=
# More options for pytest, e.g. make test PYTEST_FLAGS="-x tests/index"
PYTEST_FLAGS ?=
DEMO_FLAGS ?=

VENV := .venv
# By path, so that an environment activated elsewhere does not matter.
PY := $(VENV)/bin/python
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH

PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# Nothing is fetched while tests run: the models are in the package or made up on the spot.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
PYTEST := $(TEST_ENV) $(PY) -m pytest $(PYTEST_FLAGS)

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: install
install: $(DEV) ## make .venv with rabatch and everything its tests need

.PHONY: demo
demo: $(BASE) ## corpus, build, answers on the model in the package; prints a table (DEMO_FLAGS="--json" ...)
	RAY_USAGE_STATS_ENABLED=0 $(PY) -m rabatch.cli demo $(DEMO_FLAGS)

.PHONY: test
test: $(DEV) ## the tests that need neither minutes nor a GPU
	$(PYTEST) -m "not slow and not gpu" </dev/null

.PHONY: test-slow
test-slow: $(DEV) ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu" </dev/null

.PHONY: test-gpu
test-gpu: $(DEV) ## the tests that need a CUDA card; does nothing without one
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(PYTEST) -m gpu </dev/null; else echo "no CUDA card: the gpu tests were not run"; fi

.PHONY: lint
lint: $(DEV) ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@$(MAKE) --no-print-directory typecheck

# mypy resolves packages by folders, and three of ours lie elsewhere than their names say. So it gets the layout of
# the installed package, made of links; messages are given the names of the real files again.
TYPES := build/types
.PHONY: typecheck
typecheck: $(DEV) ## mypy alone
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/rabatch
	@for entry in rabatch/*; do ln -s "$(CURDIR)/$$entry" $(TYPES)/rabatch/; done
	@for folder in index storage jobs; do ln -s "$(CURDIR)/$$folder" $(TYPES)/rabatch/; done
	cd $(TYPES) && "$(CURDIR)/$(PY)" -m mypy --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p rabatch | sed -E 's#^rabatch/(index|storage|jobs)/#\1/#'

.PHONY: bench
bench: $(DEV) ## every benchmark, in its short form
	@for file in benchmarks/*.py; do echo "== $$file"; $(TEST_ENV) $(PY) "$$file" --quick </dev/null; done

.PHONY: clean
clean: ## remove what was generated; `make clean-venv` removes .venv too
	rm -rf build dist demo-out ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: clean-venv
clean-venv: clean
	rm -rf $(VENV)

$(PY):
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer on the PATH: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "venv failed; on Debian and Ubuntu install python3-venv" >&2; exit 2; }

$(BASE): pyproject.toml constraints.txt | $(PY)
	@echo "installing rabatch into $(VENV) (a minute or two the first time)"
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(PY)
	@echo "installing rabatch and its development tools into $(VENV) (a minute or two the first time)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(BASE) $@
