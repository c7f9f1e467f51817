"""The page of results.py: docs/results.md, from what the folders of its studies hold."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from results_goals import in_words as in_words_of_goals
from results_goals import strengths_by_kl
from results_texts import ADDITIONS, AGAINST, FURTHER, GEMMA, INTRODUCTION, NOTES, REWARDS, TITLES

PUBLISHED = Path(__file__).with_name("published.md")
BATCH_SIZES = (1, 8, 32)
# Controls, in the paper's order and by its names, and its columns.
TABLE_1 = {
    "base": "base",
    "prompting": "prompting",
    "steering_vector": "static representation editing (steering vector)",
    "cd": "controlled decoding",
    "cd_prefix": "controlled decoding, prefix scorer",
    "ascent": "RE-Control (ascent)",
    "ascent + prompting": "RE-Control + prompting",
    "advantage": "advantage edit (ours)",
    "advantage + prompting": "advantage edit + prompting (ours)",
}
COLUMNS_1 = ("diversity", "coherence", "reward", "win_rate", "kl_per_response", "of_base")
HEADS_OWN = ("static_vector", "advantage", "ascent")


def rows(path: Path) -> list[dict[str, str]]:
    """The lines of a figures.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def said(path: Path, metric: str) -> list[str]:
    """Which rows beat the one compared against in a metric, and which do not, by their paired intervals."""
    better, worse, open_ones = [], [], []
    for row in rows(path):
        if row["metric"] != metric or not row["difference"]:
            continue
        strength = f" {float(row['strength']):.3g}" if row["strength"] else ""
        shown = f"{row['control']}{strength} ({float(row['difference']):+.2f})"
        low, high = float(row["difference_low"]), float(row["difference_high"])
        (better if low > 0 else worse if high < 0 else open_ones).append(shown)
    found = [("above", better), ("below", worse), ("not to be told from it", open_ones)]
    return [f"  - {what}: {', '.join(names)}" for what, names in found if names]


def in_words(folder: Path, against: str) -> list[str]:
    """What a comparison's intervals say, for reward and judge."""
    lines = []
    for metric in ("reward", "judge"):
        if found := said(folder / "figures.csv", metric):
            lines += [f"- In {metric}, held against {against}:", *found]
    return lines


def by_row(path: Path) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """The lines of a figures.csv by control and strength, and then by metric."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows(path):
        found.setdefault((row["control"], row["strength"]), {})[row["metric"]] = row
    return found


def in_short(kept: Path, names: Sequence[str]) -> list[str]:
    """What each study's control of a head gains, and the best of how many answers gains as much, at what KL."""
    lines, cheap = [], []
    for name in names:
        path = kept / name / "comparison" / "figures.csv"
        found = by_row(path) if path.is_file() else {}
        pool = {float(n): each for (control, n), each in found.items() if control == "best_of_n"}
        # Over the pool's own mean: the base's one answer to each prompt may be lucky, all of the pool less so.
        gains = {n: float(each["reward"]["value"]) - float(pool[1]["reward"]["value"]) for n, each in pool.items()}
        for (control, _), each in found.items():
            if control not in HEADS_OWN:
                continue
            gain, low, high = (float(each["reward"][f"difference{end}"]) for end in ("", "_low", "_high"))
            n, nats = f"more than {max(pool):.0f}" if pool else "", ""
            spent, judged = (float(each[metric]["value"]) for metric in ("kl_per_response", "win_rate"))
            if as_good := [n for n in pool if gains[n] >= gain]:
                least = min(as_good)
                n, nats = f"{least:.0f}", f"{float(pool[least]['kl_per_response']['value']):.2f}"
                cheap.append(float(nats) < spent)
            shown = f"{gain:+.2f} [{low:+.2f}, {high:+.2f}] | {spent:.2f} | {n} | {nats} | {judged:.2f}"
            lines.append(f"| {name} | {control} | {shown} |")
    every = "Where one is named, its KL is smaller: where so many answers can be\nafforded, it is the better buy."
    cheaper = f" {every}" if all(cheap) else ""
    return [
        "## In short",
        "",
        "What one answer under control gains over one of the base on unseen prompts, at strengths found for some",
        "nats a token; and how many answers of the base must be drawn for the best of them, by the reward itself, to",
        f"gain as much over the pool's mean, at what KL (by the means alone, without an interval).{cheaper}",
        "The win rate is the judge's, against the base.",
        "",
        "| study | control | Δ reward | KL an answer | best of n | its KL | win rate |",
        "|---|---|---:|---:|---:|---:|---:|",
        *lines,
        "",
    ]


