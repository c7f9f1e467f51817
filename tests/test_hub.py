"""Push to and load from a Hub: the real huggingface_hub, in processes of their own, against a server of ours."""

import json
import re
import socket
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig
from hf_recontrol.heads.seen_prompts import SeenPrompts

from .conftest import STRONG, make_head, make_llama
from .hub_server import CUT, TOKEN, Repo
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

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


@pytest.fixture
def nowhere() -> str:
    """An address on which nobody answers."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


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


def test_the_commands_take_a_head_at_its_revision(hub, run, tmp_path):
    for branch, step_size in (("main", 1.0), ("v2", 2.0)):
        head = make_head(base_model_name_or_path="org/base", control=ControlConfig(step_size=step_size))
        head.save_pretrained(tmp_path / branch)
        hub.put("me/head", tmp_path / branch, branch=branch)
    ask = (
        "from hf_recontrol.cli.controlled import resolve_controlled\n"
        "from hf_recontrol.settings import LoadingSettings\n"
        "for base in (None, 'org/base'):\n"
        "    for revision in (None, 'v2'):\n"
        "        print('FOUND', resolve_controlled('me/head', base, {}, LoadingSettings(), revision)[1].step_size)\n"
    )
    found = re.findall(r"FOUND (\S+)", run(PRELUDE + ask, endpoint=hub.endpoint))
    assert found == ["1.0", "2.0"] * 2


def test_a_pushed_model_draws_the_same_tokens_in_a_fresh_process_with_an_empty_cache(hub, run, tmp_path, input_ids):
    make_llama(seed=5).save_pretrained(tmp_path / "other base")
    make_llama().save_pretrained(tmp_path / "base")
    head, other_head = make_head(control=STRONG), make_head(seed=9, control=STRONG)
    head.save_pretrained(tmp_path / "head")
    other_head.save_pretrained(tmp_path / "other head")
    hub.put("org/base", tmp_path / "other base")
    hub.put("org/base", tmp_path / "base", branch="v2")
    hub.put("me/head", tmp_path / "other head")
    draw = "print(model.generate(torch.tensor(json.loads(sys.argv[1])), max_new_tokens=6, do_sample=False).tolist())\n"
    push = (
        PRELUDE
        + 'model = ReControlForCausalLM.from_pretrained("org/base", revision="v2", value_head=sys.argv[2])\n'
        + 'model.push_to_hub("me/head", revision="next")\n'
        + draw
    )
    ids = json.dumps(input_ids.tolist())
    expected = run(push, ids, str(tmp_path / "head"), endpoint=hub.endpoint)
    load = (
        PRELUDE + "model = ReControlForCausalLM.from_pretrained(*json.loads(sys.argv[2]), **json.loads(sys.argv[3]))\n"
    )
    forms = [
        # The head that was pushed names the very commit of its base.
        (["me/head"], {"revision": "next"}),
        (["org/base"], {"revision": "v2", "value_head": "me/head", "value_head_revision": "next"}),
        (["org/base"], {"value_head": "me/head", "value_head_revision": "next"}),
    ]
    for i, (args, kwargs) in enumerate(forms):
        found = run(load + draw, ids, json.dumps(args), json.dumps(kwargs), endpoint=hub.endpoint, home=f"empty {i}")
        assert found == expected
    # Neither the other base, nor the other head, nor no head, draws them.
    for model, value_head in ((make_llama(), other_head), (make_llama(seed=5), head)):
        controlled = ReControlForCausalLM.from_model(model, value_head)
        for control in (None, False):
            tokens = controlled.generate(input_ids, max_new_tokens=6, do_sample=False, control=control)
            assert tokens.tolist() != json.loads(expected)


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
        (str(tmp_path / "one"), {"create_pr": True}),
        (str(tmp_path / "three"), {"revision": "refs/pr/1"}),
    ]
    output = run(script, json.dumps(pushes), endpoint=hub.endpoint)
    assert output.split() == ["None", "None", "None", f"{hub.endpoint}/me/head/discussions/1", "None"]
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
        (
            {"pretrained_model_name_or_path": "me/gated"},
            ["me/gated", "accept its terms", "hf auth login", "`token`"],
        ),
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
def test_a_hub_that_cannot_be_reached_is_an_oserror_that_names_the_repo_and_the_ways_out(run, nowhere, kind):
    offline = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
    # huggingface_hub tries again for 23 seconds where there is no cached file to fall back on.
    output = run(
        "import time; time.sleep = lambda seconds: None\n" + LOAD,
        json.dumps([{"pretrained_model_name_or_path": "me/head"}]),
        endpoint=nowhere,
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


@pytest.mark.parametrize("loader", ["load_base_model(name)", "load_base(name, LoadingSettings())"])
def test_a_base_that_cannot_be_had_is_named_with_the_way_out(run, nowhere, loader):
    output = run(
        "from hf_recontrol.heads.base_model import load_base_model\n"
        "from hf_recontrol.pipelines.loading import load_base\n"
        "from hf_recontrol.settings import LoadingSettings\n"
        f"name = 'org/base'\ntry:\n    {loader}\nexcept OSError as error:\n    print('REFUSED', error)",
        endpoint=nowhere,
        HF_HUB_OFFLINE="1",
    )
    assert "REFUSED The base model org/base cannot be loaded" in output and "name that folder as the base" in output


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
    assert "REFUSED" in output and "401" in output and "'me/head'" in output and "log in" in output
    assert hub.repos == {}


def test_loading_and_saving_a_local_head_asks_no_server(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    script = PRELUDE + "ValueHead.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    run(script, str(tmp_path / "head"), str(tmp_path / "again"), endpoint=hub.endpoint)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "head")
    assert hub.requests == []


PUSH_OR_SAY = (
    PRELUDE
    + """
