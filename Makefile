# Everything runs in .venv, which any target makes when it is missing or older than its inputs.
#
#   PYTHON   interpreter that .venv is made from (3.11 or newer)
#   TORCH    what pip installs as torch, options included: the tested version by default, e.g. TORCH='torch==2.11.0' for another one
#   WHEELS   folder of wheels to install from without a network; `make wheels` fills one where there is a network
#   ARGS     further arguments of pytest, e.g. make test ARGS='-k data -x'
#   SEED     of the sequences that `make demo` plants facts in: by default other ones every time

PYTHON ?= python3
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
WHEELS ?=
ARGS ?=
SEED ?= $(shell date +%s)

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --quiet
OFFLINE := $(if $(WHEELS),--no-index --find-links '$(abspath $(WHEELS))')
# Tools of the environment come first on PATH, so that `deepspeed` and the compilers it starts find its python and ninja.
# Threads that wait for each other sleep: on a busy machine, spinning ones can take all processors from those that have work.
RUN := OMP_WAIT_POLICY="$${OMP_WAIT_POLICY:-PASSIVE}" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help venv wheels test test-slow test-all check format demo clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(STAMP) ## Make .venv with everything pinned (done by the other targets too)

# torch first, by itself: a version range may resolve to a build for other hardware, and the rest then accepts what is there.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"mc_ds needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: set PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install $(OFFLINE) -c $(VENV)/constraints.txt $(TORCH)
	$(PIP) install $(OFFLINE) -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

# Built, not only downloaded: some packages are published as source alone. setuptools builds this one, and the launcher.
wheels: $(STAMP) ## Collect everything that .venv needs in wheels/: copy it to a machine without a network, then make venv WHEELS=wheels
	$(PIP) wheel --wheel-dir wheels -c $(VENV)/constraints.txt $(TORCH)
	$(PIP) wheel --wheel-dir wheels --find-links wheels -c $(VENV)/constraints.txt 'setuptools>=77' '.[dev]'
	rm -f wheels/mc_ds-*.whl

test: $(STAMP) ## Run the tests (CPU, gloo), but for the slow ones
	$(RUN) OMP_NUM_THREADS=1 pytest -n 2 -m 'not slow' $(ARGS)  # one thread a worker: two of two would wait for each other

test-slow: $(STAMP) ## Run the slow tests: kill loops, Slurm, several hosts (skipped, with the reason, where their programs are missing)
	$(RUN) pytest -rs -m slow $(ARGS)

test-all: test test-slow ## Run all tests

check: $(STAMP) ## Lint, formatting and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(STAMP) ## Format the code and fix what can be fixed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

demo: $(STAMP) ## Train a small model on real text under ZeRO-3, make a bundle of it that reads and writes; show a trained LensNet at work; write a page about it all
	$(RUN) deepspeed --num_gpus 1 launch/train.py --config launch/recipes/demo/demo.yaml --deepspeed_config ds_configs/zero3.json
	$(RUN) python tools/summarize_run.py runs/demo
	$(RUN) python tools/convert_checkpoint.py runs/demo runs/demo/bundle --overwrite
	$(RUN) python launch/evaluate.py --bundle runs/demo/bundle --policies recency,random,lens,full --samples 8 --show_focus 1 --out runs/demo/eval.json
	$(RUN) python launch/generate.py --bundle runs/demo/bundle --prompt_file mc_ds/geometry.py --max_new_tokens 48 --temperature 0.7 --show_focus
	@printf '%s\n' '' \
	  'Minutes on a CPU are too few to learn where to look. A model that has learnt it (assets/recall_small), on new sequences:' \
	  '48 facts "key=letters" stand in 1,024 tokens of source code, the end asks for three of them, and there is room for 484 entries.' \
	  '  recency  reads the end and nothing before it        random  opens places by chance' \
	  '  lens     opens what LensNet scores highest          blind   the same, but LensNet is shown the question of another text' \
	  'Under ^ is a fact that was asked for: where it is █ the model reads its letters, where it is ▒ only a summary.' ''
	$(RUN) python launch/evaluate.py --bundle assets/recall_small --tasks recall --questions 3 --policies recency,random,blind,lens --seed $(SEED) --show_focus 1 --out runs/demo/recall.json
	$(RUN) python tools/report.py runs/demo

clean: ## Remove caches and build outputs; .venv, runs/ and prepared data stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mc_ds launch tools tests -name __pycache__ -type d -exec rm -rf {} +
