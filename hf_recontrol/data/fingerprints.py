"""What tells one thing that a run depends on from another: models, heads, hook points, files, prompts."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..configuration import ControlConfig
from ..heads.hub import portable_name
from ..utils.code_fingerprints import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .prompts import Prompts

# The control of responses of the base alone.
NO_CONTROL = {"control": False, "heads": {}}
# Of a head's configuration.
_DECIDES_EDITS = ("activation", "hook_point", "layer", "reward_mean", "reward_std")


def model_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one base model from another in the settings of a stage."""
    return {
        "model": portable_name(model.config._name_or_path),
        "model_revision": getattr(model.config, "_commit_hash", None),
        "model_fingerprint": model_fingerprint(model),
    }


def drawn_by_another(sampled: dict[str, Any], own: dict[str, Any], rollouts: str, use: str) -> str | None:
    """
    What to say where rollouts were drawn by another model than the one at hand, or by what it was before; `None` where
    they were not, as far as is known.

    Args:
        sampled (`dict`):
            The settings in the rollouts' manifest.
        own (`dict`):
            [`model_settings`] of the model at hand.
        rollouts, use (`str`):
            What the rollouts and their use are called, before `are those of MODEL` and before the model's name.
    """
    if sampled["model"] != own["model"]:
        return f"{rollouts} are those of {sampled['model']}, {use} {own['model']}."
    if sampled.get("model_fingerprint", own["model_fingerprint"]) != own["model_fingerprint"]:
        return (
            f"{rollouts} are those of what {sampled['model'] or 'the base'} was when they were sampled: now its "
            "weights or its dtype are others."
        )
    return None


@lru_cache(maxsize=2)
def _vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tells one tokenizer from another, with its chat template."""
    return {
        "tokenizer": [_vocabulary_fingerprint(tokenizer), tokenizer("a")["input_ids"]],
        "chat_template": hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16],
    }


def head_fingerprint(head: nn.Module) -> str:
    """A hash of a head's weights, and of what else decides which edit it makes of a state."""
    config = {name: getattr(head.config, name) for name in _DECIDES_EDITS}
    text = json.dumps([type(head).__name__, model_fingerprint(head), config])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def control_settings(model: PreTrainedModel, control: ControlConfig | bool) -> dict[str, Any]:
    """
    What tells one control of a model from another: the settings, and of each head that acts its weight and its
    fingerprint. A control that changes nothing is none.
    """
    if control is False:
        return dict(NO_CONTROL)
    with model.use_control(control):
        active, weights = model.active_control, model.active_value_heads
    if active is None:
        return dict(NO_CONTROL)
    heads = {name: [weight, head_fingerprint(model.value_heads[name])] for name, weight in weights.items()}
    return {"control": active.to_dict(), "heads": heads}


def hook_point_settings(model: PreTrainedModel, hook_point: str, layer: int) -> dict[str, Any]:
    """What tells the states of one hook point of a model from those of another."""
    return {
        "hook_point": hook_point,
        "layer": layer,
        "base_model_name_or_path": portable_name(model.config._name_or_path),
        "base_model_revision": getattr(model.config, "_commit_hash", None),
    }


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stable_number(value: str | list) -> int:
    """A 64-bit number that is the same for equal values, in every process."""
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)


def prompt_hash(prompt: str | list) -> int:
    """
    A 64-bit hash of what a prompt says: a text and the chat of its one user turn have the same one, and so do texts
    that differ in space, line ends or the form of Unicode alone. Splits, and what a head has seen, go by it.
    """
    return stable_number(_said(prompt))


def prompt_hashes(prompts: Prompts) -> list[int]:
    """The [`prompt_hash`] of each prompt, in their order."""
    return [prompt_hash(row["prompt"]) for row in prompts.rows]


def distinct(prompts: Prompts) -> Prompts:
    """Each prompt once, by its [`prompt_hash`]: the first of those that are equal."""
    once: dict[int, int] = {}
    for place, number in enumerate(prompt_hashes(prompts)):
        once.setdefault(number, place)
    return prompts.take(list(once.values()))


def _said(prompt: str | list) -> str | list:
    if isinstance(prompt, str):
        return _words(prompt)
    # Tables give every message the same keys, those that it lacks as None.
    turns = [
        {name: _content(value) if name == "content" else value for name, value in message.items() if value is not None}
        for message in prompt
    ]
    if len(turns) == 1 and turns[0].keys() == {"role", "content"} and turns[0]["role"] == "user":
        return turns[0]["content"]
    return turns


def _content(content: Any) -> Any:
    """A message's content by its words; one part that is a text is that text."""
    if isinstance(content, list) and len(content) == 1 and content[0].get("type", "text") == "text":
        content = content[0].get("text", content)
    if isinstance(content, list):
        return [
            part | {"text": _words(part["text"])} if isinstance(part.get("text"), str) else part for part in content
        ]
    return _words(content) if isinstance(content, str) else content


def _words(text: str) -> str:
    """A text without what tools change when they store it."""
    return " ".join(unicodedata.normalize("NFC", text).split())
