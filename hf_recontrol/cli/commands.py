"""The command `recontrol`: each stage from prompts to controlled text, and the demo that runs them all."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from .._version import __version__
from .options import (
    AdvantageOption,
    AdvantageSizesOption,
    BatchOption,
    BudgetOption,
    ColumnOption,
    ConfigNameOption,
    DeviceOption,
    DtypeOption,
    EpochsOption,
    EveryOption,
    GenerationConfigOption,
    HeadSizesOption,
    HookPointOption,
    KeepStatesOption,
    LayerOption,
    LimitOption,
    ModelArgument,
    NewTokensOption,
    PartOption,
    PromptsOption,
    RewardOption,
    SamplesOption,
    SeedOption,
    SkipOption,
    SplitOption,
    StatesDtypeOption,
    StopOption,
    StreamingOption,
    TdLambdaOption,
    TemperatureOption,
)

# What typer makes of Ctrl-C.
_INTERRUPTED = 130

app = typer.Typer(
    name="recontrol",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Align a language model while it generates.

**fit** goes from prompts and a reward to a head in one line. Its stages also stand alone: **rollout** (sample
responses), **label** (score them), **states** (read hidden states), **train** (fit the head); each reads the folder of
the one before, goes on where it was stopped, and shares its work between the processes of `accelerate launch`. Then
**generate** under the head's control. **demo** does all of it on a small model.""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_recontrol {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _load_base(model: str, dtype: str, device: str | None, head: str | None = None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..heads.hub import check_base, with_commit
    from ..modeling.causal_lm import ReControlForCausalLM

    check_base(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if head is not None:
        base = _on_device(ReControlForCausalLM.from_pretrained, model, value_head=head, dtype=dtype, device=device)
        return base, tokenizer, base.control
    base = _on_device(AutoModelForCausalLM.from_pretrained, model, dtype=dtype, device=device)
    return with_commit(base), tokenizer, False


def _on_device(load, *names, dtype: str, device: str | None, **kwargs):
    from ..data.stage_folder import Processes

    # device_map needs accelerate, a plain device does not.
    if device == "auto":
        return load(*names, dtype=dtype, device_map="auto", **kwargs).eval()
    return load(*names, dtype=dtype, **kwargs).eval().to(device or Processes().device)


def _load_prompts(prompts, split, config_name, column, limit, streaming, skip_bad_rows):
    from ..data.prompts import load_prompts

    return load_prompts(
        prompts,
        split=split,
        config_name=config_name,
        column=column,
        limit=limit,
        streaming=streaming,
        on_bad_rows=_bad_rows(skip_bad_rows),
    )


def _print_json(values: dict) -> None:
    typer.echo(json.dumps(values, indent=2))


def _own_command() -> str:
    """This command as others may see it: of whole paths only the names."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["recontrol", *words])


def _is_main() -> bool:
    from ..data.stage_folder import Processes

    return Processes().index == 0


def _bad_rows(skip: bool) -> str:
    return "skip" if skip else "error"


def _stops(stop: list[str] | None) -> list[str]:
    return [text.encode("latin-1", "backslashreplace").decode("unicode_escape") for text in stop or []]


def _place(base, hook_point: str, layer: int, advantage: bool):
    """The configuration of a head that reads this place of `base`."""
    from ..configuration import ValueHeadConfig
    from ..modeling.hook_points import hook_width

    at_head = hook_point == "lm_head" and advantage
    shape = {"hook_point": hook_point, "layer": layer, "advantage_sizes": [] if at_head else None}
    return ValueHeadConfig(hook_width(base, ValueHeadConfig(1, **shape)), **shape)


def _generation_config(name: str | None):
    from transformers import GenerationConfig

    return None if name is None else GenerationConfig.from_pretrained(name)


def _widths(option: str, text: str) -> list[int] | None:
    if text == "none" and option == "--advantage-sizes":
        return None
    try:
        return [int(width) for width in text.split(",") if width.strip()]
    except ValueError:
        raise typer.BadParameter(f"expected widths such as 512 or 512,512, got {text!r}", param_hint=option) from None


