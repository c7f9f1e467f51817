"""Comparisons of several bases or heads: a folder for each, and one table of all."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from ..data.processes import Processes
from ..evaluation.comparison.assembly import TABLE_NAME
from ..evaluation.comparison.figures import Figure
from ..evaluation.comparison.results import FIGURES_JSON_NAME, FIGURES_NAME
from ..evaluation.unseen import load_unseen
from ..heads.base_model import check_base
from ..heads.value_head import ValueHead
from ..settings import CompareSettings
from ..utils.files import atomic_path, check_holds_no, make_folder, read_json
from .compare import compare
from .loading import base_source
from .tune import TUNING_NAME

logger = logging.get_logger(__name__)


def compare_bases(
    bases: Sequence[str],
    heads: Sequence[str],
    rollouts: Sequence[str],
    prompts: Any,
    output: str,
    settings: CompareSettings,
    **inputs,
) -> dict[str, list[Figure]]:
    """
    [`compare`] for each base, each in a folder of `output` that is named after it, on the same prompts. `output` holds
    the tables of all in `table.md`, and all figures in `figures.csv`, with a column `base`.

    Args:
        bases (sequence of `str`):
            Folders or Hub names: none, one for all heads, or one for each head.
        heads (sequence of `str`):
            None, or one for each base; several of one base are compared as if it were several bases.
        rollouts (sequence of `str`):
            None, or a folder for each.
        prompts:
            As for [`compare`].
        inputs:
            All else that [`compare`] takes.

    Returns:
        `dict[str, list[Figure]]`: the figures of each, by the name of its folder.

    Raises:
        `ValueError`, `OSError`: before any comparison if the numbers do not fit, two would be the same, or some head
            or base is not there. Later as `compare` does.
    """
    count = max(len(bases), len(heads))
    own_bases = bases * count if len(bases) == 1 else bases
    for what, given in (("bases", own_bases), ("heads", heads), ("folders of rollouts", rollouts)):
        if given and len(given) != count:
            raise ValueError(
                f"{len(given)} {what} are given for {count} comparisons: give one for each, or none. "
                f"(Bases: {_listed(bases)}; heads: {_listed(heads)}; rollouts: {_listed(rollouts)}.)"
            )
    runs = list(zip(*(given or [None] * count for given in (own_bases, heads, rollouts)), strict=True))
    if twice := [run for run in runs if runs.count(run) > 1]:
        raise ValueError(f"{_listed(filter(None, twice[0]))} is named twice: it would be the same comparison.")
    loaded = [ValueHead.from_pretrained(head, token=settings.token) for head in heads]
    source = base_source(settings)
    for base in bases:
        check_base(base, **source)
        try:
            AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code, **source)
        except (OSError, ValueError) as error:
            raise OSError(f"The base model {base} cannot be used: {error}") from error
    others = {FIGURES_JSON_NAME: "a comparison of one base", TUNING_NAME: "a search for a control"}
    check_holds_no(Path(output), others)
    names = _names(heads if heads and len(set(own_bases)) < count else own_bases)
    # What one head has seen is left out for all, where it is left out, so that they stay comparable.
    prompts = load_unseen(prompts, settings, loaded, "to compare on")
    found = {}
    for name, (base, head, folder) in zip(names, runs, strict=True):
        found[name] = compare(
            base, prompts, output=Path(output) / name, settings=settings, head=head, rollouts=folder, **inputs
        )
    if Processes().index == 0:
        of_several = any(f.metric.startswith("reward ") for figures in found.values() for f in figures)
        _write(make_folder(Path(output)), list(found), loaded if of_several else [])
    Processes().wait()
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _names(sources: Sequence[str]) -> list[str]:
    """A folder's name for each: as many of its last parts as tell them apart; else each has its number behind it."""
    for count in range(1, max(len(Path(source).parts) for source in sources) + 1):
        said = ["-".join(Path(source).parts[-count:]) for source in sources]
        short = [re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "base" for name in said]
        if len({name.lower() for name in short}) == len(short):
            return short
    return [f"{name}-{number}" for number, name in enumerate(short, 1)]


def _write(output: Path, names: Sequence[str], summed_by: Sequence[ValueHead]) -> None:
    lines: list[dict[str, Any]] = []
    for name in names:
        with (output / name / FIGURES_NAME).open(encoding="utf-8", newline="") as file:
            lines += [{"base": name, **line} for line in csv.DictReader(file)]
    with atomic_path(output / FIGURES_NAME) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    about = {name: read_json(output / name / FIGURES_JSON_NAME) for name in names}
    unlike = []
    if len({each["prompts_fingerprint"] for each in about.values()}) > 1:
        said = ", ".join(f"{name} on {each['prompts']}" for name, each in about.items())
        unlike.append(f"These comparisons are not on the same prompts ({said}): do not hold one against another.\n")
    if len({json.dumps([head.config.reward_mean, head.config.reward_std]) for head in summed_by}) > 1:
        unlike.append(
            "`reward`, the sum of several rewards, is in each head's own units: hold the rewards one by one against "
            "those of another head, not their sums.\n"
        )
    for said in unlike:
        logger.warning(said.strip())
    tables = [f"## {name}\n\n{(output / name / TABLE_NAME).read_text(encoding='utf-8')}" for name in names]
    with atomic_path(output / TABLE_NAME) as temporary:
        temporary.write_text("\n".join(unlike + tables), encoding="utf-8")
