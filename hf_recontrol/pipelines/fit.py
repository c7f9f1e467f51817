"""From prompts and a reward to a head and a report: all stages, in rounds, in one folder; resumed after any stop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..collection.directions import warn_of_other_draws
from ..collection.engines import check_engine
from ..collection.kept_states import remove_kept
from ..collection.rollouts import write_rollouts
from ..collection.sampling import sampling_config
from ..collection.scoring.labels import label_rollouts
from ..collection.scoring.responses import check_parts, check_rows, finite_reward, try_rewards
from ..collection.scoring.rewards import ColumnReward, RewardFunction, named_rewards
from ..collection.states import write_states
from ..configuration import ValueHeadConfig
from ..data.fingerprints import prompt_hashes
from ..data.processes import Processes, no_progress
from ..data.prompts import Prompts, load_prompts
from ..data.stage_folder import MANIFEST_NAME, read_manifest, shared_folder
from ..data.states import StateStore
from ..evaluation.data_curve import MIN_PROMPTS, data_curve
from ..evaluation.recommendation import recommend_control
from ..evaluation.strength import NUM_RESPONSES
from ..heads.base_model import check_nameable
from ..heads.hub import CONFIG_NAME, check_no_model
from ..heads.value_head import ValueHead, in_eval
from ..modeling.causal_lm import ReControlForCausalLM, without_heads
from ..settings import FitSettings, LoadingSettings, PromptSettings
from ..training.held_out import held_out_prompts, split_by_prompt
from ..training.stage import FIGURES_NAME, train_head
from ..training.trainer import check_training
from ..utils.extras import needs_extra
from ..utils.files import make_folder, read_json, write_json
from ..utils.setting_fields import Settings
from .display import display
from .loading import check_same_weights, load_base, settings_for_base
from .run_file import check_run_folder, earlier_head, round_folder, save_run
from .run_report import write_run_report

logger = logging.get_logger(__name__)

# Fewer prompts than this tell no control from another.
_FEW_PROMPTS = 16


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
    Everything from prompts to a head: sample responses, score them, read their states, train V and g, find the control
    to recommend (see [`recommend_control`]), write a report. With `rounds` above 1 further rounds sample under the
    control found so far, and train a head anew on the responses of all rounds, each read under the policy that drew
    it. The same call again resumes a run that was stopped, and with more `rounds` goes on from a finished one; under
    `accelerate launch` processes share the work.

    Args:
        model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]), tokenizer (*optional*):
            The base: a folder or Hub name, or a loaded model with its tokenizer. The head names it by that name, so a
            loaded model must be what that name stands for, and have no adapter. Of a [`ReControlForCausalLM`] the
            responses of the first round are sampled, and their states read, under the control in force, which the head
            records: so a head learns from the responses that an earlier one made. Every head is to be used in place of
            the earlier ones, on the base alone, and that is also what its recommended control is found for. `model`
            stays as it was.
        prompts:
            A file or whatever else [`load_prompts`] takes.
        reward (`str`, function, or sequence of these):
            As for [`load_reward`], or functions; several give several objectives.
        output (`str` or `os.PathLike`):
            Folder for everything made: `rollouts/*.parquet`, `states/`, `head/`, `report.html`, and `fit.yaml`, the
            settings, which `recontrol fit --config` takes. Of further rounds `round-2/rollouts/`, `round-2/states/`
            and so on; the heads of all rounds but the last are in `round-1/head/` and so on.
        settings ([`FitSettings`], *optional*), changes:
            How to do it; single settings as keywords.
        quiet (`bool`, *optional*, defaults to `False`):
            Show no progress.
        command (`str`, *optional*):
            What the head's card says that its figures were measured by.

    Returns:
        The figures of [`train_head`], of the last round; with directions at every state, and 50 prompts or more,
        `data_curve` too, a [`DataCurve`] as a `dict`, of the first round's responses.

    Raises:
        `ValueError`, `OSError`: before any long work if something cannot be used, see the stages; if `output` was made
        with other settings, or holds more rounds.
    """
    settings, output, tokenizer_given = FitSettings.of(settings, changes), Path(output), tokenizer is not None
    if isinstance(prompts, Prompts):
        _check_default(settings, PromptSettings, "reading prompts, these are read: give it to `load_prompts`")
    if not isinstance(model, (str, os.PathLike)):
        check_nameable(model)
        _check_default(settings, LoadingSettings, "loading a base, this one is loaded: leave it out")
    reward = list(reward) if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
    rows = load_prompts(prompts, settings)
    rewards = named_rewards(reward, rows.columns)
    check_rows(rewards, rows, settings.on_bad_rows, settings.combine_rewards)
    check_parts(rewards.values(), settings.prefix_every)
    for name, function in rewards.items():
        if isinstance(function, ColumnReward):
            numbers = [finite_reward(row.get(function.column)) for row in rows.rows]
            if len(set(numbers) - {None}) < 2:
                raise ValueError(f"The column {name} does not hold two different numbers: nothing is learnt from it.")
    processes = Processes()
    _check(rows, settings, processes)
    if not (output / "rollouts" / MANIFEST_NAME).exists():
        try_rewards(rewards, rows, settings.on_bad_rows, settings.prefix_every)
    if isinstance(model, (str, os.PathLike)) and output.exists() and os.path.exists(model) and output.samefile(model):
        raise ValueError(f"`output` is the base's own folder, {output}: name another one.")
    if processes.index == 0:
        check_run_folder(output, settings)
        check_no_model(output / "head")
    with ExitStack() as stack:
        stack.enter_context(shared_folder(output))
        base, tokenizer = _base(model, tokenizer, settings)
        stack.enter_context(in_eval(base))
        given, settings = settings, settings_for_base(base, settings)
        if processes.index == 0 and not (output / "rollouts" / MANIFEST_NAME).exists():
            drawn = sampling_config(base, tokenizer, settings).to_diff_dict()
            warn_of_other_draws(drawn, settings.with_directions)
            # Of a run that is refused later nothing is written, of one that is killed what it was to be.
            save_run(output, model, prompts, reward, list(rewards.values()), given, tokenizer_given)
        figures, folders = _run_rounds(output, base, tokenizer, rows, rewards, settings, processes, quiet, command)
        if processes.index == 0:
            write_run_report(output, folders, tokenizer, figures, settings)
            save_run(output, model, prompts, reward, list(rewards.values()), given, tokenizer_given)
        processes.wait()
    return figures


