"""What the critics of traced heads say of each token, where the folders that the heads were trained in are at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from ...collection.batches import teacher_forced
from ...collection.directions import directions, mean_rows
from ...configuration import TrainingRecord
from ...data.rollouts import Rollout, numbers_so_far
from ...heads.value_head import ValueHead, in_eval, read_values
from ...modeling.causal_lm import ReControlForCausalLM
from ...modeling.hook_points import HookPoint, lm_head_rows, read_states
from ...settings import HookPointSettings
from ...training.held_out import FIGURES_NAME
from ...training.targets import critic_inputs
from ...utils.checks import check_int, check_number
from ...utils.files import read_json, without_place
from .record import Trace, TracedResponse

logger = logging.get_logger(__name__)

_ANEW = "train the head anew (`recontrol train`, or `fit`, into another folder)"


@dataclass(frozen=True)
class Critic:
    """A critic, and how the states were made that it was trained on."""

    head: ValueHead
    layer: int | None
    temperature: float
    rewards: list[str]
    prefix_every: int | None
    prefix_means: torch.Tensor | None


def with_critics(
    model: ReControlForCausalLM, trace: Trace, rollouts: Sequence[Rollout], heads: Sequence[str]
) -> Trace:
    """
    A trace with what the critics of the heads say of both responses, and why where one that is there says nothing.

    Args:
        model ([`ReControlForCausalLM`]):
            The base with its heads.
        trace ([`Trace`]):
            With the rewards of the responses so far.
        rollouts (sequence of [`Rollout`]):
            The base's response and the controlled one.
        heads (sequence of `str`):
            The heads whose V it tells, in their order.
    """
    responses, silent, told = (trace.base, trace.controlled), {}, False
    # Of each response the values of each head, by token.
    said: list[list[list[list[float | None]]]] = [[] for _ in responses]
    for name in heads:
        head = model.value_heads[name]
        values: list[list[list[float | None]]] = [
            [[None] * head.config.num_objectives] * len(response.tokens) for response in responses
        ]
        try:
            if (folder := _folder_of(head)) is not None:
                critic = load_critic(folder, head.config.training)
                values = [
                    _values(model, critic, rollout, response, trace.rewards)
                    for rollout, response in zip(rollouts, responses, strict=True)
                ]
                told = True
        # Both answers are drawn by now: what is only said of them stops nothing.
        except (FloatingPointError, RuntimeError, ValueError) as error:
            silent[name] = str(error)
        for column, new in zip(said, values, strict=True):
            column.append(new)
    if told:
        base, controlled = (
            replace(
                response,
                tokens=[
                    replace(token, critic=[*chain(*row)]) for token, *row in zip(response.tokens, *column, strict=True)
                ],
            )
            for response, column in zip(responses, said, strict=True)
        )
        trace = replace(trace, base=base, controlled=controlled)
    return replace(trace, silent_critics=silent)


def _folder_of(head: nn.Module) -> Path | None:
    """The folder of a head's critic, if there is one."""
    source = getattr(head, "source", None) or {}
    folder = Path(source.get("pretrained_model_name_or_path", ""), source.get("subfolder", ""), "training", "critic")
    # A head's local folder is noted by its whole path.
    return folder if folder.is_absolute() and folder.is_dir() else None


def load_critic(folder: Path, training: TrainingRecord | None) -> Critic:
    """
    The critic in a folder.

    Raises:
        `ValueError`: if what it read cannot be read of another response, or its files cannot be used; says why.
    """
    try:
        critic, reads, means = ValueHead.from_pretrained(folder), read_json(folder / FIGURES_NAME).get("reads"), None
        if reads is not None:
            for name, low in (("every", 1), ("critic_layer", -math.inf), ("prefix_every", 1)):
                if reads[name] is not None:
                    check_int(name, reads[name], low=low)
            if reads["prefix_means"] is not None:
                means = torch.tensor(reads["prefix_means"], dtype=torch.float64)
                means = means.reshape(-1, critic.config.num_objectives)
                if not len(means) or not torch.isfinite(means).all():
                    raise ValueError("`prefix_means` must hold finite numbers.")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        # The folder is named here, not in what is shown to others.
        logger.warning(f"The critic in {folder} cannot be used: {error}")
        raise ValueError("its files cannot be used") from error
    if reads is None:
        raise ValueError(f"a release of hf_recontrol fitted it that did not note what it reads: {_ANEW}")
    if training is None or not training.sampling:
        raise ValueError("the head does not say how the responses that it was trained on were drawn")
    if training.control:
        raise ValueError("it was trained on responses under control, and holds each token against that policy")
    if reads["every"] != 1:
        raise ValueError(f"it was trained on one state in {reads['every']} (`every`), and does not know those between")
    if means is not None and reads["prefix_every"] is None:
        raise ValueError(f"how often it was told the reward of the response so far is not noted: {_ANEW}")
    drawn = training.sampling
    # As for the mean row: greedy responses are held against the distribution at 1.
    temperature = (drawn.get("temperature") or 1.0) if drawn.get("do_sample") else 1.0
    check_number("temperature", temperature, above=0)
    return Critic(critic, reads["critic_layer"], temperature, training.rewards, reads["prefix_every"], means)


