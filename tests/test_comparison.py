"""`compare` and `recontrol compare` on tiny models: files, rows, resuming, rivals of a user's own, refusals."""

import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from transformers import GenerationConfig

from hf_recontrol import (
    ControlConfig,
    ReControlForCausalLM,
    TrainingRecord,
    ValueHead,
    compare,
    generate_rollouts,
    label_rollouts,
    load_prompts,
    write_rollouts,
)
from hf_recontrol.collection.scoring.rewards import load_reward
from hf_recontrol.data.fingerprints import prompt_hash
from hf_recontrol.data.processes import no_progress
from hf_recontrol.data.rollouts import load_rollouts, save_rollouts
from hf_recontrol.heads.seen_prompts import SeenPrompts
from hf_recontrol.pipelines.compare_bases import _names as folder_names
from hf_recontrol.pipelines.compare_bases import compare_bases
from hf_recontrol.pipelines.loading import load_base
from hf_recontrol.settings import CompareSettings

from .compared import in_copy, make_inputs, settings, write_file
from .fresh import RECONTROL, FreshProcess, run_fresh
from .test_processes import ALONE, run_two

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    yield from in_copy(inputs, tmp_path, monkeypatch)


def run(**changes):
    return compare(**{"quiet": True, **settings(**changes)})


def lines_of(folder="out"):
    return parquet.read_table(f"{folder}/answers.parquet").to_pylist()


def figures_in(folder="out"):
    with open(f"{folder}/figures.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of(lines, control, strength=None):
    return [line for line in lines if line["control"] == control and line["strength"] == strength]


def untimed(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def without_times(folder):
    """Everything in the folder's files but times."""
    figures = [line for line in figures_in(folder) if line["metric"] not in TIMES]
    return untimed(lines_of(folder)), figures


def command(arguments, cwd):
    return run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=200, cwd=cwd)


# What is in the folder.


def test_the_command_leaves_answers_figures_table_and_plots_under_the_names_that_others_rely_on(place):
    code, out, err = command(write_file(place), place)
    assert code == 0, err
    assert {path.name for path in (place / "out").iterdir()} >= {
        *("answers.parquet", "figures.csv", "figures.json", "table.md"),
        *("frontier.svg", "diversity.svg", "time.svg"),
    }
    lines = lines_of()
    names = list(lines[0])
    for name in ("control", "strength", "prompt", "sample", "completion", "prompt_ids", "completion_ids", "reward"):
        assert name in names
    with open("out/figures.csv", encoding="utf-8") as file:
        head = file.readline().strip().split(",")
    assert head[:7] == ["control", "strength", "metric", "value", "low", "high", "count"]
    found = figures_in()
    assert {f["metric"] for f in found} >= {
        *("reward", "diversity", "kl_per_token", "kl_per_response", "length", "finished", "perplexity", "seconds"),
        *("tokens_per_second", "repetition", "win_rate", "ties", "reward_worst_tenth", "truncated"),
    }
    assert {(f["control"], f["strength"]) for f in found} == {
        *(("base", ""), ("prompting", ""), ("advantage", "0.3"), ("advantage", "0.6")),
        *(("best_of_n", "1.0"), ("best_of_n", "2.0"), ("best_of_n", "3.0")),
    }
    assert all(f["count"] == "12" for f in found)
    about = json.loads((place / "out" / "figures.json").read_text())
    assert [{k: "" if v is None else str(v) for k, v in f.items()} for f in about["figures"]] == found
    assert (place / "out" / "table.md").read_text() in out
    for line in lines:
        assert line["reward"] == len(set(line["completion"].split()))


def test_rows_share_their_noise_and_the_base_is_what_generate_rollouts_draws(place):
    run(num_samples=2)
    lines = lines_of()
    base, pool = of(lines, "base"), of(lines, "best_of_n")
    assert len(base) == 24 and len(pool) == 36
    first = [line["completion_ids"] for line in base if line["sample"] == 0]
    assert first == [line["completion_ids"] for line in pool if line["sample"] == 0]
    assert all(line["kl"] == 0 for line in base)
    model, tokenizer = load_base("base", CompareSettings())
    prompts = [f"w{i} w{i + 1}" for i in range(10, 22)]
    plain = generate_rollouts(model, tokenizer, prompts, num_samples=2, max_new_tokens=6, progress=lambda *_: None)
    assert [line["completion_ids"] for line in base] == [r.completion_ids for r in plain]
    controlled = ReControlForCausalLM.from_model(model, ValueHead.from_pretrained("head"))
    drawn = generate_rollouts(
        controlled,
        tokenizer,
        prompts,
        control=ControlConfig("advantage", step_size=0.6),
        num_samples=2,
        max_new_tokens=6,
        progress=lambda *_: None,
    )
    assert [line["completion_ids"] for line in of(lines, "advantage", 0.6)] == [r.completion_ids for r in drawn]
    # With an instruction the base is still asked what the user asked.
    prompted = of(lines, "prompting")
    assert [line["prompt_ids"] for line in prompted] == [line["prompt_ids"] for line in base]
    assert [line["prompt"] for line in prompted] == [line["prompt"] for line in base]
    assert sum(line["kl"] for line in prompted) > 0


def test_best_of_n_is_chosen_by_the_reward_and_one_of_n_is_any(place):
    figures = {(f.control, f.strength, f.metric): f for f in run()}
    pool = of(lines_of(), "best_of_n")
    best = [max(line["reward"] for line in pool if line["prompt_number"] == n) for n in range(12)]
    assert figures["best_of_n", 3.0, "reward"].value == pytest.approx(sum(best) / 12)
    assert figures["best_of_n", 1.0, "reward"].value == pytest.approx(sum(line["reward"] for line in pool) / 36)


def test_the_kl_of_the_best_of_n_under_an_instruction_is_that_of_both(place):
    instructed = {"kind": "best_of_n", "n": 3, "instruction": "w50 w51", "instruction_role": "user"}
    figures = run(controls=["base", instructed], rewards="mine:distinct")
    model, tokenizer = load_base("base", CompareSettings())

    def log_likelihood(text, line):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids + line["completion_ids"]])).logits[0, len(ids) - 1 : -1]
        return float(torch.log_softmax(logits, -1).gather(-1, torch.tensor(line["completion_ids"])[:, None]).sum())

    for line in of(lines_of(), "best_of_n")[:6]:
        asked = log_likelihood(f"w50 w51 {line['prompt']}", line)
        plain = log_likelihood(line["prompt"], line)
        assert line["base"] == pytest.approx(-plain, abs=1e-3)
        assert line["kl"] == pytest.approx(asked - plain, abs=1e-3)
    # A draw of the pool is the base's own; the best of several is not.
    [found] = [f for f in figures if (f.strength, f.metric) == (3, "kl_per_response")]
    mean = sum(line["kl"] for line in best_lines(of(lines_of(), "best_of_n"))) / 12
    assert found.value == pytest.approx(math.log(3) - 2 / 3 + mean, abs=1e-3)


