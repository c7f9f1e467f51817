"""Prompting: an instruction in front of each prompt."""

from __future__ import annotations

from typing import Any

from ..data.prompts import Prompt, Prompts
from ..data.templating import PromptEncoder, message_text
from ..utils.checks import check_choice

INSTRUCTION_ROLES = ("system", "user")


def with_instruction(prompts: Prompts, instruction: str, role: str, encoder: PromptEncoder) -> Prompts:
    """
    The same prompts, each with an instruction: in the system's turn, behind what stands there already, or at the
    beginning of the user's first turn. Where the tokenizer has no chat template, texts get it in front of them.

    Args:
        instruction (`str`):
            What to ask for.
        role (`str`):
            `"system"` or `"user"`; for models whose chat template knows no system's turn, the latter.
        encoder ([`PromptEncoder`]):
            Tells which texts are in the model's format already: nobody knows where in these an instruction belongs.

    Raises:
        `ValueError`: for a text in the model's format; if the instruction is empty.
    """
    check_choice("instruction_role", role, INSTRUCTION_ROLES)
    if not instruction.strip():
        raise ValueError("`instruction` must be a text that is not empty.")
    has_template = encoder.tokenizer.chat_template is not None
    rows = []
    for index, row in enumerate(prompts.rows):
        prompt = row["prompt"]
        if isinstance(prompt, str) and not has_template:
            asked: Prompt = f"{instruction}\n\n{prompt.lstrip()}"
        elif isinstance(prompt, str) and encoder.is_formatted(prompt):
            raise ValueError(
                f"{prompts.place(index)}: the prompt is in the model's own format, so an instruction has no place in "
                "it: give the user's text or chat messages."
            )
        else:
            asked = _in_chat(
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, instruction, role
            )
        rows.append(row | {"prompt": asked})
    return Prompts(rows, prompts.numbers, places=prompts.places)


def _in_chat(messages: list[dict[str, Any]], instruction: str, role: str) -> list[dict[str, Any]]:
    place = next((i for i, message in enumerate(messages) if message["role"] == role), None)
    if place is None:
        return [{"role": role, "content": instruction}, *messages]
    message = messages[place]
    first, second = (instruction, message_text(message)) if role == "user" else (message_text(message), instruction)
    return [*messages[:place], {**message, "content": f"{first}\n\n{second}"}, *messages[place + 1 :]]
