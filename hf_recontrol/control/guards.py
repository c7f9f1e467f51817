"""Guards at the logits: which tokens may be drawn, and how far the controlled distribution may be from the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from .method import may_wait

# How often a row's KL is looked at, at most.
_TRIALS = 16
# A row's KL is near enough to the limit from this share of it on.
_ENOUGH = 0.999
# Rows whose logits, several times over, a CPU's cache holds.
_ROWS_AT_ONCE = 4
# Below any KL, β and variance that matter.
_TINY = 1e-30
# Above any logit that matters. A larger one, or one that overflowed, is taken for this, of which float32 still tells
# the KL from 0.
_LARGEST = 1e5


def implausible_tokens(base: torch.Tensor, plausibility: float) -> torch.Tensor:
    """
    Which tokens are below `plausibility` times the probability of the base's most likely one.

    Args:
        base (`torch.Tensor` of shape `(..., vocabulary)`):
            The base's logits.
        plausibility (`float`):
            p in (0, 1].

    Returns:
        Bool `torch.Tensor` of the shape of `base`.
    """
    base = base.float()
    return base < base.amax(-1, keepdim=True) + math.log(plausibility)


def guarded_logits(
    base: torch.Tensor,
    controlled: torch.Tensor,
    plausibility: float = 0.0,
    max_kl: float | None = None,
    acts: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Controlled logits under guards: `log π0 + β (controlled - base)`, up to a constant, with the largest β in [0, 1] at
    which `KL(π ‖ π0)` is at most `max_kl`; implausible tokens are masked with -inf.

    Where the logits are linear in the state, β scales the edit itself. β is found from below: but for rounding the KL
    is never above `max_kl`, unless the mask alone is further than that from the base. A row that keeps within the
    limit has its controlled logits unchanged, bit for bit. To gradients β is a constant, as the edit is.

    Args:
        base (`torch.Tensor` of shape `(..., vocabulary)`), controlled (the same):
            Logits. The KL is at temperature 1.
        plausibility (`float`, *optional*, defaults to 0.0):
            As for [`ControlConfig`].
        max_kl (`float`, *optional*):
            Nats a token.
        acts (`torch.Tensor`, *optional*):
            Bool, broadcasts to `base.shape[:-1] + (1,)`: which rows are controlled. Nothing of the others is masked.
    """
    masked = None
    if plausibility:
        masked = implausible_tokens(base, plausibility)
        if acts is not None:
            masked = masked & acts.to(masked.device)
    logits = controlled if max_kl is None else _few_at_once(base, controlled, max_kl, masked)
    return logits if masked is None else logits.masked_fill(masked, -math.inf)


def _few_at_once(
    base: torch.Tensor, controlled: torch.Tensor, max_kl: float, masked: torch.Tensor | None
) -> torch.Tensor:
    """[`_within`], on a CPU of so few rows at a time that their logits stay in its cache from trial to trial."""
    size = base.shape[-1]
    if not may_wait(base.device) or base.device.type != "cpu" or base.numel() <= _ROWS_AT_ONCE * size:
        return _within(base, controlled, max_kl, masked)
    masks = None if masked is None else masked.expand(base.shape).reshape(-1, size).split(_ROWS_AT_ONCE)
    parts = zip(*(x.reshape(-1, size).split(_ROWS_AT_ONCE) for x in (base, controlled)), strict=True)
    found = [_within(*part, max_kl, None if masks is None else masks[i]) for i, part in enumerate(parts)]
    return torch.cat(found).view(controlled.shape)


def _within(base: torch.Tensor, controlled: torch.Tensor, max_kl: float, masked: torch.Tensor | None) -> torch.Tensor:
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    own = base.to(dtype)
    # A base may itself mask tokens with -inf, and infinity less infinity is no number.
    shift = torch.where(torch.isfinite(own), controlled.to(dtype).clamp(-_LARGEST, _LARGEST) - own, 0)
    # A search has no gradient, and its trials are not to be kept for a backward.
    with torch.no_grad():
        beta = _largest_within(own, shift, max_kl, masked)
    if beta is None:
        return controlled
    return torch.where(beta == 1, controlled, (own + beta * shift).to(controlled.dtype))


