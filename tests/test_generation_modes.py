"""Every mode of generation under control gives the tokens of a naive reference that knows no cache."""

import copy
import logging
import math
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from hf_recontrol import ControlConfig, ReControlForCausalLM

from .reference import full_inputs, reference_control, reference_generate, reference_greedy, reference_logits
from .tiny_models import VOCAB, left_pad, prompts, tiny_head, tiny_model
from .versions import since, traces_transformers

CONTROL = ControlConfig(step_size=0.5, num_steps=5, l2=0.1)
OTHER = ControlConfig(step_size=0.8, num_steps=8)
PLAUSIBLE = replace(CONTROL, plausibility=0.3)
LENIENT = replace(CONTROL, plausibility=0.03)
CAPPED = replace(CONTROL, step_size=2.0, max_kl=0.3)
ADVANTAGE = ControlConfig(method="advantage", step_size=0.5)
HOOK_POINTS = ["decoder_layer", "lm_head"]
NEW = 8
EXACT = {"rtol": 1e-9, "atol": 1e-9}

every_hook_point = pytest.mark.parametrize("hook_point", HOOK_POINTS)


def build(hook_point="decoder_layer", control=CONTROL, family="llama", layer=-1, seed=0, **head_options):
    """A controlled model, a plain copy of its base, and a copy of its head."""
    base = tiny_model(family, seed=seed)
    head = tiny_head(base, hook_point, layer, seed=seed, **head_options)
    model = ReControlForCausalLM.from_model(tiny_model(family, seed=seed), copy.deepcopy(head), control=control)
    return model, base, head


def generate(model, ids, mask=None, **kwargs):
    """All tokens, prompts included; greedy unless told otherwise."""
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs)


@pytest.fixture
def quiet_drafts(monkeypatch):
    """Assisted decoding calls `generate` in a way that transformers itself warns will be removed."""
    monkeypatch.setattr(logging.getLogger("transformers.generation.utils"), "disabled", True)


def expect(base, head, ids, mask=None, control=CONTROL, **kwargs):
    """The reference's tokens, after checking that control changes those of every row."""
    kwargs = {"max_new_tokens": NEW, **kwargs}
    expected = reference_generate(base, head, ids, mask, control, **kwargs)
    uncontrolled = reference_generate(base, head, ids, mask, None, **kwargs)
    assert (expected != uncontrolled).any(dim=1).all()
    return expected


def padded_prompts(lengths=(4, 7)):
    return left_pad([prompts(1, length, seed=length)[0] for length in lengths])


def test_logits_that_cannot_be_drawn_from_are_told():
    model, _, _ = build("lm_head")
    with pytest.raises(FloatingPointError, match=r"`step_size` 0.5 is too large for this head, or the temperature"):
        generate(model, prompts(2), do_sample=True, temperature=1e-310)


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
def test_greedy(hook_point, control):
    model, base, head = build(hook_point, control)
    ids = prompts(3)
    expected = expect(base, head, ids, control=control)
    assert generate(model, ids).tolist() == expected.tolist()
    model.control = OTHER
    assert generate(model, ids).tolist() != expected.tolist()
    assert generate(model, ids, control=control).tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
def test_sampling_with_the_same_seed(hook_point, control):
    model, base, head = build(hook_point, control)
    ids = prompts(3)

    def draw(_, logits):
        return torch.multinomial(logits.softmax(-1), num_samples=1)[:, 0]

    torch.manual_seed(0)
    expected = reference_generate(base, head, ids, control=control, pick=draw, max_new_tokens=NEW)
    torch.manual_seed(0)
    uncontrolled = reference_generate(base, head, ids, pick=draw, max_new_tokens=NEW)
    assert expected.tolist() != uncontrolled.tolist()
    torch.manual_seed(0)
    assert generate(model, ids, do_sample=True, top_k=0).tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True, "top_k": 0, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 3},
        {"num_beams": 3, "eos_token_id": 52, "early_stopping": True},
    ],
    ids=["beams", "beams_returned", "beam_sample", "samples_returned", "beams_that_end"],
)
def test_beams_and_several_sequences(hook_point, control, options):
    model, base, head = build(hook_point, control)
    ids, mask = padded_prompts()
    torch.manual_seed(0)
    with reference_control(base, head, control):
        expected = generate(base, ids, mask, use_cache=False, **options)
    torch.manual_seed(0)
    uncontrolled = generate(base, ids, mask, use_cache=False, **options)
    assert expected.tolist() != uncontrolled.tolist()
    torch.manual_seed(0)
    assert generate(model, ids, mask, **options).tolist() == expected.tolist()


