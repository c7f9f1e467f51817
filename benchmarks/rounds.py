"""
What further rounds are worth: each samples under the control that the last one recommends, and fits a head anew.

    python benchmarks/rounds.py --fit FOLDER --rewards reward-model --output rounds [--rounds 3] [--prompts 200]

`--fit` is a folder of `recontrol fit` on VADER by `example_heads.py` or `results.py`: the first round. `--rewards` is
one of `reward_model.py`: its prompts train the later rounds, its unseen ones are answered, its reward is the judge.
A round's head is used in place of the one before, on the base alone. Beside the rounds stands, for each, the mean of
the static vectors and token biases of all rounds up to it: fitted to old and new responses, each under the policy that
drew it. All are compared with the base at equal KL. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from example_heads import SCORING, SETTINGS, prompts_of
from layers import HEADING, REWARD, print_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import ReControlForCausalLM, ValueHead, embedded_model, fit


def next_round(head: Path, prompts: list[dict], folder: Path) -> Path:
    """The folder of a head fitted to responses under what another one recommends."""
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    model = ReControlForCausalLM.from_model(base, head)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    fit(model, prompts, REWARD, folder, replace(SETTINGS, dtype="auto", **SCORING["vader"]), tokenizer=tokenizer)
    return folder / "head"


def mean_of(heads: Sequence[Path], folder: Path) -> Path:
    """The folder of a head with the mean static vector and token bias of some, and V of the last."""
    found = [ValueHead.from_pretrained(head) for head in heads]
    mean = found[-1]
    with torch.no_grad():
        for name in ("static_vector", "token_bias"):
            getattr(mean, name).copy_(torch.stack([getattr(head, name) for head in found]).mean(0))
    mean.config = replace(mean.config, control=None)
    mean.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--rewards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    training, held_out, unseen = prompts_of(arguments.rewards, arguments.prompts)
    heads = [arguments.fit / "head"]
    for number in range(2, arguments.rounds + 1):
        heads.append(next_round(heads[-1], training, arguments.output / f"round-{number}"))
    compared = {f"round {number}": (head, ["static_vector", "advantage"]) for number, head in enumerate(heads, 1)}
    for number in range(2, arguments.rounds + 1):
        folder = mean_of(heads[:number], arguments.output / f"mean-{number}")
        compared[f"mean of {number} rounds"] = (folder, ["static_vector"])
    print(HEADING)
    asked = {"prompts": unseen, "held_out": held_out, "rewards": REWARD, "judge": str(arguments.rewards)}
    for name, (head, kinds) in compared.items():
        print_rows(name, head, [{"kind": kind} for kind in kinds], arguments.output / "comparisons", **asked)
    for number, head in enumerate(heads, 1):
        control = json.loads((head / "config.json").read_text(encoding="utf-8"))["control"]
        print(f"\nRound {number} recommends {control['method']} at step size {control['step_size']:g}.")


if __name__ == "__main__":
    main()
