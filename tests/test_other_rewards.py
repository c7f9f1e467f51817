"""Other rewards for a run of `fit`: what the messages say is the whole way."""

import json
import shutil

import pytest
import torch

from hf_recontrol import fit
from hf_recontrol.collection.scoring.labels import label_rollouts

from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 45)]


def same(completions, **columns):
    return [0.5] * len(completions)


def variety(completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


def brevity(completions, **columns):
    return [-float(len(text)) for text in completions]


@pytest.mark.parametrize("keep_states", [False, True])
def test_rewards_of_a_run_are_replaced_as_the_messages_say(tmp_path, recontrol_warnings, keep_states):
    def run(reward):
        return fit(
            tiny_model("llama", torch.float32),
            PROMPTS,
            reward,
            tmp_path,
            tokenizer=tiny_tokenizer(),
            num_samples=2,
            max_new_tokens=4,
            temperature=1.5,
            head_sizes=[8],
            advantage_sizes=[4],
            num_epochs=2,
            advantage_num_epochs=1,
            keep_states=keep_states,
            quiet=True,
        )

    with pytest.raises(ValueError, match=r"All rewards of same are equal .*`recontrol label .*rollouts --reward"):
        run(same)
    with pytest.raises(ValueError, match="another reward"):
        run(variety)
    label_rollouts(tmp_path / "rollouts", [variety], again=True)
    run(variety)
    with pytest.raises(ValueError, match="remove `states` and `head`"):
        run(brevity)
    label_rollouts(tmp_path / "rollouts", [brevity], again=True)
    for name in ("states", "head"):
        shutil.rmtree(tmp_path / name)
    run(brevity)
    assert json.loads((tmp_path / "states" / "manifest.json").read_text())["complete"]
