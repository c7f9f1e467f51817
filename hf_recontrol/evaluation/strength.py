"""How strong a control should be: the step size that moves the policy by a given KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..configuration import ControlConfig
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from .metrics import kl_divergence

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

    def kl_at(candidate: ControlConfig) -> float:
        with model.use_control(candidate):
            return kl_divergence(model, rollouts)

    return find_step_size(kl_at, control, target, tolerance, max_measurements)


def find_step_size(
    kl_at: Callable[[ControlConfig], float],
    control: ControlConfig,
    target: float,
    tolerance: float = 0.1,
    max_measurements: int = 20,
) -> ControlConfig:
    """[`find_strength`] for a control's step size."""
    if control.is_identity or control.per_row:
        raise ValueError(f"`control` must start from one step size above 0, got {control}.")
    found = find_strength(
        lambda step_size: kl_at(replace(control, step_size=step_size)),
        control.step_size,
        target,
        tolerance,
        max_measurements,
    )
    return replace(control, step_size=found)


def find_strength(
    kl_at: Callable[[float], float], start: float, target: float, tolerance: float = 0.1, max_measurements: int = 20
) -> float:
    """
    The strength at which a policy is `target` nats a token from the base.

    The KL grows about with the square of the strength, so its logarithm is searched by interpolation in the logarithm
    of the strength, and by bisection where that does not help.

    Args:
        kl_at (`Callable[[float], float]`):
            Measures the KL at a strength; it may also draw what it is measured on.
        start (`float`):
            Where the search begins.
        tolerance (`float`, *optional*, defaults to 0.1):
            How far the KL may be off, relative to `target`.
        max_measurements (`int`, *optional*, defaults to 20):
            Strengths tried at most.

    Raises:
        `ValueError`: if `target` is not above 0, or no strength is found that reaches it.
    """
    if not target > 0:
        raise ValueError(f"`target` must be above 0, got {target!r}.")
    low, high = -math.inf, math.inf  # logarithms of strengths on either side of the target
    log_strength, slope, before = math.log(start), _EXPECTED_SLOPE, None
    for _ in range(max_measurements):
        candidate = float(f"{math.exp(log_strength):.3g}")
        try:
            kl = kl_at(candidate)
        except FloatingPointError:  # beyond the range of the states' dtype
            kl = _KL_OUT_OF_RANGE
        if abs(kl / target - 1) <= tolerance:
            return candidate
        low, high = (log_strength, high) if kl < target else (low, log_strength)
        log_kl = math.log(max(kl, 1 / _KL_OUT_OF_RANGE))
        if before is not None and log_strength != before[0]:
            slope = (log_kl - before[1]) / (log_strength - before[0])
        before = log_strength, log_kl
        move = math.copysign(_LARGEST_MOVE, target - kl)
        if slope > _SMALLEST_SLOPE:
            move = (math.log(target) - log_kl) / slope
        log_strength += max(-_LARGEST_MOVE, min(_LARGEST_MOVE, move))
        if not low < log_strength < high:
            log_strength = (low + high) / 2
    raise ValueError(
        f"No strength was found that moves the policy by {target:g} nats a token: {math.exp(before[0]):.3g} moves it "
        f"by {math.exp(before[1]):.3g}."
    )
