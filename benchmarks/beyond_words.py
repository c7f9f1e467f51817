"""
What is left of control where no bag of words predicts the reward.

    python benchmarks/beyond_words.py --rewards reward-model --output beyond [--only order tone] [--prompts 200]

Two rewards. `order` is the share of words that begin with a later letter of the alphabet than the word before (equal
letters count half): any word is as good as another, it depends on the one that it follows. `tone` is VADER's sentiment
where the prompt asks for a cheerful answer, and its opposite where it asks for a gloomy one: any word is good for one
half of the prompts and bad for the other. For each a head is trained (SmolLM2-135M-Instruct, the prompts of
`reward_model.py`'s folder) and its controls are compared at equal KL on unseen prompts; the judge is VADER for the
first, that folder's reward for the second. Then comes how a ridge regression on the counts of words goes together with
the reward on prompts that it was not fitted on (the correlation), beside VADER. Needs scikit-learn. It goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from example_heads import SCORING, SETTINGS, prompts_of
from layers import HEADING, print_rows
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from hf_recontrol import Rollout, embedded_model, fit, load_rollouts, text_reward, vader

CONTROLS = [{"kind": kind} for kind in ("static_vector", "advantage", "ascent")]
ASKED = {1: "Answer in a cheerful tone.", -1: "Answer in a gloomy tone."}


@text_reward
def order(completions: list[str], **columns) -> list[float]:
    """The share of words that begin with a later letter than the word before; 0 of fewer than two words."""
    found = []
    for text in completions:
        first = [word[0] for word in re.findall(r"[a-z]+", text.lower())]
        # Equal letters count half: so no letter is better than another in the mean of its two neighbours.
        later = sum((a < b) + (a == b) / 2 for a, b in pairwise(first))
        found.append(later / max(1, len(first) - 1))
    return found


@text_reward
def tone(completions: list[str], wanted: list[int], **columns) -> list[float]:
    """VADER's sentiment times what is wanted, 1 or -1."""
    return [sign * score for sign, score in zip(wanted, vader([], completions), strict=True)]


def in_a_tone(rows: list[dict]) -> list[dict]:
    """Prompts that ask for a cheerful and for a gloomy answer, in turn."""
    signs = [1 - 2 * (i % 2) for i in range(len(rows))]
    return [
        {"prompt": f"{row['prompt']}\n\n{ASKED[sign]}", "wanted": sign} for row, sign in zip(rows, signs, strict=True)
    ]


def by_words(rollouts: list[Rollout], rewards: np.ndarray) -> float:
    """The correlation of rewards with what counts of words say of them on other prompts."""
    regression = make_pipeline(CountVectorizer(token_pattern=r"\w+"), RidgeCV(np.logspace(0, 4, 9)))
    texts, prompts = ([getattr(each, name) for each in rollouts] for name in ("completion", "prompt"))
    said = cross_val_predict(regression, texts, rewards, groups=prompts, cv=GroupKFold(4))
    return float(np.corrcoef(said, rewards)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=["order", "tone"], nargs="*", default=["order", "tone"])
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    rewards, judges = {"order": order, "tone": tone}, {"order": vader, "tone": str(arguments.rewards)}
    for name in arguments.only:
        parts = prompts_of(arguments.rewards, arguments.prompts)
        training, held_out, unseen = (in_a_tone(rows) for rows in parts) if name == "tone" else parts
        folder = arguments.output / name
        fit(embedded_model(), training, rewards[name], folder, replace(SETTINGS, **SCORING["vader"]))
        asked = {"prompts": unseen, "held_out": held_out, "rewards": rewards[name], "judge": judges[name]}
        print(HEADING)
        print_rows(name, folder / "head", CONTROLS, folder / "comparisons", **asked)
        rollouts = load_rollouts(folder / "rollouts")
        texts = [each.completion for each in rollouts]
        found = by_words(rollouts, np.array([each.reward[0] for each in rollouts]))
        beside = by_words(rollouts, np.array(vader([], texts)))
        print(f"\n{name} by counts of words: {found:.2f}; VADER of the same responses: {beside:.2f}.\n", flush=True)


if __name__ == "__main__":
    main()
