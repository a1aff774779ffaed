# `make` alone lists what there is. Every target first makes .venv with what it needs, so that `make test` on a machine
# with nothing but python3 (with venv) and make is enough. Extra arguments: make test ARGS="-k schedule".

PYTHON ?= python3
ARGS ?=
# What `make test-device` computes on.
DEVICE ?= cuda
# Test processes. One thread each, see `test`.
WORKERS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python -m

# Models and data come from the package index or from the repository, never from a hub. For a demo on a model of the Hub:
# HF_HUB_OFFLINE=0 make demo ARGS="--model ..."
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SECONDARY:
.PHONY: help demo test test-device versions quality style docs benchmark clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-compare ## Compare full fine-tuning, DPS columns, random columns, DPS Dense and LoRA
	$(RUN) peft_dps.compare demo $(ARGS)

# Each process computes on one thread: more threads than cores make every test slower.
test: export OMP_NUM_THREADS := 1
test: export TOKENIZERS_PARALLELISM := false
test: $(VENV)/.installed-test ## Run the tests (those that need the package index: ARGS="-m network")
	$(RUN) pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

# Processes share the GPU. The tolerances are those of the CPU, but where a test says otherwise.
test-device: export OMP_NUM_THREADS := 1
test-device: export PEFT_DPS_TEST_DEVICE := $(DEVICE)
test-device: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-device: $(VENV)/.installed-test ## Run the tests that tell something of a GPU on it
	$(RUN) pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m device $(ARGS)

# It makes an environment of its own for each row (about 6 GB where torch comes with CUDA).
versions: ## Run the tests on the versions of docs/support.md (a part, on the lowest: ARGS="--fast lowest")
	$(PYTHON) -m tests.versions $(ARGS)

quality: $(VENV)/.installed-dev ## Check style, formatting, types and layering
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(VENV)/bin/lint-imports --no-logo

style: $(VENV)/.installed-dev ## Mend style and formatting
	$(RUN) ruff check --fix
	$(RUN) ruff format

docs: $(VENV)/.installed-docs ## Build the documentation into site/
	$(RUN) mkdocs build --strict

benchmark: $(VENV)/.installed-compare ## Measure time and memory of DPS beside full fine-tuning, and make a page of it
	$(RUN) benchmarks.suite --out runs/suite_here.json $(ARGS)
	$(RUN) benchmarks.page --results runs/suite_here.json --out runs/benchmarks.md

clean: ## Remove everything that was made here, .venv included
	rm -rf $(VENV) .venvs build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: $(VENV)/.installed-test stands for `pip install -e .[test]`.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "Installing peft_dps[$*] into $(VENV) (some minutes the first time)"
	@$(RUN) pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)' here. Name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("peft_dps needs Python 3.10 or newer, and $(PYTHON) is %d.%d. Name a newer one: make PYTHON=/path/to/python3" % v[:2] if v < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@
