"""Rollouts that another program draws: a server with token ids (`tests/vllm` has the same of vLLM itself)."""

import json
import os
import sys
import threading
import time
import traceback
from contextlib import contextmanager

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

from hf_recontrol import ControlConfig, ReControlForCausalLM, RolloutSettings
from hf_recontrol.cli import stages
from hf_recontrol.cli.app import app
from hf_recontrol.collection import rollouts as rollouts_module
from hf_recontrol.collection.engines import endpoint
from hf_recontrol.collection.engines.client import openai_client
from hf_recontrol.collection.engines.endpoint import EndpointEngine
from hf_recontrol.collection.engines.engine import EngineSampling
from hf_recontrol.collection.engines.vllm_engine import _runs_own_code
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.sampling import sampling_config
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.stage_folder import read_manifest
from hf_recontrol.integrations.vllm import arguments
from hf_recontrol.pipelines.fit import fit

from .conftest import make_head
from .engine_server import _SILENCE, EngineServer
from .test_cli import run_main
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 17)]
SETTINGS = {"max_new_tokens": 8, "part_size": 5}


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_RETRIES", 0)


def make_model(seed=0):
    model = tiny_model("llama", dtype=torch.float32, seed=seed)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def server(model, tokenizer):
    server = EngineServer(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def write(folder, model, tokenizer, server=None, **changes):
    engine = {} if server is None else {"engine": server.url}
    counts = write_rollouts(
        folder, model, tokenizer, load_prompts(PROMPTS), progress=lambda *_: None, **(SETTINGS | engine | changes)
    )
    return counts, load_rollouts(folder)


@pytest.mark.parametrize("stop_strings", [(), ("w7",)])
def test_greedy_rollouts_and_their_files_are_those_of_our_own_sampler(
    tmp_path, model, tokenizer, server, stop_strings
):
    options = {"temperature": 0.0, "stop_strings": stop_strings, "max_new_tokens": 24}
    ours = write(tmp_path / "ours", model, tokenizer, **options)
    theirs = write(tmp_path / "theirs", model, tokenizer, server, **options)
    assert theirs == ours
    assert {len(r.completion_ids) for r in ours[1]} != {24}, "some end by themselves"
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert names == {file.name for file in (tmp_path / "theirs").iterdir()}
    manifests = [read_manifest(tmp_path / name, "rollouts", "") for name in ("ours", "theirs")]
    assert manifests[1]["settings"].pop("engine") == {"name": "endpoint"}
    assert manifests[0]["settings"] == manifests[1]["settings"]


def test_a_rows_seed_is_its_own(tmp_path, model, tokenizer, server):
    options = {"num_samples": 3, "temperature": 1.5}
    _, first = write(tmp_path / "1", model, tokenizer, server, **options)
    seeds = [body["seed"] for body in server.requests if body["temperature"]]
    assert len(set(seeds)) == len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds)
    alone = {"engine_arguments": {"concurrency": 1}, "part_size": 36}
    _, again = write(tmp_path / "2", model, tokenizer, server, **options, **alone)
    assert first == again, "whatever its part and however many are asked at once"
    _, other = write(tmp_path / "3", model, tokenizer, server, **options, seed=1)
    assert first != other


def test_sampling_settings_reach_the_engine(tmp_path, model, tokenizer, server):
    _, rollouts = write(tmp_path, model, tokenizer, server, num_samples=2, temperature=0.7, max_new_tokens=1)
    bodies = [body for body in server.requests if body["temperature"]]
    assert {(body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) for body in bodies} == {
        (0.7, 1.0, 0, 1)
    }
    assert all(rollout.temperature == 0.7 for rollout in rollouts)


def test_no_more_are_asked_at_once_than_said(tmp_path, model, tokenizer, server):
    write(tmp_path, model, tokenizer, server, num_samples=2, engine_arguments={"concurrency": 3})
    assert 1 < server.most_at_once <= 3