def _run_rounds(
    output: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    rewards: dict[str, RewardFunction],
    settings: FitSettings,
    processes: Processes,
    quiet: bool,
    command: str | None,
) -> tuple[dict[str, Any], list[Path]]:
    """All rounds; returns the figures of the last one's head, and the folder of each."""
    folders: list[Path] = []
    curve: dict[str, Any] = {}
    acting = None
    for number in range(1, settings.rounds + 1):
        folders.append(round_folder(output, number))
        kept, is_last = earlier_head(output, number), number == settings.rounds
        head = kept if kept.exists() else output / "head"
        with _under(base, acting) as model:
            figures = _run_stages(
                folders, head, model, tokenizer, prompts, rewards, settings, processes, quiet, command
            )
        if processes.index == 0:
            if number == 1:
                curve = _data_curve(head, output, settings)
            # What the next round was drawn under stays what it is.
            if not (round_folder(output, number + 1) / "rollouts" / MANIFEST_NAME).exists():
                with without_heads(base):
                    _recommend(head, folders, base, tokenizer, prompts, rewards, settings, quiet)
            recommends = ValueHeadConfig.from_json_file(head / CONFIG_NAME).control is not None
            if recommends and not is_last and head != kept:
                make_folder(kept.parent)
                head.rename(kept)
        processes.wait()
        if not is_last and not kept.exists():
            if processes.index == 0:
                logger.warning(
                    f"Round {number} of {settings.rounds} is the last one: its head recommends no control that a "
                    f"further round could be sampled under. The result is this head, in {head}."
                )
            break
        acting = kept
    return figures | curve, folders


