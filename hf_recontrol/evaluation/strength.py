"""How strong a control should be: the step size that moves the policy by a given KL, and the control to recommend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..configuration import ControlConfig
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from .metrics import kl_divergence

# How much better than its constant part g must be on held-out prompts to be recommended, and how good at least.
_CLEARLY_BETTER = 1.1
_SMALLEST_CORRELATION = 0.05
# A few responses give the mean KL well enough, at a second or two for each step size tried: of the longest so many,
# every so manyth.
_LONGEST, _EVERY = 64, 8
# Step sizes change by at most a factor of 30 at once (in logarithms): far away the KL tells little about its slope.
_LARGEST_MOVE = 3.4
# In logarithms: the KL grows with the square of the step size near 0; a slope below the second is no help.
_EXPECTED_SLOPE, _SMALLEST_SLOPE = 2.0, 0.2
# Stands for the KL where an edited state leaves its dtype's range; one over it for none at all.
_KL_OUT_OF_RANGE = 1e12


def kl_sample(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The few of a run's rollouts on which step sizes are matched: some of the longest, evenly spread."""
    return sorted(rollouts, key=lambda rollout: -len(rollout.completion_ids))[:_LONGEST][::_EVERY]


def recommended_method(figures: Mapping[str, float]) -> str:
    """
    Which control a head recommends: the advantage edit where g's held-out correlation is a tenth better than that of
    its constant part and above 0.05, else the ascent.

    Args:
        figures (mapping):
            Of [`fit_advantage`]; without them it is the ascent.
    """
    needed = max(_CLEARLY_BETTER * figures.get("constant_correlation", 0.0), _SMALLEST_CORRELATION)
    return "advantage" if figures.get("advantage_correlation", 0.0) > needed else "ascent"


def match_kl(
    model: ReControlForCausalLM,
    rollouts: Sequence[Rollout],
    control: ControlConfig,
    target: float,
    *,
    tolerance: float = 0.1,
    max_measurements: int = 20,
) -> ControlConfig:
    """
    The control whose mean KL to the base on given (uncontrolled) responses is `target`. It makes methods comparable,
    and gives a step size that was not tuned on any reward.

    The KL grows about with the square of the step size, so its logarithm is searched by interpolation in the logarithm
    of the step size, and by bisection where that does not help.

    Args:
        model ([`ReControlForCausalLM`]), rollouts (sequence of [`Rollout`]):
            Where the KL is measured, see [`kl_divergence`]; a dozen responses do.
        control ([`ControlConfig`]):
            The settings whose `step_size` is to be found; the search starts from it.
        target (`float`):
            Nats per token.
        tolerance (`float`, *optional*, defaults to 0.1):
            How far the KL may be off, relative to `target`.
        max_measurements (`int`, *optional*, defaults to 20):
            Step sizes tried at most.

    Raises:
        `ValueError`: if `target` is not above 0, or no step size is found that reaches it.
    """
    if not target > 0:
        raise ValueError(f"`target` must be above 0, got {target!r}.")
    if control.is_identity or control.per_row:
        raise ValueError(f"`control` must start from one step size above 0, got {control}.")
    low, high = -math.inf, math.inf  # logarithms of step sizes on either side of the target
    log_step, slope, before = math.log(control.step_size), _EXPECTED_SLOPE, None
    for _ in range(max_measurements):
        candidate = replace(control, step_size=math.exp(log_step))
        try:
            with model.use_control(candidate):
                kl = kl_divergence(model, rollouts)
        except FloatingPointError:  # beyond the range of the states' dtype
            kl = _KL_OUT_OF_RANGE
        if abs(kl / target - 1) <= tolerance:
            return replace(control, step_size=float(f"{math.exp(log_step):.3g}"))
        low, high = (log_step, high) if kl < target else (low, log_step)
        log_kl = math.log(max(kl, 1 / _KL_OUT_OF_RANGE))
        if before is not None and log_step != before[0]:
            slope = (log_kl - before[1]) / (log_step - before[0])
        before = log_step, log_kl
        move = math.copysign(_LARGEST_MOVE, target - kl)
        if slope > _SMALLEST_SLOPE:
            move = (math.log(target) - log_kl) / slope
        log_step += max(-_LARGEST_MOVE, min(_LARGEST_MOVE, move))
        if not low < log_step < high:
            log_step = (low + high) / 2
    raise ValueError(
        f"No step size was found that moves the policy by {target:g} nats a token: {math.exp(before[0]):.3g} moves it "
        f"by {math.exp(before[1]):.3g}."
    )


def recommend_control(
    model: ReControlForCausalLM, rollouts: Sequence[Rollout], figures: Mapping[str, float], target_kl: float
) -> ControlConfig:
    """
    The control that a head should recommend: [`recommended_method`], at the step size that moves the policy by
    `target_kl` (see [`match_kl`]).

    Args:
        model ([`ReControlForCausalLM`]):
            The base with the head.
        rollouts (sequence of [`Rollout`]):
            Uncontrolled responses; a few of them are used, see [`kl_sample`].
        figures (mapping):
            Held-out figures of the head.
        target_kl (`float`):
            Nats a token.

    Raises:
        `ValueError`: as [`match_kl`].
    """
    return match_kl(model, kl_sample(rollouts), ControlConfig(recommended_method(figures), step_size=1.0), target_kl)
