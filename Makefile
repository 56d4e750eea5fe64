# `make quickstart` runs the main job, `make test` the tests; both set up .venv first if it is missing.
# Set PYTHON to choose the interpreter: make test PYTHON=python3.12
# ARGS goes to the program behind a target:  make test ARGS="tests/recipe -x"

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# timing.py is what the others share; gpu.py has a target of its own; the rest of these ask for a model
NOT_ALONE := timing.py gates.py few_bits.py sft_vs_trl.py gptq_error.py busy.py gpu.py
BENCHMARKS := $(sort $(filter-out $(addprefix benchmarks/,$(NOT_ALONE)),$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-real lint format docs docs-check bench gpu

help:
	@echo "make quickstart   the whole lifecycle on built-in data"
	@echo "make test         the default test suite"
	@echo "make test-slow    the long tests"
	@echo "make test-real    the tests on real models, which come out of packages"
	@echo "make lint         style, formatting and types"
	@echo "make format       mend style and formatting"
	@echo "make docs         write what docs/ has from recipes, commands and chat templates again"
	@echo "make docs-check   fail if that is out of date"
	@echo "make bench        every script in benchmarks/ that needs no model"
	@echo "make gpu          checks and speeds on a CUDA device, nine minutes at most, into gpu-results/"

# The stamp is newer than both files exactly when the environment was installed from them.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11" >&2; \
		  echo "hint: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)
	$(BIN)/llmctl quickstart $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-real: $(READY)
	$(BIN)/python -m pytest -m real -rs $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/templates.py

docs-check: $(READY)
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/templates.py --check

bench: $(READY)
	@for script in $(BENCHMARKS); do \
		echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; \
	done

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(ARGS)
