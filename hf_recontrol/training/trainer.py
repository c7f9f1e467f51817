"""transformers' Trainer over whole episodes of a state store: batches, held-out figures, checkpoints that survive."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..data.processes import Processes, Progress, progress_bar
from ..data.stage_folder import check_settings
from ..heads.value_head import ValueHead
from ..settings import INDIFFERENT, TrainingSettings
from ..utils.checks import check_choice
from ..utils.extras import needs_extra
from ..utils.files import make_folder, read_json, write_json
from .targets import Episodes

with needs_extra("train", "Training"):
    from transformers import (
        EarlyStoppingCallback,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
        get_scheduler,
    )
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType, get_last_checkpoint

logger = logging.get_logger(__name__)
# Checkpoints of a small head follow each other so fast that Trainer doubts the clock, at each of them.
logging.get_logger("transformers.trainer_utils").addFilter(lambda record: "mtime may not" not in record.getMessage())


# What a training was of, beside its checkpoints.
_KNOWN_NAME = "training.json"


class EpisodeTrainer(Trainer):
    """
    Trainer of one part of a head. Subclasses give `compute_loss` and `figures`.

    The loss of a batch is a sum over its states divided by what an average batch holds, a constant, so that the mean
    over processes is that of one process with all of the batch.

    Args:
        model (`nn.Module`):
            What maps a batch's states to the trained part's outputs.
        train, held_out ([`Episodes`]):
            Training and held-out episodes.
        options (`dict`):
            Arguments of [`~transformers.TrainingArguments`], see [`training_options`], and `batch_size`: episodes in
            a batch, over all processes.
        metric (`str`):
            Which figure is to become small: it chooses the checkpoint.
        description (`str`):
            What the progress bar says.
        patience (`int`, *optional*):
            Epochs without a better one before training stops.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (steps done, steps in all) instead of showing a bar.
        targets (`dict`, *optional*), start (`dict`, *optional*):
            What else the result depends on, as JSON: how the targets are made, and what training starts from. Another
            run does not go on from checkpoints of this one.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Episodes,
        held_out: Episodes,
        options: dict[str, Any],
        metric: str,
        description: str,
        patience: int | None = None,
        progress: Progress | None = None,
        targets: dict[str, Any] | None = None,
        start: dict[str, Any] | None = None,
    ):
        known = {
            "trainer": f"{type(self).__module__}.{type(self).__qualname__}",
            "options": {name: value for name, value in options.items() if name not in INDIFFERENT},
            "patience": patience,
            "targets": targets or {},
            "start": start or {},
            "episodes": [train.fingerprint(), held_out.fingerprint()],
        }
        self._known = json.loads(json.dumps(known, default=str))
        self.processes = Processes()
        self.held_out = held_out
        self.metric = metric
        self.mean_length = float(train.store.lengths[train.episodes].double().mean())
        options = dict(options)
        batch_size = options.pop("batch_size")
        # Incomplete batches are dropped; of few episodes nothing would be left.
        share = max(1, min(batch_size, len(train)) // self.processes.count)
        options["per_device_train_batch_size"] = share
        arguments = _training_arguments(options, metric, self.processes)
        super().__init__(model=model, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=_same)
        self.remove_callback(PrinterCallback)
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))
        self.add_callback(_Report(description, progress))

    def figures(self) -> dict[str, Any]:
        """Figures on the held-out episodes, the same in every process."""
        raise NotImplementedError

    def normaliser(self, batch: dict[str, torch.Tensor]) -> float:
        """What a batch's summed loss is divided by: how many terms an average batch of as many episodes has."""
        return len(batch["lengths"]) * self.mean_length

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """[`EpisodeTrainer.figures`], logged. Its arguments are those of the base and not used."""
        training = self.model.training
        self.model.eval()
        figures = self.figures()
        self.model.train(training)
        metrics = {f"eval_{name}": value for name, value in figures.items() if isinstance(value, (int, float))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def fit(self) -> bool:
        """
        Train, or resume where an earlier run was stopped, and load the best checkpoint's weights.

        Returns:
            Whether any epoch had a finite error.

        Raises:
            `ValueError`: if the checkpoints in the folder are of other data or settings; names these.
        """
        self._check_folder()
        checkpoint = last_checkpoint(Path(self.args.output_dir), self.processes)
        if checkpoint is not None and self._was_finished(checkpoint):
            self._load_best_model()
        else:
            self.train(resume_from_checkpoint=checkpoint)
        found = self.state.best_metric is not None and bool(np.isfinite(self.state.best_metric))
        if not found and self.processes.index == 0:
            # Nothing to go on from: the next run may have other settings.
            _remove_checkpoints(Path(self.args.output_dir))
            (Path(self.args.output_dir) / _KNOWN_NAME).unlink(missing_ok=True)
        self.processes.wait()
        return found

    def _check_folder(self) -> None:
        """Raise unless a folder's checkpoints, if there are any, are of this very training."""
        folder = Path(self.args.output_dir)
        if self.processes.index == 0:
            if (folder / _KNOWN_NAME).is_file():
                check_settings(folder, read_json(folder / _KNOWN_NAME), self._known)
            write_json(make_folder(folder) / _KNOWN_NAME, self._known)
        self.processes.wait()

    def _was_finished(self, checkpoint: str) -> bool:
        """
        Whether training had come to its end at a checkpoint, whose state is then taken over. Trainer itself would
        train for another epoch after an early stop.
        """
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        stopper = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        stopped = stopper is not None and (
            stopper["attributes"]["early_stopping_patience_counter"] >= stopper["args"]["early_stopping_patience"]
        )
        if not (stopped or state.global_step >= state.max_steps):
            return False
        if state.best_model_checkpoint is None:
            return False
        # The folder may have been moved since; Trainer itself sees to that where it resumes.
        state.best_model_checkpoint = str(Path(checkpoint).with_name(Path(state.best_model_checkpoint).name))
        self.state = state
        return True


def _same(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


class _Report(TrainerCallback):
    """Tells `progress` or a bar how many steps are done."""

    def __init__(self, description: str, progress: Progress | None):
        self.description, self.progress = description, progress

    def on_train_begin(self, args, state, control, **kwargs):
        index = 0 if state.is_world_process_zero else 1
        self._bar = progress_bar(self.description, state.max_steps, self.progress, index)
        self._advance = self._bar.__enter__()
        self._advance(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._advance(1)

    def on_train_end(self, args, state, control, **kwargs):
        # Early stopping may have come before the last step.
        self._advance(state.max_steps - state.global_step)
        self._bar.__exit__(None, None, None)


def shape_of(head: ValueHead) -> dict[str, Any]:
    """What a head is before any training, as JSON."""
    names = ("head_sizes", "activation", "advantage_sizes", "static_vector", "token_bias_size")
    return {name: getattr(head.config, name) for name in names}


def training_options(
    settings: TrainingSettings,
    output_dir: str | os.PathLike,
    learning_rate: float,
    num_epochs: int,
    weight_decay: float,
) -> dict[str, Any]:
    """The options of an [`EpisodeTrainer`]."""
    return {
        "output_dir": os.path.abspath(output_dir),
        "batch_size": settings.train_batch_size,
        "learning_rate": learning_rate,
        "num_train_epochs": num_epochs,
        "weight_decay": weight_decay,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "bf16": settings.bf16,
        "dataloader_num_workers": settings.dataloader_num_workers,
        "report_to": settings.report_to,
        **settings.training_arguments,
    }


def _training_arguments(options: dict[str, Any], metric: str, processes: Processes) -> TrainingArguments:
    """What transformers' Trainer is told, with `options` over our defaults, in this process."""
    arguments = TrainingArguments(
        **{
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{metric}",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": [],
            "dataloader_drop_last": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "ddp_find_unused_parameters": False,
            # They set the device of the whole process, also where they are only made to be checked.
            "use_cpu": processes.device.type == "cpu",
            # Trainer's own bar also prints every log.
            "disable_tqdm": True,
        }
        | options
    )
    # One process trains on one device. With several, Trainer would take a batch for each (DataParallel).
    arguments._n_gpu = 1
    return arguments


# Arguments of TrainingArguments that settings of ours stand for, or that decide where a part's checkpoints lie and
# which of them is kept.
_OURS = (
    "data_seed",
    "greater_is_better",
    "learning_rate",
    "load_best_model_at_end",
    "metric_for_best_model",
    "num_train_epochs",
    "output_dir",
    "per_device_train_batch_size",
    "seed",
    "weight_decay",
)


def check_training(settings: TrainingSettings, processes: Processes) -> None:
    """
    Check what only a Trainer would stumble over.

    Raises:
        `ValueError`: if the processes cannot share a batch evenly, there is no such schedule or tracker, or
        TrainingArguments do not take the further arguments; names them.
    """
    if settings.train_batch_size % processes.count:
        raise ValueError(
            f"Training takes batches of {settings.train_batch_size} responses (`train_batch_size`), which "
            f"{processes.count} processes cannot share evenly: start as many as divide it."
        )
    arguments = settings.training_arguments
    if unknown := sorted(arguments.keys() - {field.name for field in fields(TrainingArguments)}):
        raise ValueError(f"`training_arguments` holds {unknown}, which TrainingArguments does not know.")
    if ours := sorted(arguments.keys() & set(_OURS)):
        raise ValueError(f"`training_arguments` must not hold {ours}: use the settings of that kind.")
    check_choice("lr_scheduler_type", settings.lr_scheduler_type, tuple(kind.value for kind in SchedulerType))
    try:
        for callback in get_reporting_integration_callbacks(settings.report_to):
            callback()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"`report_to={settings.report_to!r}` cannot be used: {error}") from error
    numbers = {field.name for field in fields(TrainingArguments) if field.type in (float, "float")}
    if texts := sorted(name for name in arguments.keys() & numbers if isinstance(arguments[name], str)):
        raise ValueError(f"`training_arguments` holds texts for the numbers {texts}.")
    options = training_options(settings, os.curdir, learning_rate=1.0, num_epochs=1, weight_decay=0.0)
    del options["batch_size"]
    try:
        made = _training_arguments(options, "error", processes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`training_arguments` cannot be used: {error}") from error
    _check_schedule(made)


def _check_schedule(arguments: TrainingArguments) -> None:
    """Raise `ValueError` if the schedule of the learning rate cannot be made, as Trainer makes it."""
    steps = 100
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The schedule {arguments.lr_scheduler_type.value} (`lr_scheduler_type`) cannot be made: {error}. Give "
            "what it needs as `lr_scheduler_kwargs` in `training_arguments`, or take another one."
        ) from error


def last_checkpoint(folder: Path, processes: Processes) -> str | None:
    """The last complete checkpoint of a Trainer in a folder, the same in every process; the incomplete are removed."""
    if processes.index == 0:
        _drop_unfinished_checkpoints(folder)
    processes.wait()
    return get_last_checkpoint(folder) if folder.is_dir() else None


def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)


def _drop_unfinished_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a killed run was writing or removing: Trainer writes the state of training last."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.info(f"{path} is not complete and is removed.")
            shutil.rmtree(path)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and leave the caller's generators (torch's, numpy's, Python's) as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
