"""`kill -9` in the middle of each stage, then the same command again: nothing lost, nothing twice, the same result."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import StateStore

from .fresh import RECONTROL, FreshProcess
from .resumable import (
    COMMAND,
    STAGES,
    fit_arguments,
    label_arguments,
    make_inputs,
    rollout_arguments,
    states_arguments,
    train_arguments,
)

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# What shows that a stage is at work: files of its own that grow in number.
SIGNS = {
    "rollout": "rollouts/part-*",
    "states": "states/part-*",
    "train": "head/training/*/checkpoint-*",
}


def start(arguments, cwd):
    """The command in a process of its own; what is killed and resumed here is its work, not the import of torch."""
    return FreshProcess(RECONTROL, arguments, ENVIRONMENT, cwd)


def start_command(arguments, cwd, **kwargs):
    """The very command, where signals and limits are set before its start."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([COMMAND, *arguments], cwd=cwd, env=ENVIRONMENT, **pipes, **kwargs)


def run(arguments, cwd, code=0, start=start, **kwargs):
    process = start(arguments, cwd, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out + err


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def assert_same(one, two):
    if (one / "rollouts").exists():
        assert load_rollouts(one / "rollouts") == load_rollouts(two / "rollouts")
    if (one / "states").exists():
        stores = [StateStore.open(folder / "states") for folder in (one, two)]
        everything = torch.arange(len(stores[0]))
        for name in ("hidden", "directions"):
            torch.testing.assert_close(*(store.gather(name, everything) for store in stores))
    if (one / "head").exists():
        heads = [load_file(folder / "head" / "model.safetensors") for folder in (one, two)]
        for name, tensor in heads[0].items():
            torch.testing.assert_close(tensor, heads[1][name], rtol=1e-3, atol=1e-5)
        figures = [json.loads((folder / "head" / "training.json").read_text())["figures"] for folder in (one, two)]
        for name in ("value_error", "advantage_error", "held_out_episodes"):
            assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3)
    unfinished = [path for path in two.rglob(".*") if path.is_file() and path.name != ".lock"]
    assert not unfinished


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of every stage, and after each stage a copy of the folder to go on from."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    make_inputs(folder, seconds_a_file=0.05)
    for stage in STAGES:
        run(stage("run"), folder)
        shutil.copytree(folder / "run", folder / f"after_{stage.__name__}")
    return folder


@pytest.fixture
def work(uninterrupted, tmp_path):
    """A folder with the inputs of a stage; `at(stage)` puts there what the stages before it made."""
    for name in ("base", "prompts.jsonl", "my_reward.py"):
        (tmp_path / name).symlink_to(uninterrupted / name)

    def at(stage):
        index = STAGES.index(stage)
        if index:
            shutil.copytree(uninterrupted / f"after_{STAGES[index - 1].__name__}", tmp_path / "run")
        else:
            (tmp_path / "run").mkdir()
        return tmp_path

    return at


def scored(folder) -> int:
    from hf_recontrol.data.rollouts import scoring_of

    return sum(scoring_of(path) is not None for path in (folder / "run" / "rollouts").glob("part-*.parquet"))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_killed_stage_goes_on_to_the_same_result(stage, uninterrupted, work):
    name, folder = stage.__name__.removesuffix("_arguments"), work(stage)
    process = start(stage("run"), folder)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        done = scored(folder) if name == "label" else len(list((folder / "run").glob(SIGNS[name])))
        if done >= 2:
            break
        time.sleep(0.001)
    kill(process)
    assert process.returncode == -signal.SIGKILL, "it had ended before it could be killed"
    run(stage("run"), folder)
    assert_same(uninterrupted / f"after_{stage.__name__}", folder / "run")


def test_ctrl_c_says_how_to_go_on(work):
    folder = work(label_arguments)
    # A shell lets the commands that it starts in the background ignore it, and all that they start.
    process = start_command(
        label_arguments("run"), folder, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    while not scored(folder) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith(
        "recontrol: interrupted. Run the same command again to resume.\n"
    )


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_unharmed(uninterrupted, work):
    folder = work(label_arguments)
    first = start(label_arguments("run"), folder)
    while not scored(folder) and first.poll() is None:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    try:
        assert "Another run is working in run/rollouts" in run(label_arguments("run"), folder, code=1)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=120) and first.returncode == 0
    assert_same(uninterrupted / "after_label_arguments", folder / "run")


def test_changed_settings_are_refused_and_change_nothing(uninterrupted):
    before = digest(uninterrupted / "run")
    for arguments, difference in [
        ([*rollout_arguments("run"), "--seed", "1"], "seed was 0, is 1"),
        (["label", "run/rollouts", "--reward", "topic"], "label run/rollouts --reward ... --again"),
        ([*states_arguments("run"), "--every", "2"], "every was 1, is 2"),
        ([*train_arguments("run"), "--td-lambda", "0.5"], "training.td_lambda was 0.95, is 0.5"),
    ]:
        assert difference in run(arguments, uninterrupted, code=1)
    assert digest(uninterrupted / "run") == before


def test_a_full_disk_is_named_and_survived(uninterrupted, work):
    folder = work(states_arguments)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    message = run(states_arguments("run"), folder, code=1, start=start_command, preexec_fn=limit)
    assert "recontrol: " in message and "File too large" in message
    run(states_arguments("run"), folder)
    assert_same(uninterrupted / "after_states_arguments", folder / "run")


def test_half_written_files_of_a_kill_are_survived(uninterrupted, work):
    folder = work(states_arguments)
    (folder / "run" / "states").mkdir()
    run(states_arguments("run"), folder)
    states = folder / "run" / "states"
    manifest = json.loads((states / "manifest.json").read_text())
    for key in ("counts", "parts"):
        del manifest[key]
    (states / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    (states / "part-00003.safetensors").unlink()
    (states / ".part-00003.safetensors.abc").write_bytes(b"half of it")
    run(states_arguments("run"), folder)
    assert_same(uninterrupted / "after_states_arguments", folder / "run")


def test_cut_off_files_are_named(uninterrupted, work):
    folder = work(train_arguments)
    part = folder / "run" / "states" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    assert "part-00001.safetensors does not hold states" in run(train_arguments("run"), folder, code=1)


@pytest.mark.slow
def test_twenty_kills_at_random_instants_of_a_fit(tmp_path):
    make_inputs(tmp_path, seconds_a_file=0.05)
    begin = time.monotonic()
    run(fit_arguments("whole", epochs=40), tmp_path)
    took = time.monotonic() - begin
    instants = random.Random(0)
    kills, runs = 0, [tmp_path / "run0"]
    while kills < 20:
        assert len(runs) < 40, "most runs had ended before they could be killed"
        keep = ["--keep-states"] * (kills % 2)
        process = start([*fit_arguments(runs[-1].name, epochs=40), *keep], tmp_path)
        try:
            process.communicate(timeout=instants.uniform(0.3, 0.9) * took)
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
        else:
            runs.append(tmp_path / f"run{len(runs)}")
    run(fit_arguments(runs[-1].name, epochs=40), tmp_path)
    for folder in runs:
        assert_same(tmp_path / "whole", folder)
