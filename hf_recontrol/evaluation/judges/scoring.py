"""Verdicts of a judge of pairs: each answer held against the reference's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ...data.rollouts import Rollout
from ..comparison.results import matched_references
from ..comparison.scores import Scorer, Scores, prompt_text
from .endpoint import EndpointJudge

# Of each answer whether the judge said otherwise with the two answers swapped.
ORDERS_DISAGREE = "orders_disagree"


def pair_scorer(judge: EndpointJudge, cache: Path) -> Scorer:
    """
    A judge of pairs as a scorer: each answer against the reference's to the same prompt.

    Args:
        cache (`Path`):
            The file of verdicts, in a folder that exists when answers are scored.

    Raises:
        `ImportError`, `ValueError`: for a judge that cannot be asked.
    """
    client = judge.client()

    def score(rollouts: list[Rollout], references: list[Rollout]) -> Scores:
        places = matched_references(rollouts, references)
        found = [
            judge.pair(client, cache, prompt_text(rollout.prompt), rollout.completion, references[place].completion)
            for rollout, place in zip(rollouts, places, strict=True)
        ]
        return {
            "win_rate": [value for value, _ in found],
            "ties": [None if value is None else float(value == 0.5) for value, _ in found],
            ORDERS_DISAGREE: [float(disagree) for _, disagree in found],
        }

    asked = {name: asdict(judge)[name] for name in ("model", "base_url", "criteria", "max_tokens")}
    return Scorer("verdicts", {"judge": asked}, score, uses_references=True)