def at_the_static_vectors_kl(study: Path) -> list[str]:
    """What the other methods gain over the static vector at its larger KL, between their own last two strengths."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for (control, _), each in by_row(study / "comparison" / "figures.csv").items():
        if control in HEADS_OWN:
            point = math.sqrt(float(each["kl_per_response"]["value"])), float(each["reward"]["value"])
            curves.setdefault(control, []).append(point)
    at, reward = curves.pop("static_vector")[-1]
    shown = []
    for control, (*_, (near, low), (far, high)) in curves.items():
        at_that_kl = low + (high - low) * (at - near) / (far - near)
        shown.append(f"{control} {at_that_kl - reward:+.2f}")
    return [
        f"- At the static vector's {at**2:.2f} nats an answer, on a straight line through each one's last two "
        f"strengths in the first table, over the root of the KL (without an interval): {', '.join(shown)}."
    ]


def towards_goals(study: Path) -> list[str]:
    """What the advantage edit is worth beside its goals."""
    found = by_row(study / "comparison" / "figures.csv")
    matches = json.loads((study / "comparison" / "strengths.json").read_text(encoding="utf-8"))
    spent_by = ((row, float(each["kl_per_response"]["value"])) for row, each in found.items())
    nats = {(control, float(strength)): value for (control, strength), value in spent_by if strength}
    spent = {kl: nats["advantage", strength] for kl, strength in strengths_by_kl(matches)["advantage"].items()}
    most = max(n for control, n in nats if control == "best_of_n")
    return in_words_of_goals(study, spent, (round(most), nats["best_of_n", most]))


def as_table_1(study: Path) -> list[str]:
    """The rows and columns of the paper's Table 1, of what was compared on unseen prompts."""
    found: dict[str, dict[str, float]] = {}
    for part in ("comparison", "rivals"):
        path = study / part / "figures.csv"
        by_control = by_row(path) if path.is_file() else {}
        # The last strength is that of 0.1 nats a token.
        for (control, _), each in by_control.items():
            own = found.setdefault(control, {})
            own |= {metric: float(row["value"]) for metric, row in each.items()}
            # Each part has its own base: seconds of two runs are not to be compared.
            own["of_base"] = own["seconds"] / float(by_control["base", ""]["seconds"]["value"])
    if not all(name in found for name in TABLE_1):
        return []
    lines = [
        f"| {title} | {' | '.join(f'{found[name][metric]:.3f}' for metric in COLUMNS_1)} |"
        for name, title in TABLE_1.items()
    ]
    return [
        "",
        "The rows and columns of the paper's Table 1 at this scale. Strengths are those of about 0.1 nats a token",
        "without an instruction; with one the KL is larger. Times are over the base's in the same run:",
        "",
        "| control | diversity | coherence | reward | win rate | KL an answer | time |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *lines,
        "",
    ]


