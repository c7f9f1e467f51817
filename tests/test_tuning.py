"""`tune`: the control that a head recommends, found on held-out prompts by a criterion, and written into the head."""

import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import GenerationConfig

from hf_recontrol import (
    ControlConfig,
    LoadingSettings,
    ReControlForCausalLM,
    TrainingRecord,
    TuneSettings,
    ValueHead,
    compare,
    generate_rollouts,
    tune,
)
from hf_recontrol.data.fingerprints import prompt_hash
from hf_recontrol.evaluation.rivals.rival import Bench
from hf_recontrol.evaluation.tuning import fewest_responses, plan_rounds
from hf_recontrol.heads.seen_prompts import SeenPrompts
from hf_recontrol.pipelines.loading import load_base

from .conftest import make_head
from .fresh import RECONTROL, run_fresh
from .test_comparison_figures import embeddings  # noqa: F401 (a fixture)
from .test_processes import ALONE, run_two
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

WORD = 50
PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 45)]
SMALL = {"max_new_tokens": 6, "temperature": 0.8, "part_size": 8, "quiet": True}
_CODE = f"""
def count(completions, **columns):
    return [float(text.split().count("w{WORD}")) for text in completions]

def nothing(completions, **columns):
    return [None for _ in completions]
"""


def count(completions, **columns):
    return [float(text.split().count(f"w{WORD}")) for text in completions]


def save_head(static: float, advantage: float, ascent: float, **config) -> None:
    """`base/`, and a `head/` that pushes towards (1) or away from (-1) the word, by each of its parts."""
    base = tiny_model("llama", dtype=torch.float32)
    base.generation_config.eos_token_id = 2
    base.save_pretrained("base")
    tiny_tokenizer(chat=True).save_pretrained("base")
    push = base.get_output_embeddings().weight.detach()
    push = push[WORD] - push.mean(0)
    shape = {"hidden_size": 16, "hook_point": "lm_head", "head_sizes": [], "advantage_sizes": [4]}
    head = make_head(**shape, static_vector=True, base_model_name_or_path=os.path.abspath("base"), **config)
    with torch.no_grad():
        head.static_vector.copy_(static * push)
        head.value_mlp.layers[0].weight.copy_(ascent * push)
        head.advantage_mlp.layers[-1].weight.mul_(1e-6)
        head.advantage_mlp.layers[-1].bias.copy_(advantage * push)
    head.seen_prompts = SeenPrompts(torch.tensor([prompt_hash("w80")]), torch.tensor([prompt_hash(PROMPTS[0])]))
    head.save_pretrained("head")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(_CODE)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def drawn(monkeypatch):
    """How many responses were drawn, in each call."""
    counts, draw = [], Bench.draw

    def counting(self, *args, **kwargs):
        found = draw(self, *args, **kwargs)
        counts.append(len(found))
        return found

    monkeypatch.setattr(Bench, "draw", counting)
    return counts


def run(**changes):
    return tune(**{"head": "head", "prompts": PROMPTS, "rewards": count, "output": "out", **SMALL, **changes})


def untimed(found):
    """A result without what a clock says."""
    found = json.loads(json.dumps(found))
    for each in [found["base"], *(candidate["figures"] for candidate in found["candidates"])]:
        for name in ("seconds", "tokens_per_second"):
            each.pop(name)
    return found