def test_what_was_drawn_before_a_server_died_is_kept(tmp_path, model, tokenizer, server):
    server.dies_after = 20
    one_by_one = {"engine_arguments": {"concurrency": 1}, "num_samples": 2}
    with pytest.raises(OSError, match=r"does not answer .* goes on from there"):
        write(tmp_path / "a", model, tokenizer, server, **one_by_one)
    parts = sorted((tmp_path / "a").glob("part-*"))
    assert parts and len(parts) < 5
    server.dies_after = None
    server.requests.clear()
    _, resumed = write(tmp_path / "a", model, tokenizer, server, **one_by_one)
    assert len([body for body in server.requests if body["temperature"]]) == 24 - 5 * len(parts)
    _, whole = write(tmp_path / "b", model, tokenizer, server, **one_by_one)
    assert resumed == whole
    server.requests.clear()
    write(tmp_path / "a", model, tokenizer, server, **one_by_one)
    assert not server.requests, "of a finished folder nothing is done again, and no server is needed"


def test_another_engine_is_another_setting(tmp_path, model, tokenizer, server):
    write(tmp_path, model, tokenizer, server)
    with pytest.raises(ValueError, match=r"engine.name was 'endpoint', is None"):
        write(tmp_path, model, tokenizer)


def test_another_model_is_refused_before_anything_is_drawn(tmp_path, tokenizer, server):
    with pytest.raises(ValueError, match=r"holds another model than .* nats less likely"):
        write(tmp_path, make_model(seed=1), tokenizer, server)
    assert not list(tmp_path.glob("part-*"))
    assert all(body["temperature"] == 0 for body in server.requests)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"token_ids": None}, "returns no token ids"),
        ({"token_ids": ["w5"]}, "returns no token ids"),
        ({"token_ids": [-1]}, "returns no token ids"),
        ({"token_ids": [True, True]}, "returns no token ids"),
        ({"token_ids": [3, 10**6]}, "holds another model"),
        ({"token_ids": [3, 10**30]}, "holds another model"),
        ({"token_ids": []}, "returned 0 tokens where 1 to 8 can be drawn"),
        ({"token_ids": [3] * 9}, "returned 9 tokens where 1 to 8 can be drawn"),
        ({"token_ids": [3, 4], "finish_reason": "stop"}, "returned no token that ends one"),
        ({"prompt_token_ids": [5]}, "did not read a prompt as it was sent"),
        ({"finish_reason": "abort"}, "gave a response up"),
        ({"status": 400}, "does not take a request: .*too long for me"),
        ({"page": "Welcome!"}, "does its URL end in /v1"),
    ],
)
def test_what_a_server_does_wrong_is_named(tmp_path, model, tokenizer, server, faults, message):
    server.faults = faults
    with pytest.raises(ValueError, match=message):
        write(tmp_path, model, tokenizer, server)
    assert not list(tmp_path.glob("part-*"))


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_server_that_fails_is_named(tmp_path, model, tokenizer, server, status):
    server.faults = {"status": status}
    with pytest.raises(OSError, match=f"does not answer .*status {status}"):
        write(tmp_path, model, tokenizer, server)


def test_a_response_that_a_short_context_cut_is_no_rollout(tmp_path, model, tokenizer, server, monkeypatch):
    def short(self, body):
        return complete(self, body | {"max_tokens": min(3, body["max_tokens"])})

    complete = EngineServer.complete
    monkeypatch.setattr(EngineServer, "complete", short)
    with pytest.raises(ValueError, match=r"cut a response after 3 tokens, 30 were asked for"):
        write(tmp_path, model, tokenizer, server, temperature=1.0, max_new_tokens=30)


@pytest.mark.parametrize("ids", [[10**6] * 8, [2**31] * 8, [10**30] * 8])
def test_tokens_that_the_model_does_not_have_are_no_rollout_either(
    tmp_path, model, tokenizer, server, monkeypatch, ids
):
    complete = EngineServer.complete

    def late(self, body):
        if body["temperature"]:
            self.faults = {"token_ids": ids}
        return complete(self, body)

    monkeypatch.setattr(EngineServer, "complete", late)
    with pytest.raises(ValueError, match=r"holds another model than .* it returned the token"):
        write(tmp_path, model, tokenizer, server, temperature=1.0)
    assert not list(tmp_path.glob("part-*"))


