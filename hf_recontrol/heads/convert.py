"""Value functions that the authors of RE-Control and PRE-Control trained, as heads."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import torch

from ..configuration import ControlConfig, ValueHeadConfig
from .hub import portable_name
from .value_head import ValueHead

# `fc1.weight`, ... (RE-Control, whose two-layer network has fc1 and fc3) or `layers.0.weight`, `layers.2.weight`, ...
# (PRE-Control, with the ReLUs in between); `module.` where it was trained on several GPUs.
_NAME = re.compile(r"(?:module\.)?(fc|layers\.)(0|[1-9][0-9]?)\.(weight|bias)")


def convert_checkpoint(
    path: str | os.PathLike,
    *,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    control: ControlConfig | None = None,
) -> ValueHead:
    """
    A head from the `.pth` of the authors' code: `relu` layers on the state after the final norm, one output for each
    attribute, without scaling (https://github.com/Lingkai-Kong/RE-Control, https://github.com/Pre-Control/pre-control).

    Args:
        path (`str` or `os.PathLike`):
            The file. It is read as tensors only; nothing in it is run.
        base_model, base_model_revision (`str`, *optional*):
            The model that it was trained on, which the file does not say.
        control ([`ControlConfig`], *optional*):
            The control to recommend, for instance the paper's `ControlConfig(step_size=0.5, num_steps=30)`.

    Raises:
        `OSError`: if there is no such file. `ValueError`: if it holds anything but such a network; says what.
    """
    layers = _layers(Path(path), _read(Path(path)))
    (width, *hidden), outputs = [weight.shape[1] for weight, _ in layers], layers[-1][0].shape[0]
    config = ValueHeadConfig(
        width,
        head_sizes=hidden,
        num_objectives=outputs,
        hook_point="lm_head",
        base_model_name_or_path=None if base_model is None else portable_name(base_model),
        base_model_revision=base_model_revision,
        control=control,
    )
    head = ValueHead(config)
    with torch.no_grad():
        for layer, (weight, bias) in zip(head.value_mlp.layers, layers, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    head.check_finite(str(path))
    return head


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise OSError(f"{path} is no file: name the authors' `value_model_*.pth` or `best_model.pth`.")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file is anything to an unpickler
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is no file of tensors alone ({reason}): save the network's `state_dict()`."
        ) from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} holds {type(values).__name__}, expected the `state_dict()` of a value function.")
    return values


def _layers(path: Path, values: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of each layer, from the state to the values."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    stems = set()
    for name, tensor in values.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or not _holds_its_values(tensor):
            raise ValueError(
                f"{path} holds {name!r}, expected only tensors of floats: `fc1.weight`, ... (RE-Control) or "
                "`layers.0.weight`, ... (PRE-Control)."
            )
        stems.add(match[1])
        found[int(match[2]), match[3]] = tensor
    numbers = sorted({number for number, _ in found})
    if len(stems) > 1 or len(found) < len(values) or len(found) != 2 * len(numbers):
        raise ValueError(f"{path} holds {sorted(values)}, which is not one weight and one bias for each layer.")
    if stems == {"fc"} and numbers not in ([1, 3], list(range(1, len(numbers) + 1))):
        raise ValueError(f"{path} holds layers {numbers}, expected fc1, fc2, fc3 or fc1, fc3.")
    if stems == {"layers."} and numbers != list(range(0, 2 * len(numbers), 2)):
        raise ValueError(f"{path} holds layers {numbers}, expected 0, 2, 4, ... with a ReLU behind each but the last.")
    layers = [(found[number, "weight"], found[number, "bias"]) for number in numbers]
    shapes = [(tuple(weight.shape), tuple(bias.shape)) for weight, bias in layers]
    if any(len(weight) != 2 or bias != weight[:1] for weight, bias in shapes) or any(
        after[0][1] != before[0][0] for before, after in pairwise(shapes)
    ):
        raise ValueError(f"{path} holds layers of shapes {shapes}, which do not follow each other.")
    return layers


def _holds_its_values(tensor: object) -> bool:
    """Whether each value of a tensor is in the file: a view of one number may be terabytes to whoever copies it."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
