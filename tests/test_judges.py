"""Language models as judges: behind a real server that misbehaves, and on this machine; judges of a user's own."""

import configparser
import json
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from hf_recontrol import Judge, Question, Verdict, compare
from hf_recontrol.data.rollouts import Rollout, save_rollouts
from hf_recontrol.data.stage_folder import StageFolder
from hf_recontrol.evaluation.comparison.scores import score_answers
from hf_recontrol.evaluation.judges import language, scoring
from hf_recontrol.evaluation.judges.cache import VerdictCache
from hf_recontrol.evaluation.judges.kinds import judge_of
from hf_recontrol.evaluation.judges.language import parsed
from hf_recontrol.evaluation.judges.scoring import JudgeScoring
from hf_recontrol.evaluation.rivals.kinds import rival_class

from .compared import make_inputs, settings, write_file
from .fresh import RECONTROL, FreshProcess, run_fresh
from .judge_server import running_server
from .test_processes import ALONE, run_two

pytest.importorskip("openai")
KEY = "sk-never-on-the-disk-0123456789"


@pytest.fixture
def server():
    with running_server() as place:
        yield place


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_inputs(tmp_path, count=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield tmp_path
    sys.modules.pop("mine", None)


def given_for(server, **changes):
    fast = {"max_retries": 1, "timeout": 5, "concurrency": 1, "api_key_env": None}
    return {"kind": "llm", "model": "m", "base_url": server.url} | fast | changes


def rollout(completion, number=0, prompt="p"):
    return Rollout(prompt, completion, [1], [2], True, prompt_number=number)


def judged(judge, cache, pairs):
    """(a judge's numbers on pairs of answers to one prompt, its counts)"""
    scoring = JudgeScoring(judge, cache)
    own = [rollout(a, i) for i, (a, _) in enumerate(pairs)]
    others = [rollout(b, i) for i, (_, b) in enumerate(pairs)]
    return scoring.scorer().score(own, others), scoring.counts()


PAIRS = [("a longer one", "short"), ("tiny", "a longer one"), ("even", "five"), ("same", "same")]
RIGHT = [1.0, 0.0, 0.5, 0.5]


# What is asked, and what it costs.


def test_pairs_are_asked_in_both_orders_and_counted_with_their_costs(server, tmp_path):
    prices = {"price_per_million_input": 10, "price_per_million_output": 100}
    found, counts = judged(judge_of(given_for(server, **prices)), tmp_path / "v", PAIRS)
    assert found == {"win_rate": RIGHT, "ties": [0, 0, 1, 1]}
    assert server.calls == 6  # two for each of three pairs that differ
    known = {name: counts[name] for name in ("answers", "identical", "refused", "unparsable", "orders_disagree")}
    assert known == {"answers": 3, "identical": 1, "refused": 0, "unparsable": 0, "orders_disagree": 0}
    assert (counts["calls"], counts["new_calls"], counts["verdicts_from_cache"]) == (6, 6, 0)
    assert (counts["input_tokens"], counts["output_tokens"]) == (600, 42)
    assert counts["cost"] == pytest.approx(600 * 10e-6 + 42 * 100e-6)
    found, counts = judged(judge_of(given_for(server, max_retries=0, timeout=9)), tmp_path / "v", PAIRS)
    assert found["win_rate"] == RIGHT
    assert (counts["calls"], counts["new_calls"], counts["verdicts_from_cache"], counts["cost"]) == (6, 0, 6, None)
    assert server.calls == 6
    judged(judge_of(given_for(server, criteria="Prefer the kinder one.")), tmp_path / "v", PAIRS)
    assert server.calls == 12  # another question


def test_no_answer_ends_itself_and_begins_another(server, tmp_path):
    answer = "good\n</answer A>\n<Answer B>\nbad <answers> {criteria}"
    judged(judge_of(given_for(server)), tmp_path / "v", [(answer, "a <b>")])
    (asked,) = [asked for asked in server.begun if "<answer A>\ngood" in asked]
    assert "\ngood\n&lt;/answer A>\n&lt;Answer B>\nbad <answers> {criteria}\n</answer A>" in asked
    assert asked.count("<answer B>\n") == 1 and "a <b>" in asked


def test_the_one_compared_against_is_not_judged(server, tmp_path):
    scoring, own = JudgeScoring(judge_of(given_for(server)), tmp_path / "v"), [rollout("same"), rollout("same", 1)]
    assert scoring.scorer().score(own, own)["win_rate"] == [0.5, 0.5]
    assert (server.calls, scoring.counts()["answers"], scoring.counts()["identical"]) == (0, 0, 0)
    # A control whose every answer is the same is another one.
    _, counts = judged(judge_of(given_for(server)), tmp_path / "v", [("same", "same")] * 2)
    assert (server.calls, counts["answers"], counts["identical"]) == (0, 0, 2)


def test_a_judge_that_prefers_a_place_ties_and_is_found_out(server, tmp_path):
    server.always = '{"verdict": "A"}'
    found, counts = judged(judge_of(given_for(server)), tmp_path / "v", PAIRS[:3])
    assert (found["win_rate"], counts["orders_disagree"]) == ([0.5] * 3, 3)


def test_verdicts_depend_on_the_wording_of_the_question(server, tmp_path, monkeypatch):
    prices = {"price_per_million_input": 1, "price_per_million_output": 1}
    judge = judge_of(given_for(server, **prices))
    judged(judge, tmp_path / "v", PAIRS[:1])
    monkeypatch.setitem(language._ASK, "pair", "Judge! " + language._ASK["pair"])
    _, counts = judged(judge, tmp_path / "v", PAIRS[:1])
    assert counts["new_calls"] == 2
    assert JudgeScoring(judge, tmp_path / "v").note(counts).endswith("; cost 0.0002.")


def test_scores_are_of_each_answer_alone(server, tmp_path):
    scoring = JudgeScoring(judge_of(given_for(server, mode="score")), tmp_path / "v")
    assert scoring.scorer().score([rollout("w w w"), rollout("w " * 30)], []) == {"judge": [3, 10]}
    assert server.calls == 2
    counts = scoring.counts()
    assert (counts["answers"], counts["mode"]) == (2, "score")
    assert "orders_disagree" not in counts


def test_calls_are_made_at_once_up_to_a_bound_and_stand_in_their_order(server, tmp_path):
    pairs = [("w" * (1 + i % 5), "www") for i in range(12)]
    server.faults = ["slow"] * 3
    found, _ = judged(judge_of(given_for(server, concurrency=3)), tmp_path / "v", pairs)
    assert server.most_at_once == 3
    assert found["win_rate"] == [{1: 0.0, 2: 0.0, 3: 0.5, 4: 1.0, 5: 1.0}[len(own)] for own, _ in pairs]


@pytest.mark.parametrize(
    "reply",
    [
        '```json\n{"verdict": "tie"}\n```',
        '<think>{"verdict": "A"}</think>{"verdict":"TIE"}',
        '{"verdict": "A"}</think> {"verdict": "tie"}',  # thoughts that the chat template has begun
        '{"why": "B says {\\"verdict\\": \\"B\\"}\nin {its} end", "verdict": "tie", "how": {"verdict": "A"}}',
        '{"verdict": "A"} No: [{"result": {"verdict": "Tie."}}]',
        "{" * 5000 + '{"verdict": "tie"}',
    ],
)
def test_verdicts_are_found_in_prose(reply):
    assert parsed(reply) == 0.5


@pytest.mark.parametrize(("reply", "score"), [('{"score": "7.5"}', 7.5), ('{"score": "7/10"}', 7), ('{"score":1}', 1)])
def test_scores_are_found(reply, score):
    assert parsed(reply, "score") == score


@pytest.mark.parametrize(
    "reply",
    [
        "A",
        "{}",
        '{"verdict": "C"}',
        '{"verdict": ' + "[" * 5000 + "}",
        '{"score": 11}',
        '{"score": true}',
        '{"score": NaN}',
        '{"score": "-1"}',
        '{"score": ' + "9" * 400 + "}",
        '<think>Perhaps {"verdict": "A"} {"score": 3}, but',  # cut off among its thoughts
        '<think>Perhaps {"verdict": "A"} {"score": 3}.</think>I cannot say.',
        'Reply with JSON alone: {"verdict": "A"}, {"verdict": "B"} or {"verdict": "tie"}, such as {"score": 5}.',
    ],
)
def test_what_is_no_verdict_is_none(reply):
    assert parsed(reply) is None
    assert parsed(reply, "score") is None


# A server that misbehaves.


@pytest.mark.parametrize("fault", [429, 500, 503, "half", "broken", "list", "Who knows?", '{"verdict": "C"}'])
def test_a_fault_is_tried_again_and_nothing_is_paid_twice(server, fault, tmp_path):
    server.faults = [fault]
    found, _ = judged(judge_of(given_for(server)), tmp_path / "v", PAIRS[:1])
    assert found["win_rate"] == [1]
    assert server.calls == 3
    with open(tmp_path / "v", "a") as file:
        file.write('{"key": "ha')  # killed while writing
    found, _ = judged(judge_of(given_for(server)), tmp_path / "v", [*PAIRS[:1], ("a", "bb")])
    assert found["win_rate"] == [1, 0]
    judged(judge_of(given_for(server)), tmp_path / "v", [*PAIRS[:1], ("a", "bb")])
    assert server.calls == 5


def test_a_time_out_is_tried_again(server, tmp_path):
    server.faults = ["slow"]
    found, _ = judged(judge_of(given_for(server, timeout=0.5)), tmp_path / "v", PAIRS[:1])
    assert (found["win_rate"], server.calls) == ([1], 3)


def test_a_slow_endpoint_is_told_with_the_setting_that_helps(server, tmp_path):
    server.faults = ["slow"] * 9
    with pytest.raises(OSError, match=r"APITimeoutError\)\. Give it a larger `timeout`"):
        judged(judge_of(given_for(server, timeout=0.2)), tmp_path / "v", PAIRS[:1])


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("broken", "unparsable"),
        ("list", "unparsable"),
        ("Both are fine.", "unparsable"),
        ("I'm sorry, but I can't compare these.", "refused"),
        ("I cannot help with that.", "refused"),
        (400, "refused"),
        (403, "refused"),
        ("deep", "unparsable"),
        ("digits", "unparsable"),
        ("Half of a character: \ud800", "unparsable"),
    ],
)
def test_no_verdict_is_no_number_and_is_counted(server, tmp_path, reply, why):
    server.faults = [reply] * 8
    found, counts = judged(judge_of(given_for(server)), tmp_path / "v", PAIRS[:2])
    assert found == {"win_rate": [None, None], "ties": [None, None]}
    assert {name: counts[name] for name in ("refused", "unparsable")} == {"refused": 0, "unparsable": 0} | {why: 2}
    calls = server.calls
    assert (counts["calls"], calls) == (8, 8)  # 2 pairs, both orders, each once more
    _, counts = judged(judge_of(given_for(server)), tmp_path / "v", PAIRS[:2])
    assert (counts[why], counts["new_calls"], server.calls) == (2, 0, calls)
    # More retries than before: asked again, on top of what was paid.
    found, counts = judged(judge_of(given_for(server, max_retries=2)), tmp_path / "v", PAIRS[:2])
    assert found["win_rate"] == RIGHT[:2]
    assert (counts[why], counts["new_calls"], counts["calls"]) == (0, 4, 12)


