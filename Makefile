# Each target does its own set-up in .venv; stamp files make a second call instant.
#   make quickstart   fine-tune SmolLM2-135M-Instruct with GradES and without, side by side (ten minutes on two CPU cores)
#   make quickstart-paper  the same model with the paper's thresholds, matrix by matrix
#   make test         the whole test suite
#   make test-oldest  the same on the oldest versions that setup.cfg admits, in .venv-oldest
#   make compatibility  the same, and docs/compatibility.md of what passed
#   make notebooks    run the notebooks and keep their outputs
#   make docs         the documentation site, into site/ (with an environment of its own, .venv-docs, without torch)
#   make package      source distribution and wheel in dist/, checked by twine (environment .venv-package)
#   make lint         ruff and mypy
#   make clean        remove .venv and everything that was built

PYTHON ?= python3
VENV ?= .venv
NUM_PROCESSES ?= 1
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGING := setup.cfg pyproject.toml $(CONSTRAINTS)

.PHONY: quickstart quickstart-paper test test-oldest compatibility notebooks docs package lint clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: with its exact version installed, no later requirement can bring in another build.
$(VENV)/torch.stamp: $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install -c $(CONSTRAINTS) torch setuptools
	touch $@

$(VENV)/recipes.stamp: $(PACKAGING) $(VENV)/torch.stamp
	$(PIP) install -c $(CONSTRAINTS) -e '.[recipes]'
	touch $@

$(VENV)/dev.stamp: $(PACKAGING) $(VENV)/torch.stamp
	$(PIP) install -c $(CONSTRAINTS) -e '.[recipes,dev]'
	touch $@ $(VENV)/recipes.stamp

LAUNCH := $(BIN)/accelerate launch --quiet --num_processes $(NUM_PROCESSES) --num_machines 1 --mixed_precision no \
  --dynamo_backend no

quickstart: $(VENV)/recipes.stamp
	$(LAUNCH) recipes/finetune.py --config recipes/configs/quickstart.yaml

quickstart-paper: $(VENV)/recipes.stamp
	$(LAUNCH) recipes/finetune.py --config recipes/configs/quickstart_paper.yaml

test: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# The lower bound of everything that setup.cfg names; of what those need, the versions in constraints.txt.
.venv-oldest.txt: setup.cfg constraints.txt
	awk 'function key(name) { name = tolower(name); gsub(/_/, "-", name); return name } \
	  FNR < NR { split($$0, pin, "=="); if (!(key(pin[1]) in oldest)) print; next } \
	  match($$0, /^ +[A-Za-z0-9_-]+>=[0-9.]+/) { split(substr($$0, 1, RLENGTH), pin, ">="); sub(/^ +/, "", pin[1]); \
	    oldest[key(pin[1])]; print pin[1] "==" pin[2] }' $^ > $@

test-oldest: .venv-oldest.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.venv-oldest.txt

compatibility: override PYTEST_ARGS += --compatibility .cache/compatibility.json
compatibility: test
	$(BIN)/python -m benchmarks.compatibility .cache/compatibility.json

notebooks: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

# What an extra of setup.cfg asks for, alone.
extra = awk '/^$(1) =/ { extra = 1; next } /^[^ ]/ { extra = 0 } extra' setup.cfg

.venv-docs/stamp .venv-package/stamp: .venv-%/stamp: setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-$*
	$(call extra,$*) > .venv-$*/extra.txt
	.venv-$*/bin/python -m pip --disable-pip-version-check install -c $(CONSTRAINTS) -r .venv-$*/extra.txt
	touch $@

docs: .venv-docs/stamp
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

package: .venv-package/stamp
	rm -rf build dist
	.venv-package/bin/python -m build --no-isolation
	.venv-package/bin/twine check --strict dist/*

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest* .venv-docs .venv-package build dist site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
