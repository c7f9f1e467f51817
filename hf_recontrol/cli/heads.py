"""Work with a head that exists: `recontrol generate`, `convert`, `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..settings import LoadingSettings, SeedSettings, TemplateSettings
from ..utils.choices import CONTROL_METHODS
from ..utils.setting_fields import settings_class
from .app import app, print_json
from .options import with_settings


@settings_class("Options")
class _GenerateCommandSettings(SeedSettings, TemplateSettings, LoadingSettings):
    """What `recontrol generate` can be told of how it computes."""


@app.command()
@with_settings(_GenerateCommandSettings, from_file=False)
def generate(
    settings: _GenerateCommandSettings,
    head: Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base; default: the one the head names.")] = None,
    method: Annotated[Literal[CONTROL_METHODS] | None, typer.Option(help="Default: the head's.")] = None,
    step_size: Annotated[float | None, typer.Option(help="α, or 1/τ; default: the head's.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Ascent steps; default: the head's.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="p; default: the head's.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Nats a token at most; default: the head's.")] = None,
    target: Annotated[
        list[float] | None, typer.Option(help="Value to approach (ascent); once for each objective.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the base's answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 0.0,
) -> None:
    """Answer prompts under the control of a head.

    Example: `recontrol generate my-head "How do I boil an egg?" --compare`
    """
    from dataclasses import replace

    from ..collection.rollouts import generate_rollouts
    from ..data.prompts import load_prompts
    from ..heads.resolution import resolve_head_and_base
    from ..pipelines.loading import load_base

    options = {"method": method, "step_size": step_size, "num_steps": num_steps, "plausibility": plausibility}
    options |= {"max_kl": max_kl}
    changes = {name: value for name, value in options.items() if value is not None}
    if target:
        changes["target"] = target
    names = [head] if model is None else [model, head]
    loaded, base, revision, _ = resolve_head_and_base(*names, token=settings.token)
    recommended = loaded.config.control
    wanted = loaded.config.changed_control(changes)
    if recommended is None and step_size is None:
        typer.echo(f"This head recommends no control, so this is {wanted}: try `--step-size`.", err=True)
    settings = replace(settings, revision=settings.revision or revision)
    controlled, tokenizer = load_base(base, settings, loaded, wanted)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": settings.seed}
    sampling |= {"prompt_format": settings.prompt_format, "chat_template_kwargs": settings.chat_template_kwargs}
    # A dialogue that was typed up to the middle of an answer is to be gone on with.
    prompts = load_prompts(prompt, on_answers="keep")
    answers = generate_rollouts(controlled, tokenizer, prompts, control=controlled.control, **sampling)
    bases = generate_rollouts(controlled, tokenizer, prompts, **sampling) if compare else [None] * len(answers)
    for answer, base in zip(answers, bases, strict=True):
        if base is not None:
            used = f"{controlled.control.method}, step size {controlled.control.step_size:g}"
            typer.echo(f"# {answer.prompt}\n## base\n{base.completion}\n## {used}")
        typer.echo(answer.completion)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' `.pth`, of RE-Control or PRE-Control.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the head.")],
    base: Annotated[str | None, typer.Option(help="The model that it was trained on.")] = None,
    step_size: Annotated[float | None, typer.Option(min=0, help="α to recommend (the paper: 0.2 to 1).")] = None,
    num_steps: Annotated[int, typer.Option(min=0, help="Ascent steps to recommend.")] = 30,
) -> None:
    """Make a head from a value function that the authors' code trained.

    Example: `recontrol convert value_model.pth -o my-head --base lmsys/vicuna-7b-v1.5 --step-size 0.5`
    """
    from ..configuration import ControlConfig
    from ..heads.convert import convert_checkpoint
    from ..heads.hub import CONFIG_NAME
    from ..utils.files import check_target

    check_target(output / CONFIG_NAME)
    if (output / CONFIG_NAME).exists():
        raise ValueError(f"{output} holds a head already: name another folder.")
    control = None if step_size is None else ControlConfig(step_size=step_size, num_steps=num_steps)
    head = convert_checkpoint(checkpoint, base_model=base, control=control)
    head.save_pretrained(output)
    config = head.config
    widths = " - ".join(map(str, [config.hidden_size, *config.head_sizes, config.num_objectives]))
    typer.echo(f"V {widths}, {config.activation}, at the LM head's input -> {output}")


@app.command()
def info(
    head: Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")] = None,
) -> None:
    """Show what a head is: its configuration, size, recommended control, and how many prompts it has seen."""
    from ..heads.value_head import ValueHead

    loaded = ValueHead.from_pretrained(head, revision=revision)
    size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.state_dict().values())
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    seen = None if loaded.seen_prompts is None else loaded.seen_prompts.counts()
    print_json(loaded.config.to_dict() | {"parameters": parameters, "bytes": size, "seen_prompts": seen})