@every_hook_point
def test_left_padding(hook_point):
    model, base, head = build(hook_point)
    rows = [prompts(1, length, seed=length)[0] for length in (3, 8, 5)]
    ids, mask = left_pad(rows)
    tokens = generate(model, ids, mask)[:, ids.shape[1] :]
    for row, row_tokens in zip(rows, tokens, strict=True):
        assert row_tokens.tolist() == expect(base, head, row[None])[0, len(row) :].tolist()


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
@pytest.mark.parametrize("draft_kind", ["plain", "controlled", "same_settings"])
def test_assisted_decoding(hook_point, control, draft_kind, quiet_drafts):
    """The target's tokens are its own whatever the draft; the draft follows its own settings, not its target's."""
    model, base, head = build(hook_point, control)
    ids = prompts(1)
    draft_seed = 0 if draft_kind == "same_settings" else 3
    draft_base = tiny_model("llama", seed=draft_seed)
    draft_head = tiny_head(draft_base, hook_point, seed=draft_seed)
    draft_control = {"plain": None, "controlled": OTHER, "same_settings": control}[draft_kind]
    draft = tiny_model("llama", seed=draft_seed)
    if draft_control is not None:
        draft = ReControlForCausalLM.from_model(draft, draft_head, control=draft_control)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    proposals = []
    draft_generate = draft.generate

    def spy(**kwargs):
        output = draft_generate(**kwargs)
        proposals.append((kwargs["input_ids"].clone(), output.sequences.clone()))
        return output

    draft.generate = spy
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    expected = expect(base, head, ids, control=control, max_new_tokens=12)
    assert generate(model, ids, max_new_tokens=12, assistant_model=draft).tolist() == expected.tolist()
    assert len(proposals) > 1
    for prefix, proposed in proposals:
        count = proposed.shape[1] - prefix.shape[1]
        own = reference_greedy(draft_base, draft_head, prefix, control=draft_control, max_new_tokens=count)
        assert proposed.tolist() == own.tolist()
    assert (len(forwards) <= 4) == (draft_kind == "same_settings")
    # The call's own settings are the target's, not the draft's.
    expected = expect(base, head, ids, control=OTHER, max_new_tokens=12)
    assert generate(model, ids, max_new_tokens=12, assistant_model=draft, control=OTHER).tolist() == expected.tolist()


@every_hook_point
def test_a_controlled_draft_of_a_plain_target(hook_point, quiet_drafts):
    base = tiny_model("llama")
    draft, _, _ = build(hook_point, seed=3)
    ids = prompts(1)
    expected = generate(base, ids)
    assert generate(base, ids, assistant_model=draft).tolist() == expected.tolist()


@every_hook_point
def test_early_exit_drafts_of_the_model_itself(hook_point, quiet_drafts):
    """The draft is the model's own first layers: transformers lowers `config.num_hidden_layers` for its forwards."""
    model, base, head = build(hook_point)
    ids = prompts(1)
    expected = expect(base, head, ids)
    assert generate(model, ids, assistant_early_exit=1).tolist() == expected.tolist()
    assert generate(model, ids).tolist() == expected.tolist()


prompt_lookup = since("5.13", "its prompt lookup fails without an end token")


@prompt_lookup
@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
def test_prompt_lookup(hook_point, control):
    model, base, head = build(hook_point, control)
    ids = prompts(1, 6).repeat(1, 2)
    # The prompt holds what follows it, so that some candidates are accepted.
    ids = expect(base, head, ids, control=control)
    ids = torch.cat([ids, ids], dim=1)
    expected = reference_greedy(base, head, ids, control=control, max_new_tokens=12)
    forwards = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: forwards.append(output.logits.shape[1]), with_kwargs=True
    )
    output = generate(model, ids, max_new_tokens=12, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert output.tolist() == expected.tolist()
    assert max(forwards) > 1


@pytest.mark.parametrize("mode", ["assisted", pytest.param("prompt_lookup", marks=prompt_lookup)])
def test_a_middle_layer_as_the_target_of_drafts(mode, quiet_drafts):
    """Rejected candidates leave nothing edited behind."""
    model, base, head = build(layer=1)
    ids = prompts(1, 5).repeat(1, 2)
    expected = expect(base, head, ids, max_new_tokens=12)
    options = (
        {"assistant_model": tiny_model("llama", seed=3)} if mode == "assisted" else {"prompt_lookup_num_tokens": 3}
    )
    assert generate(model, ids, max_new_tokens=12, **options).tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("cache", ["static", "offloaded_none", "own_dynamic", "own_static"])
def test_caches(hook_point, layer, cache):
    if hook_point == "lm_head" and layer != -1:
        pytest.skip("the LM head has no layer")
    model, base, head = build(hook_point, layer=layer)
    ids, mask = padded_prompts()
    expected = expect(base, head, ids, mask)
    options = {
        "static": lambda: {"cache_implementation": "static"},
        "offloaded_none": lambda: {"cache_implementation": "dynamic"},
        "own_dynamic": lambda: {"past_key_values": DynamicCache(config=model.config)},
        "own_static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
    }[cache]()
    assert generate(model, ids, mask, **options).tolist() == expected.tolist()


@pytest.fixture
def quanto(monkeypatch):
    """optimum-quanto, whose own `unpack` is compiled on its first use, for half a minute: here the same in torch."""
    pytest.importorskip("optimum.quanto")

    def unpack(packed, bits):
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr("optimum.quanto.library.extensions.extension.Extension.lib", SimpleNamespace(unpack=unpack))


@every_hook_point
@pytest.mark.usefixtures("quanto")
def test_a_quantized_cache(hook_point):
    """Such a cache changes the base's states, so the reference is the base on the same cache with naive hooks."""
    size = {"dtype": torch.float32, "hidden_size": 64, "head_dim": 16}
    base, model = tiny_model("llama", **size), tiny_model("llama", **size)
    head = tiny_head(base, hook_point)
    settings = {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 16}
    cache = {"cache_implementation": "quantized", "cache_config": settings | {"residual_length": 4}}
    ids = prompts(2)
    with reference_control(base, head, CONTROL):
        expected = generate(base, ids, **cache).tolist()
    assert expected != generate(base, ids, **cache).tolist()
    assert expected != reference_greedy(base, head, ids, control=CONTROL).tolist(), "the cache does quantise"
    assert generate(ReControlForCausalLM.from_model(model, head, CONTROL), ids, **cache).tolist() == expected


@every_hook_point
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_sliding_window_cache(hook_point, options):
    """The window (4) is shorter than the prompt (9)."""
    model, base, head = build(hook_point, family="mistral")
    ids = prompts(2, 9)
    assert generate(model, ids, **options).tolist() == expect(base, head, ids).tolist()


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_chunked_prefill(hook_point, control, chunk):
    model, base, head = build(hook_point, control)
    ids, mask = padded_prompts((6, 9))
    expected = expect(base, head, ids, mask, control=control)
    assert generate(model, ids, mask, prefill_chunk_size=chunk).tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
def test_without_a_cache(hook_point, control):
    model, base, head = build(hook_point, control)
    ids, mask = padded_prompts()
    expected = expect(base, head, ids, mask, control=control)
    assert generate(model, ids, mask, use_cache=False).tolist() == expected.tolist()


# Continuous batching: several prompts of different lengths, packed in one row, generated in another thread.

# Small blocks and batches, so that prompts are cut and requests wait; the defaults take all of the memory.
# What is `page_size` now was `block_size` in transformers 5.17.
_PAGE_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
SMALL = ContinuousBatchingConfig(**{_PAGE_SIZE: 4}, num_blocks=64, max_batch_tokens=16)


def batched(model, rows, **kwargs):
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    results = model.generate_batch(
        [row.tolist() for row in rows], generation_config=config, continuous_batching_config=SMALL, **kwargs
    )
    assert [result.error for result in results.values()] == [None] * len(rows)
    return [result.generated_tokens for result in results.values()]


def batch_rows():
    return [prompts(1, length, seed=length)[0] for length in (3, 9, 5, 6)]


def expect_batch(base, head, rows, control):
    return [
        reference_greedy(base, head, row[None], control=control, max_new_tokens=NEW)[0, len(row) :].tolist()
        for row in rows
    ]


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, PLAUSIBLE, CAPPED], ids=["ascent", "plausibility", "max_kl"])
def test_continuous_batching(hook_point, control):
    model, base, head = build(hook_point, control)
    rows = batch_rows()
    expected, uncontrolled = expect_batch(base, head, rows, control), expect_batch(base, head, rows, None)
    assert all(a != b for a, b in zip(expected, uncontrolled, strict=True))
    assert batched(model, rows) == expected
    assert batched(model, rows, control=False) == uncontrolled
    with model.disable_control():
        assert batched(model, rows) == uncontrolled
    other = expect_batch(base, head, rows, OTHER)
    assert other != expected
    assert batched(model, rows, control=OTHER) == other
    model.control = OTHER
    assert batched(model, rows) == other
    assert batched(model, rows, control=control) == expected


