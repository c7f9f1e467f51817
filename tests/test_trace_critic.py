"""What a trace says of a critic is what training made of the same tokens, or a word says why it says nothing."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM, Rollout, collect_states, fit, load_rollouts, trace
from hf_recontrol.data.processes import Processes
from hf_recontrol.data.states import States, StateStore
from hf_recontrol.evaluation.trace.page import trace_page
from hf_recontrol.heads.value_head import ValueHead
from hf_recontrol.training.critic import critic_values

from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

# With so few held-out responses training warns, rightly.
pytestmark = pytest.mark.usefixtures("recontrol_warnings")

DRAWN = {"max_new_tokens": 8, "temperature": 1.5, "seed": 3}
PROMPTS = [f"w{i} w{(7 * i) % 90 + 5}" for i in range(5, 45)]
CONTROL = ControlConfig("static", step_size=2.0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def variety(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


def evens(prompts, completions, **columns):
    """How many words end evenly; nothing of five words."""
    words = [text.split() for text in completions]
    return [None if len(each) == 5 else float(sum(word[-1] in "02468" for word in each)) for each in words]


def plain_model():
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: the folder of a run with these settings, made once."""
    runs = {}

    def run(rewards=(variety,), **changes) -> Path:
        key = (rewards, *changes.items())
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run")
            options = {"num_samples": 2, "head_sizes": [16], "num_epochs": 1, **DRAWN, **changes}
            fit(plain_model(), PROMPTS, list(rewards), runs[key], tokenizer=tiny_tokenizer(), quiet=True, **options)
            # So few responses teach it next to nothing: as it is nobody would see whether it reads the right numbers.
            folder = runs[key] / "head" / "training" / "critic"
            critic = ValueHead.from_pretrained(folder)
            [layer] = critic.value_mlp.layers
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
            critic.save_pretrained(folder)
        return runs[key]

    return run


def traced(folder, head="head", **kwargs):
    model = ReControlForCausalLM.from_model(plain_model(), folder / head, CONTROL)
    return trace(model, tiny_tokenizer(), PROMPTS[0], **{**DRAWN, **kwargs})


def said(response) -> torch.Tensor:
    return torch.tensor([token.critic for token in response.tokens])


def as_trained(folder, store) -> torch.Tensor:
    """What training makes of a store's first episode, in the reward's own units."""
    critic = ValueHead.from_pretrained(folder / "head" / "training" / "critic")
    return critic.rewards(critic_values(critic, store, Processes())[0])


@pytest.mark.parametrize(
    ("rewards", "changes"),
    [
        ((variety,), {}),
        ((variety,), {"critic_layer": 0}),
        ((variety,), {"prefix_every": 3}),
        ((evens, variety), {"prefix_every": 1, "critic_layer": -2}),
        ((variety,), {"temperature": 0.0, "num_samples": 1}),
    ],
    ids=["plain", "layer", "prefixes", "everything", "greedy"],
)
def test_values_are_those_that_training_made_of_the_same_tokens(rewards, changes, trained):
    folder = trained(rewards, **changes)
    # The first response of the run, drawn again.
    drawn = {name: changes[name] for name in ("temperature",) if name in changes}
    found = traced(folder, reward=[*rewards[::-1]], **drawn)
    ids = [token.drawn.id for token in found.base.tokens]
    (part, *_) = sorted((folder / "rollouts").glob("part-*"))
    assert load_rollouts(part)[0].completion_ids == ids and len(ids) > 4
    expected = as_trained(folder, StateStore.open(folder / "states"))
    torch.testing.assert_close(said(found.base), expected, **CLOSE)
    assert expected.std(0).min() > 0.1 and found.silent_critics == {}
    assert said(found.controlled).shape == (len(found.controlled.tokens), len(rewards))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