def test_a_context_that_is_too_short_is_known_before_anything_is_drawn(tmp_path, model, tokenizer, server):
    server.max_model_len = 30
    with pytest.raises(ValueError, match=r"has room for 30 tokens, and the longest .* may have \d+: raise"):
        write(tmp_path / "1", model, tokenizer, server, max_new_tokens=60)
    assert not server.requests
    write(tmp_path / "2", model, tokenizer, server, max_new_tokens=4)


def test_an_end_that_the_model_cannot_draw_is_not_asked_for(tmp_path, model, tokenizer, server):
    model.generation_config.eos_token_id = [2, 50256, -1]
    write(tmp_path, model, tokenizer, server)
    assert {tuple(body["stop_token_ids"]) for body in server.requests} == {(2,)}


def test_all_requests_have_connections(tmp_path, model, tokenizer, server, monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    resource = pytest.importorskip("resource")
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < highest < 2048:
        pytest.skip("This process may not raise its limit.")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, highest))
        write(tmp_path / "1", model, tokenizer, server, engine_arguments={"concurrency": 1024})
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"needs 4352 open files"):
            patch.setattr(resource, "setrlimit", refuse)
            write(tmp_path / "2", model, tokenizer, server, engine_arguments={"concurrency": 4096})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest))
    client = openai_client("engine", server.url, None, None, timeout=1, max_retries=0, concurrency=2000)
    assert client._client._transport._pool._max_connections == 2000


def test_a_server_that_lists_nothing_is_given_up_at_once(tmp_path, model, tokenizer, server, monkeypatch):
    monkeypatch.setattr(endpoint, "_LISTED_WITHIN", 0.2)
    server.lists = False
    begun = time.monotonic()
    with pytest.raises(OSError, match="does not answer"):
        write(tmp_path, model, tokenizer, server)
    assert time.monotonic() - begun < 20


def test_what_is_asked_of_a_silent_server_does_not_hold_the_exit(tmp_path, model, tokenizer, server):
    server.silent = True
    failed = threading.Event()
    # Some of another test may still wait for its own silent server.
    others = set(threading.enumerate())

    def run():
        with pytest.raises(OSError, match="does not answer"):
            write(tmp_path, model, tokenizer, server, engine_arguments={"timeout": 0.5})
        failed.set()

    threading.Thread(target=run, daemon=True).start()
    for _ in range(200):
        asking = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("engine")]
        if asking:
            break
        time.sleep(0.02)
    assert asking and all(thread.daemon for thread in asking)
    assert failed.wait(30)
    for thread in asking:
        thread.join(10)
    late = [thread for thread in asking if thread.is_alive()]
    where = ["".join(traceback.format_stack(sys._current_frames()[thread.ident])) for thread in late]
    # The server breaks off after a minute of silence, so one that has lost its time limit ends then.
    for thread in late:
        thread.join(_SILENCE)
    assert not any(thread.is_alive() for thread in late), where


