"""
What makes a better static vector and g, measured without sampling: parts trained in several ways on one set of states,
by what they earn on scored answers to unseen prompts.

    python benchmarks/variants.py --fit FOLDER --answers COMPARISON [--reward COLUMN] [--prompts N] --output variants

`--fit` is a folder of `recontrol fit`, `--answers` one of `recontrol compare` with the rows of a best-of-n: several
answers of the base to each prompt. What is earned is the first term of the series in the step size, as in
`hf_recontrol.data_curve`: with `ℓ = Σ_t (w_y - w̄)ᵀ u(h_t)` of an answer, `√2 Cov(ℓ, r) / sd(ℓ)` within prompts, in
deviations of the reward for the root of a nat an answer. Differences are to the first way, paired over prompts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM

from hf_recontrol import (
    Rollout,
    States,
    StateStore,
    ValueHead,
    ValueHeadConfig,
    collect_states,
    fit_advantage,
    paired_interval,
    train_value_head,
)

# What is changed of the settings of training.
WAYS = {
    "as it is": {},
    "GAE 0.5": {"gae_lambda": 0.5},
    "GAE 0.8": {"gae_lambda": 0.8},
    "GAE 0.95": {"gae_lambda": 0.95},
}


def pool_of(answers: Path, base: str, reward: str, prompts: int | None) -> States:
    """The states of a comparison's best-of-n answers to its first prompts, with directions."""
    settings = json.loads((answers / "figures.json").read_text(encoding="utf-8"))["settings"]
    rows = pyarrow.parquet.read_table(answers / "answers.parquet").to_pylist()
    numbers = set(sorted({row["prompt_number"] for row in rows})[:prompts])
    rollouts = [
        Rollout(
            row["prompt"],
            row["completion"],
            row["prompt_ids"],
            row["completion_ids"],
            row["finished"],
            reward=[row[reward]],
            temperature=settings["temperature"],
            prompt_number=row["prompt_number"],
            sample=row["sample"],
        )
        for row in rows
        if row["control"] == "best_of_n" and row["prompt_number"] in numbers
        if row["completion_ids"] and row[reward] is not None
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return collect_states(model, rollouts, hook_point="lm_head", directions=True)


@torch.no_grad()
def scores(pool: States, edit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """ℓ of each answer under an edit of the state."""
    shifts = torch.cat(
        [
            (pool.rows("directions", rows) * edit(pool.rows("hidden", rows))).sum(-1)
            for rows in torch.arange(len(pool.hidden)).split(8192)
        ]
    )
    answers = torch.repeat_interleave(torch.arange(len(pool.lengths)), pool.lengths)
    return torch.zeros(len(pool.lengths), dtype=torch.float64).index_add_(0, answers, shifts.double())


def within(prompts: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Unbiased covariance of the answers to each prompt."""
    counts = torch.bincount(prompts).double()
    means = [torch.zeros(len(counts), dtype=torch.float64).index_add_(0, prompts, x) / counts for x in (a, b)]
    products = (a - means[0][prompts]) * (b - means[1][prompts])
    summed = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, prompts, products)
    return summed[counts > 1] / (counts[counts > 1] - 1)


def earned(pool: States, edit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What each prompt adds to the gain."""
    _, prompts = pool.prompts.unique(return_inverse=True)
    rewards = pool.rewards[:, 0].double()
    found = scores(pool, edit)
    spread = within(prompts, found, found).mean().sqrt()
    return math.sqrt(2) * within(prompts, found, rewards / rewards.std()) / spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--reward", default="reward", help="column of the answers")
    parser.add_argument("--prompts", type=int, help="so many alone")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    store = StateStore.open(arguments.fit / "states")
    pool = pool_of(arguments.answers, store.read_at["base_model_name_or_path"], arguments.reward, arguments.prompts)
    config = ValueHeadConfig.from_json_file(arguments.fit / "head" / "config.json")
    first = arguments.output / "value"
    if not (first / "config.json").is_file():
        untrained = replace(config, control=None, training=None)
        head, _ = train_value_head(store, untrained)
        head.save_pretrained(first)
    reference = None
    print("| way | part | gain | difference |\n|---|---|---:|---:|")
    for way, changes in WAYS.items():
        place = arguments.output / way.replace(" ", "-")
        if not (place / "config.json").is_file():
            head = ValueHead.from_pretrained(first)
            fit_advantage(head, store, **changes)
            head.save_pretrained(place)
        head = ValueHead.from_pretrained(place)
        for part, edit in (("static vector", head.static_vector.expand_as), ("g", head.advantage)):
            gains = earned(pool, edit)
            reference = gains if reference is None else reference
            shown = f"{float(gains.mean()):.3f} {ends(gains, '')}"
            difference = f"{float((gains - reference).mean()):+.3f} {ends(gains - reference, '+')}"
            print(f"| {way} | {part} | {shown} | {difference} |", flush=True)


def ends(values: torch.Tensor, sign: str) -> str:
    """The 95 % interval of a mean over prompts."""
    low, high = paired_interval(values.tolist())
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    main()