@pytest.mark.parametrize("layer", [None, 0])
def test_values_along_the_controlled_response_are_held_against_the_policy_of_training(layer, trained):
    folder = trained(critic_layer=layer) if layer is not None else trained()
    # Drawn at another temperature than the responses of training.
    found = traced(folder, temperature=0.7).controlled
    ids = [token.drawn.id for token in found.tokens]
    prompt_ids = tiny_tokenizer()(PROMPTS[0])["input_ids"]
    rollout = Rollout(PROMPTS[0], found.text, prompt_ids, ids, found.finished, [0.0], DRAWN["temperature"])
    states = collect_states(plain_model(), [rollout])
    if layer is not None:
        states.context = collect_states(plain_model(), [rollout], hook_point="decoder_layer", layer=layer).hidden
    assert isinstance(states, States) and len(ids) > 2
    torch.testing.assert_close(said(found), as_trained(folder, StateStore.of(states)), **CLOSE)


def test_what_a_critic_is_not_told_is_said(trained):
    folder = trained(prefix_every=3)
    for reward in (None, evens):
        found = traced(folder, reward=reward)
        assert (
            "ask for the rewards" in found.silent_critics["default"] and "variety" in found.silent_critics["default"]
        )
        assert all(token.critic == [] for token in [*found.base.tokens, *found.controlled.tokens])
        assert "<dt>Critic</dt><dd>not shown: it also reads" in trace_page(found)

    def broken(prompts, completions, **columns):
        return [None for _ in completions]

    broken.__name__ = "variety"
    assert "gave no number" in traced(folder, reward=broken).silent_critics["default"]
    assert "one state in 2" in traced(trained(every=2)).silent_critics["default"]


def test_a_critic_that_cannot_be_used_costs_no_trace(trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_recontrol"), "propagate", True)
    shutil.copytree(trained() / "head", tmp_path / "head")
    critic = tmp_path / "head" / "training" / "critic"
    known = json.loads((critic / "training.json").read_text())

    def silence(text: str) -> str:
        (critic / "training.json").write_text(text)
        found = traced(tmp_path)
        assert all(token.critic == [] for token in found.controlled.tokens)
        return found.silent_critics["default"]

    assert "did not note what it reads" in silence(json.dumps(known | {"reads": None}))
    for odd in ({"every": "x"}, {"critic_layer": 0.5}, {"prefix_means": [[None]], "prefix_every": 2}):
        assert silence(json.dumps(known | {"reads": known["reads"] | odd})) == "its files cannot be used"

    def out_of_memory(*arguments):
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr("hf_recontrol.evaluation.trace.critics.critic_inputs", out_of_memory)
        assert silence(json.dumps(known)) == "no memory left"
    assert silence("[]") == silence("not json") == "its files cannot be used"
    assert str(critic) in caplog.text
    assert "lay" in silence(json.dumps(known | {"reads": known["reads"] | {"critic_layer": 99}}))
    assert "numbers of a state" in silence(json.dumps(known | {"reads": known["reads"] | {"critic_layer": 0}}))


def test_a_head_that_was_trained_under_control_has_none(trained, tmp_path):
    shutil.copytree(trained() / "head", tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    config["training"]["control"] = {"control": CONTROL.to_dict(), "heads": {}, "sources": {}}
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    assert "under control" in traced(tmp_path).silent_critics["default"]


def test_without_a_critic_a_trace_is_as_it_was(trained, tmp_path):
    whole = traced(trained())
    model = ReControlForCausalLM.from_model(plain_model(), trained() / "head", CONTROL)
    model.save_pretrained(tmp_path / "head")
    found = traced(tmp_path)
    assert found.silent_critics == {} and all(token.critic == [] for token in found.base.tokens)
    assert [token.kl for token in found.base.tokens] == [token.kl for token in whole.base.tokens]
    assert "<dt>Critic</dt>" not in trace_page(found)


def test_of_several_heads_each_has_its_own(trained):
    model = ReControlForCausalLM.from_model(plain_model(), trained() / "head", CONTROL)
    model.add_value_head("other", tiny_head(plain_model(), "lm_head", num_objectives=2))
    found = trace(model, tiny_tokenizer(), PROMPTS[0], value_heads={"other": 0.1, "default": 1.0}, **DRAWN)
    alone = said(traced(trained()).base)
    assert len(found.objectives) == 3 and all(len(token.critic) == 3 for token in found.base.tokens)
    first = found.objectives.index("default: variety")
    assert [token.critic[first] for token in found.base.tokens] == pytest.approx(alone[:, 0].tolist())
    assert all(token.critic.count(None) == 2 for token in found.base.tokens)
