# Two commands do everything: `make run` and `make test`. Needed: Python ≥ 3.10, a C++20 compiler, make.

PYTHON ?= python3
# The reference tests compare with torch; any CPU build will do. Where the default index serves the CUDA build, which is
# some GB larger, name a CPU index here as well: make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
MEMORY ?= 256MiB
BENCH ?=
PROMPT ?= What is the capital of France, and what is it known for?

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find src CMakeLists.txt pyproject.toml README.md LICENSE -type f -not -name '*.pyc' -not -name '*.so')

# What runs here is the installed package, never the source tree.
unexport PYTHONPATH

.PHONY: run test check docs sanitize bench clean
.DELETE_ON_ERROR:

run: $(VENV)/installed
	$(BIN)/barefoot pull smollm2
	$(BIN)/barefoot run smollm2 "$(PROMPT)" --memory $(MEMORY) --max-tokens 96 --report

test: $(VENV)/installed $(VENV)/test
	$(BIN)/python -m pytest

check: $(VENV)/installed $(VENV)/check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_docs.py --check

docs: $(VENV)/installed
	$(BIN)/python tools/generate_docs.py

# The kernels' tests under the address and undefined-behaviour sanitizers, from a build of their own.
sanitize: $(VENV)/installed $(VENV)/test
	$(PIP) cmake ninja nanobind
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python tools/sanitize

bench: $(VENV)/installed $(VENV)/bench
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) build dist wheelhouse .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, install python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(PIP) .
	@touch $@

$(VENV)/test: pyproject.toml tools/requirements.py | $(VENV)/installed
	$(PIP) $(TORCH)
	$(BIN)/python tools/requirements.py test reference gpu > $@.txt
	$(PIP) -r $@.txt
	@touch $@

$(VENV)/check $(VENV)/bench: $(VENV)/%: pyproject.toml tools/requirements.py | $(VENV)/installed
	$(BIN)/python tools/requirements.py $* > $@.txt
	$(PIP) -r $@.txt
	@touch $@
