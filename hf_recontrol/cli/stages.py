"""From prompts to a head: `recontrol fit`, its stages, and the demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..settings import (
    OWN_ENGINE,
    DemoSettings,
    FitSettings,
    LabelSettings,
    LoadingSettings,
    PromptSettings,
    RolloutSettings,
    SourceSettings,
    StatesSettings,
    TrainSettings,
)
from ..utils.setting_fields import settings_class
from .app import app, is_main_process, own_command, print_json
from .controlled import share_token
from .options import HeadOption, ModelOption, PromptsOption, RewardOption, merged_inputs, with_settings


@app.command()
@with_settings(FitSettings)
def fit(
    settings: FitSettings,
    inputs: dict,
    model: ModelOption = None,
    prompts: PromptsOption = None,
    reward: RewardOption = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for everything made.")] = None,
) -> None:
    """From prompts and a reward to a head and a report: all stages in one folder. The same command again resumes
    a run that was stopped. `--model`, `--prompts`, `--reward` and `--output` are needed, here or in the file of
    `--config`.

    Example: `recontrol fit -m org/base --prompts prompts.jsonl --reward my_module:my_reward -o run --num-samples 2`
    """
    from ..configuration import ValueHeadConfig
    from ..evaluation.data_curve import DataCurve
    from ..heads.hub import CONFIG_NAME
    from ..pipelines.fit import fit as run_fit

    given = {"model": model, "prompts": prompts, "reward": reward, "output": output}
    inputs = merged_inputs(inputs, given, {name: f"--{name}" for name in given})
    if settings.engine == "vllm":
        share_token(settings)
    figures = run_fit(**inputs, settings=settings, command=own_command())
    if is_main_process():
        _print_figures(figures)
        if "data_curve" in figures:
            typer.echo(DataCurve(**figures["data_curve"]).text)
        output = Path(inputs["output"])
        control = ValueHeadConfig.from_json_file(output / "head" / CONFIG_NAME).control
        if control is not None:
            typer.echo(f"The head recommends {control.method!r} at step size {control.step_size:g}.")
        typer.echo(f"The head is in {output / 'head'}, the report in {output / 'report.html'}.")


def _print_figures(figures: dict) -> None:
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    print_json(numbers | {f"baselines.{name}": value for name, value in (figures.get("baselines") or {}).items()})


@settings_class("Options")
class _RolloutCommandSettings(RolloutSettings, PromptSettings, LoadingSettings):
    """What `recontrol rollout` can be told."""


@app.command()
@with_settings(_RolloutCommandSettings)
def rollout(
    settings: _RolloutCommandSettings,
    model: ModelOption,
    prompts: PromptsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the Parquet files.")],
    head: HeadOption = None,
) -> None:
    """Sample responses of the base model to prompts.

    Example: `recontrol rollout -m org/base --prompts prompts.jsonl -o run/rollouts --temperature 0.9`
    """
    from ..collection.engines import check_engine
    from ..collection.rollouts import write_rollouts
    from ..data.prompts import load_prompts
    from ..data.stage_folder import MANIFEST_NAME
    from ..pipelines.loading import check_same_weights, load_base
    from ..utils.files import check_target

    check_same_weights(settings, settings)
    rows = load_prompts(prompts, settings)
    check_target(output / MANIFEST_NAME)
    settings = _for_engine(settings, model, head)
    check_engine(settings)
    base, tokenizer = load_base(model, settings, head)
    control = False if head is None else base.control
    counts = write_rollouts(output, base, tokenizer, rows, settings, control=control)
    if is_main_process():
        typer.echo(f"{counts['rollouts']} responses ({counts['finished']} finished) -> {output}")


def _for_engine(settings: _RolloutCommandSettings, base: str, head: str | None) -> _RolloutCommandSettings:
    """Settings under which the base leaves the accelerator to another engine, and that engine holds the head."""
    from ..integrations.vllm.arguments import recontrol_engine_args

    if settings.engine == OWN_ENGINE:
        return settings
    if settings.engine == "vllm":
        share_token(settings)
    if settings.device is None and settings.device_map is None:
        settings = replace(settings, device="cpu")
    if head is None or settings.engine != "vllm":
        return settings
    controlled = recontrol_engine_args(base, {"default": head})
    if taken := sorted(controlled.keys() & settings.engine_arguments.keys()):
        raise ValueError(f"`engine_arguments` must not hold {taken[0]!r} beside `--head`, which sets it.")
    return replace(settings, engine_arguments=controlled | settings.engine_arguments)


@settings_class("Options")
class _LabelCommandSettings(LabelSettings, SourceSettings):
    """What `recontrol label` can be told."""


@app.command()
@with_settings(_LabelCommandSettings)
def label(
    settings: _LabelCommandSettings,
    rollouts: Annotated[Path, typer.Argument(help="Folder of `recontrol rollout`; it is scored in place.")],
    reward: RewardOption,
    again: Annotated[bool, typer.Option("--again", help="Replace the rewards of an earlier scoring.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The base, whose tokenizer `--prefix-every` needs, if it is not where it was."
        ),
    ] = None,
) -> None:
    """Score responses with one or more rewards.

    Example: `recontrol label run/rollouts --reward hf_recontrol:vader`
    """
    from ..collection.scoring.labels import label_rollouts
    from ..pipelines.loading import tokenizer_as_sampled

    tokenizer = None if settings.prefix_every is None else tokenizer_as_sampled(model, settings, rollouts)
    counts = label_rollouts(
        rollouts,
        reward,
        again=again,
        on_bad_rows=settings.on_bad_rows,
        combine_rewards=settings.combine_rewards,
        prefix_every=settings.prefix_every,
        tokenizer=tokenizer,
    )
    if is_main_process():
        scored = counts["rollouts"] - counts["unscored"]
        sums = {name.removeprefix("reward "): counts[name] for name in counts if name.startswith("reward ")}
        means = ", ".join(f"{f'{name} ' * (len(sums) > 1)}{value / scored:.3f}" for name, value in sums.items())
        typer.echo(f"{scored} responses, mean reward {means} -> {rollouts}")


@settings_class("Options")
class _StatesCommandSettings(StatesSettings, LoadingSettings):
    """What `recontrol states` can be told."""


@app.command()
@with_settings(_StatesCommandSettings)
def states(
    settings: _StatesCommandSettings,
    rollouts: Annotated[Path, typer.Argument(help="Folder that `recontrol label` has scored.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the safetensors files.")],
    head: Annotated[
        str | None,
        typer.Option(
            help="The head that acted when the responses were sampled (`rollout --head`), if it is not where it was."
        ),
    ] = None,
) -> None:
    """Read the hidden states of scored responses into memory-mapped files, under the control that the responses were
    sampled under.

    Example: `recontrol states run/rollouts -m org/base -o run/states`
    """
    from ..collection.state_sizes import int8_errors
    from ..collection.states import write_states
    from ..data.rollouts import rollout_parts
    from ..data.stage_folder import MANIFEST_NAME
    from ..pipelines.loading import load_as_sampled
    from ..utils.files import check_target

    rollout_parts(rollouts)
    check_target(output / MANIFEST_NAME)
    counts = write_states(output, load_as_sampled(model, settings, rollouts, head), rollouts, settings)
    if is_main_process():
        errors = ", ".join(f"{error:.3%} ({name})" for name, error in int8_errors(counts).items())
        note = f", int8 error {errors} of each feature's spread" if errors else ""
        size = f"{counts['bytes'] / 1e6:.1f} MB"
        typer.echo(f"{counts['states']} states of {counts['episodes']} responses ({size}{note}) -> {output}")


@app.command()
@with_settings(TrainSettings)
def train(
    settings: TrainSettings,
    states: Annotated[
        list[Path],
        typer.Argument(help="Folder of `recontrol states`, or several: a head is trained on all of their responses."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the head.")],
) -> None:
    """Fit a head: V by TD(λ), then the advantage part. Prints held-out figures.

    Example: `recontrol train run/states -o run/head`
    """
    from ..training.stage import train_head

    figures = train_head(output, states, settings, command=own_command())
    if is_main_process():
        _print_figures(figures)


@app.command()
@with_settings(DemoSettings, from_file=False)
def demo(
    settings: DemoSettings,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Chat model; default: SmolLM2-135M-Instruct, without a Hub.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file of prompts, as for `fit`; default: 480 that come with the demo.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything made.")] = Path("demo"),
) -> None:
    """From prompts to a head in one go: rollouts, VADER's sentiment as reward, training, and a comparison of its
    controls with the base, prompting and the best of 4 on unseen prompts. A second run reuses what exists.
    """
    from ..pipelines.demo import run_demo

    run_demo(model, prompts, output, settings, command=own_command())