import time
time.sleep = lambda seconds: None  # huggingface_hub waits between its tries
for folder in sys.argv[2:]:
    try:
        ValueHead.from_pretrained(folder).push_to_hub("me/head", **json.loads(sys.argv[1]))
        print("PUSHED")
    except OSError as error:
        print("REFUSED", error)
"""
)


def test_weights_go_by_lfs_and_come_back_from_where_the_hub_points(hub, run, tmp_path):
    head = make_head(base_model_name_or_path="org/base", control=STRONG)
    head.save_pretrained(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)
    weights = (tmp_path / "head" / "model.safetensors").read_bytes()
    assert list(hub.blobs.values()) == [weights]
    assert any(method == "PUT" and path.startswith("/upload/") for method, path in hub.requests)
    # The same weights again are not uploaded again.
    hub.requests.clear()
    run(PUSH, str(tmp_path / "head"), "me/head", '{"revision": "again"}', endpoint=hub.endpoint)
    assert not any(method == "PUT" for method, _ in hub.requests)
    (loaded,) = load(run, {"pretrained_model_name_or_path": "me/head", "revision": "again"}, endpoint=hub.endpoint)
    assert loaded["value"] == pytest.approx(value_of(head), rel=1e-4)


def test_what_is_in_the_cache_is_not_downloaded_again(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    hub.put("me/head", tmp_path / "head")
    name = {"pretrained_model_name_or_path": "me/head"}
    load(run, name, endpoint=hub.endpoint)
    hub.requests.clear()
    load(run, name, endpoint=hub.endpoint)
    assert not any(method == "GET" and "/me/head/" in path for method, path in hub.requests)
    # A file that changed is.
    make_head(seed=2).save_pretrained(tmp_path / "other")
    hub.put("me/head", tmp_path / "other")
    (changed,) = load(run, name, endpoint=hub.endpoint)
    assert changed["value"] == pytest.approx(value_of(make_head(seed=2)), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "pattern", "status", "remedy"),
    [
        ("PUT", "/upload/.*", 500, "wait"),
        ("PUT", "/upload/.*", 403, "token"),
        ("PUT", "/upload/.*", CUT, "Check it"),
        ("POST", ".*/lfs/objects/batch", 500, "wait"),
        # Whether there is a card that must be kept cannot be known.
        ("HEAD", ".*/resolve/main/README.md", 500, "wait"),
        ("HEAD", ".*/resolve/main/README.md", CUT, "Check it"),
        ("POST", ".*/commit/main", CUT, "Check it"),
        ("POST", ".*/commit/main", 500, "wait"),
        ("POST", ".*/commit/main", 403, "token"),
        ("POST", ".*/commit/main", 409, "try again"),
        ("POST", ".*/commit/main", 412, "try again"),
        ("POST", ".*/commit/main", 429, "wait"),
        ("POST", ".*/preupload/main", 503, "wait"),
    ],
)
def test_a_push_that_fails_leaves_the_repo_as_it_was_and_can_be_repeated(
    hub, run, tmp_path, method, pattern, status, remedy
):
    make_head(seed=1).save_pretrained(tmp_path / "one")
    make_head(seed=2).save_pretrained(tmp_path / "two")
    hub.put("me/head", tmp_path / "one")
    before = dict(hub.repos["me/head"].branches["main"])
    hub.fail(method, pattern, status)
    output = run(PUSH_OR_SAY, "{}", str(tmp_path / "two"), endpoint=hub.endpoint)
    assert "REFUSED" in output and "me/head" in output and remedy in output, output
    assert TOKEN not in output
    assert hub.repos["me/head"].branches == {"main": before} and hub.repos["me/head"].commits == []
    if method == "POST" and "/commit/" in pattern:
        assert files_of(tmp_path / "two")["model.safetensors"] in hub.blobs.values(), "half of it was done"

    hub.failures.clear()
    assert "PUSHED" in run(PUSH_OR_SAY, "{}", str(tmp_path / "two"), endpoint=hub.endpoint)
    after = hub.repos["me/head"].branches["main"]
    assert after["model.safetensors"] == files_of(tmp_path / "two")["model.safetensors"]
    assert len(hub.repos["me/head"].commits) == 1


def test_a_new_branch_goes_when_the_push_to_it_fails_and_an_old_one_stays(hub, run, tmp_path):
    make_head(seed=1).save_pretrained(tmp_path / "one")
    make_head(seed=2).save_pretrained(tmp_path / "two")
    hub.put("me/head", tmp_path / "one")
    hub.put("me/head", tmp_path / "one", branch="old")
    before = {name: dict(files) for name, files in hub.repos["me/head"].branches.items()}
    hub.fail("POST", ".*/commit/.*", 500)
    for branch in ("new", "old"):
        output = run(
            PUSH_OR_SAY, json.dumps({"revision": branch}), str(tmp_path / "two"), endpoint=hub.endpoint, home=branch
        )
        assert "REFUSED" in output
        assert hub.repos["me/head"].branches == before


def test_a_push_whose_answer_is_lost_can_be_repeated(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    hub.fail("POST", ".*/commit/main", CUT, times=1, after=10)
    folder = str(tmp_path / "head")
    output = run(PUSH_OR_SAY, "{}", folder, folder, endpoint=hub.endpoint)
    assert "REFUSED" in output and "'me/head'" in output and output.endswith("PUSHED\n")
    (loaded,) = load(run, {"pretrained_model_name_or_path": "me/head"}, endpoint=hub.endpoint, home="fresh")
    assert loaded["value"] == pytest.approx(value_of(make_head()), rel=1e-4)


@pytest.mark.parametrize("status", [500, CUT])
def test_a_card_that_cannot_be_read_is_not_taken_for_the_one_in_the_cache(hub, run, tmp_path, status):
    make_head().save_pretrained(tmp_path / "head")
    folder = str(tmp_path / "head")
    assert run(PUSH_OR_SAY, "{}", folder, folder, endpoint=hub.endpoint).split() == ["PUSHED", "PUSHED"]
    files = hub.repos["me/head"].branches["main"]
    files["README.md"] += b"mine"
    hub.fail("HEAD", ".*/README.md", status)
    assert "REFUSED" in run(PUSH_OR_SAY, "{}", folder, endpoint=hub.endpoint)
    assert files["README.md"].endswith(b"mine")


def test_a_pull_request_goes_to_somebody_else_s_repo_and_a_push_does_not(hub, run, tmp_path):
    make_head(seed=1).save_pretrained(tmp_path / "one")
    make_head(seed=2).save_pretrained(tmp_path / "two")
    hub.put("them/head", tmp_path / "one")
    before = dict(hub.repos["them/head"].branches["main"])
    script = PUSH_OR_SAY.replace("me/head", "them/head")
    output = run(script, "{}", str(tmp_path / "two"), endpoint=hub.endpoint)
    assert "REFUSED" in output and "'them/head'" in output and "a token that may do this" in output
    assert hub.repos["them/head"].branches == {"main": before}
    assert "PUSHED" in run(script, '{"create_pr": true}', str(tmp_path / "two"), endpoint=hub.endpoint)
    branches = hub.repos["them/head"].branches
    assert branches["main"] == before
    assert branches["refs/pr/1"]["model.safetensors"] == files_of(tmp_path / "two")["model.safetensors"]


def test_terms_must_be_accepted_and_then_it_loads(hub, run, tmp_path):
    make_head(base_model_name_or_path="org/gated").save_pretrained(tmp_path / "head")
    hub.put("me/gated", tmp_path / "head", gated=True)
    (result,) = load(run, {"pretrained_model_name_or_path": "me/gated"}, endpoint=hub.endpoint)
    assert result["is_oserror"] and "'me/gated'" in result["text"] and "accept its terms on its page" in result["text"]
    hub.repos["me/gated"].accepted = True
    (result,) = load(run, {"pretrained_model_name_or_path": "me/gated"}, endpoint=hub.endpoint)
    assert "value" in result


def test_a_forced_download_that_fails_names_the_repo_and_the_way_out(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    hub.put("me/head", tmp_path / "head")
    hub.fail("HEAD", ".*/config.json", 503)
    request = {"pretrained_model_name_or_path": "me/head", "force_download": True}
    script = "import time; time.sleep = lambda seconds: None\n" + LOAD
    output = run(script, json.dumps([request]), endpoint=hub.endpoint)
    (result,) = json.loads(output.split("RESULTS")[1])
    assert result["is_oserror"] and "'me/head'" in result["text"] and "wait and try again" in result["text"]


@pytest.mark.parametrize("kind", ["missing", "private", "gated"])
def test_a_base_that_cannot_be_had_is_named(hub, run, tmp_path, kind):
    make_head(base_model_name_or_path="org/base").save_pretrained(tmp_path / "head")
    make_llama().save_pretrained(tmp_path / "base")
    hub.put("me/head", tmp_path / "head")
    if kind != "missing":
        hub.put("org/base", tmp_path / "base", **{kind: True})
    script = (
        PRELUDE
        + """
