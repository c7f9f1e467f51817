"""A LoRA adapter whose training is stopped, also by `kill -9`: the same call goes on to the same adapter."""

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_recontrol import load_prompts
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.evaluation.rivals.kinds import make_rival
from hf_recontrol.evaluation.rivals.rival import Bench
from hf_recontrol.settings import SamplingSettings

from .fresh import run_fresh
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

pytest.importorskip("peft")
pytest.importorskip("trl")

from hf_recontrol.evaluation.rivals import lora_training
from hf_recontrol.evaluation.rivals.lora_training import AdapterTrainer

REPO = Path(__file__).parents[1]
# Six pairs: in each of three epochs a step of two batches and one of a single batch.
PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15", "w16 w17", "w18 w19 w20"]
SETTINGS = {
    "learning_rate": 0.02,
    "batch_size": 2,
    "num_epochs": 3,
    "target_modules": ["q_proj", "down_proj"],
    "training_arguments": {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
}
STEPS, BATCHES = 6, 9
# How many batches so many steps take.
BATCHES_OF = [0, 2, 3, 5, 6, 8, 9]


def mean_token(completion_ids):
    return [sum(ids) / len(ids) for ids in completion_ids]


def bench_in(folder, rollouts, seed=0):
    """Its base has dropout: what is drawn at a step decides the adapter."""
    model = tiny_model("llama", torch.float32, seed=seed, num_hidden_layers=2, attention_dropout=0.3)
    model.generation_config.eos_token_id = 2
    sampling = SamplingSettings(max_new_tokens=6, temperature=0)
    return Bench(model, tiny_tokenizer(), sampling, {"mean_token": mean_token}, Path(folder), Path(rollouts))


def write(bench, prompts=PROMPTS):
    sizes = {"max_new_tokens": 5, "num_samples": 2, "batch_size": 12}
    write_rollouts(bench.rollouts, bench.model, bench.tokenizer, load_prompts(prompts), **sizes)
    label_rollouts(bench.rollouts, [mean_token])
    return bench


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A bench whose adapter was trained without a stop, and that adapter's weights."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    bench = write(bench_in(folder / "made", folder / "rollouts"))
    assert finish(bench, SETTINGS) == BATCHES
    return bench, weights(bench)


@pytest.fixture
def bench(uninterrupted, tmp_path):
    return replace(uninterrupted[0], folder=tmp_path / "made")


@pytest.fixture
def expected(uninterrupted):
    return uninterrupted[1]


@pytest.fixture(autouse=True)
def checkpoint_after_each_step(monkeypatch):
    monkeypatch.setattr(lora_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)


def weights(bench):
    [folder] = [path for path in bench.folder.iterdir() if not path.name.startswith(".")]
    return load_file(folder / "adapter_model.safetensors")


def checkpoints(bench):
    return sorted(path.name for path in bench.folder.glob(".lora-dpo-*/checkpoints/checkpoint-*"))


def stop(bench, settings, batches):
    """Train, and raise in the forward after so many."""
    done, train = [], AdapterTrainer.training_step

    def stopped(self, *args, **kwargs):
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(1)
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AdapterTrainer, "training_step", stopped)
        make_rival("lora_dpo", bench, settings).prepare()


def finish(bench, settings):
    """Train to the end: how many forwards that takes."""
    done, train = [], AdapterTrainer.training_step

    def counted(self, *args, **kwargs):
        done.append(1)
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", counted)
        make_rival("lora_dpo", bench, settings).prepare()
    return len(done)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


# In the middle of an epoch, at its end, in the middle of a step, before the last step.
@pytest.mark.parametrize(("batches", "step"), [(2, 1), (3, 2), (7, 4), (8, 5)])
def test_a_stopped_training_goes_on_to_the_same_adapter(batches, step, bench, expected):
    stop(bench, SETTINGS, batches)
    assert checkpoints(bench) == [f"checkpoint-{step}"]
    assert finish(bench, SETTINGS) == BATCHES - BATCHES_OF[step]
    assert_same(weights(bench), expected)
    assert len(list(bench.folder.iterdir())) == 1