def best_lines(lines):
    """Of each prompt the answer with the highest reward, of which there is one."""
    return [max(own, key=lambda line: line["reward"]) for own in by_prompt(lines).values()]


def by_prompt(lines):
    found = {}
    for line in lines:
        found.setdefault(line["prompt_number"], []).append(line)
    return found


def test_the_best_of_fewer_than_all_is_held_against_an_answer_that_is_not_among_them(place):
    figures = {(f.strength, f.metric): f.value for f in run(rewards="mine:distinct") if f.control == "best_of_n"}
    pools = by_prompt(of(lines_of(), "best_of_n")).values()
    own_is_best = [pool[0]["reward"] == max(line["reward"] for line in pool) for pool in pools]
    assert figures[3, "ties"] == pytest.approx(sum(own_is_best) / 12) and 0 < sum(own_is_best) < 12
    assert figures[2, "ties"] == 0
    best_of_others = [max(line["reward"] for line in pool[1:]) > pool[0]["reward"] for pool in pools]
    assert figures[2, "win_rate"] == pytest.approx(sum(best_of_others) / 12)
    assert all(line["kl"] == pytest.approx(0, abs=1e-9) for line in of(lines_of(), "best_of_n"))


def test_greedy_answers_are_compared_without_a_best_of_them(place):
    figures = run(controls=None, strengths=[0.5], temperature=0.0)
    assert {f.control for f in figures} >= {"base", "prompting", "advantage"}
    assert not [f for f in figures if f.control == "best_of_n"]


def test_prompting_without_an_instruction_of_its_own_takes_that_of_all(place):
    figures = run(controls=["base", {"kind": "prompting", "instruction": None}], instruction="w50 w51")
    [kl] = [f.value for f in figures if (f.control, f.metric) == ("prompting", "kl_per_response")]
    assert kl > 0


def test_several_rewards_a_judge_and_columns_with_names_of_ours(place):
    (place / "odd.py").write_text(
        "def kl(completions, seconds, **columns):\n    return [len(c) + s for c, s in zip(completions, seconds)]\n"
        "def judge(completions, **columns):\n    return [1.0] * len(completions)\n"
        "def length(completions, **columns):\n    return [5.0] * len(completions)\n"
    )
    found = {
        (f.control, f.strength, f.metric): f.value for f in run(rewards=["odd:kl", "odd:judge"], judge="odd:length")
    }
    sys.modules.pop("odd", None)
    lines = of(lines_of(), "base")
    assert [line["reward kl"] for line in lines] == [len(line["completion"]) - 1 for line in lines]
    assert all(line["reward judge"] == 1 and line["judge"] == 5 and line["kl"] == 0 for line in lines)
    assert [line["reward"] for line in lines] == [line["reward kl"] + 1 for line in lines]
    assert found["base", None, "kl_per_token"] == 0 and found["base", None, "length"] <= 6
    assert found["advantage", 0.3, "ties"] == 1 and found["advantage", 0.3, "win_rate"] == 0.5


def test_rewards_that_leave_answers_out(place):
    figures = {(f.control, f.strength, f.metric): f for f in run(judge="mine:sevens", part_size=2)}
    lines = of(lines_of(), "base")
    known = [line for line in lines if line["judge"] is not None]
    assert 0 < len(known) < 12
    assert figures["base", None, "judge"].count == len(known)
    assert all(line["judge"] == line["completion"].count("7") for line in known)
    with pytest.raises(ValueError, match="No answer of any control has a number by 'judge'"):
        run(judge="mine:nothing")


def test_differences_to_a_best_of_n_are_to_the_best(place):
    figures = {(f.control, f.strength, f.metric): f for f in run(against="best_of_n")}
    base, pool = of(lines_of(), "base"), of(lines_of(), "best_of_n")
    best = {n: max(line["reward"] for line in pool if line["prompt_number"] == n) for n in range(12)}
    won = [
        (line["reward"] > best[line["prompt_number"]]) + 0.5 * (line["reward"] == best[line["prompt_number"]])
        for line in base
    ]
    assert figures["base", None, "win_rate"].value == pytest.approx(sum(won) / 12)
    assert figures["base", None, "reward"].difference == pytest.approx(
        sum(line["reward"] - best[line["prompt_number"]] for line in base) / 12
    )


# Resuming.


