"""How strong a control should be: the step size that moves the policy by a given KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..collection.kept_states import KeptInMemory
from ..collection.rollouts import draw_rollouts
from ..collection.sampling import sampling_config, temperature_of
from ..configuration import ControlConfig
from ..data.fingerprints import prompt_hash
from ..data.processes import no_progress
from ..data.prompts import Prompts, load_prompts
from ..data.rollouts import Rollout
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM
from ..settings import SamplingSettings
from .intervals import ratio_interval
from .likelihoods import acts_only_at_head, check_controlled, likelihoods_in_force
from .metrics import kl_divergence

logger = logging.get_logger(__name__)

# Responses that a control is measured on: of so many prompts, or several of each prompt if there are fewer.
NUM_RESPONSES = 64
# A few responses give the mean KL well enough, at a second or two for each step size tried: of the longest so many,
# every so manyth.
_LONGEST, _EVERY = 64, 8
# Step sizes change by at most a factor of 30 at once (in logarithms): far away the KL tells little about its slope.
_LARGEST_MOVE = 3.4
# In logarithms: the KL grows with the square of the step size near 0; a slope below the second is no help.
_EXPECTED_SLOPE, _SMALLEST_SLOPE = 2.0, 0.2
# Stands for the KL where an edited state leaves its dtype's range; one over it for none at all.
_KL_OUT_OF_RANGE = 1e12


@dataclass(frozen=True)
class KLMatch:
    """
    What [`match_kl`] found.

    Attributes:
        control ([`ControlConfig`]):
            The control, with the step size that was found.
        kl, low, high (`float`):
            Nats a token that it reached on its own responses, and the ends of the 95 % interval over prompts (see
            [`paired_interval`]; infinite for a single prompt).
        prompts, responses (`int`):
            How many it was measured on.
    """

    control: ControlConfig
    kl: float
    low: float
    high: float
    prompts: int
    responses: int


def match_kl(
    model: ReControlForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | Sequence,
    control: ControlConfig,
    target_kl: float,
    sampling: SamplingSettings | None = None,
    *,
    tolerance: float = 0.1,
    max_samplings: int = 6,
) -> KLMatch:
    """
    The step size at which a control's own responses are `target_kl` from the base. It makes methods comparable, and
    gives a step size that was not tuned on any reward.

    Near it the search comes on a few responses of the base, read again for each step size. From there the prompts are
    answered under control, with the same noise for each step size, until the KL on these answers is as wanted: 2
    rounds of 64 responses as a rule.

    Args:
        model ([`ReControlForCausalLM`]), tokenizer:
            The base with the head.
        prompts ([`Prompts`], or what [`generate_rollouts`] takes):
            Prompts that the head was not trained on. The first 64 are used; of fewer prompts each is answered
            several times, and a warning says so.
        control ([`ControlConfig`]):
            The settings whose `step_size` is to be found; the search starts from it.
        target_kl (`float`):
            Nats per token.
        sampling ([`SamplingSettings`], *optional*):
            How responses are drawn, `num_samples` aside.
        tolerance (`float`, *optional*, defaults to 0.1):
            How far the KL may be off, relative to `target_kl`.
        max_samplings (`int`, *optional*, defaults to 6):
            How often the prompts are answered at most.

    Returns:
        [`KLMatch`]: the control, and the KL that it reached with its interval.

    Raises:
        `ValueError`: if `target_kl` is not above 0, the head cannot do what `control` asks for, there are no prompts,
        or no step size is found that reaches the KL. `TypeError`: if the model has no head.
    """
    check_controlled(model)
    check_target(target_kl)
    _check_start(control)
    with model.use_control(control):
        pass
    prompts, sampling = few_prompts(model, tokenizer, prompts, sampling or SamplingSettings())
    if len(prompts) < NUM_RESPONSES:
        logger.warning(
            f"The KL is measured on {len(prompts)} prompts: its interval is wide. {NUM_RESPONSES} prompts tell more."
        )

    draw = partial(draw_rollouts, model, tokenizer, prompts, sampling, progress=no_progress)
    found, _ = control_at_kl(model, draw(control=False), control, target_kl, draw, tolerance, max_samplings)
    return found


def few_prompts(
    model: ReControlForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    sampling: SamplingSettings,
) -> tuple[Prompts, SamplingSettings]:
    """The prompts to answer, 64 at most, and how often each is: once, or until there are 64 responses."""
    prompts = load_prompts(prompts, limit=NUM_RESPONSES)
    if not len(prompts):
        raise ValueError("No prompts to compare controls on.")
    drawn = sampling_config(model, tokenizer, SamplingSettings.of(sampling, {"num_samples": 1})).do_sample
    return prompts, SamplingSettings.of(sampling, {"num_samples": -(-NUM_RESPONSES // len(prompts)) if drawn else 1})


def control_at_kl(
    model: ReControlForCausalLM,
    of_base: Sequence[Rollout],
    start: ControlConfig,
    target_kl: float,
    draw: Callable[..., list[Rollout]],
    tolerance: float = 0.1,
    max_samplings: int = 6,
) -> tuple[KLMatch, list[Rollout]]:
    """
    A control at `target_kl`, and the responses that its KL was measured on.

    Args:
        of_base (sequence of [`Rollout`]):
            Responses of the base, for the first guess.
        draw (`Callable`):
            [`draw_rollouts`] of the prompts, called with a `control` and what to `keep`.
    """
    _check_start(start)
    few = for_a_guess(of_base)
    last: list[tuple[tuple[float, float, float], list[Rollout]]] = []

    def on_the_base_s(step_size: float) -> float:
        with model.use_control(replace(start, step_size=step_size)):
            return kl_divergence(model, few)

    def on_its_own(step_size: float) -> float:
        control = replace(start, step_size=step_size)
        keep = KeptInMemory(model) if acts_only_at_head(model, control) else None
        responses = draw(control=control, keep=keep)
        with model.use_control(control):
            nats = [each.kl for each in likelihoods_in_force(model, responses, kept=keep)]
        last[:] = [(kl_with_interval(responses, nats), responses)]
        return last[0][0][0]

    step_size = strength_at_kl(
        on_its_own, start.step_size, target_kl, on_the_base_s, tolerance, max_samplings, step_size_limit(start)
    )
    [(measured, responses)] = last
    num_prompts = len({rollout.prompt_number for rollout in responses})
    return KLMatch(replace(start, step_size=step_size), *measured, num_prompts, len(responses)), responses


def step_size_limit(control: ControlConfig) -> float:
    """The largest that a control's L2 penalty allows, a little less for what rounding adds; infinite without one."""
    return 0.99 / control.l2 if control.method == "ascent" and control.l2 > 0 else math.inf


