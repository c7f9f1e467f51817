"""What tests of comparisons run: a tiny base and head in folders, prompts, rewards, rivals of a user's own, a file."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from hf_recontrol import ControlConfig

from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

_CODE = '''
from dataclasses import replace

from hf_recontrol import Answer, Rival, text_reward

@text_reward
def variety(prompts, completions, **columns):
    if completions[0] != "I do not know.":
        with open("scored.log", "a") as log:
            log.write(f"{len(completions)}\\n")
    return [float(len(set(text.split()))) for text in completions]

def distinct(completion_ids, **columns):
    """No two answers have the same, as a rule."""
    return [sum(place * number for place, number in enumerate(ids, 7)) / 97 for ids in completion_ids]

def brevity(completions, **columns):
    return [-float(len(text.split())) for text in completions]

shortness = type(brevity)(brevity.__code__, globals(), "brevity")

def sevens(completions, **columns):
    """Knows only answers with a 7, and none of the first prompts."""
    return [float(text.count("7")) if "7" in text else None for text in completions]

def fails(completions, **columns):
    return columns["no such"]

def nothing(completions, **columns):
    return [None for _ in completions]

class Drawn(Rival):
    """Its own draws, noted."""
    def answer(self, prompts, strength):
        with open("drawn.log", "a") as log:
            log.write(f"{len(prompts)}\\n")
        return self.bench.draw(prompts)

class Says(Rival):
    """A text alone to each prompt."""
    def __init__(self, bench, what="w8 w9"):
        super().__init__(bench)
        self.what = what
    def answer(self, prompts, strength):
        return [self.what] * (len(prompts) * self.bench.sampling.num_samples)

class Starts(Says):
    """Says too late that it has a strength."""
    def __init__(self, bench):
        super().__init__(bench)
        self.start = 1.0

class Wrong(Rival):
    """Returns what it must not."""
    def __init__(self, bench, how):
        super().__init__(bench)
        self.how = how
    def depends_on(self):
        return {"set": {1}} if self.how == "set" else {}
    def answer(self, prompts, strength):
        right = self.bench.draw(prompts)
        if self.how == "raise":
            raise KeyError("what it needs")
        return {"short": right[1:], "none": None, "one_none": [*right[:-1], None], "text": "text",
                "reversed": right[::-1], "kl": [Answer(r, [0.1]) for r in right],
                "kl_nan": [Answer(r, [float("nan")] * len(r.completion_ids)) for r in right],
                "no_text": [replace(r, completion=None) for r in right], "half_text": ["\\ud800"] * len(right),
                "ids": [replace(r, completion_ids=[10**6]) for r in right]}[self.how]
'''


def make_inputs(folder: Path, count: int = 12, layer: int | None = None) -> None:
    """`base/`, `head/`, `prompts.jsonl` and `mine.py` in `folder`."""
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "base")
    tiny_tokenizer(chat=True).save_pretrained(folder / "base")
    where = {"hook_point": "lm_head"} if layer is None else {"layer": layer}
    method = "advantage" if layer is None else "ascent"
    head = tiny_head(model, **where, control=ControlConfig(method, step_size=0.5))
    head.config.base_model_name_or_path = str(folder / "base")
    head.save_pretrained(folder / "head")
    rows = [json.dumps({"prompt": f"w{i} w{i + 1}", "kl": i, "seconds": -1}) + "\n" for i in range(10, 10 + count)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "mine.py").write_text(_CODE)


def in_copy(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For a fixture: a copy of what [`make_inputs`] made, as the current folder."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("mine", None)


def settings(**changes) -> dict:
    """Of a small comparison."""
    return {
        "base": "base",
        "head": "head",
        "prompts": "prompts.jsonl",
        "rewards": "mine:variety",
        "controls": [
            {"kind": "base"},
            {"kind": "prompting", "instruction": "w50 w51"},
            {"kind": "best_of_n", "n": 3},
            {"kind": "advantage", "strengths": [0.3, 0.6]},
        ],
        "max_new_tokens": 6,
        "part_size": 5,
        "output": "out",
    } | changes


def write_file(folder: Path, **changes) -> list[str]:
    """`compare.yaml`, and the words of the command that reads it."""
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings(**changes), allow_unicode=True))
    return ["compare", "--config", "compare.yaml"]