def test_the_control_that_earns_most_at_one_kl_is_written_into_the_head(place, drawn):
    save_head(-1.0, 1.0, -1.0, control=ControlConfig("static", 0.1))
    found = run(kl=0.5, num_steps=[3])
    assert found["control"]["method"] == "advantage"
    assert found["replaces"] == ControlConfig("static", 0.1).to_dict()
    assert [each["control"]["method"] for each in found["candidates"]] == ["static", "advantage", "ascent"]
    chosen = found["candidates"][1]
    # At about the KL that was asked for, and better than the base by its own words.
    assert chosen["figures"]["kl_per_token"][0] == pytest.approx(0.5, rel=0.3)
    assert chosen["gain"][1] > 0 and chosen["criterion"] == chosen["figures"]["reward"]
    assert chosen["criterion"][0] - found["base"]["reward"][0] == pytest.approx(chosen["gain"][0])
    assert found == json.loads((place / "out" / "tuning.json").read_text())
    assert "recommended" in (place / "out" / "frontier.svg").read_text()
    assert sum(drawn) == found["responses"] <= TuneSettings().budget

    head = ValueHead.from_pretrained("head")
    assert head.config.control == ControlConfig.from_dict(found["control"])
    assert head.config.control_figures["figures"] == chosen["figures"]
    assert set(head.seen_prompts.tuned_on.tolist()) == set(map(prompt_hash, PROMPTS))
    assert head.seen_prompts.counts() == {"trained_on": 1, "validated_on": 1, "tuned_on": 40}
    card = (place / "head" / "README.md").read_text()
    assert "Chosen by reward on 40 prompts" in card and f"| reward | {chosen['figures']['reward'][0]:.3f} |" in card
    # Another control has other figures.
    head.config.control = replace(head.config.control, step_size=9.0)
    head.save_pretrained("other")
    assert "Chosen by" not in (place / "other" / "README.md").read_text()

    with pytest.raises(ValueError, match=r"1 of 2 prompts to compare on .*row 1 \(tuned on\): 'w9 w10'"):
        compare(None, ["w70", "w9 w10"], count, "comparison", head="head", controls=["base"], **SMALL)


def test_of_controls_that_nobody_can_tell_apart_the_simplest_is_recommended(place):
    save_head(1.0, 1.0, 1.0)
    assert run(kl=0.5, num_steps=[3, 1])["control"]["method"] == "static"
    # Of the ascents the one with fewer steps.
    found = run(kl=0.5, num_steps=[3, 1], methods=["ascent"], output="ascents")
    assert [each["control"]["num_steps"] for each in found["candidates"]] == [1, 3]
    assert found["control"]["num_steps"] == 1


def test_weights_decide_how_strong_and_the_head_keeps_its_other_settings(place, recontrol_warnings):
    save_head(1.0, 1.0, 1.0, control=ControlConfig("ascent", 0.3, l2=0.01))
    options = {"methods": ["ascent"], "num_steps": [2], "step_sizes": [4.0, 0.5, 2.0]}
    strong = run(**options, criterion={"reward": 1})
    assert [each["control"]["step_size"] for each in strong["candidates"]] == [0.5, 2.0, 4.0]
    assert strong["control"]["step_size"] > 0.5 and strong["control"]["l2"] == 0.01
    weak = run(**options, criterion='{"reward": 1, "kl_per_response": -100}', output="weak")
    assert weak["control"]["step_size"] == 0.5
    assert weak["weights"] == {"reward": 1, "kl_per_response": -100}
    # What is clearly worse than no control replaces nothing.
    assert "is clearly worse than the base by reward + -100 kl_per_response" in recontrol_warnings[-1]
    assert strong["written"] and not weak["written"]
    assert ValueHead.from_pretrained("head").config.control.to_dict() == strong["control"]
    for each in weak["candidates"]:
        own, base = ({name: value[0] for name, value in f.items()} for f in (each["figures"], weak["base"]))
        value = own["reward"] - 100 * own["kl_per_response"]
        assert each["criterion"][0] == pytest.approx(value)
        assert each["gain"][0] == pytest.approx(value - base["reward"])


