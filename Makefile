# `make demo` and `make test` work from a bare clone: they make .venv, install pinned requirements, build, and run.
# Variables: PYTHON (which python3), VENV (.venv), RESULTS (where gpu-check writes), and those of build_support.py.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RESULTS ?= bench/results
BIN := $(VENV)/bin
STEP := bash scripts/step.sh
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENWEAVE_TEST_BUILD ?= 1

CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

.PHONY: help demo test bench build lint format sanitize gpu-check check-oldest check-cpu-torch clean
help:
	@echo "make demo             a small transformer on real text, eager against our ops, alone and on two ranks; then the bench"
	@echo "make test             the whole test suite"
	@echo "make bench            the benchmarks of this machine's CPU"
	@echo "make lint | format    ruff and clang-format: check | rewrite"
	@echo "make sanitize         the emulated kernels under AddressSanitizer and UBSan"
	@echo "make gpu-check        on a machine with a GPU: tests, compute-sanitizer, benchmarks (no network needed)"
	@echo "make check-cpu-torch  a plain install and its tests under a torch without CUDA"
	@echo "make check-oldest     build and tests under the oldest supported torch"
	@echo "make clean            remove what was built; the virtual environments stay"

# ---------------------------------------------------------------------------------------------------- set up and build

$(VENV)/.requirements: requirements/dev.txt requirements/test.txt requirements/build.txt
	@bash scripts/make_venv.sh $(PYTHON) $(VENV) requirements/dev.txt
	@touch $@

build: $(VENV)/.requirements
	@echo "==> building (a second time only what changed)"
	@$(BIN)/python build_support.py

# Editable: the package is the source tree, and `make build` alone brings it up to date.
$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py | build
	@$(STEP) "installing tokenweave-ops (editable)" $(BIN)/pip install --no-build-isolation --no-deps -e .
	@touch $@

# --------------------------------------------------------------------------------------------------------------- use it

demo: build $(VENV)/.installed
	@$(BIN)/tokenweave demo

test: build $(VENV)/.installed
	@echo "==> running the test suite"
	@$(BIN)/python -m pytest

bench: build $(VENV)/.installed
	@$(BIN)/python bench/run.py --device cpu

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# --------------------------------------------------------------------------------------------------------- other checks

sanitize: build $(VENV)/.installed
	@bash scripts/sanitize.sh $(BIN)/python

gpu-check:
	@PYTHON=$(PYTHON) RESULTS=$(RESULTS) bash scripts/gpu_check.sh

# Not editable: what a user gets, tested from the installed package.
check-cpu-torch:
	@bash scripts/check_torch.sh $(PYTHON) .venv-cpu-torch requirements/cpu-torch.txt

check-oldest:
	@bash scripts/check_torch.sh $(PYTHON) .venv-oldest requirements/oldest.txt

clean:
	rm -rf build dist tokenweave_ops/lib *.egg-info
