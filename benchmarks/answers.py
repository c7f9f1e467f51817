"""
Twenty answers to read: what the base says, and what it says under a head's recommended control, side by side.

    python benchmarks/answers.py --head examples/heads/smollm2-vader --reward hf_recontrol:vader --output answers.md

`--reward` as for `recontrol label`; of the head of the preference reward it is the folder of `reward_model.py`.

The prompts are every 24th of the demo's, which no head of examples/heads was trained on; nothing is chosen by what
comes out. Both answers are drawn with the same noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_recontrol
from hf_recontrol import ReControlForCausalLM, Rollout, embedded_model, generate_rollouts, load_prompts, score_rollouts

PROMPTS = Path(hf_recontrol.__file__).parent / "pipelines" / "demo_prompts.jsonl"
COUNT = 20
SAMPLING = {"max_new_tokens": 48, "temperature": 0.9, "batch_size": COUNT}


def quoted(rollout: Rollout) -> str:
    """An answer as one line of a table, marked where it was cut off."""
    text = " ".join(rollout.completion.split()).replace("|", "\\|")
    return text if rollout.finished else f"{text} …"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--reward", required=True, help="as `recontrol label --reward`")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    reward, prompts = hf_recontrol.load_reward(arguments.reward), load_prompts(PROMPTS)
    every = len(prompts) // COUNT
    prompts = prompts.take(range(0, COUNT * every, every))
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    model = ReControlForCausalLM.from_model(base, arguments.head)
    both = [
        score_rollouts(generate_rollouts(model, tokenizer, prompts, control=used, **SAMPLING), reward)
        for used in (False, model.control)
    ]
    means = [sum(rollout.reward[0] for rollout in found) / len(found) for found in both]
    control = model.control
    sampled = f"at temperature {SAMPLING['temperature']}, {SAMPLING['max_new_tokens']} tokens at most"
    text = [
        f"`{arguments.head.name}` under the control that it recommends: the {control.method} edit at step size "
        f"{control.step_size:g}. Sampled {sampled}. The prompts are every {every}th of the demo's; no answer was "
        f"picked. Mean reward {means[0]:.2f} (base), {means[1]:.2f} (control): {COUNT} answers prove nothing, they "
        "are here to be read.",
    ]
    for without, controlled in zip(*both, strict=True):
        text += [
            f"**{without.prompt}**",
            f"- base ({without.reward[0]:+.2f}): {quoted(without)}\n"
            f"- control ({controlled.reward[0]:+.2f}): {quoted(controlled)}",
        ]
    arguments.output.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
