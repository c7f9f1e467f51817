"""Which sequences go through one forward of the base together, and what it is called with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from transformers import PreTrainedModel

from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.generation import check_causal, read_padding, with_positions


def pad_batch(rows: Sequence[Sequence[int]], pad_id: int, side: str, device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of shape `(rows, longest)`, padded on `side`."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, part] = torch.tensor(row)
        mask[i, part] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches(lengths: Sequence[int], batch_size: int, apart: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Numbers of the rows of each batch, the longest first; rows that differ in `apart` share none."""
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        groups.setdefault(None if apart is None else apart[row], []).append(row)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def teacher_forced(
    model: PreTrainedModel, rollouts: Sequence[Rollout], keep_logits: bool
) -> tuple[dict[str, torch.Tensor], list[slice]]:
    """
    What to call a model with to see what each token of some responses was drawn from.

    Args:
        rollouts (sequence of [`Rollout`]):
            One batch.
        keep_logits (`bool`):
            Whether logits are kept from the first response's start on only; else at all positions.

    Returns:
        Keyword arguments of the model's forward, and for each response the slice of the kept positions that its tokens
        were drawn from.
    """
    # Padding on the right: under causal attention it changes nothing before it.
    inputs = pad_batch([r.prompt_ids + r.completion_ids for r in rollouts], 0, "right", model.device)
    first = 0
    if keep_logits and model._supports_logits_to_keep():
        first = min(len(r.prompt_ids) for r in rollouts) - 1
        inputs["logits_to_keep"] = inputs["input_ids"].shape[1] - first
    inputs = with_positions(model, inputs)
    starts = [len(r.prompt_ids) - 1 - first for r in rollouts]
    return inputs, [slice(start, start + len(r.completion_ids)) for start, r in zip(starts, rollouts, strict=True)]


def forward_batches(
    model: PreTrainedModel, rollouts: Sequence[Rollout], batch_size: int
) -> tuple[list[list[int]], bool]:
    """
    Which rollouts go through one forward, in an order that wastes little on padding.

    Returns:
        The numbers of each batch's rollouts, and whether a layer is controlled that others follow: its edits reach
        later positions, and generation edits from the prompt's last position on. Then all prompts of a batch are of
        one length, and logits must be kept from their last position on. Where a model reads what it is padded with,
        all sequences of a batch are of one length.

    Raises:
        `ValueError`: if the model is not causal.
    """
    check_causal(model)
    edits_reach_on = (
        isinstance(model, ReControlForCausalLM) and not model.hook_point.is_last and model.active_control is not None
    )
    prompts = [len(rollout.prompt_ids) for rollout in rollouts]
    lengths = [prompt + len(rollout.completion_ids) for prompt, rollout in zip(prompts, rollouts, strict=True)]
    reads_padding = len(set(lengths)) > 1 and "right" in read_padding(model)
    apart = [
        (prompt if edits_reach_on else 0, length if reads_padding else 0)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return batches(lengths, batch_size, apart), edits_reach_on
