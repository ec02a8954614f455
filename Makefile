# `make demo` and `make test` need Python 3.11 to 3.13 and nothing else: each makes .venv, installs from the lock
# files, builds its model and runs. What is done already is skipped. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:

SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)

VENV := .venv
PY := $(VENV)/bin/python
LOCKS := requirements/cpu.txt requirements/dev.txt
VERSIONS := 0.29 0.30 0.31
MADE := $(VENV)/.made
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready
TINY := .models/tiny .models/tiny-gemma3 .models/tiny-deepseek
SMOLLM2 := .models/smollm2
MARKER := vllm_llmd_model.json
LOGS := .logs/demo
PYTEST := $(PY) -m pytest
FAST := $(wildcard tests/unit tests/contract tests/process)
# Triton kernels on CPU tensors; the variable counts when triton is imported, hence a process of its own.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/gpu/test_block_copy_gpu.py

# Without this, running from here puts the checkout on sys.path, and transformers takes our kernels/ for its own.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint format test-unit test-engine test-gpu bench-pd bench-timeline bench-index bench-routing bench-sim bench-scaling bench-step bench-copy \
	model model-tiny model-smollm2 install lock dist clean distclean help

demo: $(READY) $(SMOLLM2)/$(MARKER) ## two real engines, a router, one chat: ends with one line of JSON
	@rm -rf $(LOGS)
	@$(PY) -m vllm_llmd.demo --model $(SMOLLM2) --log-dir $(LOGS)

test: $(READY) $(TINY:=/$(MARKER)) ## every test, real engines on tiny models included
	$(PYTEST) $(FAST)
	$(INTERPRETED)
	$(PYTEST) $(wildcard tests/engine tests/gpu)

check: lint test-unit ## lint and the fast tests: no engine is started

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test-unit: $(READY) ## logic, contracts and the router's process, without an engine
	$(PYTEST) $(FAST)
	$(INTERPRETED)

test-engine: $(READY) $(TINY:=/$(MARKER)) ## real vLLM engines on the tiny model
	$(PYTEST) $(wildcard tests/engine)

# The rules below, with another environment and its lock file.
test-matrix: ## the engine tests on older releases of vLLM; VERSIONS=0.31 takes one alone
	@results=(); for version in $(VERSIONS); do \
		if $(MAKE) --no-print-directory VENV=$(VENV)-$$version LOCKS=requirements/cpu-$$version.txt test-engine; \
		then results+=("vLLM $$version: passed"); else results+=("vLLM $$version: FAILED"); fi; done; \
	printf '%s\n' "$${results[@]}"; [[ "$${results[*]}" != *FAILED* ]]

test-gpu: $(READY) ## what needs a GPU; skips what it cannot run
	$(PYTEST) tests/gpu

bench-pd: $(READY) $(TINY:=/$(MARKER)) $(SMOLLM2)/$(MARKER) ## prefill/decode benchmark; ARGS=--quick, ARGS=--resume
	@PYTHONPATH=$(CURDIR)/bench $(PY) -m pd $(ARGS)

bench-timeline: $(READY) $(SMOLLM2)/$(MARKER) ## draw what two engines do during one request, as docs/timeline.svg
	@$(PY) bench/timeline.py $(ARGS)

# Dynamo lives in an environment for benchmarks, beside the router's packages. Real engines run in the usual one.
bench-index: $(READY) .models/tiny/$(MARKER) ## the prefix index against NVIDIA Dynamo's; ARGS="--parts table"
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench LOCKS=requirements/bench.txt bench-index-here

bench-index-here: $(READY)
	@PYTHONPATH=$(CURDIR)/bench $(PY) -m index --engine-python .venv/bin/python $(ARGS)

# vLLM's router lives in the environment of the benchmarks; everything else runs in the usual one.
bench-routing: $(READY) $(SMOLLM2)/$(MARKER) ## placement against other routers, on real engines; ARGS=--quick, ARGS=--resume
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench LOCKS=requirements/bench.txt install
	@PYTHONPATH=$(CURDIR)/bench $(PY) -m routing --vllm-router $(VENV)-bench/bin/vllm-router $(ARGS)

