"""The command `recontrol`: each stage from prompts to controlled text, and the demo that runs them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="recontrol",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Align a language model while it generates.

The way to a head: **rollout** (sample responses), **label** (score them), **states** (read hidden states),
**train** (fit the head). Then **generate** under its control. **demo** does all of it on a small model. Each stage
reads the file of the one before.""",
)

ModelArgument = Annotated[str, typer.Option("--model", "-m", help="Base model: a folder or a Hub name.")]
PromptsOption = Annotated[
    Path, typer.Option("--prompts", help="JSONL file, one object a line with `prompt`: a text or chat messages.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences in one forward.")]
DtypeOption = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the base.")]
DeviceOption = Annotated[str, typer.Option(help="Device of the base: cpu, cuda, cuda:1, auto, ...")]


def _load_base(model: str, dtype: str, device: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return _on_device(AutoModelForCausalLM.from_pretrained, model, dtype=dtype, device=device), tokenizer


def _on_device(load, *names, dtype: str, device: str, **kwargs):
    # device_map needs accelerate, a plain device does not.
    if device == "auto":
        return load(*names, dtype=dtype, device_map="auto", **kwargs).eval()
    return load(*names, dtype=dtype, **kwargs).eval().to(device)


def _print_json(values: dict) -> None:
    typer.echo(json.dumps(values, indent=2))


@app.command()
def rollout(
    model: ModelArgument,
    prompts: PromptsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.")],
    samples: Annotated[int, typer.Option(min=1, help="Responses for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn at most for each response.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a turn; may be given several times.")] = None,
    batch_size: BatchOption = 16,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
) -> None:
    """Sample responses of the base model to prompts.

    Example: `recontrol rollout -m org/base --prompts prompts.jsonl -o rollouts.jsonl --temperature 0.9`
    """
    from .files import check_target
    from .rollouts import generate_rollouts, load_prompts, save_rollouts

    rows = load_prompts(prompts)
    check_target(output)
    base, tokenizer = _load_base(model, dtype, device)
    rollouts = generate_rollouts(
        base,
        tokenizer,
        rows,
        num_samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_strings=[text.encode("latin-1", "backslashreplace").decode("unicode_escape") for text in stop or []],
        batch_size=batch_size,
        seed=seed,
    )
    save_rollouts(rollouts, output)
    finished = sum(r.finished for r in rollouts)
    typer.echo(f"{len(rollouts)} responses ({finished} finished) -> {output}")


@app.command()
def label(
    rollouts: Annotated[Path, typer.Argument(help="File of `recontrol rollout`.")],
    reward: Annotated[
        list[str],
        typer.Option(
            help="`module:function` (`f(prompts, completions, **columns) -> list[float]`), `column:NAME`, or the "
            "folder or Hub name of a sequence classifier (`name#LABEL` if it has several labels). Several give "
            "several objectives."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: the same.")] = None,
) -> None:
    """Score responses with one or more rewards.

    Example: `recontrol label rollouts.jsonl --reward hf_recontrol.rewards:vader`
    """
    from statistics import fmean

    from .files import check_target
    from .rewards import load_reward, score_rollouts
    from .rollouts import load_rollouts, save_rollouts

    rows = load_rollouts(rollouts)
    check_target(output or rollouts)
    scored = score_rollouts(rows, *[load_reward(spec) for spec in reward])
    save_rollouts(scored, output or rollouts)
    means = ", ".join(f"{fmean(r.reward[i] for r in scored):.3f}" for i in range(len(reward)))
    typer.echo(f"{len(scored)} responses, mean reward {means} -> {output or rollouts}")


@app.command()
def states(
    rollouts: Annotated[Path, typer.Argument(help="Scored file of `recontrol label`.")],
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file to write.")],
    hook_point: Annotated[str, typer.Option(help="`lm_head` or `decoder_layer`.")] = "lm_head",
    layer: Annotated[int, typer.Option(help="Decoder layer, at `decoder_layer`.")] = -1,
    batch_size: BatchOption = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
) -> None:
    """Read the hidden states of scored responses. At `lm_head` also what the advantage part is trained on.

    Example: `recontrol states rollouts.jsonl -m org/base -o states.safetensors`
    """
    from .activations import collect_states
    from .configuration import ValueHeadConfig
    from .files import check_target
    from .hooks import hook_width
    from .rollouts import load_rollouts

    rows = load_rollouts(rollouts)
    check_target(output)
    shape = {"hook_point": hook_point, "layer": layer, "advantage_sizes": [] if hook_point == "lm_head" else None}
    config = ValueHeadConfig(1, **shape)
    base, _ = _load_base(model, dtype, device)
    config = ValueHeadConfig(hook_width(base, config), **shape)
    collected = collect_states(base, rows, config, batch_size=batch_size)
    collected.save(output)
    typer.echo(f"{len(collected.hidden)} states of {len(collected.lengths)} responses -> {output}")


@app.command()
def train(
    states: Annotated[Path, typer.Argument(help="File of `recontrol states`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the head.")],
    head_sizes: Annotated[str, typer.Option(help="Widths of V's hidden layers: `1024`, `512,512`.")] = "1024",
    advantage_sizes: Annotated[
        str, typer.Option(help="Widths of g's hidden layers; `none` for no advantage part.")
    ] = "256",
    activation: Annotated[str, typer.Option(help="relu, silu, gelu or tanh.")] = "relu",
    td_lambda: Annotated[float, typer.Option(min=0, max=1, help="λ of TD(λ); 1 is Monte Carlo.")] = 0.95,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, for V.")] = 3e-4,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs at most, for V; the best one is kept.")] = 30,
    scaling: Annotated[str, typer.Option(help="Of the state: feature, scalar or none.")] = "feature",
    validation_split: Annotated[float, typer.Option(help="Share of the prompts held out.")] = 0.1,
    seed: SeedOption = 0,
) -> None:
    """Fit a head: V by TD(λ), then the advantage part. Prints held-out figures.

    Example: `recontrol train states.safetensors -o my-head`
    """
    from .activations import States
    from .configuration import ValueHeadConfig
    from .files import check_target
    from .training import fit_advantage, train_value_head

    value_widths = _widths("--head-sizes", head_sizes)
    advantage_widths = None if advantage_sizes == "none" else _widths("--advantage-sizes", advantage_sizes)
    collected = States.load(states)
    check_target(output / "config.json")
    if collected.directions is None:
        advantage_widths = None
    config = ValueHeadConfig(
        collected.hidden.shape[1],
        head_sizes=value_widths,
        advantage_sizes=advantage_widths,
        activation=activation,
        num_objectives=collected.rewards.shape[1],
        hook_point=collected.hook_point,
        layer=collected.layer,
    )
    split = {"validation_split": validation_split, "seed": seed}
    head, figures = train_value_head(
        collected,
        config,
        td_lambda=td_lambda,
        learning_rate=learning_rate,
        num_epochs=epochs,
        scaling=scaling,
        **split,
    )
    if advantage_widths is not None:
        figures |= fit_advantage(head, collected, **split)
    head.save_pretrained(output)
    _print_json(figures)


def _widths(option: str, text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",") if width.strip()]
    except ValueError:
        raise typer.BadParameter(f"expected widths such as 512 or 512,512, got {text!r}", param_hint=option) from None


