"""What says which of two answers is better, or how good one answer is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.templating import message_text

MODES = ("pair", "score")
# Why there is no verdict.
REFUSED, UNPARSABLE = "refused", "unparsable"


def shown_prompt(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as a judge reads it: a chat as `role: text`, of one turn the text alone."""
    if isinstance(prompt, str):
        return prompt
    turns = [(message.get("role"), _said(message)) for message in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)


def _said(message: Mapping[str, Any]) -> str:
    """What a message says, and the tools that it calls."""
    called = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(filter(None, [message_text(message), *called]))


def check_settings(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `ValueError` for a setting of a judge that there is not; names it, and those there are."""
    if unknown := sorted(str(name) for name in set(given) - set(names)):
        raise ValueError(f"`judge` has no setting {', '.join(unknown)}. It has: kind, {', '.join(names)}.")


@dataclass(frozen=True)
class Question:
    """
    What a judge is asked.

    Attributes:
        prompt (`str`):
            What was asked for. Of a chat its turns, of one turn what it says.
        answer (`str`):
            The answer to score, or the first one of two.
        other (`str`, *optional*):
            The second one of two.
    """

    prompt: str
    answer: str
    other: str | None = None


@dataclass(frozen=True)
class Verdict:
    """
    What a judge says.

    Args:
        value (`float`, *optional*):
            Of a pair 1 if the first answer is better, 0.5 for a tie, 0 if the second one is; else the answer's score.
            `None`: no verdict.
        why (`str`, *optional*):
            Why there is none: `"refused"` or `"unparsable"` (the default).
        calls, input_tokens, output_tokens (`int`, *optional*):
            What it cost.
        retries (`int`, *optional*, defaults to 0):
            How often it was tried again at most. A judge that would try more often asks again.
    """

    value: float | None
    why: str | None = None
    calls: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    retries: int = 0

    def __post_init__(self):
        if self.value is None and self.why is None:
            object.__setattr__(self, "why", UNPARSABLE)


class Judge:
    """
    A judge of answers. Derive from it, write `verdicts`, and give an instance to [`compare`] as its `judge`.

    Attributes:
        mode (`str`, defaults to `"pair"`):
            `"pair"`: which of two answers is better, asked in both orders. `"score"`: how good one answer is.
        batch_size (`int`, defaults to 1):
            Questions that are handed to one call of `verdicts`.
        concurrency (`int`, defaults to 1):
            Calls of `verdicts` at once, in threads.
        max_retries (`int`, defaults to 0):
            How often it tries again where there was no verdict.
        input_price, output_price (`float`, *optional*):
            What a token costs.

    Example:

    ```python
    class Shorter(Judge):
        def verdicts(self, questions):
            return [float(len(q.answer) < len(q.other)) for q in questions]
    ```
    """

    mode: str = "pair"
    batch_size: int = 1
    concurrency: int = 1
    max_retries: int = 0
    input_price: float | None = None
    output_price: float | None = None

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict | float | None]:
        """One for each question: a [`Verdict`], its value alone, or `None` without one."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise if it cannot judge. Called once, before any answer is drawn."""

    def depends_on(self) -> dict[str, Any] | None:
        """
        Everything that verdicts depend on, as JSON. With it verdicts are kept, and not asked for again; `None`: each
        run asks anew.
        """
        return None
