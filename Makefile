# Every target sets up what it needs; the second time that costs nothing.
PRESET ?= yaml/quickstart_ppo_openvla.yaml
RANKS ?= $(shell sed -n 's/^\# ranks: *//p' $(PRESET))
ARGS ?=
# on a machine with GPUs, DeepSpeed finds them by itself: make train DS_ACCELERATOR=cuda
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null && echo cuda || echo cpu)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup train test lint clean

setup: .venv/.ready

.venv/.ready: requirements.txt setup.sh
	./setup.sh
	touch $@

train: setup
	deepspeed --num_gpus $(RANKS) train_ppo.py --config $(PRESET) $(ARGS)

test: setup
	python -m pytest -q tests $(ARGS)

lint: setup
	ruff check . && ruff format --check .

clean:
	rm -rf .venv