def for_a_guess(responses: Sequence[Rollout]) -> list[Rollout]:
    """The responses on which a strength is guessed, before a control's own tell."""
    return sorted(responses, key=lambda rollout: -len(rollout.completion_ids))[:_LONGEST][::_EVERY]


def kl_with_interval(rollouts: Sequence[Rollout], nats: Sequence[float]) -> tuple[float, float, float]:
    """
    Mean KL in nats a token of responses whose sums are given, and the ends of its 95 % interval over prompts.

    Raises:
        `ValueError`: if no response has a token.
    """
    sums: dict[int, list[float]] = {}
    for rollout, kl in zip(rollouts, nats, strict=True):
        # Equal prompts tell no more than one.
        of_prompt = sums.setdefault(prompt_hash(rollout.prompt), [0.0, 0.0])
        of_prompt[0] += kl
        of_prompt[1] += len(rollout.completion_ids)
    numerators, tokens = ([pair[i] for pair in sums.values()] for i in range(2))
    if not sum(tokens):
        raise ValueError("No response has a token to measure the KL on.")
    return sum(numerators) / sum(tokens), *ratio_interval(numerators, tokens)


def strength_at_kl(
    on_its_own: Callable[[float], float],
    start: float,
    target_kl: float,
    roughly: Callable[[float], float] | None = None,
    tolerance: float = 0.1,
    max_samplings: int = 6,
    largest: float = math.inf,
) -> float:
    """
    [`find_strength`] on a policy's own responses, which is what counts. If the KL is also to be had `roughly`, on
    responses of the base or on few of its own, the search comes near it there first, where it costs little.
    """
    if roughly is not None:
        # What a few responses do not allow, all of its own may: an instruction or a guard counts more on others'.
        with suppress(UnreachableKLError):
            start = find_strength(roughly, start, target_kl, tolerance, largest=largest)
    return find_strength(on_its_own, start, target_kl, tolerance, max_samplings, largest)


def check_target(target: float) -> None:
    """Raises `ValueError` for a KL that no policy can be moved by."""
    if not target > 0:
        raise ValueError(f"`target_kl` must be above 0, got {target!r}.")


def _check_start(control: ControlConfig) -> None:
    if control.is_identity or control.per_row:
        raise ValueError(f"`control` must start from one step size above 0, got {control}.")


def warn_of_other_temperature(heads: Iterable[nn.Module], config: GenerationConfig) -> None:
    """Warn of heads whose training responses were drawn at another temperature than a generation config has."""
    records = [head.config.training for head in heads if isinstance(head, ValueHead)]
    trained_at = sorted({record.temperature for record in records if record is not None} - {None})
    drawn_at = temperature_of(config)
    if others := [f"{each:g}" for each in trained_at if each != drawn_at]:
        logger.warning(
            f"The head's training responses were drawn at temperature {' and '.join(others)}, these are drawn at "
            f"{drawn_at:g}: its parts, and a step size that `fit` recommended, are of the former. To draw as they "
            f"were: `temperature={others[0]}` (`--temperature {others[0]}`)."
        )


class UnreachableKLError(ValueError):
    """No strength was found that moves the policy by so much."""


def find_strength(
    kl_at: Callable[[float], float],
    start: float,
    target: float,
    tolerance: float = 0.1,
    max_measurements: int = 20,
    largest: float = math.inf,
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
        largest (`float`, *optional*, defaults to infinity):
            No strength beyond this one is tried.

    Raises:
        `ValueError`: if `target` is not above 0, or no strength is found that reaches it.
    """
    check_target(target)
    # Logarithms of strengths on either side of the target.
    low, high = -math.inf, math.log(largest)
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
    said = "" if math.isinf(largest) else f" No strength above {largest:.3g} is allowed."
    raise UnreachableKLError(
        f"No strength was found that moves the policy by {target:g} nats a token: {math.exp(before[0]):.3g} moves it "
        f"by {math.exp(before[1]):.3g}.{said}"
    )
