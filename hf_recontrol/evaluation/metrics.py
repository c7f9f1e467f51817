"""Figures of responses: diversity over word n-grams, rewards as one number, and how far control moved the policy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from ..collection.batches import check_in_force
from ..configuration import ValueHeadConfig
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from ..utils.files import without_place
from .likelihoods import check_controlled, likelihoods_in_force

# NLTK's `wordpunct_tokenize`: runs of letters and digits, and runs of punctuation.
_WORDS = re.compile(r"\w+|[^\w\s]+")


def diversity(texts: Sequence[str]) -> float:
    """
    `Π_{n=2..4} (1 - rep_n)`, `rep_n = 1 - |distinct n-grams| / (|n-grams| + 1)` over word tokens, averaged over texts.
    The formula is that of Kong et al. (2024); they split words with another tokenizer of NLTK, so their figures are
    not comparable to the last digit.

    Raises:
        `ValueError`: if there are no texts. `TypeError`: for a single text.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of texts, got a single one: `diversity([text])`.")
    if not texts:
        raise ValueError("No texts to measure.")
    return sum(map(_diversity, texts)) / len(texts)


def _diversity(text: str) -> float:
    grams = [_grams(text, n) for n in (2, 3, 4)]
    return math.prod(len(set(each)) / (len(each) + 1) for each in grams)


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = _WORDS.findall(text)
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def repetition(text: str) -> float:
    """
    Share of a text's word 4-grams that stood in it before, `1 - |distinct| / |4-grams|` (seq-rep-4 of Welleck et al.
    2020, over words); 0 for a text without any.
    """
    grams = _grams(text, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def knows_units(config: ValueHeadConfig, names: Sequence[str]) -> bool:
    """Whether a head was trained on rewards of these names, and so knows the mean and the spread of each."""
    trained_on = config.training.rewards if config.training is not None else []
    shown = [without_place(name) for name in names]
    return set(shown) <= set(trained_on) and max(map([*trained_on, *shown].count, shown)) == 2


def summed_reward(reward: Sequence[float], config: ValueHeadConfig, names: Sequence[str] | None = None) -> float:
    """
    A response's rewards as one number: their sum, each in standard deviations of a head's training.

    Args:
        reward (sequence of `float`):
            In the rewards' own units.
        config ([`ValueHeadConfig`]):
            Of the head.
        names (sequence of `str`, *optional*):
            Of the rewards. If the head was not trained on rewards of these names ([`knows_units`]), they are summed as
            they are. By default they are all that it was trained on, in the order of its objectives.
    """
    values, mean, std = (torch.tensor(x, dtype=torch.float64) for x in (reward, config.reward_mean, config.reward_std))
    if names is not None:
        if not knows_units(config, names):
            return float(values.sum())
        trained_on = config.training.rewards
        order = [trained_on.index(without_place(name)) for name in names]
        mean, std = (x.expand(len(trained_on))[order] for x in (mean, std))
    return float(((values - mean) / std).sum())


def kl_divergence(model: ReControlForCausalLM, rollouts: Sequence[Rollout], *, batch_size: int = 8) -> float:
    """
    Mean `KL(π ‖ π0)` in nats over the rollouts' response tokens: π the model under the settings in force, π0 its base,
    both at the temperature that the rollout was sampled at (1 for a greedy one), read by teacher forcing. On the
    controlled model's own responses this is the KL that it paid.

    Raises:
        `ValueError`: if no rollout has a token, settings hold one value for each prompt, or rollouts were sampled
        under another control than that in force (those of the base alone go with any). `TypeError`: if the model has
        no head.
    """
    check_controlled(model)
    used = [rollout for rollout in rollouts if rollout.completion_ids]
    if not used:
        raise ValueError("No rollout has a token to measure.")
    model.check_same_for_all_prompts()
    check_in_force(model, used)
    found = likelihoods_in_force(model, used, batch_size)
    return sum(each.kl for each in found) / sum(len(rollout.completion_ids) for rollout in used)
