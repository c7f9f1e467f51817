"""Push to and load from a Hub: the real huggingface_hub, in processes of their own, against a server of ours."""

import json
import socket

import huggingface_hub
import pytest
import torch

from hf_recontrol import ReControlForCausalLM, ValueHeadConfig

from .conftest import STRONG, make_head, make_llama
from .hub_server import TOKEN, Repo

PRELUDE = """
import sys, json, torch
torch.set_num_threads(1)
from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead
"""
# A process that loads whatever the arguments name, one after the other, and tells what came of each.
LOAD = (
    PRELUDE
    + """
results = []
for kwargs in json.loads(sys.argv[1]):
    try:
        head = ValueHead.from_pretrained(**kwargs)
        states = torch.linspace(-1, 1, head.config.hidden_size)
        results.append({"value": head(states).tolist(), "config": head.config.to_dict()})
    except Exception as error:
        results.append({"type": type(error).__name__, "is_oserror": isinstance(error, OSError), "text": str(error)})
print("RESULTS" + json.dumps(results))
"""
)


def load(run, *requests, **options) -> list[dict]:
    output = run(LOAD, json.dumps(list(requests)), **options)
    return json.loads(output.split("RESULTS")[1])


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def value_of(head) -> list[float]:
    return head(torch.linspace(-1, 1, head.config.hidden_size)).tolist()


PUSH = (
    PRELUDE
    + """
folder, repo_id, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
info = ValueHead.from_pretrained(folder).push_to_hub(repo_id, **kwargs)
print("URL", info.commit_url, info.pr_url)
"""
)


def test_a_pushed_head_loads_in_a_fresh_process_as_it_was(hub, run, tmp_path):
    head = make_head(base_model_name_or_path="org/base", control=STRONG)
    head.save_pretrained(tmp_path / "head")
    options = {"commit_message": "First head", "private": True, "tags": ["mine"]}
    output = run(PUSH, str(tmp_path / "head"), "me/head", json.dumps(options), endpoint=hub.endpoint)
    assert f"{hub.endpoint}/me/head/commit/" in output

    repo = hub.repos["me/head"]
    assert repo.private
    assert repo.commits == ["First head"]
    code = ["custom_generate/generate.py", "custom_generate/requirements.txt"]
    assert sorted(repo.branches["main"]) == ["README.md", "config.json", *code, "model.safetensors"]
    card = huggingface_hub.ModelCard(repo.branches["main"]["README.md"].decode())
    assert card.data.base_model == "org/base" and "mine" in card.data.tags
    assert 'from_pretrained("me/head")' in card.text

    (loaded,) = load(run, {"pretrained_model_name_or_path": "me/head"}, endpoint=hub.endpoint, home="fresh")
    assert loaded["value"] == pytest.approx(value_of(head), rel=1e-4)
    assert ValueHeadConfig.from_dict(loaded["config"]) == head.config
    # What was downloaded is there without the Hub.
    (offline,) = load(
        run, {"pretrained_model_name_or_path": "me/head"}, endpoint=hub.endpoint, home="fresh", HF_HUB_OFFLINE="1"
    )
    assert offline == loaded


def test_a_second_push_keeps_the_card_and_goes_where_it_is_told(hub, run, tmp_path):
    make_head(seed=1).save_pretrained(tmp_path / "one")
    make_head(seed=2).save_pretrained(tmp_path / "two")
    make_head(seed=3).save_pretrained(tmp_path / "three")
    mine = b"---\nlicense: mit\n---\n# Written by its owner\n"
    hub.repos["me/head"] = Repo(branches={"main": {"README.md": mine, "notes.txt": b"kept"}})

    script = (
        PRELUDE
        + """
for folder, kwargs in json.loads(sys.argv[1]):
    info = ValueHead.from_pretrained(folder).push_to_hub("me/head", **kwargs)
    print(info.pr_url)
"""
    )
    pushes = [
        (str(tmp_path / "one"), {}),
        (str(tmp_path / "two"), {"revision": "other"}),
        (str(tmp_path / "two"), {"revision": "other"}),
        (str(tmp_path / "three"), {"create_pr": True}),
    ]
    output = run(script, json.dumps(pushes), endpoint=hub.endpoint)
    assert output.split() == ["None", "None", "None", f"{hub.endpoint}/me/head/discussions/1"]
    branches = hub.repos["me/head"].branches
    for branch, folder in [("main", "one"), ("other", "two"), ("refs/pr/1", "three")]:
        assert branches[branch]["README.md"] == mine
        assert branches[branch]["notes.txt"] == b"kept"
        expected = files_of(tmp_path / folder)
        assert branches[branch]["model.safetensors"] == expected["model.safetensors"]
        assert branches[branch]["config.json"] == expected["config.json"]

    name = {"pretrained_model_name_or_path": "me/head"}
    results = load(run, name, name | {"revision": "other"}, name | {"revision": "refs/pr/1"}, endpoint=hub.endpoint)
    for seed, result in enumerate(results, start=1):
        assert result["value"] == pytest.approx(value_of(make_head(seed=seed)), rel=1e-4)


