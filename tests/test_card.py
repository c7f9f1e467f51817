"""The card of a head: what it says, what it leaves out, and that its code runs as it stands."""

import ast
import json
import re

import huggingface_hub
import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig
from hf_recontrol.configuration import TrainingRecord
from hf_recontrol.heads.card import is_untouched, model_card
from hf_recontrol.utils.files import without_place

from .conftest import STRONG, make_head, make_llama
from .test_hub import PUSH, PUSH_OR_SAY
from .tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("content", ["# Mine\n", ""])
def test_an_existing_card_is_never_overwritten(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    make_head().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == content


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("{}/clf", "clf"),
        ("{}/clf/", "clf"),
        ("{}/clf#KIND", "clf#KIND"),
        ("mean of {0}/clf, length, {0}/clf#KIND", "mean of clf, length, clf#KIND"),
        ("{}/nothing there", "{}/nothing there"),
        ("org/clf#KIND", "org/clf#KIND"),
        ("sum of its parts", "sum of its parts"),
    ],
)
def test_of_a_folder_others_read_its_name_alone(tmp_path, name, shown):
    (tmp_path / "clf").mkdir()
    assert without_place(name.format(tmp_path)) == shown.format(tmp_path)


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


CARD_CONFIGS = {
    "bare": {},
    "full": {
        "hook_point": "lm_head",
        "advantage_sizes": [4],
        "base_model_name_or_path": "org/base-model",
        "base_model_revision": "abc123",
        "control": ControlConfig("advantage", step_size=(0.5, 2.0), plausibility=0.1),
    },
    "layer": {"layer": 3, "head_sizes": [], "base_model_name_or_path": "gpt2"},
    "odd names": {"base_model_name_or_path": 'a: "b" #c\n- d', "base_model_revision": "x\ny"},
}


@pytest.mark.parametrize("name", CARD_CONFIGS)
def test_the_card_has_metadata_that_the_hub_reads_and_code_that_python_reads(tmp_path, name):
    config = CARD_CONFIGS[name]
    make_head(**config).save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "hf-recontrol"
    assert data["pipeline_tag"] == "text-generation"
    assert {"re-control", "value-head"} <= set(data["tags"])
    # A name that no repo can have may be left out, but never be written so that the metadata breaks.
    base = config.get("base_model_name_or_path")
    assert data.get("base_model") in ((base, None) if name == "odd names" else (base,))
    assert data.get("base_model_relation") == ("adapter" if data.get("base_model") else None)
    assert "None" not in str(card)
    for code in snippets(str(card)):
        ast.parse(code)
    if "control" in config:
        (written,) = re.findall(r"`(ControlConfig\(.*\))`", str(card))
        assert eval(written, {"ControlConfig": ControlConfig}) == config["control"]


def test_the_hub_accepts_the_metadata_and_refuses_what_breaks_its_rules(hub, run, tmp_path):
    cards = [model_card(ValueHeadConfig(16, **config), "me/head") for config in CARD_CONFIGS.values()]
    cards += [
        model_card(ValueHeadConfig(16, training=RECORD, base_model_name_or_path=base), repo_id)
        for base in ("org/base", "../base", "é/x", "a" * 97, "org/base.git")
        for repo_id in ("me/head", None)
    ]
    good = len(cards)
    # So that the test would notice: what the Hub is known to refuse.
    for old, new in (
        ("base_model: org/base", "base_model: ../base"),
        ("datasets: org/questions", "datasets: no data set"),
        ("pipeline_tag: text-generation", "pipeline_tag: [1]"),
        ("- re-control", "- 3"),
        ("      value: 0.531", "      value: null"),
    ):
        assert old in cards[len(CARD_CONFIGS)], cards[len(CARD_CONFIGS)]
        cards.append(cards[len(CARD_CONFIGS)].replace(old, new))
    for i, card in enumerate(cards):
        (tmp_path / f"{i:02d}.md").write_text(card)
    script = """
import sys
from huggingface_hub import ModelCard, metadata_load
for path in sys.argv[1:]:
    metadata_load(path)
    card = ModelCard("")
    card.content = open(path).read()
    try:
        card.validate()
        print("ACCEPTED")
    except ValueError as error:
        print("REFUSED", error)
"""
    output = run(script, *(str(tmp_path / f"{i:02d}.md") for i in range(len(cards))), endpoint=hub.endpoint)
    answers = [line.split()[0] for line in output.splitlines()]
    assert answers == ["ACCEPTED"] * good + ["REFUSED"] * (len(cards) - good), output


