"""States to a head: what training finds in data that hold something to find, and its errors."""

import json
import math
import pickle
import shutil
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_recontrol import ValueHeadConfig, ValueSettings
from hf_recontrol.data.states import States, StateStore, StateWriter
from hf_recontrol.training import trainer
from hf_recontrol.training.advantage import fit_advantage
from hf_recontrol.training.critic import train_critic
from hf_recontrol.training.held_out import _warnings, split_by_prompt
from hf_recontrol.training.targets import Episodes
from hf_recontrol.training.value import ValueTrainer, measure_value_head, train_value_head

# With so few held-out responses training warns, rightly.
pytestmark = pytest.mark.usefixtures("recontrol_warnings")

WIDTH = 6


def episodes(count: int = 300, seed: int = 0, noise: float = 0.1, objectives: int = 1) -> States:
    """A walk whose end decides the reward; directions whose product with a fixed vector is the step in value."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(-1, 1, WIDTH)
    lengths = torch.randint(1, 9, (count,), generator=generator)
    hidden, rewards, directions = [], [], []
    for length in lengths.tolist():
        walk = torch.randn(length + 1, WIDTH, generator=generator).cumsum(0)
        hidden.append(walk[:-1])
        reward = walk[-1] @ slope
        rewards.append(torch.stack([reward * (1 + k) for k in range(objectives)]))
        directions.append(walk[1:] - walk[:-1])
    scale = torch.tensor([100.0, 1, 1, 1, 1, 0.01])
    rewards = torch.stack(rewards)
    rewards = 7 + 3 * (rewards + noise * torch.randn(rewards.shape, generator=generator))
    return States(
        hidden=5 + torch.cat(hidden) * scale,
        lengths=lengths,
        rewards=rewards,
        prompts=torch.arange(count) // 2,
        directions=torch.cat(directions),
    )


CONFIG = ValueHeadConfig(WIDTH, head_sizes=[32], hook_point="lm_head", advantage_sizes=[16])
FAST = {"num_epochs": 20, "learning_rate": 3e-3, "train_batch_size": 32}


@pytest.mark.parametrize("td_lambda", [0.0, 0.95, 1.0])
def test_a_head_learns_to_predict_the_reward_in_its_own_units(td_lambda):
    states = episodes()
    head, figures = train_value_head(states, CONFIG, td_lambda=td_lambda, **FAST)
    assert figures["value_error"] < 0.6
    assert figures["correlation_last"] > figures["correlation_first"] > 0.3
    assert head.config.reward_mean == pytest.approx(7, abs=2) and head.config.reward_std > 3
    last = states.lengths.cumsum(0) - 1
    predicted = head.rewards(head(states.hidden[last])).detach()
    assert float((predicted - states.rewards).square().mean()) < 0.5 * float(states.rewards.var())


def test_features_of_unlike_scale_need_the_scaling():
    states = episodes()
    scaled = train_value_head(states, CONFIG, **FAST)[1]["value_error"]
    raw = train_value_head(states, CONFIG, scaling="none", **FAST)
    assert scaled < raw[1]["value_error"]
    assert torch.equal(raw[0].state_scale, torch.ones(WIDTH)) and torch.equal(raw[0].state_mean, torch.zeros(WIDTH))
    one_scale = train_value_head(states, CONFIG, scaling="scalar", num_epochs=1)[0].state_scale
    assert len(one_scale.unique()) == 1


def test_the_same_seed_gives_the_same_head_and_leaves_the_global_generator_alone():
    states = episodes(60)
    before = torch.get_rng_state()
    first = train_value_head(states, CONFIG, num_epochs=2)[0].state_dict()
    assert torch.equal(before, torch.get_rng_state())
    second = train_value_head(states, CONFIG, num_epochs=2)[0].state_dict()
    other = train_value_head(states, CONFIG, num_epochs=2, seed=1)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_best_epoch_is_kept():
    states = episodes(80, noise=2.0)
    errors = [train_value_head(states, CONFIG, num_epochs=n, learning_rate=1e-2)[1]["value_error"] for n in (1, 5, 40)]
    assert errors == sorted(errors, reverse=True)


def test_rewards_far_from_zero_train_as_the_same_ones_near_it():
    states = episodes(80)
    far = change(states, rewards=states.rewards.double() + 1e8)
    near, _ = train_value_head(states, CONFIG, num_epochs=3)
    head, _ = train_value_head(far, CONFIG, num_epochs=3)
    assert head.config.reward_std == pytest.approx(near.config.reward_std, rel=1e-5)
    torch.testing.assert_close(head(states.hidden), near(states.hidden), rtol=1e-3, atol=1e-3)


def test_training_goes_on_in_a_folder_that_was_moved_with_its_best_epoch(tmp_path):
    """The best epoch comes before the move, so it is found only where the folder is now."""
    states, options = episodes(80, noise=2.0), {"learning_rate": 3e-2, "num_epochs": 8}

    def stopped(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_value_head(states, CONFIG, output_dir=tmp_path / "old", progress=stopped, **options)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    head, figures = train_value_head(states, CONFIG, output_dir=tmp_path / "old", **options)
    errors = [row["eval_value_error"] for row in figures["log"] if "eval_value_error" in row]
    assert errors.index(min(errors)) < 5 and len(errors) == 8
    shutil.rmtree(tmp_path / "old")
    moved, again = train_value_head(states, CONFIG, output_dir=tmp_path / "new", **options)
    assert again["value_error"] == pytest.approx(figures["value_error"], rel=1e-4)
    torch.testing.assert_close(moved(states.hidden), head(states.hidden), rtol=1e-3, atol=1e-3)


def test_a_run_that_stopped_early_or_ended_is_taken_over_as_it_was(tmp_path, monkeypatch):
    states, options = episodes(80, noise=2.0), {"learning_rate": 1e-2, "patience": 2}
    for epochs, name in ((40, "stopped"), (2, "ended")):
        first, figures = train_value_head(states, CONFIG, num_epochs=epochs, output_dir=tmp_path / name, **options)
        evaluated = [row["epoch"] for row in figures["log"] if "eval_value_error" in row]
        assert len(evaluated) < 40
        monkeypatch.setattr("hf_recontrol.training.value.ValueTrainer.train", None)
        again, same = train_value_head(states, CONFIG, num_epochs=epochs, output_dir=tmp_path / name, **options)
        monkeypatch.undo()
        assert same["by_position"] == figures["by_position"]
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("patience", [None, 3])
def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, patience):
    states, options = episodes(80, noise=1.0), {"num_epochs": 6, "learning_rate": 3e-3, "patience": patience}
    evaluate = ValueTrainer.evaluate

    def killed(self, *args, **kwargs):
        if self.state.epoch > 3.5:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    whole, figures = train_value_head(states, CONFIG, output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ValueTrainer, "evaluate", killed)
        train_value_head(states, CONFIG, output_dir=tmp_path / "killed", **options)
    # What a kill while it was being written leaves behind.
    half = tmp_path / "killed" / "checkpoint-9999"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_st')
    again, same = train_value_head(states, CONFIG, output_dir=tmp_path / "killed", **options)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert same["value_error"] == pytest.approx(figures["value_error"], rel=1e-4)
    assert not half.exists()


def test_checkpoints_of_another_training_are_not_taken_for_this_one_s(tmp_path):
    states = episodes(80)
    options = {"num_epochs": 2, "learning_rate": 3e-3}
    head, figures = train_value_head(states, CONFIG, output_dir=tmp_path, **options)
    _, same = train_value_head(states, CONFIG, output_dir=tmp_path, report_to="none", **options)
    assert same["value_error"] == figures["value_error"]
    for changed, said in [
        ({"states": episodes(80, seed=1)}, "episodes"),
        ({"states": change(states, rewards=-states.rewards)}, "episodes"),
        ({"td_lambda": 0.5}, "td_lambda"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"config": replace(CONFIG, activation="silu")}, "activation"),
        ({"scaling": "scalar"}, "scaling"),
    ]:
        changed = {"states": states, "config": CONFIG, **options} | changed
        with pytest.raises(ValueError, match=f"made with other settings: .*{said}"):
            train_value_head(output_dir=tmp_path, **changed)
    with pytest.raises(ValueError, match=r"made with other settings: .*AdvantageTrainer"):
        fit_advantage(head, states, output_dir=tmp_path)
    fit_advantage(head, states, output_dir=tmp_path / "g", advantage_num_epochs=1)
    with pytest.raises(ValueError, match="gae_lambda"):
        fit_advantage(head, states, output_dir=tmp_path / "g", advantage_num_epochs=1, gae_lambda=0.3)
    critic, _ = train_critic(states, CONFIG)
    with pytest.raises(ValueError, match=r"critic was None"):
        fit_advantage(head, states, critic=critic, output_dir=tmp_path / "g", advantage_num_epochs=1)
    other, _ = train_value_head(states, CONFIG, seed=1, **options)
    with pytest.raises(ValueError, match=r"start\.value was"):
        fit_advantage(other, states, output_dir=tmp_path / "g", advantage_num_epochs=1)


def test_after_a_training_that_diverged_another_learning_rate_is_no_other_training(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        train_value_head(episodes(80), CONFIG, output_dir=tmp_path, num_epochs=2, learning_rate=1e30)
    head, _ = train_value_head(episodes(80), CONFIG, output_dir=tmp_path, num_epochs=2, learning_rate=1e-3)
    assert all(torch.isfinite(tensor).all() for tensor in head.state_dict().values())


@pytest.mark.parametrize("name", ["load_best_model_at_end", "greater_is_better", "metric_for_best_model"])
def test_which_checkpoint_is_kept_is_ours_to_say(name):
    with pytest.raises(ValueError, match=name):
        train_value_head(episodes(80), CONFIG, training_arguments={name: False})


def test_a_target_network_lags_behind_v(tmp_path):
    states = episodes(80)
    lagging = train_value_head(states, CONFIG, td_lambda=0.5, target_update=0.01, **FAST)
    exact = train_value_head(states, CONFIG, td_lambda=0.5, target_update=1.0, **FAST)
    plain = train_value_head(states, CONFIG, td_lambda=0.5, **FAST)
    # A copy that follows at once is V itself but for the step in between.
    assert exact[1]["value_error"] == pytest.approx(plain[1]["value_error"], rel=1e-3)
    assert lagging[1]["value_error"] != pytest.approx(plain[1]["value_error"], rel=1e-3)


def test_truncated_responses_can_be_left_open():
    states = episodes(200)
    states = change(states, finished=torch.arange(200) % 4 > 0)
    shifted = change(states, rewards=states.rewards + 100.0 * ~states.finished[:, None])
    # Anchored, the odd rewards of the truncated quarter spoil V for the others; left open, they are not looked at.
    finished = states.finished
    errors = {}
    for name, option in (("anchored", False), ("open", True)):
        head, _ = train_value_head(shifted, CONFIG, open_truncated=option, **FAST)
        last = states.lengths.cumsum(0)[finished] - 1
        centred = head.rewards(head(states.hidden[last])).detach() - states.rewards[finished]
        errors[name] = float(centred.var())
    assert errors["open"] < 0.5 * errors["anchored"]


def test_where_an_open_response_breaks_off_no_advantage_is_known():
    """Whatever was drawn there: its direction and its token are not held against a target."""
    states = change(episodes(200), finished=torch.arange(200) % 4 > 0)
    states = change(states, tokens=torch.arange(len(states.hidden)) % 7, vocabulary_size=7)
    last = (states.lengths.cumsum(0) - 1)[~states.finished]
    odd = change(states, directions=states.directions.clone(), tokens=states.tokens.clone())
    odd.directions[last] = 1e3
    odd.tokens[last] = 0
    config = replace(CONFIG, static_vector=True, token_bias_size=7)
    head, _ = train_value_head(states, config, open_truncated=True, num_epochs=2)
    found = []
    for each in (states, odd):
        own = deepcopy(head)
        figures = fit_advantage(own, each, open_truncated=True, advantage_num_epochs=1)
        found.append([*own.parameters(), torch.tensor(figures["advantage_error"])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_figures_of_a_discounted_value_are_of_the_discounted_reward():
    states = episodes()
    head, figures = train_value_head(states, CONFIG, td_lambda=1.0, discount=0.5, **FAST)
    assert figures["value_error"] < 0.6
    _, held_out = split_by_prompt(states.prompts, 0.1, 0)
    store = StateStore.of(states)
    lengths = states.lengths[held_out]
    left = torch.cat([torch.arange(length - 1, -1, -1) for length in lengths.tolist()])
    rewards = (states.rewards[held_out, 0] - head.config.reward_mean) / head.config.reward_std
    returns = torch.repeat_interleave(rewards, lengths) * 0.5**left
    values = head(store.gather("hidden", held_out))[:, 0].detach()
    expected = float((values - returns).square().sum() / returns.square().sum())
    assert figures["value_error"] == pytest.approx(expected, rel=1e-4)
    first = lengths.cumsum(0) - lengths
    expected = float((values - returns)[first].square().sum() / returns[first].square().sum())
    assert figures["by_position"][0]["error"] == pytest.approx(expected, rel=1e-4)
    assert measure_value_head(head, states, held_out, discount=0.5)["value_error"] == figures["value_error"]


def test_long_and_wide_episodes_are_read_by_fewer_at_once_to_the_same_end(monkeypatch):
    states = episodes(40)
    head, _ = train_value_head(states, CONFIG, num_epochs=1)

    def everything():
        own = deepcopy(head)
        figures = fit_advantage(own, states, advantage_num_epochs=0)
        values = [measure_value_head(head, states)["value_error"], figures["constant_error"]]
        return torch.cat([own.advantage_mlp.layers[-1].bias.detach(), torch.tensor(values)])

    expected, read = everything(), []
    monkeypatch.setattr("hf_recontrol.training.targets._NUMBERS_AT_ONCE", 3 * 8 * WIDTH)
    fetch = Episodes.__getitems__
    monkeypatch.setattr(Episodes, "__getitems__", lambda self, these: read.append(len(these)) or fetch(self, these))
    torch.testing.assert_close(everything(), expected)
    assert max(read) == 3


def test_mixed_precision_schedules_and_trackers_are_the_trainer_s(tmp_path):
    arguments = {"bf16": True, "lr_scheduler_type": "cosine", "report_to": "tensorboard", "max_grad_norm": 0.5}
    head, figures = train_value_head(
        episodes(), CONFIG, training_arguments=arguments, output_dir=tmp_path, **FAST | {"num_epochs": 5}
    )
    rates = [row["learning_rate"] for row in figures["log"] if "learning_rate" in row]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * rates[0]
    assert figures["value_error"] < 0.9 and next(head.parameters()).dtype == torch.float32
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_store_in_several_files_is_fetched_by_workers_as_by_one(tmp_path):
    """Whole episodes at random out of memory-mapped files, here and in other processes, train the same head."""
    states = episodes(90)
    starts = states.lengths.cumsum(0) - states.lengths
    for number, part in enumerate(torch.arange(90).split(40)):
        rows = slice(int(starts[part[0]]), int(starts[part[-1]] + states.lengths[part[-1]]))
        small = {name: getattr(states, name)[part] for name in ("lengths", "rewards", "prompts", "finished")}
        path = tmp_path / f"part-{number:05d}.safetensors"
        names = ("hidden", "directions")
        with StateWriter(path, small, dict.fromkeys(names, WIDTH), torch.float32, {}) as writer:
            for name in names:
                writer.write(name, 0, getattr(states, name)[rows])
    manifest = {
        "format_version": 1,
        "kind": "states",
        "complete": True,
        "parts": {f"part-{i:05d}.safetensors": "" for i in range(3)},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    store = StateStore.open(tmp_path)
    chosen = torch.tensor([80, 3, 41, 3, 0])
    for name in ("hidden", "directions"):
        assert torch.equal(store.gather(name, chosen), StateStore([states]).gather(name, chosen))
    options = {"num_epochs": 2, "train_batch_size": 16}
    expected, _ = train_value_head(states, CONFIG, **options)
    for workers in (0, 2):
        arguments = {"dataloader_num_workers": workers}
        if workers:
            arguments["dataloader_prefetch_factor"] = 2
        head, _ = train_value_head(store, CONFIG, training_arguments=arguments, **options)
        for a, b in zip(head.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(pickle.loads(pickle.dumps(store)).gather("hidden", chosen), store.gather("hidden", chosen))


def test_what_held_out_figures_say_in_plain_words():
    def said(error, prompt_mean=None, episodes=200):
        figures = {"value_error_last": error, "baselines": {"prompt_mean": prompt_mean}}
        return _warnings(figures | {"held_out_episodes": episodes})

    [useless] = said(0.99, prompt_mean=0.5)
    assert "no better than its mean" in useless and "cannot steer" in useless
    [told] = said(0.7, prompt_mean=0.6)
    assert "tells prompts apart" in told
    assert said(0.7) == said(0.7, prompt_mean=0.8) == []
    [few] = said(0.7, episodes=49)
    assert "mean little" in few


def test_figures_name_the_baselines_and_warn_in_plain_words(recontrol_warnings):
    states = episodes(400)
    noise = change(states, rewards=torch.randn(400, 1, generator=torch.Generator().manual_seed(1)))
    _, figures = train_value_head(noise, CONFIG, num_epochs=1, validation_split=0.3)
    assert figures["value_error_last"] > 0.9 and figures["baselines"]["constant"] == 1.0
    assert figures["baselines"]["prompt_mean"] == pytest.approx(2, abs=0.6), "two unrelated rewards a prompt"
    _, good = train_value_head(states, CONFIG, **FAST)
    assert not any("no better" in said for said in good["warnings"])
    by_prompt = change(states, rewards=torch.randn(200, 1).repeat_interleave(2, 0))
    hidden = torch.repeat_interleave(by_prompt.rewards, states.lengths, 0) + 0.3 * torch.randn(
        len(states.hidden), WIDTH
    )
    _, told = train_value_head(change(by_prompt, hidden=hidden), CONFIG, **FAST)
    assert told["baselines"]["prompt_mean"] == pytest.approx(0, abs=1e-6)
    assert "tells prompts apart" in told["warnings"][0] and told["warnings"][0] in recontrol_warnings
    assert len(told["by_position"]) == 11 and told["by_position"][-1]["error"] == told["value_error_last"]
    assert sum(row["count"] for row in told["calibration"]) == told["held_out_episodes"]


def test_several_objectives_have_their_own_units():
    head, figures = train_value_head(
        episodes(objectives=2), ValueHeadConfig(WIDTH, head_sizes=[32], hook_point="lm_head", num_objectives=2), **FAST
    )
    assert len(head.config.reward_mean) == 2
    assert head.config.reward_std[1] == pytest.approx(2 * head.config.reward_std[0], rel=0.1)
    assert figures["correlation_last"] > 0.5


def test_no_prompt_is_on_both_sides_of_the_split():
    states = episodes(40)
    train, held_out = split_by_prompt(states.prompts, 0.2, seed=0)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(40))
    assert not set(states.prompts[train].tolist()) & set(states.prompts[held_out].tolist())
    assert len(held_out) == 8


def test_the_constant_part_is_ridge_regression_in_closed_form():
    states = episodes(noise=0.0)
    head, _ = train_value_head(states, CONFIG, td_lambda=1.0, **FAST)
    figures = fit_advantage(head, states, advantage_num_epochs=0)
    assert figures["constant_correlation"] == figures["advantage_correlation"] > 0.5
    weight, bias = head.advantage_mlp.layers[-1].weight, head.advantage_mlp.layers[-1].bias
    assert not weight.any()
    # The step in value is the direction's product with the slope, in standardised units.
    slope = torch.linspace(-1, 1, WIDTH) * 3 / head.config.reward_std
    assert torch.cosine_similarity(bias, slope, dim=0) > 0.95


def test_the_advantage_part_is_never_worse_on_held_out_prompts_than_its_constant_part():
    states = episodes(noise=1.0)
    head, _ = train_value_head(states, CONFIG, **FAST)
    figures = fit_advantage(head, states, advantage_learning_rate=3e-3, advantage_num_epochs=5)
    assert figures["advantage_correlation"] >= figures["constant_correlation"] - 1e-3
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, float))


def test_the_mlp_of_the_advantage_part_learns_what_a_constant_cannot_say():
    """What a direction is worth turns its sign with the state, so no constant vector can tell."""
    generator = torch.Generator().manual_seed(0)
    count, length = 600, 4
    sign = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2.0 - 1
    directions = torch.randn(count, length, WIDTH, generator=generator)
    value = (sign * directions)[..., 0].cumsum(1)
    # The state holds the value so far and the sign, so that V can be exact.
    hidden = torch.zeros(count, length, WIDTH)
    hidden[:, 1:, 1] = value[:, :-1]
    hidden[:, :, 2:3] = sign
    states = States(
        hidden=hidden.flatten(0, 1),
        lengths=torch.full((count,), length),
        rewards=value[:, -1:],
        prompts=torch.arange(count),
        directions=directions.flatten(0, 1),
    )
    head, _ = train_value_head(states, CONFIG, td_lambda=1.0, **FAST)
    figures = fit_advantage(head, states, advantage_learning_rate=1e-2, advantage_num_epochs=20)
    assert figures["advantage_correlation"] > figures["constant_correlation"] + 0.3
    smoothed = deepcopy(head)
    fit_advantage(smoothed, states, advantage_learning_rate=1e-2, advantage_num_epochs=1, gae_lambda=0.9)
    assert not torch.equal(smoothed.advantage(hidden[0]), head.advantage(hidden[0]))


def change(states: States, **changes) -> States:
    return States(**(vars(states) | changes))


@pytest.mark.parametrize(
    ("make", "kwargs", "error"),
    [
        (lambda s: change(s, rewards=torch.ones_like(s.rewards)), {}, "All rewards are equal"),
        (lambda s: change(s, rewards=s.rewards * math.nan), {}, "rewards hold NaN"),
        (lambda s: change(s, hidden=s.hidden * math.inf), {}, "states hold NaN"),
        (lambda s: change(s, hidden=s.hidden[:, :3], directions=s.directions[:, :3]), {}, "3 wide"),
        (lambda s: change(s, rewards=s.rewards.expand(-1, 2)), {}, "2 rewards"),
        (lambda s: change(s, prompts=torch.zeros_like(s.prompts)), {}, "cannot be split"),
        (lambda s: change(s, hook_point="decoder_layer"), {}, "were read at"),
        (lambda s: s, {"td_lambda": 1.5}, "td_lambda"),
        (lambda s: s, {"scaling": "other"}, "scaling"),
        (lambda s: s, {"learning_rate": 1e30}, "diverged"),
        (lambda s: s, {"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay .*num_decay_steps"),
        (lambda s: s, {"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr .*min_lr"),
    ],
)
def test_data_and_settings_that_cannot_work_are_errors(make, kwargs, error):
    with pytest.raises(ValueError, match=error):
        train_value_head(make(episodes(20)), CONFIG, **({"num_epochs": 2} | kwargs))


def test_an_advantage_part_needs_one_and_directions():
    states = episodes(20)
    head, _ = train_value_head(states, CONFIG, num_epochs=1)
    with pytest.raises(ValueError, match="no directions"):
        fit_advantage(head, change(states, directions=None))
    plain, _ = train_value_head(states, ValueHeadConfig(WIDTH, hook_point="lm_head"), num_epochs=1)
    with pytest.raises(ValueError, match="no advantage part"):
        fit_advantage(plain, states)


def test_checking_training_asks_for_the_device_that_training_uses(monkeypatch):
    """TrainingArguments set the device of the whole process: made for a CPU, they would keep `fit` off a GPU."""
    asked = []
    monkeypatch.setattr(trainer, "TrainingArguments", recorded(trainer.TrainingArguments, asked))
    for device in ("cpu", "cuda"):
        processes = SimpleNamespace(index=0, count=1, device=torch.device(device))
        trainer.check_training(ValueSettings(), processes)
    assert [options["use_cpu"] for options in asked] == [True, False]


def recorded(cls, asked):
    class Recorded(cls):
        def __init__(self, **options):
            asked.append(options)

    return Recorded


def test_arguments_that_do_not_go_together_are_told_at_once():
    with pytest.raises(ValueError, match="`training_arguments` cannot be used"):
        train_value_head(episodes(20), CONFIG, training_arguments={"save_strategy": "no"})