def test_a_model_is_put_together_from_a_head_and_a_base_on_the_hub(hub, run, tmp_path, input_ids):
    make_llama(seed=5).save_pretrained(tmp_path / "other base")
    make_llama().save_pretrained(tmp_path / "base")
    head = make_head(base_model_name_or_path="org/base", base_model_revision="v2", control=STRONG)
    head.save_pretrained(tmp_path / "head")
    hub.put("org/base", tmp_path / "other base")
    hub.put("org/base", tmp_path / "base", branch="v2")
    hub.put("me/head", tmp_path / "head", prefix="deep/er/")
    script = (
        PRELUDE
        + """
input_ids = torch.tensor(json.loads(sys.argv[1]))
for args, kwargs in json.loads(sys.argv[2]):
    model = ReControlForCausalLM.from_pretrained(*args, **kwargs)
    print(model.generate(input_ids, max_new_tokens=6, do_sample=False).tolist())
model.save_pretrained(sys.argv[3])
model.push_to_hub("me/again")
"""
    )
    forms = [
        (["me/head"], {"subfolder": "deep/er"}),
        (["org/base"], {"revision": "v2", "value_head": "me/head", "value_head_subfolder": "deep/er"}),
    ]
    output = run(
        script, json.dumps(input_ids.tolist()), json.dumps(forms), str(tmp_path / "saved"), endpoint=hub.endpoint
    )
    model = ReControlForCausalLM.from_model(make_llama(), head)
    expected = model.generate(input_ids, max_new_tokens=6, do_sample=False).tolist()
    assert [json.loads(line) for line in output.splitlines()] == [expected] * 2
    # Only the head and the code that runs it were pushed, and what was pushed is what was saved.
    pushed, saved = hub.repos["me/again"].branches["main"], files_of(tmp_path / "saved")
    assert sorted(name for name in pushed if "/" not in name) == ["README.md", "config.json", "model.safetensors"]
    assert pushed["model.safetensors"] == saved["model.safetensors"]
    assert pushed["config.json"] == saved["config.json"]
    assert json.loads(pushed["config.json"])["base_model_name_or_path"] == "org/base"


def test_what_cannot_be_had_from_the_hub_is_an_oserror_that_says_why_and_what_to_do(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    hub.put("me/head", tmp_path / "head")
    hub.put("me/private", tmp_path / "head", private=True)
    hub.put("me/gated", tmp_path / "head", gated=True)
    hub.repos["me/empty"] = Repo()
    hub.repos["me/pickled"] = Repo(
        branches={"main": {"config.json": (tmp_path / "head" / "config.json").read_bytes(), "model.bin": b"pickle"}}
    )
    cases = [
        ({"pretrained_model_name_or_path": "me/nothing"}, ["me/nothing", "config.json", "log in"]),
        (
            {"pretrained_model_name_or_path": "me/private"},
            ["me/private", "private or gated", "hf auth login", "`token`"],
        ),
        ({"pretrained_model_name_or_path": "me/gated"}, ["me/gated", "private or gated", "hf auth login", "`token`"]),
        ({"pretrained_model_name_or_path": "me/empty"}, ["me/empty", "has no config.json"]),
        ({"pretrained_model_name_or_path": "me/pickled"}, ["me/pickled", "has no model.safetensors"]),
        ({"pretrained_model_name_or_path": "me/head", "revision": "v9"}, ["me/head", "revision v9"]),
        ({"pretrained_model_name_or_path": "me/head", "subfolder": "deep"}, ["me/head", "config.json in deep"]),
        ({"pretrained_model_name_or_path": "me/head", "local_files_only": True}, ["me/head", "not in the cache"]),
    ]
    results = load(run, *(request for request, _ in cases), endpoint=hub.endpoint, token=None)
    for (request, expected), result in zip(cases, results, strict=True):
        assert result.get("is_oserror"), (request, result)
        for text in expected:
            assert text in result["text"], (request, text, result["text"])
    (allowed,) = load(
        run, {"pretrained_model_name_or_path": "me/private", "token": TOKEN}, endpoint=hub.endpoint, token=None
    )
    assert allowed["value"] == pytest.approx(value_of(make_head()), rel=1e-4)


@pytest.mark.parametrize("kind", ["refused", "offline"])
def test_a_hub_that_cannot_be_reached_is_an_oserror_that_names_the_repo_and_the_ways_out(run, kind):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    offline = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
    # huggingface_hub tries again for 23 seconds where there is no cached file to fall back on.
    output = run(
        "import time; time.sleep = lambda seconds: None\n" + LOAD,
        json.dumps([{"pretrained_model_name_or_path": "me/head"}]),
        endpoint=endpoint,
        **offline,
    )
    (result,) = json.loads(output.split("RESULTS")[1])
    assert result["is_oserror"]
    for text in (
        "me/head",
        "config.json",
        "no local folder",
        "not in the cache",
        "could not be reached",
        "connection",
    ):
        assert text in result["text"], result["text"]


def test_a_push_without_a_login_is_an_oserror_and_changes_nothing(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    script = (
        PRELUDE
        + """
head = ValueHead.from_pretrained(sys.argv[1])
try:
    head.push_to_hub("me/head")
except OSError as error:
    print("REFUSED", error)
"""
    )
    output = run(script, str(tmp_path / "head"), endpoint=hub.endpoint, token=None)
    assert "REFUSED" in output and "401" in output
    assert hub.repos == {}


def test_loading_and_saving_a_local_head_asks_no_server(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    script = PRELUDE + "ValueHead.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    run(script, str(tmp_path / "head"), str(tmp_path / "again"), endpoint=hub.endpoint)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "head")
    assert hub.requests == []