@app.command()
def fit(
    model: ModelArgument,
    prompts: PromptsOption,
    reward: RewardOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything made.")],
    samples: SamplesOption = 1,
    max_new_tokens: NewTokensOption = 128,
    temperature: TemperatureOption = 1.0,
    generation_config: GenerationConfigOption = None,
    stop: StopOption = None,
    hook_point: HookPointOption = "lm_head",
    layer: LayerOption = -1,
    states_dtype: StatesDtypeOption = "auto",
    every: EveryOption = 1,
    max_gb: BudgetOption = None,
    keep_states: KeepStatesOption = False,
    head_sizes: HeadSizesOption = "1024",
    advantage_sizes: AdvantageSizesOption = "256",
    td_lambda: TdLambdaOption = 0.95,
    epochs: EpochsOption = 30,
    validation_split: Annotated[float, typer.Option(help="Share of the prompts held out.")] = 0.1,
    target_kl: Annotated[float, typer.Option(help="The head recommends the step size of this KL (nats/token).")] = 0.1,
    split: SplitOption = "train",
    config_name: ConfigNameOption = None,
    prompt_column: ColumnOption = "prompt",
    limit: LimitOption = None,
    streaming: StreamingOption = False,
    skip_bad_rows: SkipOption = False,
    batch_size: BatchOption = 16,
    part_size: PartOption = 256,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
) -> None:
    """From prompts and a reward to a head and a report: all stages in one folder. The same command again goes on where
    it was stopped.

    Example: `recontrol fit -m org/base --prompts prompts.jsonl --reward my_module:my_reward -o run --samples 2`
    """
    from ..pipelines.fit import fit as run_fit

    value_widths = _widths("--head-sizes", head_sizes)
    advantage_widths = _widths("--advantage-sizes", advantage_sizes)
    rows = _load_prompts(prompts, split, config_name, prompt_column, limit, streaming, skip_bad_rows)
    figures = run_fit(
        model,
        rows,
        reward,
        output,
        num_samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generation_config=_generation_config(generation_config),
        stop_strings=_stops(stop),
        hook_point=hook_point,
        layer=layer,
        states_dtype=states_dtype,
        every=every,
        max_gigabytes=max_gb,
        keep_states=keep_states,
        head_sizes=value_widths,
        advantage_sizes=advantage_widths,
        value_options={"td_lambda": td_lambda, "num_epochs": epochs, "validation_split": validation_split},
        target_kl=target_kl,
        batch_size=batch_size,
        part_size=part_size,
        on_bad_rows=_bad_rows(skip_bad_rows),
        seed=seed,
        dtype=dtype,
        command=_own_command(),
    )
    if _is_main():
        _print_figures(figures)
        typer.echo(f"The head is in {output / 'head'}, the report in {output / 'report.html'}.")


def _print_figures(figures: dict) -> None:
    _print_json({name: value for name, value in figures.items() if isinstance(value, (int, float))})


