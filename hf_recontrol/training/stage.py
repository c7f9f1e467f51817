"""The last stage: a folder of states to a folder with a head, resumed after any stop."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..configuration import TrainingRecord, ValueHeadConfig
from ..data.stage_folder import Processes, Progress, check_settings, lock_folder, read_manifest
from ..data.states import StateStore
from ..heads.hub import CONFIG_NAME
from ..heads.value_head import ValueHead
from ..utils.files import atomic_path, check_target, make_folder
from .advantage import fit_advantage
from .value import train_value_head

FIGURES_NAME = "training.json"
# Arguments of TrainingArguments that change nothing of the result.
_INDIFFERENT = (
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "project",
    "report_to",
    "run_name",
    "trackio_space_id",
)
# Of both parts: on other splits the advantage part would be measured on prompts that V was trained on.
SHARED_OPTIONS = ("validation_split", "seed", "discount", "open_truncated")


def write_json(path: Path, values: dict) -> None:
    """Write an object as a JSON file, or nothing at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _states_id(folder: str | os.PathLike) -> str:
    parts = read_manifest(folder, "states", "recontrol states")["parts"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _what_matters(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the head depends on: not where its training is shown, nor how its data are fetched."""
    arguments = options.get("training_arguments") or {}
    kept = {key: value for key, value in arguments.items() if key not in _INDIFFERENT}
    return options | {"training_arguments": kept}


def check_shared(advantage_options: dict[str, Any]) -> None:
    """Raise `ValueError` if they hold what both parts take from the value part's options."""
    if double := sorted(set(SHARED_OPTIONS) & advantage_options.keys()):
        raise ValueError(f"Give {double} in `value_options` alone: both parts take them from there.")


def train_head(
    output: str | os.PathLike,
    states: str | os.PathLike,
    *,
    head_sizes: Sequence[int] = (1024,),
    advantage_sizes: Sequence[int] | None = (256,),
    activation: str = "relu",
    value_options: dict[str, Any] | None = None,
    advantage_options: dict[str, Any] | None = None,
    progress: Callable[[str], Progress] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """
    Train both parts of a head from a folder of states into a folder, the last stage of [`fit`]. Checkpoints go to
    `output/training`; a run that was stopped goes on from the last one.

    Args:
        output (`str` or `os.PathLike`):
            Folder for the head (`config.json`, `model.safetensors`, card) and `training.json` (its figures and
            curves).
        states (`str` or `os.PathLike`):
            Folder of [`write_states`].
        head_sizes, advantage_sizes, activation:
            As in [`ValueHeadConfig`]. States without directions get no advantage part.
        value_options, advantage_options (`dict`, *optional*):
            Keyword arguments of [`train_value_head`] and [`fit_advantage`]; `validation_split`, `seed`, `discount` and
            `open_truncated` are the value part's for both.
        progress (*optional*):
            Gives, for a description, what is called with (done, total).
        command (`str`, *optional*):
            What the head's card says that its figures were measured by.

    Returns:
        The figures of [`train_value_head`] and [`fit_advantage`].

    Raises:
        `ValueError`: if the folder holds another head, or was made with other settings; else as those two.
    """
    output, value_options = Path(output), dict(value_options or {})
    advantage_options = dict(advantage_options or {})
    check_shared(advantage_options)
    advantage_options |= {name: value_options[name] for name in SHARED_OPTIONS if name in value_options}
    store = StateStore.open(states)
    if not store.has_directions:
        advantage_sizes = None
    config = ValueHeadConfig(
        store.hidden_size,
        head_sizes=list(head_sizes),
        advantage_sizes=None if advantage_sizes is None else list(advantage_sizes),
        activation=activation,
        num_objectives=store.rewards.shape[1],
        hook_point=store.place["hook_point"],
        layer=store.place["layer"],
    )
    settings = {
        "states": _states_id(states),
        "head": config.to_dict(),
        "value_options": _what_matters(value_options),
        "advantage_options": _what_matters(advantage_options),
    }
    settings = json.loads(json.dumps(settings, default=repr))
    processes, work = Processes(), output / "training"
    lock = nullcontext()
    if processes.index == 0:
        check_target(output / CONFIG_NAME)
        if (output / CONFIG_NAME).exists() and not (work / "settings.json").exists():
            raise ValueError(f"{output} holds a head that was not trained there: name another folder.")
        make_folder(work)
        lock = lock_folder(work)
    with lock:
        if processes.index == 0:
            if (work / "settings.json").exists():
                check_settings(output, json.loads((work / "settings.json").read_text(encoding="utf-8")), settings)
            write_json(work / "settings.json", settings)
        processes.wait()
        if not (output / FIGURES_NAME).exists():
            record = _record(states, store, command)
            _train_both(output, work, store, config, value_options, advantage_options, processes, progress, record)
    return json.loads((output / FIGURES_NAME).read_text(encoding="utf-8"))["figures"]


def _record(states: str | os.PathLike, store: StateStore, command: str | None) -> TrainingRecord:
    """What is known of the data, but for the figures."""
    manifest = read_manifest(states, "states", "recontrol states")
    source = manifest.get("source") or {}
    counts = source.get("counts") or {}
    return TrainingRecord(
        rewards=source.get("rewards") or [],
        dataset=source.get("dataset"),
        prompts=len(store.prompts.unique()),
        responses=len(store),
        finished=int(store.finished.sum()),
        tokens=counts.get("tokens"),
        states=store.num_states,
        states_dtype=manifest["settings"]["dtype"],
        sampling=source.get("sampling") or {},
        command=command,
    )


def _train_both(
    output: Path,
    work: Path,
    store: StateStore,
    config: ValueHeadConfig,
    value_options: dict[str, Any],
    advantage_options: dict[str, Any],
    processes: Processes,
    progress: Callable[[str], Progress] | None,
    record: TrainingRecord,
) -> None:
    def shown(description: str) -> Progress | None:
        return None if progress is None else progress(description)

    finished = work / "value_head"
    if (finished / FIGURES_NAME).exists():
        head, figures = ValueHead.from_pretrained(finished), read_json(finished / FIGURES_NAME)
    else:
        head, figures = train_value_head(
            store, config, output_dir=work / "value", progress=shown("value head"), **value_options
        )
        if processes.index == 0:
            head.save_pretrained(finished)
            write_json(finished / FIGURES_NAME, figures)
        processes.wait()
    curves = {"value": figures.pop("log")}
    if config.advantage_sizes is not None:
        found = fit_advantage(
            head, store, output_dir=work / "advantage", progress=shown("advantage"), **advantage_options
        )
        curves["advantage"] = found.pop("log")
        figures |= found
    if processes.index == 0:
        measured = {
            name: value
            for name, value in figures.items()
            if isinstance(value, (int, float)) and math.isfinite(value) and not isinstance(value, bool)
        }
        head.config.training = replace(record, figures=measured, warnings=figures["warnings"])
        head.save_pretrained(output)
        write_json(output / FIGURES_NAME, {"figures": figures, "curves": curves})
        for checkpoint in work.glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)
    processes.wait()


def read_json(path: Path) -> dict:
    """The object in a JSON file that was written here."""
    return json.loads(path.read_text(encoding="utf-8"))
