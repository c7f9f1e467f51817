"""Figures of responses: diversity over word n-grams, and how far control moved the policy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from transformers.utils import logging

from ..collection.batches import check_in_force, forward_batches, teacher_forced
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.hook_points import in_eval

# NLTK's `wordpunct_tokenize`: runs of letters and digits, and runs of punctuation.
_WORDS = re.compile(r"\w+|[^\w\s]+")
# More change the ends of a 95 % interval by less than they are worth.
_RESAMPLES = 2000


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """
    Interval of the mean of paired differences, one for each prompt, by the bootstrap: the quantiles of the means of
    2,000 resamples of the prompts (always the same ones). A single prompt tells nothing: its interval is unbounded.

    Raises:
        `ValueError`: if there are no differences, or `confidence` is not between 0 and 1.
    """
    if not differences:
        raise ValueError("No differences to take the mean of.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence!r}.")
    if len(differences) == 1:
        return -math.inf, math.inf
    values = torch.tensor(differences, dtype=torch.float64)
    chosen = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    outside = (1 - confidence) / 2
    low, high = values[chosen].mean(1).quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return low, high


def diversity(texts: Sequence[str]) -> float:
    """
    `Π_{n=2..4} (1 - rep_n)`, `rep_n = 1 - |distinct n-grams| / (|n-grams| + 1)` over word tokens, averaged over texts.
    The formula is that of Kong et al. (2024); they split words with another tokenizer of NLTK, so their figures are
    not comparable to the last digit.

    Raises:
        `ValueError`: if there are no texts.
    """
    if not texts:
        raise ValueError("No texts to measure.")
    total = 0.0
    for text in texts:
        words = _WORDS.findall(text)
        product = 1.0
        for n in (2, 3, 4):
            grams = list(zip(*(words[i:] for i in range(n)), strict=False))
            product *= len(set(grams)) / (len(grams) + 1)
        total += product
    return total / len(texts)


@torch.no_grad()
def kl_divergence(model: ReControlForCausalLM, rollouts: Sequence[Rollout], *, batch_size: int = 8) -> float:
    """
    Mean `KL(π ‖ π0)` in nats over the rollouts' response tokens: π the model under the settings in force, π0 its base,
    both at the temperature that the rollout was sampled at (1 for a greedy one), read by teacher forcing. On the
    controlled model's own responses this is the KL that it paid.

    Raises:
        `ValueError`: if no rollout has a token, settings hold one value for each prompt, or rollouts were sampled
        under another control than that in force (those of the base alone go with any).
    """
    used = [rollout for rollout in rollouts if rollout.completion_ids]
    if not used:
        raise ValueError("No rollout has a token to measure.")
    model.check_same_for_all_prompts()
    check_in_force(model, used)
    total, count = 0.0, 0
    batches, _ = forward_batches(model, used, batch_size)
    for batch in logging.tqdm(batches, desc="KL", leave=False, disable=None):
        inputs, parts = teacher_forced(model, [used[i] for i in batch], keep_logits=True)
        with in_eval(model):
            controlled = model(**inputs).logits
            with model.disable_control():
                base = model(**inputs).logits
        for row, part in enumerate(parts):
            temperature = used[batch[row]].temperature or 1.0
            log_policy = torch.log_softmax(controlled[row, part].float() / temperature, dim=-1)
            log_base = torch.log_softmax(base[row, part].float() / temperature, dim=-1)
            # A masked token has policy 0 and adds nothing, where 0 * -inf would be NaN.
            terms = (log_policy.exp() * (log_policy - log_base)).where(log_policy > -torch.inf, 0.0)
            total += float(terms.sum())
            count += part.stop - part.start
    return total / count
