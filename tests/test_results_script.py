"""The script of the results page does all of it on a few prompts: a tiny chat model, a tiny encoder, made-up pairs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

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


def test_everything_is_made_and_made_once(material):
    words = ["--pairs", "pairs.jsonl", "--harmfulqa", "questions.jsonl", "--output", "results", "--quick"]
    words += ["--only", "smollm2-vader", "--base", "base", "--encoder", "encoder"]

    def run(*more):
        return subprocess.run(
            [sys.executable, SCRIPT, *words, *more], cwd=material, capture_output=True, text=True, timeout=900
        )

    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    page = (material / "results" / "results.md").read_text()
    rivals = "what else learns from the same responses, or asks about each token"
    titles = (
        rivals,
        "unseen prompts of HH-RLHF",
        "HarmfulQA, out of distribution",
        "step size by steps",
        "time and memory",
    )
    for title in (*titles, "the head's methods against its static vector, at 0.1 nats a token"):
        assert f"## smollm2, vader: {title}" in page
    for control in ("base", "prompting", "best_of_n", "static_vector", "advantage", "ascent + prompting", "lora_dpo"):
        assert f"| {control} |" in page
    alone = ["--figures", "results/figures", "--page", "again.md"]
    subprocess.run([sys.executable, SCRIPT, *alone], cwd=material, check=True, timeout=100)
    assert (material / "again.md").read_text() == page
    made = {path: path.stat().st_mtime_ns for path in material.rglob("part-*")}
    assert run().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in material.rglob("part-*")} == made
    assert (material / "results" / "results.md").read_text() == page
