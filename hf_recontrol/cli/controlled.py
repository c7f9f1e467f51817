"""A base under the control of a head, as commands name both: their options, and how they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..settings import LoadingSettings
from ..utils.choices import CONTROL_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HeadArgument = Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")]
MethodOption = Annotated[Literal[CONTROL_METHODS] | None, typer.Option(help="Default: the head's.")]
StepSizeOption = Annotated[float | None, typer.Option(help="α, or 1/τ; default: the head's.")]
NumStepsOption = Annotated[int | None, typer.Option(help="Ascent steps; default: the head's.")]
PlausibilityOption = Annotated[float | None, typer.Option(help="p; default: the head's.")]
MaxKLOption = Annotated[float | None, typer.Option(help="Nats a token at most; default: the head's.")]
TargetOption = Annotated[list[float] | None, typer.Option(help="Value to approach (ascent); once for each objective.")]


def load_controlled(
    head: str, base: str | None, changes: dict[str, Any], settings: LoadingSettings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base (by default that which the head names) under what the head recommends with `changes`; its tokenizer."""
    from dataclasses import replace

    from ..heads.resolution import resolve_head_and_base
    from ..pipelines.loading import load_base

    # What was not given is `None`, or empty.
    changes = {name: value for name, value in changes.items() if value not in (None, [])}
    names = [head] if base is None else [base, head]
    loaded, base, revision, _ = resolve_head_and_base(*names, token=settings.token)
    wanted = loaded.config.changed_control(changes)
    if loaded.config.control is None and "step_size" not in changes:
        typer.echo(f"This head recommends no control, so this is {wanted}: try `--step-size`.", err=True)
    settings = replace(settings, revision=settings.revision or revision)
    return load_base(base, settings, loaded, wanted)