@app.command()
def generate(
    head: Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base; default: the one the head names.")] = None,
    method: Annotated[str | None, typer.Option(help="`ascent` or `advantage`; default: the head's.")] = None,
    step_size: Annotated[float | None, typer.Option(help="α, or 1/τ; default: the head's.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Ascent steps; default: the head's.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="p; default: the head's.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the base's answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens drawn at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
) -> None:
    """Answer prompts under the control of a head.

    Example: `recontrol generate my-head "How do I boil an egg?" --compare`
    """
    from dataclasses import replace

    from transformers import AutoTokenizer

    from .modeling import ReControlForCausalLM
    from .rollouts import generate_rollouts

    names = {"method": method, "step_size": step_size, "num_steps": num_steps, "plausibility": plausibility}
    changes = {name: value for name, value in names.items() if value is not None}
    options = {"dtype": dtype, "device": device}
    if model is None:
        controlled = _on_device(ReControlForCausalLM.from_pretrained, head, **options)
    else:
        controlled = _on_device(ReControlForCausalLM.from_pretrained, model, value_head=head, **options)
    controlled.control = replace(controlled.control, **changes)
    tokenizer = AutoTokenizer.from_pretrained(controlled.config._name_or_path)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers = generate_rollouts(controlled, tokenizer, prompt, control=controlled.control, **settings)
    bases = generate_rollouts(controlled, tokenizer, prompt, **settings) if compare else [None] * len(answers)
    for answer, base in zip(answers, bases, strict=True):
        if base is not None:
            typer.echo(f"# {answer.prompt}\n## base\n{base.completion}\n## {controlled.control.method}")
        typer.echo(answer.completion)


@app.command()
def info(
    head: Annotated[str, typer.Argument(help="Head: a folder or a Hub repo.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")] = None,
) -> None:
    """Show what a head is: its configuration, size and recommended control."""
    from .value_head import ValueHead

    loaded = ValueHead.from_pretrained(head, revision=revision)
    size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.state_dict().values())
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    _print_json(loaded.config.to_dict() | {"parameters": parameters, "bytes": size})


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Chat model; default: SmolLM2-135M-Instruct, without a Hub.")
    ] = None,
    prompts: PromptsOption = Path("examples/prompts.jsonl"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything made.")] = Path("demo"),
    seed: SeedOption = 0,
) -> None:
    """From prompts to a head in one go: rollouts, VADER's sentiment as reward, training, and a comparison of the base,
    the paper's ascent and the advantage control on unseen prompts. A second run reuses what exists.
    """
    from .demo import run_demo

    run_demo(model, prompts, output, seed=seed)


def main() -> None:
    """Entry point: errors that name what was wrong are shown without a traceback, with exit code 1."""
    try:
        app()
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        typer.echo(f"recontrol: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("recontrol: interrupted.", err=True)
        sys.exit(130)