try:
    ReControlForCausalLM.from_pretrained("me/head")
except OSError as error:
    print("REFUSED", error)
"""
    )
    output = run(script, endpoint=hub.endpoint, token=TOKEN if kind == "gated" else None)
    assert "REFUSED" in output and "org/base" in output
    assert ("access" if kind == "gated" else "hf auth login") in output


def test_a_head_from_the_hub_cannot_name_a_folder_of_the_user_s_as_its_base(hub, run, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    script = (
        PRELUDE
        + """
import os
from hf_recontrol.cli import main
os.chdir(sys.argv[1])
for name in sys.argv[2:]:
    try:
        ReControlForCausalLM.from_pretrained(name)
    except ValueError as error:
        print("REFUSED", error)
    sys.argv = ["recontrol", "generate", name, "a prompt"]
    sys.stderr = sys.stdout
    try:
        main()
    except SystemExit as stop:
        print("EXIT", stop.code)
"""
    )
    # The last one has the name of a repo, too.
    make_llama().save_pretrained(tmp_path / "user" / "org" / "base")
    for name, base in (("me/one", str(tmp_path / "base")), ("me/two", "../base"), ("me/three", "org/base")):
        make_head(base_model_name_or_path=base).save_pretrained(tmp_path / name)
        hub.put(name, tmp_path / name)
    output = run(script, str(tmp_path / "user"), "me/one", "me/two", "me/three", endpoint=hub.endpoint)
    assert output.count("REFUSED") == 3 and output.count("name the base yourself") == 6 and "EXIT 1" in output
    # In a folder of the user's own it is how a local base is found again.
    assert "REFUSED" not in run(script, str(tmp_path), str(tmp_path / "me/one"), endpoint=hub.endpoint)


@pytest.mark.parametrize("subfolder", ["..", "../up", "a/../../b", "/etc", "..\\up"])
def test_a_push_cannot_leave_the_repo(hub, run, tmp_path, subfolder):
    make_head().save_pretrained(tmp_path / "head")
    output = run(PUSH_OR_SAY, json.dumps({"subfolder": subfolder}), str(tmp_path / "head"), endpoint=hub.endpoint)
    assert "REFUSED `subfolder` must lie inside me/head" in output
    assert hub.requests == []


def test_what_was_pushed_is_listed_and_a_snapshot_of_it_is_a_head(hub, run, tmp_path):
    head = make_head(base_model_name_or_path="org/base", control=STRONG)
    head.save_pretrained(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)
    script = (
        PRELUDE
        + """
