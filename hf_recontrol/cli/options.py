"""Options that several commands of `recontrol` share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

ModelArgument = Annotated[str, typer.Option("--model", "-m", help="Base model: a folder or a Hub name.")]
PromptsOption = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="JSONL, CSV or Parquet file, or a folder or Hub name that `datasets` loads; rows with `prompt`: a text "
        "or chat messages.",
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split of a dataset.")]
ConfigNameOption = Annotated[str | None, typer.Option(help="Configuration of a dataset.")]
ColumnOption = Annotated[str, typer.Option("--prompt-column", help="Column that holds the prompts.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Read so many rows only.")]
StreamingOption = Annotated[bool, typer.Option("--streaming", help="Do not download the whole dataset.")]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, instead of stopping.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Responses for each prompt.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens drawn at most for each response.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends a turn; may be given several times.")]
GenerationConfigOption = Annotated[
    str | None, typer.Option(help="Folder or Hub name with a generation_config.json: all other sampling settings.")
]
PartOption = Annotated[int, typer.Option(min=1, help="Responses in a file: what a stop can cost.")]
RewardOption = Annotated[
    list[str],
    typer.Option(
        help="`module:function` (`f(prompts, completions, **columns) -> list[float]`), a column's name, or the folder "
        "or Hub name of a sequence classifier (`name#LABEL` if it has several labels). Several give several "
        "objectives."
    ),
]
HookPointOption = Annotated[Literal["lm_head", "decoder_layer"], typer.Option(help="Where the head reads.")]
LayerOption = Annotated[int, typer.Option(help="Decoder layer, at `decoder_layer`.")]
AdvantageOption = Annotated[
    bool, typer.Option(help="At `lm_head`: also keep what the advantage part is trained on (as much again).")
]
KeepStatesOption = Annotated[
    bool,
    typer.Option(
        "--keep-states",
        help="Keep states while sampling instead of reading them afterwards: faster on a CPU, more on the disk.",
    ),
]
StatesDtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8"], typer.Option(help="Dtype of stored states.")
]
EveryOption = Annotated[int, typer.Option(min=1, help="Keep every k-th state.")]
BudgetOption = Annotated[float | None, typer.Option("--max-gb", help="Keep as many states as fit into 10⁹ bytes.")]
HeadSizesOption = Annotated[str, typer.Option(help="Widths of V's hidden layers: `1024`, `512,512`.")]
AdvantageSizesOption = Annotated[str, typer.Option(help="Widths of g's hidden layers; `none` for no advantage part.")]
TdLambdaOption = Annotated[float, typer.Option(min=0, max=1, help="λ of TD(λ); 1 is Monte Carlo.")]
EpochsOption = Annotated[int, typer.Option(min=1, help="Epochs at most, for V; the best one is kept.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences in one forward.")]
DtypeOption = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the base.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda:1, auto (spread by accelerate), ...; default: this process's accelerator."),
]