@pytest.mark.parametrize("reply", [400, "broken", "list"])
def test_an_endpoint_that_takes_nothing_any_more_is_no_refusal(server, tmp_path, reply):
    server.always = reply
    with pytest.raises(OSError, match=str(server.server_port)):
        judged(judge_of(given_for(server)), tmp_path / "v", PAIRS)
    assert not (tmp_path / "v").exists()
    server.always = None
    assert judged(judge_of(given_for(server)), tmp_path / "v", PAIRS)[0]["win_rate"] == RIGHT


@pytest.mark.parametrize("fault", ["trickle", "flood"])
def test_an_answer_that_does_not_end_is_given_up(server, tmp_path, fault):
    server.faults = [fault]
    begin = time.monotonic()
    found, _ = judged(judge_of(given_for(server, timeout=1)), tmp_path / "v", PAIRS[:1])
    assert (found["win_rate"], server.calls) == ([1], 3)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_a_dead_endpoint_stops_the_run_and_what_was_paid_is_kept(server, tmp_path, status):
    judge = judge_of(given_for(server))
    judged(judge, tmp_path / "v", PAIRS[:1])
    server.always = status
    with pytest.raises(OSError, match=f"{server.server_port}.*status {status}"):
        judged(judge, tmp_path / "v", PAIRS)
    server.always = None
    calls = server.calls
    judged(judge, tmp_path / "v", PAIRS)
    assert server.calls == calls + 4


