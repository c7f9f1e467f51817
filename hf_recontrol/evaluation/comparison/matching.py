"""Strengths of equal KL: found for each control on held-out prompts, on its own responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...data.processes import Processes, Progress, progress_bar
from ...data.prompts import Prompts
from ...data.rollouts import Rollout
from ...utils.files import read_json, write_json
from ..intervals import finite
from ..rivals.rival import Bench
from ..strength import for_a_guess, kl_with_interval, strength_at_kl
from .answers import Drawer, kl_of, row_settings
from .entries import Row

logger = logging.get_logger(__name__)

STRENGTHS_NAME = "strengths.json"
# How near the KL must be, relative to what is wanted, and how often a control is sampled until it is.
_TOLERANCE = 0.1
_MAX_SAMPLINGS = 10


class _SpentError(ValueError):
    """No more responses may be drawn."""


def with_strengths(
    folder: Path,
    rows: Sequence[Row],
    bench: Bench,
    held_out: Prompts,
    progress: Progress | None = None,
    max_responses: int | None = None,
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """
    Rows with the strengths that they lack: at each the policy is the row's `target_kl` nats a token from the base, on
    its own responses to held-out prompts. The first process finds them; what was found before is read.

    Args:
        folder (`Path`):
            Keeps what is found, in `strengths.json`.
        held_out ([`Prompts`]):
            None of those that are compared on.
        max_responses (`int`, *optional*):
            Responses to draw for it at most, those of the base aside. With it, rows whose strength is not found are
            left out, with a warning, instead of being an error.

    Returns:
        The rows, and what was found for each of these, by its name and KL: `strength`; `kl`, `low` and `high`, the
        nats a token that it reached on held-out prompts, and their 95 % interval over these; `responses`, how many
        were drawn to find it. Of one that is left out the reason as `failed`, and `responses`.

    Raises:
        `ValueError`: if a control cannot reach a KL, or its KL cannot be measured; names it.
    """
    wanted = [row for row in rows if row.strength is None and row.target_kl is not None]
    if not wanted:
        return list(rows), {}
    processes = Processes()
    error: Exception | None = None
    found: dict[str, dict[str, Any]] = {}
    if processes.index == 0:
        try:
            found = _found(folder, wanted, bench, held_out, progress, max_responses)
        except Exception as caught:  # every process must hear of it, or the others would wait for ever
            error = caught
    [(found, error), *_] = processes.gather((found, error))
    if error is not None:
        raise error
    matches = iter([found[_key(row, bench, held_out)] for row in wanted])
    filled, shown = [], {}
    for row in rows:
        if row in wanted:
            match = next(matches)
            shown[f"{row.entry.name} at KL {row.target_kl:g}"] = match
            if "failed" in match:
                logger.warning(f"It is left out: {match['failed']}")
                continue
            row = replace(row, strength=match["strength"])
        filled.append(row)
    return filled, shown


def _key(row: Row, bench: Bench, held_out: Prompts) -> str:
    return json.dumps(row_settings(row, bench, held_out) | {"kl": row.target_kl}, sort_keys=True)


def _found(
    folder: Path,
    wanted: Sequence[Row],
    bench: Bench,
    held_out: Prompts,
    progress: Progress | None,
    max_responses: int | None,
) -> dict[str, dict[str, Any]]:
    path = folder / STRENGTHS_NAME
    known = read_json(path) if path.is_file() else {}
    found: dict[str, dict[str, Any]] = {}
    drawer = Drawer(bench)
    of_base: list[Rollout] = []
    with progress_bar("strengths", len(wanted), progress) as advance:
        for row in wanted:
            key = _key(row, bench, held_out)
            if key not in known or (max_responses is None and "failed" in known[key]):
                row.rival.prepare()
                of_base = of_base or bench.draw(held_out)
                spent = sum(each.get("responses", 0) for each in found.values())
                left = None if max_responses is None else max_responses - spent
                found[key] = _match(drawer, row, held_out, of_base, left)
                # One that more responses would find is searched for again where more may be drawn.
                if not found[key].pop("spent", False):
                    known[key] = found[key]
                    write_json(path, known)
            else:
                found[key] = known[key]
            advance(1)
    return found


def _match(
    drawer: Drawer, row: Row, held_out: Prompts, of_base: Sequence[Rollout], max_responses: int | None
) -> dict[str, Any]:
    last: list[tuple[float, float, float]] = []
    drawn, few = [0], for_a_guess(of_base)
    asked = {rollout.prompt_number for rollout in few}
    few_prompts = held_out.take(index for index, number in enumerate(held_out.numbers) if number in asked)

    def kl_on_its_own(strength: float, prompts: Prompts = held_out) -> float:
        count = len(of_base) * len(prompts) // len(held_out)
        if max_responses is not None and drawn[0] + count > max_responses:
            raise _SpentError(
                "no responses are left to find its strength with; raise the budget, or try fewer controls"
            )
        drawn[0] += count
        answers, found, _ = drawer.draw(replace(row, strength=strength), prompts)
        kls = [kl_of(row, answer, likelihood) for answer, likelihood in zip(answers, found, strict=True)]
        if None in kls:
            raise ValueError(
                "its KL to the base is not known (it has no `policy`, or top-p and the like reshape what it draws "
                "from): give it `strengths`"
            )
        last[:] = [kl_with_interval([answer.rollout for answer in answers], kls)]
        return last[0][0]

    def kl_on_the_base_s(strength: float) -> float:
        found = drawer.likelihoods_on(replace(row, strength=strength), few, held_out)
        return sum(each.kl for each in found) / max(1, sum(len(rollout.completion_ids) for rollout in few))

    try:
        start = row.rival.start
        # Whose policy cannot be read on others' responses is asked for few of its own first: they may cost much.
        unread = row.rival.policy(start) is None
        near = partial(kl_on_its_own, prompts=few_prompts) if unread else kl_on_the_base_s
        strength = strength_at_kl(
            kl_on_its_own, start, row.target_kl, near, _TOLERANCE, _MAX_SAMPLINGS, row.rival.largest
        )
    except ValueError as error:
        said = f"The control {row.entry.name!r} at {row.target_kl:g} nats a token: {error}"
        if row.entry.instruction is not None:
            said += " Its instruction alone moves the policy too: give it `strengths`, or a larger `kl`."
        if max_responses is None:
            raise ValueError(said) from error
        return {"failed": said, "responses": drawn[0], "spent": isinstance(error, _SpentError)}
    measured = dict(zip(("kl", "low", "high"), map(finite, last[0]), strict=True))
    return {"strength": strength, **measured, "responses": drawn[0]}