from huggingface_hub import HfApi, snapshot_download
print(json.dumps([file.path for file in HfApi().list_repo_tree("me/head", recursive=True)]))
for options in ({}, {"local_dir": sys.argv[1]}):
    head = ValueHead.from_pretrained(snapshot_download("me/head", **options))
    print(json.dumps(head(torch.linspace(-1, 1, head.config.hidden_size)).tolist()))
"""
    )
    output = run(script, str(tmp_path / "copy"), endpoint=hub.endpoint, home="fresh")
    listed, *values = map(json.loads, output.splitlines())
    assert sorted(listed) == sorted(hub.repos["me/head"].branches["main"])
    assert values == [pytest.approx(value_of(head), rel=1e-4)] * 2


def test_a_snapshot_whose_files_are_shared_between_repos_is_a_head(tmp_path):
    head, cache = make_head(), tmp_path / "cache"
    head.save_pretrained(tmp_path / "head")
    snapshot = cache / "models--me--head" / "snapshots" / "0123"
    for folder in (snapshot, cache / "models--me--head" / "blobs"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "head").iterdir())):
        # As huggingface_hub 2 keeps what Xet has brought.
        shared = cache / "blobs" / f"a{number}" / f"a{number}{'0' * 62}"
        shared.parent.mkdir(parents=True)
        path.rename(shared)
        own = cache / "models--me--head" / "blobs" / f"etag{number}"
        own.symlink_to(f"../../blobs/a{number}/{shared.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{own.name}")
    loaded = ValueHead.from_pretrained(snapshot)
    assert value_of(loaded) == value_of(head)
    # Nothing else in the cache, and nothing outside of it.
    (snapshot / "config.json").unlink()
    (cache / "config.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../config.json")
    with pytest.raises(OSError, match="is a link to"):
        ValueHead.from_pretrained(snapshot)


def test_a_folder_of_this_machine_is_not_pushed_as_the_base(hub, run, tmp_path):
    make_head(base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)
    pushed = hub.repos["me/head"].branches["main"]
    assert json.loads(pushed["config.json"])["base_model_name_or_path"] is None
    assert not any(str(tmp_path).encode() in content for content in pushed.values())
    assert json.loads((tmp_path / "head" / "config.json").read_text())["base_model_name_or_path"]


def test_a_push_replaces_no_model(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    model = {"config.json": b'{"model_type": "llama", "hidden_size": 16}', "model.safetensors": b"weights"}
    files = model | {f"inside/{name}": content for name, content in model.items()}
    hub.repos["me/model"] = Repo(branches={"main": dict(files)})
    script = (
        PRELUDE
        + """
