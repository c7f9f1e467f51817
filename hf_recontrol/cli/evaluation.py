"""What a head is worth, and how it is best used: `compare`, `tune`, and the page on which a person judges answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import COMPARE_INPUTS, TUNE_INPUTS, CompareSettings, TuneSettings
from .app import app, is_main_process
from .options import merged_inputs, with_settings

_RewardOption = Annotated[
    list[str] | None, typer.Option(help="What the head was trained on, as for `fit`; may be repeated.")
]


@app.command()
@with_settings(CompareSettings, inputs=COMPARE_INPUTS)
def compare(
    settings: CompareSettings,
    inputs: dict,
    base: Annotated[
        list[str] | None,
        typer.Option(
            "--base", "--model", "-m", help="Base model: a folder or a Hub name; default: the head's. May be repeated."
        ),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="The value head: a folder or a Hub name. May be repeated.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Unseen prompts, as for `fit`.")] = None,
    reward: _RewardOption = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A reward that no head was trained on, named as rewards are. For others see docs/judging.md."
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Prompts to find strengths on; default: some of --prompts are set aside.")
    ] = None,
    rollouts: Annotated[
        list[str] | None,
        typer.Option(help="Folder of scored rollouts, for controls that learn from them. Of several bases: one each."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for everything made.")] = None,
) -> None:
    """What a control is worth, against the base, prompting, best-of-n and everything else named in the file of
    `--config`: one table, with intervals and KL to the base. The same command again resumes a comparison that was
    stopped. Several bases or heads are compared one after the other, each in a folder of its own.

    Example: `recontrol compare --head run/head --prompts unseen.jsonl --reward hf_recontrol:vader -o comparison`
    """
    from ..pipelines.compare import TABLE_NAME
    from ..pipelines.compare import compare as run_compare
    from ..pipelines.compare_bases import compare_bases

    given = {
        "base": base,
        "head": head,
        "prompts": prompts,
        "rewards": reward,
        "judge": judge,
        "held_out": held_out,
        "rollouts": rollouts,
        "output": output,
    }
    inputs = merged_inputs(inputs, given, {"prompts": "--prompts", "rewards": "--reward", "output": "--output"})
    if "base" not in inputs and "head" not in inputs:
        raise typer.BadParameter("missing; name a base model, or a head that names its own", param_hint="--head")
    several = {name: _list(inputs.pop(name, [])) for name in ("base", "head", "rollouts")}
    if all(len(names) <= 1 for names in several.values()):
        single = {name: names[0] if names else None for name, names in several.items()}
        run_compare(**single, **inputs, settings=settings)
    else:
        compare_bases(several["base"], several["head"], several["rollouts"], **inputs, settings=settings)
    if is_main_process():
        folder = Path(inputs["output"])
        typer.echo((folder / TABLE_NAME).read_text(encoding="utf-8"))
        typer.echo(f"Answers, figures and plots are in {folder}.")


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@app.command("judge-page")
def judge_page(
    comparison: Annotated[Path, typer.Argument(help="The folder of a finished comparison.")],
    control: Annotated[str, typer.Option(help="The control whose answers are judged, by its name there.")],
    strength: Annotated[float | None, typer.Option(help="Which of its strengths, if it has several.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="How many prompts, at random.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts, their order and the sides.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("judge.html"),
) -> None:
    """A page on which a person judges a control's answers against those compared against: one HTML file that does not
    tell which is which. It saves a file that `judge: {kind: person, verdicts: FILE}` of a comparison's file names.

    Example: `recontrol judge-page comparison --control advantage --num-prompts 50 -o judge.html`
    """
    from ..evaluation.judges.page import write_judge_page

    count = write_judge_page(comparison, control, output, strength=strength, num_prompts=num_prompts, seed=seed)
    typer.echo(
        f"{output} holds {count} pairs. Which is which is in {comparison}: do not give that away with the page."
    )


@app.command()
@with_settings(TuneSettings, inputs=TUNE_INPUTS)
def tune(
    settings: TuneSettings,
    inputs: dict,
    head: Annotated[str | None, typer.Option(help="The value head: a folder or a Hub name.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "--model", "-m", help="Base model: a folder or a Hub name; default: the head's."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts that the head was not trained on, as for `fit`; no test prompts.")
    ] = None,
    reward: _RewardOption = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for what is made.")] = None,
) -> None:
    """Find the control that a head should recommend, on prompts that it was not trained on, and write it into the
    head. The same command again resumes a search that was stopped.

    Example: `recontrol tune --head run/head --prompts held-out.jsonl --reward hf_recontrol:vader -o tuning`
    """
    from ..configuration import ControlConfig
    from ..pipelines.tune import tune as run_tune
    from ..pipelines.tune import tuned_head

    given = {"head": head, "base": base, "prompts": prompts, "rewards": reward, "output": output}
    options = {"head": "--head", "prompts": "--prompts", "rewards": "--reward", "output": "--output"}
    inputs = merged_inputs(inputs, given, options)
    found = run_tune(**inputs, settings=settings)
    if is_main_process():
        chosen = next(each for each in found["candidates"] if each["control"] == found["control"])
        figures = chosen["figures"]
        where = tuned_head(inputs["head"], inputs["output"])
        control, count = ControlConfig.from_dict(found["control"]), len(found["candidates"])
        typer.echo(
            f"{where} now recommends {control}, the best of {count} controls that were measured:"
            if found["written"]
            else f"No control is better than the base, so the head is as it was. The best of {count} was {control}:"
        )
        earned = ""
        # A criterion without it does not need it.
        if "reward" in figures and "reward" in found["base"]:
            earned = f"reward {figures['reward'][0]:.3f} (the base's {found['base']['reward'][0]:.3f}) at "
        typer.echo(
            f"{earned}{figures['kl_per_response'][0]:.2f} nats an answer, on {chosen['prompts']} prompts. These chose "
            "it: what it is worth on others says `recontrol compare`."
        )
        typer.echo(f"All controls and the plot are in {inputs['output']}.")