def test_the_context_manager_of_continuous_batching_takes_a_control():
    model, base, head = build("lm_head", ADVANTAGE)
    (row,) = batch_rows()[:1]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    for control, expected in ((False, None), (OTHER, OTHER), (None, ADVANTAGE)):
        with model.continuous_batching_context_manager(config, continuous_batching_config=SMALL, control=control) as m:
            number = m.add_request(row, max_new_tokens=NEW)
            found = m.get_result(request_id=number).generated_tokens
        assert [found] == expect_batch(base, head, [row], expected)


def test_continuous_batching_of_the_advantage():
    model, base, head = build("lm_head", ADVANTAGE)
    rows = batch_rows()
    expected = expect_batch(base, head, rows, ADVANTAGE)
    assert expected != expect_batch(base, head, rows, None)
    assert batched(model, rows) == expected


@every_hook_point
def test_paged_cache_switches_to_continuous_batching(hook_point):
    model, base, head = build(hook_point)
    ids = prompts(3)
    for control, options in ((CONTROL, {}), (OTHER, {"control": OTHER}), (None, {"control": False})):
        output = model.generate(
            input_ids=ids,
            cache_implementation="paged",
            continuous_batching_config=SMALL,
            max_new_tokens=NEW,
            do_sample=False,
            **options,
        )
        assert output[0].tolist() == reference_greedy(base, head, ids, control=control, max_new_tokens=NEW).tolist()
    expect(base, head, ids)
    expect(base, head, ids, control=OTHER)


@since("5.23", "a manager that is kept loses the requests of its second session")
def test_a_batching_manager_that_is_kept_is_not_kept_for_another_control():
    model, base, head = build("lm_head", ADVANTAGE)
    rows, made = batch_rows(), []
    for control in (False, False, ADVANTAGE, False):
        found = batched(model, rows, control=control, persistent_manager=True)
        assert found == expect_batch(base, head, rows, control or None)
        made.append(model._cached_continuous_batching_manager)
    assert made[0] is made[1] and len(set(map(id, made))) == 3
    with torch.no_grad():
        model.value_head.advantage_mlp.layers[-1].bias.mul_(2)
    batched(model, rows, control=False, persistent_manager=True)
    assert model._cached_continuous_batching_manager is not made[-1]
    plain = model.unload()
    assert not hasattr(plain, "_cached_continuous_batching_manager")


@every_hook_point
def test_continuous_batching_refuses_step_sizes_for_each_row(hook_point):
    model, _, _ = build(hook_point)
    per_row = replace(CONTROL, step_size=(0.1, 0.2))
    rows = batch_rows()[:2]
    with pytest.raises(ValueError, match="step_size"):
        batched(model, rows, control=per_row)
    with pytest.raises(ValueError, match="step_size"):
        model.generate(input_ids=prompts(2), cache_implementation="paged", max_new_tokens=NEW, control=per_row)
    model.control = per_row
    with pytest.raises(ValueError, match="step_size"):
        batched(model, rows)
    assert batched(model, rows, control=False)


# Compilation.


