"""From prompts and a reward to a head and a report: all four stages in one folder, resumed after any stop."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..collection.kept_states import remove_kept
from ..collection.labels import label_rollouts
from ..collection.rewards import RewardFunction, by_name, check_columns, load_reward, reward_name, vader
from ..collection.rollouts import write_rollouts
from ..collection.states import check_storage, write_states
from ..configuration import ControlConfig, ValueHeadConfig
from ..data.prompts import Prompts, load_prompts
from ..data.rollouts import Rollout, load_rollouts, rollout_parts, stable_number
from ..data.stage_folder import MANIFEST_NAME, Processes, Progress, lock_folder, read_manifest
from ..data.states import States, StateStore
from ..evaluation import match_kl
from ..evaluation.report import write_report
from ..heads.hub import check_base, with_commit
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.hook_points import hook_width
from ..training.advantage import fit_advantage
from ..training.stage import FIGURES_NAME, check_shared, read_json, train_head, write_json
from ..training.trainer import check_options
from ..training.value import split_by_prompt, train_value_head
from ..utils.files import check_target, make_folder

logger = logging.get_logger(__name__)

# How much better than its constant part g must be on held-out prompts to be recommended.
_CLEARLY_BETTER = 1.1


@contextmanager
def _display(stages: Sequence[str], quiet: bool) -> Iterator[Callable[[str], Progress | None]]:
    """One display with a line for each stage; into a file, each stage's own lines."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage: (lambda done, total: None) if quiet else None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = ("{task.description:12}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    with Progress(*columns, console=Console(stderr=True)) as display:
        tasks = {stage: display.add_task(stage, start=False, total=None) for stage in stages}

        def show(stage: str):
            finish()
            display.start_task(tasks[stage])
            return lambda done, total: display.update(tasks[stage], completed=done, total=total)

        def finish():
            """A stage that had nothing to do, since an earlier run has done it, is not left without numbers."""
            for task in display.tasks:
                if task.started and task.total is None:
                    display.update(task.id, completed=1, total=1, description=f"{task.description} (was done)")

        yield show
        finish()


