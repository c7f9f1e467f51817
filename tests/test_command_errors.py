"""What the command says when something is wrong, never a traceback that nobody asked for; and no answer is lost."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from transformers import GenerationConfig

from hf_recontrol import ControlConfig, FitSettings
from hf_recontrol.cli import main

from .fresh import RECONTROL, run_fresh
from .resumable import COMMAND
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

HINT = "Rerun with --debug (or RECONTROL_DEBUG=1) for the traceback."


def run(*arguments, script=RECONTROL, cwd=".", **environment):
    return run_fresh(script, arguments, {**os.environ, **environment}, timeout=120, cwd=cwd)


def out_of_bounds():
    """An option and a value just outside of its setting's range, for each bound of each setting of `fit`."""
    for item in fields(FitSettings):
        option = "--" + item.name.replace("_", "-")
        for name, beyond in (("low", -1), ("high", 1), ("above", 0)):
            if name in item.metadata:
                value = item.metadata[name] + beyond
                yield pytest.param(option, value, id=f"{item.name}={value:g}")
        if "float" in str(item.type):
            yield pytest.param(option, math.nan, id=f"{item.name}=nan")
            yield pytest.param(option, "much", id=f"{item.name}=much")


@pytest.mark.parametrize(("option", "value"), list(out_of_bounds()))
def test_a_value_out_of_bounds_is_an_error_that_names_the_setting(option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inputs = ["-m", "absent", "--prompts", "absent.jsonl", "--reward", "a:b", "-o", "out"]
    monkeypatch.setattr(sys, "argv", ["recontrol", "fit", *inputs, f"{option}={value}"])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code in (1, 2) and "Traceback" not in said
    name = option.removeprefix("--")
    assert name in said or name.replace("-", "_") in said
    assert not list(tmp_path.iterdir())


def test_bounds_in_a_process_of_their_own(tmp_path):
    for option, value, words in (
        ("--seed", -5, "`seed` must be an integer of at least 0, got -5"),
        ("--learning-rate", -1, "`learning_rate` must be above 0"),
    ):
        code, out, err = run("train", "states", "-o", "head", option, value, cwd=tmp_path)
        assert code == 1 and not out and words in err and "Traceback" not in err and err.endswith(HINT + "\n")


# A command that fails in a way that nobody foresaw.
BROKEN = """
from hf_recontrol.cli import app, main

@app.command()
def broken():
    raise {error}

main()
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("KeyError('x')", "recontrol: KeyError: 'x'"),
        ("AttributeError()", "recontrol: AttributeError"),
        ("AssertionError('no')", "recontrol: AssertionError: no"),
        ("RuntimeError('size mismatch')", "recontrol: RuntimeError: size mismatch"),
        ("RecursionError('deep')", "recontrol: RecursionError: deep"),
        ("OSError('no disk')", "recontrol: no disk"),
    ],
)
def test_no_kind_of_error_is_a_traceback_unless_it_is_asked_for(error, words):
    script = BROKEN.format(error=error)
    code, _, err = run("broken", script=script)
    assert code == 1 and err.splitlines()[-2:] == [words, HINT] and "Traceback" not in err


def test_a_traceback_is_shown_on_demand():
    script = BROKEN.format(error="KeyError('x')")
    for arguments, environment in (
        (["broken", "--debug"], {}),
        (["--debug", "broken"], {}),
        (["broken"], {"RECONTROL_DEBUG": "1"}),
    ):
        code, _, err = run(*arguments, script=script, **environment)
        assert code == 1 and "Traceback" in err and err.rstrip().endswith("KeyError: 'x'")
    code, _, err = run("broken", script=script, RECONTROL_DEBUG="0")
    assert code == 1 and "Traceback" not in err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose every word is one that few encodings have."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model("llama", torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "base")
    words = tuple(f"{letter}{i}" for i in range(46) for letter in ("é", "\N{GRINNING FACE}"))
    tiny_tokenizer(more_words=words).save_pretrained(folder / "base")
    control = ControlConfig(step_size=0.1)
    tiny_head(model, "lm_head", control=control).save_pretrained(folder / "head")
    return folder


def test_an_answer_that_the_encoding_of_stdout_lacks_is_not_lost(base):
    command = [COMMAND, "generate", base / "head", "é1 é2", "-m", base / "base", "--max-new-tokens", "8", "--compare"]
    found = {}
    # Read when Python starts, so each in a process of its own.
    for encoding in ("ascii", "cp1252"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        found[encoding] = done.stdout
    text = found["ascii"].decode("utf-8")  # what typer makes of ASCII
    assert "é" in text and "\N{GRINNING FACE}" in text
    assert found["cp1252"] == text.encode("cp1252", "backslashreplace")


def test_the_command_s_defaults_do_not_override_a_generation_config(base, tmp_path):
    GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=7, max_new_tokens=5).save_pretrained(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "é1 é2"}\n')
    rollout = ["rollout", "-m", base / "base", "--prompts", "prompts.jsonl", "--generation-config", tmp_path]
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "max_new_tokens": 5}
    for name, options, expected in (
        ("plain", [], given),
        ("warm", ["--temperature", 1.2], given | {"temperature": 1.2}),
        ("short", ["--max-new-tokens", 2], given | {"max_new_tokens": 2}),
    ):
        code, _, err = run(*rollout, "-o", name, *options, cwd=tmp_path)
        assert code == 0, err
        used = json.loads((tmp_path / name / "manifest.json").read_text())["settings"]["generation_config"]
        assert {key: used.get(key) for key in given} == expected and used["do_sample"] is True