head = ValueHead.from_pretrained(sys.argv[1])
for kwargs in ({}, {"subfolder": "inside"}, {"revision": "new"}, {"create_pr": True}):
    try:
        head.push_to_hub("me/model", **kwargs)
    except OSError as error:
        assert "'me/model' holds a config.json that is not a head's" in str(error), error
        print("REFUSED")
head.push_to_hub("me/model", subfolder="head")
"""
    )
    assert run(script, str(tmp_path / "head"), endpoint=hub.endpoint).split().count("REFUSED") == 4
    branches = hub.repos["me/model"].branches
    assert set(branches) == {"main"} and files.items() <= branches["main"].items()
    assert "head/model.safetensors" in branches["main"]


def test_a_private_push_to_a_public_repo_is_refused(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    hub.repos["me/head"] = Repo()
    said = run(PUSH_OR_SAY, '{"private": true}', str(tmp_path / "head"), endpoint=hub.endpoint)
    assert "'me/head' is there already and is public" in said and not hub.repos["me/head"].branches["main"]
    hub.repos["me/head"] = Repo(private=True)
    assert "PUSHED" in run(PUSH_OR_SAY, '{"private": true}', str(tmp_path / "head"), endpoint=hub.endpoint)


def test_code_from_a_repo_runs_with_trust_remote_code_alone(hub, run, tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path / "evil")
    config = json.loads((tmp_path / "evil" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    touch = f"import pathlib\npathlib.Path({str(tmp_path / 'touched')!r}).touch()\n"
    (tmp_path / "evil" / "evil.py").write_text(touch)
    base.save_pretrained(tmp_path / "base")
    make_head(base_model_name_or_path="org/evil").save_pretrained(tmp_path / "head")
    hub.put("org/evil", tmp_path / "evil")
    hub.put("org/base", tmp_path / "base")
    hub.put("me/head", tmp_path / "head")
    code = {"custom_generate/generate.py": touch.encode() + b"def generate(model, **kwargs): return 'code'\n"}
    hub.repos["me/head"].branches["main"] |= code | {"modeling.py": touch.encode(), "__init__.py": touch.encode()}
    script = (
        PRELUDE
        + """
from pathlib import Path
from transformers import AutoModelForCausalLM
touched = Path(sys.argv[1])
ValueHead.from_pretrained("me/head")
model = ReControlForCausalLM.from_pretrained("org/base", value_head="me/head")
ids = torch.ones(1, 2, dtype=torch.long)
model.generate(ids, max_new_tokens=2)
model.unload()
for call in (
    lambda **trust: ReControlForCausalLM.from_pretrained("me/head", **trust),
    lambda **trust: model.generate(ids, custom_generate="me/head", **trust),
):
    try:
        call()
    except ValueError as error:
        print("REFUSED", "trust_remote_code" in str(error))
    assert not touched.exists()
    try:
        call(trust_remote_code=True)
    except Exception as error:
        print(error)
    print(touched.exists())
    touched.unlink()
