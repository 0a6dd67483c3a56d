# Each target does its own set-up in .venv; stamp files make a second call instant.
#   make quickstart   fine-tune SmolLM2-135M-Instruct with LoRA and GradES (about ten minutes on two CPU cores)
#   make test         the whole test suite
#   make lint         ruff and mypy
#   make clean        remove .venv and everything that was built

PYTHON ?= python3
VENV ?= .venv
NUM_PROCESSES ?= 1
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGING := setup.cfg pyproject.toml constraints.txt

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: with its exact version installed, no later requirement can bring in another build.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt torch setuptools
	touch $@

$(VENV)/recipes.stamp: $(PACKAGING) $(VENV)/torch.stamp
	$(PIP) install -c constraints.txt -e '.[recipes]'
	touch $@

$(VENV)/dev.stamp: $(PACKAGING) $(VENV)/torch.stamp
	$(PIP) install -c constraints.txt -e '.[recipes,dev]'
	touch $@ $(VENV)/recipes.stamp

quickstart: $(VENV)/recipes.stamp
	$(BIN)/accelerate launch --num_processes $(NUM_PROCESSES) --num_machines 1 --mixed_precision no \
	  --dynamo_backend no recipes/finetune.py --config recipes/configs/quickstart.yaml

test: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