@traces_transformers
@pytest.mark.parametrize(
    ("what", "hook_point", "control"),
    [
        ("model", "decoder_layer", CONTROL),
        ("forward", "lm_head", CONTROL),
        ("model", "lm_head", PLAUSIBLE),
        ("forward", "decoder_layer", PLAUSIBLE),
        ("model", "decoder_layer", CAPPED),
        ("forward", "lm_head", CAPPED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiled_whole(what, hook_point, control):
    """
    In one graph, and a change of settings between calls is not missed. Tracing takes seconds: each control meets each
    hook point and each way to compile, not all of them with one another.
    """
    torch._dynamo.reset()
    model, base, head = build(hook_point, control)
    ids = prompts()
    if what == "model":
        called = torch.compile(model, fullgraph=True, backend="eager")
    else:
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        called = model
    inputs = full_inputs(model, ids)

    def logits():
        with torch.no_grad():
            return called(**inputs, use_cache=False).logits

    # The limit is found by trials.
    near = EXACT if control.max_kl is None else {"rtol": 1e-3, "atol": 1e-3}
    expected = reference_logits(base, head, ids, control=control)
    uncontrolled = reference_logits(base, head, ids)
    other = reference_logits(base, head, ids, control=OTHER)
    assert not torch.allclose(expected, uncontrolled, atol=1e-3)
    assert not torch.allclose(expected, other, atol=1e-3)
    torch.testing.assert_close(logits(), expected, **near)
    model.control = OTHER
    torch.testing.assert_close(logits(), other, **EXACT)
    with model.disable_control():
        torch.testing.assert_close(logits(), uncontrolled, **EXACT)
    model.control = control
    torch.testing.assert_close(logits(), expected, **near)


@pytest.mark.parametrize(
    ("hook_point", "control"),
    [("decoder_layer", CONTROL), ("lm_head", PLAUSIBLE)],
    ids=["ascent", "plausibility"],
)
@traces_transformers
def test_generation_with_a_compiled_forward_and_a_static_cache(hook_point, control):
    torch._dynamo.reset()
    model, base, head = build(hook_point, control)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    ids = prompts()
    settings = [control, OTHER, None, control]
    expected = [reference_greedy(base, head, ids, control=x, max_new_tokens=3).tolist() for x in settings]
    assert expected[0] != expected[1] != expected[2] != expected[0]
    for setting, tokens in zip(settings, expected, strict=True):
        output = generate(
            model, ids, cache_implementation="static", max_new_tokens=3, control=False if setting is None else setting
        )
        assert output.tolist() == tokens


@traces_transformers
def test_compiled_advantage():
    torch._dynamo.reset()
    model, base, head = build("lm_head", ADVANTAGE)
    ids = prompts()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    expected = reference_logits(base, head, ids, control=ADVANTAGE)
    assert not torch.allclose(expected, reference_logits(base, head, ids), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(**full_inputs(model, ids), use_cache=False).logits, expected, **EXACT)


@traces_transformers
@every_hook_point
def test_compiled_with_a_step_size_for_each_row(hook_point):
    torch._dynamo.reset()
    control = replace(CONTROL, step_size=(0.2, 0.9))
    model, base, head = build(hook_point, control)
    ids = prompts()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for setting in (control, replace(CONTROL, step_size=(0.9, 0.2))):
        model.control = setting
        with torch.no_grad():
            logits = model(**full_inputs(model, ids), use_cache=False).logits
        torch.testing.assert_close(logits, reference_logits(base, head, ids, control=setting), **EXACT)


def test_a_run_away_edit_is_clamped_in_compiled_code_and_raises_elsewhere():
    """In float16, where the edit itself may be out of range though the clamped state is not."""
    torch._dynamo.reset()
    head = tiny_head(tiny_model("llama", torch.float32))
    control = ControlConfig(step_size=1e6, num_steps=3)
    model = ReControlForCausalLM.from_model(tiny_model("llama", torch.float16), head, control=control)
    with pytest.raises(FloatingPointError, match="step_size"):
        model(prompts())
    edited = torch.compile(
        lambda states: model._recontrol.settings.controller.edit(states, control, control.step_size), backend="eager"
    )(100 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).half())
    assert edited.isfinite().all()
    assert edited.abs().max() > 60000


@traces_transformers
@pytest.mark.slow
@every_hook_point
def test_generation_compiled_by_inductor(hook_point):
    torch._dynamo.reset()
    model, base, head = build(hook_point)
    model.forward = torch.compile(model.forward, fullgraph=True)
    ids = prompts()
    assert generate(model, ids, cache_implementation="static").tolist() == expect(base, head, ids).tolist()


# Streamers.


class NumberTokenizer:
    """Stands in for a tokenizer: a token's text is its number."""

    def decode(self, token_ids, **kwargs):
        return "".join(f"{int(token)} " for token in token_ids)


def test_text_streamer(capsys):
    model, base, head = build()
    ids = prompts(1)
    expected = expect(base, head, ids)
    generate(model, ids, streamer=TextStreamer(NumberTokenizer(), skip_prompt=True))
    assert list(map(int, capsys.readouterr().out.split())) == expected[0, ids.shape[1] :].tolist()


def test_iterator_streamers_in_threads_with_settings_of_their_own():
    model, base, head = build()
    ids = prompts(1)
    settings = [CONTROL, False, OTHER, None]
    streamers, threads = [], []
    for setting in settings:
        streamers.append(TextIteratorStreamer(NumberTokenizer(), skip_prompt=True, timeout=60))
        kwargs = {"streamer": streamers[-1], "control": setting}
        threads.append(threading.Thread(target=generate, args=(model, ids), kwargs=kwargs))
    for thread in threads:
        thread.start()
    streamed = [list(map(int, "".join(streamer).split())) for streamer in streamers]
    for thread in threads:
        thread.join()
    expected = [
        reference_greedy(base, head, ids, control=setting or None, max_new_tokens=NEW)[0, ids.shape[1] :].tolist()
        for setting in (CONTROL, False, OTHER, CONTROL)
    ]
    assert streamed == expected
    assert expected[0] != expected[1] != expected[2] != expected[0]


# What else changes the logits.


@every_hook_point
def test_guidance_is_refused_where_tokens_are_forbidden(hook_point):
    model, *_ = build(hook_point, PLAUSIBLE)
    with pytest.raises(ValueError, match=r"`plausibility` forbids tokens.*leave one of the two out"):
        generate(model, prompts(2), guidance_scale=1.7)
    generate(model, prompts(2), guidance_scale=1.0)


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, ADVANTAGE], ids=["ascent", "advantage"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [False, True])
def test_classifier_free_guidance(hook_point, control, use_cache, negative):
    if control.method == "advantage" and hook_point != "lm_head":
        pytest.skip("the advantage edit needs the LM head")
    model, base, head = build(hook_point, control)
    ids = prompts(2)
    scale = 1.7

    def run(setting):
        tokens = ids
        unconditional = prompts(2, 4, seed=9) if negative else ids[:, -1:]
        for _ in range(NEW):
            two = [
                reference_logits(base, head, x, control=setting)[:, -1].float().log_softmax(-1)
                for x in (tokens, unconditional)
            ]
            token = (scale * (two[0] - two[1]) + two[1]).argmax(-1)[:, None]
            tokens, unconditional = torch.cat([tokens, token], 1), torch.cat([unconditional, token], 1)
        return tokens

    expected = run(control)
    assert (expected != run(None)).any(dim=1).all()
    options = {"negative_prompt_ids": prompts(2, 4, seed=9)} if negative else {}
    assert generate(model, ids, guidance_scale=scale, use_cache=use_cache, **options).tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, LENIENT, CAPPED], ids=["ascent", "plausibility", "max_kl"])
