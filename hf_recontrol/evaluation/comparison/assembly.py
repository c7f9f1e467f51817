"""From answers and scores to what a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.fingerprints import prompt_hashes
from ...data.processes import Processes
from ...data.prompts import Prompts
from ...data.rollouts import Rollout
from ...data.stage_folder import StageFolder
from ...settings import CompareSettings
from ...utils.files import atomic_path
from ..judges.person import PersonJudge
from ..judges.scoring import JudgeScoring
from ..rivals.plain import BestOfN, best_of_n_kl
from ..rivals.rival import Bench
from ..unseen import has_no_record, heads_of, seen_among
from .answers import load_answers
from .entries import Row
from .figures import TIMED_UNDER, Figure, Sample, best_of, figures_of, sample_of
from .plots import write_plots
from .results import ANSWERS_NAME, write_answers, write_figures
from .scores import Scores, best_places, matched_references, wins, with_reward
from .table import table

TABLE_NAME = "table.md"


def write_results(
    output: Path,
    bench: Bench,
    rows: Sequence[Row],
    stages: Sequence[StageFolder],
    scores: Sequence[Scores],
    reference: int,
    prompts: Prompts,
    matches: dict[str, Any],
    settings: CompareSettings,
    judging: JudgeScoring | PersonJudge | None = None,
) -> list[Figure]:
    """
    Figures from all answers and scores; the first process writes the files.

    Raises:
        `ValueError`: if no answer has a number by one of the scorers, or a person has judged other answers.
    """
    loaded = [load_answers(stage) for stage in stages]
    timed = {number for _, measured in loaded for number in measured.pop(TIMED_UNDER, [])}
    earlier = f" What {output / TABLE_NAME} says is of an earlier run." if (output / TABLE_NAME).exists() else ""
    if isinstance(judging, JudgeScoring) and judging.is_silent(judging.counts()):
        raise ValueError(f"{judging.without_verdicts()}{earlier}")
    numbers = [with_reward(bench, measured | own) for (_, measured), own in zip(loaded, scores, strict=True)]
    for name in dict.fromkeys(name for own in scores for name in own):
        if all(value is None for own in scores for value in own[name]):
            said = f"No answer of any control has a number by {name!r}, so there is nothing to compare."
            raise ValueError(f"{said}{earlier}")
    others, held_against = numbers[reference], loaded[reference][0]
    judged_by = "judge" if "judge" in others else "reward"
    if isinstance(judging, PersonJudge):
        for row, (rollouts, _), own in zip(rows, loaded, numbers, strict=True):
            own |= judging.scores(row.entry.name, row.strength, rollouts, held_against)
    held_by = best_places(held_against, others["reward"]) if isinstance(rows[reference].rival, BestOfN) else None
    # Of each row which answers are the very ones that they are held against: the base's own in a pool of the base.
    same: list[np.ndarray] = []
    for (rollouts, _), own in zip(loaded, numbers, strict=True):
        places = matched_references(rollouts, held_against, held_by)
        matched = [held_against[place] for place in places]
        alike = [one.completion == other.completion for one, other in zip(rollouts, matched, strict=True)]
        is_sample = [one.sample == other.sample for one, other in zip(rollouts, matched, strict=True)]
        same.append(np.array(alike) & np.array(is_sample))
        if "win_rate" not in own:
            others_score = [others[judged_by][place] for place in places]
            own["win_rate"], own["ties"] = wins(own[judged_by], others_score, alike)
    judged = None if judging is None else judging.counts()
    places = {number: place for place, number in enumerate(prompts.numbers)}
    drawn = [
        sample_of(row.entry.name, row.strength, rollouts, own, places)
        for row, (rollouts, _), own in zip(rows, loaded, numbers, strict=True)
    ]
    samples: list[Sample] = []
    for row, sample, in_both in zip(rows, drawn, same, strict=True):
        is_pool = isinstance(row.rival, BestOfN)
        samples += [best_of(sample, n, in_both) for n in range(1, row.rival.pool + 1)] if is_pool else [sample]
    said = np.array(prompt_hashes(prompts))
    figures = figures_of(samples, _against(samples, drawn[reference], rows[reference]), len(prompts), said)
    if Processes().index == 0:
        lines: list[tuple[str, float | None, list[Rollout], Scores]] = [
            (row.entry.name, row.strength, rollouts, _of_each(row, own))
            for row, (rollouts, _), own in zip(rows, loaded, numbers, strict=True)
        ]
        write_answers(output / ANSWERS_NAME, lines)
        about = {
            "prompts": len(prompts),
            "prompts_fingerprint": prompts.fingerprint,
            "against": settings.against,
            "strengths": matches,
            "controls": [
                vars(row.entry) | {"strength": row.strength, "depends_on": row.rival.depends_on()} for row in rows
            ],
            "settings": settings.to_dict(),
        } | ({"judged": judged} if judged else {})
        write_figures(output, figures, about)
        pools = list(dict.fromkeys(row.entry.name for row in rows if isinstance(row.rival, BestOfN)))
        notes = [_matched(name, match) for name, match in matches.items()]
        if len(timed) > 1:
            notes.append(
                "Times are not to be compared: some answers were drawn with another batch size, on another device or "
                "by another number of processes."
            )
        if (distinct := len(set(said.tolist()))) < len(prompts):
            notes.append(f"{distinct} of these prompts are different: equal ones are in the intervals together.")
        if has_no_record(heads_of(bench.model)):
            notes.append(
                "The head does not say which prompts it was trained on: that these are unseen is not checked."
            )
        if seen := seen_among(prompts, heads_of(bench.model)):
            notes.append(
                f"{len(seen)} of these prompts are among those that the head was trained, validated or tuned on: on "
                "them a control looks better than it is."
            )
        if judged:
            notes.append(judging.note(judged))
        text = table(figures, settings.against, len(prompts), pools, notes)
        with atomic_path(output / TABLE_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")
        write_plots(output, figures, pools)
    Processes().wait()
    return figures


def _against(samples: Sequence[Sample], drawn: Sample, row: Row) -> Sample:
    """The sample that differences are to: of a best of n that of its whole pool."""
    if not isinstance(row.rival, BestOfN):
        return drawn
    return next(s for s in samples if s.control == row.entry.name and s.strength == row.rival.pool)


def _of_each(row: Row, numbers: Scores) -> Scores:
    """A row's numbers of its answers. Of a pool's answers the KL is until here that of the best of all."""
    if not isinstance(row.rival, BestOfN):
        return numbers
    of_best = best_of_n_kl(row.rival.pool)
    return numbers | {"kl": [None if kl is None else kl - of_best for kl in numbers["kl"]]}


def _matched(name: str, match: dict[str, Any]) -> str:
    low, high = ("?" if match[end] is None else f"{match[end]:.3f}" for end in ("low", "high"))
    return (
        f"{name}: strength {match['strength']:g} reached {match['kl']:.3f} [{low}, {high}] nats a token on held-out "
        "prompts."
    )
