"""Figures do not depend on what was done to the model before: training mode, replaced modules, copies of heads."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_recontrol import (
    ControlConfig,
    ReControlForCausalLM,
    collect_states,
    generate_rollouts,
    kl_divergence,
    write_rollouts,
    write_states,
)
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.states import StateStore

from .conftest import make_llama
from .tiny_models import left_pad, prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer
from .versions import traces_transformers

STATIC = ControlConfig("static", 0.5)
TEXTS = ["w5 w6", "w7 w8 w9", "w10"]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def sampled(model, control=STATIC, **options):
    drawn = generate_rollouts(model, tiny_tokenizer(), TEXTS, control=control, max_new_tokens=6, **options)
    return [replace(rollout, reward=[1.0]) for rollout in drawn]


def controlled(family="llama", dtype=torch.float32, hook_point="lm_head", control=STATIC, **head):
    base = tiny_model(family, dtype)
    return ReControlForCausalLM.from_model(base, tiny_head(base, hook_point, **head), control)


def hidden(model, rollouts, hook_point="lm_head"):
    return collect_states(model, rollouts, hook_point=hook_point, directions=False).hidden


@pytest.mark.parametrize("hook_point", ["lm_head", "decoder_layer"])
def test_states_read_right_after_a_module_was_replaced_are_the_bases(hook_point, tmp_path):
    control = STATIC if hook_point == "lm_head" else ControlConfig(step_size=0.5, num_steps=5)
    model = controlled(hook_point=hook_point, control=control)
    rollouts = sampled(model, control)
    expected = hidden(model, rollouts, hook_point)
    if hook_point == "lm_head":
        model.resize_token_embeddings(model.config.vocab_size + 3)
    else:
        model.model.layers[-1] = copy.deepcopy(model.model.layers[-1])
    torch.testing.assert_close(hidden(model, rollouts, hook_point), expected)


def test_states_kept_right_after_a_module_was_replaced_are_the_bases(tmp_path):
    model = controlled()
    model.resize_token_embeddings(model.config.vocab_size + 3)
    places = {"hook_point": "lm_head", "directions": False}
    write_rollouts(
        tmp_path / "r",
        model,
        tiny_tokenizer(),
        load_prompts(TEXTS),
        control=STATIC,
        max_new_tokens=6,
        keep_states=True,
        **places,
    )
    label_rollouts(tmp_path / "r", {"length": length})
    write_states(tmp_path / "kept", model, tmp_path / "r", **places)
    for path in (tmp_path / "r").glob("kept_states/*"):
        path.unlink()
    write_states(tmp_path / "read", model, tmp_path / "r", **places)
    kept, read = (StateStore.open(tmp_path / name) for name in ("kept", "read"))
    for i in range(len(kept)):
        one = torch.tensor([i])
        torch.testing.assert_close(kept.gather("hidden", one), read.gather("hidden", one), rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_carried_over_to_a_quantised_module_acts_once():
    model = controlled()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    ids = torch.tensor([[5, 6, 7]])
    with quantised.disable_control():
        base = quantised(ids).logits
    shift = (quantised(ids).logits - base)[0, -1]
    expected = quantised.get_output_embeddings().forward(
        torch.stack([0.5 * model.value_head.static_vector, torch.zeros(16)])
    )
    expected = expected[0] - expected[1]
    assert float(shift @ expected / expected.square().sum()) == pytest.approx(1.0, abs=0.05)
    assert len(quantised.get_output_embeddings()._forward_pre_hooks) == 1


def test_dropout_is_off_whatever_mode_the_model_is_in():
    base = make_llama(attention_dropout=0.5, eos_token_id=2, vocab_size=97)
    model = ReControlForCausalLM.from_model(base, tiny_head(base, "lm_head"), STATIC)

    def everything():
        rollouts = sampled(model)
        ids = torch.tensor([rollouts[0].prompt_ids + rollouts[0].completion_ids])
        return (
            [r.completion_ids for r in rollouts],
            hidden(model, rollouts),
            model.values(ids),
            kl_divergence(model, rollouts),
        )

    expected = everything()
    model.train()
    found = everything()
    assert model.training and model.model.layers[0].training
    assert found[0] == expected[0] and found[3] == pytest.approx(expected[3])
    for a, b in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(a, b)


def test_equal_heads_of_a_mixture_keep_their_own_weights():
    model = controlled()
    model.add_value_head("b", copy.deepcopy(model.value_head))
    model.set_value_heads({"default": 1.0, "b": 2.0})
    rollouts = sampled(model)
    states = collect_states(model, rollouts, hook_point="lm_head")
    single = controlled(control=replace(STATIC, step_size=1.5))
    again = collect_states(single, sampled(single, single.control), hook_point="lm_head")
    torch.testing.assert_close(states.directions, again.directions, rtol=1e-4, atol=1e-4)
    assert kl_divergence(model, rollouts) > 0
    model.set_value_heads({"default": 100.0, "b": 2.0})
    with pytest.raises(ValueError, match="in force is"):
        kl_divergence(model, rollouts)


def test_no_positions_given_are_those_of_the_mask():
    model = controlled("gpt2")
    ids, mask = left_pad([prompts(1, 7)[0], prompts(1, 3, seed=2)[0]])
    torch.testing.assert_close(model.values(ids, mask, position_ids=None)[:, -3:], model.values(ids, mask)[:, -3:])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_batch_share_none(rope_type):
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "longrope":
        parameters |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}
    limit = 16 if rope_type == "dynamic" else 64
    base = make_llama(max_position_embeddings=limit, rope_parameters=parameters, eos_token_id=2, vocab_size=97)
    model = ReControlForCausalLM.from_model(base, tiny_head(base, "lm_head"), STATIC)
    short, long = prompts(1, 10)[0], prompts(1, 30, seed=2)[0]
    rollout = sampled(model, False)[0]
    rows = [replace(rollout, prompt_ids=ids.tolist()[:4], completion_ids=ids.tolist()[4:]) for ids in (short, long)]
    alone = hidden(model, rows[:1])
    torch.testing.assert_close(hidden(model, rows)[: len(alone)], alone)
    ids, mask = left_pad([short, long])
    with pytest.raises(ValueError, match="Row 0 is padded on the left"):
        model.values(ids, mask)


def test_a_layer_that_others_follow_is_not_read_under_control_without_logits_to_keep():
    model = controlled("xlstm", hook_point="decoder_layer", layer=0, control=ControlConfig(step_size=0.3, num_steps=5))
    rollouts = sampled(model, model.control)
    with pytest.raises(ValueError, match="takes no `logits_to_keep`"):
        hidden(model, rollouts, "decoder_layer")


def test_a_static_vector_of_another_shape_is_refused():
    class Mine(nn.Module):
        def __init__(self, config, vector):
            super().__init__()
            self.config, self.vector = config, vector
            self.register_buffer("static_vector", vector)

    model = controlled()
    config = model.value_head.config
    base = model.unload()
    for shape in ((1,), (2, 16), (16, 1)):
        with pytest.raises(ValueError, match="static_vector"):
            ReControlForCausalLM.from_model(base, Mine(config, torch.ones(shape)), STATIC)


def test_adapters_with_trainable_tokens_are_looked_at():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", torch.float32)
    rollouts = sampled(model, False)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]))
    with pytest.raises(ValueError, match="An adapter acts"):
        hidden(model, rollouts)


@pytest.mark.parametrize("layer", [-1, 2], ids=["last", "by number"])
def test_layers_that_are_taken_out_are_no_draft(layer):
    base = tiny_model("llama")
    head = tiny_head(base, "decoder_layer", layer)
    model = ReControlForCausalLM.from_model(base, head, ControlConfig(step_size=0.5, num_steps=4))
    ids = prompts(1, 5)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    if layer == 2:
        with pytest.raises(ValueError, match="reads decoder layer 2"):
            model(ids)
        return
    logits = model(ids).logits
    assert model.hook_point.layer == 1
    with model.disable_control():
        assert not torch.allclose(logits, model(ids).logits)


@pytest.mark.parametrize("layer", [-1, 1, 0], ids=["last", "middle", "first"])
def test_a_lowered_number_of_layers_is_never_control_that_is_silently_off(layer, monkeypatch):
    """Only transformers' own drafts of the first layers are the base's."""
    monkeypatch.setattr(logging.getLogger("transformers.generation.utils"), "disabled", True)
    base = tiny_model("llama")
    model = ReControlForCausalLM.from_model(
        base, tiny_head(base, "decoder_layer", layer), ControlConfig(step_size=0.5, num_steps=4)
    )
    ids, draft = prompts(1, 5), tiny_model("llama", seed=3)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected, count = model.generate(ids, **options), model.config.num_hidden_layers
    model.config.num_hidden_layers = 1
    with model.disable_control():
        plain = model(ids).logits
    assert model.generate(ids, control=False, **options).shape == expected.shape
    calls = [  # a head in the middle refuses to be a draft's
        lambda: model(ids),
        lambda: model.generate(ids, **options),
        lambda: model.generate(ids, assistant_model=draft, **options),
        lambda: model.generate(ids, assistant_early_exit=1, **options),
        lambda: draft.generate(ids, assistant_model=model, **options),
    ]
    for call in calls[: {-1: 5, 1: 3, 0: 1}[layer]]:
        if layer == 0:
            assert not torch.allclose(call().logits, plain)  # the hook point is among the layers that run
            continue
        with pytest.raises(RuntimeError, match="num_hidden_layers` is lower than when the head was put on"):
            call()
    if layer:
        with pytest.raises(RuntimeError, match="num_hidden_layers` is lower"):
            model.values(ids)
    model.config.num_hidden_layers = count
    assert torch.equal(model.generate(ids, **options), expected)
    if layer == -1:
        assert torch.equal(model.generate(ids, assistant_early_exit=1, **options), expected)


@traces_transformers
@pytest.mark.parametrize("how", ["forward", "module"])
@pytest.mark.parametrize("hook_point", ["lm_head", "decoder_layer"])
def test_values_of_a_model_that_is_compiled_whole(how, hook_point):
    torch._dynamo.reset()
    base = tiny_model("llama")
    model = ReControlForCausalLM.from_model(base, tiny_head(base, hook_point))
    ids = prompts(1, 5)
    expected = model.values(ids)
    if how == "forward":
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    else:
        model.compile(fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model.values(ids), expected)
        model(ids)
