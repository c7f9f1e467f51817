"""The invariants of control over families of models: equal to a naive reference, and the base wherever it is off."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Gemma3nTextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig

from .reference import full_inputs, reference_edit, reference_greedy, reference_logits
from .tiny_models import FAMILIES, layers_of, left_pad, lm_head_of, prompts, states_at, tiny_head, tiny_model

ASCENT = ControlConfig(step_size=0.5, num_steps=5, l2=0.1)
ADVANTAGE = ControlConfig(method="advantage", step_size=0.5)
STATIC = ControlConfig(method="static", step_size=0.5)
HOOK_POINTS = ["decoder_layer", "lm_head"]
NEW = 6
# Logits of generate are float32; state-space models compute their scans in float32 whatever their weights are.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# In float64 these give NaN in the base itself wherever a batch is padded.
NAN_WHEN_PADDED = ("gemma2", "bloom", "mpt")

every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_hook_point = pytest.mark.parametrize("hook_point", HOOK_POINTS)


def build(family, hook_point="decoder_layer", control=ASCENT, dtype=torch.float64, layer=-1, **head_options):
    """A controlled model, a plain copy of its base, and a copy of its head."""
    base = tiny_model(family, dtype)
    head = tiny_head(base, hook_point, layer, **head_options)
    model = ReControlForCausalLM.from_model(tiny_model(family, dtype), copy.deepcopy(head), control=control)
    return model, base, head


def generate(model, ids, mask=None, **kwargs):
    """Greedy generation: new tokens `(batch, new)` and their float32 logits `(batch, new, vocab)`."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=kwargs.pop("max_new_tokens", NEW),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def forward(model, ids, **kwargs):
    with torch.no_grad():
        return model(**full_inputs(model, ids), **kwargs).logits


@every_family
@every_hook_point
def test_control_that_is_off_is_the_base_bit_for_bit(family, hook_point):
    model, base, _ = build(family, hook_point)
    ids = prompts()
    expected, (tokens, logits) = forward(base, ids), generate(base, ids)
    assert not torch.equal(forward(model, ids), expected)
    assert not torch.equal(generate(model, ids)[1], logits)

    def check(**kwargs):
        assert torch.equal(forward(model, ids), expected)
        generated = generate(model, ids, **kwargs)
        assert torch.equal(generated[0], tokens)
        assert torch.equal(generated[1], logits)

    with model.disable_control():
        check()
    assert torch.equal(generate(model, ids, control=False)[1], logits)
    at_zero = [replace(ASCENT, num_steps=0), replace(ASCENT, step_size=0.0), replace(ASCENT, step_size=(0.0, 0.0))]
    if hook_point == "lm_head":
        at_zero += [replace(control, step_size=0.0) for control in (ADVANTAGE, STATIC)]
        at_zero += [replace(control, max_kl=0.0, plausibility=0.3) for control in (ADVANTAGE, STATIC)]
    for off in at_zero:
        assert torch.equal(generate(model, ids, control=off)[1], logits)
        model.control = off
        check()
    model.control = ASCENT
    assert not torch.equal(forward(model, ids), expected)
    assert model.unload() is model
    assert type(model) is type(base)
    check()


@every_family
@every_hook_point
def test_forward_and_generation_equal_the_reference(family, hook_point):
    """Teacher-forced logits, cached tokens and their logits: all those of the naive reference."""
    model, base, head = build(family, hook_point)
    ids = prompts()
    sequences = reference_greedy(base, head, ids, control=ASCENT, max_new_tokens=NEW)
    uncontrolled = reference_greedy(base, head, ids, max_new_tokens=NEW)
    assert (sequences != uncontrolled).any(dim=1).all()

    expected = reference_logits(base, head, sequences[:, :-1], control=ASCENT)
    teacher_forced = forward(model, sequences[:, :-1], use_cache=False)
    torch.testing.assert_close(teacher_forced, expected, **(EXACT if expected.dtype == torch.float64 else FLOAT32))

    tokens, logits = generate(model, ids)
    assert tokens.tolist() == sequences[:, -NEW:].tolist()
    torch.testing.assert_close(logits, expected[:, -NEW:].float(), **FLOAT32)

    uncached, _ = generate(model, ids, use_cache=False)
    assert uncached.tolist() == tokens.tolist()


