"""The model type `recontrol` of lm-evaluation-harness: its scores and responses are those of a naive reference."""

import importlib
import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM

from .reference import reference_greedy, reference_logits
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

CONTROL = ControlConfig(step_size=0.5, num_steps=5)
OTHER = ControlConfig(step_size=0.8, num_steps=8)
NEW = 8


@pytest.fixture
def tiny_tasks(tmp_path):
    """A folder with a base, a head that knows it, and two tasks: one scored by log-likelihood, one generated."""
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    head = tiny_head(base, "lm_head", control=CONTROL)
    head.config.base_model_name_or_path = str(tmp_path / "base")
    head.save_pretrained(tmp_path / "head")
    rows = [
        {"question": "w5 w9 w13", "choices": ["w20 w21", "w30 w31 w32"], "answer": 0},
        {"question": "w7 w8", "choices": ["w40", "w50 w6"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"task": "tiny_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    choice |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    generated = {"task": "tiny_generate", "output_type": "generate_until", "doc_to_target": "w1"}
    generated |= {"generation_kwargs": {"until": [], "max_gen_toks": NEW}, "metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "tasks").mkdir()
    for task in (choice, generated):  # JSON is YAML
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return tmp_path, base, head, rows


def expected_results(base, head, rows, control):
    """The log-likelihood of each choice, and the generated text of each row, by the naive reference."""
    tokenizer = tiny_tokenizer()
    scores, texts = [], []
    for row in rows:
        question = tokenizer(row["question"], return_tensors="pt").input_ids
        for choice in row["choices"]:
            answer = tokenizer(choice, return_tensors="pt").input_ids
            logits = reference_logits(base, head, torch.cat([question, answer], 1), control=control)
            log_probs = logits[0, question.shape[1] - 1 : -1].log_softmax(-1)
            scores.append(float(log_probs.gather(1, answer[0][:, None]).sum()))
        tokens = reference_greedy(base, head, question, control=control, max_new_tokens=NEW)
        texts.append(tokenizer.decode(tokens[0, question.shape[1] :], skip_special_tokens=True))
    return scores, texts


def evaluated(model, folder, **kwargs):
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model,
        tasks=["tiny_choice", "tiny_generate"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        **kwargs,
    )
    samples = results["samples"]
    scores = [response[0][0] for sample in samples["tiny_choice"] for response in sample["resps"]]
    return results, scores, [sample["resps"][0][0] for sample in samples["tiny_generate"]]


@pytest.mark.parametrize("form", ["head", "base_and_head", "settings", "off"])
def test_by_model_type(form, tiny_tasks):
    pytest.importorskip("lm_eval")
    import hf_recontrol.integrations.lm_eval  # noqa: F401

    folder, base, head, rows = tiny_tasks
    args = {"pretrained": str(folder / "head")}
    if form == "base_and_head":
        args = {"pretrained": str(folder / "base"), "value_head": str(folder / "head")}
    args |= {"settings": {"step_size": 0.8, "num_steps": 8}, "off": {"step_size": 0}}.get(form, {})
    control = {"settings": OTHER, "off": None}.get(form, CONTROL)
    results, scores, texts = evaluated("recontrol", folder, model_args=args, device="cpu", batch_size=2)
    expected, expected_texts = expected_results(base, head, rows, control)
    assert scores == pytest.approx(expected, abs=1e-3) and texts == expected_texts
    if form != "off":
        base_scores, base_texts = expected_results(base, head, rows, None)
        assert scores != pytest.approx(base_scores, abs=0.1) and texts != base_texts
    assert results["config"]["value_head"] == str(folder / "head")
    assert results["config"]["control"]["step_size"] == {"settings": 0.8, "off": 0}.get(form, 0.5)


def test_every_setting_of_a_control_can_be_changed(tiny_tasks):
    pytest.importorskip("lm_eval")
    from hf_recontrol.integrations.lm_eval import ReControlLM

    folder, *_ = tiny_tasks
    changes = {"method": "ascent", "step_size": 0.1, "num_steps": 3, "l2": 0.5, "plausibility": 0.1, "max_kl": 0.2}
    changes["target"] = [0.5]
    assert changes.keys() == ControlConfig.__dataclass_fields__.keys()
    assert ReControlLM(str(folder / "head"), device="cpu", **changes).model.control == ControlConfig(**changes)


def test_with_a_loaded_model(tiny_tasks):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    folder, base, head, rows = tiny_tasks
    model = ReControlForCausalLM.from_model(tiny_model("llama", torch.float32), head)
    wrapped = huggingface.HFLM(pretrained=model, tokenizer=tiny_tokenizer())
    _, scores, texts = evaluated(wrapped, folder)
    expected, expected_texts = expected_results(base, head, rows, CONTROL)
    assert scores == pytest.approx(expected, abs=1e-3) and texts == expected_texts


def command_line(folder):
    """The arguments of a run with settings of its own, and where it puts its samples."""
    arguments = ["run", "--model", "recontrol", "--device", "cpu", "--tasks", "tiny_choice", "--log_samples"]
    arguments += [
        "--model_args",
        f"pretrained={folder / 'base'},value_head={folder / 'head'},step_size=0.8,num_steps=8",
    ]
    return [*arguments, "--include_path", str(folder / "tasks"), "--output_path", str(folder / "out")]


def check_samples(folder, base, head, rows):
    (samples,) = (folder / "out").rglob("samples_tiny_choice*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    scores = [float(response[0][0]) for line in lines for response in line["resps"]]
    assert scores == pytest.approx(expected_results(base, head, rows, OTHER)[0], abs=1e-3)


def test_from_its_command(tiny_tasks, monkeypatch):
    pytest.importorskip("lm_eval")
    import lm_eval.tasks

    from hf_recontrol.integrations.lm_eval import cli_evaluate

    folder, *expected = tiny_tasks
    # Without lm-eval's own tasks, whose thousands of files take half a minute to list.
    own_tasks = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command_line(folder)])
    cli_evaluate()
    check_samples(folder, *expected)


@pytest.mark.slow
def test_from_a_shell(tiny_tasks):
    pytest.importorskip("lm_eval")
    folder, *expected = tiny_tasks
    command = [sys.executable, "-m", "hf_recontrol.integrations.lm_eval", *command_line(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    check_samples(folder, *expected)


def test_refuses_what_cannot_be_controlled(tiny_tasks):
    pytest.importorskip("lm_eval")
    from hf_recontrol.integrations.lm_eval import ReControlLM

    folder, _, head, _ = tiny_tasks
    with pytest.raises(TypeError, match="HFLM"):
        ReControlLM(tiny_model("llama"))
    head.config.base_model_name_or_path = None
    head.save_pretrained(folder / "orphan")
    with pytest.raises(ValueError, match="does not say which model it is for"):
        ReControlLM(str(folder / "orphan"), device="cpu")
    with pytest.raises(ValueError, match="num_steps"):
        ReControlLM(str(folder / "head"), num_steps=-1, device="cpu")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "hf_recontrol.integrations.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"hf_recontrol\[lm-eval\]"):
        importlib.import_module("hf_recontrol.integrations.lm_eval")
