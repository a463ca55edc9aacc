# Two commands for a fresh machine; each makes its own environment in .venv.
#   make demo    trains a SaShiMi on five minutes of piano and generates audio (five to seven minutes)
#   make test    lint, types, documentation, examples in docstrings, every law of the library, and how much they cover
# For developers:
#   make mutants changes the library in many places, one at a time, and prints the changes that no test notices (hours)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# glibc keeps freed memory for the next training step: otherwise the kernel clears the pages of every large tensor again.
KEEP := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000:glibc.malloc.top_pad=200000000

.PHONY: demo test grid mutants
demo: $(VENV)/installed-examples
	GLIBC_TUNABLES=$(KEEP) $(BIN)/python examples/sashimi_youtubemix.py

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
ifdef PYTEST
	$(BIN)/pytest -n 2 --dist loadgroup $(PYTEST)
else
	$(BIN)/pytest -n 2 --dist loadgroup --cov --cov-report=
	NUMBA_DISABLE_JIT=1 $(BIN)/pytest --cov --cov-append --cov-report= tests/test_kernels.py
	$(BIN)/coverage report --fail-under=97
endif

# Not part of the tests: the numerical laws with ten seeds on other instruction sets, caches and threads (two hours).
grid: $(VENV)/installed-dev
	$(BIN)/python tests/grid.py --out docs/_static/grid-cpu.csv

# Not part of the tests: changes a line of the library at a time, and prints the changes that no test notices (hours).
mutants: $(VENV)/installed-dev
	$(BIN)/python tests/mutation.py $(MUTANTS)

# torch first and pinned: a plain requirement may bring in gigabytes of CUDA libraries.
$(VENV)/installed-%: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[$*]'
	touch $@