bench-sim: $(READY) ## policies on a trace of production, on simulated fleets: TRACE=FILE, ARGS="--engines 8"
	@test -n "$(TRACE)" || { echo "error: say which trace: make bench-sim TRACE=FILE" >&2; exit 1; }
	@PYTHONPATH=$(CURDIR)/bench $(PY) -m sim --trace $(TRACE) $(ARGS)

bench-scaling: $(READY) ## are the desired replicas right, on simulated fleets: TRACE=FILE, ARGS="--roles apart"
	@test -n "$(TRACE)" || { echo "error: say which trace: make bench-scaling TRACE=FILE" >&2; exit 1; }
	@PYTHONPATH=$(CURDIR)/bench $(PY) -m scaling --trace $(TRACE) $(ARGS)

bench-step: $(READY) ## what the connector costs an engine per step with nothing in flight
	@$(PY) bench/step_cost.py

bench-copy: $(READY) ## speed of the copy kernels, in that of a plain copy
	@$(PY) bench/block_copy.py

model: model-tiny model-smollm2 ## both model directories, in .models/

model-tiny: $(TINY:=/$(MARKER))
model-smollm2: $(SMOLLM2)/$(MARKER)

install: $(READY) ## .venv with everything that demo and test need

$(MADE):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; say: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

$(LOCKED): $(LOCKS) | $(MADE)
	@echo "Installing the locked packages into $(VENV): some minutes on the first run"
	@$(PY) -m pip install --no-input --no-deps $(addprefix -r ,$(LOCKS)) || { cat >&2 <<< "$$PIP_HINT"; exit 1; }
	@touch $@

$(READY): $(LOCKED) pyproject.toml setup.py
	@$(PY) -m pip install --no-input --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(TINY:=/$(MARKER)): .models/%/$(MARKER): vllm_llmd/model.py vllm_llmd/tiny_models.py | $(READY)
	@$(PY) -m vllm_llmd.model .models/$* --kind $*
	@touch $@

$(SMOLLM2)/$(MARKER): vllm_llmd/model.py | $(READY)
	@$(PY) -m vllm_llmd.model $(SMOLLM2) --kind smollm2
	@touch $@

# uv does not read pip's configuration: what pip knows of package sources is handed on, and they are equals as for pip.
UV_COMPILE = UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" \
	UV_EXTRA_INDEX_URL="$${UV_EXTRA_INDEX_URL:-$${PIP_EXTRA_INDEX_URL:-}}" \
	UV_INDEX_STRATEGY="$${UV_INDEX_STRATEGY:-unsafe-best-match}" \
	$(VENV)/bin/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate $(UPGRADE)

lock: $(READY) ## pin anew what requirements/*.in ask for; UPGRADE=--upgrade takes the newest of everything
	$(UV_COMPILE) --overrides requirements/overrides.txt requirements/cpu.in -o requirements/cpu.txt
	$(UV_COMPILE) --constraints requirements/cpu.txt requirements/dev.in -o requirements/dev.txt
	$(UV_COMPILE) --constraints requirements/cpu.txt requirements/router.in -o requirements/router.txt
	$(UV_COMPILE) --constraints requirements/router.txt requirements/bench.in -o requirements/bench.txt
	for version in $(VERSIONS); do $(UV_COMPILE) --overrides requirements/overrides.txt \
		requirements/cpu-$$version.in -o requirements/cpu-$$version.txt; done

dist: $(READY) ## sdist and wheel, in dist/
	rm -rf build dist
	$(PY) -m build --no-isolation

clean: ## remove what builds and test runs leave behind; keeps .venv and .models
	rm -rf build dist .logs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find vllm_llmd router kv_connector kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .models too
	rm -rf $(VENV) $(VENV)-bench $(VERSIONS:%=$(VENV)-%) .models

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

define PIP_HINT

error: pip could not install the locked packages.
If it found no torch==2.13.0+cpu: that build is not on PyPI but on PyTorch's own index of CPU wheels.
Tell pip of that index, for example by PIP_EXTRA_INDEX_URL, and run make again.
endef
export PIP_HINT
