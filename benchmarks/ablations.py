"""
What the choices of training are worth: one set of scored rollouts, three seeds, one choice changed at a time.

    python benchmarks/ablations.py --rollouts run/rollouts --output ablations-vader.json

The folder is one that `recontrol label` has scored. For each seed (split by prompt, initial weights, order) a head
with the default settings is trained, then one with each changed setting; the figures are those on the held-out
prompts, where an error of 1 is that of the training rewards' mean. Every finished run is kept in the output, so the
command goes on where it was stopped. `--plot` and `--table` only show what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_recontrol import (
    States,
    StateStore,
    ValueHead,
    ValueHeadConfig,
    ValueTrainer,
    fit_advantage,
    measure_value_head,
    split_by_prompt,
    td_targets,
    train_value_head,
    write_states,
)

VALUE = {"td_lambda": 0.95, "num_epochs": 15, "patience": 3, "learning_rate": 3e-4}
ADVANTAGE = {"gae_lambda": 0.0, "advantage_num_epochs": 6, "advantage_patience": 2}
SIZES = [512]


class NoStopGradient(ValueTrainer):
    """
    Gradients flow through the targets too, as in the authors' training code: with λ 0 through all of it, with another
    one through the next state's share, 1 - λ.
    """

    def targets(self, values, batch):
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        plain = td_targets(values, batch["rewards"], batch["lengths"], self.td_lambda)
        return plain + (1 - self.td_lambda) * (following - following.detach())


class FirstTokenAnchor(ValueTrainer):
    """The reward is the target of the first token instead of the last; elsewhere the target is V of the next state."""

    def targets(self, values, batch):
        return self.first_token_targets(values.detach(), batch)

    def first_token_targets(self, values, batch):
        following = torch.cat([values[:, 1:], values[:, -1:]], dim=1)
        last = (batch["lengths"] - 1)[:, None, None].expand(-1, 1, values.shape[-1])
        # Behind the last state nothing is known: it is its own target, which teaches nothing.
        following = following.scatter(1, last, values.gather(1, last))
        return torch.cat([batch["rewards"][:, None], following[:, 1:]], dim=1)


class AuthorsObjective(FirstTokenAnchor):
    """The reward anchored at the first token, gradients through the targets: the authors' training code."""

    def targets(self, values, batch):
        return self.first_token_targets(values, batch)


# name -> what differs: value options, head sizes, hook point, share of the rollouts, every k-th state.
VALUE_RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"td_lambda={x}": {"td_lambda": x} for x in (0.0, 0.5, 0.9, 1.0)},
    "no stop-gradient": {"trainer_class": NoStopGradient},
    "no stop-gradient, td_lambda=0": {"trainer_class": NoStopGradient, "td_lambda": 0.0},
    "anchor at the first token": {"trainer_class": FirstTokenAnchor},
    "the authors' objective": {"trainer_class": AuthorsObjective},
    "target network 0.01": {"target_update": 0.01},
    "decoder_layer": {"hook_point": "decoder_layer"},
    "depth 2": {"head_sizes": SIZES * 2},
    "depth 3": {"head_sizes": SIZES * 3},
    "width 128": {"head_sizes": [128]},
    "width 2048": {"head_sizes": [2048]},
    "scaling=scalar": {"scaling": "scalar"},
    "scaling=none": {"scaling": "none"},
    "decoder_layer, scaling=scalar": {"hook_point": "decoder_layer", "scaling": "scalar"},
    "decoder_layer, scaling=none": {"hook_point": "decoder_layer", "scaling": "none"},
    **{f"{x:.0%} of the prompts": {"share": x} for x in (0.125, 0.25, 0.5)},
    **{f"one state in {k}": {"every": k} for k in (2, 4, 8, 16)},
}
# Of the advantage part, on the default V of the seed.
ADVANTAGE_RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"gae_lambda={x}": {"gae_lambda": x} for x in (0.5, 0.9, 0.95, 1.0)},
    "linear": {"advantage_sizes": []},
    **{f"g width {x}": {"advantage_sizes": [x]} for x in (64, 1024)},
    **{f"g on {x:.0%} of the prompts": {"share": x} for x in (0.125, 0.25, 0.5)},
    "g on one state in 4": {"every": 4},
}
VALUE_FIGURES = ("value_error", "value_error_last", "correlation_first", "correlation_last")
ADVANTAGE_FIGURES = ("advantage_correlation", "constant_correlation", "advantage_error", "constant_error")


