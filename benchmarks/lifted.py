"""
What control owes to a handful of tokens: how much of a static edit's gain comes of which.

    python benchmarks/lifted.py --fit FOLDER --gae-lambda 0.5 [--folds 4]

`--fit` is a folder of `recontrol fit`. The gain is that of `variants.py`: at a small KL the reward rises by what the
shifts of the drawn tokens go together with it, `E[Σ_t s_t (r - E r)]`, which is a sum over tokens. A token's part in
it is counted on prompts that the edit (b and the token bias) was not fitted on, and the order of the tokens is that of
their parts on the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer
from variants import Pool

from hf_recontrol import ValueHead, ValueHeadConfig, ValueSettings, fit_advantage, train_critic

COUNTS = (5, 10, 20, 50, 100, 200, 500)
SHOWN = 20


def parts_of(pool: Pool, fold: int, config: ValueHeadConfig, gae_lambda: float) -> tuple[torch.Tensor, ...]:
    """Of each token: its part in the gain on a fold, and on the others, for the edit of these; and its mean shift."""
    train = (pool.fold != fold).nonzero()[:, 0]
    states = pool.part(train, None if pool.so_far is None else 1)
    head = ValueHead(config)
    fit_advantage(head, states, gae_lambda=gae_lambda, critic=train_critic(states, config, ValueSettings())[0])
    edit, bias = pool.by_edit(head.static_vector.expand_as), pool.by_bias(head.token_bias)
    shifts = torch.cat([edit(rows) + bias(rows) for rows in torch.arange(len(pool.tokens)).split(1024)]).double()
    worth = shifts * pool.left[pool.episode]
    own = pool.fold[pool.episode] == fold
    size = len(pool.rows)
    found = [torch.zeros(size, dtype=torch.float64).index_add_(0, pool.tokens[x], worth[x]) for x in (own, ~own)]
    count = torch.bincount(pool.tokens, minlength=size)
    mean = torch.zeros(size, dtype=torch.float64).index_add_(0, pool.tokens, shifts) / count.clamp(min=1)
    # In units of the edit's own size, so that folds can be put together.
    scale = torch.zeros(len(pool.rewards), dtype=torch.float64).index_add_(0, pool.episode, shifts).std()
    return found[0] / scale, found[1] / scale, mean / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--gae-lambda", type=float, default=0.8)
    parser.add_argument("--folds", type=int, default=4)
    arguments = parser.parse_args()
    pool = Pool.of(arguments.fit, arguments.folds)
    config = ValueHeadConfig(
        pool.store.hidden_size,
        head_sizes=[8],
        hook_point="lm_head",
        static_vector=True,
        token_bias_size=len(pool.rows),
    )
    found = [parts_of(pool, fold, config, arguments.gae_lambda) for fold in range(arguments.folds)]
    total = sum(float(own.sum()) for own, _, _ in found)
    print("| tokens | share of the gain |\n|---:|---:|")
    for count in COUNTS:
        of_these = sum(float(own[others.argsort(descending=True)[:count]].sum()) for own, others, _ in found)
        print(f"| {count} | {of_these / total:.2f} |")
    print(f"| all {int((torch.bincount(pool.tokens) > 0).sum())} that were drawn | 1 |")
    tokenizer = AutoTokenizer.from_pretrained(pool.store.read_at["base_model_name_or_path"])
    parts, shift = sum(own for own, _, _ in found) / total, sum(mean for _, _, mean in found) / len(found)
    drawn = torch.bincount(pool.tokens, minlength=len(parts)) / len(pool.tokens) * 1000
    print("\n| token | drawn in 1,000 | shift | share of the gain |\n|---|---:|---:|---:|")
    for token in parts.argsort(descending=True)[:SHOWN].tolist():
        text = json.dumps(tokenizer.decode([token]), ensure_ascii=False)
        print(f"| `{text}` | {drawn[token]:.2f} | {shift[token]:+.2f} | {parts[token]:.3f} |")
    print("\nShifts are in deviations of a response's sum of shifts.")


if __name__ == "__main__":
    main()
