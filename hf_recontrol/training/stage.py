"""The last stage: one folder of states or several to a folder with a head, resumed after any stop."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
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


def _states_id(manifests: Sequence[dict[str, Any]]) -> str:
    """A hash of all that is trained on; the folders' names are no part of it."""
    each = [json.dumps(manifest["parts"], sort_keys=True) for manifest in manifests]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def _open_states(folders: Sequence[Path]) -> tuple[StateStore, list[dict[str, Any]]]:
    """
    The states of some folders as one store, and the manifest of each.

    Raises:
        `OSError`, `ValueError`: as [`StateStore.open`]; if no folder is given, one is given twice, or two do not go
        together: names both, and what differs.
    """
    if not folders:
        raise ValueError("No folder of states is given, so there is nothing to train on.")
    manifests = [read_manifest(folder, "states", "recontrol states") for folder in folders]
    stores = [StateStore.open(folder) for folder in folders]
    first = _shared(stores[0], manifests[0])
    known: dict[str, Path] = {}
    for folder, store, manifest in zip(folders, stores, manifests, strict=True):
        mark = _states_id([manifest])
        if mark in known:
            raise ValueError(f"{known[mark]} and {folder} hold the same states: give them once.")
        known[mark] = folder
        shared = _shared(store, manifest)
        differ = [f"{name} ({first[name]!r}, {shared[name]!r})" for name in first if shared[name] != first[name]]
        if differ:
            raise ValueError(
                f"The states in {folders[0]} and in {folder} cannot train one head. They differ in "
                f"{', '.join(differ)}: make them with the same base, rewards and settings."
            )
    return StateStore([part for store in stores for part in store.parts], folders), manifests


def _shared(store: StateStore, manifest: dict[str, Any]) -> dict[str, Any]:
    """What all states that one head is trained on must have in common, by the names that messages say."""
    read_at, source = store.read_at, manifest.get("source") or {}
    return {
        "the base's fingerprint": manifest["settings"].get("model_fingerprint"),
        "the width": store.hidden_size,
        "the hook point": read_at["hook_point"],
        "the layer": read_at["layer"] if read_at["hook_point"] == "decoder_layer" else None,
        "`every`": read_at["every"],
        "the vocabulary's size": store.vocabulary_size,
        "whether they hold directions": store.has_directions,
        "whether they hold tokens": store.has_tokens,
        "the critic's layer": store.parts[0].context_layer,
        "whether they hold rewards of the response so far": store.has_prefix_rewards,
        "`prefix_every`": source.get("prefix_every"),
        # 1 is not noted, being the default.
        "the temperature of the sampling": (source.get("sampling") or {}).get("temperature") or 1.0,
        "the number of rewards": store.rewards.shape[1],
        "the rewards": source.get("rewards"),
    }


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
    states: str | os.PathLike | Sequence[str | os.PathLike],
    settings: TrainSettings | None = None,
    *,
    progress: Callable[[str], Progress] | None = None,
    command: str | None = None,
    **changes,
) -> dict[str, Any]:
    """
    Train both parts of a head from one folder of states or several into a folder, the last stage of [`fit`].
    Checkpoints go to `output/training`; a run that was stopped resumes from the last one.

    Args:
        output (`str` or `os.PathLike`):
            Folder for the head (`config.json`, `model.safetensors`, `prompts.safetensors`, card) and `training.json`
            (its figures and curves).
        states (`str`, `os.PathLike`, or sequence of these):
            Folder of [`write_states`], or several, in a fixed order: all their responses count, and those of each were
            read under the control that drew them. They must be of one base and one hook point, with the same
            tensors and rewards. A prompt that is in several is one prompt: all of its responses are held out, or none.
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
        `ValueError`: if the folder holds another head, or was made with other settings; if folders of states do not go
        together, naming two and what differs; if a file of states is not the one that was written; else as those two.
    """
    output, settings = Path(output), TrainSettings.of(settings, changes)
    folders = [Path(each) for each in ([states] if isinstance(states, (str, os.PathLike)) else states)]
    processes, work = Processes(), output / "training"
    check_training(settings, processes)
    store, manifests = _open_states(folders)
    config = _head_config(store, settings)
    known = {"states": _states_id(manifests), "head": config.to_dict(), "training": _what_matters(settings)}
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
            for folder in folders:
                shown = None if progress is None else progress("checksums")
                checked_parts(folder, "states", "recontrol states", processes=processes, progress=shown)
            _train_both(output, store, config, settings, processes, progress, _record(manifests, store, command))
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


def _record(manifests: Sequence[dict[str, Any]], store: StateStore, command: str | None) -> TrainingRecord:
    """What is known of the data, but for the figures; of the sampling, that of the last folder."""
    sources = [manifest.get("source") or {} for manifest in manifests]
    source = sources[-1]
    tokens = [(each.get("counts") or {}).get("tokens") for each in sources]
    datasets = {each.get("dataset") for each in sources}
    return TrainingRecord(
        rewards=[without_place(name) for name in source.get("rewards") or []],
        dataset=datasets.pop() if len(datasets) == 1 else None,
        prompts=len(store.prompts.unique()),
        responses=len(store),
        finished=int(store.finished.sum()),
        tokens=None if None in tokens else sum(tokens),
        states=store.num_states,
        states_dtype=", ".join(dict.fromkeys(manifest["settings"]["dtype"] for manifest in manifests)),
        sampling={name: _shown(value) for name, value in (source.get("sampling") or {}).items()},
        control=_sampled_under(manifests),
        command=command,
    )


# Lists of numbers that are longer say nothing to who reads a card.
_LONGEST_LIST = 100


def _shown(value: Any) -> Any:
    """A setting of the sampling, as a head records it: of a long list how long it is."""
    return f"{len(value)} values" if isinstance(value, list) and len(value) > _LONGEST_LIST else value


def _sampled_under(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The control of the last folder that has one; of several, with how many they are."""
    controlled = [manifest for manifest in manifests if manifest["settings"]["control"]]
    if not controlled:
        return {}
    settings, source = controlled[-1]["settings"], controlled[-1].get("source") or {}
    sources = {
        name: place and {key: without_place(value) for key, value in place.items()}
        for name, place in (source.get("head_sources") or {}).items()
    }
    found = {"control": settings["control"], "heads": settings["heads"], "sources": sources}
    return found if len(manifests) == 1 else found | {"rounds": len(manifests)}


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