class Stores(dict):
    """The states of a folder of rollouts by hook point, read when first asked for."""

    def __init__(self, rollouts: Path, folder: Path):
        super().__init__()
        self.rollouts, self.folder = rollouts, folder

    def __missing__(self, hook_point: str) -> StateStore:
        name = json.loads((self.rollouts / "manifest.json").read_text(encoding="utf-8"))["settings"]["model"]
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        write_states(self.folder / hook_point, base, self.rollouts, hook_point=hook_point)
        self[hook_point] = StateStore.open(self.folder / hook_point)
        return self[hook_point]


def subset(store: StateStore, share: float, every: int, seed: int, directions: bool) -> StateStore:
    """Every k-th state of the episodes, with fewer training prompts but all held-out ones."""
    if share == 1 and every == 1:
        return store
    train, held_out = split_by_prompt(store.prompts, 0.1, seed)
    prompts = store.prompts[train].unique()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    kept = torch.isin(store.prompts, prompts[order[: round(len(prompts) * share)]])
    kept[held_out] = True
    episodes = kept.nonzero()[:, 0]
    lengths = store.lengths[episodes]
    ends = torch.repeat_interleave(lengths.cumsum(0), lengths)
    rows = (ends - 1 - torch.arange(int(lengths.sum()))) % every == 0
    return StateStore(
        [
            States(
                hidden=store.gather("hidden", episodes)[rows],
                directions=store.gather("directions", episodes)[rows] if directions else None,
                lengths=-(-lengths // every),
                rewards=store.rewards[episodes],
                prompts=store.prompts[episodes],
                finished=store.finished[episodes],
                **store.read_at | {"every": every},
            )
        ]
    )


def held_out_share(store: StateStore, part: StateStore) -> float:
    """The share of the part's prompts that holds out as many, and so the same ones, as a tenth of the store."""
    return round(0.1 * len(store.prompts.unique())) / len(part.prompts.unique())


def run_value(stores: Stores, change: dict[str, Any], seed: int) -> tuple[ValueHead, dict[str, float]]:
    """V with one choice changed, and its held-out figures."""
    change = dict(change)
    store = stores[change.pop("hook_point", "lm_head")]
    at_head = store.read_at["hook_point"] == "lm_head"
    config = ValueHeadConfig(
        store.hidden_size,
        head_sizes=change.pop("head_sizes", SIZES),
        hook_point=store.read_at["hook_point"],
        advantage_sizes=[256] if at_head else None,
    )
    part = subset(store, change.pop("share", 1.0), change.pop("every", 1), seed, directions=False)
    begin = time.perf_counter()
    head, figures = train_value_head(
        part, config, seed=seed, validation_split=held_out_share(store, part), **VALUE | change
    )
    minutes = (time.perf_counter() - begin) / 60
    if part is not store:
        # Along the response means at the same positions for all: those of the whole store.
        figures = measure_value_head(head, store, split_by_prompt(store.prompts, 0.1, seed)[1])
    return head, {name: figures[name] for name in VALUE_FIGURES} | {"minutes": minutes}


def run_advantage(store: StateStore, value: ValueHead, change: dict[str, Any], seed: int) -> dict[str, float]:
    """g with one choice changed, on a given V."""
    change = dict(change)
    config = replace(value.config, advantage_sizes=change.pop("advantage_sizes", [256]))
    torch.manual_seed(seed)
    head = ValueHead(config)
    weights = {name: tensor for name, tensor in value.state_dict().items() if not name.startswith("advantage_mlp")}
    head.load_state_dict(weights, strict=False)
    part = subset(store, change.pop("share", 1.0), change.pop("every", 1), seed, directions=True)
    begin = time.perf_counter()
    figures = fit_advantage(head, part, seed=seed, validation_split=held_out_share(store, part), **ADVANTAGE | change)
    minutes = (time.perf_counter() - begin) / 60
    return {name: figures[name] for name in ADVANTAGE_FIGURES} | {"minutes": minutes}


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.571)
    return f"{statistics.fmean(values):.3f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def tables(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """
    Markdown tables of all finished runs: means over the seeds with 95 % intervals, and the mean difference from the
    default within a seed, whose interval is free of what the seeds' splits differ in.
    """
    text = []
    for kind, figures, compared in (
        ("value", VALUE_FIGURES, "value_error_last"),
        ("advantage", ADVANTAGE_FIGURES, "advantage_correlation"),
    ):
        runs: dict[str, dict[str, dict[str, float]]] = {}
        for key, run in results.items():
            if key.startswith(kind):
                _, name, seed = key.split("/")
                runs.setdefault(name, {})[seed] = run
        header = [kind, *figures, f"{compared} - default", "minutes"]
        text += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for name, by_seed in runs.items():
            cells = [interval([run[figure] for run in by_seed.values()]) for figure in figures]
            common = by_seed.keys() & runs["default"].keys()
            differences = [by_seed[seed][compared] - runs["default"][seed][compared] for seed in sorted(common)]
            cells.append("" if name == "default" else interval(differences))
            cells.append(f"{statistics.fmean(run['minutes'] for run in by_seed.values()):.2f}")
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One plot: held-out correlation of V (last token) and of g by choice, with every seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (kind, name, label) in zip(
        figure.subplots(1, 2),
        [
            ("value", "value_error_last", "V: held-out error at the last token (1: the mean reward)"),
            ("advantage", "advantage_correlation", "g: held-out correlation with V's differences"),
        ],
        strict=True,
    ):
        rows = list(dict.fromkeys(key.split("/")[1] for key in results if key.startswith(kind)))[::-1]
        for y, row in enumerate(rows):
            values = [run[name] for key, run in results.items() if key.split("/")[:2] == [kind, row]]
            axes.plot(values, [y] * len(values), "o", color="#4477aa", alpha=0.6)
            axes.plot([statistics.fmean(values)], [y], "|", color="black", markersize=14)
        if "default" in rows:
            default = [run[name] for key, run in results.items() if key.split("/")[:2] == [kind, "default"]]
            axes.axvline(statistics.fmean(default), linestyle=":", color="grey")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(label)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format=path.suffix[1:] or "svg")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=Path, help="folder that `recontrol label` has scored")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of results")
    parser.add_argument("--states", type=Path, help="folder for the states; default: beside the rollouts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only names that contain this")
    parser.add_argument("--plot", type=Path, help="write a plot of what is there")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    shown = {key: run for key, run in results.items() if int(key.rsplit("/", 1)[1]) < arguments.seeds}
    if arguments.plot:
        plot(shown, arguments.plot)
    if arguments.table:
        print(tables(shown))
    if arguments.plot or arguments.table:
        return
    stores = Stores(arguments.rollouts, arguments.states or arguments.rollouts.with_name("states-ablations"))
    runs = [(seed, name) for seed in range(arguments.seeds) for name in VALUE_RUNS if arguments.only in name]
    # What needs the second set of states comes last.
    runs.sort(key=lambda run: "hook_point" in VALUE_RUNS[run[1]])
    for seed, name in runs:
        key = f"value/{name}/{seed}"
        pending = [x for x in ADVANTAGE_RUNS if arguments.only in x and f"advantage/{x}/{seed}" not in results]
        if key in results and not (name == "default" and pending):
            continue
        head, results[key] = run_value(stores, VALUE_RUNS[name], seed)
        keep(results, key, arguments.output)
        for other in pending if name == "default" else ():
            key = f"advantage/{other}/{seed}"
            results[key] = run_advantage(stores["lm_head"], head, ADVANTAGE_RUNS[other], seed)
            keep(results, key, arguments.output)
    print(tables(results))


def keep(results: dict, key: str, path: Path) -> None:
    """Write the results so far, and show the last."""
    print(key, {name: round(value, 3) for name, value in results[key].items()}, flush=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