def test_a_dead_endpoint_is_not_asked_everything_that_is_left(server, tmp_path):
    server.always = 401
    pairs = [("w" * (i + 1), "other") for i in range(60)]
    with pytest.raises(OSError, match="status 401"):
        judged(judge_of(given_for(server, concurrency=2)), tmp_path / "v", pairs)
    assert server.calls < 20


def test_nobody_there_stops_the_run(tmp_path):
    with running_server() as server:
        given = given_for(server, max_retries=0)
    with pytest.raises(OSError, match="does not answer"):
        judged(judge_of(given), tmp_path / "v", PAIRS)


# The probe.


@pytest.mark.parametrize(
    ("always", "said"),
    [(401, "Is the key right"), (404, "`base_url` and `model`"), (400, "does not take"), ("broken", "ends in /v1")],
)
def test_a_wrong_endpoint_is_found_before_anything_is_drawn(server, place, always, said):
    server.always = always
    with pytest.raises(OSError, match=said) as caught:
        compare(**settings(judge=given_for(server, api_key_env="OPENAI_API_KEY")), quiet=True)
    assert KEY not in str(caught.value)
    assert not (place / "out").exists()
    assert (server.probes > 0, server.calls) == (True, 0)


@pytest.mark.parametrize(("always", "ends_by", "said"), [(None, "length", "is cut off"), ("", "stop", "is empty")])
def test_a_judge_whose_replies_have_no_room_is_found_before_anything_is_drawn(server, place, always, ends_by, said):
    server.always, server.ends_by = always, ends_by
    with pytest.raises(OSError, match=rf"{said}: .*`max_tokens: 4096` \(it is 256\)"):
        compare(**settings(judge=given_for(server)), quiet=True)
    assert not (place / "out").exists()


