"""The script of the results page does all of it on a few prompts: a tiny chat model, a tiny encoder, made-up pairs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from .fresh import run_script
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "results.py"
FEELINGS = ("good", "great", "love", "happy", "nice", "bad", "awful", "hate", "sad", "ugly")


@pytest.fixture
def material(tmp_path):
    """A base, an encoder, pairs and questions."""
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "base")
    config = BertConfig(
        vocab_size=110,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    for name in ("base", "encoder"):
        tiny_tokenizer(chat=name == "base", more_words=FEELINGS).save_pretrained(tmp_path / name)
    dialogue = "\n\nHuman: w{} w{}\n\nAssistant: {}"
    pairs = [
        {"chosen": dialogue.format(i, i % 7, "good nice"), "rejected": dialogue.format(i, i % 7, "bad sad")}
        for i in range(20, 270)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w9"}) + "\n" for i in range(30)))
    return tmp_path


def run(*words, folder):
    code, out, err = run_script(SCRIPT, words, timeout=900, cwd=folder)
    assert code == 0, out + err


FIRST = ("unseen prompts of HH-RLHF", "the head's methods against its static vector, at some 0.1 nats a token")
OTHERS = (
    "what else learns from the same responses, or asks about each token",
    "an adapter trained by DPO on the same responses",
    "the same prompts with other noise",
    "HarmfulQA, out of distribution",
    "step size by steps",
    "time and memory",
)
CONTROLS = ("base", "prompting", "best_of_n", "static_vector", "advantage")


@pytest.mark.parametrize(
    ("parts", "titles", "controls"),
    [
        pytest.param(["--parts", "comparison"], FIRST, CONTROLS, id="comparison"),
        pytest.param(
            [], (*FIRST, *OTHERS), (*CONTROLS, "ascent + prompting", "lora_dpo"), id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_everything_is_made_and_made_once(material, parts, titles, controls):
    words = ["--pairs", "pairs.jsonl", "--harmfulqa", "questions.jsonl", "--output", "results", "--quick", *parts]
    words += ["--only", "smollm2-vader", "--base", "base", "--encoder", "encoder"]

    run(*words, folder=material)
    page = (material / "results" / "results.md").read_text()
    for title in titles:
        assert f"## smollm2, vader: {title}" in page
    for control in controls:
        assert f"| {control} |" in page
    alone = ["--figures", "results/figures", "--page", "results/again.md"]
    run(*alone, folder=material)
    assert (material / "results" / "again.md").read_text() == page
    made = {path: path.stat().st_mtime_ns for path in material.rglob("part-*")}
    run(*words, folder=material)
    assert {path: path.stat().st_mtime_ns for path in material.rglob("part-*")} == made
    assert (material / "results" / "results.md").read_text() == page