def test_a_run_that_is_killed_at_any_instant_resumes_to_the_same_files(place):
    arguments = write_file(place, part_size=2)
    assert command(arguments, place)[0] == 0
    whole = without_times("out")
    shutil.move("out", "whole")

    def parts():
        return len(list(place.glob("out/answers/*/part-*")))

    for reached in (1, 5, 9, 13):
        process = FreshProcess(RECONTROL, arguments, os.environ | ALONE, place)
        deadline = time.monotonic() + 100
        while parts() < reached and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "it had ended before it could be killed"
    code, _, err = command(arguments, place)
    assert code == 0, err
    assert without_times("out") == whole
    # Times are kept too: nothing is drawn or written anew by the same call again.
    before = {name: (place / "out" / name).read_bytes() for name in ("answers.parquet", "figures.csv", "frontier.svg")}
    assert command(arguments, place)[0] == 0
    assert before == {name: (place / "out" / name).read_bytes() for name in before}


@pytest.mark.parametrize("kind", ["answers", "scores"])
def test_answers_and_scores_that_are_not_those_that_were_written_are_refused(place, kind):
    run(controls=["base"])
    answers = next(iter(place.glob("out/answers/*/part-00000.parquet")))
    if kind == "answers":
        part, rows = answers, load_rollouts(answers)
        save_rollouts([replace(row, completion=row.completion + " indeed") for row in rows], part)
    else:
        part = next(iter(answers.parent.glob("*/part-00000.json")))
        part.write_text(part.read_text().replace("0", "1"))
    with pytest.raises(ValueError, match=rf"{part.name} was changed or damaged.*remove it and run the same command"):
        run(controls=["base"])
    part.unlink()
    run(controls=["base"])


def noted(name):
    path = Path(f"{name}.log")
    if not path.exists():
        return 0
    count = len(path.read_text().splitlines())
    path.unlink()
    return count


def test_what_comes_on_top_is_all_that_is_drawn_and_scored(place):
    mine = {"name": "mine", "kind": "mine:Drawn"}
    run(controls=["base", mine])
    assert noted("drawn") == 3 and noted("scored") == 6
    run(controls=["base", mine])
    assert noted("drawn") == noted("scored") == 0
    # Other names, another order, a judge: nothing is drawn; a control more: its parts alone.
    run(controls=[mine | {"name": "another/name $x$"}, "base"], judge="mine:brevity")
    assert noted("drawn") == noted("scored") == 0
    run(controls=["base", mine, {"name": "more", "kind": "best_of_n", "n": 2}])
    assert noted("drawn") == 0 and noted("scored") == 3
    run(controls=["base", mine], seed=1)
    assert noted("drawn") == 3


def test_other_code_of_a_users_rival_is_another_rival(place):
    mine = {"name": "mine", "kind": "mine:Says"}
    run(controls=["base", mine])
    text = (place / "mine.py").read_text()
    (place / "mine.py").write_text(text.replace("[self.what] *", "[self.what + ' w60'] *"))
    sys.modules.pop("mine")
    shutil.rmtree("__pycache__", ignore_errors=True)
    run(controls=["base", mine])
    assert {line["completion"] for line in of(lines_of(), "mine")} == {"w8 w9 w60"}


def test_another_head_or_chat_template_is_another_row(place):
    run()
    before = lines_of()
    head = ValueHead.from_pretrained("head")
    head.static_vector.data.mul_(-2)
    head.save_pretrained("head")
    run()
    assert of(lines_of(), "advantage", 0.6) != of(before, "advantage", 0.6)
    assert of(lines_of(), "base") == of(before, "base")
    template = (place / "base" / "chat_template.jinja").read_text()
    (place / "base" / "chat_template.jinja").write_text(template.replace("assistant", "w9 assistant"))
    run()
    assert len(of(lines_of(), "base")[0]["prompt_ids"]) == len(of(before, "base")[0]["prompt_ids"]) + 1


def test_two_processes_leave_what_one_leaves(place):
    arguments = write_file(place, kl=[0.05], num_held_out=4, controls=["base", "advantage", "best_of_n", "mine:Says"])
    assert command(arguments, place)[0] == 0
    shutil.move("out", "one")
    printed = run_two(arguments, place)
    assert printed.count("| control |") == 1
    assert without_times("out") == without_times("one")


# Rows.


def test_rows_that_are_the_same_share_answers_and_have_no_difference(place):
    twice = {"kind": "advantage", "strengths": [0.5, 0.5]}
    names = ["a b", "a-b", "../a/b", "日本", "x" * 400]
    figures = run(controls=["base", *({"name": name} | twice for name in names)])
    found = {(f.control, f.strength): f.value for f in figures if f.metric == "reward"}
    assert list(found) == [("base", None), *((name, 0.5) for name in names)]
    assert len(set(found.values())) == 2
    assert len(list((place / "out" / "answers").iterdir())) == 2


def test_strengths_at_a_kl_are_found_on_prompts_that_are_set_aside(place, recontrol_warnings):
    figures = run(kl=[0.05], num_held_out=4, controls=["base", "advantage", "static_vector"])
    about = json.loads((place / "out" / "figures.json").read_text())
    assert set(about["strengths"]) == {"advantage at KL 0.05", "static_vector at KL 0.05"}
    for match in about["strengths"].values():
        assert match["low"] <= match["kl"] <= match["high"]
        assert match["kl"] == pytest.approx(0.05, rel=0.1)
        assert match["strength"] in {f.strength for f in figures}
    assert {f.count for f in figures} == {8}
    [said] = recontrol_warnings
    assert "on 4 held-out prompts" in said


@pytest.mark.parametrize("others", [{"kl": [0.1]}, {"strengths": [0.5]}])
def test_a_control_can_have_a_kl_of_its_own(place, recontrol_warnings, others):
    own = {"kind": "advantage", "kl": 0.05}
    figures = run(num_held_out=4, controls=["base", own, "static_vector"], **others)
    about = json.loads((place / "out" / "figures.json").read_text())
    found = {"advantage at KL 0.05", *(f"static_vector at KL {kl:g}" for kl in others.get("kl", []))}
    assert set(about["strengths"]) == found
    assert {f.control for f in figures} == {"base", "advantage", "static_vector"}
    assert {f.count for f in figures} == {8}
    with pytest.raises(ValueError, match="'base' has no strength"):
        run(num_held_out=4, controls=[{"kind": "base", "kl": 1}])


