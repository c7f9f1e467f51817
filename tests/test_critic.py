"""A critic: what it reads, that it gives the advantage part better targets, and that nothing of it is in the head."""

import pickle
from dataclasses import replace

import pytest
import torch

from hf_recontrol import FitSettings, StatesSettings, ValueHead, ValueHeadConfig, fit
from hf_recontrol.collection.labels import label_rollouts
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.states import write_states
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import States, StateStore
from hf_recontrol.settings import ValueSettings
from hf_recontrol.training.advantage import fit_advantage
from hf_recontrol.training.critic import CriticStore, running_mean, train_critic
from hf_recontrol.training.value import train_value_head

from .tiny_models import layers_of, tiny_model
from .tiny_tokenizer import tiny_tokenizer

# With so few held-out responses training warns, rightly.
pytestmark = pytest.mark.usefixtures("recontrol_warnings")

WIDTH, CONTEXT = 6, 4
CONFIG = ValueHeadConfig(WIDTH, head_sizes=[32], hook_point="lm_head", advantage_sizes=[16], static_vector=True)
FAST = {"num_epochs": 25, "learning_rate": 3e-3, "train_batch_size": 32}


def hidden_from_the_head(count: int = 400, seed: int = 0) -> tuple[States, torch.Tensor]:
    """Episodes whose value so far stands in the context alone, and the vector that the directions' worth is of."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(-1, 1, WIDTH)
    lengths = torch.randint(3, 9, (count,), generator=generator)
    hidden, context, directions, rewards = [], [], [], []
    for length in lengths.tolist():
        steps = torch.randn(length, WIDTH, generator=generator)
        value = (steps @ slope).cumsum(0)
        directions.append(steps)
        hidden.append(torch.randn(length, WIDTH, generator=generator))
        so_far = torch.cat([torch.zeros(1), value[:-1]])
        context.append(torch.cat([so_far[:, None], torch.randn(length, CONTEXT - 1, generator=generator)], 1))
        rewards.append(value[-1:])
    states = States(
        hidden=torch.cat(hidden),
        lengths=lengths,
        rewards=torch.stack(rewards),
        prompts=torch.arange(count) // 2,
        directions=torch.cat(directions),
        context=torch.cat(context),
    )
    return states, slope


def test_the_running_mean_is_of_each_episode_alone():
    lengths = torch.tensor([3, 1, 2])
    flat = torch.randn(6, 5)
    parts = flat.split([3, 1, 2])
    expected = torch.stack([part[: i + 1].mean(0) for part in parts for i in range(len(part))])
    torch.testing.assert_close(running_mean(flat, lengths), expected)


def test_a_critic_s_store_adds_the_context_and_its_mean_and_goes_to_other_processes():
    states, _ = hidden_from_the_head(20)
    store = StateStore.of(states)
    for wide in (CriticStore(store), pickle.loads(pickle.dumps(CriticStore(store)))):
        chosen = torch.tensor([7, 0, 19])
        found = wide.gather("hidden", chosen)
        assert found.shape == (int(store.lengths[chosen].sum()), WIDTH + 2 * CONTEXT)
        assert wide.hidden_size == WIDTH + 2 * CONTEXT
        context = store.gather("context", chosen)
        assert torch.equal(found[:, :WIDTH], store.gather("hidden", chosen))
        assert torch.equal(found[:, WIDTH : WIDTH + CONTEXT], context)
        torch.testing.assert_close(found[:, WIDTH + CONTEXT :], running_mean(context, store.lengths[chosen]))
        assert torch.equal(wide.gather("directions", chosen), store.gather("directions", chosen))


def test_a_critic_gives_better_targets_where_it_sees_what_the_head_does_not():
    states, slope = hidden_from_the_head()
    head, own = train_value_head(states, CONFIG, td_lambda=1.0, **FAST)
    critic, figures = train_critic(StateStore.of(states), CONFIG, ValueSettings(td_lambda=1.0, **FAST))
    assert figures["value_error"] < 0.7 * own["value_error"]
    weak = fit_advantage(head, states, advantage_num_epochs=0)
    vector = head.static_vector.clone()
    strong = fit_advantage(head, states, critic=critic, advantage_num_epochs=0)
    similarity = [torch.cosine_similarity(x, slope, dim=0) for x in (vector, head.static_vector)]
    assert similarity[1] > 0.98 and similarity[1] > similarity[0]
    assert strong["constant_correlation"] > weak["constant_correlation"] + 0.1
    # In standardised units, as the reward is.
    torch.testing.assert_close(head.static_vector, slope / head.config.reward_std, rtol=0.3, atol=0.1)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def scored(tmp_path):
    """A function: a tiny model of a family, and a folder of its scored rollouts."""

    def make(family):
        model = tiny_model(family, dtype=torch.float32)
        model.generation_config.eos_token_id = 2
        prompts = load_prompts([f"w{i} w{i + 1} w{3 * i}" for i in range(5, 13)])
        options = {"num_samples": 2, "max_new_tokens": 6, "part_size": 10, "temperature": 2.0}
        write_rollouts(tmp_path / "rollouts", model, tiny_tokenizer(), prompts, **options)
        label_rollouts(tmp_path / "rollouts", [length])
        return model, tmp_path / "rollouts"

    return make


@pytest.mark.parametrize("family", ["llama", "bloom", "opt_projected", "mamba"])
@pytest.mark.parametrize("layer", [0, -2])
def test_the_context_is_what_the_layer_gave_where_each_token_was_drawn(family, layer, scored, tmp_path):
    model, folder = scored(family)
    counts = write_states(tmp_path / "states", model, folder, critic_layer=layer, batch_size=3)
    store, seen = StateStore.open(tmp_path / "states"), []
    handle = layers_of(model)[layer].register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    used = [rollout for rollout in load_rollouts(folder) if rollout.completion_ids]
    for number, rollout in enumerate(used):
        with torch.no_grad():
            model(torch.tensor([rollout.prompt_ids + rollout.completion_ids]))
        expected = seen.pop()[0, len(rollout.prompt_ids) - 1 : -1]
        found = store.gather("context", torch.tensor([number]))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    handle.remove()
    assert store.parts[0].context_layer == layer
    context = store.parts[0].context.shape[1]
    assert counts["bytes"] == 4 * counts["states"] * (2 * store.hidden_size + context)
    # What the head reads is as without a critic.
    write_states(tmp_path / "plain", model, folder, batch_size=3)
    plain, everything = StateStore.open(tmp_path / "plain"), torch.arange(len(store))
    assert not plain.has_context
    for name in ("hidden", "directions"):
        torch.testing.assert_close(store.gather(name, everything), plain.gather(name, everything))


def test_every_kth_state_and_int8_hold_for_the_context_too(scored, tmp_path):
    model, folder = scored("llama")
    everything = torch.arange(16)
    write_states(tmp_path / "all", model, folder, critic_layer=0)
    write_states(tmp_path / "few", model, folder, critic_layer=0, every=2, states_dtype="int8")
    full, few = (StateStore.open(tmp_path / name) for name in ("all", "few"))
    parts = full.gather("context", everything).split(full.lengths.tolist())
    expected = torch.cat([part[(len(part) - 1) % 2 :: 2] for part in parts])
    torch.testing.assert_close(few.gather("context", everything), expected, rtol=0.05, atol=0.03)


def variety(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


OPTIONS = {"num_samples": 2, "max_new_tokens": 8, "temperature": 1.5, "head_sizes": [16], "num_epochs": 3}
PROMPTS = [f"w{i} w{(7 * i) % 90 + 5}" for i in range(5, 45)]


def run(output, **changes):
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return fit(model, PROMPTS, variety, output, tokenizer=tiny_tokenizer(), quiet=True, **OPTIONS | changes)


def test_fit_with_a_critic_reports_it_and_leaves_nothing_of_it_in_the_head(tmp_path):
    plain, figures = run(tmp_path / "plain"), run(tmp_path / "critic", critic_layer=0)
    assert {"critic_value_error", "critic_value_error_last", "critic_correlation_last"} <= figures.keys()
    assert not any(name.startswith("critic") for name in plain)
    heads = [ValueHead.from_pretrained(tmp_path / name / "head") for name in ("plain", "critic")]
    assert heads[0].state_dict().keys() == heads[1].state_dict().keys()
    # V is the same; what g and the static vector learned is not.
    assert all(
        torch.equal(a, b)
        for a, b in zip(heads[0].value_mlp.parameters(), heads[1].value_mlp.parameters(), strict=True)
    )
    assert not torch.equal(heads[0].static_vector, heads[1].static_vector)
    assert "the critic" in (tmp_path / "critic" / "report.html").read_text(encoding="utf-8")
    assert "critic" in (tmp_path / "critic" / "head" / "README.md").read_text(encoding="utf-8")
    # Nothing is left to do, and nothing changes.
    before = (tmp_path / "critic" / "head" / "model.safetensors").read_bytes()
    assert run(tmp_path / "critic", critic_layer=0) == figures
    assert (tmp_path / "critic" / "head" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="critic_layer"):
        run(tmp_path / "plain", critic_layer=0)


def test_stored_states_can_be_trained_on_without_the_critic(tmp_path):
    plain = run(tmp_path / "plain")
    # Without states for a critic the setting says nothing.
    assert run(tmp_path / "plain", critic=False) == plain
    run(tmp_path / "off", critic_layer=0, critic=False)
    heads = [ValueHead.from_pretrained(tmp_path / name / "head") for name in ("plain", "off")]
    assert all(torch.equal(a, b) for a, b in zip(*(head.state_dict().values() for head in heads), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic_layer": 7}, "7"),
        ({"critic_layer": 0, "keep_states": True}, "keep_states"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_made(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "rollouts").exists()


def test_a_critic_needs_directions():
    for settings in ({"hook_point": "decoder_layer"}, {"directions": False}):
        with pytest.raises(ValueError, match="critic_layer"):
            StatesSettings(critic_layer=0, **settings)
    assert replace(FitSettings(), critic_layer=3).critic
