# The quick start and the tests, in a virtual environment of the project's own. On clusters: docs/installation.md.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# With GPUs DeepSpeed starts a process for each; without, it would start only one.
PROCESSES = $(shell $(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--num_accelerators 2')")

# The fast tests start no processes of several ranks, so they run on all cores. The others mostly wait for a rank: two
# files at a time, as the tests of a file share runs, and beside them those on Slurm, which share one cluster.
SLOW := engine or slurm or slow or mm
FAST := -n logical --maxprocesses 8 --dist worksteal -m "not ($(SLOW) or cuda)"
NEED_MM := tests/dense tests/detect tests/segment tests/export/test_export_to_mm.py tests/slurm/test_dense_jobs.py

.PHONY: help pretrain check test test-ranks test-slurm test-avx2 lint install hooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## */\1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

pretrain: install  ## the quick start: MAE on photographs, a few minutes on two cores
	python -m data.samples shards/samples
	overrides=$$(python -m pretrain.quickstart) && \
		deepspeed $(PROCESSES) pretrain/run.py pretrain/recipes/quickstart.yaml $$overrides

check: lint  ## lint and the fast tests, without mmcv
	python -m pytest $(FAST) $(NEED_MM:%=--ignore=%)

test: check .venv/mm  ## lint and all tests
	python -m pytest $(FAST) $(NEED_MM)
	$(MAKE) --no-print-directory -j 2 test-ranks test-slurm

test-ranks: .venv/mm  ## the slow tests but those on Slurm
	python -m pytest -n 2 --dist loadfile -m "($(SLOW)) and not slurm"

test-slurm: .venv/mm  ## the tests on Slurm
	python -m pytest -m slurm

test-avx2: .venv/mm  ## part of the tests, on what a processor without AVX-512 computes
	grep -q avx512f /proc/cpuinfo || exit 0; \
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m pytest $(FAST) tests/pretrain tests/classify \
		tests/checkpoints tests/export tests/dense tests/detect tests/segment

lint: install  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

install: .venv/installed  ## the virtual environment .venv, without mmcv

hooks: install  ## run the hooks of .pre-commit-config.yaml before every commit
	pre-commit install

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# mmcv compiles its ops against the installed torch, hence no build isolation: 10 minutes on two cores, once. Python's
# own flags are -g -O3: without debugging information it takes half the time.
.venv/mm: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt "setuptools>=80" wheel ninja psutil packaging
	CFLAGS="-g0 -O2" MMCV_WITH_OPS=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev,mm]"
	touch $@

clean:  ## delete the virtual environment, all runs and the samples' shards
	rm -rf .venv runs shards
