# Two commands on a fresh machine, either may be typed first: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python

# Without an NVIDIA GPU the versions are held to a pair known to work together; with one, PyPI's CUDA build is taken as it is.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
  CONSTRAINTS := --constraint constraints.txt
endif

# `make test-gpu PY=python3` uses an interpreter that has everything already.
ifeq ($(PY),$(VENV)/bin/python)
  RUNTIME := $(VENV)/.runtime
  DEV := $(VENV)/.dev
endif

.PHONY: help setup demo test check format test-gpu bench wheel clean
help:
	@echo "make demo      fine-tune a real model with LoRA and QLoRA, compare, merge, talk to it (~6 minutes on 2 cores)"
	@echo "make test      the test suite (no GPU, no network)"
	@echo "make setup     $(VENV) with everything for development"
	@echo "make check     formatting, lint, types, layers, kernels compiled for every supported card"
	@echo "make test-gpu  the tests that need a GPU;  PY=python3 uses your own interpreter"
	@echo "make bench     speed, memory, gradients and losses beside the peers that are installed, on a GPU"
	@echo "make wheel     build the wheel and try it in a clean environment"

setup: $(VENV)/.dev

demo: $(RUNTIME)
	$(PY) -m nybble demo

test: $(DEV)
	$(PY) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

check: $(DEV)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) scripts/compile_kernels.py

format: $(DEV)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

test-gpu: $(DEV)
	$(PY) -m pytest -m gpu

bench: $(DEV)
	$(PY) benchmarks/run.py

wheel: $(DEV)
	bash scripts/try_wheel.sh

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nybble needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PY) -m pip install --quiet $(CONSTRAINTS) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PY) -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	@touch $@ $(VENV)/.runtime
