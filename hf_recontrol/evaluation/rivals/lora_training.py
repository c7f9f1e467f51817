"""TRL's DPO training of a LoRA adapter on pairs of scored responses, which resumes where it was stopped."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.processes import Processes
from ...data.rollouts import Rollout
from ...modeling.causal_lm import ReControlForCausalLM
from ...utils.extras import needs_extra
from .rival import Bench

with needs_extra("lora", "Training a LoRA adapter"):
    import datasets
    import peft
    import trl
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    from ...training.trainer import last_checkpoint

# What a stop costs at most, and a step.
SECONDS_BETWEEN_CHECKPOINTS = 120


class AdapterTrainer(trl.DPOTrainer):
    """
    TRL's trainer of an adapter, on a copy of the base: it changes its model and its tokenizer.

    Args:
        bench ([`Bench`]):
            Whose base it is.
        pairs (`list[tuple[Rollout, Rollout]]`):
            (the better, the worse response) to one prompt.
        lora (`peft.LoraConfig`):
            The adapter.
        arguments (`dict`):
            Arguments of TRL's `DPOConfig`, as [`dpo_config`] takes them.
        folder (`Path`):
            For the checkpoints.
    """

    def __init__(
        self,
        bench: Bench,
        pairs: Sequence[tuple[Rollout, Rollout]],
        lora: peft.LoraConfig,
        arguments: dict[str, Any],
        folder: Path,
    ):
        model = copy.deepcopy(bench.model)
        if isinstance(model, ReControlForCausalLM):
            model = model.unload()
        rows = [
            {
                "prompt_ids": best.prompt_ids,
                "chosen_ids": best.completion_ids,
                "rejected_ids": worst.completion_ids,
            }
            for best, worst in pairs
        ]
        super().__init__(
            model=model,
            args=dpo_config(arguments, folder, bench.model.device),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(bench.tokenizer),
            peft_config=copy.deepcopy(lora),
        )
        self.add_callback(_Checkpoints)

    def fit(self) -> dict[str, Any]:
        """
        Train, or resume from the last complete checkpoint of an earlier run.

        Returns:
            `dict[str, Any]`: `steps`, and over all runs that led to them `seconds` and `peak_memory_bytes`.
        """
        self.train(resume_from_checkpoint=last_checkpoint(Path(self.args.output_dir), Processes()))
        # Where it resumes, Trainer makes callbacks anew.
        [spent] = [each for each in self.callback_handler.callbacks if isinstance(each, _Checkpoints)]
        return {"steps": self.state.global_step, **spent.state()["attributes"]}

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter alone, in peft's format."""
        # "auto" would ask the Hub for the base's vocabulary.
        self.model.save_pretrained(folder, save_embedding_layers=False)

    # What checkpoints hold of the model.
    def _save(self, output_dir=None, state_dict=None):
        self.save_adapter(output_dir)

    # TRL would tokenize texts, with other ids where tokens merge, and an end where a response was cut.
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class _Checkpoints(TrainerCallback, ExportableState):
    """Has a checkpoint written every few minutes. In it stands what training has taken until then, in all runs."""

    def __init__(self):
        self.seconds = 0.0
        self.peak_memory_bytes: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._begin = time.perf_counter() - self.seconds
        self._saved_at = self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self._begin
        now = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else _peak_memory()
        if now is not None:
            self.peak_memory_bytes = max(now, self.peak_memory_bytes or 0)
        # After the last step the adapter itself is written; Trainer would go one step beyond it if it resumed there.
        if self.seconds - self._saved_at >= SECONDS_BETWEEN_CHECKPOINTS and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self._saved_at = time.perf_counter() - self._begin

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}}


def dpo_config(arguments: dict[str, Any], folder: Path, device: torch.device) -> trl.DPOConfig:
    """
    TRL's arguments for a training on a device that keeps its checkpoints in a folder.

    Raises:
        `ValueError`: if there is no such argument, or the training sets it itself.
    """
    fixed = {
        "output_dir": str(folder),
        # Checkpoints come by the clock.
        "save_strategy": "no",
        "save_total_limit": 1,
        # With all that a resumed training needs to give the same adapter.
        "save_only_model": False,
        "ignore_data_skip": False,
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",
        "use_cpu": device.type == "cpu",
    }
    if taken := sorted(fixed.keys() & arguments.keys()):
        raise ValueError(f"`training_arguments` cannot hold {', '.join(taken)}: the comparison sets them.")
    try:
        with warnings.catch_warnings():
            # TRL itself uses names of arguments that newer transformers replace, and older ones know no others.
            warnings.simplefilter("ignore", FutureWarning)
            return trl.DPOConfig(**fixed, **arguments)
    except TypeError as error:
        raise ValueError(f"`training_arguments`: {error}.") from error


def _peak_memory() -> int | None:
    """Of this process since its start, in bytes; `None` where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