def test_constrained_logits(hook_point, control):
    """Processors act on the controlled logits."""
    model, base, head = build(hook_point, control)
    ids = prompts(2)

    def expect(pick=None):
        expected, uncontrolled = (
            reference_generate(base, head, ids, control=setting, pick=pick, max_new_tokens=NEW)
            for setting in (control, None)
        )
        assert expected.tolist() != uncontrolled.tolist()
        return expected

    free = expect()
    banned = sorted(set(free[:, ids.shape[1] :].flatten().tolist()))[::2]

    def without_banned(_, logits):
        return logits.index_fill(1, torch.tensor(banned), -math.inf).argmax(-1)

    expected = expect(without_banned)
    assert expected.tolist() != free.tolist()
    assert generate(model, ids, suppress_tokens=banned).tolist() == expected.tolist()

    allowed = list(range(1, VOCAB, 2))

    def among_allowed(_, logits):
        mask = torch.full_like(logits, -math.inf).index_fill(1, torch.tensor(allowed), 0)
        return (logits + mask).argmax(-1)

    if not control.plausibility:
        expected = expect(among_allowed)
        output = generate(model, ids, prefix_allowed_tokens_fn=lambda batch, tokens: allowed)
        assert output.tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sampling", "beams"])
def test_constraints_that_leave_no_plausible_token_are_an_error(hook_point, mode):
    model, base, _ = build(hook_point, replace(CONTROL, plausibility=1.0))  # leaves the most likely token alone
    ids = prompts(2)
    banned = base(ids).logits[:, -1].argmax(-1).tolist()
    with pytest.raises(ValueError, match="no token to draw for row 0"):
        generate(model, ids, suppress_tokens=banned, **mode)
    assert generate(model, ids, suppress_tokens=banned, control=False).shape == (2, ids.shape[1] + NEW)


@pytest.mark.parametrize("seed", [7, 17])
def test_positions_behind_a_rejected_draft_need_no_plausible_token(seed):
    base = tiny_model("llama", dtype=torch.float32)
    model = ReControlForCausalLM.from_model(base, tiny_head(base, "lm_head"))
    ids = prompts(1, 12, seed=seed)
    ids = torch.cat([ids, ids[:, :6]], dim=1)  # something to look up
    # Where the base would end there is next to nothing else that is plausible, and it must not end.
    ends = {"eos_token_id": list(range(5, 45)), "pad_token_id": 0, "min_new_tokens": 10, "max_new_tokens": 10}
    asked = {"control": replace(ADVANTAGE, step_size=0.5, plausibility=0.6), "do_sample": False} | ends
    plain = model.generate(ids, **asked)
    assert model.generate(ids, **asked, prompt_lookup_num_tokens=4).tolist() == plain.tolist()


@pytest.mark.parametrize("control", [ADVANTAGE, replace(ADVANTAGE, max_kl=0.2)], ids=["advantage", "max_kl"])
def test_calls_of_the_lm_head_beside_the_model_s_forwards_are_the_base_s(control):
    """As loops make them that contrast layers (DoLa) or draft by the model's own LM head (MTP, DFlash)."""
    model, base, _ = build("lm_head", control)
    ids, seen = prompts(2), []

    def loop(model, input_ids, **kwargs):
        output = model(input_ids, output_hidden_states=True)
        early = output.hidden_states[1][:, -1]
        seen.append((model.lm_head(early), nn.functional.linear(early, model.lm_head.weight), output.logits))
        return input_ids

    model.generate(ids, custom_generate=loop, max_new_tokens=2)
    ((beside, expected, logits),) = seen
    assert torch.equal(beside, expected)
    torch.testing.assert_close(logits, model(ids).logits)
    assert not torch.allclose(logits, base(ids).logits)