"""
    )
    output = run(script, str(tmp_path / "touched"), endpoint=hub.endpoint)
    assert output.count("REFUSED True") == 2 and output.splitlines().count("True") == 2, output


def test_the_token_is_in_no_log_no_error_and_no_file(hub, run, tmp_path):
    make_head(base_model_name_or_path="org/private").save_pretrained(tmp_path / "head")
    make_llama().save_pretrained(tmp_path / "base")
    hub.put("org/private", tmp_path / "base", private=True)
    hub.put("me/private", tmp_path / "head", private=True)
    hub.put("me/gated", tmp_path / "head", gated=True)
    hub.fail("POST", ".*/me/refused/commit/main", 403)
    hub.fail("PUT", "/upload/.*", 500, times=20)
    hub.fail("POST", ".*/me/cut/commit/main", CUT)
    # Everything that logs tells all that it has to tell.
    script = (
        """
import sys; sys.stderr = sys.stdout
import logging; logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
import time; time.sleep = lambda seconds: None
import traceback
import transformers; transformers.logging.set_verbosity_debug()
"""
        + PRELUDE
        + """
folder, options = sys.argv[1], json.loads(sys.argv[2])
head = ValueHead.from_pretrained(folder)
for name in ("me/big", "me/refused", "me/cut", "them/head", "me/fine", "me/fine"):
    try:
        head.push_to_hub(name, private=True, **options)
    except OSError:
        traceback.print_exc()
for name in ("me/fine", "me/private", "me/gated", "me/nothing"):
    try:
        model = ReControlForCausalLM.from_pretrained(name, **options)
        print("LOADED", repr(model), model.config, model.value_head.config)
    except OSError:
        traceback.print_exc()
"""
    )
    for home, options, token in (("environment", {}, TOKEN), ("argument", {"token": TOKEN}, None)):
        hub.repos = {name: repo for name, repo in hub.repos.items() if name != "me/fine"}
        output = run(
            script,
            str(tmp_path / "head"),
            json.dumps(options),
            endpoint=hub.endpoint,
            token=token,
            home=home,
            HF_DEBUG="1",
        )
        assert "curl" in output and "DEBUG" in output and output.count("LOADED") == 2, output
        assert output.count("Could not push to") >= 3 and output.count("Could not get") == 2
        assert TOKEN not in output
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    pushed = [content for repo in hub.repos.values() for content in repo.branches["main"].values()]
    assert not kept and not any(TOKEN.encode() in content for content in pushed)


def test_a_push_to_a_hub_that_has_trouble_for_a_moment_goes_through(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    hub.fail("PUT", "/upload/.*", 503, times=2)
    assert "PUSHED" in run(PUSH_OR_SAY, "{}", str(tmp_path / "head"), endpoint=hub.endpoint)


def test_a_push_offline_or_without_a_connection_names_the_repo_and_the_way_out(run, nowhere, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    output = run(PUSH_OR_SAY, "{}", str(tmp_path / "head"), endpoint=nowhere)
    assert "REFUSED" in output and "'me/head'" in output and "connection" in output
    output = run(PUSH_OR_SAY, "{}", str(tmp_path / "head"), endpoint=nowhere, HF_HUB_OFFLINE="1")
    assert "REFUSED" in output and "'me/head'" in output and "HF_HUB_OFFLINE" in output


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "log in"), (403, "accept its terms"), (404, "name"), (429, "wait"), (500, "wait"), (503, "wait")],
)
def test_a_download_that_the_hub_refuses_names_the_repo_and_the_way_out(hub, run, tmp_path, status, remedy):
    make_head().save_pretrained(tmp_path / "head")
    hub.put("me/head", tmp_path / "head")
    for method in ("HEAD", "GET"):
        hub.fail(method, "/me/head/resolve/.*", status)
    script = "import time; time.sleep = lambda seconds: None\n" + LOAD
    output = run(script, json.dumps([{"pretrained_model_name_or_path": "me/head"}]), endpoint=hub.endpoint)
    (result,) = json.loads(output.split("RESULTS")[1])
    assert result["is_oserror"] and "'me/head'" in result["text"] and "config.json" in result["text"]
    assert remedy in result["text"] and TOKEN not in output, result["text"]


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, run, tmp_path):
    make_head(head_sizes=[2000]).save_pretrained(tmp_path / "head")
    hub.put("me/head", tmp_path / "head")
    size = (tmp_path / "head" / "model.safetensors").stat().st_size
    hub.fail("GET", "/cdn/.*", CUT, times=2, after=size // 3)
    # huggingface_hub keeps what it has got in pieces of 10 MB: smaller ones, for a small file.
    script = (
        "import time; time.sleep = lambda seconds: None\n"
        "import huggingface_hub.constants as constants; constants.DOWNLOAD_CHUNK_SIZE = 1000\n" + LOAD
    )
    output = run(script, json.dumps([{"pretrained_model_name_or_path": "me/head"}]), endpoint=hub.endpoint)
    (result,) = json.loads(output.split("RESULTS")[1])
    assert result["value"] == pytest.approx(value_of(make_head(head_sizes=[2000])), rel=1e-4)
    starts = [int(wanted.removeprefix("bytes=").split("-")[0]) for wanted in hub.ranges]
    assert len(starts) == 2 and 0 < starts[0] < starts[1] < size


def test_one_repo_holds_several_heads_branches_and_tags(hub, run, tmp_path):
    for seed, name in enumerate(("kind", "short", "newer"), start=1):
        make_head(seed=seed, base_model_name_or_path="org/base").save_pretrained(tmp_path / name)
    script = (
        PRELUDE
        + """
