"""The texts of single tokens, which tokenizers only have for many together."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no character (yet).
_BROKEN = "\ufffd"


class TokenTexts:
    """
    Texts of tokens, special ones spelled out.

    Args:
        tokenizer:
            Of the base.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # Some tokenizers drop the space before the first token of a text, and write it only behind another.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def alone(self, token: int) -> str:
        """The text of a token behind another one."""
        if token not in self._known:
            before, both = self._decode(self._before), self._decode([*self._before, token])
            self._known[token] = both[len(before) :] if both.startswith(before) else self._decode([token])
        return self._known[token]

    def of_response(self, ids: Sequence[int]) -> list[str]:
        """
        Texts of a response's tokens, which make its text. Where several tokens spell one character the last of them
        has it, the others have no text.
        """
        texts, done = [], ""
        for count in range(1, len(ids) + 1):
            text = self._decode(ids[:count])
            if text.endswith(_BROKEN) and count < len(ids):
                texts.append("")
                continue
            texts.append(text[len(done) :] if text.startswith(done) else self._decode(ids[count - 1 : count]))
            done = text
        return texts