def _largest_within(
    own: torch.Tensor, shift: torch.Tensor, max_kl: float, masked: torch.Tensor | None
) -> torch.Tensor | None:
    """β of each row of the base's logits, 1 where the whole shift keeps the limit; `None` if that is known of all."""
    log_base = torch.log_softmax(own, dim=-1)
    if masked is not None:
        log_base = log_base.masked_fill(masked, -math.inf)

    def kl_at(beta: torch.Tensor) -> torch.Tensor:
        moved = log_base + beta * shift
        largest = moved.amax(-1, keepdim=True)
        weights = (moved - largest).exp()
        total = weights.sum(-1, keepdim=True)
        return beta * (weights * shift).sum(-1, keepdim=True) / total - total.log() - largest

    one = torch.ones_like(own[..., :1])
    kl = kl_at(one)
    fits = kl <= max_kl
    waits = may_wait(own.device)
    if waits and fits.all():
        return None
    aim = max_kl * (1 + _ENOUGH) / 2
    weights = log_base.exp()
    mean = (weights * shift).sum(-1, keepdim=True)
    variance = (weights * (shift - mean).square()).sum(-1, keepdim=True)
    # Of a small β the KL is half the shift's variance under the base, times β².
    beta = (2 * aim / variance.clamp_min(_TINY)).sqrt().clamp(max=0.5)
    # The bracket: the longest edit known to keep the limit, the shortest known to break it, and their KL.
    low, low_kl, high, high_kl = 0 * one, 0 * one, one, kl
    for trial in range(_TRIALS):
        kl = kl_at(beta)
        below = kl <= max_kl
        low, low_kl = torch.where(below, beta, low), torch.where(below, kl, low_kl)
        high, high_kl = torch.where(below, high, beta), torch.where(below, high_kl, kl)
        if waits and (fits | (low_kl >= _ENOUGH * max_kl)).all():
            break
        # A line through both ends in logarithms and, where the KL is too bent for it, the middle: in turn.
        share = (aim / low_kl.clamp_min(_TINY)).log() / (high_kl / low_kl.clamp_min(_TINY)).log()
        share = torch.full_like(share, 0.5) if trial % 2 else share.clamp(0.05, 0.95)
        beta = torch.where(low > 0, low * (high / low.clamp_min(_TINY)) ** share, high / 8)
    return torch.where(fits, one, low)


class NoTokenLeftError(ValueError):
    """A mask and other constraints leave no token to draw."""


class AnyTokenLeft(LogitsProcessor):
    """
    The last processor of a generation with a mask: raises [`NoTokenLeftError`] where the mask and other constraints
    leave no token to draw. transformers would draw token 0, or fail without a reason.

    Args:
        num_beams (`int`):
            Rows of a prompt, of which some may be left without a token.
        prompt_length (`int`):
            Tokens of the prompts.
        ends (sequence of `torch.Tensor` of shape `(tokens,)`):
            With which a row ends, and is filled up then.
    """

    def __init__(self, num_beams: int, prompt_length: int, ends: Sequence[torch.Tensor]):
        self.num_beams, self.prompt_length, self.ends = num_beams, prompt_length, ends

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores`, of shape `(rows, vocabulary)`, as they are."""
        left = scores.amax(-1) > -math.inf
        if self.num_beams > 1:
            left = left.view(-1, math.gcd(len(left), self.num_beams)).any(-1)
        if left.all():
            return scores
        if self.num_beams == 1 and self.ends and input_ids.shape[1] > self.prompt_length:
            # Of a row that has ended nothing is drawn.
            left = left | torch.isin(input_ids[:, -1], torch.cat([end.to(input_ids.device) for end in self.ends]))
        if not left.all():
            raise NoTokenLeftError(
                "`plausibility` and the constraints of this call (`min_new_tokens`, `suppress_tokens`, "
                "`prefix_allowed_tokens_fn`, ...) together leave no token to draw for row "
                f"{left.tolist().index(False)}: lower `plausibility`, or loosen the constraints."
            )
        return scores


class FiniteLogits(LogitsProcessor):
    """
    The last processor of a generation that samples: raises `FloatingPointError` where control left no distribution,
    before the draw, which some devices do not survive.

    Args:
        step_size (`float`):
            The largest in force.
    """

    def __init__(self, step_size: float):
        self.step_size = step_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores`, of shape `(rows, vocabulary)`, as they are."""
        # False of NaN too. A row without a token is no matter of finiteness.
        if not (scores.amax(-1) < math.inf).all():
            raise FloatingPointError(
                "Under control the logits, divided by the temperature, hold NaN or leave the range of "
                f"{scores.dtype}: `step_size` {self.step_size:g} is too large for this head, or the temperature too "
                "low."
            )
        return scores
