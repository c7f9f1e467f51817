"""Step sizes that are comparable between methods: the one that moves the policy by a given KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..configuration import ControlConfig
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from .metrics import kl_divergence


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
    recommended = model.control
    low, high = -math.inf, math.inf  # logarithms of step sizes on either side of the target
    log_step, slope, before = math.log(control.step_size), 2.0, None
    try:
        for _ in range(max_measurements):
            model.control = replace(control, step_size=math.exp(log_step))
            try:
                kl = kl_divergence(model, rollouts)
            except FloatingPointError:  # beyond the range of the states' dtype
                kl = 1e12
            if abs(kl / target - 1) <= tolerance:
                return replace(control, step_size=float(f"{math.exp(log_step):.3g}"))
            low, high = (log_step, high) if kl < target else (low, log_step)
            log_kl = math.log(max(kl, 1e-12))
            if before is not None and log_step != before[0]:
                slope = (log_kl - before[1]) / (log_step - before[0])
            before = log_step, log_kl
            # At most a factor of 30 at once: far away the KL tells little about its slope.
            move = (math.log(target) - log_kl) / slope if slope > 0.2 else math.copysign(3.4, target - kl)
            log_step += max(-3.4, min(3.4, move))
            if not low < log_step < high:
                log_step = (low + high) / 2
        raise ValueError(
            f"No step size was found that moves the policy by {target:g} nats a token: {math.exp(before[0]):.3g} "
            f"moves it by {math.exp(before[1]):.3g}."
        )
    finally:
        model.control = recommended
