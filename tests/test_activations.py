"""Rollouts to states."""

from dataclasses import replace

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHeadConfig
from hf_recontrol.activations import States, collect_states
from hf_recontrol.rollouts import Rollout

from .conftest import make_head
from .tiny_models import layers_of, lm_head_of, tiny_model

PLACES = [("lm_head", -1), ("decoder_layer", -1), ("decoder_layer", 0)]


def some_rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, (prompt, response) in enumerate([(3, 5), (1, 1), (6, 2), (2, 0), (4, 7)]):
        ids = torch.randint(3, 97, (prompt + response,), generator=generator).tolist()
        rows.append(Rollout(f"w{i % 4}", "", ids[:prompt], ids[prompt:], False, [float(i)]))
    return rows


def one_by_one(model, rollout, hook_point, layer):
    """State t is the one that token t was drawn from, and the base's logits there, without any batch."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    seen = []
    if hook_point == "lm_head":
        handle = lm_head_of(model).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        handle = layers_of(model)[layer].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        logits = model(ids).logits[0]
    handle.remove()
    part = slice(len(rollout.prompt_ids) - 1, -1)
    return seen[0][0, part], logits[part]


@pytest.mark.parametrize(("hook_point", "layer"), PLACES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba"])
def test_states_are_those_each_token_was_drawn_from(family, hook_point, layer):
    model, rows = tiny_model(family, dtype=torch.float32), some_rollouts()
    config = ValueHeadConfig(16, hook_point=hook_point, layer=layer)
    states = collect_states(model, rows, config, batch_size=2)
    used = [row for row in rows if row.completion_ids]
    assert states.lengths.tolist() == [len(row.completion_ids) for row in used]
    assert states.rewards.tolist() == [row.reward for row in used]
    expected = torch.cat([one_by_one(model, row, hook_point, layer)[0] for row in used])
    torch.testing.assert_close(states.hidden, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_directions_are_the_drawn_row_less_its_mean_under_the_base(temperature):
    model, rows = tiny_model("llama", dtype=torch.float32), some_rollouts()
    config = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])
    rows = [replace(row, temperature=temperature) for row in rows]
    states = collect_states(model, rows, config, batch_size=3)
    expected = []
    weight = lm_head_of(model).weight.detach()
    for row in (row for row in rows if row.completion_ids):
        _, logits = one_by_one(model, row, "lm_head", -1)
        policy = torch.softmax(logits / temperature, -1)
        expected.append(weight[row.completion_ids] - policy @ weight)
    torch.testing.assert_close(states.directions, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_prompts_are_numbered_by_what_they_say():
    states = collect_states(tiny_model("llama", dtype=torch.float32), some_rollouts(), ValueHeadConfig(16))
    # The fifth rollout has the first one's prompt, the fourth has no token.
    assert states.prompts.tolist() == [0, 1, 2, 0]


def test_a_controlled_model_is_read_with_its_control_off():
    model = tiny_model("llama", dtype=torch.float32)
    config = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])
    expected = collect_states(model, some_rollouts(), config)
    controlled = ReControlForCausalLM.from_model(model, make_head(hidden_size=16), ControlConfig(step_size=9.0))
    states = collect_states(controlled, some_rollouts(), config)
    assert torch.equal(states.hidden, expected.hidden) and torch.equal(states.directions, expected.directions)


def test_files_round_trip_and_foreign_files_are_refused(tmp_path):
    states = collect_states(tiny_model("llama", dtype=torch.float32), some_rollouts(), ValueHeadConfig(16, layer=0))
    states.save(tmp_path / "deeper" / "states.safetensors")
    loaded = States.load(tmp_path / "deeper" / "states.safetensors")
    assert (loaded.hook_point, loaded.layer, loaded.directions) == ("decoder_layer", 0, None)
    for name in ("hidden", "lengths", "rewards", "prompts"):
        assert torch.equal(getattr(loaded, name), getattr(states, name))
    make_head().save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="does not hold states"):
        States.load(tmp_path / "head" / "model.safetensors")
    with pytest.raises(OSError, match="is no file"):
        States.load(tmp_path / "absent")


def test_unscored_and_empty_rollouts_are_errors():
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ValueError, match="no reward"):
        collect_states(model, [Rollout("w5", "", [5], [6], False)], ValueHeadConfig(16))
    with pytest.raises(ValueError, match="nothing to learn from"):
        collect_states(model, [Rollout("w5", "", [5], [], False, [1.0])], ValueHeadConfig(16))


def test_an_lm_head_whose_rows_cannot_be_read_is_an_error():
    model = tiny_model("llama", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight is torch\.int8"):
        collect_states(model, some_rollouts(), ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[]))


def test_rollouts_of_another_vocabulary_are_an_error():
    rows = [Rollout("w5", "", [5, 400], [6], False, [1.0])]
    with pytest.raises(ValueError, match="vocabulary of 97"):
        collect_states(tiny_model("llama", dtype=torch.float32), rows, ValueHeadConfig(16))
