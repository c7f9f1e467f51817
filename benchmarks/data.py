"""
What responses are worth to a head: how much a static edit and g gain by how many they were fitted to, and by how many
of them answer one prompt.

    python benchmarks/data.py --fit FOLDER --gae-lambda 0.5 --output data [--folds 4]

`--fit` is a folder of `recontrol fit`, best of many samples a prompt. The gain is that of `variants.py`, on folds of
prompts that nothing was fitted to, in deviations of the reward for the root of a nat a response; intervals are 95 %,
by the jackknife over prompts. First come one sample each of ever more prompts, then ever more samples of all of them,
then as many responses as one sample of all makes, from ever fewer prompts. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from variants import Pool, folder_of, keep, shape_of

from hf_recontrol import (
    ValueHeadConfig,
    ValueSettings,
    fit_advantage,
    load_rollouts,
    train_critic,
    train_value_head,
)

PARTS = ("static vector and token bias", "g and token bias")


def sizes(prompts: int, samples: int) -> list[tuple[int, int]]:
    """(prompts, samples of each)."""
    fewer = [(prompts // share, 1) for share in (8, 4, 2)]
    of_all = [(prompts, count) for count in powers(samples)]
    alike = [(prompts // count, count) for count in powers(samples)[1:]]
    return [*fewer, *of_all, *alike]


def powers(largest: int) -> list[int]:
    """1, 2, 4, ... up to a number."""
    return [2**i for i in range(largest.bit_length()) if 2**i <= largest]


def chosen(pool: Pool, sample: torch.Tensor, fold: int, share: float, samples: int) -> torch.Tensor:
    """Episodes of a share of the prompts outside a fold, the first samples of each."""
    others = pool.prompt[pool.fold != fold].unique()
    order = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(1))]
    kept = order[: max(2, round(share * len(order)))]
    return (torch.isin(pool.prompt, kept) & (sample < samples)).nonzero()[:, 0]


def scores_of(
    pool: Pool, episodes: torch.Tensor, fold: int, config: ValueHeadConfig, gae_lambda: float, every: int | None
) -> dict[str, Any]:
    """ℓ of the responses of a fold under the parts fitted to some others, and how many these are."""
    states = pool.part(episodes, every)
    head, _ = train_value_head(states, config)
    critic, _ = train_critic(states, config, ValueSettings())
    fit_advantage(head, states, gae_lambda=gae_lambda, critic=critic)
    own = (pool.fold == fold).nonzero()[:, 0]
    by_bias = pool.scores(own, pool.by_bias(head.token_bias))
    edits = dict(zip(PARTS, (head.static_vector.expand_as, head.advantage), strict=True))
    found = {part: (pool.scores(own, pool.by_edit(edit)) + by_bias).tolist() for part, edit in edits.items()}
    return found | {"responses": len(episodes)}


def samples_of(fit: Path, pool: Pool) -> torch.Tensor:
    """Which sample of its prompt each episode is."""
    used = [each for each in load_rollouts(fit / "rollouts") if each.completion_ids and each.reward is not None]
    found = torch.tensor([each.sample for each in used])
    if len(found) != len(pool.rewards):
        raise ValueError(f"{fit} holds {len(found)} scored rollouts and states of {len(pool.rewards)}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gae-lambda", type=float, required=True)
    parser.add_argument("--folds", type=int, default=4)
    arguments = parser.parse_args()
    trained = ValueHeadConfig.from_json_file(arguments.fit / "head" / "config.json")
    pool = Pool.of(arguments.fit, arguments.folds)
    output = folder_of(arguments.output, pool)
    every = json.loads((arguments.fit / "rollouts" / "manifest.json").read_text(encoding="utf-8"))["prefix_every"]
    config = replace(shape_of(trained), token_bias_size=len(pool.rows))
    sample, prompts = samples_of(arguments.fit, pool), int(pool.prompt.max()) + 1
    print("| prompts | samples of each | responses | part | gain |\n|---:|---:|---:|---|---:|")
    for count, samples in sizes(prompts, int(sample.max()) + 1):
        found = []
        for fold in range(arguments.folds):
            of = f"{arguments.gae_lambda:g}, {count} prompts, {samples} samples, fold {fold} of {arguments.folds}"
            kept = output / f"λ {of}.json"
            if not kept.is_file():
                episodes = chosen(pool, sample, fold, count / prompts, samples)
                scores = scores_of(pool, episodes, fold, config, arguments.gae_lambda, every)
                keep(kept, scores)
            found.append(json.loads(kept.read_text(encoding="utf-8")))
        responses = sum(each["responses"] for each in found) / len(found)
        for part in PARTS:
            gain, half = pool.interval(pool.earned([scores[part] for scores in found]))
            shown = f"{gain:.3f} [{gain - half:.3f}, {gain + half:.3f}]"
            print(f"| {round(count * (1 - 1 / arguments.folds))} | {samples} | {responses:.0f} | {part} | {shown} |")


if __name__ == "__main__":
    main()