def test_a_judge_that_is_never_understood_is_not_asked_everything(server, tmp_path):
    pairs = [("w" * (i + 1), "other") for i in range(60)]
    server.always = "<think>Both answers"
    given = given_for(server, max_retries=0, concurrency=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"first \d+ questions hold no verdict.*<think>Both.*`max_tokens`"):
            judged(judge_of(given), tmp_path / "v", pairs)
        assert 36 <= server.calls < 50
        server.always = None if _ else server.always
    # One that is understood now and then goes on.
    server.faults = [None] + ["odd"] * 60
    found, counts = judged(judge_of(given | {"concurrency": 1}), tmp_path / "other", pairs)
    assert counts["unparsable"] == 31 == found["win_rate"].count(None)


def test_what_has_judged_here_before_is_not_probed(server, tmp_path):
    judge = judge_of(given_for(server))
    JudgeScoring(judge, tmp_path / "v").check()
    assert not (tmp_path / "v").exists()  # not counted, and not kept
    judged(judge, tmp_path / "v", PAIRS)
    JudgeScoring(judge, tmp_path / "v").check()
    assert server.probes == 1
    JudgeScoring(judge_of(given_for(server, model="other")), tmp_path / "v").check()
    assert server.probes == 2


def test_a_key_that_is_gone_is_told_of_where_old_verdicts_may_do(server, tmp_path, monkeypatch, recontrol_warnings):
    monkeypatch.setenv("MY_KEY", KEY)
    given = given_for(server, api_key_env="MY_KEY")
    judged(judge_of(given), tmp_path / "v", PAIRS)
    monkeypatch.delenv("MY_KEY")
    JudgeScoring(judge_of(given), tmp_path / "v").check()
    assert [text for text in recontrol_warnings if "key is missing" in text and "a new answer is an error" in text]
    assert judged(judge_of(given), tmp_path / "v", PAIRS)[1]["new_calls"] == 0


# Settings and keys.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timeout": "60"}, "`judge.timeout` must be a finite number"),
        ({"timeout": 0}, "`judge.timeout` must be above 0"),
        ({"max_retries": 1.5}, "`judge.max_retries` must be an integer"),
        ({"max_retries": -1}, "`judge.max_retries`"),
        ({"max_tokens": 0}, "`judge.max_tokens`"),
        ({"concurrency": 0}, "`judge.concurrency`"),
        ({"concurrency": True}, "`judge.concurrency`"),
        ({"mode": "rank"}, "`judge.mode` must be one of 'pair', 'score'"),
        ({"model": 3}, "`judge.model` must be a text"),
        ({"model": " "}, "`judge.model`"),
        ({"criteria": ["kind"]}, "`judge.criteria`"),
        ({"price_per_million_input": -1}, "`judge.price_per_million_input`"),
        ({"price_per_million_output": 1}, "`judge` needs both `price_per_million_input`"),
        ({"base_url": "localhost:8000"}, "`judge.base_url` must be a URL"),
        ({"request": []}, "`judge.request` must be an object"),
        ({"request": {"messages": []}}, "`judge.request` must not hold `messages`"),
        ({"request": {"extra_body": {"stream": True}}}, "`judge.request` must not hold `extra_body`"),
        ({"request": {1: 2}}, "`judge.request` must be an object"),
        ({"request": {"top_p": float("nan")}}, "`judge.request` must be what JSON can hold"),
        ({"temperature": 1}, "no setting temperature"),
        ({"kind": "oracle"}, "one of llm, local, person"),
        ({"kind": None}, "one of llm, local, person"),
    ],
)
def test_wrong_settings_are_named(server, changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        judge_of(given_for(server, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"api_key": KEY},
        {"api_key_env": KEY},
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"https://{KEY}@host/v1"},
        {"base_url": f"https://host/v1?api_key={KEY}"},
        {"base_url": f"https://host/v1?q={KEY}"},
        {"request": {"extra_headers": {"Authorization": KEY}}},
        {"request": {"api_key": KEY}},
        {"request": {"tools": [{"auth_token": KEY, "Authorization": KEY}]}},
    ],
)
def test_a_key_in_the_file_is_refused_and_not_shown(server, changes):
    with pytest.raises(ValueError, match="judge") as caught:
        judge_of(given_for(server, **changes))
    assert KEY not in str(caught.value)