def test_a_loop_that_never_runs_the_whole_model_is_controlled_at_the_lm_head():
    model, _, _ = build("lm_head", ADVANTAGE)
    ids, seen = prompts(2), []

    def loop(model, input_ids, **kwargs):
        seen.append(model.lm_head(model.model(input_ids)[0]))
        return input_ids

    model.generate(ids, custom_generate=loop, max_new_tokens=2)
    torch.testing.assert_close(seen[0], model(ids).logits)


def test_a_processor_sees_the_controlled_logits():
    model, base, head = build()
    ids = prompts(2)
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    tokens = generate(model, ids, logits_processor=LogitsProcessorList([Spy()]))
    expected = reference_logits(base, head, tokens[:, :-1], control=CONTROL)[:, ids.shape[1] - 1 :].float()
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 1])
def test_inputs_embeds(layer):
    model, base, head = build(layer=layer)
    ids, mask = padded_prompts()
    expected = expect(base, head, ids, mask)[:, ids.shape[1] :]
    embeds = base.get_input_embeddings()(ids).detach()
    output = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert output.tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("whole", [True, False], ids=["all_tokens", "new_tokens"])
def test_continuing_from_a_cache(hook_point, whole):
    """A second turn on the first one's cache: the last layer's edit is in no cache, so it is a turn like any other."""
    model, base, head = build(hook_point)
    first = generate(model, prompts(2), return_dict_in_generate=True, max_new_tokens=4)
    turn = torch.cat([first.sequences, prompts(2, 3, seed=8)], dim=1)
    expected = expect(base, head, turn)
    given = turn if whole else turn[:, first.past_key_values.get_seq_length() :]
    output = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(turn),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert output[:, -NEW:].tolist() == expected[:, -NEW:].tolist()


# Step sizes for each row.

STEPS = (0.1, 0.9)


def expect_rows(base, head, rows, control=CONTROL, steps=STEPS, **options):
    """Each prompt alone with its own step size, by the search of transformers over the reference's logits."""
    outputs = []
    for row, step in zip(rows, steps, strict=True):
        with reference_control(base, head, replace(control, step_size=step)):
            outputs.append(generate(base, row[None], use_cache=False, **options)[:, len(row) :])
    return torch.cat(outputs)


@every_hook_point
@pytest.mark.parametrize("plausibility", [0.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
    ],
    ids=["greedy", "beams", "beams_returned", "no_cache", "chunked"],
)
def test_step_sizes_for_each_row(hook_point, plausibility, options):
    control = replace(CONTROL, step_size=STEPS, plausibility=plausibility)
    model, base, head = build(hook_point, control)
    rows = [prompts(1, length, seed=length)[0] for length in (4, 7)]
    ids, mask = left_pad(rows)
    search = {key: value for key, value in options.items() if "num" in key}
    expected = expect_rows(base, head, rows, control, **search)
    swapped = expect_rows(base, head, rows, control, steps=STEPS[::-1], **search)
    assert expected.tolist() != swapped.tolist()
    assert generate(model, ids, mask, **options)[:, ids.shape[1] :].tolist() == expected.tolist()
    model.control = CONTROL
    output = generate(model, ids, mask, **options, control=replace(control, step_size=STEPS[::-1]))
    assert output[:, ids.shape[1] :].tolist() == swapped.tolist()


@every_hook_point
def test_step_sizes_for_each_row_with_samples(hook_point):
    control = replace(CONTROL, step_size=STEPS)
    model, base, head = build(hook_point, control)
    ids = prompts(2)
    expanded = ids.repeat_interleave(3, 0)

    def draw(_, logits):
        return torch.multinomial(logits.softmax(-1), num_samples=1)[:, 0]

    def run(steps):
        torch.manual_seed(0)
        setting = replace(control, step_size=steps)
        return reference_generate(base, head, expanded, control=setting, pick=draw, max_new_tokens=NEW)

    expected = run((0.1, 0.1, 0.1, 0.9, 0.9, 0.9))
    assert expected.tolist() != run((0.1, 0.9) * 3).tolist()
    torch.manual_seed(0)
    output = generate(model, ids, do_sample=True, top_k=0, num_return_sequences=3)
    assert output.tolist() == expected.tolist()


@every_hook_point
def test_step_sizes_for_each_row_from_embeddings(hook_point):
    control = replace(CONTROL, step_size=STEPS)
    model, base, head = build(hook_point, control)
    rows = list(prompts(2))
    embeds = base.get_input_embeddings()(torch.stack(rows)).detach()
    expected = expect_rows(base, head, rows, control, num_beams=2)
    output = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, num_beams=2)
    assert output.tolist() == expected.tolist()


@every_hook_point
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {}])
def test_a_wrong_count_of_step_sizes_raises(hook_point, count, options):
    """Also 3 and 6 for 2 prompts x 3 beams, which divide the expanded rows evenly."""
    model, base, head = build(hook_point)
    ids = prompts(2)
    with pytest.raises(ValueError, match="step_size"):
        generate(model, ids, control=replace(CONTROL, step_size=(0.1, 0.5, 0.9, 0.2, 0.4, 0.6)[:count]), **options)
    assert generate(model, ids).tolist() == expect(base, head, ids).tolist()


# Plain forwards.


def kinds_of_logits_to_keep():
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, [1, 4, 5]] = True
    mask[1, 6] = True
    return {
        "zero": 0,
        "one": 1,
        "three": 3,
        "index": torch.tensor([0, 3, 6]),
        "negative_index": torch.tensor([-1, -3]),
        "index_of_each_row": torch.tensor([[0, 5], [6, 2]]),
        "mask": mask,
    }


