"""
What further rounds are worth: each samples under the control that the last one recommends, and fits a head anew.

    python benchmarks/rounds.py --fit FOLDER --rewards reward-model --output rounds [--rounds 3] [--prompts 200]

`--fit` is a folder of `recontrol fit` on VADER by `example_heads.py` or `results.py`: the first round. `--rewards` is
one of `reward_model.py`: its prompts train the later rounds, its unseen ones are answered, its reward is the judge.
A round's head is fitted to its own responses alone (`fit(rounds=...)` fits to those of all rounds so far), and is used
in place of the one before, on the base alone. Beside the rounds stands, for each, the mean of the static vectors and
token biases of all rounds up to it: fitted to old and new responses, each under the policy that drew it; it has more
responses than any one round, and `data.py` says what more of them are worth. Each round has noise of its own. All are
compared with the base at about equal KL. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from example_heads import SCORING, SETTINGS, prompts_of
from layers import HEADING, REWARD, print_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, embedded_model, fit


def recommended(head: Path) -> ControlConfig:
    """The control that a head recommends."""
    control = ValueHead.from_pretrained(head).config.control
    if control is None:
        raise ValueError(f"{head} recommends no control, so no further round can be sampled under it.")
    return control


def next_round(number: int, head: Path, prompts: list[dict], folder: Path) -> Path:
    """The folder of a head fitted to responses under what another one recommends."""
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    model = ReControlForCausalLM.from_model(base, head, control=recommended(head))
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    settings = replace(SETTINGS, dtype="auto", seed=10 * number, **SCORING["vader"])
    fit(model, prompts, REWARD, folder, settings, tokenizer=tokenizer)
    return folder / "head"


def mean_of(heads: Sequence[Path], folder: Path) -> Path:
    """The folder of a head with the mean static vector and token bias of some, in the reward's own units."""
    found = [ValueHead.from_pretrained(head) for head in heads]
    # A fit leaves out a token bias that is worth nothing.
    sizes = [head.config.token_bias_size for head in found if head.config.token_bias_size is not None]
    last = found[-1]
    mean = ValueHead(replace(last.config, control=None, token_bias_size=sizes[0] if sizes else None))
    mean.load_state_dict(last.state_dict(), strict=False)
    mean.seen_prompts = last.seen_prompts
    with torch.no_grad():
        for name in ("static_vector", "token_bias") if sizes else ("static_vector",):
            kept = getattr(mean, name)
            parts = [head.config.reward_std * getattr(head, name, torch.zeros_like(kept)) for head in found]
            kept.copy_(torch.stack(parts).mean(0) / last.config.reward_std)
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
        heads.append(next_round(number, heads[-1], training, arguments.output / f"round-{number}"))
    compared = {f"round {number}": (head, ["static_vector", "advantage"]) for number, head in enumerate(heads, 1)}
    for number in range(2, arguments.rounds + 1):
        folder = mean_of(heads[:number], arguments.output / f"mean-{number}")
        compared[f"mean of {number} rounds"] = (folder, ["static_vector"])
    print(HEADING)
    asked = {"prompts": unseen, "held_out": held_out, "rewards": REWARD, "judge": str(arguments.rewards)}
    for name, (head, kinds) in compared.items():
        print_rows(name, head, [{"kind": kind} for kind in kinds], arguments.output / "comparisons", **asked)
    for number, head in enumerate(heads[:-1], 1):
        control = recommended(head)
        print(f"\nRound {number} recommends {control.method} at step size {control.step_size:g}.")


if __name__ == "__main__":
    main()