for folder, kwargs in json.loads(sys.argv[1]):
    ValueHead.from_pretrained(folder).push_to_hub("me/head", **kwargs)
"""
    )
    pushes = [
        (str(tmp_path / "kind"), {"subfolder": "kind"}),
        (str(tmp_path / "short"), {"subfolder": "short"}),
        (str(tmp_path / "newer"), {"subfolder": "kind", "revision": "next"}),
    ]
    run(script, json.dumps(pushes), endpoint=hub.endpoint)
    repo = hub.repos["me/head"]
    files = {f"{head}/{file}" for head in ("kind", "short") for file in files_of(tmp_path / "kind")}
    assert set(repo.branches["main"]) == set(repo.branches["next"]) == files
    assert 'from_pretrained("me/head", subfolder="short")' in repo.branches["main"]["short/README.md"].decode()
    repo.tags["v1"] = dict(repo.branches["main"])
    hub.put("me/head", tmp_path / "newer", prefix="kind/")

    name = {"pretrained_model_name_or_path": "me/head"}
    requests = [
        {"subfolder": "kind", "revision": "v1"},
        {"subfolder": "short"},
        {"subfolder": "kind", "revision": "next"},
        {"subfolder": "kind"},
    ]
    results = load(run, *(name | request for request in requests), endpoint=hub.endpoint)
    for seed, result in zip((1, 2, 3, 3), results, strict=True):
        assert result["value"] == pytest.approx(value_of(make_head(seed=seed)), rel=1e-4)


def test_the_token_of_a_call_is_used_and_the_cache_is_where_it_says(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    script = (
        PRELUDE
        + """
head = ValueHead.from_pretrained(sys.argv[1])
head.push_to_hub("me/head", private=True, token=sys.argv[2])
ValueHead.from_pretrained("me/head", token=sys.argv[2], cache_dir=sys.argv[3])
"""
    )
    arguments = [str(tmp_path / "head"), TOKEN, str(tmp_path / "cache")]
    run(script, *arguments, endpoint=hub.endpoint, token=None)
    assert hub.repos["me/head"].private
    assert {path.name for path in (tmp_path / "cache").glob("models--me--head/snapshots/*/*")} == {
        "config.json",
        "model.safetensors",
    }


SEEN = SeenPrompts(torch.tensor([5, -3, 2**62, 5]), torch.tensor([7]))


def head_with_prompts(folder, seen=SEEN):
    head = make_head(base_model_name_or_path="org/base", control=STRONG)
    head.seen_prompts = seen
    head.save_pretrained(folder)
    return head


def test_what_a_head_has_seen_is_saved_pushed_and_loaded_with_it(hub, run, tmp_path):
    head_with_prompts(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)
    run(PUSH, str(tmp_path / "head"), "me/heads", '{"subfolder": "a"}', endpoint=hub.endpoint)
    again = (
        PRELUDE
        + """
model = ReControlForCausalLM.from_model(ReControlForCausalLM.from_pretrained(sys.argv[1], value_head=sys.argv[2],
    value_head_subfolder=sys.argv[3]).unload(), ValueHead.from_pretrained(sys.argv[2], subfolder=sys.argv[3]))