def test_held_out_prompts_are_never_compared_on(place, recontrol_warnings):
    shared = [[{"role": "user", "content": text}] for text in ("w10 w11 ", "w80")]
    with pytest.raises(ValueError, match=r"1 held-out prompts are also compared on \(the first: row 0\)"):
        run(kl=[0.05], controls=["base", "advantage"], held_out=shared)
    # A prompt that stands twice is not on both sides.
    rows = [json.dumps({"prompt": f"w{10 + i % 6} w9"}) + "\n" for i in range(24)]
    (place / "prompts.jsonl").write_text("".join(rows))
    run(kl=[0.05], num_held_out=3, controls=["base", "advantage"])
    compared = {line["prompt"] for line in lines_of()}
    assert 0 < len(compared) < 6
    assert "prompts stand among those set aside too" in recontrol_warnings[-2]


def test_held_out_prompts_that_are_left_out_do_not_count(place, recontrol_warnings):
    held = [f"w{i} w{i} w{i % 7}" for i in range(10, 76)]
    remember(held[:3], "trained_on")
    run(kl=[0.05], controls=["base", "advantage"], held_out=held, on_seen_prompts="skip")
    assert "on 63 held-out prompts" in recontrol_warnings[-1]


def test_the_search_for_a_kl_stays_below_what_the_penalty_allows(place, recontrol_warnings):
    penalised = {"kind": "ascent", "l2": 0.5, "num_steps": 1}
    with pytest.raises(ValueError, match=r"No strength was found .* No strength above 1\.98 is allowed"):
        run(kl=[1e3], num_held_out=4, controls=["base", penalised])
    run(kl=[1e-3], num_held_out=4, controls=["base", penalised])
    [found] = json.loads((place / "out" / "figures.json").read_text())["strengths"].values()
    assert found["strength"] < 2


def test_prompts_are_set_aside_only_where_a_strength_is_searched_for(place):
    run(kl=[0.05], controls=["base", {"kind": "advantage", "strengths": [0.3]}, {"kind": "ascent", "step_size": 0.2}])
    assert {(line["control"], line["strength"]) for line in lines_of()} == {
        ("base", None),
        ("advantage", 0.3),
        ("ascent", 0.2),
    }
    assert len({line["prompt"] for line in lines_of()}) == 12
    run(head=None, controls=None, output="plain")
    assert len({line["prompt"] for line in lines_of("plain")}) == 12


def test_equal_prompts_tell_no_more_than_one(place):
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{10 + i % 4}"}) + "\n" for i in range(12)))
    run(controls=["base", {"kind": "advantage", "strengths": [0.5]}])
    assert all(f["count"] == "4" for f in figures_in())
    assert "4 of these prompts are different" in (place / "out" / "table.md").read_text()


def test_times_of_other_batch_sizes_are_said_not_to_be_comparable(place):
    said = "Times are not to be compared"
    run(controls=["base"], batch_size=2)
    assert said not in (place / "out" / "table.md").read_text()
    run(controls=["base", {"kind": "advantage", "strengths": [0.5]}], batch_size=4)
    assert said in (place / "out" / "table.md").read_text()


def test_a_recommendation_that_a_row_takes_over_stands_in_the_figures(place):
    head = ValueHead.from_pretrained("head")
    head.config.control = ControlConfig("advantage", step_size=0.5, plausibility=0.1)
    head.save_pretrained("head")
    run(controls=["base", "advantage"])
    about = json.loads((place / "out" / "figures.json").read_text())
    assert about["controls"][1]["depends_on"]["control"]["plausibility"] == 0.1


def test_what_learns_from_responses_is_not_compared_on_their_prompts(place, recontrol_warnings):
    model, tokenizer = load_base("base", CompareSettings())
    asked = load_prompts([f"w{i} w{i + 1}" for i in (10, 11, 40, 41)])
    write_rollouts(place / "r", model, tokenizer, asked, num_samples=4, max_new_tokens=6)
    label_rollouts(place / "r", [load_reward("mine:variety")])
    vector = {"kind": "steering_vector", "strengths": [0.5]}
    with pytest.raises(ValueError, match="2 of 12 prompts to compare on are among those that what 'steering_vector'"):
        run(controls=["base", vector], rollouts="r")
    assert not (place / "out" / "answers").exists()
    run(controls=["base", vector], rollouts="r", on_seen_prompts="skip")
    assert len({line["prompt"] for line in lines_of()}) == 10
    assert "these are left out" in recontrol_warnings[-1]


def remember(texts, kind):
    """The head says that it has seen these prompts."""
    head = ValueHead.from_pretrained("head")
    head.seen_prompts = SeenPrompts(**{kind: torch.tensor([prompt_hash(text) for text in texts])})
    head.save_pretrained("head")


