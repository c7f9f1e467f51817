"""The page of results.py: docs/results.md, from what the folders of its studies hold."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from results_goals import in_words as in_words_of_goals

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
TITLES = {
    "comparison": "unseen prompts of HH-RLHF",
    "rivals": "what else learns from the same responses, or asks about each token",
    "lora": "an adapter trained by DPO on the same responses",
    "against-static": "the head's methods against its static vector, at some 0.1 nats a token",
    "against-best": "the head's methods against the best of 16 answers",
    "plain": "the static vector of a plain V",
    "other-noise": "the same prompts with other noise",
    "harmfulqa": "HarmfulQA, out of distribution",
    "grid": "step size by steps",
}
# What `Study.addition` stands for.
ADDITIONS = {"more": "four responses to each of 1,913 prompts"}
# What a part's differences are to, where not to the base.
AGAINST = {"against-static": "static_vector", "against-best": "best_of_n"}
# What other scripts printed of a study's head, by their files among the figures: title, and what it is.
FURTHER = {
    "bounds-vader.md": (
        "smollm2, vader: what keeps a token's shift from gaining more",
        "What shifts of the drawn tokens gain at a small KL, on prompts that they were not learned on, in deviations "
        "of the reward for the root of a nat an answer (nothing is sampled for it). Beside those that are learned "
        "stand shifts that no head can know: a token's valence in VADER's own lexicon, and shifts times the slope of "
        "VADER's score at the response so far. "
        "`python benchmarks/bounds.py --fit results/smollm2-vader/fit --gae-lambda 0.5`.",
    ),
    "rounds-vader.md": (
        "smollm2, vader: a second round",
        "A head fitted anew to as many responses under the control that the first one recommends, in place of it; and "
        "the mean of both heads' static vectors and token biases. "
        "`python benchmarks/rounds.py --fit results/smollm2-vader/fit --rewards results/reward-model --output rounds "
        "--rounds 2`.",
    ),
    "guards-vader.md": (
        "smollm2, vader: 20 times the recommended strength, under guards",
        "The head of `examples/heads`. `python benchmarks/guards.py --rewards results/reward-model --output guards "
        "--only vader`.",
    ),
}
# What a table's title leaves open.
NOTES = {
    "plain": "The static vector as the mean of V's own differences from token to token: without a critic, without "
    "rewards of the response so far, without a token bias (`--no-critic --gae-lambda 0 --no-token-bias`).",
    "rivals": "b, g and c learned from rewards of the response so far too; V, which `ascent` and `cd_prefix` follow, "
    "and the steering vector have one reward of each response. Rivals have their default settings: none was tuned.",
    "lora": "b, g and c learned from rewards of the response so far too; the adapter has the order of each prompt's "
    "two responses. It has the default settings of `lora_dpo`: none was tuned.",
    "other-noise": "Above, answers have the noise of seed 0, as the responses that the head was trained on: the n-th "
    "prompt's answer has that of the n-th training prompt's first response. Here it is that of seed 1.",
    "harmfulqa": "200 questions, spread evenly over the ten topics of the file. Strengths are those of the first "
    "table.",
}
REWARDS = {
    "vader": "Reward: VADER sentiment; judge: the preference reward model",
    "preference": "Reward: the preference reward model; judge: 1 less the probability of offensive language",
}
INTRODUCTION = """# Results

Made by `make results PAIRS=... HARMFULQA=...` (`benchmarks/results.py`): small models, short answers, small rewards,
one seed. Every table is the `table.md` of one comparison; [comparing.md](comparing.md) says what its columns mean, and
what KL is worth.
Strengths were found on 64 held-out prompts, never by the reward, and meet their KL there within 10 %: controls of one
KL may lie apart, so read the KL beside each reward. Differences are paired over prompts; their intervals are over
these prompts, not over trainings of the head. The same 200 prompts have measured every version of it. Times in these
tables are of a machine that did other work too.{times}

The models: smollm2 is SmolLM2-135M-Instruct as `make demo` makes it, from a file of 4-bit weights (Q4_1), in float32:
not the weights on the Hub, on which nothing here was measured{gemma}.
Heads are those of `recontrol fit` on first turns of HH-RLHF's harmlessness pairs, two responses of 48 tokens to each
unless a title says otherwise.
{scored}
The preference reward model is a MiniLM of 6 layers, trained on the same pairs by `benchmarks/reward_model.py`: it
ranks {accuracy:.0%} of {held_out_pairs} unseen pairs right, where "the shorter one is better" has
{accuracy_of_the_shorter:.0%}, and its reward correlates with an answer's length by {correlation_with_length:.2f}: it
is a learned reward that is no lexicon, not a measure of what people prefer. No judge here reads and understands: win
rates are by the judge that is named above each table, this reward model, or a classifier of offensive language (the
package `alt-profanity-check`).
"""

GEMMA = (
    "; gemma is Gemma-3-270M, a pretrained-only model, from 4-bit weights too (Q4_K_M), in float32, asked in "
    "HH-RLHF's form of a dialogue; its heads are of 512 prompts, those of smollm2 of 1,024"
)


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
    spent = {}
    for name, match in matches.items():
        control, _, kl = name.partition(" at KL ")
        if control == "advantage":
            spent[float(kl)] = nats[control, match["strength"]]
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
        f"**Not run yet**, of what `benchmarks/results.py` and the scripts named below make: {'; '.join(found)}.",
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