@torch.no_grad()
def _values(
    model: ReControlForCausalLM, critic: Critic, rollout: Rollout, response: TracedResponse, rewards: Sequence[str]
) -> list[list[float | None]]:
    """
    What a critic says of each token of a response, `(tokens, objectives)`, in the reward's own units.

    Raises:
        `ValueError`: if what it reads cannot be had; says what.
    """
    if not response.tokens:
        return []
    so_far = _rewards_so_far(critic, rollout, response, rewards)
    inputs, (part,) = teacher_forced(model, [rollout], keep_logits=True)
    with ExitStack() as stack:
        stack.enter_context(in_eval(model))
        stack.enter_context(model.disable_control())
        states = stack.enter_context(read_states(model.hook_point, keep_logits=True))
        context = None
        if critic.layer is not None:
            point = HookPoint.find(model, HookPointSettings(hook_point="decoder_layer", layer=critic.layer))
            context = stack.enter_context(read_states(point))
        logits = model(**inputs).logits[0, part]
    if context is not None:
        # A layer is run at all positions, whatever logits are kept.
        start = len(rollout.prompt_ids) - 1
        context = context[0][0, start : start + len(rollout.completion_ids)].float().cpu()
    weight = lm_head_rows(model)
    drawn = directions(rollout.completion_ids, mean_rows(logits, critic.temperature, weight), weight)
    lengths = torch.tensor([len(rollout.completion_ids)])
    read = critic_inputs(states[0][0, part].float().cpu(), drawn.cpu(), so_far, context, lengths)
    if read.shape[1] != critic.head.config.hidden_size:
        raise ValueError(
            f"it reads {critic.head.config.hidden_size} numbers of a state, and this base gives {read.shape[1]}"
        )
    values = read_values(critic.head, read)
    if not torch.isfinite(values).all():
        raise ValueError("it gives no finite number at some tokens")
    return values.tolist()


def _rewards_so_far(critic: Critic, rollout: Rollout, response: TracedResponse, names: Sequence[str]) -> torch.Tensor:
    """
    What a critic is told of the rewards of the response so far, `(tokens, objectives)`, or `(tokens, 0)` if it reads
    none.

    Raises:
        `ValueError`: if they are not known here.
    """
    tokens = response.tokens
    if critic.prefix_means is None or critic.prefix_every is None:
        return torch.empty(len(tokens), 0)
    known = [without_place(name) for name in names]
    if missing := [name for name in critic.rewards if name not in known]:
        raise ValueError(
            "it also reads the reward of the response so far: ask for the rewards that the head was trained on "
            f"(`--reward`, `reward`), here lacking {', '.join(missing)}"
        )
    columns = [known.index(name) for name in critic.rewards]
    # In float64, as in training: of rewards that are large next to their spread float32 would keep nothing.
    rewards = torch.full((len(tokens), len(columns)), torch.nan, dtype=torch.float64)
    counts = numbers_so_far(rollout, critic.prefix_every)
    for count in counts:
        values = [tokens[count - 1].reward_so_far[column] for column in columns]
        if None not in values:
            rewards[count:] = torch.tensor(values, dtype=torch.float64)
    if len(counts) and rewards.isnan().all():
        raise ValueError("it also reads the reward of the response so far, and that gave no number here")
    places = torch.arange(len(tokens)).clamp(max=len(critic.prefix_means) - 1)
    return (rewards - critic.prefix_means[places]).nan_to_num(0.0).float()