@pytest.mark.parametrize("kind", SeenPrompts.kinds())
def test_prompts_that_the_head_has_seen_are_refused_left_out_or_taken_when_asked(place, recontrol_warnings, kind):
    small = {"controls": ["base"]}
    run(**small)
    assert "that these are unseen is not checked" in (place / "out" / "table.md").read_text()
    remember(["w12 w13", "w80", [{"role": "user", "content": " w15 w16"}]], kind)
    with pytest.raises(ValueError) as caught:
        run(**small)
    for said in (
        "2 of 12 prompts to compare on",
        f"prompts.jsonl, line 3 ({kind.replace('_', ' ')}): 'w12 w13'",
        "on_seen_prompts",
    ):
        assert said in str(caught.value)
    run(**small, on_seen_prompts="skip")
    assert {line["prompt_number"] for line in lines_of()} == set(range(12)) - {2, 5}
    # One that does not say what it was trained on says too little.
    assert ("not checked" in (place / "out" / "table.md").read_text()) == (kind != "trained_on")
    [said] = recontrol_warnings
    assert "2 of 12 prompts" in said and "left out" in said
    run(**small, on_seen_prompts="allow")
    assert len(lines_of()) == 12
    table = (place / "out" / "table.md").read_text()
    assert "2 of these prompts are among those that the head was trained, validated or tuned on" in table
    assert "2 of 12 prompts" in recontrol_warnings[-1] and "looks better than it is" in recontrol_warnings[-1]
    remember([f"w{i} w{i + 1}" for i in range(10, 22)], kind)
    with pytest.raises(ValueError, match=r"12 of 12 prompts .* none is left"):
        run(**small, on_seen_prompts="skip")


def rows_read_once():
    """The prompts of the file, as what can be read but once."""
    return (json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines())


@pytest.mark.parametrize("source", [lambda: "prompts.jsonl", lambda: list(rows_read_once()), rows_read_once])
def test_seen_prompts_that_are_skipped_count_for_no_limit_and_are_not_set_aside(place, recontrol_warnings, source):
    small = {"controls": ["base", "advantage"], "kl": [0.05], "num_held_out": 2}
    run(**small, limit=3)
    untouched = [line["completion"] for line in lines_of()]
    remember([f"w{i} w{i + 1}" for i in range(10, 16)], "trained_on")
    with pytest.raises(ValueError, match=r"of \d prompts to (compare|find strengths) on are among those"):
        run(**small, limit=3)
    # The file holds twelve, of which the first six are skipped.
    for limit, numbers in ((3, {6, 7, 8}), (6, {*range(6, 12)}), (100, {*range(6, 12)})):
        output = f"limit-{limit}"
        run(**small, limit=limit, on_seen_prompts="skip", prompts=source(), output=output)
        compared = {line["prompt_number"] for line in lines_of(output)}
        assert compared < numbers and len(compared) == len(numbers) - 2
    # Where none is seen it changes nothing.
    remember(["w80"], "trained_on")
    run(**small, limit=3, on_seen_prompts="skip", prompts=source(), output="skips-none")
    assert [line["completion"] for line in lines_of("skips-none")] == untouched


def test_an_endless_source_of_seen_prompts_is_not_read_for_ever(place, monkeypatch):
    monkeypatch.setattr("hf_recontrol.evaluation.unseen._MOST_READ", 50)
    remember(["w10 w11"], "trained_on")
    with pytest.raises(ValueError, match="none is left"):
        run(controls=["base"], limit=3, on_seen_prompts="skip", prompts=({"prompt": "w10 w11"} for _ in count()))


def test_the_limit_of_several_bases_counts_what_no_head_has_seen(place, recontrol_warnings):
    shutil.copytree("head", "second")
    remember([f"w{i} w{i + 1}" for i in range(10, 16)], "tuned_on")
    found = settings(controls=["base"])
    inputs = {name: found[name] for name in ("prompts", "rewards", "controls", "output")}
    both = CompareSettings(limit=4, on_seen_prompts="skip", max_new_tokens=6)
    compare_bases([], ["head", "second"], [], settings=both, **inputs)
    assert [{line["prompt_number"] for line in lines_of(f"out/{name}")} for name in ("head", "second")] == [
        {6, 7, 8, 9}
    ] * 2


@pytest.mark.parametrize(
    ("made", "call", "said"),
    [
        (["tuning.json"], run, r"a search for a control \(tuning.json\)"),
        (["table.md"], run, r"the table of several bases \(table.md\)"),
        (["figures.json", "table.md"], "bases", r"a comparison of one base \(figures.json\)"),
        (["tuning.json"], "bases", r"a search for a control \(tuning.json\)"),
    ],
)
def test_a_folder_of_another_command_is_refused_and_left_as_it_is(place, made, call, said):
    (place / "out").mkdir()
    for name in made:
        (place / "out" / name).write_text("theirs")
    inputs = {name: settings()[name] for name in ("prompts", "rewards", "controls", "output")}
    with pytest.raises(OSError, match=f"out holds {said}, .* name another `output`"):
        if call == "bases":
            compare_bases(["base"], ["head"], [], settings=CompareSettings(), **inputs)
        else:
            call()
    assert {path.name: path.read_text() for path in (place / "out").iterdir()} == dict.fromkeys(made, "theirs")


def test_a_loaded_model_s_head_says_what_it_has_seen_and_strengths_may_be_found_on_validated_prompts(
    place, recontrol_warnings
):
    remember(["w40", "w41"], "validated_on")
    found = run(kl=[0.05], held_out=["w40", "w41", "w42"], controls=["base", "advantage"])
    assert {figure.control for figure in found} == {"base", "advantage"}
    remember(["w40", "w10 w11"], "trained_on")
    with pytest.raises(ValueError, match="1 of 3 prompts to find strengths on"):
        run(kl=[0.05], held_out=["w40", "w41", "w42"], controls=["base", "advantage"], prompts=["w70", "w71"])
    model, tokenizer = load_base("base", CompareSettings(), ValueHead.from_pretrained("head"))
    with pytest.raises(ValueError, match="1 of 12 prompts to compare on"):
        run(base=model, head=None, tokenizer=tokenizer, controls=["base"])


