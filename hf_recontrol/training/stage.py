"""The last stage: a folder of states to a folder with a head, resumed after any stop."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..configuration import TrainingRecord, ValueHeadConfig
from ..data.processes import Processes, Progress
from ..data.stage_folder import check_settings, checked_parts, lock_folder, read_manifest
from ..data.states import StateStore
from ..heads.hub import CONFIG_NAME, check_no_model
from ..heads.seen_prompts import SeenPrompts
from ..heads.value_head import ValueHead
from ..settings import INDIFFERENT, AdvantageSettings, HeadSettings, TrainSettings, ValueSettings
from ..utils.files import check_target, make_folder, read_json, without_place, write_json
from .advantage import fit_advantage
from .critic import train_critic
from .held_out import FIGURES_NAME, split_by_prompt
from .trainer import check_training
from .value import train_value_head

# What is said of a critic, of the figures of a value head.
CRITIC_FIGURES = ("value_error", "value_error_last", "correlation_last")
# What a head was trained with, in the folder of its checkpoints.
_SETTINGS_NAME = "settings.json"
# Its parts: the checkpoints of V, which is trained first.
_VALUE_FOLDER = "value"


def _states_id(folder: str | os.PathLike) -> str:
    parts = read_manifest(folder, "states", "recontrol states")["parts"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _what_matters(settings: TrainSettings) -> dict[str, Any]:
    """The settings that the head depends on: not where its training is shown, nor how its data are fetched."""
    values = {
        item.name: getattr(settings, item.name) for cls in (ValueSettings, AdvantageSettings) for item in fields(cls)
    }
    arguments = values["training_arguments"]
    values["training_arguments"] = {key: value for key, value in arguments.items() if key not in INDIFFERENT}
    # Which critic: an earlier one was a network.
    values["critic"] = settings.critic and "linear"
    return {key: value for key, value in values.items() if key not in INDIFFERENT}


def train_head(
    output: str | os.PathLike,
    states: str | os.PathLike,
    settings: TrainSettings | None = None,
    *,
    progress: Callable[[str], Progress] | None = None,
    command: str | None = None,
    **changes,
) -> dict[str, Any]:
    """
    Train both parts of a head from a folder of states into a folder, the last stage of [`fit`]. Checkpoints go to
    `output/training`; a run that was stopped resumes from the last one.

    Args:
        output (`str` or `os.PathLike`):
            Folder for the head (`config.json`, `model.safetensors`, `prompts.safetensors`, card) and `training.json`
            (its figures and curves).
        states (`str` or `os.PathLike`):
            Folder of [`write_states`].
        settings ([`TrainSettings`], *optional*), changes:
            The head's shape, and how to train; single settings as keywords. States without directions get neither a
            static vector nor an advantage part.
        progress (*optional*):
            Gives, for a description, what is called with (done, total).
        command (`str`, *optional*):
            What the head's card says that its figures were measured by.

    Returns:
        The figures of [`train_value_head`] and [`fit_advantage`].

    Raises:
        `ValueError`: if the folder holds another head, or was made with other settings; if a file of states is not the
        one that was written; else as those two.
    """
    output, settings = Path(output), TrainSettings.of(settings, changes)
    processes, work = Processes(), output / "training"
    check_training(settings, processes)
    store = StateStore.open(states)
    config = _head_config(store, settings)
    known = {"states": _states_id(states), "head": config.to_dict(), "training": _what_matters(settings)}
    known = json.loads(json.dumps(known, default=repr))
    lock = nullcontext()
    if processes.index == 0:
        check_target(output / CONFIG_NAME)
        check_no_model(output)
        if (output / CONFIG_NAME).exists() and not (work / _SETTINGS_NAME).exists():
            raise ValueError(f"{output} holds a head that was not trained there: name another folder.")
        make_folder(work)
        lock = lock_folder(work)
    with lock:
        if processes.index == 0:
            if not _holds_training(output):
                shutil.rmtree(work / _VALUE_FOLDER, ignore_errors=True)
            elif (work / _SETTINGS_NAME).exists():
                check_settings(output, read_json(work / _SETTINGS_NAME), known)
            write_json(work / _SETTINGS_NAME, known)
        processes.wait()
        if not (output / FIGURES_NAME).exists():
            # Once a training, not at each open: there may be many gigabytes.
            checked_parts(states, "states", "recontrol states")
            _train_both(output, store, config, settings, processes, progress, _record(states, store, command))
    return read_json(output / FIGURES_NAME)["figures"]


def _holds_training(output: Path) -> bool:
    """Whether anything was trained there that goes on: a head, V, or an epoch of it."""
    work = output / "training"
    finished = ((output / CONFIG_NAME), *work.glob(f"*/{CONFIG_NAME}"))
    return any(path.exists() for path in finished) or any(work.glob("*/checkpoint-*"))


def _head_config(store: StateStore, settings: HeadSettings) -> ValueHeadConfig:
    """The configuration of a head of these settings for these states."""
    with_advantage = store.has_directions and settings.advantage_sizes is not None
    with_tokens = store.has_directions and settings.token_bias
    if with_tokens and not store.has_tokens:
        raise ValueError(
            "These states do not hold the drawn tokens, which a token bias needs: collect them anew (`recontrol "
            "states`), or leave it out (`--no-token-bias`, `token_bias=False`)."
        )
    return ValueHeadConfig(
        store.hidden_size,
        head_sizes=list(settings.head_sizes),
        advantage_sizes=list(settings.advantage_sizes) if with_advantage else None,
        static_vector=store.has_directions,
        token_bias_size=store.vocabulary_size if with_tokens else None,
        activation=settings.activation,
        num_objectives=store.rewards.shape[1],
        hook_point=store.read_at["hook_point"],
        layer=store.read_at["layer"],
    )


def _record(states: str | os.PathLike, store: StateStore, command: str | None) -> TrainingRecord:
    """What is known of the data, but for the figures."""
    manifest = read_manifest(states, "states", "recontrol states")
    source = manifest.get("source") or {}
    counts = source.get("counts") or {}
    return TrainingRecord(
        rewards=[without_place(name) for name in source.get("rewards") or []],
        dataset=source.get("dataset"),
        prompts=len(store.prompts.unique()),
        responses=len(store),
        finished=int(store.finished.sum()),
        tokens=counts.get("tokens"),
        states=store.num_states,
        states_dtype=manifest["settings"]["dtype"],
        sampling={name: _shown(value) for name, value in (source.get("sampling") or {}).items()},
        control=_sampled_under(manifest["settings"], source),
        command=command,
    )


# Lists of numbers that are longer say nothing to who reads a card.
_LONGEST_LIST = 100


def _shown(value: Any) -> Any:
    """A setting of the sampling, as a head records it: of a long list how long it is."""
    return f"{len(value)} values" if isinstance(value, list) and len(value) > _LONGEST_LIST else value


def _sampled_under(settings: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    if not settings["control"]:
        return {}
    sources = {
        name: place and {key: without_place(value) for key, value in place.items()}
        for name, place in (source.get("head_sources") or {}).items()
    }
    return {"control": settings["control"], "heads": settings["heads"], "sources": sources}


def _train_both(
    output: Path,
    store: StateStore,
    config: ValueHeadConfig,
    settings: TrainSettings,
    processes: Processes,
    progress: Callable[[str], Progress] | None,
    record: TrainingRecord,
) -> None:
    def shown(description: str) -> Progress | None:
        return None if progress is None else progress(description)

    def once(
        train: Callable[..., tuple[ValueHead, dict[str, Any]]], description: str, **options
    ) -> tuple[ValueHead, dict[str, Any]]:
        """What is trained, or was before a stop, and its figures."""
        finished = work / description.replace(" ", "_")
        if (finished / FIGURES_NAME).exists():
            return ValueHead.from_pretrained(finished), read_json(finished / FIGURES_NAME)
        made, figures = train(store, config, settings, **options)
        if processes.index == 0:
            made.save_pretrained(finished)
            write_json(finished / FIGURES_NAME, figures)
        processes.wait()
        return made, figures

    work = output / "training"
    head, figures = once(train_value_head, "value head", output_dir=work / _VALUE_FOLDER, progress=shown("value head"))
    curves = {"value": figures.pop("log")}
    if config.static_vector:
        critic = None
        if settings.critic:
            critic, found = once(train_critic, "critic")
            figures |= {f"critic_{name}": found[name] for name in CRITIC_FIGURES}
        found = fit_advantage(
            head, store, settings, critic=critic, output_dir=work / "advantage", progress=shown("advantage")
        )
        curves["advantage"] = found.pop("log")
        found["warnings"] = figures["warnings"] + found.get("warnings", [])
        figures |= found
        if head.config.token_bias_size is not None and not head.token_bias.any():
            head = head.without_token_bias()
    if processes.index == 0:
        measured = {
            name: value
            for name, value in figures.items()
            if isinstance(value, (int, float)) and math.isfinite(value) and not isinstance(value, bool)
        }
        head.config.training = replace(record, figures=measured, warnings=figures["warnings"])
        sides = split_by_prompt(store.prompts, settings.validation_split, settings.seed)
        head.seen_prompts = SeenPrompts(*(store.prompts[episodes] for episodes in sides))
        head.save_pretrained(output)
        write_json(output / FIGURES_NAME, {"figures": figures, "curves": curves})
        for checkpoint in work.glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)
    processes.wait()