def test_a_card_that_the_hub_refuses_names_the_repo_and_pushes_nothing(hub, run, tmp_path):
    make_head().save_pretrained(tmp_path)
    output = run(PUSH_OR_SAY, '{"tags": [" "]}', str(tmp_path), endpoint=hub.endpoint)
    assert "REFUSED" in output and "'me/head'" in output and '"tags" is not valid' in output
    assert hub.repos["me/head"].branches == {"main": {}}


@pytest.mark.parametrize("name", ["a b", 'x"); import os; ("', "x\ny", "a`b", "é"])
def test_no_name_breaks_out_of_the_code_on_a_card(name):
    config = ValueHeadConfig(16, base_model_name_or_path="org/base")
    code = snippets(model_card(config, "me/head", name, revision=name))[0]
    loads = [
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ReControlForCausalLM.from_pretrained"
    ]
    assert loads == [{"subfolder": name, "revision": name}]


def test_a_local_base_is_not_given_to_the_hub_as_a_repo(tmp_path):
    make_head(base_model_name_or_path=str(tmp_path)).save_pretrained(tmp_path / "head")
    data = huggingface_hub.ModelCard.load(tmp_path / "head" / "README.md").data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data


def test_a_local_base_that_is_gone_is_not_given_to_the_hub_as_a_repo(tmp_path):
    make_head(base_model_name_or_path=str(tmp_path / "moved" / "away")).save_pretrained(tmp_path / "head")
    data = huggingface_hub.ModelCard.load(tmp_path / "head" / "README.md").data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data


def test_another_head_in_the_folder_gets_its_own_card_and_an_edited_one_is_kept(tmp_path):
    make_head(head_sizes=[12]).save_pretrained(tmp_path)
    make_head(head_sizes=[5]).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "16 - 5 - 1" in card and "16 - 12 - 1" not in card
    for edited in (card + "mine\n", card.replace("16 - 5 - 1", "five units"), card.replace("\n\n", "\n", 1)):
        (tmp_path / "README.md").write_text(edited)
        make_head(head_sizes=[7]).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == edited


RECORD = TrainingRecord(
    rewards=["politeness"],
    dataset="org/questions",
    prompts=300,
    responses=600,
    finished=17,
    tokens=28_800,
    states=28_800,
    states_dtype="bfloat16",
    sampling={"temperature": 0.9, "max_new_tokens": 48},
    figures={
        "value_error_last": 0.531,
        "correlation_last": 0.691,
        "advantage_correlation": 0.259,
        "held_out_prompts": 30,
    },
    warnings=["Only 30 held-out responses: these figures mean little."],
    command="recontrol fit --seed 3",
)


def named_license(folder):
    return huggingface_hub.ModelCard.load(folder / "README.md").data.license


def test_a_card_names_the_licence_that_it_was_given_and_no_other(tmp_path):
    head = make_head()
    head.save_pretrained(tmp_path / "a")
    assert "license" not in (tmp_path / "a" / "README.md").read_text()
    head.save_pretrained(tmp_path / "a", license="cc-by-nc-4.0")
    assert named_license(tmp_path / "a") == "cc-by-nc-4.0"
    # As `fit` and `tune` write the head anew, into its folder or another.
    head.save_pretrained(tmp_path / "a")
    loaded = ValueHead.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    ReControlForCausalLM.from_model(make_llama(), loaded).save_pretrained(tmp_path / "c")
    assert [named_license(tmp_path / name) for name in "abc"] == ["cc-by-nc-4.0"] * 3
    ReControlForCausalLM.from_model(make_llama(), loaded).save_pretrained(tmp_path / "c", license="mit")
    loaded.save_pretrained(tmp_path / "b", license="mit")
    assert [named_license(tmp_path / name) for name in "bc"] == ["mit", "mit"]
    head.save_pretrained(tmp_path / "d")
    assert "license" not in (tmp_path / "d" / "README.md").read_text()


