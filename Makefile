# make quickstart | install | test | test-slow | test-exhaustive | test-gpu | check | bench
PYTHON ?= python3
BIN := .venv/bin
# A package index with CPU builds of torch, if pip's default one offers only accelerator builds, e.g.
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
export OMP_NUM_THREADS ?= 1
# Runs and tests start many processes, which would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart install test test-slow test-exhaustive test-gpu check bench clean

quickstart: install
	$(BIN)/mneme data build quickstart
	$(BIN)/mneme train v4_nano

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip==26.3
	$(BIN)/python -m pip install --progress-bar off torch==2.13.0 numpy -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[test]'
	touch $@

# Two processes; a file's tests stay together, for they share fixtures. In the order of the files: by their number
# of tests, as is the default, the few longest ones come last, and one process waits for the other.
test: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 120

test-slow: install
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not exhaustive and not gpu and not npu" --timeout 600 $(TESTS)

# More combinations of layouts than CI has time for.
test-exhaustive: install
	$(BIN)/pytest -n 2 --dist loadfile -m exhaustive --timeout 600 $(TESTS)

# On a machine with an accelerator: its tests, and the benchmarks on it.
test-gpu: install
	PYTHON=$(BIN)/python bash tests/gpu/run.sh

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile.*

bench: install
	$(BIN)/mneme data build quickstart_mm
	$(BIN)/mneme bench cli
	$(BIN)/mneme bench step
	$(BIN)/mneme bench model
	$(BIN)/mneme bench mhc
	$(BIN)/mneme bench attention
	$(BIN)/mneme bench engram
	$(BIN)/mneme bench parallel
	$(BIN)/mneme bench data
	$(BIN)/mneme bench checkpoint
	$(BIN)/mneme bench monitor

clean:
	rm -rf runs corpus .mypy_cache .ruff_cache .pytest_cache .hypothesis