per_row = since("5.21", "its logits_to_keep cannot differ between the rows")


@every_hook_point
@pytest.mark.parametrize("plausibility", [0.0, 0.3])
@pytest.mark.parametrize("step_size", [0.5, STEPS], ids=["one_step_size", "step_sizes"])
@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(kind, marks=per_row if kind in ("index_of_each_row", "mask") else ())
        for kind in kinds_of_logits_to_keep()
    ],
)
def test_logits_to_keep(hook_point, plausibility, step_size, keep):
    control = replace(CONTROL, step_size=step_size, plausibility=plausibility)
    model, base, head = build(hook_point, control)
    ids, keep = prompts(), kinds_of_logits_to_keep()[keep]
    everywhere = reference_logits(base, head, ids, control=control)
    if isinstance(keep, int):
        expected = everywhere[:, -keep:]
    elif keep.ndim == 1:
        expected = everywhere[:, keep]
    elif keep.dtype == torch.bool:
        expected = everywhere[keep]
    else:
        expected = everywhere[torch.arange(2)[:, None], keep]
    with torch.no_grad():
        logits = model(**full_inputs(model, ids), logits_to_keep=keep).logits
        uncontrolled = base(**full_inputs(base, ids), logits_to_keep=keep).logits
        off = model(**full_inputs(model, ids), logits_to_keep=keep)
    assert logits.shape == uncontrolled.shape
    assert not torch.allclose(logits, uncontrolled, atol=1e-3)
    torch.testing.assert_close(logits, expected, **EXACT)
    torch.testing.assert_close(off.logits, expected, **EXACT)
    with torch.no_grad(), model.disable_control():
        assert torch.equal(model(**full_inputs(model, ids), logits_to_keep=keep).logits, uncontrolled)


@every_hook_point
@pytest.mark.parametrize("plausibility", [0.0, 0.3])
def test_only_the_last_hidden_state_shows_the_edit(hook_point, plausibility):
    model, base, _ = build(hook_point, replace(CONTROL, plausibility=plausibility))
    ids = prompts()
    with torch.no_grad():
        controlled = model(ids, output_hidden_states=True, output_attentions=False)
        plain = base(ids, output_hidden_states=True)
    assert not torch.equal(controlled.logits, plain.logits)
    assert len(controlled.hidden_states) == len(plain.hidden_states)
    *earlier, last = controlled.hidden_states
    *plain_earlier, plain_last = plain.hidden_states
    for a, b in zip(earlier, plain_earlier, strict=True):
        assert torch.equal(a, b)
    assert last.shape == plain_last.shape
    # At the LM head the edit comes after the last recorded state.
    assert torch.equal(last, plain_last) == (hook_point == "lm_head")
    if hook_point == "decoder_layer":
        logits = base.lm_head(last).masked_fill(torch.isinf(controlled.logits), -math.inf)
        torch.testing.assert_close(logits, controlled.logits, **EXACT)
    with torch.no_grad():
        as_tuple = model(ids, output_hidden_states=True, return_dict=False)
        chosen = [[m(ids, output_hidden_states=which).hidden_states for m in (model, base)] for which in (1, [0, 3])]
    assert all(map(torch.equal, next(part for part in as_tuple if isinstance(part, tuple)), controlled.hidden_states))
    for states, plain_states in chosen:
        # Older releases of transformers take no selection, and give all of them.
        given = [number for number, state in enumerate(plain_states) if state is not None]
        assert [number for number, state in enumerate(states) if state is not None] == given
        assert all(torch.equal(states[number], controlled.hidden_states[number]) for number in given)


@every_hook_point
@pytest.mark.parametrize("plausibility", [0.0, 0.3])
def test_tuples_instead_of_outputs(hook_point, plausibility):
    control = replace(CONTROL, plausibility=plausibility)
    model, base, head = build(hook_point, control)
    ids = prompts()
    expected = reference_logits(base, head, ids, control=control)
    assert not torch.allclose(expected, reference_logits(base, head, ids), atol=1e-3)
    with torch.no_grad():
        output = model(ids, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected, **EXACT)


@every_hook_point
@pytest.mark.parametrize("return_dict", [True, False])
def test_loss_and_gradients_take_the_edit_as_a_constant(hook_point, return_dict):
    model, base, head = build(hook_point)
    ids = prompts()
    output = model(input_ids=ids, labels=ids, return_dict=return_dict)
    loss, logits = (output.loss, output.logits) if return_dict else output[:2]
    loss.backward()
    with reference_control(base, head, CONTROL):
        reference = base(input_ids=ids, labels=ids)
    reference.loss.backward()
    torch.testing.assert_close(loss, reference.loss, **EXACT)
    torch.testing.assert_close(logits, reference.logits, **EXACT)
    gradients = {name: parameter.grad.clone() for name, parameter in base.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **EXACT)
    assert all(parameter.grad is None for parameter in model.value_head.parameters())

    base.zero_grad()
    plain = base(input_ids=ids, labels=ids)
    plain.loss.backward()
    assert abs(plain.loss.item() - loss.item()) > 1e-3
    # With control off the gradients are the base's.
    model.zero_grad()
    with model.disable_control():
        off = model(input_ids=ids, labels=ids)
    off.loss.backward()
    assert torch.equal(off.loss, plain.loss)
    for (_, a), (_, b) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@every_hook_point
def test_plausibility_with_labels_raises_and_leaves_the_model_usable(hook_point):
    model, base, head = build(hook_point, PLAUSIBLE)
    ids = prompts()
    with pytest.raises(ValueError, match="plausibility"):
        model(input_ids=ids, labels=ids)
    assert generate(model, ids).tolist() == expect(base, head, ids, control=PLAUSIBLE).tolist()


