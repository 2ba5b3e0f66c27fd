# Every target first runs `make setup`, which takes no time once it has finished.
PRESET ?= yaml/quickstart_ppo_openvlaoft.yaml
# The preset gives the number of ranks in its line "# ranks: 2". On GPUs there is at most one rank per GPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
RANKS ?=
ARGS ?=
# The launcher's default port is the same for all runs on a machine, so each run gets a free one.
FREE_PORT := python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
# The launcher says nothing as long as all is well.
QUIET := $(if $(filter 1,$(SOLOVLA_DEBUG)),,--quiet)
# DeepSpeed uses the GPUs of this machine, or its CPU. You can choose: make train DS_ACCELERATOR=cpu
export DS_ACCELERATOR ?= $(if $(filter 0,$(GPUS)),cpu,cuda)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Recipes read these variables from the environment, where no character of a path is special.
override PRESET := $(value PRESET)
export PRESET RANKS GPUS ARGS

.PHONY: setup train warmup results reproduce test test-all rehearse bench lint docs clean

setup: .venv/.ready

.venv/.ready: requirements.txt setup.sh
	./setup.sh
	touch $@

# Sets $$script and $$ranks for a preset.
define READ_PRESET
test -f "$$PRESET" || { echo "error: the preset $$PRESET is not a file: use one from yaml/" >&2; exit 2; }; \
case "$${PRESET##*/}" in *grpo*) script=train_grpo.py ;; *) script=train_ppo.py ;; esac; \
ranks="$$RANKS"; \
if [ -z "$$ranks" ]; then \
	ranks=$$(sed -n 's/^# ranks: *\([1-9][0-9]*\) *$$/\1/p' <"$$PRESET" | head -n 1); \
	test -n "$$ranks" || { echo "error: $$PRESET has no line like '# ranks: 2': run make train RANKS=2" >&2; exit 2; }; \
	if [ "$$GPUS" -gt 0 ] && [ "$$GPUS" -lt "$$ranks" ]; then ranks=$$GPUS; fi; \
fi
endef

train: setup
	@$(READ_PRESET); \
	echo "deepspeed --num_gpus $$ranks $$script --config $$PRESET $$ARGS"; \
	echo "the launcher starts: it loads DeepSpeed, which takes a few seconds"; \
	deepspeed $(QUIET) --master_port $$($(FREE_PORT)) --num_gpus "$$ranks" "$$script" --config "$$PRESET" $(ARGS)

# Makes the tiny policies of the quickstarts and RESULTS.md again: eyes that have seen random scenes, demonstrations,
# fine-tuning, and a model card each.
LEARN = deepspeed $(QUIET) --master_port $$($(FREE_PORT)) --num_gpus 2 train_$(1).py --config yaml/$(2).yaml \
	--export_dir $(3) $(ARGS)
warmup: setup
	$(call LEARN,eyes,eyes_tiny,checkpoints/tiny-eyes)
	python collect_demos.py --config yaml/demos_tiny.yaml
	$(call LEARN,sft,sft_tiny_openvlaoft,checkpoints/openvla-oft-tiny-warmup)
	$(call LEARN,sft,sft_tiny_openvla,checkpoints/openvla-tiny-warmup)
	python collect_demos.py --config yaml/demos_tiny_main.yaml
	$(call LEARN,sft,sft_tiny_openvlaoft_main,runs/warmup/main_eyes_frozen)
	$(call LEARN,sft,sft_tiny_openvlaoft_main_all,checkpoints/openvla-oft-tiny-main-warmup)

# Draws RESULTS.md from the runs in results/.
results: setup
	python benchmarks/learning.py draw

# Repeats every run of RESULTS.md after its warm-up. This takes hours.
reproduce: setup
	$(MAKE) warmup
	python benchmarks/learning.py run --again
	python benchmarks/learning.py draw

# Two processes run the tests. A file stays in one of them, since its tests share what they set up.
PYTEST = python -m pytest -q tests -n 2 --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) -m "not full" $(ARGS)

# The same with the full grids.
test-all: setup
	$(PYTEST) $(ARGS)

# The first launch of every published recipe with tiny weights: 9 minutes on two cores. test-all includes it.
rehearse: setup
	DS_ACCELERATOR=cpu python benchmarks/rehearse.py $(ARGS)

# Measures speed for one table, in a quarter of an hour. The machine must not do anything else.
bench: setup
	DS_ACCELERATOR=cpu python benchmarks/bench.py $(ARGS)

lint: setup
	ruff check . && ruff format --check .

# Builds the website of README.md and docs/ in site/. make docs ARGS=serve shows it while you write.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs $(or $(ARGS),build --strict)

.venv-docs/.ready: requirements-docs.txt
	python3 -m venv .venv-docs
	.venv-docs/bin/pip install -q --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv .venv-docs site