def test_a_licence_is_not_put_on_a_card_that_somebody_edited(tmp_path, recontrol_warnings):
    head = make_head()
    head.save_pretrained(tmp_path, license="mit")
    edited = (tmp_path / "README.md").read_text().replace("license: mit", "license: apache-2.0")
    (tmp_path / "README.md").write_text(edited)
    head.save_pretrained(tmp_path, license="apache-2.0")
    assert not recontrol_warnings
    head.save_pretrained(tmp_path, license="mit")
    assert (tmp_path / "README.md").read_text() == edited
    assert "kept, without `license='mit'`" in recontrol_warnings[0]
    # A head that is loaded from there keeps what was written by hand.
    ValueHead.from_pretrained(tmp_path).save_pretrained(tmp_path / "other")
    assert named_license(tmp_path / "other") == "apache-2.0"


@pytest.mark.parametrize("license", ["", "Apache 2.0", "mit\ntags: x", ["mit"], "-"])
def test_what_is_no_licence_is_refused_before_anything_is_written(tmp_path, license):
    for what in (make_head(), ReControlForCausalLM.from_model(make_llama(), make_head())):
        with pytest.raises(ValueError, match="`license` must be an identifier"):
            what.save_pretrained(tmp_path / "head", license=license)
    with pytest.raises(ValueError, match="`license` must be an identifier"):
        make_head().push_to_hub("me/head", license=license)
    assert not list(tmp_path.glob("head/*"))


def test_a_push_names_the_licence_and_the_next_one_keeps_it(hub, run, tmp_path):
    for name, sizes in (("one", [12]), ("two", [5])):
        make_head(head_sizes=sizes).save_pretrained(tmp_path / name)
    make_head(head_sizes=[7]).save_pretrained(tmp_path / "licensed", license="mit")

    def push(name, **kwargs):
        run(PUSH, str(tmp_path / name), "me/head", json.dumps(kwargs), endpoint=hub.endpoint)
        return huggingface_hub.ModelCard(hub.repos["me/head"].branches["main"]["README.md"].decode())

    assert push("one").data.license is None
    assert push("one", license="apache-2.0").data.license == "apache-2.0"
    card = push("two")
    assert card.data.license == "apache-2.0" and "16 - 5 - 1" in card.text and is_untouched(str(card))
    assert push("licensed").data.license == "mit"
    assert push("licensed", license="cc0-1.0").data.license == "cc0-1.0"


def test_the_card_says_what_the_head_was_trained_on_and_what_was_measured():
    config = ValueHeadConfig(
        16, reward_mean=0.25, reward_std=2.0, base_model_name_or_path="org/base", training=RECORD, control=STRONG
    )
    card = huggingface_hub.ModelCard(model_card(config, "me/head"))
    for text in (
        "the reward `politeness`",
        "mean 0.25, standard deviation 2",
        "`org/questions`",
        "600 responses of the base (300 prompts, 28800 tokens, 17 finished responses)",
        "`temperature=0.9`",
        "28800 hidden states, stored as bfloat16",
        "| V's error at the last token | 0.531 |",
        "`recontrol fit --seed 3`",
        "Only 30 held-out responses",
        "Limits and misuse",
    ):
        assert text in card.text, text
    assert card.data.datasets == ["org/questions"] or card.data.datasets == "org/questions"
    # The Hub reads the figures from the metadata.
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "head"
    assert {(result.metric_type, result.metric_value) for result in results} == {
        ("mse", 0.531),
        ("pearsonr", 0.691),
        ("pearsonr", 0.259),
    }
    assert all("30 held-out prompts" in result.dataset_name for result in results)


def test_what_is_not_known_is_left_out():
    text = model_card(ValueHeadConfig(16), "me/head")
    for word in ("None", "Measured", "Training data", "base model:", "model-index", "datasets", "Recommended"):
        assert word not in text, word


def test_a_dataset_that_is_no_hub_name_is_not_given_to_the_hub_as_one():
    config = ValueHeadConfig(16, training=TrainingRecord(dataset="https://example.org/a b"))
    assert huggingface_hub.ModelCard(model_card(config)).data.to_dict().get("datasets") is None


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rewards": "politeness"}, "rewards"),
        ({"prompts": -1}, "prompts"),
        ({"dataset": 3}, "dataset"),
        ({"figures": {"value_error": float("nan")}}, "value_error"),
        ({"figures": [1]}, "figures"),
    ],
)
def test_a_record_of_the_wrong_kind_is_named(values, named):
    with pytest.raises(ValueError, match=named):
        ValueHeadConfig.from_dict({"hidden_size": 16, "training": values})


