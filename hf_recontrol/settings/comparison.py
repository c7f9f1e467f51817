"""Settings of what comes after training: the comparison of a control with others, a search for one, a trace of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..utils.checks import check_choice, check_number
from ..utils.choices import CONTROL_METHODS
from ..utils.setting_fields import number_of_text, setting, settings_class
from .stages import (
    LoadingSettings,
    PromptSettings,
    SamplingSettings,
    ScoringSettings,
    SeedSettings,
    StopSettings,
    TemplateSettings,
)

# What a comparison works on, beside its settings.
COMPARE_INPUTS = {
    "base": "texts",
    "head": "texts",
    "prompts": "text",
    "held_out": "text",
    "rewards": "texts",
    "judge": "any",
    "controls": "any",
    "rollouts": "texts",
    "output": "text",
}
# What a search for a control works on, beside its settings.
TUNE_INPUTS = {"head": "text", "base": "text", "prompts": "text", "rewards": "texts", "output": "text"}
_CRITERIA = ("reward_at_kl", "paper")
# Nats a token that controls are tried at where nothing else is said.
_TUNED_AT = (0.05, 0.1, 0.2)
# What `quick` sets where nothing else is said.
_QUICK = {"limit": 128, "max_new_tokens": 48}
# Fewer prompts say little of a KL.
HELD_OUT_PROMPTS = 64


@settings_class("Answers")
class AnswerSettings(SamplingSettings, ScoringSettings, PromptSettings, LoadingSettings):
    """How answers of controls are drawn and measured."""

    embeddings: str | None = setting(
        None,
        "Model of sentence-transformers (folder or Hub name) for the coherence of prompt and response, such as the "
        "paper's princeton-nlp/sup-simcse-bert-base-uncased.",
        default_text="coherence is not measured",
    )
    part_size: int = setting(
        16,
        "Prompts that each control answers before the next one's turn: what a stop can cost. With the samples of each "
        "they are also the largest batch, so raise it with `batch_size`.",
        low=1,
    )
    on_seen_prompts: Literal["error", "skip", "allow"] = setting(
        "error",
        "What to do about prompts that the head has seen: raise; leave them out, and take the limit and held-out ones "
        "of the others; or take them all the same.",
    )


@settings_class("Comparison")
class CompareSettings(AnswerSettings):
    """How controls are compared."""

    strengths: tuple[float, ...] = setting(
        (),
        "Strengths (step sizes) at which each control that has one is measured, unless it has `strengths` or `kl` of "
        "its own.",
        above=0,
        default_text="what the head recommends",
    )
    kl: tuple[float, ...] = setting(
        (),
        "Instead of `strengths`: nats a token to the base, at which every control is measured that can be scaled and "
        "has neither of its own. The strength is found on held-out prompts.",
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
        for name, value in _QUICK.items() if self.quick else ():
            said = getattr(self, name) is not None or (name == "max_new_tokens" and self.generation_config is not None)
            if not said:
                self.fill(name, value)


@settings_class("Tuning")
class TuneSettings(AnswerSettings):
    """How the control that a head recommends is searched for."""

    criterion: Any = setting(
        "reward_at_kl",
        "What the best control has most of: `reward_at_kl`, the reward at one KL to the base; `paper`, coherence + "
        "diversity + reward (Kong et al. 2024), which needs `embeddings`; or weights of metrics of a comparison as a "
        'JSON object, such as {"reward": 1, "kl_per_response": -0.1}.',
    )
    kl: tuple[float, ...] = setting(
        (),
        "Nats a token to the base at which each control is tried; its step size is found for each.",
        above=0,
        default_text="0.1 for reward_at_kl, else 0.05,0.1,0.2; none with step_sizes",
    )
    step_sizes: tuple[float, ...] = setting((), "Instead of `kl`: step sizes at which each control is tried.", above=0)
    methods: tuple[str, ...] = setting(
        (), "Methods that are tried: static, advantage, ascent.", default_text="all that the head has"
    )
    num_steps: tuple[int, ...] = setting(
        (),
        "Numbers of steps that the ascent is tried with.",
        low=1,
        default_text="what the head recommends for the ascent, else 30",
    )
    plausibility: tuple[float, ...] = setting(
        (),
        "Plausibilities (p of the mask of implausible tokens) that each method is tried with.",
        low=0,
        high=1,
        default_text="what the head recommends, else 0",
    )
    max_kl: Any = setting(
        (),
        "Limits on each token's KL to the base, in nats, that each method is tried with, such as 0.5,none (`none`: no "
        "limit).",
        default_text="what the head recommends, else none",
    )
    budget: int = setting(
        4000,
        "Responses drawn at most. Half of them may go into finding step sizes; the rest measures the controls, on "
        "more prompts the fewer of them are left.",
        low=1,
    )

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "criterion", _checked_criterion(self.criterion))
        for method in self.methods:
            check_choice("methods[...]", method, CONTROL_METHODS)
        object.__setattr__(self, "max_kl", _checked_limits(self.max_kl))
        if self.kl and self.step_sizes:
            raise ValueError("`kl` and `step_sizes` both say how strong controls are: use one of them.")
        if self.criterion == "reward_at_kl" and (self.step_sizes or len(self.kl) > 1):
            raise ValueError("`criterion='reward_at_kl'` compares controls at one KL: give one `kl`, no `step_sizes`.")
        if not self.kl and not self.step_sizes:
            self.fill("kl", (0.1,) if self.criterion == "reward_at_kl" else _TUNED_AT)


@settings_class("Trace")
class TraceSettings(SeedSettings, TemplateSettings, StopSettings):
    """How the two responses of a trace are drawn, and how much is told of each token."""

    max_new_tokens: int = setting(128, "Tokens drawn at most for each response.", low=1)
    temperature: float = setting(
        0.0, "Sampling temperature of both responses, which are drawn with the same noise; 0 is greedy.", low=0
    )
    num_alternatives: int = setting(
        5, "How many of the likeliest tokens of the base, and of those under control, are told at each place.", low=1
    )


def _checked_limits(limits: Any) -> tuple[float | None, ...]:
    """Limits from a list, a text of a command, or one of them alone; `none` is no limit."""
    if isinstance(limits, str):
        limits = [each.strip() for each in limits.split(",") if each.strip()]
    return tuple(
        None if each in (None, "none") else check_number("max_kl[...]", number_of_text(float, each), above=0)
        for each in (limits if isinstance(limits, Sequence) else [limits])
    )


def _checked_criterion(criterion: Any) -> str | dict[str, float]:
    if isinstance(criterion, str) and criterion.lstrip().startswith("{"):
        try:
            criterion = json.loads(criterion)
        except ValueError as error:
            raise ValueError(f"`criterion` is no JSON object ({error}).") from error
    if not isinstance(criterion, Mapping):
        check_choice("criterion", criterion, _CRITERIA)
        return criterion
    weights = {
        name: check_number(f"criterion[{name!r}]", number_of_text(float, weight)) for name, weight in criterion.items()
    }
    if not any(weights.values()):
        raise ValueError(f"`criterion` must give some metric a weight, got {criterion!r}.")
    return {name: weight for name, weight in weights.items() if weight}
