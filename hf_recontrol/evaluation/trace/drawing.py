"""A trace of one prompt: both responses are drawn with the same noise, then read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...collection.rollouts import draw_rollouts
from ...collection.sampling import Reweighing
from ...collection.scoring.responses import called_rewards
from ...collection.scoring.rewards import RewardFunction, named_rewards
from ...configuration import ControlConfig
from ...data.processes import no_progress
from ...data.prompts import Prompt, Prompts, load_prompts
from ...data.rollouts import Rollout, responses_so_far
from ...heads.hub import portable_name
from ...modeling.causal_lm import ReControlForCausalLM
from ...settings import SamplingSettings, TraceSettings
from ..likelihoods import check_controlled
from .critics import with_critics
from .reading import check_readable, read_response, traced_heads
from .record import Trace, TracedResponse

logger = logging.get_logger(__name__)


class _Clock(Reweighing):
    """Notes when the scores of each token are there, and leaves them as they are."""

    def __init__(self):
        self.times: list[float] = []

    def begin(self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # An accelerator is still at work on them.
        scores[0, 0].item()
        self.times.append(time.perf_counter())
        return scores

    @property
    def seconds(self) -> list[float]:
        """Of each token."""
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


def trace(
    model: ReControlForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | dict[str, Any],
    settings: TraceSettings | None = None,
    *,
    reward: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
    control: ControlConfig | bool | None = None,
    value_heads: Mapping[str, float] | None = None,
    **changes,
) -> Trace:
    """
    What control does to the response to a prompt, token by token: V before and after the edit, the edit's length, its
    KL, what the base would have drawn, and the time; and what it would do along the base's own response.

    The responses are those of [`generate_rollouts`] to this one prompt with the same seed.
    [`write_trace`] makes a page of it. Of a head that was loaded from the folder in which it was trained, with its
    critic, it tells the critic's values too; a critic that reads the rewards of the response so far needs them as
    `reward`.

    Args:
        model ([`ReControlForCausalLM`]), tokenizer:
            The base with its heads.
        prompt (`str`, `list[dict]` or `dict`):
            A text, chat messages, or a row with a `prompt`.
        settings ([`TraceSettings`], *optional*), changes:
            How the responses are drawn and how much is told; single settings as keywords.
        reward (`str`, function, or sequence of these, *optional*):
            What scores the response after each token, as for [`fit`]. One that fails there is warned of, and says
            nothing.
        control ([`ControlConfig`] or `False`, *optional*), value_heads (mapping of `str` to `float`, *optional*):
            As for [`ReControlForCausalLM.generate`]; by default those in force.

    Returns:
        [`Trace`]

    Raises:
        `TypeError`: if the model has no head. `ValueError`: if the prompt is empty or too long for the model; for step
        sizes or weights of several prompts; for a head on a middle layer of a model that takes no `logits_to_keep`; if
        a reward cannot be used.
        `FloatingPointError`: if states or logits are not finite.
    """
    settings = TraceSettings.of(settings, changes)
    check_controlled(model)
    # A dialogue that was given up to the middle of an answer is to be gone on with.
    prompts = load_prompts([prompt], on_answers="keep")
    rewards = {} if reward is None else named_rewards(reward, prompts.columns)
    sampling = SamplingSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop_strings=settings.stop_strings,
        seed=settings.seed,
        prompt_format=settings.prompt_format,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    with model.use_control(control, value_heads):
        active = model.active_control or False
        model.check_same_for_all_prompts()
        check_readable(model)
        # Whoever is first would pay for what is made at the first use.
        _draw(model, tokenizer, prompts, SamplingSettings.of(sampling, {"max_new_tokens": 1}), active)
        drawn = [_draw(model, tokenizer, prompts, sampling, under) for under in (False, active)]
        base, controlled = (
            read_response(
                model,
                tokenizer,
                rollout,
                seconds,
                seed=settings.seed,
                num_alternatives=settings.num_alternatives,
            )
            for rollout, seconds in drawn
        )
        rollout, heads = drawn[1][0], traced_heads(model)
        found = Trace(
            prompt=rollout.prompt,
            prompt_ids=rollout.prompt_ids,
            base=base,
            controlled=controlled,
            model=portable_name(model.config._name_or_path),
            hook_point=str(model.hook_point),
            control=active.to_dict() if active else None,
            heads=dict(model.active_value_heads),
            objectives=_objectives(model),
            temperature=rollout.temperature,
            seed=settings.seed,
            rewards=list(rewards),
        )
    # A reward may use the same model: that is none of this trace's business.
    base, controlled = (
        _with_rewards(response, rollout, rewards, tokenizer)
        for response, (rollout, _) in zip((base, controlled), drawn, strict=True)
    )
    found = replace(found, base=base, controlled=controlled)
    return with_critics(model, found, [rollout for rollout, _ in drawn], heads)


def _with_rewards(
    response: TracedResponse,
    rollout: Rollout,
    rewards: Mapping[str, RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
) -> TracedResponse:
    """A response with what the rewards say of it after each token."""
    if not rewards or not response.tokens:
        return response
    so_far = [*responses_so_far(rollout, tokenizer, 1), rollout]
    scores = [_said(name, function, so_far) for name, function in rewards.items()]
    tokens = [
        replace(token, reward_so_far=[said[place] for said in scores]) for place, token in enumerate(response.tokens)
    ]
    return replace(response, tokens=tokens)


def _said(name: str, function: RewardFunction, so_far: Sequence[Rollout]) -> list[float | None]:
    """What a reward says of each part of a response; nothing, with a warning, if it fails."""
    try:
        ([said], _) = called_rewards(so_far, [function], "the response so far")
    except (RuntimeError, ValueError) as error:
        logger.warning(f"The trace has no reward {name}: {error}")
        return [None] * len(so_far)
    return said


def _draw(
    model: ReControlForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    sampling: SamplingSettings,
    control: ControlConfig | bool,
) -> tuple[Rollout, Sequence[float]]:
    """The response to a prompt, and the seconds that each of its tokens took."""
    clock = _Clock()
    (rollout,) = draw_rollouts(
        model, tokenizer, prompts, sampling, control, progress=no_progress, reweigh=lambda drawn: clock
    )
    return rollout, clock.seconds


def _objectives(model: ReControlForCausalLM) -> list[str]:
    """Names of the numbers of V, in their order: of the rewards that a head was trained on, if it tells them."""
    names = []
    heads = traced_heads(model)
    for head in heads:
        config = model.value_heads[head].config
        count, training = config.num_objectives, config.training
        own = training.rewards if training is not None and len(training.rewards) == count else []
        own = own or (["V"] if count == 1 else [f"V{number}" for number in range(1, count + 1)])
        names += [f"{head}: {name}" if len(heads) > 1 else name for name in own]
    return names
