"""
What gives the static vector and g better targets: heads of one set of scored rollouts, compared at equal KL.

    python benchmarks/critics.py --fit FOLDER --reward hf_recontrol:vader --prompts FILE --held-out FILE \
        --output critics [--layers 8 16 24] [--kl 0.1] [--only critic-16 ...]
    python benchmarks/critics.py --output critics --table

`--fit` is a folder of `recontrol fit`, whose base, sampling settings and rollouts are used. A head is trained without
a critic (`none`) and with one that reads each of `--layers` too (`critic-16`, ...); of each, the static vector and g
answer `--prompts` at the strengths found on `--held-out` for each KL. Every difference is to the static vector of
`none` at the same KL, paired over prompts. All of it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from hf_recontrol import CompareSettings, StateStore, compare, load_prompts, paired_interval, train_head, write_states

CONTROLS = [{"kind": "base"}, {"kind": "static_vector"}, {"kind": "advantage"}]
METRICS = ("reward", "judge", "diversity", "kl_per_token", "kl_per_response")


def base_of(fit_folder: Path):
    """The base of a run of `recontrol fit`, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((fit_folder / "head" / "config.json").read_text(encoding="utf-8"))
    name = config["base_model_name_or_path"]
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def measured(output: Path, name: str, layer: int | None, run: dict[str, Any]) -> None:
    """Train one head and compare its methods."""
    states = output / f"states-{layer}"
    if not (output / name / "comparison" / "table.md").is_file():
        write_states(states, run["model"], run["fit"] / "rollouts", critic_layer=layer, states_dtype="float32")
        train_head(output / name / "head", states)
        compare(
            run["model"],
            run["prompts"],
            run["reward"],
            output / name / "comparison",
            CompareSettings(kl=run["kl"], perplexity=False, batch_size=32, on_seen_prompts="skip", **run["sampling"]),
            head=output / name / "head",
            judge=run["judge"],
            controls=CONTROLS,
            held_out=run["held_out"],
            tokenizer=run["tokenizer"],
        )
    figures = json.loads((output / name / "head" / "training.json").read_text(encoding="utf-8"))["figures"]
    kept = {key: value for key, value in figures.items() if isinstance(value, float)}
    kept["states_bytes"] = sum(
        tensor.numel() * tensor.element_size()
        for part in StateStore.open(states).parts
        for tensor in (part.hidden, part.directions, part.context)
        if tensor is not None
    )
    (output / name / "figures.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def answers(folder: Path) -> dict[tuple[str, float | None], dict[str, float]]:
    """Of each row of a comparison: each prompt's reward."""
    found: dict[tuple[str, float | None], dict[str, float]] = {}
    for row in pyarrow.parquet.read_table(folder / "answers.parquet").to_pylist():
        found.setdefault((row["control"], row["strength"]), {})[json.dumps(row["prompt"])] = row["reward"]
    return found


def rows(output: Path, name: str) -> list[dict[str, Any]]:
    """The controlled rows of one head's comparison, with the KL that their strength was found for."""
    written = json.loads((output / name / "comparison" / "figures.json").read_text(encoding="utf-8"))
    wanted = {}
    for label, match in written["strengths"].items():
        control, kl = label.split(" at KL ")
        wanted[control, match["strength"]] = float(kl)
    by_row: dict[tuple[str, float], dict[str, Any]] = {}
    for figure in written["figures"]:
        key = (figure["control"], figure["strength"])
        if key in wanted and figure["metric"] in METRICS:
            by_row.setdefault(key, {"key": key, "head": name, "control": key[0], "kl": wanted[key]})
            by_row[key][figure["metric"]] = figure["value"]
    rewards = answers(output / name / "comparison")
    return [row | {"rewards": rewards[row["key"]]} for row in by_row.values()]


def table(output: Path, names: Sequence[str]) -> str:
    """All rows, with their differences to the static vector without a critic."""
    lines = [
        "| head | error (critic's) | control | KL a token | KL an answer | reward | Δ reward | judge | diversity |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    reference = {row["kl"]: row["rewards"] for row in rows(output, "none") if row["control"] == "static_vector"}
    for name in names:
        figures = json.loads((output / name / "figures.json").read_text(encoding="utf-8"))
        error = f"{figures['value_error_last']:.2f}"
        if "critic_value_error_last" in figures:
            error += f" ({figures['critic_value_error_last']:.2f})"
        for row in rows(output, name):
            other = reference[row["kl"]]
            differences = [reward - other[prompt] for prompt, reward in row["rewards"].items() if prompt in other]
            low, high = paired_interval(differences)
            change = f"{sum(differences) / len(differences):+.3f} [{low:+.3f}, {high:+.3f}]"
            judge = f"{row['judge']:.3f}" if "judge" in row else ""
            lines.append(
                f"| {name} | {error} | {row['control']} | {row['kl_per_token']:.3f} | {row['kl_per_response']:.2f} "
                f"| {row['reward']:.3f} | {change} | {judge} | {row['diversity']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fit", type=Path)
    parser.add_argument("--reward")
    parser.add_argument("--judge")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--limit", type=int, default=150, help="prompts that are compared on")
    parser.add_argument("--layers", type=int, nargs="+", default=[16])
    parser.add_argument("--kl", type=float, nargs="+", default=[0.1])
    parser.add_argument("--only", nargs="+", help="names of heads: none, critic-16, ...")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        if None in (arguments.fit, arguments.reward, arguments.prompts, arguments.held_out):
            parser.error("name --fit, --reward, --prompts and --held-out, or --table")
        model, tokenizer = base_of(arguments.fit)
        sampled = json.loads((arguments.fit / "rollouts" / "manifest.json").read_text(encoding="utf-8"))["settings"]
        sampling = sampled["generation_config"]
        run = {
            "model": model,
            "tokenizer": tokenizer,
            "fit": arguments.fit,
            "reward": arguments.reward,
            "judge": arguments.judge,
            "prompts": load_prompts(arguments.prompts, limit=arguments.limit),
            "held_out": load_prompts(arguments.held_out, limit=64),
            "kl": tuple(arguments.kl),
            "sampling": {"max_new_tokens": sampling["max_new_tokens"], "temperature": sampling["temperature"]},
        }
        for name, layer in [("none", None), *((f"critic-{layer}", layer) for layer in arguments.layers)]:
            if not arguments.only or name in arguments.only:
                measured(arguments.output, name, layer, run)
    names = sorted(path.parent.name for path in arguments.output.glob("*/figures.json"))
    print(table(arguments.output, sorted(names, key=lambda name: (name != "none", name))))


if __name__ == "__main__":
    main()
