"""
What keeps control short of more on VADER: how much a token's shift could gain if it were known exactly, or knew more.

    python benchmarks/bounds.py --fit FOLDER --gae-lambda 0.5 [--folds 4]

`--fit` is a folder of `recontrol fit` on VADER with `--prefix-every 1`. The gain is that of `variants.py`. Beside what
is learned, on prompts that it was not learned on, stand shifts that no head can know: a token's valence in VADER's own
lexicon (0 of a token that is no word in it), and shifts times `(1 - r²)^1.5`, the slope of VADER's score at the score
r of the response so far, since the more sentiment there is, the less a word adds. The last row is that of the reward
itself. Differences are to g and c as learned.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
from variants import Pool, shape_of

from hf_recontrol import (
    ValueHead,
    ValueHeadConfig,
    ValueSettings,
    fit_advantage,
    train_critic,
    train_value_head,
)


def learned(pool: Pool, fold: int, config: ValueHeadConfig, gae_lambda: float) -> list[torch.Tensor]:
    """Shifts of all drawn tokens by b and c, and by g and c, learned on the other folds."""
    states = pool.part((pool.fold != fold).nonzero()[:, 0], 1)
    # Of V only the scale of the states is used: the targets are the critic's.
    scaled, _ = train_value_head(states, config, num_epochs=1)
    head = ValueHead(replace(scaled.config, token_bias_size=len(pool.rows)))
    head.load_state_dict(scaled.state_dict(), strict=False)
    fit_advantage(head, states, gae_lambda=gae_lambda, critic=train_critic(states, config, ValueSettings())[0])
    by_bias = shifts_of(pool, pool.by_bias(head.token_bias))
    edits = (head.static_vector.expand_as, head.advantage)
    return [shifts_of(pool, pool.by_edit(edit)) + by_bias for edit in edits]


@torch.no_grad()
def shifts_of(pool: Pool, shifts) -> torch.Tensor:
    """Of all states, `(states,)`."""
    return torch.cat([shifts(rows) for rows in torch.arange(len(pool.tokens)).split(1024)]).double()


def lexicon(pool: Pool) -> torch.Tensor:
    """VADER's valence of each token that begins a word, and is one."""
    known = SentimentIntensityAnalyzer().lexicon
    tokenizer = AutoTokenizer.from_pretrained(pool.store.read_at["base_model_name_or_path"])
    texts = [tokenizer.decode([token]) for token in range(len(pool.rows))]
    begins = [text[:1].isspace() or text[:1].isupper() for text in texts]
    return torch.tensor([known.get(t.strip().lower(), 0.0) if b else 0.0 for t, b in zip(texts, begins, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--gae-lambda", type=float, default=0.8)
    parser.add_argument("--folds", type=int, default=4)
    arguments = parser.parse_args()
    pool = Pool.of(arguments.fit, arguments.folds)
    if pool.so_far is None:
        parser.error("the fit has no rewards of the response so far: it needs `prefix_every`")
    config = shape_of(ValueHeadConfig.from_json_file(arguments.fit / "head" / "config.json"))
    found = [learned(pool, fold, config, arguments.gae_lambda) for fold in range(arguments.folds)]
    # Of no token there is no score.
    slope = (1 - pool.so_far[:, 0].double().nan_to_num().square()).clamp(min=0) ** 1.5
    own = shifts_of(pool, pool.by_bias(lexicon(pool)))
    rows = {
        "g and c": [g for _, g in found],
        "b and c": [b for b, _ in found],
        "g and c, times the slope": [slope * g for _, g in found],
        "the lexicon": [own] * len(found),
        "the lexicon, times the slope": [slope * own] * len(found),
    }
    print(f"{len(pool.rewards)} responses\n\n| shifts | gain | difference |\n|---|---:|---:|")
    reference = None
    for name, shifts in rows.items():
        sums = [torch.zeros_like(pool.left).index_add_(0, pool.episode, each) for each in shifts]
        earned = pool.earned([each[pool.fold == fold].tolist() for fold, each in enumerate(sums)])
        reference = earned if reference is None else reference
        (gain, half), (more, width) = pool.interval(earned), pool.interval(earned - reference)
        print(
            f"| {name} | {gain:.3f} [{gain - half:.3f}, {gain + half:.3f}] "
            f"| {more:+.3f} [{more - width:+.3f}, {more + width:+.3f}] |"
        )
    print(f"| the reward | {math.sqrt(2) * float(pool.left.std()):.3f} | |")


if __name__ == "__main__":
    main()
