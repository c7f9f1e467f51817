"""Work with a head that exists: `recontrol generate`, `trace`, `convert`, `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import LoadingSettings, SeedSettings, StopSettings, TemplateSettings, TraceSettings
from ..utils.setting_fields import settings_class
from .app import app, print_json
from .controlled import (
    HeadArgument,
    HeadRevisionOption,
    MaxKLOption,
    MethodOption,
    NumStepsOption,
    PlausibilityOption,
    StepSizeOption,
    TargetOption,
    load_controlled,
)
from .options import with_settings


@settings_class("Options")
class _GenerateCommandSettings(SeedSettings, TemplateSettings, StopSettings, LoadingSettings):
    """What `recontrol generate` can be told of how it computes."""


@settings_class("Options")
class _TraceCommandSettings(TraceSettings, LoadingSettings):
    """What `recontrol trace` can be told of how it computes."""


@app.command()
@with_settings(_GenerateCommandSettings, from_file=False)
def generate(
    settings: _GenerateCommandSettings,
    head: HeadArgument,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base; default: the one the head names.")] = None,
    head_revision: HeadRevisionOption = None,
    method: MethodOption = None,
    step_size: StepSizeOption = None,
    num_steps: NumStepsOption = None,
    plausibility: PlausibilityOption = None,
    max_kl: MaxKLOption = None,
    target: TargetOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the base's answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 0.0,
) -> None:
    """Answer prompts under the control of a head.

    Example: `recontrol generate my-head "How do I boil an egg?" --compare --temperature 1`
    """
    from ..collection.rollouts import generate_rollouts
    from ..data.prompts import load_prompts

    changes = {"method": method, "step_size": step_size, "num_steps": num_steps, "target": target}
    changes |= {"plausibility": plausibility, "max_kl": max_kl}
    # A dialogue that was typed up to the middle of an answer is to be gone on with.
    prompts = load_prompts(prompt, on_answers="keep")
    controlled, tokenizer = load_controlled(head, model, changes, settings, head_revision)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": settings.seed}
    sampling |= {"prompt_format": settings.prompt_format, "chat_template_kwargs": settings.chat_template_kwargs}
    sampling["stop_strings"] = settings.stop_strings
    answers = generate_rollouts(controlled, tokenizer, prompts, control=controlled.control, **sampling)
    bases = generate_rollouts(controlled, tokenizer, prompts, **sampling) if compare else [None] * len(answers)
    for answer, base in zip(answers, bases, strict=True):
        if base is not None:
            used = f"{controlled.control.method}, step size {controlled.control.step_size:g}"
            typer.echo(f"# {answer.prompt}\n## base\n{base.completion}\n## {used}")
        typer.echo(answer.completion)


@app.command()
@with_settings(_TraceCommandSettings, from_file=False)
def trace(
    settings: _TraceCommandSettings,
    head: HeadArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "--model", "-m", help="Base model: a folder or a Hub name; default: the head's."),
    ] = None,
    head_revision: HeadRevisionOption = None,
    method: MethodOption = None,
    step_size: StepSizeOption = None,
    num_steps: NumStepsOption = None,
    plausibility: PlausibilityOption = None,
    max_kl: MaxKLOption = None,
    target: TargetOption = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Score the response after each token too, with a reward named as `fit` names it."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The page, whose JSON goes beside it; or a folder for trace.html and trace.json."
        ),
    ] = Path("trace.html"),
) -> None:
    """See what control does to an answer, token by token: V before and after the edit, its length, the KL, what the
    base would have drawn, the time. One HTML page to look at, and JSON.

    Example: `recontrol trace my-head "How do I boil an egg?" -o egg.html --temperature 1`
    """
    from ..collection.scoring.rewards import named_rewards
    from ..data.prompts import load_prompts
    from ..evaluation.trace.drawing import trace as run_trace
    from ..evaluation.trace.page import check_trace_output, write_trace

    check_trace_output(output)
    # These two raise before the base is loaded.
    prompts = load_prompts([prompt], on_answers="keep")
    rewards = list(named_rewards(reward, prompts.columns).values()) if reward else None
    changes = {"method": method, "step_size": step_size, "num_steps": num_steps, "target": target}
    changes |= {"plausibility": plausibility, "max_kl": max_kl}
    controlled, tokenizer = load_controlled(head, base, changes, settings, head_revision)
    found = run_trace(controlled, tokenizer, prompt, settings, reward=rewards)
    page, record = write_trace(found, output)
    count = len(found.controlled.tokens)
    where = "They are the same" if found.parts_at is None else f"They part at token {found.parts_at + 1}"
    typer.echo(f"# base\n{found.base.text}\n# controlled\n{found.controlled.text}\n")
    typer.echo(f"{where}. Control spent {found.controlled.nats:.3g} nats in {count} tokens.")
    typer.echo(f"What it did at each token: {page} (and {record}).")


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
    from ..heads.hub import CONFIG_NAME, check_no_model
    from ..utils.files import check_target

    check_target(output / CONFIG_NAME)
    check_no_model(output)
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