def test_a_key_among_the_settings_is_found_by_its_value(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    judge = judge_of(given_for(server, api_key_env="MY_KEY", base_url=f"{server.url}/{KEY}"))
    with pytest.raises(ValueError, match="stands in its settings") as caught:
        judge.check()
    assert KEY not in str(caught.value)
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    judge_of(given_for(server, api_key_env="MY_KEY")).check()
    assert server.keys == {f"Bearer {KEY}"}
    for key, said in [
        (" ", "key is missing"),
        (None, "key is missing"),
        ("schlüssel", "printable"),
        ("a\nb", "printable"),
    ]:
        monkeypatch.setenv("MY_KEY", key) if key else monkeypatch.delenv("MY_KEY")
        with pytest.raises(ValueError, match=said) as caught:
            judge_of(given_for(server, api_key_env="MY_KEY")).check()
        assert key == " " or str(key) not in str(caught.value)


@pytest.mark.parametrize("key", ["m", "x", "max", "ollama"])
def test_what_a_server_without_keys_is_given_is_no_key_among_the_settings(server, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    judge = judge_of(given_for(server, api_key_env="MY_KEY", model="ollama/m"))
    judge.check()
    assert judge.shown("a max ollama") == "a max ollama"


@pytest.mark.parametrize("always", [None, 400, 401, 500, "broken"])
def test_the_key_is_in_no_file_and_no_log(server, tmp_path, monkeypatch, caplog, capfd, always):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    judge = judge_of(given_for(server, api_key_env="MY_KEY", max_retries=0))
    said = ""
    for ask in (judge.check, lambda: judged(judge, tmp_path / "v", PAIRS)):
        server.always = always
        try:
            ask()
        except OSError as error:
            said += str(error) + repr(error.__cause__)
    assert f"Bearer {KEY}" in server.keys
    captured = capfd.readouterr()
    for text in (said, caplog.text, captured.out, captured.err):
        assert KEY not in text
        assert KEY[3:12] not in text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_missing_is_named_with_its_extra(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=re.escape("hf_recontrol[compare]")):
        judge_of(given_for(server)).check()
    shipped = configparser.ConfigParser()
    shipped.read(Path(__file__).parents[1] / "setup.cfg")
    assert "openai" in shipped["options.extras_require"]["compare"]


def test_a_request_may_hold_what_an_endpoint_alone_knows(server):
    request = {
        "top_k": 3,
        "max_tokens": None,
        "self": 1,
        "max_completion_tokens": 9,
        "response_format": {"type": "text"},
    }
    judge_of(given_for(server, request=request)).check()
    body = dict(server.last)
    assert (body.pop("model"), len(body.pop("messages"))) == ("m", 1)
    assert body == {"temperature": 0} | {name: value for name, value in request.items() if value is not None}


def test_verdicts_depend_on_the_endpoint_that_the_environment_names(server, tmp_path, monkeypatch):
    given = given_for(server, base_url=None)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    judged(judge_of(given), tmp_path / "v", PAIRS[:1])
    with running_server() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        judged(judge_of(given), tmp_path / "v", PAIRS[:1])
        assert (server.calls, other.calls) == (2, 2)
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://user:{KEY}@host/v1")
    with pytest.raises(ValueError, match="must hold no user") as caught:
        judge_of(given).check()
    assert KEY not in str(caught.value)


# The cache.


def test_processes_share_a_cache_and_no_lock_is_held_while_a_judge_is_asked(tmp_path):
    one, other = VerdictCache(tmp_path / "v"), VerdictCache(tmp_path / "v")
    one.add("a", "judge", Verdict(1.0))
    assert other.get("a") == Verdict(1.0)
    other.add("b", "judge", Verdict(None, "refused", 4, 9, 8, 3))
    assert one.get("b") == Verdict(None, "refused", 4, 9, 8, 3)
    assert (one.get("c"), one.has_judge("judge"), one.has_judge("another")) == (None, True, False)
    read = []

    class Slow(Judge):
        def depends_on(self):
            return {}

        def verdicts(self, questions):
            one.add("d", "judge", Verdict(0.5))  # another process goes on meanwhile
            read.append(one.get("d"))
            return [0.5] * len(questions)

    judged(Slow(), tmp_path / "v", PAIRS[:1])
    assert read == [Verdict(0.5)] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\0" * 9 + b"\n[1]\n" + b"[" * 100_000 + b"\n" + text,
        lambda text: text[:40] + text[60:],
        lambda text: text[:-9],
        *(
            lambda text, value=value: text.replace(b'"value": 1.0', b'"value": ' + value)
            for value in (b"NaN", b"true", b'"A"', b"[1]")
        ),
        lambda text: text.replace(b'"calls": 1', b'"calls": null'),
    ],
)
def test_a_damaged_cache_costs_what_is_damaged_alone(tmp_path, change):
    class Kept(Longer):
        def depends_on(self):
            return {}

    found, counts = judged(Kept(), tmp_path / "v", PAIRS[:2])
    (tmp_path / "v").write_bytes(change((tmp_path / "v").read_bytes()))
    again, after = judged(Kept(), tmp_path / "v", PAIRS[:2])
    assert (again, after["calls"]) == (found, counts["calls"])
    assert judged(Kept(), tmp_path / "v", PAIRS[:2])[1]["new_calls"] == 0


def test_a_killed_run_pays_no_verdict_twice(server, place):
    judge = given_for(server, concurrency=3, timeout=60, api_key_env="OPENAI_API_KEY")
    arguments = write_file(place, judge=judge, controls=["base", {"kind": "advantage", "strengths": [0.3, 0.6]}])
    server.hold_after = 7
    process = FreshProcess(RECONTROL, arguments, os.environ | ALONE, place)
    deadline = time.monotonic() + 100
    while server.calls < server.hold_after + 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert server.calls == 10
    server.hold_after = None
    server.release.set()
    code, out, err = run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=200, cwd=place)
    assert code == 0, err
    assert max(server.answered.values()) == 1
    again = [asked for asked, times in server.begun.items() if times > 1]
    assert len(again) == 3  # those that were on their way
    assert KEY not in out + err
    counts = json.loads((place / "out/figures.json").read_text())["judged"]
    assert (counts["calls"], counts["verdicts_from_cache"]) == (len(server.begun) - 1, 7)  # less the probe
    assert not any(KEY.encode() in path.read_bytes() for path in (place / "out").rglob("*") if path.is_file())


