"""The reward of the demo: VADER's sentiment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ...data.prompts import Prompt
from ...utils.extras import needs_extra
from .rewards import text_reward


@text_reward
def vader(prompts: Sequence[Prompt], completions: Sequence[str], **kwargs) -> list[float]:
    """
    VADER's compound sentiment of the response, in [-1, 1]: the reward of the demo.

    Raises:
        `ImportError`: if `vaderSentiment` is not installed; names the extra.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(completion)["compound"] for completion in completions]


@cache
def _analyzer() -> Any:
    """What scores. It reads a lexicon when it is made."""
    with needs_extra("demo", "The VADER reward"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()
