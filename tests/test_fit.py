"""One line from prompts to a head: what it makes, that it goes on, what it refuses."""

import json
import os
import re
import sys
import unicodedata

import pytest
import torch
from transformers import GenerationConfig

from hf_recontrol import (
    ControlConfig,
    DataCurve,
    FitSettings,
    LoadingSettings,
    ReControlForCausalLM,
    ValueHead,
    compare,
    data_curve,
    split_by_prompt,
)
from hf_recontrol.data.fingerprints import prompt_hash
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import States, StateStore
from hf_recontrol.pipelines.fit import fit
from hf_recontrol.pipelines.loading import base_with_head
from hf_recontrol.pipelines.run_report import _examples
from hf_recontrol.training.held_out import held_out_prompts
from hf_recontrol.training.stage import train_head

from .fresh import run_fresh
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("recontrol_warnings")

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 45)]


def variety(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


def words(prompts, completions, **columns):
    """Of texts and of chats."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return variety(prompts, texts)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def base():
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


OPTIONS = {
    "num_samples": 2,
    "max_new_tokens": 8,
    "temperature": 1.5,
    "head_sizes": [16],
    "advantage_sizes": [8],
    "num_epochs": 4,
    "quiet": True,
}


def run(base, output, reward=variety, prompts=PROMPTS, **changes):
    return fit(base, prompts, reward, output, tokenizer=tiny_tokenizer(), **OPTIONS | changes)


def hashes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_head_a_report_and_plain_files(base, tmp_path):
    figures = run(base, tmp_path)
    rollouts = load_rollouts(tmp_path / "rollouts")
    assert len(rollouts) == 80 and all(r.reward == [float(len(set(r.completion.split())))] for r in rollouts)
    assert StateStore.open(tmp_path / "states").num_states == sum(len(r.completion_ids) for r in rollouts)
    assert {"value_error", "advantage_correlation", "constant_correlation", "by_position"} <= figures.keys()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "variety" in page and "<svg" in page and "static at step size" in page

    card = (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert "`variety`" in card and f"| {figures['value_error_last']:.3f} |" in card
    assert "80 responses of the base (40 prompts" in card and "`temperature=1.5`" in card
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.head_sizes == [16] and head.config.control is not None
    examples = _examples([tmp_path], tiny_tokenizer(), head, FitSettings())
    assert examples
    for example in examples:
        ids = next(r.completion_ids for r in rollouts if r.completion == example["completion"])
        assert "".join(example["tokens"]) == tiny_tokenizer().decode(ids) and len(example["tokens"]) == len(ids)

    model = ReControlForCausalLM.from_model(base, tmp_path / "head")
    ids = torch.tensor([[5, 6]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 6)


def of_the_prompt(prompts, completions, **columns):
    """No control can change it."""
    return [float(int(text.split()[0][1:]) % 5) for text in prompts]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": of_the_prompt}, "is not clearly better than the base: +0.00"),
        ({"target_kl": 1e3}, "The head recommends no control: No control could be compared at 1000 nats"),
    ],
    ids=["no gain", "no control"],
)
def test_a_recommendation_that_is_worth_nothing_is_told(base, tmp_path, recontrol_warnings, changes, said):
    run(base, tmp_path, **changes)
    assert any(said in each for each in recontrol_warnings)
    assert (ValueHead.from_pretrained(tmp_path / "head").config.control is None) == ("target_kl" in changes)


def test_whether_more_responses_would_help_is_said_where_prompts_are_enough(base, tmp_path):
    prompts = [f"w{5 + i} w7" for i in range(60)]
    figures = run(base, tmp_path, prompts=prompts)
    curve = DataCurve(**figures["data_curve"])
    assert curve == DataCurve(**data_curve(tmp_path / "states").to_dict())
    assert curve.responses == [24, 48, 96]
    assert curve.text in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run(base, tmp_path, prompts=prompts) == figures


@pytest.mark.parametrize("changes", [{"prompts": PROMPTS}, {"directions": False}, {"every": 2}])
def test_no_more_is_said_of_more_responses_than_can_be(base, tmp_path, changes):
    prompts = [f"w{5 + i} w7" for i in range(60)]
    assert "data_curve" not in run(base, tmp_path, **{"prompts": prompts} | changes)
    assert "More responses" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_said_of_more_responses_stops_nothing(base, tmp_path, monkeypatch, recontrol_warnings):
    def fails(*args):
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr("hf_recontrol.pipelines.fit.data_curve", fails)
    assert "data_curve" not in run(base, tmp_path, prompts=[f"w{5 + i} w7" for i in range(60)])
    assert any("cannot be said: singular" in said for said in recontrol_warnings)
    assert (tmp_path / "report.html").is_file()


def test_another_target_kl_finds_another_step_size_unless_the_control_is_the_user_s(
    base, tmp_path, recontrol_warnings
):
    run(base, tmp_path, target_kl=0.02)
    weak = ValueHead.from_pretrained(tmp_path / "head")
    run(base, tmp_path, target_kl=0.2)
    strong = ValueHead.from_pretrained(tmp_path / "head")
    assert strong.config.control.step_size > 1.5 * weak.config.control.step_size
    assert all(torch.equal(tensor, strong.state_dict()[name]) for name, tensor in weak.state_dict().items())
    strong_step_size = strong.config.control.step_size
    mine = ControlConfig(strong.config.control.method, 0.123)
    strong.config.control = mine
    strong.save_pretrained(tmp_path / "head")
    run(base, tmp_path, target_kl=0.2)
    assert not any("keeps" in said for said in recontrol_warnings)
    run(base, tmp_path, target_kl=0.5)
    assert ValueHead.from_pretrained(tmp_path / "head").config.control == mine
    assert sum(str(mine) in said and "config.json" in said for said in recontrol_warnings) == 1
    # What the warning advises.
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"control": None}))
    run(base, tmp_path, target_kl=0.5)
    found = ValueHead.from_pretrained(tmp_path / "head").config.control
    assert found.method == mine.method and found.step_size > strong_step_size


def test_processes_that_cannot_share_a_training_batch_are_told_before_anything_is_made(base, tmp_path, monkeypatch):
    class Three:
        index, count = 0, 3

    monkeypatch.setattr("hf_recontrol.pipelines.fit.Processes", Three)
    with pytest.raises(ValueError, match=r"batches of 64 responses .* 3 processes cannot share evenly"):
        run(base, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_made_again(base, tmp_path, monkeypatch):
    figures = run(base, tmp_path)
    before = hashes(tmp_path)
    for name in (
        "collection.rollouts._sample",
        "collection.scoring.labels.scored_rollouts",
        "collection.states._Reader.read",
        "training.stage._train_both",
        "pipelines.fit.recommend_control",
    ):
        monkeypatch.setattr(f"hf_recontrol.{name}", None)
    assert run(base, tmp_path) == figures
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"reward": length}, "reward"),
        ({"head_sizes": [32]}, "head"),
        ({"every": 2}, "every"),
        ({"num_epochs": 5}, "training.num_epochs"),
        ({"prompts": PROMPTS[:-1]}, "prompts"),
    ],
)
def test_other_settings_are_refused_and_change_nothing(base, tmp_path, changes, name):
    run(base, tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=rf"(other settings: .*|another )\b{re.escape(name)}"):
        run(base, tmp_path, **changes)
    assert hashes(tmp_path) == before


def test_several_rewards_are_several_objectives(base, tmp_path):
    base.train()
    run(base, tmp_path, reward=[variety, length])
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.num_objectives == 2 and len(head.config.reward_mean) == 2
    assert load_rollouts(tmp_path / "rollouts")[0].reward[1] == len(load_rollouts(tmp_path / "rollouts")[0].completion)

    assert all(part.training for part in base.modules()), "the model is as it was"


def test_a_column_by_its_name_and_chat_messages(base, tmp_path):
    prompts = [{"prompt": [{"role": "user", "content": f"w{i}"}], "score": i % 7} for i in range(5, 45)]
    fit(base, prompts, "score", tmp_path, tokenizer=tiny_tokenizer(chat=True), **OPTIONS)
    rollouts = load_rollouts(tmp_path / "rollouts")
    assert all(r.reward == [float(r.columns["score"])] for r in rollouts)
    assert rollouts[0].prompt == [{"role": "user", "content": "w5"}]


def test_a_head_on_a_layer_has_no_advantage_part(base, tmp_path):
    figures = run(base, tmp_path, hook_point="decoder_layer", layer=1)
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.layer == 1 and head.config.advantage_sizes is None and "advantage_error" not in figures
    assert head.config.control.method == "ascent" and not head.config.static_vector


def test_a_foreign_head_is_not_overwritten(base, tmp_path):
    run(base, tmp_path / "run")
    head = tmp_path / "run" / "head"
    (head / "training" / "settings.json").unlink()
    with pytest.raises(ValueError, match="not trained there"):
        train_head(head, tmp_path / "run" / "states")


def test_a_run_replaces_no_file_of_somebody_else_s(base, tmp_path):
    output, drawing = tmp_path / "run", {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=True)}
    (output / "head").mkdir(parents=True)
    for name, changes in (("fit.yaml", {}), ("report.html", {}), ("generation_config.json", drawing)):
        (output / name).write_text("# mine")
        with pytest.raises(OSError, match=f"{name} was not written by a run"):
            run(base, output, **changes)
        assert (output / name).read_text() == "# mine"
        (output / name).unlink()
    (output / "head" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OSError, match="not a head's"):
        run(base, output)
    assert {path.name for path in output.rglob("*")} == {"head", "config.json"}
    base.save_pretrained(tmp_path / "base")
    before = sorted(tmp_path.joinpath("base").rglob("*"))
    with pytest.raises(ValueError, match="the base's own folder"):
        fit(tmp_path / "base", [f"w{i}" for i in range(20)], variety, tmp_path / "base", tokenizer=tiny_tokenizer())
    assert sorted(tmp_path.joinpath("base").rglob("*")) == before


def test_a_base_without_a_tokenizer_takes_the_one_that_is_given(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    with pytest.raises((OSError, ValueError)):
        fit(tmp_path / "base", PROMPTS, variety, tmp_path / "run", **OPTIONS)
    run(str(tmp_path / "base"), tmp_path / "run")
    with base_with_head(tmp_path / "base", tmp_path / "run/head", tiny_tokenizer(), LoadingSettings()) as (model, own):
        assert isinstance(own, type(tiny_tokenizer())) and model.value_head is not None


def test_what_cannot_work_is_said_before_anything_is_made(base, tmp_path):
    with pytest.raises(ValueError, match="no_such_module"):
        run(base, tmp_path / "run", reward="no_such_module:reward")
    with pytest.raises(ValueError, match="same name"):
        run(base, tmp_path / "run", reward=[variety, variety])
    with pytest.raises(ValueError, match="tokenizer"):
        fit(base, PROMPTS, variety, tmp_path / "run")
    with pytest.raises(ValueError, match="1 prompts cannot be split"):
        run(base, tmp_path / "run", prompts=["w5", "w5"])
    with pytest.raises(ValueError, match="`states_dtype` must be one of"):
        run(base, tmp_path / "run", states_dtype="float8")
    with pytest.raises(TypeError, match="no setting 'epochs' here; did you mean 'num_epochs'"):
        run(base, tmp_path / "run", epochs=3)
    scored = [{"prompt": text, "score": i % 3, "name": "x"} for i, text in enumerate(PROMPTS)]
    for reward, message in (
        ("column:absent", "no column 'absent'"),
        ("name", "row 0: the column name holds 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(base, tmp_path / "run", reward=reward, prompts=scored)
    for change, message in (
        ({"hook_point": "decoder_layer", "layer": 99}, "decoder layer 99"),
        ({"head_sizes": [0]}, "head_sizes"),
        ({"advantage_sizes": [-1]}, "advantage_sizes"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"every": 0}, "every"),
        ({"max_gigabytes": 0.0}, "max_gigabytes"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"lr_scheduler_type": "nope"}, "nope"),
        ({"report_to": "nope"}, "nope"),
        ({"training_arguments": {"learning_rate": 1e-3}}, r"must not hold \['learning_rate'\]"),
        ({"training_arguments": {"adam_epsilon": "1e-8"}}, "texts for the numbers"),
        ({"training_arguments": {"eval_strategy": "nope"}}, "cannot be used"),
        ({"generation_config": 3}, "`generation_config` must be"),
        ({"reward": []}, "No reward is given"),
        ({"reward": [3]}, r"must be functions or their names, got \[3\]"),
        ({"prompts": load_prompts(PROMPTS), "limit": 3}, "`limit` is about reading prompts"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run(base, tmp_path / "run", **change)
    with pytest.raises(ValueError, match=r"`training_arguments` holds \['nope'\]"):
        run(base, tmp_path / "run", training_arguments={"nope": 1})
    assert not list(tmp_path.glob("run/*/*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        run(base, tmp_path / "file")


def test_what_is_not_installed_is_named_before_anything_is_made(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"`fit` needs `pip install 'hf_recontrol\[train\]'`"):
        run(base, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    program = "import sys; sys.modules['accelerate'] = None; import hf_recontrol.pipelines.fit"
    code, _, error = run_fresh(program, (), os.environ, timeout=120, cold=True)
    assert (
        code == 1 and "ImportError: Training needs `pip install 'hf_recontrol[train]'` (No module named 'acc" in error
    )


def test_train_head_goes_on_from_v_when_it_is_done(base, tmp_path, monkeypatch):
    run(base, tmp_path)
    figures = json.loads((tmp_path / "head" / "training.json").read_text())
    for name in ("training.json", "config.json", "model.safetensors"):
        (tmp_path / "head" / name).unlink()
    monkeypatch.setattr("hf_recontrol.training.value.ValueTrainer.fit", None)
    run(base, tmp_path)
    again = json.loads((tmp_path / "head" / "training.json").read_text())
    for name, value in figures["figures"].items():
        if isinstance(value, float):
            assert again["figures"][name] == pytest.approx(value, abs=1e-5)


def test_after_a_training_that_diverged_the_same_folder_takes_another_learning_rate(base, tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        run(base, tmp_path, learning_rate=1e30)
    run(base, tmp_path)
    assert (tmp_path / "head" / "config.json").is_file()


def test_a_g_that_can_hardly_steer_is_told_where_the_figures_are(base, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_recontrol.training.advantage._USELESS", 2.0)
    figures = run(base, tmp_path)
    [said] = [each for each in figures["warnings"] if "can hardly steer" in each]
    assert said in ValueHead.from_pretrained(tmp_path / "head").config.training.warnings
    assert "can hardly steer" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_prompts_to_choose_a_control_on_come_from_all_of_the_file():
    """Of a file of two kinds of prompts, one after the other, both kinds are among them."""
    texts = [f"w{kind} w{i}" for kind in (5, 6) for i in range(10, 90)]
    prompts = load_prompts(texts)
    hashes = torch.tensor([prompt_hash(text) for text in texts])
    states = States(torch.zeros(160, 2), torch.ones(160).long(), torch.zeros(160, 1), hashes)
    store = StateStore([states])
    few = held_out_prompts(prompts, store, FitSettings(validation_split=0.2), 64)
    assert len(few) == 32 and few.numbers == sorted(few.numbers)
    many = held_out_prompts(prompts, store, FitSettings(validation_split=0.6), 64)
    assert len(many) == 64 and many.numbers == sorted(many.numbers)
    kinds = [row["prompt"].split()[0] for row in many.rows]
    assert 16 < kinds.count("w5") < 48
    assert held_out_prompts(prompts, store, FitSettings(validation_split=0.6), 64).numbers == many.numbers


def test_what_open_truncated_needs_is_asked_before_anything_is_scored(base, tmp_path):
    def never(completions, **columns):
        assert completions == ["I do not know."] * len(completions)
        return [1.0 for _ in completions]

    # A token that the base does not have.
    base.generation_config.eos_token_id = 500
    with pytest.raises(ValueError, match=r"none of these 80 does.*max_new_tokens"):
        run(base, tmp_path, reward=never, open_truncated=True)


def test_draws_that_are_not_of_the_whole_distribution_are_told_before_any(base, tmp_path, recontrol_warnings):
    with pytest.raises(ValueError, match="the model has room for"):
        run(base, tmp_path, top_p=0.5, prompts=[*PROMPTS, "w0 " * 100])
    assert any("top_p=0.5" in said for said in recontrol_warnings)
    assert not list((tmp_path / "rollouts").glob("part-*"))


def test_a_prompt_is_the_same_however_it_was_stored():
    text = "Was heißt\n\n  „schön“?"
    stored = [
        text.replace("\n", "\r\n"),
        f" {text}\n",
        text.replace("  ", "\u00a0"),
        unicodedata.normalize("NFD", text),
    ]
    same = stored + [[{"role": "user", "content": each, "name": None}] for each in [text, *stored]]
    same += [[{"role": "user", "content": [{"type": "text", "text": each}]}] for each in stored]
    assert {prompt_hash(each) for each in same} == {prompt_hash(text)}
    two = [
        [{"role": "user", "content": [{"type": "text", "text": each}, {"type": "text", "text": "w"}]}]
        for each in same[:4]
    ]
    assert len(set(map(prompt_hash, two))) == 1
    others = ["was heißt schön?", text[:-1], [{"role": "system", "content": text}]]
    others += [[{"role": "system", "content": "Kurz."}, {"role": "user", "content": text}]]
    assert len({prompt_hash(each) for each in [text, *others, two[0]]}) == 6


def test_a_head_says_which_prompts_it_was_trained_and_validated_on(base, tmp_path):
    chats = [[{"role": "user", "content": f"{text} "}] for text in PROMPTS]
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "base")
    fit(
        base,
        chats,
        words,
        tmp_path / "run",
        tokenizer=tiny_tokenizer(chat=True),
        **OPTIONS,
    )
    # The control is found, and the head saved again, after the training.
    head = ValueHead.from_pretrained(tmp_path / "run" / "head")
    seen = head.seen_prompts
    store = StateStore.open(tmp_path / "run" / "states")
    train, held_out = split_by_prompt(store.prompts, 0.1, 0)
    assert head.config.control is not None
    assert set(seen.trained_on.tolist()) == set(store.prompts[train].tolist())
    assert set(seen.validated_on.tolist()) == set(store.prompts[held_out].tolist())
    assert seen.counts() == {"trained_on": 36, "validated_on": 4, "tuned_on": 0}
    # As texts, they are the same prompts.
    assert {prompt_hash(text) for text in PROMPTS} == {*seen.trained_on.tolist(), *seen.validated_on.tolist()}
    with pytest.raises(ValueError, match=r"40 of 40 prompts to compare on are among those .* the first is row 0 "):
        compare(
            tmp_path / "base",
            PROMPTS,
            words,
            tmp_path / "out",
            head=tmp_path / "run" / "head",
            controls=["base"],
            quiet=True,
        )
    assert not (tmp_path / "out").exists()
