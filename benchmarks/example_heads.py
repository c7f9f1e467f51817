"""
Makes the heads of examples/heads (SmolLM2-135M-Instruct, one reward each, targets from a critic) and measures them.

    python benchmarks/example_heads.py --pairs PAIRS --output example-heads [--only vader] [--measure]

`--pairs` as for `reward_model.py`, which is run first: it holds 200 prompts out of everything, which the heads are
measured on. The judge of one head is the other's reward. Some 50 minutes a head on 2 cores, 10 of them to measure it
(`--measure`: the heads that are there, nothing else); it goes on where it was stopped. The matrices and the token bias
are kept in bfloat16, what states are scaled by in float32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hf_recontrol import CompareSettings, FitSettings, ValueHead, compare, embedded_model, fit, load_prompts

HEADS = Path(__file__).parents[1] / "examples" / "heads"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_PROMPTS = 1024
# Strengths are found on so many prompts behind those.
NUM_HELD_OUT = 64
NAMES = {"vader": "VADER sentiment", "preference": "HH-RLHF harmlessness (reward model of benchmarks/reward_model.py)"}
CONTROLS = ["base", *({"kind": kind, "kl": [0.05, 0.1]} for kind in ("static_vector", "advantage", "ascent"))]
SETTINGS = FitSettings(
    num_samples=2,
    max_new_tokens=48,
    temperature=0.9,
    batch_size=32,
    part_size=128,
    dtype="float32",
    keep_states=True,
)
# VADER costs nothing, so each token's part in it is known.
SCORING = {"vader": {"prefix_every": 1, "gae_lambda": 0.5}, "preference": {"prefix_every": 4}}
COMPARED = CompareSettings(
    max_new_tokens=48,
    temperature=0.9,
    batch_size=64,
    part_size=64,
    dtype="float32",
    perplexity=True,
    on_seen_prompts="skip",
)


def keep_small(trained: Path, kept: Path, reward: str) -> None:
    """Save a trained head with its matrices in bfloat16, for the base's name on the Hub."""
    head = ValueHead.from_pretrained(trained)
    for mlp in (head.value_mlp, head.advantage_mlp):
        mlp.to(torch.bfloat16)
    if head.config.token_bias_size is not None:
        head.token_bias = head.token_bias.to(torch.bfloat16)
    training = replace(head.config.training, rewards=[reward])
    head.config = replace(head.config, base_model_name_or_path=HUB_NAME, training=training)
    head.save_pretrained(kept)


def without_seconds(table: str) -> str:
    """A comparison's table without its last column: it says what else the machine did."""
    rows = [
        line.rpartition("|")[0].rpartition("|")[0] + "|" if line[:1] == "|" else line for line in table.split("\n")
    ]
    return "\n".join(rows)


def prompts_of(rewards: Path, unseen: int | None = None) -> tuple[list[dict], list[dict], list[dict]]:
    """(prompts that heads are trained on, those that strengths are found on, all unseen ones or so many)."""
    rows = load_prompts(rewards / "prompts-train.jsonl", limit=NUM_PROMPTS + NUM_HELD_OUT).rows
    return rows[:NUM_PROMPTS], rows[NUM_PROMPTS:], load_prompts(rewards / "prompts-test.jsonl", limit=unseen).rows


def measure(head: Path, rewards: Path, reward: str, judge: str, output: Path) -> None:
    """Compare a head's methods at equal KL on unseen prompts, and keep the table beside the heads."""
    _, held_out, unseen = prompts_of(rewards)
    compare(
        embedded_model(),
        unseen,
        reward,
        output,
        COMPARED,
        head=head,
        judge=judge,
        controls=CONTROLS,
        held_out=held_out,
    )
    table = (output / "table.md").read_text(encoding="utf-8")
    (HEADS / f"{head.name}.md").write_text(without_seconds(table), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything made on the way")
    parser.add_argument("--only", choices=["vader", "preference"], nargs="*", default=["vader", "preference"])
    parser.add_argument("--measure", action="store_true", help="the heads that are there")
    arguments = parser.parse_args()
    rewards = arguments.output / "reward-model"
    if not (rewards / "figures.json").is_file():
        script = Path(__file__).with_name("reward_model.py")
        subprocess.run([sys.executable, script, "--pairs", arguments.pairs, "--output", rewards], check=True)
    prompts, _, _ = prompts_of(rewards)
    functions = {"vader": "hf_recontrol:vader", "preference": str(rewards)}
    for name in arguments.only:
        folder, head = arguments.output / name, HEADS / f"smollm2-{name}"
        if not arguments.measure:
            fit(embedded_model(), prompts, functions[name], folder, replace(SETTINGS, **SCORING[name]))
            keep_small(folder / "head", head, NAMES[name])
        judge = next(function for other, function in functions.items() if other != name)
        measure(head, rewards, functions[name], judge, folder / "comparison")


if __name__ == "__main__":
    main()