def test_a_penalty_that_forbids_long_steps_is_kept(place, recontrol_warnings):
    save_head(1.0, 1.0, 10.0, control=ControlConfig("ascent", 0.3, l2=1.5))
    found = run(methods=["ascent"], kl=0.1, num_steps=[2])
    assert found["control"]["l2"] == 1.5 and 0 < found["control"]["step_size"] < 1 / 1.5
    assert found["candidates"][0]["figures"]["kl_per_token"][0] == pytest.approx(0.1, rel=0.3)
    # Also where the head recommends another method, and in a comparison.
    options = {"controls": ["base", {"kind": "ascent", "l2": 3.0, "num_steps": 2, "strengths": [0.1]}], **SMALL}
    save_head(1.0, 1.0, 10.0, control=ControlConfig("static", 0.3))
    figures = compare(None, ["w70", "w71"], count, "comparison", head="head", **options)
    assert {(each.control, each.strength) for each in figures} == {("base", None), ("ascent", 0.1)}


def test_a_head_that_recommends_a_step_size_for_each_prompt_is_tuned_like_any_other(place):
    save_head(1.0, 1.0, 1.0, control=ControlConfig("static", (0.1, 0.2)))
    found = run(methods=["static"], step_sizes=[3.0], criterion={"reward": 1})
    assert found["control"]["step_size"] == 3.0 and found["replaces"]["step_size"] == [0.1, 0.2]


def test_a_mask_of_implausible_tokens_is_tried_too(place):
    save_head(1.0, 1.0, 1.0)
    found = run(methods=["static"], plausibility=[0.5, 0.0], step_sizes=[3.0], criterion={"reward": 1})
    assert [each["control"]["plausibility"] for each in found["candidates"]] == [0.0, 0.5]
    kls = [each["figures"]["kl_per_token"][0] for each in found["candidates"]]
    assert kls[0] != pytest.approx(kls[1])


def test_what_the_search_was_not_told_to_try_stays_as_the_head_recommends(place, recontrol_warnings):
    save_head(1.0, 1.0, 1.0, control=ControlConfig("advantage", 0.3, plausibility=0.2, max_kl=2.0))
    # Of steps below what overshoots a target.
    options = {"step_sizes": [1.0], "criterion": {"reward": 1}}
    guarded = {"plausibility": 0.2, "max_kl": 2.0}

    def tried(**changes):
        return [each["control"] for each in run(**options, **changes)["candidates"]]

    # Guards mean the same for every method.
    everything = tried(output="all")
    assert [each["method"] for each in everything] == ["static", "advantage", "ascent"]
    assert all(guarded.items() <= each.items() for each in everything) and everything[2]["num_steps"] == 30
    assert guarded.items() <= ValueHead.from_pretrained("head").config.control.to_dict().items()
    [other] = tried(methods=["static"], plausibility=[0.0], output="other")
    assert (other["plausibility"], other["max_kl"]) == (0.0, 2.0)
    # What the ascent alone has stays for the ascent alone.
    save_head(1.0, 1.0, 1.0, control=ControlConfig("ascent", 0.1, num_steps=3, l2=0.01, target=5.0, plausibility=0.2))
    own = {"num_steps": 3, "l2": 0.01, "target": 5.0}
    static, ascent = tried(methods=["static", "ascent"], output="ascent")
    assert own.items() <= ascent.items() and not own.items() & static.items()
    assert static["plausibility"] == ascent["plausibility"] == 0.2
    [longer] = tried(methods=["ascent"], num_steps=[5], output="longer")
    assert {**own, "num_steps": 5}.items() <= longer.items()
    assert all("is not clearly better than the base" in said for said in recontrol_warnings)


def test_limits_on_the_kl_are_tried_too(place):
    save_head(1.0, 1.0, 1.0)
    options = {"methods": ["static"], "step_sizes": [3.0], "criterion": {"reward": 1}, "temperature": 1.0}
    found = run(max_kl="0.05, 0.3,none", **options)
    # No limit is the simplest, then the wider one.
    assert [each["control"]["max_kl"] for each in found["candidates"]] == [None, 0.3, 0.05]
    free, wide, narrow = (each["figures"]["kl_per_token"][0] for each in found["candidates"])
    assert free > 0.3 >= wide > 0.05 >= narrow > 0
    for written in ("0.3,none", [0.3, None], ["3e-1", "none"]):
        assert TuneSettings(max_kl=written).max_kl == (0.3, None)
    assert TuneSettings(max_kl=0.3).max_kl == TuneSettings.from_dict({"max_kl": "3e-1"}, "tune.yaml").max_kl == (0.3,)
    for wrong, message in (
        (0, "must be above 0"),
        ("much", "must be a finite number"),
        ([True], "must be a finite number"),
    ):
        with pytest.raises(ValueError, match=rf"`max_kl\[...\]` {message}"):
            TuneSettings(max_kl=wrong)


