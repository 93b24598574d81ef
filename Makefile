# The quick start and the tests, in a virtual environment of the project's own. Cluster users: README.md, "Install".
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# With GPUs DeepSpeed starts a process for each; without, it would start just one.
PROCESSES = $(shell $(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--num_accelerators 2')")

.PHONY: pretrain test lint install clean

pretrain: install  ## the quick start: LoMaR on photographs, a few minutes on two cores
	python -m data.samples shards/samples
	deepspeed $(PROCESSES) pretrain/run.py pretrain/recipes/quickstart.yaml

test: lint .venv/mm  ## everything that must pass
	python -m pytest

lint: install
	ruff check .
	ruff format --check .
	mypy

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

# mmcv compiles its ops against the torch that is there, hence no isolation: 10 minutes on two cores, once.
.venv/mm: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt "setuptools>=80" wheel ninja psutil packaging
	MMCV_WITH_OPS=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test,mm]"
	touch $@

clean:
	rm -rf .venv runs shards