def fit(
    model: str | os.PathLike | PreTrainedModel,
    prompts: Any,
    reward: str | RewardFunction | Sequence[str | RewardFunction],
    output: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    generation_config: GenerationConfig | None = None,
    stop_strings: Sequence[str] = (),
    hook_point: str = "lm_head",
    layer: int = -1,
    states_dtype: str = "auto",
    every: int = 1,
    max_gigabytes: float | None = None,
    keep_states: bool = False,
    head_sizes: Sequence[int] = (1024,),
    advantage_sizes: Sequence[int] | None = (256,),
    value_options: dict[str, Any] | None = None,
    advantage_options: dict[str, Any] | None = None,
    target_kl: float = 0.1,
    batch_size: int = 16,
    part_size: int = 256,
    on_bad_rows: str = "error",
    seed: int = 0,
    dtype: str = "auto",
    quiet: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """
    Everything from prompts to a head: sample responses, score them, read their states, train V and g, find a step
    size, write a report. The same call again goes on where a run was stopped; under `accelerate launch` processes
    share the work.

    Args:
        model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]), tokenizer (*optional*):
            The base: a folder or Hub name, or a loaded model with its tokenizer.
        prompts:
            A file or whatever else [`load_prompts`] takes.
        reward (`str`, function, or sequence of these):
            As for [`load_reward`], or functions; several give several objectives.
        output (`str` or `os.PathLike`):
            Folder for everything made: `rollouts/*.parquet`, `states/`, `head/`, `report.html`.
        num_samples, max_new_tokens, temperature, generation_config, stop_strings, part_size:
            As for [`write_rollouts`].
        hook_point, layer, head_sizes, advantage_sizes:
            As in [`ValueHeadConfig`]. An advantage part needs `hook_point="lm_head"`; elsewhere there is none.
        states_dtype, every, max_gigabytes:
            As for [`write_states`] (there `dtype`).
        keep_states (`bool`, *optional*, defaults to `False`):
            Keep the states while sampling instead of reading them afterwards: faster on a CPU. Until the states are
            written, all of them lie on the disk too, in the base's dtype. See [`write_rollouts`].
        value_options, advantage_options (`dict`, *optional*):
            As for [`train_head`].
        target_kl (`float`, *optional*, defaults to 0.1):
            The head recommends the step size at which control moves the policy by so many nats a token: of the
            advantage edit where g's held-out correlation is a tenth better than that of its constant part, else of the
            ascent.
        batch_size (`int`, *optional*, defaults to 16):
            Sequences in one forward of the base.
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"skip"`: what to do with prompts that cannot be used and rewards that are no numbers.
        seed (`int`, *optional*, defaults to 0), dtype (`str`, *optional*, defaults to `"auto"`):
            Seed of everything random; dtype of a base that is loaded here.
        quiet (`bool`, *optional*, defaults to `False`):
            Show no progress.
        command (`str`, *optional*):
            As for [`train_head`].

    Returns:
        The figures of [`train_head`].

    Raises:
        `ValueError`, `OSError`: before any long work if something cannot be used, see the stages; if `output` was made
        with other settings.
    """
    output = Path(output)
    if not isinstance(prompts, Prompts):
        prompts = load_prompts(prompts, on_bad_rows=on_bad_rows)
    rewards = _rewards(reward, prompts, on_bad_rows)
    value_options = {"seed": seed, "patience": 5, "validation_split": 0.1} | (value_options or {})
    advantage_options = {"patience": 2} | (advantage_options or {})
    if not isinstance(keep_states, bool):
        raise TypeError(f"`keep_states` must be True or False, got {type(keep_states).__name__}.")
    processes = Processes()
    _check_settings(
        prompts, value_options, advantage_options, states_dtype, every, max_gigabytes, target_kl, processes.count
    )
    if processes.index == 0:
        check_target(output / "report.html")
        make_folder(output)
    with lock_folder(output) if processes.index == 0 else nullcontext():
        processes.wait()
        base, tokenizer = _base(model, tokenizer, dtype, processes)
        at_head = hook_point == "lm_head"
        shape = {
            "hook_point": hook_point,
            "layer": layer,
            "head_sizes": list(head_sizes),
            "advantage_sizes": list(advantage_sizes) if at_head and advantage_sizes is not None else None,
        }
        config = ValueHeadConfig(hook_width(base, ValueHeadConfig(1, **shape)), **shape)
        stages = [
            "rollouts",
            "rewards",
            "states",
            "value head",
            *(["advantage"] if config.advantage_sizes is not None else []),
        ]
        with _display(stages, quiet or processes.index > 0) as show:
            write_rollouts(
                output / "rollouts",
                base,
                tokenizer,
                prompts,
                num_samples=num_samples,
                generation_config=generation_config,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_strings=stop_strings,
                batch_size=batch_size,
                part_size=part_size,
                seed=seed,
                on_bad_rows=on_bad_rows,
                # Once states are being written no part of the rollouts is missing.
                keep_states=config if keep_states and not (output / "states" / MANIFEST_NAME).is_file() else None,
                progress=show("rollouts"),
            )
            label_rollouts(output / "rollouts", rewards, on_bad_rows=on_bad_rows, progress=show("rewards"))
            write_states(
                output / "states",
                base,
                output / "rollouts",
                config,
                batch_size=batch_size,
                dtype=states_dtype,
                every=every,
                max_gigabytes=max_gigabytes,
                progress=show("states"),
            )
            if keep_states and processes.index == 0:
                remove_kept(output / "rollouts")
            figures = train_head(
                output / "head",
                output / "states",
                head_sizes=head_sizes,
                advantage_sizes=config.advantage_sizes,
                value_options=value_options,
                advantage_options=advantage_options,
                progress=show,
                command=command,
            )
        if processes.index == 0:
            _recommend(output, base, figures, target_kl)
            _report(output, tokenizer, figures, value_options["validation_split"], value_options["seed"])
        processes.wait()
    return figures


def _check_settings(
    prompts: Prompts,
    value_options: dict[str, Any],
    advantage_options: dict[str, Any],
    states_dtype: str,
    every: int,
    max_gigabytes: float | None,
    target_kl: float,
    num_processes: int,
) -> None:
    """Raise now for what only the last stages would stumble over."""
    for name in ("matplotlib", "pyarrow"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"`fit` needs {name}: `pip install 'hf_recontrol[train]'`.")
    for name, function, options in (
        ("value_options", train_value_head, value_options),
        ("advantage_options", fit_advantage, advantage_options),
    ):
        parameters = inspect.signature(function).parameters
        if unknown := sorted(options.keys() - parameters.keys()):
            raise TypeError(f"`{name}` holds {unknown}, which {function.__name__} does not know.")
        batch_size = options.get("batch_size", parameters["batch_size"].default)
        if batch_size % num_processes:
            raise ValueError(
                f"Training takes batches of {batch_size} responses (`batch_size` in `{name}`), which {num_processes} "
                "processes cannot share evenly: start as many as divide it."
            )
        names = ("learning_rate", "num_epochs", "batch_size", "training_arguments")
        check_options(*(options.get(key, parameters[key].default) for key in names))
    check_shared(advantage_options)
    check_storage(states_dtype, every, max_gigabytes)
    if not target_kl > 0:
        raise ValueError(f"`target_kl` must be above 0, got {target_kl}.")
    numbers = torch.tensor(list({stable_number(row["prompt"]) for row in prompts.rows}))
    # The split itself says what is wrong with it.
    split_by_prompt(
        States(torch.empty(0), torch.empty(0), torch.empty(0), numbers),
        value_options["validation_split"],
        value_options["seed"],
    )


def _rewards(reward, prompts: Prompts, on_bad_rows: str) -> dict[str, RewardFunction]:
    given = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    columns = set(prompts.rows[0]) - {"prompt"}
    if on_bad_rows == "error":
        check_columns([item for item in given if isinstance(item, str)], prompts)
    functions = [load_reward(item, columns) if isinstance(item, str) else item for item in given]
    if vader in functions:
        vader([], [])  # says so if it is not installed
    return by_name(functions, [item if isinstance(item, str) else reward_name(item) for item in given])


def _base(model, tokenizer, dtype: str, processes: Processes):
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("A loaded model needs its `tokenizer` too.")
        return model.eval(), tokenizer
    check_base(model)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    base = with_commit(AutoModelForCausalLM.from_pretrained(model, dtype=dtype))
    return base.eval().to(processes.device), tokenizer


def _recommend(output: Path, base: PreTrainedModel, figures: dict[str, Any], target_kl: float) -> None:
    """
    Give the head the control that moves the policy by `target_kl`, unless it has one that was not found here for
    another: the advantage edit where g is clearly better than its constant part, else the ascent.
    """
    head, known = ValueHead.from_pretrained(output / "head"), read_json(output / "head" / FIGURES_NAME)
    if head.config.control is not None:
        found = known.get("recommended", {})
        if found.get("control") != head.config.control.to_dict() or found["target_kl"] == target_kl:
            return
    # A few responses give the mean KL well enough, at a second or two for each step size tried.
    part = load_rollouts(rollout_parts(output / "rollouts")[0])
    sample = sorted(part, key=lambda rollout: -len(rollout.completion_ids))[:64][::8]
    gained = figures.get("advantage_correlation", 0) > _CLEARLY_BETTER * figures.get("constant_correlation", 0)
    method = "advantage" if gained else "ascent"
    controlled = ReControlForCausalLM.from_model(base, head, ControlConfig(method, 1.0))
    try:
        head.config.control = match_kl(controlled, sample, controlled.control, target_kl)
    except ValueError as error:
        logger.warning(f"The head recommends no step size: {error}")
        return
    finally:
        controlled.unload()
    head.save_pretrained(output / "head")
    recommended = {"target_kl": target_kl, "control": head.config.control.to_dict()}
    write_json(output / "head" / FIGURES_NAME, known | {"recommended": recommended})


def _report(
    output: Path, tokenizer: PreTrainedTokenizerBase, figures: dict[str, Any], validation_split: float, seed: int
) -> None:
    rollouts = read_manifest(output / "rollouts", "rollouts", "recontrol rollout")
    states = read_manifest(output / "states", "states", "recontrol states")
    head = ValueHead.from_pretrained(output / "head")
    count, stored = rollouts["counts"], states["counts"]
    scored = max(count["rollouts"] - count["unscored"], 1)
    names = rollouts["rewards"]
    facts = {
        "Base model": str(rollouts["settings"]["model"]),
        "Reward": ", ".join(f"{name} (mean {count[f'reward {name}'] / scored:.3g})" for name in names),
        "Responses": f"{count['rollouts']}, {count['finished']} of them finished, {count['tokens']} tokens",
        "Left out": f"{rollouts['bad_rows']} prompts, {count['unscored']} responses without a reward",
        "States": f"{stored['states']} at {head.config.hook_point}, {states['settings']['dtype']}, "
        f"{stored['bytes'] / 1e6:.1f} MB",
        "Head": f"V {head.config.head_sizes}, g {head.config.advantage_sizes}",
        "Recommended control": "none" if head.config.control is None else str(head.config.control),
        "Seed": str(seed),
    }
    curves = read_json(output / "head" / FIGURES_NAME)["curves"]
    one = {} if head.config.num_objectives > 1 else {"reward_mean": head.config.reward_mean}
    write_report(
        output / "report.html",
        title=f"A head for {Path(str(rollouts['settings']['model'])).name}",
        facts=facts,
        figures=figures | one,
        curves=curves,
        examples=_examples(output, tokenizer, head, validation_split, seed),
    )


@torch.no_grad()
def _examples(
    output: Path, tokenizer: PreTrainedTokenizerBase, head: ValueHead, validation_split: float, seed: int
) -> list[dict[str, Any]]:
    """Held-out responses with what V says of them: the two highest, middle and lowest of the first hundred."""
    store = StateStore.open(output / "states")
    _, held_out = split_by_prompt(store, validation_split, seed)
    wanted = dict.fromkeys(held_out[:100].tolist())
    number = 0
    for part in rollout_parts(output / "rollouts"):
        for rollout in load_rollouts(part):
            if not rollout.completion_ids or rollout.reward is None:
                continue
            if number in wanted:
                values = head.rewards(head(store.gather("hidden", torch.tensor([number]))))
                wanted[number] = (rollout, values)
            number += 1
        if number > max(wanted):
            break
    found: list[tuple[Rollout, torch.Tensor]] = sorted(wanted.values(), key=lambda item: float(item[1][-1].sum()))
    middle = len(found) // 2
    chosen = found if len(found) <= 6 else [*found[-2:][::-1], *found[middle - 1 : middle + 1], *found[:2][::-1]]
    examples = []
    for rollout, values in chosen:
        example = {
            "prompt": rollout.prompt,
            "completion": rollout.completion,
            "reward": rollout.reward[0] if len(rollout.reward) == 1 else rollout.reward,
            "predicted": values[-1].tolist() if values.shape[1] > 1 else float(values[-1]),
            "finished": rollout.finished,
        }
        if store.place["every"] == 1 and values.shape[1] == 1:
            example["values"] = values[:, 0].tolist()
            example["tokens"] = [tokenizer.decode([token]) for token in rollout.completion_ids]
        examples.append(example)
    return examples
