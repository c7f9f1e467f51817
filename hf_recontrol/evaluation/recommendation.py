"""Which control a head should recommend: the simplest of those that earn the most at the same KL to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..collection.rollouts import draw_rollouts
from ..collection.scoring.responses import score_rollouts
from ..collection.scoring.rewards import RewardFunction, named_rewards
from ..configuration import ControlConfig
from ..data.processes import Progress, no_progress, progress_bar
from ..data.prompts import Prompts
from ..data.rollouts import Rollout
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM
from ..settings import SamplingSettings
from .intervals import finite, paired_interval
from .likelihoods import check_controlled
from .metrics import summed_reward
from .strength import check_target, control_at_kl, few_prompts

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Trial:
    """
    A control as it was measured.

    Attributes:
        control ([`ControlConfig`], *optional*):
            Its settings; `None` is the base.
        kl (`float`):
            Nats a token to the base, on its own responses at the temperature they were sampled at.
        reward (`list[float]`):
            Mean of each reward, in its own units.
        gain (`tuple[float, float, float]`, *optional*):
            How much more than the base it earns, and the ends of the paired 95 % interval over prompts (see
            [`paired_interval`]): in standard deviations of the training rewards, summed over the objectives.
        kl_low, kl_high (`float`, *optional*):
            The ends of the 95 % interval of `kl` over prompts; `None` for the base, whose KL is 0.
    """

    control: ControlConfig | None
    kl: float
    reward: list[float]
    gain: tuple[float, float, float] | None = None
    kl_low: float | None = None
    kl_high: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """
    What [`recommend_control`] found.

    Attributes:
        control ([`ControlConfig`]):
            The control to recommend.
        trials (`list[Trial]`):
            The base, and each control that was tried, the simplest first.
        prompts, responses (`int`):
            How many each was measured on.
    """

    control: ControlConfig
    trials: list[Trial]
    prompts: int
    responses: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable `dict`; ends of intervals that are not finite are `None`."""

        def plain(trial: Trial) -> dict[str, Any]:
            gain = trial.gain and [finite(end) for end in trial.gain]
            ends = {"kl_low": finite(trial.kl_low), "kl_high": finite(trial.kl_high)}
            return asdict(trial) | {"control": trial.control and trial.control.to_dict(), "gain": gain} | ends

        return asdict(self) | {"control": self.control.to_dict(), "trials": [plain(trial) for trial in self.trials]}


def candidates(head: ValueHead) -> list[ControlConfig]:
    """
    The controls that a head can be used by, the simplest first: the static vector, the advantage edit (unless its g is
    the static vector), the ascent. Their step sizes are where a search starts.
    """
    found = []
    if head.config.static_vector:
        found.append(ControlConfig("static", 1.0))
    if head.advantage_mlp is not None and (
        not head.config.static_vector or head.advantage_mlp.layers[-1].weight.any()
    ):
        found.append(ControlConfig("advantage", 1.0))
    return [*found, ControlConfig("ascent", 1.0)]