@contextmanager
def _under(base: PreTrainedModel, head: Path | None) -> Iterator[PreTrainedModel]:
    """A base under the control that a head recommends, in place of all others, inside the block; else as it is."""
    if head is None:
        yield base
        return
    with without_heads(base):
        model = ReControlForCausalLM.from_model(base, head)
        try:
            yield model
        finally:
            model.unload()


def _run_stages(
    folders: Sequence[Path],
    head: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    rewards: dict[str, RewardFunction],
    settings: FitSettings,
    processes: Processes,
    quiet: bool,
    command: str | None,
) -> dict[str, Any]:
    """The four stages of the last of some rounds, each in its folder; returns the figures of the head."""
    output, number = folders[-1], len(folders)
    sampling = reading = settings
    if number > 1:
        # Noise of its own, and other than that of the controls that are compared (see `_recommend`).
        sampling = replace(settings, seed=(settings.seed + number) % 2**32)
        # Other responses would fit into the same bytes with another `every`, which one head cannot be trained on.
        first = read_manifest(folders[0] / "states", "states", "recontrol fit")["settings"]
        reading = replace(settings, every=first["every"], max_gigabytes=None)
    title = f"Round {number} of {settings.rounds}" if settings.rounds > 1 else ""
    stages = ["rollouts", "rewards", "states", "value head"]
    stages += ["advantage"] if settings.with_directions else []
    # Once states are being written no part of the rollouts is missing.
    keep_states = settings.keep_states and not (output / "states" / MANIFEST_NAME).is_file()
    with display(stages, quiet or processes.index > 0, title) as show:
        counts = write_rollouts(
            output / "rollouts",
            base,
            tokenizer,
            prompts,
            sampling,
            control=getattr(base, "active_control", None) or False,
            keep_states=keep_states,
            progress=show("rollouts"),
        )
        if settings.open_truncated and not counts["finished"]:
            raise ValueError(
                f"`open_truncated` needs responses that end by themselves, and none of these {counts['rollouts']} "
                "does: leave it out, or sample anew with a larger `max_new_tokens`."
            )
        label_rollouts(
            output / "rollouts",
            rewards,
            on_bad_rows=settings.on_bad_rows,
            combine_rewards=settings.combine_rewards,
            prefix_every=settings.prefix_every,
            tokenizer=tokenizer,
            progress=show("rewards"),
        )
        write_states(output / "states", base, output / "rollouts", reading, progress=show("states"))
        if settings.keep_states and processes.index == 0:
            remove_kept(output / "rollouts")
        states = [folder / "states" for folder in folders]
        return train_head(head, states, settings, progress=show, command=command)


def _check(prompts: Prompts, settings: FitSettings, processes: Processes) -> None:
    """Raise now for what only the last stages would stumble over."""
    with needs_extra("train", "`fit`"):
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
    check_training(settings, processes)
    check_same_weights(settings, settings)
    check_engine(settings)
    if settings.keep_states and settings.critic_layer is not None:
        raise ValueError("`keep_states` keeps no critic's layer: leave one of the two (`critic_layer`) out.")
    # The split itself says what is wrong with it.
    split_by_prompt(torch.tensor(list(set(prompt_hashes(prompts)))), settings.validation_split, settings.seed)


def _check_default(settings: FitSettings, cls: type[Settings], what: str) -> None:
    """Raise `ValueError` if one of the settings of `cls` is not its default: they are about what is done already."""
    default = cls()
    for item in fields(cls):
        if item.name != "on_bad_rows" and getattr(settings, item.name) != getattr(default, item.name):
            raise ValueError(f"`{item.name}` is about {what}.")


