# The workshop's commands. "make" alone lists them. No step needs root, conda, a key or an account.
#
#   make workshop PYTHON=/path/to/python3.11     another Python
#   make lab HOST=0.0.0.0 PORT=8890              another address
#   make env MIN_DISK_GB=5                       install although the disk looks too small
#   make clean CLEAN_MODELS=1                    remove the downloaded models, too

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
HOST ?= 127.0.0.1
PORT ?= 8888
# The environment takes 2.5 GB with a CPU build of torch and three times that with CUDA's libraries.
MIN_DISK_GB ?= 8

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout 1800 --nbval-sanitize-with tests/nbval_sanitize.cfg

# The kernels that are installed in .venv come before those of the user.
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# torchrun and jupyter of this environment come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help env workshop lab test test-all test-browser lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

env: ## .venv with the pinned versions and this package
	@PYTHON='$(PYTHON)' MIN_DISK_GB='$(MIN_DISK_GB)' bash scripts/environment.sh

workshop: env ## the whole job: every notebook, then a table of what was made
	@$(BIN)/workshop preflight
	@$(BIN)/workshop run

lab: env ## JupyterLab on the notebooks (HOST, PORT)
	@exec $(BIN)/python -m workshop_utils.core.home $(BIN)/jupyter lab --ServerApp.root_dir='$(CURDIR)' --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
		--ip='$(HOST)' --port='$(PORT)' --no-browser $$([ "$$(id -u)" != 0 ] || echo --allow-root)

test: env ## quick tests, then every notebook compared with its stored outputs
	@$(PYTEST) --numprocesses 2 --dist worksteal tests
	@$(PYTEST) $(NBVAL) notebooks

test-all: env ## the slow tests, too
	@$(PYTEST) $(NBVAL) -m 'not browser' tests notebooks

test-browser: env ## every notebook in JupyterLab, in a headless Chromium
	@bash scripts/chromium.sh
	@$(PYTEST) -m browser tests/browser

lock: env ## environment.yml and NOTICE.md anew, after requirements.txt was changed
	@$(BIN)/python -m workshop_utils.series.lock
	@$(BIN)/python scripts/licences.py

clean: ## remove environment, data set and runs (adapters, too); models with CLEAN_MODELS=1
	rm -rf .venv .home runs data/tickets build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
ifeq ($(CLEAN_MODELS),1)
	find models -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
else
	@echo 'models/ is kept; make clean CLEAN_MODELS=1 removes it, too'
endif
