"""Two real processes, started by accelerate, make what one makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import StateStore

from .resumable import COMMAND, STAGES, fit_arguments, make_inputs

LAUNCH = [
    *(str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    *("-m", "hf_recontrol"),
]
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command, cwd):
    done = subprocess.run(
        [*command], cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | ALONE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("by_stage", [False, True], ids=["fit", "stages"])
def test_two_processes_make_what_one_makes(tmp_path, by_stage):
    make_inputs(tmp_path)
    commands = {
        folder: [stage(folder) for stage in STAGES] if by_stage else [fit_arguments(folder)]
        for folder in ("one", "two")
    }
    for arguments in commands["one"]:
        one = run([COMMAND, *arguments], tmp_path)
    for arguments in commands["two"]:
        two = run([*LAUNCH, *arguments], tmp_path)
    assert one.count("value_error_last") == two.count("value_error_last") == 1, "only the first process prints"
    assert files(tmp_path / "one") == files(tmp_path / "two")

    one, two = tmp_path / "one", tmp_path / "two"
    assert load_rollouts(one / "rollouts") == load_rollouts(two / "rollouts")
    manifests = [json.loads((folder / "rollouts" / "manifest.json").read_text()) for folder in (one, two)]
    assert manifests[0]["parts"] == manifests[1]["parts"] and manifests[0]["counts"] == manifests[1]["counts"]
    stores = [StateStore.open(folder / "states") for folder in (one, two)]
    everything = torch.arange(len(stores[0]))
    for name in ("hidden", "directions"):
        torch.testing.assert_close(*(store.gather(name, everything) for store in stores), rtol=1e-6, atol=1e-6)
    heads = [load_file(folder / "head" / "model.safetensors") for folder in (one, two)]
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], rtol=1e-3, atol=1e-5)
    figures = [json.loads((folder / "head" / "training.json").read_text())["figures"] for folder in (one, two)]
    for name, value in figures[0].items():
        if isinstance(value, float):
            assert figures[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
