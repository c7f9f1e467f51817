"""Where a response ends: stop strings, and what of the drawn tokens is the response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

# Bytes beyond a stop string's own that are looked at: a token at its boundary may spell a few that belong elsewhere.
_BOUNDARY = 8


class StopStrings(StoppingCriteria):
    """
    Stops a row when its response holds one of the stop strings. transformers' own criterion looks at the prompt too,
    so a stop string could begin there, and does not know every tokenizer.

    Args:
        tokenizer, stop_strings:
            What to look for, special tokens spelled out.
        prompt_width (`int`, *optional*, defaults to 0):
            Length of the padded prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], prompt_width: int = 0):
        self.tokenizer, self.stop_strings, self.prompt_width = tokenizer, stop_strings, prompt_width
        # Each token spells a byte at least.
        self.tail = max(len(stop.encode()) for stop in stop_strings) + _BOUNDARY
        self._seen = prompt_width

    def ends(self, ids: Sequence[int], new: int = 1) -> bool:
        """Whether one of the last `new` tokens completes a stop string, if none before has."""
        text = self.tokenizer.decode(ids[-self.tail - new + 1 :])
        return any(stop in text for stop in self.stop_strings)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        # Drafts come several at once.
        new, self._seen = max(1, input_ids.shape[1] - self._seen), input_ids.shape[1]
        rows = input_ids[:, self.prompt_width :][:, -self.tail - new + 1 :].tolist()
        return torch.tensor([self.ends(row, new) for row in rows], device=input_ids.device)


def cut_response(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: list[int], stop_strings: Sequence[str]
) -> tuple[str, list[int], bool]:
    """The response up to its turn's end: its text, its tokens with the one that ended the turn, whether it ended."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), None)
    body, kept = ids[:end], ids if end is None else ids[: end + 1]
    length, whole = None, tokenizer.decode(body) if stop_strings else ""
    if any(stop in whole for stop in stop_strings):
        # Token by token, as generation looked: what it padded a stopped row with must not be taken for drawn tokens.
        stop = StopStrings(tokenizer, stop_strings)
        length = next((i for i in range(1, len(body) + 1) if stop.ends(body[:i])), None)
    if length is None:
        return tokenizer.decode(body, skip_special_tokens=True), kept, end is not None
    text = tokenizer.decode(body[:length], skip_special_tokens=True)
    # A stop string may be a special token, which the text leaves out.
    return text[: min([text.index(stop) for stop in stop_strings if stop in text], default=None)], body[:length], True