def test_the_noise_is_none_that_a_fit_draws_with(place, monkeypatch):
    save_head(1.0, 1.0, 1.0)
    bases, draw = [], Bench.draw

    def noting(self, prompts, control=False):
        found = draw(self, prompts, control)
        bases.extend(found if control is False else [])
        return found

    monkeypatch.setattr(Bench, "draw", noting)
    options = {"methods": ["static"], "step_sizes": [3.0], "criterion": {"reward": 1}}
    sampling = {"max_new_tokens": 6, "temperature": 0.8, "progress": lambda *_: None}
    model, tokenizer = load_base("base", LoadingSettings())
    # Those of the fit, and of its recommended control one further, whatever the seed of each.
    fits = [generate_rollouts(model, tokenizer, PROMPTS, seed=seed, **sampling) for seed in range(4)]
    for seed in range(3):
        bases.clear()
        run(**options, seed=seed, output=f"seed-{seed}")
        own = {rollout.prompt_number: rollout.completion_ids for rollout in bases}
        assert len(own) == len(PROMPTS)
        for drawn in fits:
            assert sum(own[each.prompt_number] == each.completion_ids for each in drawn) < 4


def test_another_temperature_than_that_of_the_training_is_told(place, recontrol_warnings):
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 0}
    save_head(1.0, 1.0, 1.0, training=TrainingRecord(sampling=sampling))
    options = {"methods": ["static"], "step_sizes": [3.0], "criterion": {"reward": 1}}
    run(**options, temperature=0.9)
    assert recontrol_warnings == []
    run(**options, temperature=None, output="default")
    [said] = recontrol_warnings
    assert "drawn at temperature 0.9, these are drawn at 1: " in said and "`--temperature 0.9`" in said


def test_a_search_that_is_done_draws_nothing_again_though_the_head_has_changed(place, drawn):
    save_head(1.0, -1.0, -1.0, control=ControlConfig("ascent", 0.2, l2=0.01))
    options = {"kl": [0.2, 0.5], "criterion": {"reward": 1}, "num_steps": [2], "budget": 1000}
    whole = run(**options)
    assert sum(drawn) == whole["responses"] <= 1000
    drawn.clear()
    assert untimed(run(**options)) == untimed(whole)
    assert drawn == []


def test_a_search_that_was_stopped_goes_on_to_the_same_end(place, drawn):
    save_head(1.0, -1.0, -1.0)
    shutil.copytree("head", "again")
    former = ValueHead.from_pretrained("head").config.control
    options = {"step_sizes": [2.0, 4.0], "criterion": {"reward": 1}, "num_steps": [2], "budget": 200}
    whole = run(**options)
    assert sum(drawn) == whole["responses"] <= 200
    # More prompts for those that were ahead.
    assert [(each["prompts"], each["last_round"]) for each in whole["candidates"]].count((40, True)) == 2
    assert {each["prompts"] for each in whole["candidates"]} == {9, 25, 40}
    left = 0

    def stops(completions, **columns):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return count(completions)

    stops.fingerprint = "1"
    for left in (3, 6, 9):  # noqa: B007 (counted down by the reward)
        with pytest.raises(KeyboardInterrupt):
            run(**options, head="again", rewards=stops, output="stopped")
        assert ValueHead.from_pretrained("again").config.control == former
    left = -1
    resumed = untimed(run(**options, head="again", rewards=stops, output="stopped"))
    assert resumed == untimed(whole)
    assert ValueHead.from_pretrained("again").config.control == ValueHead.from_pretrained("head").config.control


