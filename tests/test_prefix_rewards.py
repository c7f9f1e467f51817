"""Rewards of the response so far: what is scored, where it is kept, and what the states say of it."""

import gc
import json
import subprocess
import sys

import pytest
import torch

from hf_recontrol import (
    FitSettings,
    Rollout,
    States,
    StateStore,
    collect_states,
    data_curve,
    fit,
    label_rollouts,
    load_prompts,
    load_rollouts,
    score_rollouts,
    write_rollouts,
    write_states,
)
from hf_recontrol.collection.scoring.rewards import ColumnReward

from .hub_server import TOKEN
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def words(completions, **columns):
    return [float(len(text.split())) for text in completions]


def rollout(count, prompt="w5", **changes):
    ids = list(range(10, 10 + count))
    values = {"completion": TOKENIZER.decode(ids, skip_special_tokens=True), "finished": False} | changes
    return Rollout(prompt, values.pop("completion"), [7], ids, values.pop("finished"), **values)


def test_the_response_so_far_is_scored_after_every_kth_token_but_the_last():
    seen = []

    def reward(prompts, completions, completion_ids, mark):
        seen.append((prompts, completions, completion_ids, mark))
        return [float(len(ids)) for ids in completion_ids]

    given = [rollout(7, columns={"mark": "a"}), rollout(3, prompt="w6", columns={"mark": "b"}), rollout(1)]
    given[2].columns = {"mark": "c"}
    scored = score_rollouts(given, reward, prefix_every=3, tokenizer=TOKENIZER)
    assert [r.reward for r in scored] == [[7.0], [3.0], [1.0]]
    assert [r.prefix_tokens for r in scored] == [[3, 6], [], []]
    assert [r.prefix_rewards for r in scored] == [[[3.0], [6.0]], [], []]
    # Whole responses in one call, all parts in another, each with its prompt and columns.
    assert len(seen) == 2
    prompts, completions, ids, marks = seen[1]
    assert prompts == ["w5", "w5"] and marks == ["a", "a"]
    assert ids == [list(range(10, 13)), list(range(10, 16))]
    assert completions == [TOKENIZER.decode(part) for part in ids]


def test_no_call_is_larger_than_that_of_the_whole_responses(monkeypatch):
    sizes = []

    def reward(completions, completion_ids):
        sizes.append(len(completions))
        return [float(sum(ids)) for ids in completion_ids]

    monkeypatch.setattr("hf_recontrol.collection.scoring.responses._PARTS_AT_ONCE", 3)
    given = [rollout(1), rollout(9), rollout(4), rollout(1)]
    scored = score_rollouts(given, reward, prefix_every=1, tokenizer=TOKENIZER)
    assert sizes == [4, 4, 4, 3]
    assert [r.prefix_rewards for r in scored] == [
        [[float(sum(r.completion_ids[:count]))] for count in range(1, len(r.completion_ids))] for r in given
    ]
    with pytest.raises(ValueError, match="one argument for each"):
        score_rollouts(given, [reward])


def test_parts_have_the_columns_that_whole_responses_have(monkeypatch):
    monkeypatch.setattr("hf_recontrol.collection.scoring.responses._PARTS_AT_ONCE", 1)

    def reward(completions, mark="absent"):
        assert mark != "absent"
        return [float(len(text)) + (each is None) for text, each in zip(completions, mark, strict=True)]

    def needs(completions, mark):
        return reward(completions, mark)

    given = [rollout(3, columns={"mark": 1.0}), rollout(9)]
    for function in (reward, needs):
        scored = score_rollouts(given, function, prefix_every=1, tokenizer=TOKENIZER)
        assert [len(each.prefix_rewards) for each in scored] == [2, 8]


