"""Step sizes that are comparable between methods: the one that moves the policy by a given KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..configuration import ControlConfig
from ..modeling import ReControlForCausalLM
from ..rollouts import Rollout
from .metrics import kl_divergence


def match_kl(
    model: ReControlForCausalLM,
    rollouts: Sequence[Rollout],
    control: ControlConfig,
    target: float,
    *,
    num_iterations: int = 8,
    limit: float = 1e4,
) -> ControlConfig:
    """
    The control whose mean KL to the base on given (uncontrolled) responses is `target`, by bisection of the logarithm
    of its step size. It makes methods comparable, and gives a step size that was not tuned on any reward.

    Args:
        model ([`ReControlForCausalLM`]), rollouts (sequence of [`Rollout`]):
            Where the KL is measured, see [`kl_divergence`]; a few dozen responses do.
        control ([`ControlConfig`]):
            The settings whose `step_size` is to be found; the search starts from it.
        target (`float`):
            Nats per token.
        num_iterations (`int`, *optional*, defaults to 8):
            Measurements after the step size has been bracketed.
        limit (`float`, *optional*, defaults to 1e4):
            Largest step size tried.

    Raises:
        `ValueError`: if `target` is not above 0, or no step size up to `limit` reaches it.
    """
    if not target > 0:
        raise ValueError(f"`target` must be above 0, got {target!r}.")
    recommended = model.control

    def measure(step_size: float) -> float:
        model.control = replace(control, step_size=step_size)
        return kl_divergence(model, rollouts)

    try:
        low = high = control.step_size
        if measure(high) < target:
            while measure(high) < target:
                low, high = high, high * 3
                if high > limit:
                    raise ValueError(f"No step size up to {limit:g} moves the policy by {target:g} nats a token.")
        else:
            while measure(low) > target:
                high, low = low, low / 3
                if low < 1 / limit:
                    raise ValueError(f"Even a step size of {low:g} moves the policy by over {target:g} nats a token.")
        for _ in range(num_iterations):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if measure(middle) < target else (low, middle)
        return replace(control, step_size=float(f"{math.sqrt(low * high):.2g}"))
    finally:
        model.control = recommended