def by_batch(study: Path) -> list[str]:
    """Seconds an answer by batch size, their ratio to the base's, and the win rate."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    won: dict[tuple[str, str], str] = {}
    for size in BATCH_SIZES:
        path = study / f"batch-{size}" / "figures.csv"
        for row in rows(path) if path.is_file() else ():
            if row["metric"] == "seconds":
                found.setdefault((row["control"], row["strength"]), {})[size] = float(row["value"])
            elif row["metric"] == "win_rate":
                ends = (float(row[name]) for name in ("value", "low", "high"))
                won[row["control"], row["strength"]] = "{:.2f} [{:.2f}, {:.2f}]".format(*ends)
    if not found:
        return []
    sizes = [size for size in BATCH_SIZES if size in next(iter(found.values()))]
    [base] = [seconds for (control, _), seconds in found.items() if control == "base"]
    lines = [
        f"| control | strength | {' | '.join(f'batch {size}' for size in sizes)} | win rate |",
        f"|---|---|{'---:|' * (len(sizes) + 1)}",
        *(
            f"| {name} | {f'{float(strength):.3g}' if strength else ''} "
            f"| {' | '.join(f'{each[size]:.3f} s ({each[size] / base[size]:.2f}×)' for size in sizes)} "
            f"| {won.get((name, strength), '')} |"
            for (name, strength), each in found.items()
        ),
    ]
    said = (
        "Seconds an answer, and as a ratio to the base's (the paper's Fig. 6), beside the judge's win rate against "
        "the base (its Fig. 7), of 32 prompts and short answers:"
    )
    return ["", said, "", *lines]


def costs(study: Path) -> list[str]:
    """What training the head and the adapter took."""
    if not (study / "costs.json").is_file():
        return []
    found = json.loads((study / "costs.json").read_text(encoding="utf-8"))
    head, lora = found["head"], found["lora_dpo"]
    return [
        "",
        f"Training on the same scored rollouts (the paper's Fig. 3): the head {head['seconds']:.0f} s and "
        f"{head['peak_memory_bytes'] / 2**30:.1f} GiB at most, reading its states included; the LoRA adapter by DPO "
        f"{lora['seconds']:.0f} s and {lora['peak_memory_bytes'] / 2**30:.1f} GiB ({lora['pairs']} pairs, one epoch). "
        "Their rewards stand in the table with the adapter. PPO was not run.",
    ]


def by_responses(study: Path) -> list[str]:
    """What a static vector gains by the number of responses it was fitted on."""
    path = study / "data-curve.json"
    if not path.is_file():
        return []
    curve = json.loads(path.read_text(encoding="utf-8"))
    return [
        "",
        "What a static vector gains on prompts that it was not fitted on, in deviations of the reward at 1 nat an "
        "answer ([how](fitting.md#would-more-responses-help); no answer is sampled for it):",
        "",
        "| responses | gain |",
        "|---:|---:|",
        *(f"| {count} | {gain:.3f} |" for count, gain in zip(curve["responses"], curve["gain"], strict=True)),
        "",
        "The last doubling added {:+.3f} [{:+.3f}, {:+.3f}].".format(*curve["doubling"]),
    ]


def how_trained(kept: Path, studies: Sequence[str]) -> str:
    """What the static vectors and g learned from."""
    text, older = [], []
    for name in studies:
        path = kept / name / "data-curve.json"
        if path.is_file():
            asked = json.loads(path.read_text(encoding="utf-8"))
            if asked.get("prefix_every") is None:
                older.append(name)
            else:
                options = f"--prefix-every {asked['prefix_every']} --gae-lambda {asked.get('gae_lambda', 0.8)}"
                text.append(f"Of {name} the response so far was scored too (`{options}`).")
    if older:
        text += [
            f"Those of {' and '.join(older)} are older:",
            "their static vectors and g learned from V's own differences (`--no-critic --gae-lambda 0`), without a",
            "token bias, and taught them less ([what a critic is worth](fitting.md#a-critic)).",
        ]
    return "\n".join(text)


def not_run(kept: Path, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Which parts of which studies have no figures."""
    found = []
    for name, own in parts.items():
        files = {part: {"times": "costs.json", "goals": "goals.json"}.get(part, f"{part}/table.md") for part in own}
        missing = [part for part, file in files.items() if not (kept / name / file).is_file()]
        if missing:
            found.append(f"{name} ({'all' if missing == list(own) else ', '.join(missing)})")
    found += [f"`{file}`" for file in FURTHER if not (kept / file).is_file()]
    return [
        f"**Not run yet**, of what `benchmarks/results.py` and other scripts make: {'; '.join(found)}.",
        "",
    ] * bool(found)


def page(kept: Path, parts: Mapping[str, Sequence[str]], folder: Path) -> str:
    """
    The whole page, from the folder of figures; `parts` are those of each study, and `folder` is where it will lie.
    """
    names = list(parts)
    studies = [name for name in names if (kept / name).is_dir()]
    timed = any(by_batch(kept / name) for name in studies)
    text = [
        INTRODUCTION.format(
            **json.loads((kept / "reward-model.json").read_text(encoding="utf-8")),
            times=" Those to be held against each other stand under *time and memory*." if timed else "",
            gemma=GEMMA if any(name.startswith("gemma") for name in studies) else "",
            scored=how_trained(kept, studies),
        )
    ]
    text += [*not_run(kept, parts), *in_short(kept, names)]
    for name in names:
        base, reward, *additions = name.split("-")
        title_of = ", ".join((base, reward, *(ADDITIONS[each] for each in additions)))
        study = kept / name
        for part, title in TITLES.items():
            made = study / part
            if (made / "table.md").is_file():
                table = (made / "table.md").read_text(encoding="utf-8").strip()
                against = AGAINST.get(part, "the base")
                about = f"{REWARDS[reward]}." + (f" {NOTES[part]}" if part in NOTES else "")
                text += [f"## {title_of}: {title}", "", about, "", table, ""]
                text += [*in_words(made, against)]
                text += [*(at_the_static_vectors_kl(study) if part == "against-static" else ()), ""]
                if part not in AGAINST and (made / "frontier.svg").is_file():
                    plot = os.path.relpath(made / "frontier.svg", folder)
                    text += [f"![Reward against nats an answer]({plot})", ""]
        text += as_table_1(study)
        if (study / "goals.json").is_file():
            text += [f"## {title_of}: the goals", *towards_goals(study)]
        if curve := by_responses(study):
            text += [f"## {title_of}: the data", *curve, ""]
        if timed := [*by_batch(study), *costs(study)]:
            text += [f"## {title_of}: time and memory", *timed, ""]
    for file, (title, about) in FURTHER.items():
        if (kept / file).is_file():
            text += [f"## {title}", "", about, "", (kept / file).read_text(encoding="utf-8").strip(), ""]
    if PUBLISHED.is_file():
        text.append(PUBLISHED.read_text(encoding="utf-8").strip())
    return "\n".join(text).strip() + "\n"