@every_family
@every_hook_point
def test_left_padded_batch_equals_single_rows(family, hook_point):
    if family == "xlstm":
        pytest.skip("the base itself ignores the attention mask")
    model, base, head = build(family, hook_point, dtype=torch.float32 if family in NAN_WHEN_PADDED else torch.float64)
    rows = [prompts(1, length, seed=length)[0] for length in (4, 7, 6)]
    ids, mask = left_pad(rows)
    tokens, _ = generate(model, ids, mask)
    for row, row_tokens in zip(rows, tokens, strict=True):
        expected = reference_greedy(base, head, row[None], control=ASCENT, max_new_tokens=NEW)[0, len(row) :]
        assert row_tokens.tolist() == expected.tolist()
        assert generate(model, row[None])[0][0].tolist() == expected.tolist()
    assert tokens.tolist() != generate(model, ids, mask, control=False)[0].tolist()


@pytest.mark.parametrize("family", NAN_WHEN_PADDED)
@every_hook_point
def test_states_that_are_nan_in_the_base_raise_in_generate(family, hook_point):
    model, base, _ = build(family, hook_point)
    ids, mask = left_pad([prompts(1, length, seed=length)[0] for length in (4, 7)])
    assert generate(base, ids, mask)[1].isnan().any()
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(model, ids, mask)
    # It is the batch that cannot be controlled, not the model.
    assert generate(model, prompts())[1].isfinite().all()


@every_family
def test_advantage_equals_the_reference(family):
    model, base, head = build(family, "lm_head", ADVANTAGE)
    ids = prompts()
    sequences = reference_greedy(base, head, ids, control=ADVANTAGE, max_new_tokens=NEW)
    assert (sequences != reference_greedy(base, head, ids, max_new_tokens=NEW)).any(dim=1).all()
    tokens, logits = generate(model, ids)
    assert tokens.tolist() == sequences[:, -NEW:].tolist()
    expected = reference_logits(base, head, sequences[:, :-1], control=ADVANTAGE)
    torch.testing.assert_close(logits, expected[:, -NEW:].float(), **FLOAT32)
    torch.testing.assert_close(forward(model, sequences[:, :-1], use_cache=False), expected, **FLOAT32)


def test_advantage_and_static_need_the_lm_head():
    base = tiny_model("llama")
    head = tiny_head(base, "decoder_layer")
    with pytest.raises(ValueError, match="advantage"):
        ReControlForCausalLM.from_model(base, head, control=ADVANTAGE)
    with pytest.raises(ValueError, match="static vector"):
        ReControlForCausalLM.from_model(base, head, control=STATIC)
    assert type(base) is type(tiny_model("llama"))


@every_family
@pytest.mark.parametrize(
    ("hook_point", "control"),
    [("decoder_layer", ASCENT), ("lm_head", ASCENT), ("lm_head", ADVANTAGE)],
    ids=["decoder_layer", "lm_head", "advantage"],
)
def test_plausibility_equals_two_forwards(family, hook_point, control):
    """Tokens implausible under the base are masked, with base and controlled logits from one pass."""
    control = replace(control, plausibility=0.3)
    model, base, head = build(family, hook_point, control)
    ids = prompts()
    expected = reference_logits(base, head, ids, control=control)
    assert torch.isinf(expected).any()
    logits = forward(model, ids, use_cache=False)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, **FLOAT32)

    sequences = reference_greedy(base, head, ids, control=control, max_new_tokens=NEW)
    assert generate(model, ids)[0].tolist() == sequences[:, -NEW:].tolist()
    steps = reference_logits(base, head, sequences[:, :-1], control=control)[:, -NEW:]
    found = generate(model, ids)[1]
    assert torch.equal(found.isinf(), steps.isinf()) and steps.isinf().any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "opt_projected"])
@pytest.mark.parametrize("layer", [0, 1, -3, -2])
def test_middle_layer_edits_the_last_prompt_position_and_all_later_ones(family, layer):
    padded = family not in NAN_WHEN_PADDED
    model, base, head = build(family, layer=layer)
    ids, mask = left_pad([prompts(1, length, seed=length)[0] for length in (4 if padded else 7, 7)])
    sequences = reference_greedy(base, head, ids, mask, control=ASCENT, max_new_tokens=NEW)
    assert (sequences != reference_greedy(base, head, ids, mask, max_new_tokens=NEW)).any()
    tokens, logits = generate(model, ids, mask)
    assert tokens.tolist() == sequences[:, -NEW:].tolist()
    mask = torch.cat([mask, torch.ones(2, NEW - 1, dtype=mask.dtype)], dim=1)
    expected = reference_logits(base, head, sequences[:, :-1], mask, ASCENT, start=ids.shape[1] - 1)[:, -NEW:]
    torch.testing.assert_close(logits, expected.float(), **FLOAT32)
    # A plain forward edits the positions whose logits are kept, so it gives the same logits for the same positions.
    with torch.no_grad():
        kept = model(**full_inputs(model, sequences[:, :-1], mask), logits_to_keep=NEW, use_cache=False).logits
    torch.testing.assert_close(kept, expected, **EXACT)


