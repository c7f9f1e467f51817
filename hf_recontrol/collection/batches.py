"""How responses go through forwards of a model: which together, what it is called with, and under which control."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import ControlConfig
from ..data.fingerprints import NO_CONTROL, control_settings, head_fingerprint
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.generation import check_causal, input_device, read_padding, with_positions

# Numbers: a GiB in float32, and a few times that with what is made of them.
_LOGITS_AT_ONCE = 2**28


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
    inputs = pad_batch([r.prompt_ids + r.completion_ids for r in rollouts], 0, "right", input_device(model))
    first = 0
    if keep_logits and model._supports_logits_to_keep():
        first = min(len(r.prompt_ids) for r in rollouts) - 1
        inputs["logits_to_keep"] = inputs["input_ids"].shape[1] - first
    inputs = with_positions(model, inputs)
    starts = [len(r.prompt_ids) - 1 - first for r in rollouts]
    return inputs, [slice(start, start + len(r.completion_ids)) for start, r in zip(starts, rollouts, strict=True)]


def forward_batches(
    model: PreTrainedModel, rollouts: Sequence[Rollout], batch_size: int, keep_logits: bool = True
) -> tuple[list[list[int]], bool]:
    """
    Which rollouts go through one forward, in an order that wastes little on padding.

    Args:
        batch_size (`int`):
            How many at most: fewer where logits are kept that would take more than a GiB.
        keep_logits (`bool`, *optional*, defaults to `True`):
            Whether logits of whole responses are kept.

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
    if edits_reach_on and not model._supports_logits_to_keep():
        raise ValueError(
            f"{type(model).__name__} takes no `logits_to_keep`, so a forward of a whole response would also edit its "
            f"prompt, which generation does not, and later layers would see that (the head is on layer "
            f"{model.hook_point.layer}): use a head on the last layer, or at the LM head."
        )
    reads_padding = len(set(lengths)) > 1 and "right" in read_padding(model, max(lengths))
    apart = [
        (prompt if edits_reach_on else 0, length if reads_padding else 0)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    found = batches(lengths, batch_size, apart)
    if keep_logits:
        first = prompts if model._supports_logits_to_keep() else [1] * len(prompts)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        found = [part for batch in found for part in _of_bounded_logits(batch, first, lengths, vocabulary)]
    return found, edits_reach_on


def _of_bounded_logits(
    batch: list[int], prompts: Sequence[int], lengths: Sequence[int], vocabulary: int
) -> list[list[int]]:
    """A batch in parts: all of one keep logits from the end of its shortest prompt to that of its longest row."""
    width = max(lengths[row] for row in batch) - min(prompts[row] for row in batch) + 1
    parts = -(-len(batch) * width * vocabulary // _LOGITS_AT_ONCE)
    size = max(1, len(batch) // parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def control_of(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """
    The control that rollouts were sampled under, as [`control_settings`] tells it.

    Raises:
        `ValueError`: if there are several.
    """
    found = {json.dumps(rollout.control or NO_CONTROL, sort_keys=True) for rollout in rollouts}
    controls = [json.loads(text) for text in sorted(found)]
    if len(controls) > 1:
        raise ValueError(
            f"These rollouts were sampled under {len(controls)} controls ({'; '.join(map(shown_control, controls))}): "
            "use those of each apart."
        )
    return controls[0] if controls else dict(NO_CONTROL)


def recorded_control(manifest: dict[str, Any]) -> dict[str, Any]:
    """The control that a folder of rollouts was sampled under, as [`control_of`] tells it, of its manifest."""
    return {name: manifest["settings"][name] for name in NO_CONTROL}


def shown_control(control: dict[str, Any]) -> str:
    """A control of [`control_of`], for messages."""
    if not control["control"]:
        return "no control"
    settings = ControlConfig.from_dict(control["control"])
    heads = ", ".join(f"{name!r} (fingerprint {mark}, weight {w:g})" for name, (w, mark) in control["heads"].items())
    return f"method={settings.method!r}, step_size={settings.step_size:g} of the head {heads}"


@contextmanager
def as_sampled(model: PreTrainedModel, control: dict[str, Any]) -> Iterator[None]:
    """
    A model under the control that rollouts were sampled under, inside the block, whatever the settings around it.

    Args:
        control (`dict`):
            Of [`control_of`].

    Raises:
        `ValueError`: if the model lacks a head that acted then.
    """
    if not isinstance(model, ReControlForCausalLM):
        if control["control"]:
            raise ValueError(
                f"The rollouts were sampled under {shown_control(control)}, and this model has no head: attach that "
                "one, and they are read as they were sampled."
            )
        yield
        return
    if not control["control"]:
        with model.disable_control():
            yield
        return
    with model.use_control(
        ControlConfig.from_dict(control["control"]), weights_as_sampled(control, model.value_heads)
    ):
        yield


def weights_as_sampled(control: dict[str, Any], heads: Mapping[str, nn.Module]) -> dict[str, float]:
    """
    The weight of each head that acted under a control of [`control_of`], by the name that it has here.

    Raises:
        `ValueError`: if one is missing.
    """
    present = {name: head_fingerprint(head) for name, head in heads.items()}
    weights: dict[str, float] = {}
    for weight, mark in control["heads"].values():
        # Equal heads may act under several names.
        name = next((name for name in present if present[name] == mark and name not in weights), None)
        if name is None:
            raise ValueError(
                f"The rollouts were sampled under {shown_control(control)}. No head here has the fingerprint "
                f"{mark}, only {', '.join(f'{name!r} has {other}' for name, other in present.items())}."
            )
        weights[name] = weight
    return weights


def check_in_force(model: ReControlForCausalLM, rollouts: Sequence[Rollout]) -> None:
    """
    Raise `ValueError` if rollouts were sampled under another control than that in force. Those of the base alone go
    with any.
    """
    sampled = control_of(rollouts)
    if not sampled["control"]:
        return
    now = control_settings(model, model.active_control or False)
    by_mark = [sorted((mark, weight) for weight, mark in control["heads"].values()) for control in (sampled, now)]
    if sampled["control"] != now["control"] or by_mark[0] != by_mark[1]:
        raise ValueError(
            f"The rollouts were sampled under {shown_control(sampled)}, in force is {shown_control(now)}: set that "
            "one with `model.use_control(...)`."
        )
