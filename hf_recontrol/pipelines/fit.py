"""From prompts and a reward to a head and a report: all four stages in one folder, resumed after any stop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..collection.kept_states import remove_kept
from ..collection.labels import check_columns, label_rollouts
from ..collection.rewards import RewardFunction, by_name, load_reward, reward_name, vader
from ..collection.rollouts import write_rollouts
from ..collection.states import write_states
from ..configuration import ControlConfig, ValueHeadConfig
from ..data.fingerprints import stable_number
from ..data.processes import Processes
from ..data.prompts import Prompts, load_prompts
from ..data.rollouts import load_rollouts, rollout_parts
from ..data.stage_folder import MANIFEST_NAME, lock_folder
from ..evaluation.strength import recommend_control, recommended_method
from ..heads.base_model import check_nameable
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.hook_points import HookPoint
from ..settings import FitSettings, LoadingSettings, PromptSettings
from ..training.held_out import split_by_prompt
from ..training.stage import FIGURES_NAME, train_head
from ..training.trainer import check_training
from ..utils.extras import needs_extra
from ..utils.files import check_target, make_folder, read_json, write_json
from ..utils.setting_fields import Settings
from .display import display
from .loading import load_base
from .run_file import save_run
from .run_report import write_run_report

logger = logging.get_logger(__name__)


def fit(
    model: str | os.PathLike | PreTrainedModel,
    prompts: Any,
    reward: str | RewardFunction | Sequence[str | RewardFunction],
    output: str | os.PathLike,
    settings: FitSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    command: str | None = None,
    **changes,
) -> dict[str, Any]:
    """
    Everything from prompts to a head: sample responses, score them, read their states, train V and g, find a step
    size, write a report. The same call again resumes a run that was stopped; under `accelerate launch` processes
    share the work.

    Args:
        model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]), tokenizer (*optional*):
            The base: a folder or Hub name, or a loaded model with its tokenizer. The head names it by that name, so a
            loaded model must be what that name stands for, and have no adapter.
        prompts:
            A file or whatever else [`load_prompts`] takes.
        reward (`str`, function, or sequence of these):
            As for [`load_reward`], or functions; several give several objectives.
        output (`str` or `os.PathLike`):
            Folder for everything made: `rollouts/*.parquet`, `states/`, `head/`, `report.html`, and `fit.yaml`, the
            settings, which `recontrol fit --config` takes.
        settings ([`FitSettings`], *optional*), changes:
            How to do it; single settings as keywords.
        quiet (`bool`, *optional*, defaults to `False`):
            Show no progress.
        command (`str`, *optional*):
            What the head's card says that its figures were measured by.

    Returns:
        The figures of [`train_head`].

    Raises:
        `ValueError`, `OSError`: before any long work if something cannot be used, see the stages; if `output` was made
        with other settings.
    """
    settings, output, tokenizer_given = FitSettings.of(settings, changes), Path(output), tokenizer is not None
    if isinstance(model, ReControlForCausalLM):
        raise ValueError("This model is controlled already: `unload()` its head first.")
    if isinstance(prompts, Prompts):
        _check_default(settings, PromptSettings, "reading prompts, these are read: give it to `load_prompts`")
    if not isinstance(model, (str, os.PathLike)):
        check_nameable(model)
        _check_default(settings, LoadingSettings, "loading a base, this one is loaded: leave it out")
    reward = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    rows = prompts if isinstance(prompts, Prompts) else load_prompts(prompts, settings)
    rewards = _rewards(reward, rows, settings.on_bad_rows)
    processes = Processes()
    _check(rows, settings, processes)
    if processes.index == 0:
        check_target(output / "report.html")
        make_folder(output)
    with lock_folder(output) if processes.index == 0 else nullcontext():
        processes.wait()
        base, tokenizer = _base(model, tokenizer, settings)
        given, settings = settings, _for_base(base, settings)
        # Of a run that is refused later nothing is written, of one that is killed what it was to be.
        if processes.index == 0 and not (output / "rollouts" / MANIFEST_NAME).exists():
            save_run(output, model, prompts, reward, given, tokenizer_given)
        figures = _run_stages(output, base, tokenizer, rows, rewards, settings, processes, quiet, command)
        if processes.index == 0:
            _recommend(output, base, figures, settings.target_kl)
            write_run_report(output, tokenizer, figures, settings)
            save_run(output, model, prompts, reward, given, tokenizer_given)
        processes.wait()
    return figures


def _run_stages(
    output: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    rewards: dict[str, RewardFunction],
    settings: FitSettings,
    processes: Processes,
    quiet: bool,
    command: str | None,
) -> dict[str, Any]:
    """The four stages, each in its folder; returns the figures of the last."""
    stages = ["rollouts", "rewards", "states", "value head", *(["advantage"] if settings.with_directions else [])]
    # Once states are being written no part of the rollouts is missing.
    keep_states = settings.keep_states and not (output / "states" / MANIFEST_NAME).is_file()
    with display(stages, quiet or processes.index > 0) as show:
        write_rollouts(
            output / "rollouts",
            base,
            tokenizer,
            prompts,
            settings,
            keep_states=keep_states,
            progress=show("rollouts"),
        )
        label_rollouts(output / "rollouts", rewards, on_bad_rows=settings.on_bad_rows, progress=show("rewards"))
        write_states(output / "states", base, output / "rollouts", settings, progress=show("states"))
        if settings.keep_states and processes.index == 0:
            remove_kept(output / "rollouts")
        return train_head(output / "head", output / "states", settings, progress=show, command=command)


def _check(prompts: Prompts, settings: FitSettings, processes: Processes) -> None:
    """Raise now for what only the last stages would stumble over."""
    with needs_extra("train", "`fit`"):
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
    check_training(settings, processes)
    numbers = torch.tensor(list({stable_number(row["prompt"]) for row in prompts.rows}))
    # The split itself says what is wrong with it.
    split_by_prompt(numbers, settings.validation_split, settings.seed)


def _check_default(settings: FitSettings, cls: type[Settings], what: str) -> None:
    """Raise `ValueError` if one of the settings of `cls` is not its default: they are about what is done already."""
    default = cls()
    for item in fields(cls):
        if item.name != "on_bad_rows" and getattr(settings, item.name) != getattr(default, item.name):
            raise ValueError(f"`{item.name}` is about {what}.")


def _for_base(base: PreTrainedModel, settings: FitSettings) -> FitSettings:
    """Settings whose head the base can have, checked before any response is sampled."""
    directions = settings.with_directions and settings.advantage_sizes is not None
    settings = replace(
        settings, directions=directions, advantage_sizes=settings.advantage_sizes if directions else None
    )
    # Says so if no head can have this shape.
    ValueHeadConfig(
        HookPoint.find(base, settings).width,
        head_sizes=settings.head_sizes,
        advantage_sizes=settings.advantage_sizes,
        hook_point=settings.hook_point,
        layer=settings.layer,
    )
    return settings


def _rewards(reward, prompts: Prompts, on_bad_rows: str) -> dict[str, RewardFunction]:
    if not reward or not all(isinstance(item, str) or callable(item) for item in reward):
        raise ValueError(f"`reward` must be functions or their names, got {reward!r}.")
    columns = set(prompts.rows[0]) - {"prompt"}
    if on_bad_rows == "error":
        check_columns([item for item in reward if isinstance(item, str)], prompts)
    functions = [load_reward(item, columns) if isinstance(item, str) else item for item in reward]
    if vader in functions:
        vader([], [])  # says so if it is not installed
    return by_name(functions, [item if isinstance(item, str) else reward_name(item) for item in reward])


def _base(model, tokenizer, settings: FitSettings):
    if not isinstance(model, PreTrainedModel):
        base, own = load_base(model, settings)
        return base, tokenizer or own
    if tokenizer is None:
        raise ValueError("A loaded model needs its `tokenizer` too.")
    return model.eval(), tokenizer


def _recommend(output: Path, base: PreTrainedModel, figures: dict[str, Any], target_kl: float) -> None:
    """Let the head recommend a control. One that somebody set by hand is kept, and one found for this `target_kl`."""
    head, training = ValueHead.from_pretrained(output / "head"), read_json(output / "head" / FIGURES_NAME)
    if head.config.control is not None:
        found = training.get("recommended", {})
        if found.get("control") != head.config.control.to_dict() or found["target_kl"] == target_kl:
            return
    start = ControlConfig(recommended_method(figures), step_size=1.0)
    controlled = ReControlForCausalLM.from_model(base, head, start)
    rollouts = load_rollouts(rollout_parts(output / "rollouts")[0])
    try:
        head.config.control = recommend_control(controlled, rollouts, figures, target_kl)
    except ValueError as error:
        logger.warning(f"The head recommends no step size: {error}")
        return
    finally:
        controlled.unload()
    head.save_pretrained(output / "head")
    recommended = {"target_kl": target_kl, "control": head.config.control.to_dict()}
    write_json(output / "head" / FIGURES_NAME, training | {"recommended": recommended})