def changed_meanwhile(change):
    """A reward in whose first call on answers somebody changes the head's folder."""
    done = []

    def reward(completions, **columns):
        if len(completions) > 2 and not done:
            done.append(True)
            head = ValueHead.from_pretrained("head")
            change(head)
            head.save_pretrained("head")
        return count(completions)

    reward.fingerprint = "1"
    return reward


def test_what_is_written_into_the_head_while_it_is_tuned_is_not_lost(place):
    options = {"methods": ["static"], "step_sizes": [1.0, 3.0], "criterion": {"reward": 1}}
    save_head(1.0, 1.0, 1.0)

    def tuned_elsewhere(head):
        head.seen_prompts = replace(head.seen_prompts, tuned_on=torch.tensor([7]))

    run(**options, rewards=changed_meanwhile(tuned_elsewhere))
    tuned = ValueHead.from_pretrained("head")
    assert tuned.seen_prompts.counts() == {"trained_on": 1, "validated_on": 1, "tuned_on": 41}
    assert tuned.config.control.method == "static"

    def trained_anew(head):
        head.static_vector.neg_()

    with pytest.raises(ValueError, match="head was changed while its control was searched for, and is left as it is"):
        run(**options, rewards=changed_meanwhile(trained_anew), output="again")
    found = ValueHead.from_pretrained("head")
    assert torch.equal(found.static_vector, -tuned.static_vector)
    assert (place / "again" / "tuning.json").is_file()


def test_another_head_in_the_output_is_not_overwritten(place, drawn, monkeypatch):
    save_head(1.0, 1.0, 1.0)
    shutil.copytree("head", "run/head")
    save_head(-1.0, 1.0, 1.0)
    before = (place / "run" / "head" / "model.safetensors").read_bytes()
    load = ValueHead.from_pretrained
    named = {"me/head": "head"}
    monkeypatch.setattr(ValueHead, "from_pretrained", lambda name, **options: load(named.get(name, name), **options))
    with pytest.raises(ValueError, match="run/head holds another head: name another `output`"):
        run(head="me/head", output="run")
    assert drawn == [] and (place / "run" / "head" / "model.safetensors").read_bytes() == before


