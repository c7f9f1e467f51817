"""A critic: what it reads, that it gives the advantage part better targets, and that nothing of it is in the head."""

import pickle
from dataclasses import replace

import pytest
import torch

from hf_recontrol import FitSettings, StatesSettings, ValueHead, ValueHeadConfig, fit
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.collection.states import write_states
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import States, StateStore
from hf_recontrol.settings import ValueSettings
from hf_recontrol.training.advantage import fit_advantage
from hf_recontrol.training.critic import CriticStore, train_critic
from hf_recontrol.training.held_out import split_by_prompt
from hf_recontrol.training.targets import running_mean, sum_before
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


def test_means_and_sums_over_the_response_so_far_are_of_each_episode_alone():
    lengths = torch.tensor([3, 1, 2])
    flat = torch.randn(6, 5)
    parts = flat.split([3, 1, 2])
    means = torch.stack([part[: i + 1].mean(0) for part in parts for i in range(len(part))])
    torch.testing.assert_close(running_mean(flat, lengths), means)
    sums = torch.stack([part[:i].sum(0) for part in parts for i in range(len(part))])
    torch.testing.assert_close(sum_before(flat, lengths), sums)


def test_what_a_critic_reads_goes_to_other_processes_too():
    states, _ = hidden_from_the_head(20)
    states.prefix_rewards = torch.randn(len(states.hidden), 1)
    states.prefix_rewards[::2] = torch.nan
    store = StateStore.of(states)
    width = 2 * WIDTH + 1 + 2 * CONTEXT
    for wide in (CriticStore(store), pickle.loads(pickle.dumps(CriticStore(store)))):
        chosen = torch.tensor([7, 0, 19])
        lengths = store.lengths[chosen]
        found = wide.gather("hidden", chosen)
        assert found.shape == (int(lengths.sum()), width) and wide.hidden_size == width
        own, drawn, prefix, context, mean = found.split([WIDTH, WIDTH, 1, CONTEXT, CONTEXT], dim=1)
        assert torch.equal(own, store.gather("hidden", chosen))
        torch.testing.assert_close(drawn, sum_before(store.gather("directions", chosen), lengths))
        rows = torch.cat([torch.arange(n) + store.lengths[:e].sum() for e, n in zip(chosen, lengths, strict=True)])
        rewards = states.prefix_rewards[rows] - states.prefix_rewards.nanmean()
        assert rewards.isnan().any() and not rewards.isnan().all() and wide.prefix_columns.tolist() == [2 * WIDTH]
        torch.testing.assert_close(prefix, rewards.nan_to_num(0.0))
        assert torch.equal(context, store.gather("context", chosen))
        torch.testing.assert_close(mean, running_mean(context, lengths))
        assert torch.equal(wide.gather("directions", chosen), store.gather("directions", chosen))