def test_an_engine_ends_where_a_part_cannot_be_written(tmp_path, model, tokenizer, server, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    ended = []
    running = EndpointEngine.running

    @contextmanager
    def watched(self, longest):
        with running(self, longest):
            try:
                yield
            finally:
                ended.append(True)

    monkeypatch.setattr(EndpointEngine, "running", watched)
    monkeypatch.setattr(rollouts_module, "save_rollouts", full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path, model, tokenizer, server)
    # The error, and with it the frames that it came through, is still there.
    assert ended and error.value


def test_which_model_is_asked_for(tmp_path, model, tokenizer, server):
    server.models = ["org/base", "org/base:default", "org/base:polite"]
    write(tmp_path / "1", model, tokenizer, server)
    assert {body["model"] for body in server.requests} == {"org/base"}
    server.models = ["one", "two"]
    with pytest.raises(ValueError, match=r"serves one, two, and no .*: say which one"):
        write(tmp_path / "2", model, tokenizer, server)
    server.requests.clear()
    write(tmp_path / "2", model, tokenizer, server, engine_arguments={"model": "two"})
    assert {body["model"] for body in server.requests} == {"two"}


def test_the_key_comes_from_the_environment(tmp_path, model, tokenizer, server, monkeypatch):
    server.key = "sk-1234567890"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(OSError, match=r"status 401\). Is the key right"):
        write(tmp_path, model, tokenizer, server)
    named = {"engine_arguments": {"api_key_env": "ENGINE_KEY"}}
    with pytest.raises(ValueError, match=r"The engine's key is missing: set the environment variable"):
        write(tmp_path, model, tokenizer, server, **named)
    monkeypatch.setenv("ENGINE_KEY", server.key)
    write(tmp_path, model, tokenizer, server, **named)
    assert server.key not in (tmp_path / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sglang"}, "must be 'transformers', 'vllm' or a URL"),
        ({"engine": "ftp://host/v1"}, "must be a URL such as"),
        ({"engine": "http://host:80a/v1"}, "must be a URL such as"),
        ({"engine": "http://host/v1", "engine_arguments": {"api_key": "secret"}}, "must hold no 'api_key'"),
        ({"engine": "vllm", "engine_arguments": {"hf_token": "secret"}}, "must hold no 'hf_token'"),
        ({"engine": "http://me:secret@host/v1"}, "must hold no user, password or key"),
        ({"engine": "http://host/v1?api_key=secret"}, "must hold no user, password or key"),
        ({"engine_arguments": {"model": "m"}}, "set `engine`, too"),
        ({"engine": "vllm", "keep_states": True}, "do not show their states"),
        ({"engine": "http://host/v1", "engine_arguments": {"x": object()}}, "must hold what JSON can hold"),
    ],
)
def test_settings_that_cannot_be_say_so(changes, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        RolloutSettings(**changes)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat16"}, "know no 'dtype': there are model, concurrency"),
        ({"concurrency": 0}, "`engine_arguments.concurrency` must be an integer of at least 1"),
        ({"timeout": "long"}, "`engine_arguments.timeout` must be a finite number"),
        ({"api_key_env": "sk-123"}, "must be the name of an environment variable"),
    ],
)
def test_arguments_that_a_server_does_not_take_say_so(tmp_path, model, tokenizer, server, arguments, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, model, tokenizer, server, engine_arguments=arguments)
    assert not list(tmp_path.iterdir()) and not server.requests


def test_what_an_engine_does_not_take_is_known_before_the_base_is_loaded(tmp_path, server):
    wrong = {"engine": server.url, "engine_arguments": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="know no 'dtype'"):
        fit("absent/base", PROMPTS, lambda prompts, completions: [0.0] * len(prompts), tmp_path / "run", **wrong)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n')
    words = ["rollout", "-m", "absent/base", "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "rollouts"]
    words += ["--engine", server.url, "--engine-arguments", '{"dtype": "bfloat16"}']
    with pytest.raises(ValueError, match="know no 'dtype'"):
        CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)


def test_vllm_gets_what_reaches_the_base(monkeypatch):
    """The token, which stands in no argument; and that the base's own code is trusted, where it was."""
    monkeypatch.setenv("HF_TOKEN", "another")
    settings = stages._RolloutCommandSettings(engine="vllm", token="a-token")
    assert stages._for_engine(settings, "base", None).engine_arguments == {}
    assert os.environ["HF_TOKEN"] == "a-token"
    theirs = type("Their", (), {"__module__": "transformers_modules.base.modeling"})
    controlled = type("Controlled", (theirs,), {})
    assert _runs_own_code(object(), controlled()) and not _runs_own_code(object(), "transformers_modules")


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.2}, {"num_beams": 2}, {"min_new_tokens": 3}, {"min_p": 0.1}]
)
def test_sampling_that_an_engine_has_not_is_refused(model, tokenizer, setting):
    from transformers import GenerationConfig

    settings = RolloutSettings(generation_config=GenerationConfig(do_sample="num_beams" not in setting, **setting))
    with pytest.raises(ValueError, match=f"has no `{next(iter(setting))}`"):
        EngineSampling.of(sampling_config(model, tokenizer, settings))


@pytest.mark.parametrize("setting", [{"temperature": 0.005}, {"top_p": 0.0}])
def test_what_vllm_would_draw_otherwise_or_not_at_all_is_refused(model, tokenizer, setting):
    with pytest.raises(ValueError, match=r"no temperature below 0\.01 and at no `top_p` of 0"):
        EngineSampling.of(sampling_config(model, tokenizer, RolloutSettings(**setting)))


