"""A judge behind an endpoint, against a real server that misbehaves."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as parquet
import pytest

from hf_recontrol import compare
from hf_recontrol.evaluation.judges.endpoint import EndpointJudge, parsed

from .compared import make_inputs, settings

pytest.importorskip("openai")
KEY = "sk-never-on-the-disk"


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][0]["content"]
            place.calls += 1
            kind = place.faults.pop(0) if place.faults else place.always
            status = kind if isinstance(kind, int) else 200
            good = '{"verdict": "A"}' if asked.find("good") < asked.find("bad") else '{"verdict": "B"}'
            answers = [asked.split(f"<answer {x}>\n")[1].split(f"\n</answer {x}>")[0] for x in "AB"]
            if kind == "long":
                longer = len(answers[0]) - len(answers[1])
                kind = json.dumps({"verdict": "A" if longer > 0 else "B" if longer < 0 else "tie"})
            text = {"good": f"Well. {good}", "first": '{"verdict": "A"}'}.get(kind, kind)
            reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
            data = b"{broken" if kind == "broken" else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data) + (50 if kind == "half" else 0)))
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True

    place = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    place.calls, place.faults, place.always = 0, [], "good"
    threading.Thread(target=place.serve_forever, daemon=True).start()
    yield place
    place.shutdown()
    place.server_close()


def judge_of(server, **changes):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return EndpointJudge.of({"kind": "llm", "model": "m", "base_url": url, "max_retries": 1, "timeout": 5} | changes)


@pytest.mark.parametrize("fault", [429, 500, "half", "broken", "I cannot help with that.", '{"verdict": "C"}'])
def test_a_fault_is_tried_again_and_nothing_is_paid_twice(server, fault, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.faults = [fault]
    judge, cache = judge_of(server), tmp_path / "verdicts.jsonl"
    assert judge.pair(judge.client(), cache, "p", "good", "bad") == (1, False)
    assert server.calls == 3
    with open(cache, "a") as file:
        file.write('{"key": "ha')  # killed while writing
    assert judge.pair(judge.client(), cache, "p", "bad", "good") == (0, False)
    assert server.calls == 3
    assert KEY not in cache.read_text()


def test_orders_that_disagree_are_a_tie_and_no_verdict_is_no_number(server, tmp_path):
    judge = judge_of(server, api_key_env=None)
    server.always = "first"
    assert judge.pair(judge.client(), tmp_path / "a", "p", "good", "bad") == (0.5, True)
    server.always = "I cannot."
    assert judge.pair(judge.client(), tmp_path / "b", "p", "good", "bad") == (None, False)


def test_a_dead_endpoint_and_wrong_settings_are_named(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        judge_of(server).client()
    with pytest.raises(ValueError, match="does not belong") as caught:
        judge_of(server, api_key=KEY)
    assert KEY not in str(caught.value)
    server.always = 500
    judge = judge_of(server, api_key_env=None)
    with pytest.raises(OSError, match=str(server.server_port)):
        judge.pair(judge.client(), tmp_path / "a", "p", "good", "bad")


def test_verdicts_are_found_in_prose():
    assert parsed('<think>{"verdict": "A"}?</think>```json\n{"verdict": "tie"}\n```') == 0.5
    assert parsed("A") is None


def test_compare_takes_its_win_rate_from_the_judge(server, tmp_path, monkeypatch):
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.always = "long"
    url = f"http://127.0.0.1:{server.server_port}/v1"
    given = settings(judge={"kind": "llm", "model": "m", "base_url": url}) | {"quiet": True}
    with pytest.raises(ValueError, match="A judge of pairs needs one answer"):
        compare(**given | {"against": "best_of_n"})
    compare(**given)
    lines = parquet.read_table("out/answers.parquet").to_pylist()
    base = {(x["prompt_number"], x["sample"]): len(x["completion"]) for x in lines if x["control"] == "base"}
    for line in (x for x in lines if x["control"] == "advantage"):
        own, other = len(line["completion"]), base[line["prompt_number"], line["sample"]]
        assert line["win_rate"] == (own > other) + 0.5 * (own == other)
    assert json.loads((tmp_path / "out/figures.json").read_text())["judged"]["without_verdict"] == 0
    calls = server.calls
    compare(**given)
    assert server.calls == calls > 0
    assert not any(KEY.encode() in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
