"""How far a head's control is from its goals, from the answers of comparisons on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import bootstrap


def rewards_by_prompt(comparison: Path) -> dict[tuple[str, float | None], np.ndarray]:
    """Rewards of shape (prompts, samples), by control and strength."""
    columns = ["control", "strength", "prompt_number", "sample", "reward"]
    rows = pq.read_table(comparison / "answers.parquet", columns=columns).to_pylist()
    found: dict[tuple[str, float | None], dict[int, dict[int, float]]] = {}
    for row in rows:
        own = found.setdefault((row["control"], row["strength"]), {})
        own.setdefault(row["prompt_number"], {})[row["sample"]] = row["reward"]
    return {
        key: np.array([[samples[n] for n in sorted(samples)] for _, samples in sorted(prompts.items())])
        for key, prompts in found.items()
    }


def with_interval(statistic: Callable[..., np.ndarray], *values: np.ndarray) -> list[float]:
    """A statistic of means over the same prompts, and its 95 % interval (percentiles of a bootstrap over prompts)."""
    found = bootstrap(
        values,
        lambda *drawn, axis: statistic(*(each.mean(axis=axis) for each in drawn)),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=0,
    )
    value = statistic(*(each.mean() for each in values))
    return [float(value), float(found.confidence_interval.low), float(found.confidence_interval.high)]


def _ratio(own: np.ndarray, other: np.ndarray, base: np.ndarray) -> np.ndarray:
    return (own - base) / (other - base)


def goals(comparison: Path, plain: Path) -> list[dict[str, Any]]:
    """
    What the advantage edit is worth beside what it is to beat.

    Args:
        comparison (`Path`):
            Folder of a comparison of the base, the best of some answers and a head's methods at KLs.
        plain (`Path`):
            One of the base and the static vector of a plain V at the same KLs, on the same prompts.

    Returns:
        For each KL: `kl` (asked for, nats a token), `against_best` (mean difference of the reward to the best of the
        pool), and the ratios of gains over the base, `over_ascent` and `over_plain`, each with its 95 % interval.
    """
    own, others = rewards_by_prompt(comparison), rewards_by_prompt(plain)
    by_kl = _by_kl(comparison)
    base = own["base", None].mean(1)
    best = next(rewards for (control, _), rewards in own.items() if control == "best_of_n").max(1)
    found = []
    for kl, strength in by_kl["advantage"].items():
        gained = own["advantage", strength].mean(1)
        ascended = own["ascent", by_kl["ascent"][kl]].mean(1)
        plainly = others["static_vector", _by_kl(plain)["static_vector"][kl]].mean(1)
        found.append(
            {
                "kl": kl,
                "against_best": with_interval(lambda a, b: a - b, gained, best),
                "over_ascent": with_interval(_ratio, gained, ascended, base),
                "over_plain": with_interval(_ratio, gained, plainly, base),
            }
        )
    return found


def _by_kl(comparison: Path) -> dict[str, dict[float, float]]:
    return strengths_by_kl(json.loads((comparison / "figures.json").read_text(encoding="utf-8"))["strengths"])


def strengths_by_kl(matches: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """The strengths that a comparison found, by control and nats a token, of the `strengths` in its figures.json."""
    found: dict[str, dict[float, float]] = {}
    for name, match in matches.items():
        control, _, kl = name.partition(" at KL ")
        found.setdefault(control, {})[float(kl)] = match["strength"]
    return found


def in_words(study: Path, spent: Mapping[float, float], best: tuple[int, float]) -> list[str]:
    """
    The lines of the page.

    Args:
        study (`Path`):
            Folder of a study's figures.
        spent (mapping):
            Nats an answer under the advantage edit, by KL asked for.
        best (`tuple[int, float]`):
            n of the best of n answers, and its nats an answer.
    """
    n, nats = best
    lines = []
    for goal in json.loads((study / "goals.json").read_text(encoding="utf-8")):
        shown = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*goal["against_best"])]
        shown += ["{:.2f} [{:.2f}, {:.2f}]".format(*goal[name]) for name in ("over_ascent", "over_plain")]
        lines.append(f"| {goal['kl']:g} | {spent[goal['kl']]:.2f} | {' | '.join(shown)} |")
    return [
        "",
        f"The goals were: the reward of the best of {n} from one answer, at no more than twice its {nats:.2f} nats; "
        "at every KL three times the gain of the paper's ascent, and one and a half times that of the static vector "
        "of a plain V, with intervals of the ratios above 1. Of the advantage edit, with 95 % intervals paired over "
        "the prompts:",
        "",
        f"| nats a token | nats an answer | reward less the best of {n} | gain over the ascent's | over a plain V's |",
        "|---:|---:|---:|---:|---:|",
        *lines,
        "",
    ]
