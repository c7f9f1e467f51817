"""Language models as judges: what they are asked, how their replies are read, and when they are asked again."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from ...utils.checks import check_choice, check_int, check_text
from .judge import MODES, REFUSED, UNPARSABLE, Judge, Question, Verdict, check_settings

_ASK_PAIR = """Two answers to one request follow. Which is better? {criteria}
Reply with JSON alone: {{"verdict": "A"}}, {{"verdict": "B"}} or {{"verdict": "tie"}}.

<request>
{prompt}
</request>
<answer A>
{answer}
</answer A>
<answer B>
{other}
</answer B>"""
_ASK_SCORE = """An answer to a request follows. How good is it, from 1 (worst) to 10 (best)? {criteria}
Reply with JSON alone, such as {{"score": 5}}.

<request>
{prompt}
</request>
<answer>
{answer}
</answer>"""
# Where what an answer says would end it.
_TAGS = re.compile(r"<(?=/?(?:answer|request)\b)", re.IGNORECASE)
_ASK = {"pair": _ASK_PAIR, "score": _ASK_SCORE}
# What is asked for, which some models repeat: that is no verdict.
_CHOICES = {"pair": '{"verdict": "A"}, {"verdict": "B"} or {"verdict": "tie"}', "score": 'such as {"score": 5}'}
_AGAIN = {
    "pair": f"That held no verdict. Reply with {_CHOICES['pair']} alone.",
    "score": f"That held no score. Reply with JSON alone, {_CHOICES['score']}: a number from 1 to 10.",
}
# Texts in JSON with line breaks are read too.
_JSON = json.JSONDecoder(strict=False)
# Where thoughts end, also those that a chat template has begun, and those that have no end.
_THOUGHTS_END = re.compile(r"</think(?:ing)?>|\[/THINK\]", re.IGNORECASE)
_THOUGHTS_BEGIN = re.compile(r"\s*(?:<think(?:ing)?>|\[THINK\])", re.IGNORECASE)
# Characters of a reply that an error repeats.
_SHOWN = 200
# Characters at the end of a reply that are read.
_READ = 20_000
_PAIR_VALUES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_LOWEST, _HIGHEST = 1, 10
# How replies begin that decline. They count as refusals only if they hold no verdict.
_DECLINES = re.compile(
    r"\W*(i['’]?m |i am )?(very |really |so )?(sorry|unable to|afraid)\b|\W*(i|we) (can(no|['’])t|can not|won['’]t|"
    r"will not|must decline|decline)\b|\W*as an ai\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reply:
    """
    What a language model said.

    Args:
        text (`str`, *optional*):
            `None` if what came could not be read.
        refused (`bool`, *optional*, defaults to `False`):
            Whether the model, or whoever runs it, refused to judge.
        input_tokens, output_tokens (`int`, *optional*, default to 0):
            What it cost.
    """

    text: str | None
    refused: bool = False
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class LanguageJudge(Judge):
    """
    A language model as a judge: asked in words, at temperature 0 or greedily, it replies with JSON.

    Args:
        model (`str`):
            Its name.
        mode (`str`, *optional*, defaults to `"pair"`):
            `"pair"`: which of two answers is better, in both orders. `"score"`: how good one answer is, from 1 to 10.
        criteria (`str`, *optional*, defaults to `""`):
            What makes an answer better.
        max_retries (`int`, *optional*, defaults to 3):
            How often it is asked again where a reply holds no verdict.
        max_tokens (`int`, *optional*, defaults to 256):
            Of a reply.

    Raises:
        `ValueError`: for a setting of another type or out of its range; names it.
    """

    model: str
    mode: str = "pair"
    criteria: str = ""
    max_retries: int = 3
    max_tokens: int = 256

    # What verdicts depend on.
    asked: ClassVar[tuple[str, ...]] = ("model", "mode", "criteria", "max_tokens")

    def __post_init__(self):
        check_choice("judge.mode", self.mode, MODES)
        check_text("judge.model", self.model)
        check_text("judge.criteria", self.criteria, empty=True)
        check_int("judge.max_retries", self.max_retries, low=0, high=100)
        check_int("judge.max_tokens", self.max_tokens, low=1)

    @classmethod
    def of(cls, given: dict[str, Any]) -> LanguageJudge:
        """
        From what a comparison's file says under `judge`, without its `kind`.

        Raises:
            `ValueError`: for a name that there is not, or a setting that cannot be.
        """
        check_settings(given, [field.name for field in fields(cls)])
        if "model" not in given:
            raise ValueError("`judge` needs a `model`.")
        return cls(**given)

    def depends_on(self) -> dict[str, Any]:
        wording = hashlib.sha256(f"{_ASK[self.mode]} {_AGAIN[self.mode]}".encode()).hexdigest()[:8]
        return {name: getattr(self, name) for name in self.asked} | {"wording": wording}

    @cached_property
    def without_verdict(self) -> list[str]:
        """How the first reply that held no verdict begins, if there was one: kept in memory alone."""
        return []

    def shown(self, text: str) -> str:
        """What an error may repeat of a reply."""
        return text[:_SHOWN]

    def replies(self, talks: Sequence[list[dict[str, str]]]) -> list[Reply]:
        """One reply to each talk (messages with `role` and `content`)."""
        raise NotImplementedError

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        talks = [[{"role": "user", "content": self._ask(question)}] for question in questions]
        values: list[float | None] = [None] * len(talks)
        costs, refused = [[0, 0, 0] for _ in talks], [False] * len(talks)
        missing = list(range(len(talks)))
        for _ in range(self.max_retries + 1):
            for place, reply in zip(missing, self.replies([talks[place] for place in missing]), strict=True):
                spent = (1, reply.input_tokens, reply.output_tokens)
                costs[place] = [a + b for a, b in zip(costs[place], spent, strict=True)]
                values[place] = parsed(reply.text or "", self.mode)
                refused[place] = reply.refused or bool(_DECLINES.match(reply.text or ""))
                if values[place] is None and reply.text:
                    if not self.without_verdict:
                        self.without_verdict.append(self.shown(reply.text))
                    again = {"role": "user", "content": _AGAIN[self.mode]}
                    talks[place] = [talks[place][0], {"role": "assistant", "content": reply.text}, again]
            missing = [place for place in missing if values[place] is None]
            if not missing:
                break
        return [
            Verdict(value, (REFUSED if no else UNPARSABLE) if value is None else None, *cost, self.max_retries)
            for value, no, cost in zip(values, refused, costs, strict=True)
        ]

    def _ask(self, question: Question) -> str:
        texts = {"prompt": question.prompt, "answer": question.answer, "other": question.other or ""}
        texts = {name: _TAGS.sub("&lt;", text) for name, text in texts.items()}
        return _ASK[self.mode].format(criteria=self.criteria, **texts)


def parsed(reply: str, mode: str = "pair") -> float | None:
    """
    The last verdict or score that a reply holds behind its thoughts, also among prose and code fences; `None` without
    one.
    """
    said = _THOUGHTS_END.split(reply)[-1]
    if _THOUGHTS_BEGIN.match(said):
        return None
    said, place, value = said[-_READ:].replace(_CHOICES[mode], ""), 0, None
    while (place := said.find("{", place)) >= 0:
        try:
            found, end = _JSON.raw_decode(said, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        own = _verdict(found.get("verdict")) if mode == "pair" else _score(found.get("score"))
        # It may stand in an object inside.
        place = place + 1 if own is None else end
        value = value if own is None else own
    return value


def _verdict(found: Any) -> float | None:
    said = found.strip(" \n.").upper() if isinstance(found, str) else ""
    return _PAIR_VALUES.get(said.removeprefix("ANSWER "))


def _score(found: Any) -> float | None:
    try:
        # A whole number may have more digits than a float holds.
        value = float(str(found).strip().removesuffix("/10")) if isinstance(found, (str, int, float)) else math.nan
    except ValueError:
        return None
    return value if _LOWEST <= value <= _HIGHEST else None
