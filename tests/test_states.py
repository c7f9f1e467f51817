"""Rollouts to states."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHeadConfig
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.collection.state_sizes import int8_errors
from hf_recontrol.collection.states import _Reader, collect_states, write_states
from hf_recontrol.data.fingerprints import control_settings
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import Rollout, load_rollouts, rollout_parts
from hf_recontrol.data.states import States, StateStore
from hf_recontrol.evaluation.data_curve import data_curve
from hf_recontrol.training.advantage import fit_advantage
from hf_recontrol.training.critic import train_critic
from hf_recontrol.training.stage import train_head
from hf_recontrol.training.value import new_head, train_value_head

from .conftest import at, make_head
from .tiny_models import layers_of, lm_head_of, tiny_model
from .tiny_tokenizer import tiny_tokenizer

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
    states = collect_states(model, rows, **at(config), batch_size=2)
    used = [row for row in rows if row.completion_ids]
    assert states.lengths.tolist() == [len(row.completion_ids) for row in used]
    assert states.rewards.tolist() == [row.reward for row in used]
    expected = torch.cat([one_by_one(model, row, hook_point, layer)[0] for row in used])
    # Mamba's states go to thousands, and are rounded differently from one run to the next.
    torch.testing.assert_close(states.hidden, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_directions_are_the_drawn_row_less_its_mean_under_the_base(temperature):
    model, rows = tiny_model("llama", dtype=torch.float32), some_rollouts()
    config = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])
    rows = [replace(row, temperature=temperature) for row in rows]
    states = collect_states(model, rows, **at(config), batch_size=3)
    expected = []
    weight = lm_head_of(model).weight.detach()
    for row in (row for row in rows if row.completion_ids):
        _, logits = one_by_one(model, row, "lm_head", -1)
        policy = torch.softmax(logits / temperature, -1)
        expected.append(weight[row.completion_ids] - policy @ weight)
    torch.testing.assert_close(states.directions, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_equal_prompts_have_equal_numbers():
    states = collect_states(tiny_model("llama", dtype=torch.float32), some_rollouts(), **at(ValueHeadConfig(16)))
    # The fifth rollout has the first one's prompt, the fourth has no token.
    numbers = states.prompts.tolist()
    assert numbers[0] == numbers[3] and len(set(numbers)) == 3


def test_a_controlled_model_is_read_with_its_control_off():
    model = tiny_model("llama", dtype=torch.float32)
    config = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])
    expected = collect_states(model, some_rollouts(), **at(config))
    controlled = ReControlForCausalLM.from_model(model, make_head(hidden_size=16), ControlConfig(step_size=9.0))
    states = collect_states(controlled, some_rollouts(), **at(config))
    assert torch.equal(states.hidden, expected.hidden) and torch.equal(states.directions, expected.directions)


def test_under_control_the_mean_row_is_that_of_the_controlled_policy_and_the_state_is_the_base_s():
    model, rows = tiny_model("llama", dtype=torch.float32), some_rollouts()
    config = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])
    base = collect_states(model, rows, **at(config))
    weight = lm_head_of(model).weight.detach()
    head = make_head(hidden_size=16, hook_point="lm_head")
    controlled = ReControlForCausalLM.from_model(model, head, ControlConfig(step_size=1.0))
    sampled_under = control_settings(controlled, controlled.control)
    states = collect_states(controlled, [replace(row, control=sampled_under) for row in rows], **at(config))
    torch.testing.assert_close(states.hidden, base.hidden)
    used = [row for row in rows if row.completion_ids]
    expected = []
    for row in used:
        with torch.no_grad():
            logits = controlled(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
        policy = torch.softmax(logits[len(row.prompt_ids) - 1 : -1], -1)
        expected.append(weight[row.completion_ids] - policy @ weight)
    torch.testing.assert_close(states.directions, torch.cat(expected), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(states.directions, base.directions, atol=1e-2)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def rollouts(tmp_path):
    """A folder of 24 scored rollouts in three files."""
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    prompts = load_prompts([f"w{i} w{i + 1} w{3 * i}" for i in range(5, 17)])
    options = {"num_samples": 2, "max_new_tokens": 8, "part_size": 10, "temperature": 2.0}
    write_rollouts(tmp_path / "rollouts", model, tiny_tokenizer(), prompts, **options)
    label_rollouts(tmp_path / "rollouts", [length])
    return model, tmp_path / "rollouts"


WITH_ADVANTAGE = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])


@pytest.mark.parametrize("config", [WITH_ADVANTAGE, ValueHeadConfig(16, layer=1)], ids=["lm_head", "layer"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 1e-3)])
def test_a_folder_holds_what_memory_holds_in_the_dtype_asked_for(rollouts, tmp_path, dtype, tolerance, config):
    model, folder = rollouts
    counts = write_states(tmp_path / "states", model, folder, **at(config), states_dtype=dtype)
    store = StateStore.open(tmp_path / "states")
    expected = collect_states(model, load_rollouts(folder), **at(config))
    everything = torch.arange(len(store))
    assert torch.equal(store.lengths, expected.lengths) and torch.equal(store.rewards, expected.rewards)
    assert torch.equal(store.prompts, expected.prompts) and torch.equal(store.finished, expected.finished)
    torch.testing.assert_close(store.gather("hidden", everything), expected.hidden, rtol=tolerance, atol=tolerance)
    if config.advantage_sizes is not None:
        found = store.gather("directions", everything)
        torch.testing.assert_close(found, expected.directions, rtol=tolerance, atol=tolerance)
    assert counts["states"] == store.num_states == sum(len(r.completion_ids) for r in load_rollouts(folder))
    assert store.read_at == {
        "hook_point": config.hook_point,
        "layer": config.layer,
        "base_model_name_or_path": None,
        "base_model_revision": None,
        "every": 1,
    }


def test_values_of_stored_states_are_those_that_generation_saw(rollouts, tmp_path):
    """V at each generated token, read while generating from the cache, against V of the stored state."""
    model, folder = rollouts
    head = make_head(hidden_size=16, hook_point="lm_head")
    write_states(
        tmp_path / "states", model, folder, **at(ValueHeadConfig(16, hook_point="lm_head")), states_dtype="float32"
    )
    store = StateStore.open(tmp_path / "states")
    for number, rollout in enumerate(load_rollouts(folder)[:4]):
        seen = []
        handle = lm_head_of(model).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0][:, -1]))
        ids, cache = torch.tensor([rollout.prompt_ids]), DynamicCache()
        for token in rollout.completion_ids:
            with torch.no_grad():
                model(ids, use_cache=True, past_key_values=cache)
            ids = torch.tensor([[token]])
        handle.remove()
        stored = store.gather("hidden", torch.tensor([number]))
        torch.testing.assert_close(head(stored), head(torch.cat(seen)), rtol=1e-4, atol=1e-4)


def test_int8_reports_its_error(rollouts, tmp_path):
    model, folder = rollouts
    counts = write_states(tmp_path / "states", model, folder, **at(WITH_ADVANTAGE), states_dtype="int8")
    store, exact = (
        StateStore.open(tmp_path / "states"),
        collect_states(model, load_rollouts(folder), **at(WITH_ADVANTAGE)),
    )
    reported = int8_errors(counts)
    assert list(reported) == ["hidden", "directions"]
    assert reported["hidden"] == (counts["int8_squared_error"] / counts["states"]) ** 0.5
    for name, told in reported.items():
        found, known = store.gather(name, torch.arange(len(store))), getattr(exact, name)
        error = ((found - known).square().mean(0) / known.var(0, correction=0)).mean().sqrt()
        assert 0 < told < 0.02 and told == pytest.approx(float(error), rel=0.2), name
        assert getattr(store.parts[0], name).dtype == torch.int8


@pytest.mark.parametrize("name", ["directions", "context"])
def test_a_large_int8_error_is_told_by_the_tensors_name(rollouts, tmp_path, monkeypatch, recontrol_warnings, name):
    """The first response decides the scales; here it has none of what later ones have most of."""
    model, folder = rollouts
    real = _Reader.read

    def uneven(*args):
        for number, (i, values) in enumerate(real(*args)):
            yield i, values | {name: values[name] * (1e-3 if number == 0 else 1 + torch.arange(16.0) ** 3)}

    monkeypatch.setattr(_Reader, "read", uneven)
    monkeypatch.setattr("hf_recontrol.data.states._STATES_FOR_SCALES", 1)
    options = at(WITH_ADVANTAGE) | {"states_dtype": "int8", "critic_layer": 0}
    counts = write_states(tmp_path / "bad", model, folder, **options)
    assert list(int8_errors(counts)) == ["hidden", "directions", "context"]
    [told] = recontrol_warnings
    assert f"`{name}` " in told and told.count("`") == 2


def changed(folder: Path, how: str) -> str:
    """Change what a finished folder of states holds; the name of a part that is another then."""
    one, two = (folder / f"part-0000{number}.safetensors" for number in (0, 1))
    if how == "swapped":
        one.rename(folder / "kept")
        two.rename(one)
        (folder / "kept").rename(two)
    else:
        content = bytearray(one.read_bytes())
        content[-1] ^= 1
        one.write_bytes(content)
    return one.name


@pytest.mark.parametrize("how", ["one bit", "swapped"])
def test_states_that_are_not_those_that_were_written_are_not_learnt_from(rollouts, tmp_path, how, recontrol_warnings):
    """Their shapes fit, and nothing else would tell."""
    model, folder = rollouts
    states, options = tmp_path / "states", at(WITH_ADVANTAGE)
    write_states(states, model, folder, **options)
    before = [path.read_bytes() for path in sorted(states.glob("part-*"))]
    head = make_head(hidden_size=16, hook_point="lm_head", advantage_sizes=[])
    part = changed(states, how)
    assert len(StateStore.open(states)) == 24  # by its header a file is whole
    sizes = {"head_sizes": [4], "advantage_sizes": None, "num_epochs": 1, "validation_split": 0.3}
    for learn in (
        lambda: train_head(tmp_path / "head", states, token_bias=False, **sizes),
        lambda: train_value_head(states, head.config, num_epochs=1),
        lambda: fit_advantage(head, states),
        lambda: train_critic(states, head.config),
        lambda: data_curve(states),
    ):
        with pytest.raises(
            ValueError, match=f"{part}.* changed or damaged.*run the same .*`recontrol states`, or `fit`"
        ):
            learn()
    assert not (tmp_path / "head" / "config.json").exists()
    # As the message says.
    (states / part).unlink()
    if how == "swapped":
        with pytest.raises(ValueError, match=r"part-00001\.safetensors was changed or damaged.*run the same command"):
            write_states(states, model, folder, **options)
        (states / "part-00001.safetensors").unlink()
    write_states(states, model, folder, **options)
    assert [path.read_bytes() for path in sorted(states.glob("part-*"))] == before
    figures = train_head(tmp_path / "head", states, token_bias=False, **sizes)
    # What is trained is not read again.
    changed(states, how)
    assert train_head(tmp_path / "head", states, token_bias=False, **sizes) == figures


def test_a_part_of_the_rollouts_can_be_made_again(rollouts, tmp_path):
    model, folder = rollouts
    part = rollout_parts(folder)[1]
    before = load_rollouts(folder)
    part.unlink()
    with pytest.raises(OSError, match=f"lacks {part.name}.*run .*`recontrol rollout`, .*states and heads anew"):
        rollout_parts(folder)
    prompts = load_prompts([f"w{i} w{i + 1} w{3 * i}" for i in range(5, 17)])
    options = {"num_samples": 2, "max_new_tokens": 8, "part_size": 10, "temperature": 2.0}
    write_rollouts(folder, model, tiny_tokenizer(), prompts, **options)
    label_rollouts(folder, [length], again=True)
    assert load_rollouts(folder) == before


def test_int8_scales_are_of_many_states_and_a_large_error_is_told(rollouts, tmp_path, monkeypatch, recontrol_warnings):
    """A feature that is almost nothing in the first response and large later is kept."""
    model, folder = rollouts
    real = _Reader.read

    def uneven(*args):
        for number, (i, values) in enumerate(real(*args)):
            hidden = values["hidden"].clone()
            hidden[:, 3] = 50.0 * (number > 0) * torch.linspace(0.5, 1.0, len(hidden))
            yield i, values | {"hidden": hidden}

    monkeypatch.setattr(_Reader, "read", uneven)
    counts = write_states(tmp_path / "good", model, folder, **at(WITH_ADVANTAGE), states_dtype="int8")
    assert (counts["int8_squared_error"] / counts["states"]) ** 0.5 < 0.02 and not recontrol_warnings
    monkeypatch.setattr("hf_recontrol.data.states._STATES_FOR_SCALES", 1)
    write_states(tmp_path / "bad", model, folder, **at(WITH_ADVANTAGE), states_dtype="int8")
    assert "int8 keeps these states badly: its error is `hidden`" in recontrol_warnings[0]


def test_a_base_that_was_trained_since_is_told(rollouts, tmp_path, recontrol_warnings):
    model, folder = rollouts
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    write_states(tmp_path / "s", model, folder)
    assert "its weights or its dtype are others" in recontrol_warnings[-1]


def test_rewards_that_are_all_equal_are_told_before_states_are_read(rollouts, tmp_path):
    model, folder = rollouts
    label_rollouts(folder, {"length": length, "same": lambda prompts, completions: [0.1] * len(prompts)}, again=True)
    with pytest.raises(ValueError, match=r"same are equal \(0\.1\).*label .*rollouts --reward \.\.\. --again"):
        write_states(tmp_path / "states", model, folder, **at(WITH_ADVANTAGE))
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "top_k=50"), ({"top_k": 0, "top_p": 0.9}, "top_p=0.9"), ({"do_sample": False}, "do_sample=False")],
)
def test_draws_from_a_part_of_the_distribution_are_told_for_g(tmp_path, settings, named, recontrol_warnings):
    model = tiny_model("llama", dtype=torch.float32)
    config = GenerationConfig(**{"do_sample": True} | settings)
    prompts = load_prompts([f"w{i}" for i in range(5, 15)])
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), prompts, generation_config=config, max_new_tokens=8)
    label_rollouts(tmp_path / "r", [length])
    write_states(tmp_path / "plain", model, tmp_path / "r", **at(ValueHeadConfig(16, hook_point="lm_head")))
    assert not recontrol_warnings
    write_states(tmp_path / "both", model, tmp_path / "r", **at(WITH_ADVANTAGE))
    assert named in recontrol_warnings[0]


def test_every_kth_state_is_kept_counted_back_from_the_last(rollouts, tmp_path):
    model, folder = rollouts
    write_states(tmp_path / "all", model, folder, **at(WITH_ADVANTAGE))
    write_states(tmp_path / "some", model, folder, **at(WITH_ADVANTAGE), every=3)
    everything, some = StateStore.open(tmp_path / "all"), StateStore.open(tmp_path / "some")
    assert some.read_at["every"] == 3
    for episode in range(len(some)):
        for name in ("hidden", "directions"):
            whole = everything.gather(name, torch.tensor([episode]))
            assert torch.equal(some.gather(name, torch.tensor([episode])), whole.flip(0)[::3].flip(0))


@pytest.mark.parametrize("share", [0.9, 0.45, 0.3])
def test_a_budget_is_kept_with_as_many_states_as_fit(rollouts, tmp_path, recontrol_warnings, share):
    model, folder = rollouts
    full = write_states(tmp_path / "all", model, folder, **at(WITH_ADVANTAGE))["bytes"]
    part = write_states(tmp_path / "some", model, folder, **at(WITH_ADVANTAGE), max_gigabytes=share * full / 1e9)
    every = StateStore.open(tmp_path / "some").read_at["every"]
    denser = write_states(tmp_path / "denser", model, folder, **at(WITH_ADVANTAGE), every=every - 1)
    assert part["bytes"] <= share * full < denser["bytes"]
    [said] = recontrol_warnings
    assert f"one state in {every} is kept" in said and "advantage part" in said


def test_a_budget_that_nothing_fits_into_is_told(rollouts, tmp_path):
    model, folder = rollouts
    with pytest.raises(ValueError, match="one state of each response takes"):
        write_states(tmp_path / "some", model, folder, **at(WITH_ADVANTAGE), max_gigabytes=1e-9)


def test_a_disk_that_is_too_small_is_told_before_the_states_are_read(
    rollouts, tmp_path, monkeypatch, recontrol_warnings
):
    model, folder = rollouts
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free._replace(free=1000))
    monkeypatch.setattr("hf_recontrol.collection.states._Reader.read", None)
    with pytest.raises(TypeError):
        write_states(tmp_path / "states", model, folder, **at(WITH_ADVANTAGE))
    [said] = recontrol_warnings
    assert "has 1e-06 GB left" in said


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_store_takes_little_more_than_its_states(rollouts, tmp_path, dtype, size):
    model = tiny_model("llama", dtype=torch.float32, hidden_size=256, head_dim=64)
    model.generation_config.eos_token_id = 2
    options = {"num_samples": 4, "max_new_tokens": 30, "temperature": 1.0}
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), load_prompts([f"w{i}" for i in range(5, 30)]), **options)
    label_rollouts(tmp_path / "r", [length])
    counts = write_states(tmp_path / "s", model, tmp_path / "r", **at(ValueHeadConfig(256)), states_dtype=dtype)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "s").glob("part-*"))
    assert counts["bytes"] == counts["states"] * 256 * size <= on_disk <= 1.02 * counts["bytes"]


def anonymous_megabytes() -> float:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_bounded_by_the_batch_whatever_the_number_of_rollouts(tmp_path):
    """One file of 79 MB of states, written and read through in half of that."""
    width = 1024
    model = tiny_model("llama", dtype=torch.float32, hidden_size=width, head_dim=8, num_hidden_layers=1)
    prompts = load_prompts([f"w{i % 80 + 5} w{i // 80 + 5}" for i in range(600)])
    options = {"max_new_tokens": 36, "part_size": 1000, "batch_size": 50}
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), prompts, **options)
    label_rollouts(tmp_path / "r", [length])
    config = ValueHeadConfig(width, head_sizes=[8], hook_point="lm_head")
    # Once before, so that what torch keeps for itself is there.
    warm_up = load_rollouts(tmp_path / "r")[:16]
    collect_states(model, warm_up, **at(config), batch_size=8)
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_megabytes())

    before = anonymous_megabytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        counts = write_states(tmp_path / "s", model, tmp_path / "r", **at(config), batch_size=8)
        new_head(store := StateStore.open(tmp_path / "s"), config, *[torch.arange(len(store))] * 2, "feature", 0)
    finally:
        done.set()
        watcher.join()
    assert counts["bytes"] > 75e6
    assert peak[0] - before < 40


def test_a_state_beyond_the_dtype_s_range_is_an_error_and_leaves_no_part(rollouts, tmp_path, recontrol_warnings):
    model, folder = rollouts
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)
    with pytest.raises(ValueError, match="not finite in float16"):
        write_states(tmp_path / "states", model, folder, **at(WITH_ADVANTAGE), states_dtype="float16")
    assert not list((tmp_path / "states").glob("*part-*"))


def test_unscored_folders_and_responses(rollouts, tmp_path, recontrol_warnings):
    model, _ = rollouts
    prompts = load_prompts([f"w{i}" for i in range(5, 11)])
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), prompts, max_new_tokens=4)
    with pytest.raises(ValueError, match="have no rewards"):
        write_states(tmp_path / "s", model, tmp_path / "r", **at(WITH_ADVANTAGE))

    def sometimes(prompts, completions, **columns):
        return [float("nan") if i % 2 else float(i) for i in range(len(prompts))]

    counts = label_rollouts(tmp_path / "r", [sometimes], on_bad_rows="skip")
    assert counts["unscored"] == 3 and "row 1" in recontrol_warnings[0]
    assert write_states(tmp_path / "s", model, tmp_path / "r", **at(WITH_ADVANTAGE))["episodes"] == 3


def test_changed_rollouts_are_refused(rollouts, tmp_path):
    model, folder = rollouts
    part = rollout_parts(folder)[1]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{part.name} was changed or damaged"):
        write_states(tmp_path / "states", model, folder, **at(WITH_ADVANTAGE))


def test_unscored_and_empty_rollouts_are_errors():
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ValueError, match="No rollout has a reward"):
        collect_states(model, [Rollout("w5", "", [5], [6], False)], **at(ValueHeadConfig(16)))
    with pytest.raises(ValueError, match="nothing to learn from"):
        collect_states(model, [Rollout("w5", "", [5], [], False, [1.0])], **at(ValueHeadConfig(16)))


def test_rollouts_of_another_vocabulary_are_an_error():
    rows = [Rollout("w5", "", [5, 400], [6], False, [1.0])]
    with pytest.raises(ValueError, match="vocabulary of 97"):
        collect_states(tiny_model("llama", dtype=torch.float32), rows, **at(ValueHeadConfig(16)))


def test_states_of_other_shapes_are_refused_by_name():
    whole = {"hidden": torch.zeros(5, 4), "lengths": torch.tensor([2, 3]), "rewards": torch.zeros(2, 1)}
    whole |= {"prompts": torch.arange(2), "directions": torch.zeros(5, 4), "tokens": torch.zeros(5, dtype=torch.int64)}
    assert States(**whole).finished.tolist() == [True, True]
    for name, value in (
        ("rewards", torch.zeros(2)),
        ("rewards", torch.zeros(3, 1)),
        ("rewards", [[0.0], [0.0]]),
        ("hidden", torch.zeros(6, 4)),
        ("hidden", torch.zeros(5)),
        ("lengths", torch.tensor(5)),
        ("lengths", [2, 3]),
        ("prompts", torch.arange(3)),
        ("finished", torch.ones(5, dtype=torch.bool)),
        ("directions", torch.zeros(4, 4)),
        ("directions", torch.zeros(5, 3)),
        ("context", torch.zeros(2, 4)),
        ("tokens", torch.zeros(5, 1)),
        ("prefix_rewards", torch.zeros(5)),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be a tensor of shape"):
            States(**whole | {name: value})
    for name in ("lengths", "prompts", "tokens"):
        with pytest.raises(ValueError, match=f"`{name}` must hold integers"):
            States(**whole | {name: whole[name].float()})


def test_responses_that_the_rewards_gave_no_number_for_are_left_out(recontrol_warnings):
    model = tiny_model("llama", dtype=torch.float32)
    rows = [Rollout(f"w{i}", "", [i], [6, 7], False, None if i == 6 else [float(i)]) for i in (5, 6, 7)]
    read = collect_states(model, rows, **at(ValueHeadConfig(16)))
    assert read.rewards.tolist() == [[5.0], [7.0]] and read.lengths.tolist() == [2, 2]
    assert recontrol_warnings == ["1 of 3 rollouts have no reward and are left out."]