def _base(model, tokenizer, settings: FitSettings):
    if not isinstance(model, PreTrainedModel):
        return load_base(model, settings, tokenizer=tokenizer)
    if tokenizer is None:
        raise ValueError("A loaded model needs its `tokenizer` too.")
    return model, tokenizer


def _data_curve(head: Path, output: Path, settings: FitSettings) -> dict[str, Any]:
    """What more rollouts of the first round would be worth, measured once, if there are directions, prompts enough."""
    training = read_json(head / FIGURES_NAME)
    if "data_curve" not in training:
        store = StateStore.open(output / "states")
        few = len(store.prompts.unique()) < MIN_PROMPTS
        if few or not store.has_directions or store.read_at["every"] > 1:
            return {}
        try:
            training["data_curve"] = data_curve(store, settings.gae_lambda).to_dict()
        # The head is there: what is only said of it stops nothing.
        except (RuntimeError, ValueError) as error:
            logger.warning(f"Whether more responses would help cannot be said: {error}")
            return {}
        write_json(head / FIGURES_NAME, training)
    return {"data_curve": training["data_curve"]}


def _recommend(
    place: Path,
    folders: Sequence[Path],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    rewards: dict[str, RewardFunction],
    settings: FitSettings,
    quiet: bool,
) -> None:
    """
    Let the head in `place`, trained on some rounds, recommend a control. One that somebody set by hand is kept, and
    one found for this KL.
    """
    head, training = ValueHead.from_pretrained(place), read_json(place / FIGURES_NAME)
    known = training.get("recommended", {})
    present = None if head.config.control is None else head.config.control.to_dict()
    # The figures are written before the head: after a stop between the two it has the control that was to be replaced.
    if present not in (None, known.get("control"), known.get("replaces")):
        if known and known["target_kl"] != settings.target_kl:
            logger.warning(
                f"The head keeps {head.config.control}, which `tune` or a person set: no control is found for "
                f"`target_kl` {settings.target_kl:g}. To have one found, set `control` to null in "
                f"{place / CONFIG_NAME}, and run this again."
            )
        return
    if present is not None and present == known.get("control") and known["target_kl"] == settings.target_kl:
        return
    states = [folder / "states" for folder in folders]
    controlled = ReControlForCausalLM.from_model(base, head)
    # Other noise than that of the responses which the held-out figures chose V by.
    sampling = replace(settings, seed=(settings.seed + 1) % 2**32)
    try:
        found = recommend_control(
            controlled,
            tokenizer,
            held_out_prompts(prompts, StateStore.open(*states), settings, NUM_RESPONSES),
            list(rewards.values()),
            sampling,
            target_kl=settings.target_kl,
            combine_rewards=settings.combine_rewards,
            progress=no_progress if quiet else None,
        )
    # A reward may also fail on responses that only control makes.
    except (RuntimeError, ValueError) as error:
        logger.warning(f"The head recommends no control: {error}")
        return
    finally:
        controlled.unload()
    chosen = next(trial for trial in found.trials if trial.control == found.control)
    if chosen.gain[1] <= 0:
        logger.warning(
            f"On {found.prompts} held-out prompts the recommended control ({found.control.method}) is not clearly "
            f"better than the base: {chosen.gain[0]:+.2f} standard deviations of the reward [{chosen.gain[1]:.2f}, "
            f"{chosen.gain[2]:.2f}]. More prompts would tell."
        )
    if found.prompts < _FEW_PROMPTS:
        logger.warning(
            f"The recommended control was chosen on {found.prompts} held-out prompts alone, which say little. Use "
            "more prompts, or a larger `validation_split`."
        )
    recommended = found.to_dict() | {"target_kl": settings.target_kl, "replaces": present}
    write_json(place / FIGURES_NAME, training | {"recommended": recommended})
    head.config.control = found.control
    head.save_pretrained(place)