@app.command()
def rollout(
    model: ModelArgument,
    prompts: PromptsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the Parquet files.")],
    samples: SamplesOption = 1,
    max_new_tokens: NewTokensOption = 128,
    temperature: TemperatureOption = 1.0,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Nucleus sampling; default: the whole distribution.")
    ] = None,
    generation_config: GenerationConfigOption = None,
    stop: StopOption = None,
    head: Annotated[str | None, typer.Option(help="Sample under the control that this head recommends.")] = None,
    keep_states: KeepStatesOption = False,
    hook_point: HookPointOption = "lm_head",
    layer: LayerOption = -1,
    advantage: AdvantageOption = True,
    split: SplitOption = "train",
    config_name: ConfigNameOption = None,
    prompt_column: ColumnOption = "prompt",
    limit: LimitOption = None,
    streaming: StreamingOption = False,
    skip_bad_rows: SkipOption = False,
    batch_size: BatchOption = 16,
    part_size: PartOption = 256,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Sample responses of the base model to prompts.

    Example: `recontrol rollout -m org/base --prompts prompts.jsonl -o run/rollouts --temperature 0.9`
    """
    from ..collection.rollouts import write_rollouts
    from ..data.stage_folder import MANIFEST_NAME
    from ..utils.files import check_target

    rows = _load_prompts(prompts, split, config_name, prompt_column, limit, streaming, skip_bad_rows)
    check_target(output / MANIFEST_NAME)
    base, tokenizer, control = _load_base(model, dtype, device, head)
    counts = write_rollouts(
        output,
        base,
        tokenizer,
        rows,
        num_samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        generation_config=_generation_config(generation_config),
        stop_strings=_stops(stop),
        batch_size=batch_size,
        part_size=part_size,
        seed=seed,
        control=control,
        on_bad_rows=_bad_rows(skip_bad_rows),
        keep_states=_place(base, hook_point, layer, advantage) if keep_states else None,
    )
    if _is_main():
        typer.echo(f"{counts['rollouts']} responses ({counts['finished']} finished) -> {output}")


@app.command()
def label(
    rollouts: Annotated[Path, typer.Argument(help="Folder of `recontrol rollout`; it is scored in place.")],
    reward: RewardOption,
    again: Annotated[bool, typer.Option("--again", help="Replace the rewards of an earlier scoring.")] = False,
    skip_bad_rows: SkipOption = False,
) -> None:
    """Score responses with one or more rewards.

    Example: `recontrol label run/rollouts --reward hf_recontrol:vader`
    """
    from ..collection.labels import label_rollouts
    from ..collection.rewards import load_reward
    from ..data.rollouts import load_rollouts
    from ..data.stage_folder import read_manifest

    read_manifest(rollouts, "rollouts", "recontrol rollout", complete=False)
    first = next(iter(sorted(rollouts.glob("part-*.parquet"))), None)
    columns = {name for row in (load_rollouts(first) if first else [])[:1] for name in row.columns}
    counts = label_rollouts(
        rollouts,
        {spec: load_reward(spec, columns) for spec in reward},
        again=again,
        on_bad_rows=_bad_rows(skip_bad_rows),
    )
    if _is_main():
        scored = counts["rollouts"] - counts["unscored"]
        means = ", ".join(f"{counts[f'reward {spec}'] / max(scored, 1):.3f}" for spec in reward)
        typer.echo(f"{scored} responses, mean reward {means} -> {rollouts}")


@app.command()
def states(
    rollouts: Annotated[Path, typer.Argument(help="Folder that `recontrol label` has scored.")],
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the safetensors files.")],
    hook_point: HookPointOption = "lm_head",
    layer: LayerOption = -1,
    advantage: AdvantageOption = True,
    states_dtype: StatesDtypeOption = "auto",
    every: EveryOption = 1,
    max_gb: BudgetOption = None,
    head: Annotated[str | None, typer.Option(help="The head under whose control the responses were sampled.")] = None,
    batch_size: BatchOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Read the hidden states of scored responses into memory-mapped files.

    Example: `recontrol states run/rollouts -m org/base -o run/states`
    """
    from ..collection.states import write_states
    from ..data.rollouts import rollout_parts
    from ..data.stage_folder import MANIFEST_NAME
    from ..utils.files import check_target

    rollout_parts(rollouts)
    check_target(output / MANIFEST_NAME)
    base, _, control = _load_base(model, dtype, device, head)
    counts = write_states(
        output,
        base,
        rollouts,
        _place(base, hook_point, layer, advantage),
        batch_size=batch_size,
        control=control,
        dtype=states_dtype,
        every=every,
        max_gigabytes=max_gb,
    )
    if _is_main():
        error = (counts.get("int8_squared_error", 0) / counts["states"]) ** 0.5
        note = f", int8 error {error:.3%} of each feature's spread" if error else ""
        size = f"{counts['bytes'] / 1e6:.1f} MB"
        typer.echo(f"{counts['states']} states of {counts['episodes']} responses ({size}{note}) -> {output}")


@app.command()
def train(
    states: Annotated[Path, typer.Argument(help="Folder of `recontrol states`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the head.")],
    head_sizes: HeadSizesOption = "1024",
    advantage_sizes: AdvantageSizesOption = "256",
    activation: Annotated[str, typer.Option(help="relu, silu, gelu or tanh.")] = "relu",
    td_lambda: TdLambdaOption = 0.95,
    gae_lambda: Annotated[float, typer.Option(min=0, max=1, help="λ of GAE, for g.")] = 0.0,
    discount: Annotated[float, typer.Option(min=0, max=1, help="γ.")] = 1.0,
    open_truncated: Annotated[
        bool, typer.Option("--open-truncated", help="Leave responses that were cut at the token limit open.")
    ] = False,
    target_update: Annotated[
        float | None, typer.Option(help="Targets from a copy of V that moves this share a step; default: from V.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, for V.")] = 3e-4,
    epochs: EpochsOption = 30,
    patience: Annotated[int, typer.Option(min=1, help="Stop after so many epochs that are no better.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses in a batch, over all processes.")] = 64,
    scaling: Annotated[Literal["feature", "scalar", "none"], typer.Option(help="Of the state.")] = "feature",
    validation_split: Annotated[float, typer.Option(help="Share of the prompts held out.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: constant, linear, cosine, ...")] = "constant",
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, trackio, ...")] = "none",
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that fetch states ahead.")] = 0,
    seed: SeedOption = 0,
) -> None:
    """Fit a head: V by TD(λ), then the advantage part. Prints held-out figures.

    Example: `recontrol train run/states -o run/head`
    """
    from ..configuration import ValueHeadConfig
    from ..training.stage import train_head

    shared = {
        "batch_size": batch_size,
        "patience": patience,
        "training_arguments": {
            "lr_scheduler_type": schedule,
            "report_to": report_to,
            "bf16": bf16,
            "dataloader_num_workers": workers,
        },
    }
    ValueHeadConfig(1, activation=activation)
    figures = train_head(
        output,
        states,
        head_sizes=_widths("--head-sizes", head_sizes),
        advantage_sizes=_widths("--advantage-sizes", advantage_sizes),
        activation=activation,
        value_options={
            "td_lambda": td_lambda,
            "discount": discount,
            "open_truncated": open_truncated,
            "target_update": target_update,
            "learning_rate": learning_rate,
            "num_epochs": epochs,
            "scaling": scaling,
            "validation_split": validation_split,
            "seed": seed,
            **shared,
        },
        advantage_options={"gae_lambda": gae_lambda, **shared},
        command=_own_command(),
    )
    if _is_main():
        _print_figures(figures)