@pytest.mark.parametrize("forgotten", ["_load_rng_state", "_load_optimizer_and_scheduler"])
def test_that_it_is_the_same_is_owed_to_all_of_the_checkpoint(forgotten, bench, expected, monkeypatch):
    stop(bench, SETTINGS, 5)
    monkeypatch.setattr(AdapterTrainer, forgotten, lambda *args: None)
    finish(bench, SETTINGS)
    assert max((tensor - expected[name]).abs().max() for name, tensor in weights(bench).items()) > 1e-3


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from hf_recontrol.evaluation.rivals import lora_training
from tests.test_lora_resume import SETTINGS, bench_in, make_rival

lora_training.SECONDS_BETWEEN_CHECKPOINTS = 0
saved, save = [], lora_training.AdapterTrainer._save_rng_state

def killed(self, folder):
    saved.append(folder)
    if len(saved) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

lora_training.AdapterTrainer._save_rng_state = killed
make_rival("lora_dpo", bench_in(*sys.argv[2:]), SETTINGS).prepare()
"""


def test_kill_9_while_a_checkpoint_is_written_costs_that_one_alone(bench, expected):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code, out, err = run_fresh(KILLED, [REPO, bench.folder, bench.rollouts], environment, timeout=300)
    assert code == -signal.SIGKILL, out + err
    assert checkpoints(bench) == ["checkpoint-2", "checkpoint-3"]
    assert finish(bench, SETTINGS) == BATCHES - 3
    assert_same(weights(bench), expected)


def test_checkpoints_of_another_training_are_not_taken(bench, tmp_path, recontrol_warnings):
    stop(bench, SETTINGS, 3)
    others = {
        "settings": (bench, SETTINGS | {"beta": 0.2}),
        "seed": (replace(bench, sampling=replace(bench.sampling, seed=1)), SETTINGS),
        "rollouts": (write(replace(bench, rollouts=tmp_path / "others"), [*PROMPTS[:-1], "w30 w31"]), SETTINGS),
        # The same pairs.
        "base": (bench_in(bench.folder, bench.rollouts, seed=1), SETTINGS),
    }
    for name, (other, settings) in others.items():
        assert finish(other, settings) == BATCHES, name
    # They are still there for the training that they are of.
    assert finish(bench, SETTINGS) == BATCHES - 3
    # Of the other base, whose rollouts these are not.
    assert ["its weights or its dtype are others" in said for said in recontrol_warnings] == [True]


def test_what_training_took_counts_all_runs(bench):
    stop(bench, SETTINGS, 5)
    [path] = bench.folder.glob(".lora-dpo-*/checkpoints/*/trainer_state.json")
    state = json.loads(path.read_text())
    [kept] = [each for name, each in state["stateful_callbacks"].items() if name == "_Checkpoints"]
    assert kept["attributes"]["seconds"] > 0
    kept["attributes"] = {"seconds": 1000.0, "peak_memory_bytes": 1 << 50}
    path.write_text(json.dumps(state))
    finish(bench, SETTINGS)
    [path] = bench.folder.glob("lora-dpo-*/training.json")
    about = json.loads(path.read_text())
    assert about["steps"] == STEPS and about["peak_memory_bytes"] == 1 << 50
    assert 1000 < about["seconds"] < 1060


def test_checkpoints_come_by_the_clock(bench, monkeypatch):
    monkeypatch.setattr(lora_training, "SECONDS_BETWEEN_CHECKPOINTS", 3600)
    stop(bench, SETTINGS, 8)
    assert not checkpoints(bench)


def test_a_failure_to_write_the_adapter_leaves_no_half_of_it(bench, expected, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):

        def full(path, values):
            raise OSError("full")

        patch.setattr("hf_recontrol.evaluation.rivals.lora.write_json", full)
        make_rival("lora_dpo", bench, SETTINGS).prepare()
    assert not list(bench.folder.glob("lora-dpo-*"))
    assert finish(bench, SETTINGS) == 1
    assert_same(weights(bench), expected)


def test_the_callers_generators_stay_as_they_were(bench):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = numbers()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    finish(bench, SETTINGS)
    assert numbers() == expected