@every_hook_point
@pytest.mark.parametrize(
    "head_options", [{}, {"head_sizes": (24, 12)}, {"head_sizes": ()}], ids=["one_layer", "two_layers", "linear"]
)
def test_inference_mode(hook_point, head_options):
    """Also when it is the first call of all, which prepares the head's tensors."""
    model, base, head = build(hook_point, **head_options)
    ids = prompts()
    with torch.inference_mode():
        assert generate(model, ids).tolist() == expect(base, head, ids).tolist()
        logits = model(**full_inputs(model, ids)).logits
    torch.testing.assert_close(logits.clone(), reference_logits(base, head, ids, control=CONTROL), **EXACT)
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_head_climbed_by_autograd_in_inference_mode():
    class Head(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.config, self.head = head.config, head

        def forward(self, hidden):
            return self.head(hidden)

    base = tiny_model("llama")
    # Its coordinates are the state's own: the wrapper has no `state_scale`.
    head = tiny_head(base)
    head.state_scale.fill_(1.0)
    control = replace(CONTROL, step_size=2.0)
    model = ReControlForCausalLM.from_model(tiny_model("llama"), Head(copy.deepcopy(head)), control=control)
    ids = prompts()
    expected = expect(base, head, ids, control=control)
    assert generate(model, ids).tolist() == expected.tolist()
    with torch.inference_mode():
        assert generate(model, ids).tolist() == expected.tolist()


# A layer other than the last feeds the cache.


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prefill_chunk_size": 3}, {"guidance_scale": 1.5}],
    ids=["no_cache", "chunked", "guidance"],
)
def test_a_middle_layer_raises_where_its_edits_cannot_stay(options):
    model, base, head = build(layer=1)
    ids = prompts(1)
    with pytest.raises(ValueError, match="layer 1"):
        generate(model, ids, **options)
    with pytest.raises(ValueError, match="layer 1"):
        generate(model, ids, control=OTHER, **options)
    # Control that is off feeds no cache.
    plain = generate(base, ids, **options)
    assert generate(model, ids, control=False, **options).tolist() == plain.tolist()
    with model.disable_control():
        assert generate(model, ids, **options).tolist() == plain.tolist()
    assert generate(model, ids).tolist() == expect(base, head, ids).tolist()


def test_a_middle_layer_raises_without_a_cache_by_config():
    model, _, _ = build(layer=1)
    model.generation_config.use_cache = False
    with pytest.raises(ValueError, match="layer 1"):
        generate(model, prompts(1))


@pytest.mark.parametrize("controlled_target", [True, False])
def test_a_middle_layer_raises_as_a_draft(controlled_target, quiet_drafts):
    draft, _, _ = build(layer=1, seed=3)
    target = build()[0] if controlled_target else tiny_model("llama")
    ids = prompts(1)
    with pytest.raises(ValueError, match="layer 1"):
        generate(target, ids, assistant_model=draft)
    with draft.disable_control():
        assert generate(target, ids, assistant_model=draft).tolist() == generate(target, ids).tolist()


def test_a_middle_layer_raises_in_continuous_batching():
    model, base, head = build(layer=1)
    rows = batch_rows()[:2]
    with pytest.raises(ValueError, match="layer 1"):
        batched(model, rows)
    with pytest.raises(ValueError, match="layer 1"):
        model.generate(input_ids=prompts(2), cache_implementation="paged", max_new_tokens=NEW)
    assert batched(model, rows, control=False) == expect_batch(base, head, rows, None)


def test_a_middle_layer_refuses_plausibility():
    model, base, head = build(layer=1)
    with pytest.raises(ValueError, match="plausibility"):
        generate(model, prompts(1), control=PLAUSIBLE)
    with pytest.raises(ValueError, match="plausibility"):
        model.control = PLAUSIBLE
    assert generate(model, prompts(1)).tolist() == expect(base, head, prompts(1)).tolist()


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=["beams", "beams_returned"]
)
def test_a_middle_layer_with_beams(options):
    """The cache, with its edited positions, follows the beams."""
    model, base, head = build(layer=1)
    ids = prompts(2)
    with reference_control(base, head, CONTROL, start=ids.shape[1] - 1):
        expected = generate(base, ids, use_cache=False, **options)
    assert expected.tolist() != generate(base, ids, **options).tolist()
    assert generate(model, ids, **options).tolist() == expected.tolist()


def test_a_middle_layer_with_step_sizes_for_each_row():
    control = replace(CONTROL, step_size=STEPS)
    model, base, head = build(layer=1, control=control)
    ids = prompts(2)
    expected = expect(base, head, ids, control=control)
    assert expected.tolist() != reference_greedy(base, head, ids, control=CONTROL, max_new_tokens=NEW).tolist()
    assert generate(model, ids).tolist() == expected.tolist()


@traces_transformers
@pytest.mark.parametrize("control", [CONTROL, ADVANTAGE], ids=["ascent", "advantage"])
def test_generation_with_a_compiled_forward_follows_a_head_that_changed(control):
    """What was prepared before a call is what compiled code uses in it."""
    torch._dynamo.reset()
    model, base, _ = build("lm_head", control)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    ids, found = prompts(), []
    for _ in range(2):
        expected = reference_greedy(base, model.value_head, ids, control=control, max_new_tokens=3).tolist()
        assert generate(model, ids, cache_implementation="static", max_new_tokens=3).tolist() == expected
        found.append(expected)
        with torch.no_grad():
            for mlp in (model.value_head.value_mlp, model.value_head.advantage_mlp):
                mlp.layers[0].weight.neg_()
    assert found[0] != found[1]
