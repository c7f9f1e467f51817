"""The command: by its entry point, from prompts to controlled text, and what it says of mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_recontrol
from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead
from hf_recontrol.cli import app, main
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.data.prompts import load_prompts

from .conftest import make_head
from .fresh import RECONTROL, run_fresh
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

COMMAND = str(Path(sys.executable).with_name("recontrol"))


def run_command(*arguments, cwd=None) -> None:
    """The command by its entry point."""
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def run(*arguments, code: int = 0, cwd=".") -> tuple[str, str]:
    """What the command prints, and what it says on stderr; without the seconds that importing torch takes."""
    found, out, err = run_fresh(RECONTROL, arguments, os.environ, timeout=120, cwd=cwd)
    assert found == code, out + err
    assert "Traceback" not in err
    return out, err


def run_main(*arguments, code: int = 0, cwd=".") -> str:
    """All that the command says."""
    return "".join(run(*arguments, code=code, cwd=cwd))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_every_stage_from_prompts_to_controlled_text(base, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}", "topic": i}) + "\n" for i in range(10, 40)))
    (tmp_path / "my_reward.py").write_text(
        "def dull(prompts, completions, **columns):\n"
        "    return [-float(len(set(text.split()))) for text in completions]\n"
    )
    run_command(
        "rollout",
        "-m",
        base,
        "--prompts",
        prompts,
        "-o",
        "rollouts",
        "--num-samples",
        4,
        "--max-new-tokens",
        6,
        cwd=tmp_path,
    )
    labelled, _ = run("label", "rollouts", "--reward", "my_reward:dull", cwd=tmp_path)
    assert "120 responses, mean reward -" in labelled
    _, twice = run("label", "rollouts", "--reward", "topic", "--reward", "column:topic", code=1, cwd=tmp_path)
    assert "Two rewards have the same name" in twice
    collected, _ = run("states", "rollouts", "-m", base, "-o", "states", "--states-dtype", "int8", cwd=tmp_path)
    assert "of 120 responses" in collected and "int8 error" in collected
    options = ("--head-sizes", "16,8", "--advantage-sizes", "8", "--num-epochs", 3, "--lr-scheduler-type", "cosine")
    figures = json.loads(run("train", "states", "-o", "head", *options, cwd=tmp_path)[0])
    assert set(figures) == {
        "baselines.constant",
        "baselines.prompt_mean",
        "value_error",
        "value_error_last",
        "held_out_episodes",
        "held_out_prompts",
        "correlation_first",
        "correlation_last",
        "critic_value_error",
        "critic_value_error_last",
        "critic_correlation_last",
        "advantage_correlation",
        "advantage_error",
        "constant_correlation",
        "constant_error",
    }
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.head_sizes == [16, 8] and head.config.base_model_name_or_path == str(base)
    described = json.loads(run("info", tmp_path / "head")[0])
    assert described["parameters"] == sum(p.numel() for p in head.parameters())

    # From here the head finds its base by itself, in the command and in Python.
    strong = ("--method", "advantage", "--step-size", 1000, "--max-new-tokens", 8)
    shown = run("generate", tmp_path / "head", "w10 w11", "--compare", *strong)[0]
    heading, _, base_text, _, controlled_text = shown.splitlines()
    assert heading == "# w10 w11" and base_text != controlled_text
    model = ReControlForCausalLM.from_pretrained(tmp_path / "head")
    ids = tiny_tokenizer()("w10 w11", return_tensors="pt")
    output = model.generate(**ids, control=ControlConfig("advantage", 1000.0), max_new_tokens=8, do_sample=False)
    assert tiny_tokenizer().decode(output[0, 2:], skip_special_tokens=True) == controlled_text
    *kept, last = base_text.split()
    cut = run("generate", tmp_path / "head", "w10 w11", "--compare", *strong, "--stop-strings", f"\\x20{last}")[0]
    assert cut.splitlines()[2].split() == base_text.split()[: [*kept, last].index(last)]


def test_label_finds_a_column_where_the_first_part_holds_no_rows(tmp_path, monkeypatch, recontrol_warnings):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", dtype=torch.float32)
    prompts = load_prompts([{"prompt": text, "topic": 1 + i} for i, text in enumerate(["w5 " * 100_000, "w6", "w7"])])
    write_rollouts("r", model, tiny_tokenizer(), prompts, max_new_tokens=2, part_size=1, on_bad_rows="skip")
    done = CliRunner().invoke(app, ["label", "r", "--reward", "topic"])
    assert "2 responses, mean reward 2.500" in done.output, done.output


@pytest.mark.parametrize(
    "command", ["demo", "fit", "rollout", "label", "states", "train", "generate", "trace", "info"]
)
def test_help_teaches(command):
    text = CliRunner().invoke(app, [command, "--help"]).output
    assert "Usage" in text and "--help" in text
    assert "Example" in text or command in ("demo", "info")


def test_the_version_is_shown():
    assert CliRunner().invoke(app, ["--version"]).output == f"hf_recontrol {hf_recontrol.__version__}\n"


def test_without_a_command_there_is_help():
    assert "rollout" in CliRunner().invoke(app, []).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "no/such/folder/here"), "no/such/folder/here"),
        (("label", "absent", "--reward", "column:x"), "absent holds no manifest.json"),
        (("states", "absent", "-m", "x", "-o", "out"), "absent holds no manifest.json"),
        (("train", "absent", "-o", "head"), "absent holds no manifest.json"),
        (("fit", "-m", "x", "--prompts", "absent.csv", "--reward", "a:b", "-o", "out"), "absent.csv"),
        (("rollout", "-m", "x", "--prompts", "absent.jsonl", "-o", "out"), "absent.jsonl"),
        (("demo", "--prompts", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_errors_are_one_line_with_exit_code_1(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recontrol", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    *_, error, hint = capsys.readouterr().err.strip().splitlines()
    assert raised.value.code == 1
    assert error.startswith("recontrol: ") and words in error
    assert hint == "Rerun with --debug (or RECONTROL_DEBUG=1) for the traceback."
    assert not list(tmp_path.iterdir()), "nothing was made"


@pytest.mark.parametrize("target", ["file", "file/rollouts"])
def test_a_target_that_cannot_be_written_is_an_error_before_the_work(target, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_recontrol.collection.rollouts.write_rollouts", None)
    monkeypatch.setattr(
        sys, "argv", ["recontrol", "rollout", "-m", str(base), "--prompts", "prompts.jsonl", "-o", target]
    )
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 1 and target.split("/")[0] in capsys.readouterr().err


def test_an_error_of_the_reward_function_itself_shows_where(base, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n')
    run_main("rollout", "-m", base, "--prompts", "prompts.jsonl", "-o", "r", "--max-new-tokens", 2, cwd=tmp_path)
    (tmp_path / "bad.py").write_text("def reward(prompts, completions, **columns):\n    return [1 / 0]\n")
    arguments = [COMMAND, "label", "r", "--reward", "bad:reward"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ZeroDivisionError: division by zero (" in done.stderr and "bad.py, line 2, in reward)" in done.stderr


def test_the_step_size_of_one_method_is_not_taken_for_another(base, tmp_path):
    head = make_head(
        hidden_size=16, hook_point="lm_head", advantage_sizes=[4], control=ControlConfig("advantage", 9.5)
    )
    head.save_pretrained(tmp_path / "head")
    generate = ("generate", tmp_path / "head", "w5", "-m", base, "--max-new-tokens", 2, "--method", "ascent")
    assert "no step size for 'ascent'" in run_main(*generate, code=1)
    assert "## ascent, step size 0.5" in run_main(*generate, "--step-size", 0.5, "--compare")


def test_a_base_that_is_a_head_or_nothing_is_named(base, tmp_path):
    make_head(hidden_size=16, base_model_name_or_path="org/base").save_pretrained(tmp_path / "head")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n')
    for model, words in (
        (tmp_path / "head", "its base is org/base"),
        ("/no/such", "base model /no/such is no folder"),
    ):
        arguments = ("rollout", "-m", model, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "r")
        assert words in run_main(*arguments, code=1)


def test_widths_that_are_no_numbers_are_a_usage_error(tmp_path):
    done = CliRunner().invoke(app, ["train", "absent", "-o", str(tmp_path / "head"), "--head-sizes", "big"])
    assert done.exit_code == 2 and "expected widths" in done.output


def test_an_advantage_head_without_the_part_is_refused(base, tmp_path):
    make_head(hidden_size=16).save_pretrained(tmp_path / "head")
    error = run_main("generate", tmp_path / "head", "w5", "-m", base, "--method", "advantage", code=1)
    assert "advantage part" in error


def test_a_head_that_recommends_nothing_is_the_ascent_and_the_command_says_so(base, tmp_path):
    make_head(hidden_size=16).save_pretrained(tmp_path / "head")
    words = ("generate", tmp_path / "head", "w5", "-m", base, "--max-new-tokens", 2, "--compare")
    out, err = run(*words)
    assert "## ascent, step size 0.5" in out and "This head recommends no control" in err
    assert "recommends no control" not in run(*words, "--step-size", 0.5)[1]