model.save_pretrained(sys.argv[4])
"""
    )
    make_llama().save_pretrained(tmp_path / "base")
    for repo, subfolder in (("me/head", ""), ("me/heads", "a")):
        to = tmp_path / repo
        run(again, str(tmp_path / "base"), repo, subfolder, str(to), endpoint=hub.endpoint)
        seen = ValueHead.from_pretrained(to).seen_prompts
        assert seen.trained_on.tolist() == [-3, 5, 2**62]
        assert seen.validated_on.tolist() == [7] and not len(seen.tuned_on)
    assert {len(path.name) for path in tmp_path.glob("head/prompts.*")} == {len("prompts.safetensors")}


def test_a_record_of_prompts_that_cannot_be_had_is_no_head_without_one(hub, run, tmp_path):
    head_with_prompts(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)
    hub.repos["me/head"].branches["main"].pop("prompts.safetensors")
    (missing,) = load(run, {"pretrained_model_name_or_path": "me/head"}, endpoint=hub.endpoint)
    assert missing["is_oserror"] and "prompts.safetensors" in missing["text"] and "'me/head'" in missing["text"]
    assert "Copy it from where the head came from" in missing["text"]
    (tmp_path / "head" / "prompts.safetensors").unlink()
    with pytest.raises(OSError, match=r"No prompts\.safetensors in .*head.* was trained on.*Copy it from where"):
        ValueHead.from_pretrained(tmp_path / "head")


def test_a_record_of_prompts_must_be_its_head_s(tmp_path):
    head_with_prompts(tmp_path / "head")
    head_with_prompts(tmp_path / "other", SeenPrompts(torch.tensor([1])))
    path = tmp_path / "head" / "prompts.safetensors"
    whole = path.read_bytes()
    floats = {name: torch.zeros(2) for name in SeenPrompts.kinds()}
    for odd, said in (
        ((tmp_path / "other" / "prompts.safetensors").read_bytes(), "another head's"),
        (whole[:-8], "not a complete safetensors file"),
        (b"", "not a complete safetensors file"),
        (save({"trained_on": torch.tensor([5])}), "must hold the tensors"),
        (save(floats), "must be a list of integers"),
        (save({name: torch.zeros(2, 2, dtype=torch.int64) for name in floats}), "must be a list of integers"),
    ):
        path.write_bytes(odd)
        with pytest.raises(ValueError, match=said) as caught:
            ValueHead.from_pretrained(tmp_path / "head")
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    head = ValueHead.from_pretrained(tmp_path / "head")
    # A head that no longer knows is one without a record, whatever lies in the folder.
    head.seen_prompts = None
    head.save_pretrained(tmp_path / "head")
    assert ValueHead.from_pretrained(tmp_path / "head").seen_prompts is None
    with pytest.raises(ValueError, match="`prompts_digest` must be a SHA-256"):
        ValueHeadConfig(4, prompts_digest="../x")


class Killed(BaseException):
    """Ends a process where it stands."""


def test_a_save_that_is_killed_at_any_rename_leaves_a_head_with_its_record(tmp_path, monkeypatch):
    rename, stop = Path.replace, 0

    def killed(self, target):
        nonlocal stop
        stop -= 1
        if stop == 0:
            raise Killed
        return rename(self, target)

    more = SeenPrompts(SEEN.trained_on, SEEN.validated_on, torch.tensor([9]))
    for earlier in (None, SEEN):
        left = []
        for count in range(1, 7):
            folder = tmp_path / f"{earlier is None}-{count}"
            head = head_with_prompts(folder, earlier)
            head.seen_prompts, stop = more, count
            with monkeypatch.context() as patched, suppress(Killed):
                patched.setattr(Path, "replace", killed)
                # Of a process that is killed the files that it was writing stay.
                patched.setattr(Path, "unlink", lambda self, missing_ok: None)
                head.save_pretrained(folder)
            seen = ValueHead.from_pretrained(folder).seen_prompts
            left.append(None if seen is None else seen.digest())
            # The next save is like any other.
            head.save_pretrained(folder)
            assert ValueHead.from_pretrained(folder).seen_prompts.digest() == more.digest()
            assert (folder / "prompts.safetensors").is_file()
            assert not (folder / "prompts.next.safetensors").exists()
        before = None if earlier is None else earlier.digest()
        # Prompts, weights, configuration, prompts by their own name, card.
        assert left == [before] * 3 + [more.digest()] * 3


def test_a_head_from_the_hub_is_tuned_into_the_output(hub, run, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    head = tiny_head(model, hook_point="lm_head")
    head.config.base_model_name_or_path = "org/base"
    head.seen_prompts = SEEN
    head.save_pretrained(tmp_path / "head")
    hub.put("org/base", tmp_path / "base")
    hub.put("me/head", tmp_path / "head")
    before = dict(hub.repos["me/head"].branches["main"])
    script = """
import sys
from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, tune
def length(completions, **columns):
    return [float(len(text)) for text in completions]
options = {"methods": ["advantage"], "step_sizes": [1.0], "criterion": {"reward": 1}, "max_new_tokens": 4}
tune("me/head", ["w5", "w6", "w7"], length, sys.argv[1], quiet=True, **options)
"""
    run(script, str(tmp_path / "out"), endpoint=hub.endpoint)
    tuned = ValueHead.from_pretrained(tmp_path / "out" / "head")
    assert (tuned.config.control.method, tuned.config.control.step_size) == ("advantage", 1.0)
    assert tuned.seen_prompts.counts() == {"trained_on": 3, "validated_on": 1, "tuned_on": 3}
    weights = tuned.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in head.state_dict().items())
    assert hub.repos["me/head"].branches["main"] == before