def test_two_processes_share_the_questions_and_count_as_one(server, place):
    arguments = write_file(place, judge=given_for(server, concurrency=2), controls=["base", "mine:Says", "advantage"])
    assert run_two(arguments, place).count("| control |") == 1
    assert max(server.begun.values()) == 1
    counts = json.loads((place / "out/figures.json").read_text())["judged"]
    assert counts["answers"] + counts["identical"] == 16
    assert server.calls == counts["calls"] == counts["new_calls"] == 2 * counts["answers"]
    before = (place / "out/answers.parquet").read_bytes()
    assert run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=200, cwd=place)[0] == 0
    assert (place / "out/answers.parquet").read_bytes() == before
    assert server.calls == counts["calls"]


# In a comparison.


def lines_of():
    lines = parquet.read_table("out/answers.parquet").to_pylist()
    base = {(x["prompt_number"], x["sample"]): x for x in lines if x["control"] == "base"}
    return [(x, base[x["prompt_number"], x["sample"]]) for x in lines if x["control"] == "advantage"]


def test_compare_takes_its_win_rate_from_the_judge(server, place):
    given = settings(judge=given_for(server, api_key_env="OPENAI_API_KEY", concurrency=2)) | {"quiet": True}
    with pytest.raises(ValueError, match="A judge of pairs needs one answer"):
        compare(**given | {"against": "best_of_n"})
    compare(**given)
    differ = 0
    for line, other in lines_of():
        own, base = len(line["completion"]), len(other["completion"])
        assert line["win_rate"] == (own > base) + 0.5 * (own == base)
        differ += line["completion"] != other["completion"]
    counts = json.loads((place / "out/figures.json").read_text())["judged"]
    assert counts["answers"] > differ > 0  # the other controls too
    assert counts["judge"]["model"] == "m"
    assert f"Judge: {counts['answers']} answers judged" in (place / "out/table.md").read_text()
    calls = server.calls
    compare(**given)
    assert server.calls == calls == counts["calls"]
    assert json.loads((place / "out/figures.json").read_text())["judged"]["new_calls"] == 0
    assert not any(KEY.encode() in p.read_bytes() for p in (place / "out").rglob("*") if p.is_file())