def test_prompts_that_cannot_be_used_are_left_out_of_all_rows_alike(place, recontrol_warnings):
    rows = [json.dumps({"prompt": f"w{i} " * (58 if i == 12 else 50 if i == 14 else 2)}) + "\n" for i in range(10, 20)]
    (place / "prompts.jsonl").write_text("".join(rows))
    with pytest.raises(ValueError, match="room for 64"):
        run()
    with pytest.raises(ValueError, match="it has 5 tokens, `max_prompt_tokens` is 1"):
        run(max_prompt_tokens=1)
    instruction = {"kind": "prompting", "instruction": "w1 " * 12}
    run(on_bad_rows="skip", controls=["base", instruction, "advantage"])
    numbers = {
        control: [line["prompt_number"] for line in lines_of() if line["control"] == control]
        for control in ("base", "prompting", "advantage")
    }
    assert numbers["base"] == numbers["prompting"] == numbers["advantage"] == [0, 1, 3, 5, 6, 7, 8, 9]
    assert len(recontrol_warnings) == 2


@pytest.mark.parametrize(
    ("trained_at", "changes", "said"),
    [
        (0.9, {}, ["drawn at temperature 0.9, these are drawn at 1: ", "`temperature=0.9` (`--temperature 0.9`)"]),
        (0.9, {"quick": True, "temperature": 0.7}, ["drawn at temperature 0.9, these are drawn at 0.7: "]),
        (
            None,
            {"generation_config": GenerationConfig(do_sample=True, temperature=0.5)},
            ["temperature 1, ", "at 0.5: "],
        ),
        (0.9, {"temperature": 0.9}, None),
        (0.9, {"generation_config": GenerationConfig(do_sample=True, temperature=0.9)}, None),
        (None, {}, None),
        ("much", {}, None),
    ],
)
def test_another_temperature_than_that_of_the_training_is_told(place, recontrol_warnings, trained_at, changes, said):
    head = ValueHead.from_pretrained("head")
    # A generation config does not name what is at its default.
    sampling = {"do_sample": True} | ({} if trained_at is None else {"temperature": trained_at})
    head.config.training = TrainingRecord(sampling=sampling)
    head.save_pretrained("head")
    run(controls=["base", "advantage"], perplexity=False, **changes)
    if said is None:
        assert recontrol_warnings == []
    else:
        [found] = recontrol_warnings
        assert all(each in found for each in said)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0, "controls": ["base", "prompting", "advantage"]},
        {"stop_strings": ["w3"]},
        {"top_p": 0.8, "num_samples": 2},
        {"head": None, "controls": ["base", "prompting", "best_of_n"]},
        {"controls": ["base", {"kind": "ascent", "num_steps": 2}]},
    ],
    ids=["greedy", "stop strings", "top-p", "no head", "ascent"],
)
def test_ways_of_sampling(place, changes):
    if changes.get("head", "") is None:
        chats = [json.dumps({"prompt": [{"role": "user", "content": f"w{i}"}]}) + "\n" for i in (7, 8)]
        (place / "prompts.jsonl").write_text("".join(chats))
    strengths = {} if "head" in changes else {"strengths": [0.5]}
    figures = {(f.control, f.metric): f for f in run(**changes, **strengths)}
    assert figures["base", "kl_per_token"].value == 0
    lines = of(lines_of(), "base")
    if "stop_strings" in changes:
        ended = [line for line in lines if any(word.startswith("w3") for word in line["completion"].split())]
        assert not ended
        assert figures["base", "finished"].value == sum(line["finished"] for line in lines) / len(lines)
    sampled = {name: value for name, value in changes.items() if name not in ("controls", "head")}
    usual = {"max_new_tokens": 6} | ({"num_samples": 2} if "num_samples" in changes else {})
    assert [line["completion_ids"] for line in lines] == drawn_by_the_base(**usual | sampled)
    if sampled:
        assert drawn_by_the_base(**usual | sampled) != drawn_by_the_base(**usual)


def drawn_by_the_base(**changes):
    model, tokenizer = load_base("base", CompareSettings())
    rollouts = generate_rollouts(model, tokenizer, load_prompts("prompts.jsonl"), progress=no_progress, **changes)
    return [rollout.completion_ids for rollout in rollouts]


def test_a_beam_search(place):
    (place / "beams").mkdir()
    (place / "beams" / "generation_config.json").write_text(
        '{"num_beams": 3, "do_sample": false, "max_new_tokens": 5}'
    )
    run(generation_config="beams", max_new_tokens=None, controls=["base", "advantage"])
    assert len(lines_of()) == 24
    drawn = [line["completion_ids"] for line in of(lines_of(), "base")]
    assert drawn == drawn_by_the_base(generation_config="beams", max_new_tokens=None)


def test_a_head_on_a_middle_layer(place):
    shutil.rmtree("head")
    make_inputs(place, layer=0)
    figures = {(f.control, f.metric): f for f in run(controls=["base", {"kind": "ascent", "strengths": [0.5]}])}
    assert figures["ascent", "kl_per_response"].value > 0


# Rivals of a user's own.


def test_texts_alone_are_answers(place):
    run(controls=["base", {"name": "says", "kind": "mine:Says", "what": ""}, {"name": "s2", "kind": "mine:Says"}])
    said = of(lines_of(), "s2")
    assert all(line["completion"] == "w8 w9" and line["completion_ids"] == [8, 9] for line in said)
    assert all(line["kl"] is None and line["base"] > 0 for line in said)
    assert all(line["finished"] for line in said)
    assert {line["completion"] for line in of(lines_of(), "says")} == {""}
    assert not {f["metric"] for f in figures_in() if f["control"] == "s2"} & {"kl_per_token", "kl_per_response"}


