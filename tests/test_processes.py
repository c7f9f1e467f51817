"""Two real processes make what one makes: `fit` started by accelerate, the stages with what its launcher sets."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import StateStore

from .fresh import RECONTROL, FreshProcess, run_fresh
from .resumable import STAGES, fit_arguments, make_inputs

LAUNCH = [
    *(str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    *("-m", "hf_recontrol"),
]
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(arguments, cwd):
    code, out, err = run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=300, cwd=cwd)
    assert code == 0, out + err
    return out


def launch(arguments, cwd):
    done = subprocess.run(
        [*LAUNCH, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | ALONE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_two(arguments, cwd):
    """As launched, without the seconds that each process takes to import torch."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        FreshProcess(RECONTROL, arguments, os.environ | ALONE | both | {"RANK": rank, "LOCAL_RANK": rank}, cwd)
        for rank in ("0", "1")
    ]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert [process.returncode for process in processes] == [0, 0], printed
    return "".join(out for out, _ in printed)


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
        one = run(arguments, tmp_path)
    for arguments in commands["two"]:
        two = (run_two if by_stage else launch)(arguments, tmp_path)
    assert one.count('"value_error_last"') == two.count('"value_error_last"') == 1, "only the first process prints"
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


def test_two_processes_make_the_rounds_that_one_makes(tmp_path):
    make_inputs(tmp_path)
    run([*fit_arguments("one", 3), "--rounds", "2"], tmp_path)
    run_two([*fit_arguments("two", 3), "--rounds", "2"], tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    assert files(one) == files(two) and (two / "round-1" / "head" / "config.json").is_file()
    controls = []
    for folder in (one, two):
        first = json.loads((folder / "round-1" / "head" / "config.json").read_text())["control"]
        manifest = json.loads((folder / "round-2" / "rollouts" / "manifest.json").read_text())
        assert manifest["settings"]["control"] == first and manifest["counts"]["rollouts"] == 200
        controls.append(first)
    assert controls[0]["method"] == controls[1]["method"]
    assert controls[1]["step_size"] == pytest.approx(controls[0]["step_size"], rel=1e-2)
    records = [json.loads((folder / "head" / "config.json").read_text())["training"] for folder in (one, two)]
    assert [record["responses"] for record in records] == [400, 400]
