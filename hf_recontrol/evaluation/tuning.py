"""The search for the control that a head should recommend: by any criterion, within a budget of responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..configuration import ControlConfig
from ..data.processes import Progress
from ..data.prompts import Prompts
from ..data.rollouts import Rollout
from ..heads.value_head import ValueHead
from ..modeling.checks import check_not_idle
from ..settings import TuneSettings
from .comparison.answers import draw_answers, load_answers
from .comparison.entries import KIND_OF_METHOD, Entry, Row
from .comparison.figures import METRICS, Figure, Sample, figures_of, prompts_with, sample_of, values_on
from .comparison.scores import Scorer, Scores, score_answers, with_reward
from .intervals import choices, finite, with_interval
from .recommendation import candidates, simplest_of_the_best
from .rivals.kinds import make_rival
from .rivals.rival import Bench

logger = logging.get_logger(__name__)

_BASE = "base"
# What the named criteria are sums of.
_WEIGHTS = {"reward_at_kl": {"reward": 1.0}, "paper": {"coherence": 1.0, "diversity": 1.0, "reward": 1.0}}
# Metrics that a control is no better for: what it is held against another one by, what is no sum over answers, or what
# all answers of a part have in common, so that no interval over prompts says how sure it is.
_NO_CRITERION = ("judge", "win_rate", "ties", "reward_worst_tenth", "seconds", "tokens_per_second")
# On fewer prompts nobody can tell controls apart.
_FEWEST_PROMPTS = 8
# So many controls are left in the last round, if there were more.
_LAST = 2


@dataclass
class Candidate:
    """
    A control that is tried, and what was measured of it in the last round that it was in.

    Args:
        row ([`Row`]), control ([`ControlConfig`]):
            The control at one step size.
        prompts, counted (`int`):
            How many it was measured on, and for how many of them all in its round have the criterion's numbers.
        value, gain (`tuple[float, float, float]`):
            The criterion, and how much more of it than the base it has, over the prompts that count; each with the
            ends of its 95 % interval.
        figures (`list[Figure]`):
            All its figures.
    """

    row: Row
    control: ControlConfig
    prompts: int = 0
    counted: int = 0
    value: tuple[float, float, float] = (math.nan, -math.inf, math.inf)
    gain: tuple[float, float, float] = (math.nan, -math.inf, math.inf)
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Found:
    """
    What a search found.

    Args:
        chosen ([`Candidate`]):
            The control to recommend.
        candidates (`list[Candidate]`):
            All that were measured, the simplest first.
        finalists (`list[Candidate]`):
            Those of the last round.
        base (`list[Figure]`):
            The base's figures, on all prompts.
        prompts, responses (`int`):
            How many prompts were used, and how many responses drawn.
    """

    chosen: Candidate
    candidates: list[Candidate]
    finalists: list[Candidate]
    base: list[Figure]
    prompts: int
    responses: int


def weights_of(settings: TuneSettings, rewards: Sequence[str]) -> dict[str, float]:
    """
    The criterion as weights of metrics.

    Raises:
        `ValueError`: if there is no such metric here, or it cannot be measured; says what is missing.
    """
    criterion = settings.criterion
    weights = dict(criterion) if isinstance(criterion, Mapping) else _WEIGHTS[criterion]
    known = [name for name in METRICS if name not in _NO_CRITERION]
    if len(rewards) > 1 and settings.combine_rewards == "none":
        known += [f"reward {name}" for name in rewards]
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"`criterion` weighs {unknown[0]!r}, which must be one of {', '.join(known)}.")
    if "coherence" in weights and settings.embeddings is None:
        raise ValueError(
            "The criterion counts coherence, which needs a model of sentence-transformers: name it, `embeddings` "
            "(`--embeddings`)."
        )
    return weights


def rows_to_try(bench: Bench, settings: TuneSettings, former: ControlConfig | None) -> list[Row]:
    """
    The controls to try, the simplest first: static, advantage, ascent; of each that with the lower plausibility, with
    no limit on the KL before a wider one, with fewer steps, and nearer the base. Rows whose step size is still to be
    found have a `target_kl` instead.

    Args:
        former ([`ControlConfig`], *optional*):
            What the head recommended so far. What is not searched stays: its guards (`plausibility`, `max_kl`), which
            mean the same for every method, and, if it is an ascent, `num_steps`, `l2` and `target` for the ascent.

    Raises:
        `ValueError`: if the head cannot do what is asked for.
    """
    head: ValueHead = bench.head_for("tune")
    has = []
    for start in candidates(head) if not settings.methods else ():
        try:
            check_not_idle(head, start)
            has.append(start.method)
        except ValueError as error:
            logger.warning(f"method={start.method!r} is not tried: {error}")
    rows = []
    for method in sorted(dict.fromkeys(settings.methods or has), key=list(KIND_OF_METHOD).index):
        for control in _to_scale(method, settings, former):
            name = f"{method}, {control.num_steps} steps" if method == "ascent" else method
            name += f", p {control.plausibility:g}" if control.plausibility else ""
            name += "" if control.max_kl is None else f", max_kl {control.max_kl:g}"
            # All of them are said, so that they are the same whatever the head comes to recommend.
            said = {key: value for key, value in control.to_dict().items() if key not in ("method", "step_size")}
            entry = Entry(name, KIND_OF_METHOD[method], settings=said)
            try:
                rival = make_rival(entry.kind, bench, said | {"step_size": control.step_size})
                for step_size in settings.step_sizes:
                    rival.check_strength(step_size)
            except (TypeError, ValueError) as error:
                raise ValueError(f"The control {name!r} cannot be tried: {error}") from error
            rows += [Row(entry, rival, step_size) for step_size in sorted(set(settings.step_sizes))]
            rows += [Row(entry, rival, None, target) for target in sorted(set(settings.kl))]
    return rows


def _to_scale(method: str, settings: TuneSettings, former: ControlConfig | None) -> list[ControlConfig]:
    """The controls of a method that differ in more than their step size, the simplest first."""
    if former is None or former.is_identity:
        former = ControlConfig()
    start = replace(former if former.method == method == "ascent" else ControlConfig(method), step_size=1e-6)
    num_steps = settings.num_steps if method == "ascent" else ()
    return [
        replace(start, plausibility=plausibility, max_kl=max_kl, num_steps=steps)
        for plausibility in sorted(set(settings.plausibility or [former.plausibility]))
        for max_kl in sorted(set(settings.max_kl or [former.max_kl]), key=lambda limit: -(limit or math.inf))
        for steps in sorted(set(num_steps or [start.num_steps]))
    ]


def plan_rounds(controls: int, prompts: int, num_samples: int, budget: int) -> list[tuple[int, int]]:
    """
    Of each round how many controls are in it, and how many prompts come on top. All answer all prompts if the budget
    allows it. Else it is shared evenly by rounds (successive halving, Jamieson and Talwalkar 2016), each with the
    better half of the one before, down to two. Each round begins with answers of the base to one prompt, which pay for
    what is made at the first use. Of a budget of less than [`fewest_responses`] there are no rounds.
    """
    if budget >= ((controls + 1) * prompts + 1) * num_samples:
        return [(controls, prompts)]
    sizes = _sizes(controls)
    share, left, rounds = budget // len(sizes) - num_samples, prompts, []
    for size in sizes if budget >= fewest_responses(controls, prompts, num_samples) else ():
        if more := min(left, share // ((size + 1) * num_samples)):
            rounds.append((size, more))
            left -= more
    return rounds


def fewest_responses(controls: int, prompts: int, num_samples: int) -> int:
    """The smallest budget of [`plan_rounds`] that tells anything: 8 prompts in the first round."""
    first = (_FEWEST_PROMPTS * (controls + 1) + 1) * num_samples
    return min(((controls + 1) * prompts + 1) * num_samples, first * len(_sizes(controls)))


def _sizes(controls: int) -> list[int]:
    """How many controls are in each round."""
    sizes = [controls]
    while sizes[-1] > _LAST:
        sizes.append(max(_LAST, -(-sizes[-1] // 2)))
    return sizes


def search(
    folder: Path,
    rows: Sequence[Row],
    bench: Bench,
    prompts: Prompts,
    scorers: Sequence[Scorer],
    weights: Mapping[str, float],
    settings: TuneSettings,
    budget: int,
    progress: Progress | None = None,
) -> Found:
    """
    Measure controls on more and more prompts, and choose one: of those of the last round that has most of the
    criterion, or a simpler one if the paired 95 % interval of the difference holds 0, and it too is clearly better
    than the base or none is.

    Args:
        folder (`Path`):
            Keeps the answers: a search that was stopped draws none of them twice.
        rows (sequence of [`Row`]):
            The controls, the simplest first.
        prompts ([`Prompts`]):
            What they may be measured on, in the order in which they are used.
        budget (`int`):
            Responses to draw at most.

    Raises:
        `ValueError`: if no prompt has all numbers that the criterion needs, under all controls.
    """
    base = Row(Entry(_BASE, _BASE), make_rival(_BASE, bench, {}))
    tried = [Candidate(row, row.rival.at(row.strength)) for row in rows]
    rounds = plan_rounds(len(rows), len(prompts), bench.sampling.num_samples, budget)
    answers: dict[tuple[str, float | None], tuple[list[Rollout], Scores]] = {}
    alive, used, drawn = tried, 0, 0
    for size, more in rounds:
        alive = _best(alive, size)
        block, used = prompts.take(range(used, used + more)), used + more
        drawn += (more * (len(alive) + 1) + 1) * bench.sampling.num_samples
        in_round = [base, *(candidate.row for candidate in alive)]
        stages = draw_answers(folder, in_round, bench, block, settings.part_size, "perplexity" in weights, progress)
        scores = score_answers(stages, stages[0], scorers, progress)
        for row, stage, own in zip(in_round, stages, scores, strict=True):
            rollouts, measured = load_answers(stage)
            known, numbers = answers.setdefault((row.entry.name, row.strength), ([], {}))
            known += rollouts
            for name, values in with_reward(bench, measured | own).items():
                numbers.setdefault(name, []).extend(values)
        places = {number: place for place, number in enumerate(prompts.numbers[:used])}
        samples = [
            sample_of(*key, *answers[key], places) for row in in_round if (key := (row.entry.name, row.strength))
        ]
        values, shared = _measure(alive, samples, weights, used)
    found = figures_of(samples[:1], samples[0], used)
    best = values[int(np.argmax(values[:, 0]))]
    behind = [with_interval(best - own, shared)[1] for own in values]
    chosen = alive[simplest_of_the_best(behind, [candidate.gain[1] for candidate in alive])]
    return Found(chosen, tried, alive, found, used, drawn)


def _best(tried: list[Candidate], count: int) -> list[Candidate]:
    """Those with most of the criterion, in the order they had."""
    if count >= len(tried):
        return tried
    ranked = sorted(tried, key=lambda candidate: -candidate.value[0])[:count]
    return [candidate for candidate in tried if any(candidate is each for each in ranked)]


def _measure(
    alive: Sequence[Candidate], samples: Sequence[Sample], weights: Mapping[str, float], count: int
) -> tuple[np.ndarray, int]:
    """
    Note what was measured of each control; `samples` are the base's and theirs. Returns of each the criterion on the
    prompts that all have numbers for and on each of their resamples, `(controls, 1 + resamples)`, and how many prompts
    these are.
    """
    for name in weights:
        if not all(prompts_with(sample, name, count).any() for sample in samples):
            raise ValueError(
                f"No answer of some control has a number by {name!r}, so controls cannot be compared by it."
            )
    shared = np.logical_and.reduce([prompts_with(sample, name, count) for sample in samples for name in weights])
    if not shared.any():
        raise ValueError(
            f"No prompt has {', '.join(weights)} of an answer under every control, so they cannot be compared."
        )
    chosen = choices(count) * shared

    def criterion(sample: Sample) -> np.ndarray:
        return sum(weight * values_on(sample, name, count, chosen) for name, weight in weights.items())

    of_base, *values = map(criterion, samples)
    for candidate, sample, own in zip(alive, samples[1:], values, strict=True):
        candidate.prompts, candidate.counted = count, int(shared.sum())
        candidate.value = with_interval(own, int(shared.sum()))
        candidate.gain = with_interval(own - of_base, int(shared.sum()))
        candidate.figures = figures_of([sample], samples[0], count)
    return np.stack(values), int(shared.sum())


def summary(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON has it; ends of intervals that are not finite are `None`."""
    return {
        "control": candidate.control.to_dict(),
        "target_kl": candidate.row.target_kl,
        "prompts": candidate.prompts,
        "counted": candidate.counted,
        "criterion": [finite(number) for number in candidate.value],
        "gain": [finite(number) for number in candidate.gain],
        "figures": by_metric(candidate.figures),
    }


def by_metric(figures: Sequence[Figure]) -> dict[str, list[float | None]]:
    """Of each figure of a control its value and the ends of its interval, as JSON has them."""
    return {f.metric: [finite(number) for number in (f.value, f.low, f.high)] for f in figures}