def test_a_text_of_as_many_tokens_as_there_may_be_was_cut(place):
    long = {"name": "long", "kind": "mine:Says", "what": "w8 w9 w8 w9 w8 w9 w8"}
    figures = {(f.control, f.metric): f.value for f in run(controls=["base", long])}
    assert (figures["long", "finished"], figures["long", "truncated"]) == (0, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("short", "'wrong' returned 4, expected a list of 5 answers"),
        ("none", "'wrong' returned None, expected"),
        ("one_none", "'wrong' returned a NoneType among its answers"),
        ("text", "'wrong' returned 'text', expected"),
        ("reversed", "'wrong' returned as answer 0 one to another prompt"),
        ("raise", "'wrong' failed: KeyError: 'what it needs'"),
        ("kl", "'wrong' .* answer 0 .* `kl` must hold one number for each of its 6 tokens"),
        ("kl_nan", "'wrong' .* answer 0 .* `kl` must be a finite number, got nan"),
        ("no_text", "'wrong' .* answer 0 .* `completion` must be a text"),
        ("half_text", "'wrong' returned a text that is not UTF-8 as answer 0"),
        ("ids", "'wrong' .* answer 0 .* `completion_ids` must be token ids below"),
        ("set", "'wrong': its `depends_on` must return what JSON can hold"),
    ],
)
def test_what_a_rival_must_not_return(place, how, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        run(controls=["base", {"name": "wrong", "kind": "mine:Wrong", "how": how}])


# Several bases.


def test_several_bases_are_compared_in_folders_of_their_own(place):
    shutil.copytree("base", "other")
    controls = ["base", {"kind": "ascent", "strengths": [0.5]}]
    found = settings(base=["base", "other"], head=["head", "head"], controls=controls)
    (place / "compare.yaml").write_text(yaml.safe_dump(found))
    code, out, err = command(["compare", "--config", "compare.yaml"], place)
    assert code == 0, err
    assert (place / "out" / "table.md").read_text() in out
    for name in ("base", "other"):
        assert f"## {name}\n\n{(place / 'out' / name / 'table.md').read_text()}" in out
        assert [{**line, "base": name} for line in figures_in(f"out/{name}")] == [
            line for line in figures_in() if line["base"] == name
        ]
    assert list(figures_in()[0])[:4] == ["base", "control", "strength", "metric"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--head", "head"] * 3 + ["-m", "base"] * 2, "2 bases are given for 3"),
        (["--head", "head", "--head", "nowhere"], "nowhere"),
        (["-m", "base", "-m", "nowhere"], "nowhere"),
        (["-m", "base", "-m", "head"], "head is a value head, not a model"),
        (["-m", "base", "-m", "base"], "base is named twice"),
        (["--head", "head", "--head", "head", "--rollouts", "rollouts"], "1 folders of rollouts are given for 2"),
    ],
)
def test_several_bases_that_do_not_fit_are_refused_before_any_is_compared(place, more, said):
    found = {k: v for k, v in settings().items() if k not in ("base", "head")}
    (place / "compare.yaml").write_text(yaml.safe_dump(found))
    code, _, err = command(["compare", "--config", "compare.yaml", *more], place)
    assert code != 0
    assert said in err and "Traceback" not in err
    assert not (place / "out").exists()


def test_several_heads_are_compared_on_prompts_that_none_has_seen(place, recontrol_warnings):
    shutil.copytree("head", "second")
    remember(["w12 w13"], "trained_on")
    found = settings(controls=["base", "advantage"])
    inputs = {name: found[name] for name in ("prompts", "rewards", "controls", "output")}
    both = CompareSettings(strengths=(0.5,), on_seen_prompts="skip", max_new_tokens=6)
    compare_bases([], ["head", "second"], [], settings=both, **inputs)
    for name in ("head", "second"):
        assert {line["count"] for line in figures_in(f"out/{name}")} == {"11"}
    assert "not on the same prompts" not in (place / "out" / "table.md").read_text()


def test_sums_of_rewards_in_the_units_of_several_heads_are_said_to_be_so(place, recontrol_warnings):
    for name, deviation in (("one", 1.0), ("two", 2.0)):
        head = ValueHead.from_pretrained("head")
        head.config.reward_std = [deviation]
        head.save_pretrained(name)
    found = settings(controls=["base"], rewards=["mine:variety", "mine:brevity"])
    inputs = {name: found[name] for name in ("prompts", "rewards", "controls", "output")}
    compare_bases([], ["one", "two"], [], settings=CompareSettings(max_new_tokens=6), **inputs)
    assert "in each head's own units" in (place / "out" / "table.md").read_text()
    assert "in each head's own units" in recontrol_warnings[-1]


def test_folders_of_several_bases_never_share_a_name():
    assert folder_names(["x/a", "y/b"]) == ["a", "b"]
    assert folder_names(["x/a", "y/a", "z/a-1"]) == ["x-a", "y-a", "z-a-1"]
    assert folder_names(["/r/one/head", "/r/two/head"]) == ["one-head", "two-head"]
    assert folder_names(["x/a b", "x/a-b"]) == ["x-a-b-1", "x-a-b-2"]


# Refusals: before anything is drawn, in one line that names what is wrong.