@pytest.mark.parametrize("layer", [0, -2])
@pytest.mark.parametrize("family", ["llama", "xlstm"])
def test_middle_layer_of_a_single_row(family, layer):
    """Also where the base knows no `logits_to_keep` (xLSTM), generation leaves the earlier prompt positions alone."""
    model, base, head = build(family, layer=layer)
    ids = prompts(1)
    expected = reference_greedy(base, head, ids, control=ASCENT, max_new_tokens=NEW)
    assert expected.tolist() != reference_greedy(base, head, ids, max_new_tokens=NEW).tolist()
    tokens, logits = generate(model, ids)
    assert tokens.tolist() == expected[:, -NEW:].tolist()
    expected = reference_logits(base, head, expected[:, :-1], control=ASCENT, start=ids.shape[1] - 1)[:, -NEW:]
    torch.testing.assert_close(logits, expected.float(), **FLOAT32)


@pytest.mark.parametrize("layer", [2, -1])
def test_the_last_layer_by_either_index(layer):
    model, base, head = build("llama", layer=layer)
    ids = prompts()
    expected = reference_logits(base, head, ids, control=ASCENT)
    torch.testing.assert_close(forward(model, ids), expected, **EXACT)
    # The last layer feeds no cache, so every mode is allowed.
    assert generate(model, ids, use_cache=False)[0].tolist() == generate(model, ids)[0].tolist()


@pytest.mark.parametrize(
    "head_options",
    [
        {"head_sizes": ()},
        {"head_sizes": (24, 12), "activation": "silu"},
        {"head_sizes": (64,), "activation": "relu", "num_objectives": 3},
        {"head_sizes": (24, 16, 8), "activation": "relu"},
        {"head_sizes": (24,), "activation": "gelu"},
        {"head_sizes": (24,), "activation": "tanh"},
    ],
    ids=["linear", "two_silu", "three_objectives", "three_relu", "gelu", "tanh"],
)
@every_hook_point
def test_every_kind_of_head_equals_the_reference(hook_point, head_options):
    model, base, head = build("llama", hook_point, **head_options)
    ids = prompts()
    expected = reference_logits(base, head, ids, control=ASCENT)
    assert not torch.allclose(expected, forward(base, ids), atol=1e-2)
    torch.testing.assert_close(forward(model, ids, use_cache=False), expected, **EXACT)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "falcon", "opt_projected"])
