# PYTHON: the interpreter for .venv (3.11 to 3.13).
# RUN: the command before "-m ddp_trainer.train"; for example,
#   ".venv/bin/accelerate launch --config_file launch/all_gpus.yaml".
# GPU_FLAGS: flags for `make gpu`, such as --rehearse on a machine without a GPU.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= $(BIN)/python
SHELL_SCRIPTS := .ci/run $(wildcard scripts/*.sh scripts/ffcv/*.sh scripts/ffcv/bin/* slurm/*.sh)

.PHONY: setup demo train test test-fast lint soak bench gpu

setup:
	@PYTHON="$(PYTHON)" bash scripts/setup.sh

data/%/dataset.json: | setup
	@$(BIN)/python -m data_prep --source $* --out data/$*

demo: setup data/synthetic/dataset.json
	@$(RUN) -m ddp_trainer.train demo --data-dir data/synthetic --out runs/demo-$$(date +%Y%m%d-%H%M%S)

train: setup data/cifar10/dataset.json
	@$(RUN) -m ddp_trainer.train baseline --data-dir data/cifar10

test: setup lint
	@bash scripts/test_tools.sh
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --cov

test-fast: setup
	$(BIN)/python -m pytest tests/unit --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@[ ! -x $(BIN)/shellcheck ] || $(BIN)/shellcheck -x $(SHELL_SCRIPTS)

soak: setup
	$(BIN)/python -m tests.soak

bench: setup data/synthetic/dataset.json
	@for script in loading training_step; do $(BIN)/python -m benchmarks.$$script || exit 1; done

gpu: setup
	$(BIN)/python -m benchmarks.acceptance $(GPU_FLAGS)