def test_top_k_where_it_is_unset_is_generates(model, tokenizer):
    given = RolloutSettings(generation_config=GenerationConfig(do_sample=True, repetition_penalty=1.0), top_p=0.9)
    found = EngineSampling.of(sampling_config(model, tokenizer, given))
    assert (found.top_k, found.top_p, found.temperature) == (50, 0.9, 1.0)
    assert EngineSampling.of(sampling_config(model, tokenizer, RolloutSettings())).top_k == 0


def test_a_control_needs_an_engine_with_the_heads(tmp_path, model, tokenizer, server):
    # Not the server's model, which threads of its own call.
    controlled = ReControlForCausalLM.from_model(
        make_model(), make_head(hidden_size=model.config.hidden_size, hook_point="lm_head", control=ControlConfig())
    )
    with pytest.raises(ValueError, match=r"draws for the base alone: .* take `engine='vllm'`"):
        write(tmp_path, controlled, tokenizer, server, control=controlled.control)
    # Without one the base's responses are drawn, and a server of ours is told so.
    _, rollouts = write(tmp_path, controlled, tokenizer, server)
    assert all(rollout.control is None for rollout in rollouts)


@pytest.mark.parametrize("name", ["model", "logits_processors", "load_format"])
def test_what_a_head_sets_of_an_engine_is_not_set_twice(monkeypatch, name):
    ours = {"model": "base", "load_format": "recontrol", "logits_processors": ["ours"]}
    monkeypatch.setattr(arguments, "recontrol_engine_args", lambda *_: ours)
    settings = stages._RolloutCommandSettings(engine="vllm", engine_arguments={name: "theirs"})
    with pytest.raises(ValueError, match=f"must not hold '{name}' beside `--head`"):
        stages._for_engine(settings, "base", "head")
    settings = stages._RolloutCommandSettings(engine="vllm", engine_arguments={"dtype": "float32"})
    assert stages._for_engine(settings, "base", "head").engine_arguments == ours | {"dtype": "float32"}


def test_rows_that_cannot_be_used_are_left_out(tmp_path, model, tokenizer, server, recontrol_warnings):
    prompts = load_prompts([*PROMPTS[:3], " ".join(["w5"] * 500), *PROMPTS[3:6]])
    counts = write_rollouts(
        tmp_path, model, tokenizer, prompts, engine=server.url, on_bad_rows="skip", max_new_tokens=4, part_size=1
    )
    assert counts["rollouts"] == 6
    assert [r.prompt for r in load_rollouts(tmp_path)] == PROMPTS[:6]


def distinct(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


def test_fit_draws_from_an_engine_and_its_file_names_it(tmp_path, model, tokenizer, server, recontrol_warnings):
    model.config._name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"max_new_tokens": 6, "head_sizes": [8], "advantage_sizes": [4], "num_epochs": 1, "quiet": True}
    fit(str(tmp_path / "base"), PROMPTS, distinct, tmp_path / "run", engine=server.url, temperature=1.5, **options)
    assert (tmp_path / "run" / "head" / "model.safetensors").is_file()
    assert server.url in (tmp_path / "run" / "fit.yaml").read_text()
    assert len([body for body in server.requests if body["temperature"]]) == len(PROMPTS)


def test_the_command(tmp_path, model, tokenizer, server):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    arguments = ("-m", "base", "--prompts", "prompts.jsonl", "-o", "out", "--max-new-tokens", "4")
    engine = ("--engine", server.url, "--engine-arguments", '{"concurrency": 2}')
    assert f"{len(PROMPTS)} responses" in run_main("rollout", *arguments, *engine, cwd=tmp_path)
    assert len(load_rollouts(tmp_path / "out")) == len(PROMPTS)
    assert "must be 'transformers', 'vllm' or a URL" in run_main(
        "rollout", *arguments, "--engine", "tgi", code=1, cwd=tmp_path
    )


def test_a_base_that_is_quantised_here_alone_is_refused(tmp_path, model, tokenizer):
    with pytest.raises(ValueError, match="vLLM would draw from the whole one"):
        fit("org/base", PROMPTS, distinct, tmp_path / "run", engine="vllm", quantization_config={"load_in_4bit": True})
    assert not (tmp_path / "run").exists()