def test_the_hub_s_cache_stays_as_it_is(place):
    save_head(1.0, 1.0, 1.0)
    snapshot = place / "models--me--head" / "snapshots" / "abc"
    shutil.copytree("head", snapshot.parents[1] / "blobs")
    snapshot.mkdir(parents=True)
    for path in (snapshot.parents[1] / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    before = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    options = {"methods": ["static"], "step_sizes": [3.0], "criterion": {"reward": 1}}
    found = run(**options, head=snapshot)
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == before
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert ValueHead.from_pretrained("out/head").config.control == ControlConfig.from_dict(found["control"])
    # Again it is the same head in the output.
    run(**options, head=snapshot)


def test_the_card_says_what_its_figures_are_worth(place, recontrol_warnings):
    save_head(1.0, 1.0, 1.0)
    head = ValueHead.from_pretrained("head")
    head.seen_prompts = SeenPrompts(torch.tensor([prompt_hash(text) for text in PROMPTS[:3]]))
    head.save_pretrained("head")

    def some(prompts, completions, **columns):
        return [None if prompt in PROMPTS[:30] else 1.0 for prompt in prompts]

    some.fingerprint = "1"
    options = {"methods": ["static"], "step_sizes": [1.0, 3.0], "criterion": {"reward": 1}, "rewards": some}
    options |= {"on_bad_rows": "skip", "on_seen_prompts": "allow"}
    found = run(**options)
    assert "3 of 40 prompts to tune on are among those that the head was trained" in recontrol_warnings[0]
    assert [(each["prompts"], each["counted"]) for each in found["candidates"]] == [(40, 10)] * 2
    card = (place / "head" / "README.md").read_text()
    for said in (
        "Chosen by reward on 40 prompts, of which these figures are.",
        "These prompts chose it: on others it may be worse.",
        "Only the 10 of them counted for which every control had numbers. The head was trained on 3 of them.",
    ):
        assert said in card
    (place / "head" / "README.md").write_text(card + "My own words.")
    recontrol_warnings.clear()
    run(**options)
    assert "README.md is not as this package wrote it, so it is kept" in recontrol_warnings[-1]
    head.seen_prompts = None
    head.save_pretrained("unknown")
    run(**options, head="unknown")
    assert any("does not say which prompts it was trained on" in said for said in recontrol_warnings)


def test_rounds_of_a_budget():
    # Enough for all on all prompts.
    assert plan_rounds(5, 100, 1, 601) == [(5, 100)]
    # 600 for 5, 3 and 2 controls and the base: 200 each, of which one response begins the round.
    assert plan_rounds(5, 1000, 1, 600) == [(5, 33), (3, 49), (2, 66)]
    assert plan_rounds(5, 70, 1, 419) == [(5, 23), (3, 34), (2, 13)]
    assert plan_rounds(1, 50, 2, 100) == [(1, 24)]
    for controls in range(1, 12):
        for prompts in (3, 8, 50, 400):
            for budget in (300, 1000, 5000):
                rounds = plan_rounds(controls, prompts, 2, budget)
                fewest = fewest_responses(controls, prompts, 2)
                assert plan_rounds(controls, prompts, 2, fewest) and not plan_rounds(controls, prompts, 2, fewest - 1)
                assert bool(rounds) == (budget >= fewest)
                if not rounds:
                    continue
                assert rounds[0][1] >= min(prompts, 8)
                assert sum((size + 1) * 2 * more + 2 for size, more in rounds) <= budget
                assert sum(more for _, more in rounds) <= prompts and rounds[0][0] == controls
                assert [size for size, _ in rounds] == sorted({size for size, _ in rounds}, reverse=True)


def test_numbers_that_yaml_takes_for_texts_are_numbers():
    text = "kl: 5e-2\nplausibility: [0, 1e-1]\ncriterion: {reward: 1, kl_per_response: -1e-1}\n"
    settings = TuneSettings.from_dict(yaml.safe_load(text), "tune.yaml")
    assert settings.kl == (0.05,) and settings.plausibility == (0.0, 0.1)
    assert settings.criterion == {"reward": 1.0, "kl_per_response": -0.1}
    with pytest.raises(ValueError, match="`kl` must be a list of numbers, got 'x'"):
        TuneSettings.from_dict({"kl": "x"}, "tune.yaml")


REFUSED = {
    "paper": ({"criterion": "paper"}, "counts coherence, which needs a model of sentence-transformers"),
    "metric": (
        {"criterion": {"win_rate": 1}},
        "`criterion` weighs 'win_rate', which must be one of reward, diversity",
    ),
    "time": ({"criterion": {"reward": 1, "seconds": -1}}, "`criterion` weighs 'seconds', which must be one of"),
    "criterion": ({"criterion": "best"}, "`criterion` must be one of 'reward_at_kl', 'paper'"),
    "json": ({"criterion": "{reward"}, "`criterion` is no JSON object"),
    "nothing": ({"criterion": {"reward": 0}}, "`criterion` must give some metric a weight"),
    "several KLs": ({"kl": [0.1, 0.2]}, "compares controls at one KL"),
    "both": ({"kl": [0.1], "step_sizes": [1.0], "criterion": {"reward": 1}}, "use one of them"),
    "method": ({"methods": ["magic"]}, r"`methods\[...\]` must be one of"),
    "budget": ({"budget": 100}, "too small to compare 3 controls: it takes 320 or more, half of them"),
    "trained on": (
        {"prompts": ["w80", "w81"]},
        r"1 of 2 prompts to tune on are among those that the head was trained on; .*\(trained on\): 'w80'",
    ),
    "target": ({"output": "base/config.json"}, "is a file"),
    "column": (
        {"prompts": [{"prompt": "w5", "score": 1.0}], "rewards": "score"},
        "The column 'score' holds one number for a prompt, whatever the answer",
    ),
    "several heads": ({"head": ["head", "head"]}, "`head` must be one folder or Hub name, .* call this for each"),
    "several bases": ({"base": ["base"]}, "`base` must be one folder or Hub name"),
}


def test_a_comparison_s_folder_is_refused_and_left_as_it_is(place, drawn):
    save_head(1.0, 1.0, 1.0)
    (place / "out").mkdir()
    (place / "out" / "table.md").write_text("theirs")
    with pytest.raises(OSError, match=r"out holds a comparison \(table.md\), .* name another `output`"):
        run()
    assert drawn == [] and [path.name for path in (place / "out").iterdir()] == ["table.md"]


def test_the_limit_counts_prompts_that_are_not_skipped(place, recontrol_warnings):
    save_head(1.0, 1.0, 1.0)
    head = ValueHead.from_pretrained("head")
    head.seen_prompts = SeenPrompts(torch.tensor([prompt_hash(text) for text in PROMPTS[:30]]))
    head.save_pretrained("head")
    options = {"methods": ["static"], "step_sizes": [1.0], "criterion": {"reward": 1}, "on_seen_prompts": "skip"}
    found = run(**options, limit=8)
    assert [each["prompts"] for each in found["candidates"]] == [8]
    [left_out, *_] = [said for said in recontrol_warnings if "these are left out" in said]
    assert "30 of" in left_out


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused_before_anything_is_drawn(place, drawn, case):
    save_head(1.0, 1.0, 1.0)
    before = {path.name: path.read_bytes() for path in (place / "head").iterdir()}
    changes, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        run(**changes)
    assert drawn == [] and not os.path.exists("out")
    assert {path.name: path.read_bytes() for path in (place / "head").iterdir()} == before


def test_controls_that_cannot_be_tried_are_left_out(place, drawn, recontrol_warnings):
    save_head(0.0, 1.0, 1.0)
    found = run(kl=0.3, num_steps=[2])
    assert [each["control"]["method"] for each in found["candidates"]] == ["advantage", "ascent"]
    [said] = recontrol_warnings
    assert "method='static' is not tried" in said
    with pytest.raises(ValueError, match="The control 'static' cannot be tried: This head would do nothing"):
        run(kl=0.3, methods=["static"], output="static")
    with pytest.raises(ValueError, match="No control could be tried"):
        run(kl=50.0, num_steps=[2], output="far")
    assert "left out: The control 'advantage' at 50 nats a token: No strength was found" in recontrol_warnings[2]


def test_step_sizes_are_found_with_half_of_the_budget_at_most(place, drawn, recontrol_warnings):
    save_head(1.0, 1.0, 1.0)
    found = run(kl=3.0, num_steps=[2], budget=320)
    assert sum(drawn) == found["responses"] <= 320
    assert 0 < len(found["candidates"]) < 3
    assert "no responses are left to find its strength with" in recontrol_warnings[0]
    # With more, those that were left out are tried after all.
    found = run(kl=3.0, num_steps=[2], budget=2000)
    assert len(found["candidates"]) == 3


def test_the_papers_criterion_is_the_sum_of_its_three_metrics(place, request):
    save_head(1.0, 1.0, 1.0)
    model = str(request.getfixturevalue("embeddings") / "model")
    # No answer is empty, or its prompt would have no coherence under that control, and count for none.
    sampling = {"generation_config": GenerationConfig(min_new_tokens=6), "max_new_tokens": 12}
    found = run(criterion="paper", embeddings=model, methods=["static"], kl=[0.2, 0.5], **sampling)
    for each in found["candidates"]:
        parts = [each["figures"][name][0] for name in ("coherence", "diversity", "reward")]
        assert each["criterion"][0] == pytest.approx(sum(parts))
    assert found["weights"] == {"coherence": 1, "diversity": 1, "reward": 1}


def test_of_several_rewards_each_can_be_weighed_and_one_that_knows_nothing_is_an_error(place, recontrol_warnings):
    save_head(1.0, 1.0, 1.0)

    def brevity(completions, **columns):
        return [-float(len(text)) for text in completions]

    def none(completions, **columns):
        return [None for _ in completions]

    options = {"methods": ["static"], "step_sizes": [1.0, 3.0]}
    found = run(**options, rewards=[count, brevity], criterion={"reward": 1}, output="sum")
    assert found["candidates"][0]["criterion"][0] == pytest.approx(
        sum(found["candidates"][0]["figures"][f"reward {name}"][0] for name in ("count", "brevity"))
    )
    assert "weighs the sum of count, brevity as they are" in recontrol_warnings[0]
    recontrol_warnings.clear()
    found = run(**options, rewards=[count, brevity], criterion={"reward brevity": 1})
    assert not any("weighs the sum" in said for said in recontrol_warnings)
    assert found["candidates"][0]["criterion"] == found["candidates"][0]["figures"]["reward brevity"]
    with pytest.raises(ValueError, match="No answer of some control has a number by 'reward none'"):
        run(**options, rewards=[count, none], criterion={"reward none": 1}, output="none", on_bad_rows="skip")


def test_two_processes_find_what_one_finds(place):
    save_head(1.0, -1.0, -1.0)
    shutil.copytree("head", "again")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    arguments = ["tune", "--prompts", "prompts.jsonl", "--reward", "mine:count", "--max-new-tokens", "6"]
    arguments += ["--part-size", "8", "--num-steps", "2", "--kl", "0.4", "--budget", "420"]
    environment = os.environ | ALONE
    one = [*arguments, "--head", "head", "--output", "one"]
    code, _, err = run_fresh(RECONTROL, one, environment, timeout=200, cwd=place)
    assert code == 0, err
    printed = run_two([*arguments, "--head", "again", "--output", "two"], place)
    assert printed.count("now recommends") == 1
    found = [json.loads((place / name / "tuning.json").read_text()) for name in ("one", "two")]
    assert untimed(found[0]) == untimed(found[1])
    assert (place / "head" / "config.json").exists() and (place / "again" / "prompts.safetensors").read_bytes() == (
        place / "head" / "prompts.safetensors"
    ).read_bytes()


def test_the_command_and_its_file(place):
    save_head(1.0, -1.0, -1.0)
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    settings = {"prompts": "prompts.jsonl", "rewards": "mine:count", "num_steps": 2, "max_new_tokens": 6, "kl": 0.4}
    (place / "tune.yaml").write_text(yaml.safe_dump(settings | {"output": "out"}))
    arguments = ["tune", "--config", "tune.yaml", "--criterion", '{"reward": 1, "diversity": 0.1}']
    code, _, err = run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=200, cwd=place)
    assert code != 0 and "--head" in err
    code, out, err = run_fresh(RECONTROL, [*arguments, "--head", "head"], os.environ | ALONE, timeout=200, cwd=place)
    assert code == 0, err
    assert "head now recommends ControlConfig(method='static'" in out and "on 40 prompts" in out
    assert json.loads((place / "out" / "tuning.json").read_text())["weights"] == {"reward": 1, "diversity": 0.1}
    model = ReControlForCausalLM.from_pretrained("head")
    assert model.control.method == "static"
    # A criterion that no answer needs a reward for.
    arguments = ["tune", "--config", "tune.yaml", "--head", "head", "--reward", "mine:nothing", "-o", "diverse"]
    arguments += ["--on-bad-rows", "skip", "--criterion", '{"diversity": 1}']
    code, out, err = run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=200, cwd=place)
    assert code == 0, err
    assert "nats an answer, on 40 prompts" in out and "reward" not in out and "Warning" not in err
