"""What tests of stops and of several processes run: a tiny base, prompts, a reward, and the commands."""

import json
import sys
from pathlib import Path

import torch

from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

COMMAND = str(Path(sys.executable).with_name("recontrol"))


def make_inputs(folder: Path, seconds_a_file: float = 0.0) -> None:
    """`base/`, `prompts.jsonl` and `my_reward.py` in `folder`."""
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [json.dumps({"prompt": f"w{i} w{i + 1}", "topic": i}) + "\n" for i in range(10, 60)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "my_reward.py").write_text(
        "import time\n"
        "def variety(prompts, completions, **columns):\n"
        f"    time.sleep({seconds_a_file})\n"
        "    return [float(len(set(text.split()))) for text in completions]\n"
    )


_SAMPLING = ["--num-samples", "4", "--max-new-tokens", "8", "--part-size", "10", "--temperature", "1.5"]
_SIZES = ["--head-sizes", "16", "--advantage-sizes", "8", "--num-epochs"]
REWARD = "my_reward:variety"


def rollout_arguments(folder: str) -> list[str]:
    return ["rollout", "-m", "base", "--prompts", "prompts.jsonl", "-o", f"{folder}/rollouts", *_SAMPLING]


def label_arguments(folder: str) -> list[str]:
    return ["label", f"{folder}/rollouts", "--reward", REWARD]


def states_arguments(folder: str) -> list[str]:
    return ["states", f"{folder}/rollouts", "-m", "base", "-o", f"{folder}/states"]


def train_arguments(folder: str, epochs: int = 12) -> list[str]:
    return ["train", f"{folder}/states", "-o", f"{folder}/head", *_SIZES, str(epochs), "--patience", "50"]


STAGES = (rollout_arguments, label_arguments, states_arguments, train_arguments)


def fit_arguments(folder: str, epochs: int = 12) -> list[str]:
    base = ["fit", "-m", "base", "--prompts", "prompts.jsonl", "--reward", REWARD, "-o", folder]
    return [*base, *_SAMPLING, *_SIZES, str(epochs)]