def test_the_record_travels_with_the_head(tmp_path):
    make_head(training=RECORD).save_pretrained(tmp_path)
    head = ValueHead.from_pretrained(tmp_path)
    assert head.config.training == RECORD
    model = ReControlForCausalLM.from_model(make_llama(), head)
    model.save_pretrained(tmp_path / "again")
    assert "| V's error at the last token | 0.531 |" in (tmp_path / "again" / "README.md").read_text()


def base_with_tokenizer(folder):
    model = make_llama(vocab_size=97)
    model.save_pretrained(folder)
    tiny_tokenizer(97, more_words=("Hello",)).save_pretrained(folder)
    return model


def tokens_of(model, head, control=None):
    ids = tiny_tokenizer(97, more_words=("Hello",))("Hello", return_tensors="pt")
    controlled = ReControlForCausalLM.from_model(model, head)
    return controlled.generate(**ids, max_new_tokens=48, control=control)[0]


@pytest.mark.parametrize("push", [{}, {"revision": "next"}], ids=["main", "branch"])
def test_the_code_on_a_pushed_card_runs_as_it_stands(hub, run, tmp_path, push):
    model = base_with_tokenizer(tmp_path / "base")
    hub.put("org/base", tmp_path / "base")
    head = make_head(base_model_name_or_path="org/base", control=STRONG)
    head.save_pretrained(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", json.dumps(push), endpoint=hub.endpoint)
    branch = push.get("revision", "main")
    first, second = snippets(hub.repos["me/head"].branches[branch]["README.md"].decode())
    expected = tiny_tokenizer(97, more_words=("Hello",)).decode(tokens_of(model, head))
    assert run(first, endpoint=hub.endpoint, home="fresh").strip() == expected
    model.unload()
    plain = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('org/base')\n"
        "tokenizer = AutoTokenizer.from_pretrained('org/base')\n"
        "inputs = tokenizer('Hello', return_tensors='pt')\n"
        f"print({second.strip()[:-1]}, max_new_tokens=48)[0].tolist())"
    )
    found = json.loads(run(plain, endpoint=hub.endpoint, home="other"))
    assert found == tokens_of(model, head).tolist()


def test_the_code_on_the_card_of_a_local_folder_runs_in_that_folder(run, tmp_path, monkeypatch):
    model = base_with_tokenizer(tmp_path / "base")
    head = make_head(base_model_name_or_path=str(tmp_path / "base"), control=STRONG)
    head.save_pretrained(tmp_path / "head")
    (code,) = snippets((tmp_path / "head" / "README.md").read_text())
    monkeypatch.chdir(tmp_path / "head")
    expected = tiny_tokenizer(97, more_words=("Hello",)).decode(tokens_of(model, head))
    assert run(code, endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE="1").strip() == expected


@pytest.mark.parametrize(
    ("sampling", "drawn"),
    [
        ({}, "max_new_tokens=48)"),
        ({"do_sample": False, "temperature": 0.9}, "max_new_tokens=48)"),
        ({"do_sample": True, "temperature": 0.9}, "max_new_tokens=48, do_sample=True, temperature=0.9, top_k=0)"),
        ({"do_sample": True, "temperature": 1, "top_k": 5}, "do_sample=True, temperature=1, top_k=5)"),
        ({"do_sample": True, "top_k": 0}, "do_sample=True, temperature=1, top_k=0)"),
        ({"do_sample": True, "temperature": "os.abort()"}, "max_new_tokens=48)"),
    ],
)
def test_the_code_on_a_card_draws_as_the_head_was_trained(sampling, drawn):
    (code, *_) = snippets(model_card(make_head(training=TrainingRecord(sampling=sampling)).config))
    assert drawn in code


def test_a_second_push_renews_a_card_that_nobody_edited(hub, run, tmp_path):
    for name, sizes in (("one", [12]), ("two", [5])):
        make_head(head_sizes=sizes).save_pretrained(tmp_path / name)
        run(PUSH, str(tmp_path / name), "me/head", "{}", endpoint=hub.endpoint)
    files = hub.repos["me/head"].branches["main"]
    assert "16 - 5 - 1" in files["README.md"].decode() and is_untouched(files["README.md"].decode())
    files["README.md"] += b"mine"
    run(PUSH, str(tmp_path / "one"), "me/head", "{}", endpoint=hub.endpoint)
    assert "16 - 5 - 1" in files["README.md"].decode() and files["README.md"].endswith(b"mine")
