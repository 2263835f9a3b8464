# Each target does its own set-up in .venv; nothing needs to be installed by hand but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cpu
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRA)

.PHONY: demo test test-slow test-gpu check docs bench clean

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages on Linux.
$(READY): pyproject.toml
	@echo "setting up $(VENV): a minute or two, mostly downloads"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),dev]"
	touch $@

demo: $(READY)  ## Build a validated int4 artifact from the bundled checkpoint.
	HF_HUB_OFFLINE=1 $(BIN)/phiconv build recipes/int4-cpu.yaml --model examples/tiny-phi3

test: $(READY)  ## Run the tests (under 10 minutes on 2 cores).
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: $(READY)  ## Run the tests that take longer.
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

test-gpu:  ## Run what needs CUDA, in a set-up of its own, and write dist/cuda/cuda.md.
	$(MAKE) VENV=.venv-cuda EXTRA=cuda .venv-cuda/.ready-cuda
	HF_HUB_OFFLINE=1 .venv-cuda/bin/python -m benchmarks.cuda

check: $(READY)  ## Lint, format check, types, import directions, generated documents.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/lint-imports

docs: $(READY)  ## Regenerate the generated documents.
	$(BIN)/python docs/generate.py

bench: $(READY)  ## Measure phiconv beside its peers: make bench ARGS="--only int4-cpu --runs 3".
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) dist
