"""
Where to write: V at the LM head's input and at middle layers, in many small steps and in one, at equal KL.

    python benchmarks/layers.py --fit FOLDER --rewards reward-model --output layers [--layers 7 15 23] [--prompts 200]

`--fit` is a folder of `recontrol fit` on VADER, `--rewards` one of `reward_model.py`, whose unseen prompts are
answered and whose reward is the judge. At each layer a V is trained on the states of the same responses; beside its
ascent stands the steering vector of that layer, the difference of the mean states of good and bad responses. The LM
head's own rows add its static edit, which a critic and the rewards of the responses so far taught; the steering vector
knows whole rewards alone, and edits the prompt's states too. It goes on where it was stopped, and prints a row for
each control at each KL.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from example_heads import COMPARED, prompts_of
from results import share_answers
from results_page import by_row
from transformers import AutoModelForCausalLM

from hf_recontrol import compare, embedded_model, train_head, write_states

REWARD = "hf_recontrol:vader"
STRENGTHS = {"kl": [0.05, 0.1]}
ASCENTS: list[dict[str, Any]] = [
    {"kind": "ascent", "name": "ascent, 30 steps"},
    {"kind": "ascent", "name": "ascent, 1 step", "num_steps": 1},
]
HEADING = "| head | control | KL an answer | reward | judge | diversity | Δ to base |\n|---|---|" + "---:|" * 5
SHOWN = ("kl_per_response", "reward", "judge", "diversity")


def head_of(layer: int, fit: Path, folder: Path) -> Path:
    """The folder of a head whose V reads and writes a layer's output, trained on the responses of a fit."""
    if not (folder / "head" / "config.json").is_file():
        base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32")
        write_states(folder / "states", base, fit / "rollouts", hook_point="decoder_layer", layer=layer)
        train_head(folder / "head", folder / "states")
    return folder / "head"


def shown(folder: Path, where: str) -> list[str]:
    """The lines of one comparison in the table."""
    lines = []
    for (name, _), metrics in by_row(folder / "figures.csv").items():
        if name != "base":
            gain = metrics["reward"]
            ends = (float(gain[key]) for key in ("difference", "difference_low", "difference_high"))
            cells = [f"{float(metrics[metric]['value']):.3f}" for metric in SHOWN]
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends))
            lines.append(f"| {where} | {name} | {' | '.join(cells)} |")
    return lines


def print_rows(where: str, head: Path, controls: list[dict[str, Any]], output: Path, **compared: Any) -> None:
    """
    Compare controls of a head with the base at the KL of `STRENGTHS`, and print their lines.

    Args:
        where (`str`):
            What stands before them.
        head (`Path`):
            The head.
        controls (`list[dict]`):
            The controls, without strengths.
        output (`Path`):
            Where comparisons are. They share the answers that are the same.
        compared (`dict`):
            What else `hf_recontrol.compare` is given.
    """
    folder = output / where.replace(" ", "-")
    share_answers(output.glob("*"), folder)
    compare(
        embedded_model(),
        output=folder,
        settings=COMPARED,
        head=head,
        controls=["base", *(control | STRENGTHS for control in controls)],
        **compared,
    )
    print("\n".join(shown(folder, where)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--rewards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="*", default=[7, 15, 23])
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    places: list[tuple[str, Path, list[dict[str, Any]]]] = [
        ("LM head", arguments.fit / "head", [{"kind": "static_vector"}, *ASCENTS])
    ]
    for layer in arguments.layers:
        head = head_of(layer, arguments.fit, arguments.output / f"layer-{layer}")
        places.append((f"layer {layer}", head, [{"kind": "steering_vector", "layer": layer}, *ASCENTS]))
    print(HEADING)
    _, held_out, unseen = prompts_of(arguments.rewards, arguments.prompts)
    compared = {"prompts": unseen, "held_out": held_out, "rewards": REWARD, "judge": str(arguments.rewards)}
    compared["rollouts"] = arguments.fit / "rollouts"
    for where, head, controls in places:
        print_rows(where, head, controls, arguments.output / "comparisons", **compared)


if __name__ == "__main__":
    main()