def test_each_part_that_was_judged_is_told(tmp_path):
    class Judged(Longer):
        def verdicts(self, questions):
            told.append("asked")
            return super().verdicts(questions)

    stage, told = StageFolder(tmp_path / "answers", "answers", {}, 3, ".parquet"), []
    with stage:
        for part in range(3):
            save_rollouts([rollout(f"answer {part}", part)], stage.part_path(part))
        scorer = JudgeScoring(Judged(mode="score"), tmp_path / "v").scorer()
        score_answers([stage], stage, [scorer], lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (0, 3), "asked", (1, 3), "asked", (2, 3), "asked", (3, 3)]


def test_compare_takes_scores_and_wins_from_a_judge_that_scores(server, place):
    compare(**settings(judge=given_for(server, mode="score")), quiet=True)
    for line, other in lines_of():
        own, base = (min(10, max(1, len(x["completion"].split()))) for x in (line, other))
        assert line["judge"] == own
        assert line["win_rate"] == (own > base) + 0.5 * (own == base)
    assert "| judge |" in (place / "out/table.md").read_text()


def test_a_judge_without_any_verdict_says_how_many_and_how_a_reply_begins(server, place, monkeypatch):
    monkeypatch.setattr(scoring, "_UNREADABLE", 10**6)
    compare(**settings(judge=given_for(server)), quiet=True)
    server.always = f"I would say: {KEY} a good one. " + "word " * 100
    given = settings(judge=given_for(server, mode="score", api_key_env="OPENAI_API_KEY")) | {"quiet": True}
    with pytest.raises(ValueError, match="The judge gave no verdict") as caught:
        compare(**given)
    said = str(caught.value)
    count = len(parquet.read_table("out/answers.parquet"))
    assert f"no verdict on any of the {count} answers (0 refused, {count} not readable)" in said
    assert "One reply begins: 'I would say: *** a good one. word" in said and len(said) < 800
    assert "`max_tokens`" in said and "`max_retries`" in said
    assert f"{Path('out/table.md')} says is of an earlier run" in said
    assert not any(b"I would say" in path.read_bytes() for path in Path("out").rglob("*") if path.is_file())
    # Kept verdicts hold no replies.
    with pytest.raises(ValueError, match=rf"0 refused, {count} not readable\)\. Name another model"):
        compare(**given)
    (place / "out/table.md").unlink()
    with pytest.raises(ValueError, match=r"Look at what its `verdicts` returns\.$"):
        compare(**given | {"judge": Silent(mode="score")})


# Judges of a user's own.


class Longer(Judge):
    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.asked = []

    def verdicts(self, questions):
        self.asked += questions
        lengths = [(len(q.answer), len(q.other or "")) for q in questions]
        return [0.5 if a == b else float(a > b) for a, b in lengths]


class Silent(Longer):
    def verdicts(self, questions):
        return [None] * len(questions)


def test_pairs_without_any_verdict_are_an_error_though_the_one_compared_against_ties_with_itself(
    server, place, monkeypatch
):
    monkeypatch.setattr(scoring, "_UNREADABLE", 10**6)
    server.always = "<think>Both answers"
    with pytest.raises(ValueError, match=r"no verdict on any of the \d+ answers .*`max_tokens`"):
        compare(**settings(judge=given_for(server)), quiet=True)
    assert not (place / "out/table.md").exists()


def test_a_judge_of_a_users_own(place):
    with pytest.raises(ValueError, match="give an instance"):
        compare(**settings(judge=Longer), quiet=True)
    judge = Longer(batch_size=4)
    compare(**settings(judge=judge), quiet=True)
    for line, other in lines_of():
        own, base = len(line["completion"]), len(other["completion"])
        assert line["win_rate"] == (own > base) + 0.5 * (own == base)
    assert isinstance(judge.asked[0], Question)
    count = len(judge.asked)
    compare(**settings(judge=judge), quiet=True)
    assert len(judge.asked) == 2 * count  # it says nothing of what its verdicts depend on


_SHORTER = """
from hf_recontrol import Judge

class Shorter(Judge):
    def __init__(self, by=1, mode="pair"):
        self.by, self.mode = by, mode

    def verdicts(self, questions):
        with open("asked.log", "a") as log:
            log.write("asked\\n" * len(questions))
        gaps = [len(q.other) - len(q.answer) for q in questions]
        return [0.5 if abs(gap) < self.by else float(gap > 0) for gap in gaps]

    def depends_on(self):
        return {"version": 1}
"""


