"""Settings of what comes after training: the comparison of a control with others."""

from __future__ import annotations

from typing import Literal

from ..utils.setting_fields import setting, settings_class
from .stages import LabelSettings, LoadingSettings, PromptSettings, SamplingSettings

# What a comparison works on, beside its settings.
COMPARE_INPUTS = {
    "base": "text",
    "head": "text",
    "prompts": "text",
    "held_out": "text",
    "rewards": "texts",
    "judge": "any",
    "controls": "any",
    "rollouts": "text",
    "output": "text",
}
# What `quick` sets where nothing else is said.
QUICK = {"limit": 128, "max_new_tokens": 48}
# Fewer prompts say little of a KL.
HELD_OUT_PROMPTS = 64


@settings_class("Answers")
class AnswerSettings(SamplingSettings, LabelSettings, PromptSettings, LoadingSettings):
    """How answers of controls are drawn and measured."""

    embeddings: str | None = setting(
        None,
        "Model of sentence-transformers (folder or Hub name) for the coherence of prompt and response, such as the "
        "paper's princeton-nlp/sup-simcse-bert-base-uncased.",
        default_text="coherence is not measured",
    )
    part_size: int = setting(
        16, "Prompts that each control answers before the next one's turn: what a stop can cost.", low=1
    )
    on_seen_prompts: Literal["error", "skip", "allow"] = setting(
        "error",
        "What to do about prompts that the head has seen: raise, leave them out, or take them all the same.",
    )


@settings_class("Comparison")
class CompareSettings(AnswerSettings):
    """How controls are compared."""

    strengths: tuple[float, ...] = setting(
        (),
        "Strengths (step sizes) at which each control that has one is measured, unless it has `strengths` of its own.",
        above=0,
        default_text="what the head recommends",
    )
    kl: tuple[float, ...] = setting(
        (),
        "Instead of `strengths`: nats a token to the base, at which every control is measured that can be scaled. The "
        "strength is found on held-out prompts.",
        above=0,
        default_text="none",
    )
    num_held_out: int = setting(
        HELD_OUT_PROMPTS,
        "With `kl`: prompts that are set aside to find strengths on, where no held-out prompts are named.",
        low=1,
    )
    against: str = setting("base", "The control that all differences and win rates are to.")
    instruction: str = setting(
        "Be as helpful, kind and positive as you can.",
        "What `prompting` asks the base for, unless it has an instruction of its own.",
    )
    perplexity: bool = setting(
        True, "Measure perplexity under the base. It takes a forward of each answer, also where no KL needs one."
    )
    quick: bool = setting(
        False,
        "A first table in minutes: the first 128 prompts (64 held out) and 48 new tokens, if nothing else is said.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.strengths and self.kl:
            raise ValueError("`strengths` and `kl` both say how strong controls are: use one of them.")
        if not self.instruction.strip():
            raise ValueError("`instruction` must be a text that is not empty.")
        for name, value in QUICK.items() if self.quick else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
