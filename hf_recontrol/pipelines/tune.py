"""`recontrol tune`: the control that a head recommends, searched for on held-out prompts and written into the head."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..collection.sampling import sampling_config, seed_apart
from ..collection.scoring.responses import check_rows, check_tells_answers_apart, try_rewards
from ..collection.scoring.rewards import RewardFunction, named_rewards
from ..configuration import ControlConfig
from ..data.fingerprints import distinct, head_fingerprint, prompt_hashes
from ..data.processes import Processes, no_progress
from ..data.prompts import Prompts
from ..data.stage_folder import shared_folder
from ..evaluation.comparison.answers import usable_prompts
from ..evaluation.comparison.assembly import TABLE_NAME
from ..evaluation.comparison.entries import without_twins
from ..evaluation.comparison.matching import with_strengths
from ..evaluation.comparison.plots import write_plots
from ..evaluation.comparison.scores import scorers_of
from ..evaluation.metrics import knows_units
from ..evaluation.rivals.rival import Bench
from ..evaluation.strength import warn_of_other_temperature
from ..evaluation.tuning import Found, by_metric, fewest_responses, rows_to_try, search, summary, weights_of
from ..evaluation.unseen import TRAINED_ON, has_no_record, load_unseen, seen_among, unseen
from ..heads.card import is_untouched
from ..heads.hub import CARD_NAME, CONFIG_NAME, is_cached
from ..heads.seen_prompts import SeenPrompts
from ..heads.value_head import ValueHead
from ..settings import HELD_OUT_PROMPTS, TuneSettings
from ..utils.extras import needs_extra
from ..utils.files import check_holds_no, check_target, read_json, write_json
from .loading import base_with_head, check_one

logger = logging.get_logger(__name__)

TUNING_NAME = "tuning.json"


def tune(
    head: str | os.PathLike,
    prompts: Any,
    rewards: str | RewardFunction | Sequence[str | RewardFunction],
    output: str | os.PathLike,
    settings: TuneSettings | None = None,
    *,
    base: str | os.PathLike | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    **changes,
) -> dict[str, Any]:
    """
    Search for the control that a head should recommend, and write it into the head: its method, step size, steps and
    guards, by what they do on prompts that the head was not trained on. The same call again resumes a search that was
    stopped; under `accelerate launch` processes share the work.

    Of all controls to try those at a KL have their step sizes found first. Then all answer the same prompts with the
    same noise; as the budget shrinks, the better half goes on to more prompts. Of the last ones that with most of the
    criterion is chosen, or a simpler one if the paired 95 % interval of their difference holds 0. If the base has
    clearly more of it than that one, the head is left as it was.

    The head (`head` itself if it is a folder, else, and from the Hub's cache, a copy in `output/head`) then recommends
    that control, its card shows its figures, and it remembers the prompts, so that [`compare`] refuses to compare on
    them. `output` holds `tuning.json` (all controls with their figures, and what the head recommended before) and
    `frontier.svg` (reward against nats an answer).

    Args:
        head (`str` or `os.PathLike`):
            The head: a folder or Hub name.
        prompts:
            Prompts that it was not trained on, and that nothing will be measured on later: a file or whatever else
            [`load_prompts`] takes. Those that it was validated on will do.
        rewards (`str`, function, or sequence of these):
            What the head was trained on: as for [`load_reward`], or functions.
        output (`str` or `os.PathLike`):
            A folder for what is made.
        settings ([`TuneSettings`], *optional*), changes:
            What is tried, and how the best is told; single settings as keywords.
        base (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*), tokenizer (*optional*):
            The base, by default that which the head names; of a loaded model its tokenizer too.
        quiet (`bool`, *optional*, defaults to `False`):
            Show no progress.

    Returns:
        `dict[str, Any]`: what `tuning.json` holds.

    Raises:
        `ValueError`, `OSError`, `TypeError`, `ImportError`: for what cannot be searched or measured; before any long
        work where it can be known.
    """
    settings, output = TuneSettings.of(settings, changes), Path(output)
    check_one(head=head, base=base)
    with needs_extra("compare", "Plots"):
        import matplotlib  # noqa: F401
    target = tuned_head(head, output)
    for path in (output / TUNING_NAME, target / CONFIG_NAME):
        check_target(path)
    check_holds_no(output, {TABLE_NAME: "a comparison"})
    loaded = ValueHead.from_pretrained(head, token=settings.token)
    prompts = load_unseen(prompts, settings, [loaded], "to tune on", TRAINED_ON)
    functions = named_rewards(rewards, prompts.columns)
    check_tells_answers_apart(functions.values())
    check_rows(functions, prompts, settings.on_bad_rows, settings.combine_rewards)
    weights = weights_of(settings, list(functions))
    try_rewards(functions, prompts, settings.on_bad_rows)
    scorers = scorers_of(functions, settings)
    summed = "reward" in weights and len(functions) > 1 and settings.combine_rewards == "none"
    if summed and not knows_units(loaded.config, list(functions)):
        logger.warning(
            f"`criterion` weighs the sum of {', '.join(functions)} as they are: the head does not say that it was "
            "trained on rewards of these names, so their scales are not known. To weigh each: `reward NAME`."
        )
    # With the base it may be moved to another device.
    unchanged = copy.deepcopy(loaded)
    if target != Path(head):
        _check_same(target, loaded, "holds another head: name another `output`")
    if has_no_record([loaded]):
        logger.warning("The head does not say which prompts it was trained on: that these are others is not checked.")
    prompts = unseen(prompts, [loaded], "to tune on", settings.on_seen_prompts, TRAINED_ON)
    former = _former(output, loaded)
    with base_with_head(base, loaded, tokenizer, settings) as (model, tokenizer):
        # With the head's own noise, prompts that it was validated on would get the responses that chose its weights.
        drawing = replace(settings, seed=seed_apart(settings.seed, "tune"))
        warn_of_other_temperature([loaded], sampling_config(model, tokenizer, drawing))
        bench = Bench(
            model, tokenizer, drawing, functions, folder=output / "made", combine_rewards=settings.combine_rewards
        )
        rows = rows_to_try(bench, settings, former)
        prompts = _in_order(usable_prompts(bench, [], prompts, settings.on_bad_rows), settings.seed)
        num_samples, for_strengths = settings.num_samples, settings.budget // 2 if settings.kl else 0
        few = prompts.take(range(min(len(prompts), HELD_OUT_PROMPTS)))
        of_base = len(few) * num_samples if settings.kl else 0
        fewest = fewest_responses(len(rows), len(prompts), num_samples)
        if settings.kl:
            # Each step size takes one round of responses at least.
            fewest = 2 * max(fewest, (len(rows) + 1) * of_base)
        if settings.budget < fewest:
            halves = ", half of them to find step sizes" if settings.kl else ""
            raise ValueError(
                f"A `budget` of {settings.budget} responses is too small to compare {len(rows)} controls: it takes "
                f"{fewest} or more{halves}. Raise it, or try fewer controls."
            )
        progress = no_progress if quiet else None
        with shared_folder(output):
            rows, matches = with_strengths(output, rows, bench, few, progress, for_strengths - of_base)
            rows = without_twins(rows)
            if not rows:
                raise ValueError("No control could be tried: see the warnings.")
            spent = of_base + sum(match["responses"] for match in matches.values())
            found = search(output, rows, bench, prompts, scorers, weights, settings, settings.budget - spent, progress)
            result = _result(found, former, matches, weights, spent, settings)
            if Processes().index == 0:
                used = prompts.take(range(max(found.prompts, len(few) if matches else 0)))
                _write(output, unchanged, target, found, result, used)
            Processes().wait()
    return result


def tuned_head(head: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Where a tuned head is written: into its own folder, or, if it is none or is cached, into a copy in `output`."""
    folder = Path(head)
    return folder if folder.is_dir() and not is_cached(folder) else Path(output) / "head"


def _check_same(folder: Path, head: ValueHead, otherwise: str) -> ValueHead | None:
    """The head that a folder holds, if there is one; `ValueError` if it makes other edits than `head`."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    found = ValueHead.from_pretrained(folder)
    if head_fingerprint(found) != head_fingerprint(head):
        raise ValueError(f"{folder} {otherwise}.")
    return found


def _former(output: Path, head: ValueHead) -> ControlConfig | None:
    """What the head recommended before the search, also if this one has written its own into it."""
    present = head.config.control
    if (output / TUNING_NAME).is_file():
        known = read_json(output / TUNING_NAME)
        if present is not None and present.to_dict() == known["control"]:
            return None if known["replaces"] is None else ControlConfig.from_dict(known["replaces"])
    return present


def _in_order(prompts: Prompts, seed: int) -> Prompts:
    """Each prompt once, in an order that depends on the seed."""
    once = distinct(prompts)
    return once.take(torch.randperm(len(once), generator=torch.Generator().manual_seed(seed)).tolist())


def _result(
    found: Found,
    former: ControlConfig | None,
    matches: dict[str, Any],
    weights: dict[str, float],
    spent: int,
    settings: TuneSettings,
) -> dict[str, Any]:
    return {
        "control": found.chosen.control.to_dict(),
        "written": found.chosen.gain[2] >= 0,
        "replaces": former and former.to_dict(),
        "criterion": settings.criterion,
        "weights": weights,
        "prompts": found.prompts,
        "responses": spent + found.responses,
        "base": by_metric(found.base),
        "candidates": [
            summary(candidate) | {"last_round": any(candidate is each for each in found.finalists)}
            for candidate in found.candidates
        ],
        "strengths": matches,
        "settings": json.loads(json.dumps(settings.to_dict(), default=str)),
    }


def _write(
    output: Path,
    saved: ValueHead,
    target: Path,
    found: Found,
    result: dict[str, Any],
    prompts: Prompts,
) -> None:
    """The result, its plot, and the head with what was found, unless the base is clearly better."""
    chosen = found.chosen
    if chosen.gain[1] <= 0:
        logger.warning(
            f"On {chosen.prompts} prompts the best control ({chosen.row.label}) is "
            f"{'not clearly better' if result['written'] else 'clearly worse'} than the base by "
            f"{_said(result['weights'])}: {chosen.gain[0]:+.3f} [{chosen.gain[1]:.3f}, {chosen.gain[2]:.3f}]. "
            f"{'More prompts would tell.' if result['written'] else 'The head is left as it was.'}"
        )
    figures = [*found.base, *(figure for candidate in found.candidates for figure in candidate.figures)]
    write_plots(output, figures, names=["frontier.svg"], marked=(chosen.row.entry.name, chosen.row.strength))
    # Before the head: after a stop between the two the next run knows what the head recommended before.
    write_json(output / TUNING_NAME, result)
    if not result["written"]:
        return
    # A search takes hours: what was written into the head meanwhile is not to be lost.
    by_now = _check_same(
        target,
        saved,
        f"was changed while its control was searched for, and is left as it is. What was found for the head that it "
        f"was is in {output / TUNING_NAME}; for the new one run this again",
    )
    records = [head.seen_prompts for head in (saved, by_now) if head is not None and head.seen_prompts is not None]
    seen = {kind: [getattr(record, kind) for record in records] for kind in SeenPrompts.kinds()}
    seen["tuned_on"].append(torch.tensor(prompt_hashes(prompts)))
    trained_on = len(seen_among(prompts, [saved], TRAINED_ON))
    saved = by_now or saved
    saved.seen_prompts = SeenPrompts(**{kind: torch.cat(each) for kind, each in seen.items() if each})
    saved.config.control = chosen.control
    saved.config.control_figures = {
        "control": chosen.control.to_dict(),
        "criterion": _said(result["weights"]),
        "prompts": chosen.prompts,
        "counted": chosen.counted,
        "trained_on": trained_on,
        "figures": summary(chosen)["figures"],
    }
    saved.save_pretrained(target)
    card = target / CARD_NAME
    if not is_untouched(card.read_text(encoding="utf-8", errors="replace")):
        logger.warning(
            f"{card} is not as this package wrote it, so it is kept: what it says of the recommended control may be "
            "true of an earlier one. To have it written anew, delete it and run this again."
        )


def _said(weights: dict[str, float]) -> str:
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