def test_a_critic_is_ridge_regression_on_the_reward():
    states, _ = hidden_from_the_head(200)
    store = StateStore.of(states)
    settings = ValueSettings(discount=0.9, validation_split=0.3)
    critic, _ = train_critic(store, CONFIG, settings)
    train, held_out = split_by_prompt(store.prompts, 0.3, 0)
    wide = CriticStore(store)

    def rows(episodes):
        x = critic.scaled(wide.gather("hidden", episodes)).double()
        y = (store.rewards[episodes, 0].double() - critic.config.reward_mean) / critic.config.reward_std
        left = torch.cat([torch.arange(n - 1, -1, -1) for n in store.lengths[episodes].tolist()])
        return x, torch.repeat_interleave(y, store.lengths[episodes]) * 0.9**left

    (x, y), (x_held, y_held) = rows(train), rows(held_out)
    x_mean, y_mean = x.mean(0), y.mean()
    errors, found = [], []
    largest = torch.linalg.eigvalsh((x - x_mean).T @ (x - x_mean) / len(x)).max()
    for penalty in largest * torch.logspace(-6, 2, 17, dtype=torch.float64):
        # The same as more rows of data, of the root of the penalty in each column.
        more = (penalty * len(x)).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
        target = torch.cat([y - y_mean, torch.zeros(x.shape[1], dtype=torch.float64)])
        weight = torch.linalg.lstsq(torch.cat([x - x_mean, more]), target[:, None]).solution[:, 0]
        found.append((x_held - x_mean) @ weight + y_mean)
        errors.append(float((found[-1] - y_held).square().mean()))
    best = errors.index(min(errors))
    values = critic(wide.gather("hidden", held_out))[:, 0].double()
    torch.testing.assert_close(values, found[best], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seen", ["context", "prefix_rewards", "directions"])
def test_a_critic_gives_better_targets_where_it_sees_what_the_head_does_not(seen):
    states, slope = hidden_from_the_head()
    if seen == "prefix_rewards":
        states.prefix_rewards = states.context[:, :1].clone()
    if seen != "context":
        states.context = None
    head, own = train_value_head(states, CONFIG, td_lambda=1.0, **FAST)
    critic, figures = train_critic(StateStore.of(states), CONFIG, ValueSettings())
    assert figures["value_error"] < 0.7 * own["value_error"]
    options = {"advantage_num_epochs": 0, "gae_lambda": 0.0}
    weak = fit_advantage(head, states, **options)
    vector = head.static_vector.clone()
    strong = fit_advantage(head, states, critic=critic, **options)
    similarity = [torch.cosine_similarity(x, slope, dim=0) for x in (vector, head.static_vector)]
    assert similarity[1] > 0.98 and similarity[1] > similarity[0]
    assert strong["constant_correlation"] > weak["constant_correlation"] + 0.1
    # In standardised units, as the reward is.
    torch.testing.assert_close(head.static_vector, slope / head.config.reward_std, rtol=0.3, atol=0.1)


@pytest.mark.usefixtures("recontrol_warnings")
def test_a_critic_of_states_that_say_nothing_says_nothing():
    states, _ = hidden_from_the_head(60)
    for name in ("hidden", "directions", "context"):
        getattr(states, name).zero_()
    critic, figures = train_critic(states, CONFIG)
    assert figures["value_error"] == pytest.approx(1, abs=0.1)
    assert all(torch.isfinite(tensor).all() for tensor in critic.state_dict().values())


def test_a_critic_is_refused_where_it_cannot_be():
    states, _ = hidden_from_the_head(60)
    with pytest.raises(ValueError, match="wide"):
        train_critic(states, replace(CONFIG, hidden_size=WIDTH + 1))
    states.directions = None
    with pytest.raises(ValueError, match="no directions"):
        train_critic(states, CONFIG)


def test_a_critic_of_several_objectives_has_a_value_for_each():
    states, _ = hidden_from_the_head(200)
    states.rewards = torch.cat([states.rewards, -2 * states.rewards + 1], 1)
    store = StateStore.of(states)
    critic, _ = train_critic(store, replace(CONFIG, num_objectives=2), ValueSettings())
    values = critic(CriticStore(store).gather("hidden", torch.arange(50)))
    torch.testing.assert_close(values[:, 1], -values[:, 0], rtol=1e-3, atol=1e-3)


def test_what_was_cut_off_teaches_a_critic_nothing_where_that_is_asked():
    states, _ = hidden_from_the_head(200)
    states.finished = torch.arange(200) % 3 > 0
    whole, _ = train_critic(StateStore.of(states), CONFIG, ValueSettings(open_truncated=True))
    states.rewards[~states.finished] = 1e6
    changed, _ = train_critic(StateStore.of(states), CONFIG, ValueSettings(open_truncated=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), changed.parameters(), strict=True))


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


CRITIC = {"critic_value_error", "critic_value_error_last", "critic_correlation_last"}


@pytest.mark.parametrize(
    "changes", [{}, {"critic_layer": 0}, {"prefix_every": 2}, {"prefix_every": 3, "keep_states": True}]
)
def test_fit_reports_its_critic_and_leaves_nothing_of_it_in_the_head(changes, tmp_path):
    plain, figures = run(tmp_path / "plain", critic=False), run(tmp_path / "critic", **changes)
    assert figures.keys() >= CRITIC and not any(name.startswith("critic") for name in plain)
    heads = [ValueHead.from_pretrained(tmp_path / name / "head") for name in ("plain", "critic")]
    assert heads[0].state_dict().keys() == heads[1].state_dict().keys()
    # V is the same; what g and the static vector learned is not.
    for ours, theirs in zip(heads[0].value_mlp.parameters(), heads[1].value_mlp.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(heads[0].static_vector, heads[1].static_vector)
    assert "the critic" in (tmp_path / "critic" / "report.html").read_text(encoding="utf-8")
    assert "critic" in (tmp_path / "critic" / "head" / "README.md").read_text(encoding="utf-8")
    # Nothing is left to do, and nothing changes.
    before = (tmp_path / "critic" / "head" / "model.safetensors").read_bytes()
    assert run(tmp_path / "critic", **changes) == figures
    assert (tmp_path / "critic" / "head" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=next(iter(changes), "critic")):
        run(tmp_path / "plain", **changes)


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