REFUSED = {
    "no controls": ({"controls": []}, "`controls` must be a list with at least one control"),
    "a text": ({"controls": "base"}, "`controls` must be a list"),
    "no kind": ({"controls": ["base", {"name": "x"}]}, r"`controls\[1\]` must be an object with a `kind`"),
    "unknown kind": ({"controls": ["base", "magic"]}, "no control of the kind 'magic'"),
    "no module": ({"controls": ["base", "no_such:Thing"]}, "'no_such:Thing' cannot be imported"),
    "no rival": ({"controls": ["base", "mine:variety"]}, "no class that derives from `hf_recontrol.Rival`"),
    "unknown setting": ({"controls": ["base", {"kind": "advantage", "stepsize": 1}]}, "'advantage' .*stepsize"),
    "another method": ({"controls": ["base", {"kind": "advantage", "method": "ascent"}]}, "no setting 'method'"),
    "n of a text": ({"controls": ["base", {"kind": "best_of_n", "n": "4"}]}, "`n` must be an integer"),
    "greedy pool": ({"temperature": 0.0}, "'best_of_n' cannot be used: 3 samples of a prompt would be the same"),
    "twice": ({"controls": ["base", "base"]}, "Two controls have the name 'base'"),
    "name": ({"controls": ["base", {"kind": "base", "name": "a\nb"}]}, "`name` must be a text on one line"),
    "NaN": ({"controls": ["base", {"kind": "advantage", "strengths": [float("nan")]}]}, "strengths.* finite number"),
    "strengths and kl": ({"controls": ["base", {"kind": "advantage", "strengths": 1, "kl": 1}]}, "use one of them"),
    "odd kl": ({"controls": ["base", {"kind": "advantage", "kl": "much"}]}, "'advantage': `kl` must be a list of num"),
    "no strength": ({"controls": [{"kind": "base", "strengths": [1]}]}, "'base' has no strength"),
    "against": ({"against": "nobody"}, "`against` names the control 'nobody', which is not among"),
    "kind and against": ({"controls": ["statc"]}, "no control of the kind 'statc'"),
    "against several": ({"against": "advantage"}, "`against` names 'advantage', which has 2 strengths"),
    "both": ({"kl": [0.1], "strengths": [1.0]}, "`strengths` and `kl`"),
    "few": ({"kl": [0.1], "controls": ["base", "advantage"]}, "There are 12 prompts, and 64 are to be set aside"),
    "role": ({"controls": ["base", {"kind": "prompting", "instruction_role": "boss"}]}, r"\[1\].instruction_role"),
    "no reward": ({"rewards": []}, "No reward is given"),
    "odd reward": ({"rewards": None}, "Rewards must be functions or their names, got None"),
    "odd judge": ({"judge": 3}, "`judge` must be a function, its name"),
    "no module's name": ({"controls": ["base", ":Thing"]}, "':Thing' cannot be imported"),
    "judge": ({"judge": "mine:variety"}, "The judge is also one of the rewards"),
    "judge by another name": (
        {"rewards": "mine:brevity", "judge": "mine:shortness"},
        "The judge is also one of the rewards",
    ),
    "a column": ({"rewards": ["mine:variety", "kl"]}, "The column 'kl' holds one number for a prompt"),
    "a column as judge": ({"judge": "column:seconds"}, "The column 'seconds' holds one number for a prompt"),
    "several bases": ({"base": ["base", "base"]}, "`base` must be one folder or Hub name, .* call this for each"),
    "several heads": ({"head": ("head", "head")}, "`head` must be one folder or Hub name"),
    "several folders": ({"rollouts": ["r", "s"]}, "`rollouts` must be one folder or Hub name"),
    "failing judge": ({"judge": "mine:fails"}, "The reward fails failed: KeyError"),
    "two strengths": (
        {"controls": ["base", {"kind": "advantage", "step_size": 1, "kl": 0.1}]},
        "`step_size` is its strength, so leave out `strengths` and `kl`",
    ),
    "failing reward": ({"rewards": "mine:fails"}, "The reward fails failed: KeyError"),
    "penalty": (
        {"controls": ["base", {"kind": "ascent", "l2": 0.5, "strengths": [1, 3]}]},
        "'ascent' cannot be used: `step_size \\* l2` must be below 1",
    ),
    "what changes nothing": (
        {"controls": ["base", {"kind": "advantage", "num_steps": 5, "strengths": 1}]},
        "'advantage' cannot be used: `num_steps` is for `method='ascent'`, and this is 'advantage'",
    ),
    "no prompts for a search": (
        {"controls": ["base", {"kind": "mine:Starts", "kl": 0.1}]},
        "to find the strength of 'mine:Starts' on. .* `start` must stand in the class",
    ),
    "no part": ({"controls": ["base", "ascent"], "strengths": []}, "How strong is the control 'ascent'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_is_drawn(place, case):
    changes, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("out")


def test_a_control_of_the_head_needs_one(place):
    with pytest.raises(ValueError, match="needs a value head: name it"):
        run(head=None)


def test_an_instruction_has_no_place_in_a_formatted_text(place):
    (place / "prompts.jsonl").write_text('{"prompt": "user w10 <end> assistant"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 1: the prompt is in the model's own format"):
        run()


def test_a_template_without_a_systems_turn_takes_the_instruction_in_the_users(place):
    path = place / "base" / "chat_template.jinja"
    path.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + path.read_text()
    )
    with pytest.raises(ValueError, match="no system role"):
        run()
    assert not os.path.exists("out")
    user = {"kind": "prompting", "instruction": "w50", "instruction_role": "user"}
    run(controls=["base", user])


def test_a_template_that_leaves_the_instruction_out_is_refused(place, recontrol_warnings):
    path = place / "base" / "chat_template.jinja"
    path.write_text(
        path.read_text()
        .replace("{{ message['role'] }}", "{% if message['role'] != 'system' %}{{ message['role'] }}")
        .replace("<end> {% endfor %}", "<end> {% endif %}{% endfor %}")
    )
    with pytest.raises(ValueError, match=r"'prompting' does not reach the model: .* `instruction_role: user`"):
        run()
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("controlls: [base]\n", "did you mean 'controls'"),
        ("reward: mine:variety\n", "did you mean 'rewards'"),
        ("controls: {kind: base}\n", "controls"),
        ("strengths: much\n", "strengths"),
        ("against: 3\n", "against"),
        ("prompts: [a\n", "YAML"),
        ("output: x\noutput: y\n", "output"),
    ],
)
def test_mistakes_in_the_file_are_told_in_one_line(place, text, said):
    name = text.partition(":")[0]
    write_file(place)
    kept = [line for line in settings().items() if line[0] != name]
    (place / "compare.yaml").write_text(yaml.safe_dump(dict(kept)) + text)
    code, _, err = command(["compare", "--config", "compare.yaml"], place)
    assert code != 0
    assert said in err and "Traceback" not in err
