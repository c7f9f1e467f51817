"""The report of a run of [`fit`], put together from the folders of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration import ControlConfig, ValueHeadConfig
from ..data.rollouts import Rollout, load_rollouts, rollout_parts
from ..data.stage_folder import read_manifest
from ..data.states import StateStore
from ..evaluation.data_curve import DataCurve
from ..evaluation.pages.report import write_report
from ..evaluation.trace.texts import TokenTexts
from ..heads.hub import CONFIG_NAME
from ..heads.value_head import ValueHead
from ..settings import TrainingSettings
from ..training.held_out import split_by_prompt
from ..training.stage import FIGURES_NAME
from ..utils.files import read_json
from .run_file import earlier_head

# Held-out responses that examples are chosen from.
_EXAMPLES_READ = 100


def write_run_report(
    output: Path,
    folders: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    figures: dict[str, Any],
    settings: TrainingSettings,
) -> None:
    """
    Write `report.html` of a finished run of [`fit`].

    Args:
        output (`Path`):
            The run's folder.
        folders (sequence of `Path`):
            Those of its rounds.
        tokenizer, figures, settings:
            The base's tokenizer, the figures of [`fit`], and which prompts were held out.
    """
    each = [read_manifest(folder / "rollouts", "rollouts", "recontrol rollout") for folder in folders]
    read = [read_manifest(folder / "states", "states", "recontrol states") for folder in folders]
    rollouts, states = each[0], read[0]
    head = ValueHead.from_pretrained(output / "head")
    count, stored = _summed(each), _summed(read)
    scored = max(count["rollouts"] - count["unscored"], 1)
    names = rollouts["rewards"]
    training = read_json(output / "head" / FIGURES_NAME)
    facts = {
        "Base model": str(rollouts["settings"]["model"]),
        "Reward": ", ".join(f"{name} (mean {count[f'reward {name}'] / scored:.3g})" for name in names),
        "Responses": f"{count['rollouts']}, {count['finished']} of them finished, {count['tokens']} tokens",
        "Left out": f"{rollouts['bad_rows']} prompts, {count['unscored']} responses without a reward",
        "States": f"{stored['states']} at {head.config.hook_point}, {states['settings']['dtype']}, "
        f"{stored['bytes'] / 1e6:.1f} MB",
        "Head": f"V {head.config.head_sizes}, g {head.config.advantage_sizes}",
        "Recommended control": "none" if head.config.control is None else str(head.config.control),
        **_compared(training.get("recommended")),
        **(_by_round(output, each) if len(each) > 1 else {}),
        **({"More responses": DataCurve(**figures["data_curve"]).text} if "data_curve" in figures else {}),
        "Seed": str(settings.seed),
    }
    one = {} if head.config.num_objectives > 1 else {"reward_mean": head.config.reward_mean}
    write_report(
        output / "report.html",
        title=f"A head for {Path(str(rollouts['settings']['model'])).name}",
        facts=facts,
        figures=figures | one,
        curves=training["curves"],
        examples=_examples(folders, tokenizer, head, settings),
    )


def _summed(manifests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The counts of some folders, together."""
    counts = [manifest["counts"] for manifest in manifests]
    return {name: sum(count.get(name, 0) for count in counts) for name in counts[0]}


def _by_round(output: Path, rollouts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of each round what its responses earned, and what its head's control earns on held-out prompts."""
    texts = {}
    for number, manifest in enumerate(rollouts, 1):
        count = manifest["counts"]
        scored = max(count["rollouts"] - count["unscored"], 1)
        means = ", ".join(f"{count[f'reward {name}'] / scored:.3g}" for name in manifest["rewards"])
        text = f"{count['rollouts']} responses, mean reward {means}"
        head = earlier_head(output, number) if number < len(rollouts) else output / "head"
        control = ValueHeadConfig.from_json_file(head / CONFIG_NAME).control
        if control is not None:
            text += f"; its head recommends {control.method} at step size {control.step_size:g}"
            text += _on_held_out(read_json(head / FIGURES_NAME).get("recommended"), control)
        texts[f"Round {number}"] = text
    return texts


def _on_held_out(recommended: dict[str, Any] | None, control: ControlConfig) -> str:
    """What was measured of a control and the base, unless somebody set another control by hand."""
    base, *trials = (recommended or {}).get("trials") or [None]
    measured = next((trial for trial in trials if trial["control"] == control.to_dict()), None)
    if measured is None:
        return ""
    own, others = (", ".join(f"{mean:.3g}" for mean in trial["reward"]) for trial in (measured, base))
    return f" (on held-out prompts reward {own}, the base's {others}, at KL {measured['kl']:.2f} a token)"


def _compared(recommended: dict[str, Any] | None) -> dict[str, str]:
    """What the recommended control was chosen from."""
    if recommended is None:
        return {}
    texts = []
    for trial in recommended["trials"]:
        reward = ", ".join(f"{mean:.3g}" for mean in trial["reward"])
        if trial["control"] is None:
            texts.append(f"base: reward {reward}")
            continue
        gain, *ends = ("unknown" if value is None else f"{value:+.2f}" for value in trial["gain"])
        bounds = (trial.get(name) for name in ("kl_low", "kl_high"))
        kl_ends = ", ".join("unknown" if value is None else f"{value:.2f}" for value in bounds)
        texts.append(
            f"{trial['control']['method']} at step size {trial['control']['step_size']:g}: reward {reward}, "
            f"{gain} [{', '.join(ends)}] standard deviations over the base, KL {trial['kl']:.2f} [{kl_ends}]"
        )
    on = f"{recommended['responses']} responses to {recommended['prompts']} held-out prompts"
    return {"Controls compared": f"{'; '.join(texts)} (on {on}; 95 % intervals, those of rewards paired)"}


@torch.no_grad()
def _examples(
    folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, head: ValueHead, settings: TrainingSettings
) -> list[dict[str, Any]]:
    """
    Held-out responses of the last round with what V says of them: the two highest, middle and lowest of the first
    ones.
    """
    store = StateStore.open(*(folder / "states" for folder in folders))
    _, held_out = split_by_prompt(store.prompts, settings.validation_split, settings.seed)
    number = len(store) - len(StateStore.open(folders[-1] / "states"))
    wanted = dict.fromkeys(held_out[held_out >= number][:_EXAMPLES_READ].tolist())
    for part in rollout_parts(folders[-1] / "rollouts"):
        for rollout in load_rollouts(part):
            if not rollout.completion_ids or rollout.reward is None:
                continue
            if number in wanted:
                values = head.rewards(head(store.gather("hidden", torch.tensor([number]))))
                wanted[number] = (rollout, values)
            number += 1
        if number > max(wanted, default=-1):
            break
    found: list[tuple[Rollout, torch.Tensor]] = sorted(wanted.values(), key=lambda item: float(item[1][-1].sum()))
    middle = len(found) // 2
    chosen = found if len(found) <= 6 else [*found[-2:][::-1], *found[middle - 1 : middle + 1], *found[:2][::-1]]
    texts, examples = TokenTexts(tokenizer), []
    for rollout, values in chosen:
        example = {
            "prompt": rollout.prompt,
            "completion": rollout.completion,
            "reward": rollout.reward[0] if len(rollout.reward) == 1 else rollout.reward,
            "predicted": values[-1].tolist() if values.shape[1] > 1 else float(values[-1]),
            "finished": rollout.finished,
        }
        if store.read_at["every"] == 1 and values.shape[1] == 1:
            example["values"] = values[:, 0].tolist()
            example["tokens"] = texts.of_response(rollout.completion_ids)
        examples.append(example)
    return examples
