"""A base under the control of a head, as commands name both: their options, and how they are loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..settings import LoadingSettings, SourceSettings
from ..utils.choices import CONTROL_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..configuration import ControlConfig
    from ..heads.resolution import HeadAndBase

HeadArgument = Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")]
HeadRevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the head's repo.", show_default="its main branch")
]
MethodOption = Annotated[
    Literal[CONTROL_METHODS] | None,
    typer.Option(
        help="How states are edited: ascent (up V), advantage (by g) or static (one vector); default: the head's."
    ),
]
StepSizeOption = Annotated[
    float | None, typer.Option(help="How strong control is, in the method's own unit; default: the head's.")
]
NumStepsOption = Annotated[int | None, typer.Option(help="Ascent steps; default: the head's.")]
PlausibilityOption = Annotated[
    float | None,
    typer.Option(help="Forbid tokens below this share of the base's likeliest (0: none); default: the head's."),
]
MaxKLOption = Annotated[
    float | None,
    typer.Option(help="Nats from the base at each token, at most (at temperature 1); default: the head's."),
]
TargetOption = Annotated[list[float] | None, typer.Option(help="Value to approach (ascent); once for each objective.")]


def resolve_controlled(
    head: str,
    base: str | None,
    changes: dict[str, Any],
    settings: LoadingSettings,
    head_revision: str | None = None,
) -> tuple[HeadAndBase, ControlConfig]:
    """A head and its base (by default that which the head names), and what the head recommends with `changes`."""
    from ..heads.resolution import resolve_head_and_base

    # What was not given is `None`, or empty.
    changes = {name: value for name, value in changes.items() if value not in (None, [])}
    names, revision = ([head], "revision") if base is None else ([base, head], "value_head_revision")
    found = resolve_head_and_base(*names, token=settings.token, **{revision: head_revision})
    wanted = found.value_head.config.changed_control(changes)
    if found.value_head.config.control is None and "step_size" not in changes:
        typer.echo(f"This head recommends no control, so this is {wanted}: try `--step-size`.", err=True)
    return found, wanted


def load_controlled(
    head: str,
    base: str | None,
    changes: dict[str, Any],
    settings: LoadingSettings,
    head_revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What [`resolve_controlled`] finds, as a model under control; and its tokenizer."""
    from ..pipelines.loading import load_base

    found, wanted = resolve_controlled(head, base, changes, settings, head_revision)
    return load_base(found.base, settings, found.value_head, wanted)


def share_token(settings: SourceSettings) -> None:
    """Let programs that this one starts find the token, which no argument of theirs may show."""
    if settings.token is not None:
        os.environ["HF_TOKEN"] = settings.token


def named_heads(given: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """
    Heads by name, as `--value-head` names them; `NAME=` may be left out of one, which is then `default`, unless that
    is among the names that are taken.
    """
    heads: dict[str, str] = {}
    for text in given:
        name, is_named, source = text.partition("=")
        # A folder's path may hold '=' too.
        if not is_named or os.sep in name or "/" in name:
            name, source = "default", text
        if not source or name in heads or name in taken:
            why = f"the name {name!r} is taken" if source else "it names no head"
            raise typer.BadParameter(f"is NAME=HEAD, each name once; of {text!r} {why}", param_hint="--value-head")
        heads[name] = source
    return heads
