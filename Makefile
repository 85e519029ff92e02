# `make train` and `make test` are all a newcomer needs; both set up .venv themselves.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST := .venv-newest
LIBRARIES := jax flax optax orbax-checkpoint
PYTHON ?= $(shell for p in python3.12 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then echo $$p; break; fi; done)

# a file's tests share compiled functions, which each process would compile for itself
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

SITE := docs/_build/html
SITE_READY := $(VENV)/.docs-ready

SMOKE := smoke-tasks smoke-mqar smoke-tracking smoke-language smoke-throughput

.PHONY: help setup train test test-fast test-newest faults faults-quick smoke $(SMOKE) site lint types format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create or update .venv

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "mdn-jax needs Python 3.12 or newer, and none of python3.12, python3.13, python3 is one."; \
	  echo "Install it (python.org, your package manager, pyenv, uv) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; \
	  exit 1; fi
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing the tested versions into $(VENV) (about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

train: $(READY)  ## train a small Momentum DeltaNet on this machine (ARGS="--resume", ...)
	@$(BIN)/python -m train smoke $(ARGS)

test: $(READY)  ## all tests
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(READY)  ## the tests that take seconds
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

# the second installation goes beyond the bounds of pyproject.toml, which pip says and allows
test-newest: $(READY)  ## tests on the newest jax, flax, optax, orbax in .venv-newest (ARGS="tests/ops", ...)
	@[ -x $(NEWEST)/bin/python ] || $(BIN)/python -m venv $(NEWEST)
	@echo "Installing the newest $(LIBRARIES) into $(NEWEST) (minutes)"
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(LIBRARIES)
	@$(NEWEST)/bin/python -c 'import sys; from importlib.metadata import version; \
	  print(*(f"{name} {version(name)}" for name in sys.argv[1:]), sep=", ")' jaxlib $(LIBRARIES)
	@$(NEWEST)/bin/python -m pytest $(PARALLEL) $(ARGS)

faults: $(READY)  ## kill runs, damage files, fill disks; a table (ARGS="--seed 1", ...), ten minutes at most
	@timeout 600 $(BIN)/python -m tests.faults $(ARGS)

faults-quick: $(READY)  ## a part of it, two minutes at most
	@$(BIN)/python -m tests.faults --quick $(ARGS)

smoke: $(SMOKE)  ## the comparisons of docs/comparisons.md at their smallest size

$(SMOKE): OPTIONS :=
smoke-mqar: OPTIONS := --mixers mdn_slow --equal state
smoke-tracking: OPTIONS := --tasks mod3 --mixers mdn_stable
smoke-language: OPTIONS := --mixers mdn attention --ablations no-beta-bound
$(SMOKE): smoke-%: $(READY)  # compiling is most of it
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	  XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m benchmarks $* --smoke $(OPTIONS) --output "$$out"

$(SITE_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $(SITE_READY)

site: $(SITE_READY)  ## the documentation as a site, notebooks run, no warning allowed
	@PYTHONPATH=. $(BIN)/python -m sphinx -W --keep-going -q -b html docs $(SITE)
	@echo "$(SITE)/index.html"

lint: $(READY)  ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	@$(BIN)/mypy

format: $(READY)  ## rewrite in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)  ## the operator's implementations side by side
	@$(BIN)/python -m benchmarks kernels $(ARGS)

clean:  ## remove what the targets made (never runs/)
	rm -rf $(VENV) $(NEWEST) .compiled docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