def test_a_part_never_says_more_than_the_response_which_a_stop_string_ended():
    texts = []

    def reward(completions):
        texts.extend(completions)
        return [float(i) for i in range(len(completions))]

    whole = rollout(6)
    cut = rollout(6, completion=whole.completion[: len(whole.completion) // 2], finished=True)
    score_rollouts([cut], reward, prefix_every=1, tokenizer=TOKENIZER)
    assert len(texts) == 6 and all(cut.completion.startswith(text) for text in texts)


@pytest.mark.usefixtures("recontrol_warnings")
def test_rewards_that_no_part_has_are_told(folder, caplog):
    def whole_only(completion_ids):
        return [1.0 + i if len(ids) == 7 else None for i, ids in enumerate(completion_ids)]

    options = {"prefix_every": 2, "tokenizer": TOKENIZER}
    [scored] = score_rollouts([rollout(7)], whole_only, **options)
    assert scored.prefix_tokens == [] and "No response so far has a reward" in caplog.text
    caplog.clear()
    label_rollouts(folder[1], [words], prefix_every=50, tokenizer=TOKENIZER)
    assert "No response so far has a reward" in caplog.text


def test_a_combined_reward_of_a_part_is_of_the_functions_that_score_the_whole():
    def needs_some(completion_ids):
        return [float("nan") if len(ids) < 5 else 1.0 for ids in completion_ids]

    def undecided(completion_ids):
        return [None if len(ids) < 3 else 1.0 for ids in completion_ids]

    def others(prompts):
        return [None if prompt == "w5" else 1.0 for prompt in prompts]

    def hundred(completion_ids):
        return [100.0 for _ in completion_ids]

    options = {"prefix_every": 2, "tokenizer": TOKENIZER, "combine_rewards": "sum"}
    assert score_rollouts([rollout(7)], needs_some, hundred, **options)[0].prefix_tokens == [6]
    assert score_rollouts([rollout(7)], undecided, hundred, **options)[0].prefix_tokens == [4, 6]
    routed, other = score_rollouts([rollout(7), rollout(7, prompt="w6")], others, hundred, **options)
    assert other.prefix_rewards == [[101.0]] * 3
    assert routed.prefix_rewards == [[100.0]] * 3


@pytest.mark.parametrize("every", [0, -3, 2.5, True])
def test_a_number_of_tokens_that_is_none_is_refused_before_anything_is_written(every, folder):
    rollouts = folder[1]
    before = (rollouts / "manifest.json").read_bytes()
    for call in (
        lambda **o: score_rollouts([rollout(3)], words, **o),
        lambda **o: label_rollouts(rollouts, [words], **o),
    ):
        with pytest.raises(ValueError, match="prefix_every"):
            call(prefix_every=every, tokenizer=TOKENIZER)
    assert (rollouts / "manifest.json").read_bytes() == before


def test_the_tokenizer_of_another_base_is_refused(folder):
    class Shifted:
        def decode(self, ids, **options):
            return TOKENIZER.decode([i + 1 for i in ids], **options)

    with pytest.raises(ValueError, match="is not known: give that of the base"):
        label_rollouts(folder[1], [words], prefix_every=2, tokenizer=Shifted())


def test_a_character_that_is_not_whole_yet_is_not_shown():
    class Bytes:
        def decode(self, ids, **options):
            return bytes(ids).decode("utf-8", errors="replace")

    texts = []

    def reward(completions):
        texts.extend(completions)
        return [0.0 for _ in completions]

    ids = list("h\u00e9 \U0001f600!".encode())
    given = Rollout("w5", "h\u00e9 \U0001f600!", [7], ids, True)
    score_rollouts([given], reward, prefix_every=1, tokenizer=Bytes())
    assert not any("\ufffd" in text for text in texts) and len(texts) == len(ids)


def test_what_a_reward_gains_with_every_token_is_nobodys_merit():
    generator = torch.Generator().manual_seed(0)
    count, length = 40, 6
    value = torch.randn(count, length, generator=generator).cumsum(1)
    seen = torch.cat([torch.full((count, 1), torch.nan), value[:, :-1]], 1)
    shared = {"lengths": torch.full((count,), length), "rewards": value[:, -1:], "prompts": torch.arange(count)}
    stores = [
        StateStore.of(States(torch.randn(count * length, 3), prefix_rewards=x.reshape(-1, 1), **shared))
        for x in (seen, seen + 100 * torch.arange(length))
    ]
    plain, drifting = (store.prefix_rewards(torch.arange(count)) for store in stores)
    torch.testing.assert_close(drifting, plain, rtol=1e-4, atol=1e-4)
    by_place = plain.view(count, length)
    torch.testing.assert_close(by_place.mean(0), torch.zeros(length), rtol=0, atol=1e-5)
    assert (by_place[:, 0] == 0).all() and by_place[:, 1:].std() > 0.5


def test_where_few_responses_are_so_long_their_mean_is_that_of_the_place_before():
    lengths = torch.tensor([2] * 40 + [3])
    prefix = torch.tensor([[torch.nan], [1.0]] * 40 + [[torch.nan], [1.0], [5.0]])
    states = States(torch.randn(83, 3), lengths, torch.randn(41, 1), torch.arange(41), prefix_rewards=prefix)
    found = StateStore.of(states).prefix_rewards(torch.tensor([40]))
    torch.testing.assert_close(found, torch.tensor([[0.0], [0.0], [4.0]]))


def test_parts_without_a_finite_number_are_left_out_and_scoring_again_forgets_the_old_ones():
    def picky(completion_ids):
        return [{2: None, 4: float("nan")}.get(len(ids), float(len(ids))) for ids in completion_ids]

    [scored] = score_rollouts([rollout(7)], picky, prefix_every=2, tokenizer=TOKENIZER)
    assert (scored.prefix_tokens, scored.prefix_rewards) == ([6], [[6.0]])
    [again] = score_rollouts([scored], words)
    assert again.prefix_tokens is None and again.prefix_rewards is None


@pytest.mark.usefixtures("recontrol_warnings")
def test_a_response_without_a_reward_has_none_so_far_either():
    def even(completion_ids):
        return [None if len(ids) == 5 else 1.0 for ids in completion_ids]

    scored = score_rollouts([rollout(5), rollout(6)], even, prefix_every=2, tokenizer=TOKENIZER)
    assert scored[0].reward is None and scored[0].prefix_rewards == []
    assert scored[1].prefix_tokens == [2, 4]


def test_several_rewards_are_kept_or_combined_for_parts_as_for_the_whole():
    def one(completion_ids):
        return [1.0 for _ in completion_ids]

    options = {"prefix_every": 2, "tokenizer": TOKENIZER}
    [both] = score_rollouts([rollout(5)], words, one, **options)
    assert both.prefix_rewards == [[2.0, 1.0], [4.0, 1.0]]
    [mean] = score_rollouts([rollout(5)], words, one, combine_rewards="mean", **options)
    assert mean.prefix_rewards == [[1.5], [2.5]]


def test_a_reward_that_needs_whole_texts_says_so():
    def whole_only(completion_ids):
        if any(len(ids) < 5 for ids in completion_ids):
            raise RuntimeError("too short")
        return [1.0 for _ in completion_ids]

    with pytest.raises(RuntimeError, match=r"too short.*prefix_every"):
        score_rollouts([rollout(5)], whole_only, prefix_every=2, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="tokenizer"):
        score_rollouts([rollout(5)], words, prefix_every=2)


def test_no_more_parts_are_made_than_go_into_a_call():
    """All parts of a response together are quadratic in its length."""
    alive = []

    def reward(completions):
        alive.append(sum(isinstance(each, Rollout) for each in gc.get_objects()))
        return [float(len(text)) for text in completions]

    before = sum(isinstance(each, Rollout) for each in gc.get_objects())
    score_rollouts([rollout(80), rollout(79)], reward, prefix_every=1, tokenizer=TOKENIZER)
    assert len(alive) == 1 + 5 and max(alive) - before < 2 * 32 + 2 * 3


@pytest.mark.parametrize("rewards", [["score"], ["score", "other"]])
def test_columns_alone_have_nothing_to_say_of_the_response_so_far(folder, tmp_path, rewards):
    columns = [ColumnReward(name) for name in rewards]
    given = [rollout(5, columns={"score": 1.0, "other": 2.0})]
    with pytest.raises(ValueError, match="whatever the response so far is"):
        score_rollouts(given, *columns, prefix_every=2, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="whatever the response so far is"):
        label_rollouts(folder[1], {each.column: each for each in columns}, prefix_every=2, tokenizer=TOKENIZER)
    prompts = [{"prompt": f"w{i}", "score": i, "other": -i} for i in range(5, 45)]
    with pytest.raises(ValueError, match="whatever the response so far is"):
        fit(folder[0], prompts, rewards, tmp_path / "run", tokenizer=TOKENIZER, prefix_every=2, quiet=True)
    assert not (tmp_path / "run").exists()
    [scored] = score_rollouts(given, words, *columns, prefix_every=2, tokenizer=TOKENIZER)
    assert scored.prefix_rewards[0][1:] == scored.reward[1:]


@pytest.fixture
def folder(tmp_path):
    """(a tiny model, a folder of its rollouts, not scored yet)."""
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    prompts = load_prompts([f"w{i} w{i + 1}" for i in range(5, 13)])
    options = {"num_samples": 2, "max_new_tokens": 7, "part_size": 5, "temperature": 1.5}
    write_rollouts(tmp_path / "rollouts", model, TOKENIZER, prompts, **options)
    return model, tmp_path / "rollouts"


def test_a_folder_keeps_them_and_another_way_of_scoring_is_refused(folder):
    _, rollouts = folder
    plain = load_rollouts(rollouts)
    label_rollouts(rollouts, [words])
    bytes_without = {path.name: path.read_bytes() for path in rollouts.glob("*.parquet")}
    with pytest.raises(ValueError, match=r"prefix_every=None, now it is 2.*--reward \.\.\. --prefix-every 2 --again`"):
        label_rollouts(rollouts, [words], prefix_every=2, tokenizer=TOKENIZER)
    assert {path.name: path.read_bytes() for path in rollouts.glob("*.parquet")} == bytes_without
    label_rollouts(rollouts, [words], prefix_every=2, tokenizer=TOKENIZER, again=True)
    expected = score_rollouts(plain, words, prefix_every=2, tokenizer=TOKENIZER)
    assert load_rollouts(rollouts) == expected
    # Done already: nothing is called.
    label_rollouts(rollouts, [words], prefix_every=2, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="prefix_every=2, now it is 3"):
        label_rollouts(rollouts, [words], prefix_every=3, tokenizer=TOKENIZER)
    label_rollouts(rollouts, [words], again=True)
    assert all(r.prefix_tokens is None for r in load_rollouts(rollouts))


def test_a_scoring_that_was_stopped_goes_on(folder, monkeypatch):
    _, rollouts = folder
    calls = []

    def failing(completions):
        calls.append(len(completions))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return [float(len(text.split())) for text in completions]

    failing.fingerprint = "words"
    options = {"prefix_every": 2, "tokenizer": TOKENIZER}
    with pytest.raises(KeyboardInterrupt):
        label_rollouts(rollouts, [failing], **options)
    begun = len(calls)
    label_rollouts(rollouts, [failing], **options)
    assert len(calls) > begun
    assert load_rollouts(rollouts) == score_rollouts(load_rollouts(rollouts), words, **options)


def test_rewards_that_are_large_next_to_their_spread_keep_it(folder, tmp_path):
    def large(completions):
        return [1e9 + len(text.split()) for text in completions]

    model, rollouts = folder
    label_rollouts(rollouts, [words], prefix_every=2, tokenizer=TOKENIZER)
    write_states(tmp_path / "small", model, rollouts)
    label_rollouts(rollouts, [large], prefix_every=2, tokenizer=TOKENIZER, again=True)
    write_states(tmp_path / "large", model, rollouts)
    found = [StateStore.open(tmp_path / name) for name in ("small", "large")]
    small, large = (store.prefix_rewards(torch.arange(len(store))) for store in found)
    assert small.std() > 0.1
    torch.testing.assert_close(large, small, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_states_hold_the_latest_reward_known_at_each(folder, every, dtype, tmp_path):
    model, rollouts = folder
    label_rollouts(rollouts, [words], prefix_every=2, tokenizer=TOKENIZER)
    write_states(tmp_path / "states", model, rollouts, every=every, states_dtype=dtype)
    store = StateStore.open(tmp_path / "states")
    assert store.has_prefix_rewards
    used = [r for r in load_rollouts(rollouts) if r.completion_ids]
    stored = torch.cat([part.prefix_rewards for part in store.parts])
    parts = stored.split(store.lengths.tolist())
    for number, r in enumerate(used):
        expected = []
        for t in range(len(r.completion_ids)):
            known = [reward for count, reward in zip(r.prefix_tokens, r.prefix_rewards, strict=True) if count <= t]
            expected.append(known[-1] if known else [torch.nan])
        expected = torch.tensor(expected, dtype=torch.float64)[(len(r.completion_ids) - 1) % every :: every]
        assert torch.equal(parts[number].nan_to_num(-1.0), expected.nan_to_num(-1.0))
        # There are too few for a mean at each place.
        given = store.prefix_rewards(torch.tensor([number]))
        torch.testing.assert_close(given, (expected - stored.nanmean()).nan_to_num(0.0).float())
    if every == 1:
        in_memory = collect_states(model, used, hook_point="lm_head", directions=True)
        torch.testing.assert_close(in_memory.prefix_rewards, stored, equal_nan=True)
    # Without them there is no such tensor, and the file is as it was before there were any.
    label_rollouts(rollouts, [words], again=True)
    write_states(tmp_path / "plain", model, rollouts, every=every, states_dtype=dtype)
    plain = StateStore.open(tmp_path / "plain")
    assert not plain.has_prefix_rewards and plain.prefix_rewards(torch.arange(3)).shape[1] == 0


def test_they_sharpen_the_data_curve():
    generator = torch.Generator().manual_seed(0)
    count, width, length = 240, 6, 8
    steps = torch.randn(count, length, width, generator=generator)
    value = (steps @ torch.linspace(-1, 1, width)).cumsum(1)
    states = States(
        hidden=torch.randn(count * length, width, generator=generator),
        lengths=torch.full((count,), length),
        rewards=value[:, -1:],
        prompts=torch.arange(count) // 2,
        directions=steps.reshape(-1, width),
        hook_point="lm_head",
    )
    plain = data_curve(states)
    states.prefix_rewards = torch.cat([torch.full((count, 1), torch.nan), value[:, :-1]], 1).reshape(-1, 1)
    better = data_curve(states)
    assert better.gain[0] > plain.gain[0]
    # b is found exactly, and the gain is that of the reward itself: √2 deviations for the root of a nat.
    assert better.gain[-1] == pytest.approx(2**0.5, rel=0.05)


def test_fit_tries_the_reward_on_half_a_text_before_anything_is_made(tmp_path):
    def whole_only(completions, **columns):
        if any("know." not in text for text in completions):
            raise RuntimeError("no full stop")
        return [1.0 for _ in completions]

    model = tiny_model("llama", dtype=torch.float32)
    prompts = [f"w{i}" for i in range(5, 45)]
    with pytest.raises(RuntimeError, match=r"no full stop.*prefix_every"):
        fit(model, prompts, whole_only, tmp_path / "run", tokenizer=TOKENIZER, prefix_every=2, quiet=True)
    assert not (tmp_path / "run" / "rollouts").exists()


@pytest.mark.parametrize("changes", [{"critic": False}, {"directions": False}, {"hook_point": "decoder_layer"}])
def test_they_are_for_a_critic(changes):
    with pytest.raises(ValueError, match="prefix_every"):
        FitSettings(prefix_every=8, **changes)


def labelled(rollouts, *options):
    command = [sys.executable, "-m", "hf_recontrol", "label", rollouts, "--reward", "hf_recontrol:vader"]
    return subprocess.run([*command, "--prefix-every", "2", *options], capture_output=True, text=True, check=False)


def test_the_command_finds_the_tokenizer_of_the_base_that_drew_the_responses(tmp_path):
    model, base, rollouts = tiny_model("llama", dtype=torch.float32), tmp_path / "base", tmp_path / "rollouts"
    model.save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    drawn = type(model).from_pretrained(base)
    write_rollouts(rollouts, drawn, TOKENIZER, load_prompts(["w5 w6", "w7"]), max_new_tokens=5)
    base.rename(tmp_path / "moved")
    refused = labelled(rollouts)
    assert refused.returncode == 1 and str(base) in refused.stderr and "Traceback" not in refused.stderr
    assert "--model" in refused.stderr
    assert labelled(rollouts, "-m", tmp_path / "moved").returncode == 0
    (tmp_path / "moved").rename(base)
    done = labelled(rollouts, "--again")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((rollouts / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["prefix_every"] == 2
    assert any(r.prefix_tokens for r in load_rollouts(rollouts))


def test_the_tokenizer_is_that_of_the_commit_that_drew_them(hub, run, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    hub.put("org/base", tmp_path / "base", private=True)
    TOKENIZER.save_pretrained(tmp_path / "base")
    hub.put("org/base", tmp_path / "base", branch="v1")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w5 w6"}) + "\n", encoding="utf-8")
    script = """
import sys, torch
torch.set_num_threads(1)
from hf_recontrol.cli import main

folder, token = sys.argv[1:]
for arguments in (
    ["rollout", "-m", "org/base", "--revision", "v1", "--prompts", f"{folder}/prompts.jsonl",
     "--max-new-tokens", "6", "-o", f"{folder}/rollouts"],
    ["label", f"{folder}/rollouts", "--reward", "hf_recontrol:vader", "--prefix-every", "2"],
):
    sys.argv = ["recontrol", *arguments, "--token", token]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, arguments
"""
    run(script, str(tmp_path), TOKEN, endpoint=hub.endpoint, token=None)
    assert all(r.prefix_tokens for r in load_rollouts(tmp_path / "rollouts"))