@app.command()
def generate(
    head: Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base; default: the one the head names.")] = None,
    method: Annotated[str | None, typer.Option(help="`ascent` or `advantage`; default: the head's.")] = None,
    step_size: Annotated[float | None, typer.Option(help="α, or 1/τ; default: the head's.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Ascent steps; default: the head's.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="p; default: the head's.")] = None,
    target: Annotated[
        list[float] | None, typer.Option(help="Value to approach (ascent); once for each objective.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the base's answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Answer prompts under the control of a head.

    Example: `recontrol generate my-head "How do I boil an egg?" --compare`
    """
    from dataclasses import replace

    from transformers import AutoTokenizer

    from ..collection.rollouts import generate_rollouts
    from ..modeling.causal_lm import ReControlForCausalLM

    names = {"method": method, "step_size": step_size, "num_steps": num_steps, "plausibility": plausibility}
    changes = {name: value for name, value in names.items() if value is not None}
    if target:
        changes["target"] = target
    options = {"dtype": dtype, "device": device}
    if model is None:
        controlled = _on_device(ReControlForCausalLM.from_pretrained, head, **options)
    else:
        controlled = _on_device(ReControlForCausalLM.from_pretrained, model, value_head=head, **options)
    recommended, wanted = controlled.value_head.config.control, replace(controlled.control, **changes)
    controlled.value_head.config.check_control(wanted)
    if method is not None and step_size is None and (recommended is None or recommended.method != method):
        raise ValueError(
            f"This head recommends no step size for {method!r}: name one, `--step-size` (that of another method is in "
            "other units)."
        )
    if recommended is None and step_size is None:
        typer.echo(f"This head recommends no control, so this is {wanted}: try `--step-size`.", err=True)
    controlled.control = wanted
    tokenizer = AutoTokenizer.from_pretrained(controlled.config._name_or_path)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers = generate_rollouts(controlled, tokenizer, prompt, control=controlled.control, **settings)
    bases = generate_rollouts(controlled, tokenizer, prompt, **settings) if compare else [None] * len(answers)
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
    """Show what a head is: its configuration, size and recommended control."""
    from ..heads.value_head import ValueHead

    loaded = ValueHead.from_pretrained(head, revision=revision)
    size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.state_dict().values())
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    _print_json(loaded.config.to_dict() | {"parameters": parameters, "bytes": size})


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Chat model; default: SmolLM2-135M-Instruct, without a Hub.")
    ] = None,
    prompts: PromptsOption = "examples/prompts.jsonl",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything made.")] = Path("demo"),
    seed: SeedOption = 0,
) -> None:
    """From prompts to a head in one go: rollouts, VADER's sentiment as reward, training, and a comparison of the base,
    the paper's ascent and the advantage control on unseen prompts. A second run reuses what exists.
    """
    from ..pipelines.demo import run_demo

    run_demo(model, prompts, output, seed=seed)


def main() -> None:
    """Entry point: errors that name what was wrong are shown without a traceback, with exit code 1."""
    if int(os.environ.get("RANK", "0")) > 0:
        # The first process says it for all.
        logging.getLogger("hf_recontrol").setLevel(logging.ERROR)
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("recontrol: interrupted. Stages go on where they were: run the same command again.", err=True)
        raise
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        # Somebody else's function failed: where, and in which.
        typer.echo("".join(traceback.format_exception(error.__cause__)), err=True, nl=False)
        typer.echo(f"recontrol: {error}", err=True)
        sys.exit(1)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        typer.echo(f"recontrol: {error}", err=True)
        sys.exit(1)