@every_hook_point
def test_float32_equals_the_reference(family, hook_point):
    model, base, head = build(family, hook_point, dtype=torch.float32)
    ids = prompts()
    sequences = reference_greedy(base, head, ids, control=ASCENT, max_new_tokens=NEW)
    tokens, logits = generate(model, ids)
    assert tokens.tolist() == sequences[:, -NEW:].tolist()
    assert tokens.tolist() != generate(model, ids, control=False)[0].tolist()
    expected = reference_logits(base, head, sequences[:, :-1], control=ASCENT)
    assert forward(model, ids).dtype == torch.float32
    torch.testing.assert_close(logits, expected[:, -NEW:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_hook_point
def test_half_precision_base_is_edited_in_float32(family, dtype, hook_point):
    """Many small steps: in the base's own precision each would be lost to rounding."""
    control = ControlConfig(step_size=0.01, num_steps=100)
    base = tiny_model(family, dtype)
    head = tiny_head(tiny_model(family, torch.float32), hook_point)
    model = ReControlForCausalLM.from_model(tiny_model(family, dtype), head, control=control)
    ids = prompts()
    before = states_at(base, hook_point, ids=ids)
    seen = []
    if hook_point == "lm_head":
        handle = lm_head_of(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = layers_of(model)[-1].register_forward_hook(
            lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    with handle:
        logits = forward(model, ids)
    assert logits.dtype == seen[0].dtype == dtype
    expected = (before.float() + reference_edit(head, before, control, torch.float32)).to(dtype)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(seen[0], expected, rtol=ulp, atol=ulp * 1e-2 * expected.abs().max().item())
    coarse = before + reference_edit(head, before, control, dtype)
    assert (coarse - expected).abs().max() > 4 * (seen[0] - expected).abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_hook_point
def test_saved_and_loaded_gives_the_same_tokens(family, hook_point, tmp_path):
    model, base, head = build(family, hook_point)
    ids = prompts()
    expected = generate(model, ids)[0]
    assert expected.tolist() != generate(model, ids, control=False)[0].tolist()
    base.save_pretrained(tmp_path / "base")
    head.save_pretrained(tmp_path / "head")
    two = ReControlForCausalLM.from_pretrained(
        tmp_path / "base", value_head=tmp_path / "head", control=ASCENT, dtype=torch.float64
    )
    assert generate(two, ids)[0].tolist() == expected.tolist()

    # What the controlled model saves knows its base and its control.
    two.save_pretrained(tmp_path / "controlled")
    one = ReControlForCausalLM.from_pretrained(tmp_path / "controlled", dtype=torch.float64)
    assert one.control == ASCENT
    assert generate(one, ids)[0].tolist() == expected.tolist()


def _head(hidden_size=16, **kwargs):
    head = ValueHead(ValueHeadConfig(hidden_size=hidden_size, head_sizes=[8], **kwargs))
    return head.double()


def _t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def _bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=97,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
    )


def _bert_config():
    return BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def _blip_2():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, qformer = sizes | {"image_size": 8, "patch_size": 4}, sizes | {"encoder_hidden_size": 16}
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 97, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    return Blip2ForConditionalGeneration(Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text))


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_t5, "encoder-decoder"),
        (_bart, "encoder-decoder"),
        (lambda: BertModel(_bert_config()), "LM head"),
        (lambda: BertForMaskedLM(_bert_config()), "cannot generate"),
        (lambda: AutoModel.from_config(tiny_model("llama").config), "LM head"),
        (_blip_2, "control `model.language_model`"),
    ],
    ids=["t5", "bart", "bert", "masked_lm", "no_head", "blip_2"],
)
def test_what_cannot_be_controlled_raises_and_stays_as_it_was(make, message, hook_point):
    model = make()
    attributes, kind = set(vars(model)), type(model)
    with pytest.raises(ValueError, match=message):
        ReControlForCausalLM.from_model(model, _head(hook_point=hook_point))
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("llama", _head(24), "width 24"),
        ("llama", _head(24, hook_point="lm_head"), "width 24"),
        ("opt_projected", _head(16, hook_point="lm_head"), "has 12"),
        ("opt_projected", _head(12), "has 16"),
        ("llama", _head(layer=3), "layer 3"),
        ("llama", _head(layer=-4), "layer -4"),
        ("gpt2", _head(layer=100), "layer 100"),
    ],
)
def test_a_head_that_does_not_fit_raises_and_changes_nothing(family, head, message):
    model = tiny_model(family)
    kind = type(model)
    with pytest.raises(ValueError, match=message):
        ReControlForCausalLM.from_model(model, head)
    assert type(model) is kind
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())


def test_from_pretrained_refuses_an_encoder_decoder(tmp_path):
    _t5().save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        ReControlForCausalLM.from_pretrained(tmp_path, value_head=_head())
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


def test_llava_is_controlled_in_its_language_half():
    """The decoder's layers are found there, not in the vision tower."""
    model, base, head = build("llava")
    assert base.config.vision_config.num_hidden_layers != len(layers_of(base))
    ids = prompts()
    expected = reference_logits(base, head, ids, control=ASCENT)
    torch.testing.assert_close(forward(model, ids), expected, **EXACT)
    controlled = model.unload()
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in controlled.modules())


def test_layers_whose_output_is_no_sequence_of_states_are_named():
    """Gemma 3n's hold several versions of each state."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma3nTextConfig(
        **sizes,
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=4,
        num_key_value_heads=1,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=None,
    )
    model = ReControlForCausalLM.from_model(AutoModelForCausalLM.from_config(config), _head(16).float())
    for read in (model.values, model):
        with pytest.raises(ValueError, match="cannot be controlled there"):
            read(prompts(2, 5))