def recommend_control(
    model: ReControlForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | Sequence,
    rewards: str | RewardFunction | Sequence[str | RewardFunction],
    sampling: SamplingSettings | None = None,
    *,
    target_kl: float = 0.1,
    combine_rewards: str = "none",
    progress: Progress | None = None,
) -> Recommendation:
    """
    The control that a head should recommend: of the static edit, the advantage edit and the ascent, as far as it has
    them, each at the step size that moves the policy by `target_kl`, the one whose responses earn the most. Where the
    paired 95 % interval of the difference to the best holds 0, a simpler one is preferred (the static edit to the
    advantage edit, that to the ascent), if it too is clearly better than the base or none is.

    Each control answers the same prompts with the same noise, 64 responses in all, until the KL on its own responses
    is within 10 % of `target_kl`: 2 rounds of sampling as a rule, 6 at most. The base answers them once. So the cost
    is about that of 450 responses, and at most that of 1,216.

    Args:
        model ([`ReControlForCausalLM`]), tokenizer:
            The base with the head.
        prompts ([`Prompts`], or what [`generate_rollouts`] takes):
            Prompts that the head was not trained on. The first 64 are used; of fewer prompts each is answered
            several times.
        rewards (`str`, function, or sequence of these):
            The rewards that it was trained on, in the order of its objectives: as for [`load_reward`], or functions.
        sampling ([`SamplingSettings`], *optional*):
            How responses are drawn, `num_samples` aside; best with another `seed` than the responses that the head was
            validated on, if they were to these prompts.
        target_kl (`float`, *optional*, defaults to 0.1):
            Nats a token.
        combine_rewards (`str`, *optional*, defaults to `"none"`):
            As for [`score_rollouts`].
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Raises:
        `ValueError`: if a reward cannot be used, no control reaches `target_kl`, or no response gets a reward.
        `RuntimeError`: if a reward fails. `TypeError`: if the model has no head.
    """
    check_controlled(model)
    check_target(target_kl)
    head = model.value_head
    prompts, sampling = few_prompts(model, tokenizer, prompts, sampling or SamplingSettings())
    functions = named_rewards(rewards, prompts.columns).values()
    draw = partial(draw_rollouts, model, tokenizer, prompts, sampling, progress=no_progress)

    def scores(rollouts: list[Rollout]) -> list[Rollout]:
        return score_rollouts(
            rollouts,
            *functions,
            on_bad_rows="skip",
            combine_rewards=combine_rewards,
            source="the responses under control",
        )

    starts = candidates(head)
    with progress_bar("control", len(starts) + 1, progress) as advance:
        base = scores(draw(control=False))
        base_rewards = _by_prompt(head, base)
        advance(1)
        found: list[tuple[Trial, dict[int, float]]] = []
        for start in starts:
            try:
                match, drawn = control_at_kl(model, base, start, target_kl, draw)
                scored = scores(drawn)
                by_prompt = _by_prompt(head, scored)
                gains = _differences(by_prompt, base_rewards)
                gain = (sum(gains) / len(gains), *paired_interval(gains))
                trial = Trial(match.control, match.kl, _means(scored), gain, match.low, match.high)
                found.append((trial, by_prompt))
            except ValueError as error:
                logger.warning(f"method={start.method!r} is no candidate: {error}")
            advance(1)
    if not found:
        raise ValueError(f"No control could be compared at {target_kl:g} nats a token.")
    chosen = _chosen(found)
    return Recommendation(
        chosen, [Trial(None, 0.0, _means(base)), *(trial for trial, _ in found)], len(prompts), len(base)
    )


def _by_prompt(head: ValueHead, rollouts: Sequence[Rollout]) -> dict[int, float]:
    """Mean [`summed_reward`] of each prompt, by its number."""
    values: dict[int, list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            values.setdefault(rollout.prompt_number, []).append(summed_reward(rollout.reward, head.config))
    return {number: sum(each) / len(each) for number, each in values.items()}


def _differences(a: dict[int, float], b: dict[int, float]) -> list[float]:
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise ValueError("No prompt has a response with a reward under both controls, so nothing can be compared.")
    return [a[number] - b[number] for number in shared]


def _means(rollouts: Sequence[Rollout]) -> list[float]:
    scored = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return [sum(values) / len(values) for values in zip(*scored, strict=True)]


def _chosen(found: Sequence[tuple[Trial, dict[int, float]]]) -> ControlConfig:
    """Of controls and their rewards by prompt, the simplest first."""
    # Rewards may leave responses without a score: only prompts that all have are compared.
    shared = sorted(set.intersection(*(set(rewards) for _, rewards in found)))
    if not shared:
        raise ValueError("No prompt has a response with a reward under every control, so they cannot be compared.")
    _, best = max(found, key=lambda item: sum(item[1][number] for number in shared))
    behind = [paired_interval([best[number] - rewards[number] for number in shared])[0] for _, rewards in found]
    return found[simplest_of_the_best(behind, [trial.gain[1] for trial, _ in found])][0].control


def simplest_of_the_best(behind: Sequence[float], gains: Sequence[float]) -> int:
    """
    The place of the simplest control that is as good as the best: the first one whose difference to the best may be 0,
    and which is clearly better than the base or, if none is, whether or not it is.

    Args:
        behind (sequence of `float`):
            Of each control, the simplest first, the lower end of the interval of how far it is behind the best.
        gains (sequence of `float`):
            Of each the lower end of the interval of how much better than the base it is.
    """
    level = [place for place, low in enumerate(behind) if low <= 0]
    return next((place for place in level if gains[place] > 0), level[0])