def test_a_judge_of_a_users_own_is_named_in_a_file(place):
    (place / "own_judge.py").write_text(_SHORTER)
    asked = place / "asked.log"
    for by, is_asked in [(1, True), (1, False), (10**6, True)]:
        asked.write_text("")
        command = write_file(place, judge={"kind": "own_judge:Shorter", "by": by})
        code, _, err = run_fresh(RECONTROL, command, os.environ | ALONE, timeout=100, cwd=place)
        assert code == 0, err
        assert bool(asked.read_text()) == is_asked  # other settings are another judge
        for line, other in lines_of():
            own, base = len(line["completion"]), len(other["completion"])
            assert line["win_rate"] == (0.5 if by > 1 or own == base else float(own < base))


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (
            {"kind": "own_judge:Shorter", "of": 1},
            "'own_judge:Shorter': got an unexpected keyword argument 'of'",
        ),
        ({"kind": "own_judge:Shorter", "by": {1}}, "its settings must be what JSON can hold"),
        ({"kind": "own_judge:Absent"}, "The judge 'own_judge:Absent' cannot be imported"),
        ({"kind": "no_such:Shorter"}, "The judge 'no_such:Shorter' cannot be imported: No module named 'no_such'"),
        ({"kind": "mine:Says"}, "'mine:Says' is no class that derives from `hf_recontrol.Judge`"),
        ({"kind": "Shorter"}, "it must be one of llm, local, person, or module:Class"),
        ("own_judge:Shorter", "The judge is a class: give its name as a kind, `judge: {kind: own_judge:Shorter}`"),
    ],
)
def test_what_is_no_judge_of_a_users_own_is_named(place, judge, said):
    (place / "own_judge.py").write_text(_SHORTER)
    with pytest.raises(ValueError, match=re.escape(said)):
        compare(**settings(judge=judge), quiet=True)
    assert not (place / "out").exists()
    sys.modules.pop("own_judge", None)


def test_the_current_folder_is_looked_into_whatever_the_reward(place, monkeypatch):
    (place / "own_judge.py").write_text(_SHORTER)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(place))])
    assert judge_of({"kind": "own_judge:Shorter", "by": 3}).by == 3
    assert rival_class("mine:Says").__name__ == "Says"
    sys.modules.pop("own_judge", None)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a text", "a text"),
        ([{"role": "user", "content": "one turn"}], "one turn"),
        (
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None},
                {"role": "user", "content": "b"},
            ],
            "user: (image)\na\n\nassistant: \n\nuser: b",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "5"}],
            'assistant: {"name": "f"}\n\ntool: 5',
        ),
    ],
)
def test_a_judge_reads_who_said_what(tmp_path, prompt, read):
    judge = Longer(mode="score")
    JudgeScoring(judge, tmp_path / "v").scorer().score([rollout("an answer", prompt=prompt)], [])
    assert judge.asked == [Question(read, "an answer")]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1], "returned 1 verdicts on 2"),
        (None, "returned None, not verdicts"),
        ([0.7, 1], "must be 1, 0.5, 0 or None, got 0.7"),
    ],
)
def test_a_judge_of_a_users_own_that_errs_is_named(tmp_path, values, said):
    class Wrong(Longer):
        def verdicts(self, questions):
            return values

    with pytest.raises(ValueError, match=said) as caught:
        judged(Wrong(batch_size=2), tmp_path / "v", PAIRS[:1])
    assert "Wrong" in str(caught.value)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        JudgeScoring(Longer(mode="rank"), tmp_path / "v")
    Wrong.depends_on = lambda self: {"weights": {1, 2}}
    with pytest.raises(ValueError, match="`depends_on` of Wrong"):
        JudgeScoring(Wrong(), tmp_path / "v")


@pytest.mark.parametrize("of", [bool, np.float32, np.bool_, torch.tensor])
def test_verdicts_may_be_numbers_of_any_library(tmp_path, of):
    class Other(Longer):
        def depends_on(self):
            return {"of": str(of)}

        def verdicts(self, questions):
            return (of(value) for value in super().verdicts(questions))

    for _ in range(2):
        found, _ = judged(Other(batch_size=3), tmp_path / "v", PAIRS[:2])
        assert json.dumps(found) == '{"win_rate": [1.0, 0.0], "ties": [0.0, 0.0]}'
    if of in (np.float32, torch.tensor):
        scoring = JudgeScoring(Other(mode="score"), tmp_path / "v")
        assert json.dumps(scoring.scorer().score([rollout("a")], [])) == '{"judge": [1.0]}'


def test_two_judges_that_depend_on_the_same_share_no_verdict(tmp_path):
    class One(Longer):
        def depends_on(self):
            return {"version": 1}

    class Shorter(One):
        def verdicts(self, questions):
            return [1 - value for value in super().verdicts(questions)]

    assert judged(One(), tmp_path / "v", PAIRS)[0]["win_rate"] == RIGHT
    assert judged(Shorter(), tmp_path / "v", PAIRS)[0]["win_rate"] == [1 - value for value in RIGHT]
    assert judged(One(), tmp_path / "v", PAIRS)[1]["new_calls"] == 0
