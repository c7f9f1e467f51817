"""Prompts to token ids: the chat template, once, and what becomes of special tokens in a prompt's own text."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..settings import TemplateSettings
from .prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

# Texts that no template changes and no prompt holds, to see what a template puts around a message.
_USER, _SYSTEM = "q7xuserx7q", "q7xsystemx7q"
# What of `apply_chat_template`'s own arguments a template reads.
_FOR_TEMPLATES = ("documents",)

# What a user should hear of once, with the first example.
_ENDS = (
    "the end token {!r} stands last, which the tokenizer or its chat template adds: the model is asked to go on "
    "behind its own end. Turn that off (`tokenizer.add_eos_token = False`)."
)
_MENTIONS = (
    "special tokens such as {!r} are mentioned, and are taken as ordinary text. If they are to act as special tokens: "
    "`prompt_format='formatted'` (`--prompt-format formatted`)."
)
_HOLDS = (
    "special tokens such as {!r} act as such, since the tokenizer has no chat template. If they are ordinary text: "
    "`prompt_format='plain'` (`--prompt-format plain`)."
)
_UNKNOWN = "the chat template is given {!r}, which it does not know and ignores."
_UNREACHED = "{!r} reaches no chat template: the tokenizer has none, or the text is formatted already."
# A chat's texts that are looked for from its beginning, at most.
_MOST_SEARCHES = 100
_LOSES = "the chat template leaves out or changes a message, such as one of the role {!r}."


def message_text(message: Mapping[str, Any]) -> str:
    """What a chat message says: of a content in parts each part's text, or the type of what is no text, on a line."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(f"({part.get('type')})" if part.get("text") is None else part["text"] for part in content)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text: of a chat what its messages say."""
    return prompt if isinstance(prompt, str) else "\n\n".join(filter(None, map(message_text, prompt)))


def rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], **options: Any) -> dict[str, list[int]]:
    """A chat's inputs. Special tokens that its own texts mention are ordinary text, where the tokenizer can."""
    render = partial(tokenizer.apply_chat_template, chat, return_dict=True, **options)
    text = prompt_text(chat)
    mentioned = any(token in text for token in tokenizer.all_special_tokens)
    if mentioned and "sanitize_control_tokens" in inspect.signature(render).parameters:
        # It fails where the tokenizer reads such a token out of any text.
        with contextlib.suppress(ValueError):
            return dict(render(sanitize_control_tokens=True))
    return dict(render())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def mentions(template: str | Mapping[str, str], name: str) -> bool:
    """Whether a chat template, or one of several, has the name as a word. What it does not name has no effect."""
    written = template if isinstance(template, str) else "\n".join(template.values())
    return re.search(rf"\b{re.escape(name)}\b", written) is not None


def unknown_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> list[str]:
    """
    Those of a chat template's arguments that the tokenizer's template does not mention.

    Raises:
        `ValueError`: if the tokenizer has no template; for what is no argument of a template but of
        `apply_chat_template`.
    """
    if not arguments:
        return []
    template = tokenizer.chat_template
    if template is None:
        raise ValueError("`chat_template_kwargs` are given, but the tokenizer has no chat template.")
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if taken := sorted(name for name in arguments if name in own and name not in _FOR_TEMPLATES):
        more = ": `tools` stand beside the messages" if taken[0] == "tools" else ""
        raise ValueError(
            f"`chat_template_kwargs` may not hold {taken[0]!r}, which is no argument of a template{more}."
        )
    return [name for name in arguments if not mentions(template, name)]


class PromptEncoder:
    """
    Encodes prompts for one tokenizer, and remembers what a user should hear of.

    Args:
        tokenizer:
            With a chat template or without.
        settings ([`TemplateSettings`]):
            How prompts are formatted.

    Raises:
        `ValueError`: for arguments of the chat template that it does not know.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings):
        self.tokenizer, self.settings = tokenizer, settings
        self._check_arguments(settings.chat_template_kwargs, must_be_known=True)
        # Templates of models that also take images know parts, and write nothing for a text.
        self._in_parts = False
        user = {"role": "user", "content": _USER}
        around = self._around(_USER, [user])
        if around is None:
            self._in_parts = True
            around = self._around(_USER, [user])
            self._in_parts = around is not None
        before_user, after_user = around or ("", "")
        before_system, _ = self._around(_SYSTEM, [{"role": "system", "content": _SYSTEM}, user]) or ("", "")
        added = tokenizer.added_tokens_decoder.values()
        written = before_user + before_system + after_user
        tokens = {token.content for token in added if token.special or token.content in written}
        tokens |= set(tokenizer.all_special_tokens)
        tokens = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._bos = tokenizer.bos_token or ""
        self._begins_with_bos = bool(self._bos) and before_user.startswith(self._bos)
        # Each way in which a formatted text may begin: with or without the template's first tokens or system message.
        self._openings = {
            before[match.start() :]
            for before in (before_user, before_system)
            for match in self._special.finditer(before)
        } - {self._bos, ""}
        # A template that marks turns in plain words is known by its beginning and by what follows the message.
        self._plain_opening = before_user.removeprefix(self._bos).strip()
        self._after = after_user.strip()
        found = self._special.search(self._after)
        self._goes_on = found.group() if found else self._after
        self._notes: dict[str, tuple[int, str]] = {}

    def _around(self, mark: str, messages: list[dict]) -> tuple[str, str] | None:
        """What the template writes before and behind the text `mark`; `None` if it does not write that."""
        try:
            before, found, after = self._render(messages).partition(mark)
        except Exception:  # templates are other people's programs
            return None
        return (before, after) if found else None

    def _render(self, messages: list[dict], **options: Any) -> str:
        options = self.settings.chat_template_kwargs | options
        messages = self._for_template(messages)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)

    def _for_template(self, messages: list[dict]) -> list[dict]:
        """Messages as the template reads them: without nulls, for it asks whether a key is there, and in its parts."""
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self._in_parts:
            for message in messages:
                if isinstance(message.get("content"), str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
        return messages

    def _check_arguments(self, arguments: Mapping[str, Any], must_be_known: bool) -> None:
        for name in unknown_arguments(self.tokenizer, arguments):
            if must_be_known:
                raise ValueError(f"`chat_template_kwargs`: the chat template knows no {name!r}.")
            self._note(_UNKNOWN, name)

    def _note(self, what: str, example: str) -> None:
        count, first = self._notes.get(what, (0, example))
        self._notes[what] = (count + 1, first)

    def take_lost(self) -> str | None:
        """What was said of messages that the chat template left out, once."""
        _, example = self._notes.pop(_LOSES, (0, None))
        return None if example is None else _LOSES.format(example)

    def report(self) -> None:
        """Warn of what was met while encoding, of each kind once."""
        for what, (count, example) in self._notes.items():
            logger.warning(f"In {'1 prompt' if count == 1 else f'{count} prompts'} {what.format(example)}")
        self._notes.clear()

    def is_formatted(self, text: str) -> bool:
        """Whether a text is in the model's format already: it begins and goes on as the chat template does."""
        if self.settings.prompt_format != "auto":
            return self.settings.prompt_format == "formatted"
        if self.tokenizer.chat_template is None:
            return True
        text = text.lstrip()
        for opening in sorted(self._openings, key=len, reverse=True):
            if text.startswith(opening):
                return self._goes_on in text[len(opening) :]
        opening = self._plain_opening
        return bool(opening and self._after) and text.startswith(opening) and self._after in text[len(opening) :]

    def encode(self, row: Mapping[str, Any]) -> list[int]:
        """
        Token ids of a row's `prompt`.

        Raises:
            `ValueError`: if the prompt has no tokens, or the tokenizer cannot take it; says why.
        """
        prompt, options = row["prompt"], self._options(row)
        if isinstance(prompt, str) and (self.tokenizer.chat_template is None or self.is_formatted(prompt)):
            given = {"chat_template_kwargs": {}} if self.settings.chat_template_kwargs else {}
            for name in given | options:
                self._note(_UNREACHED, name)
            ids = self._encode_text(prompt)
        else:
            ids = self._encode_chat(prompt, options)
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens.")
        last = self.tokenizer.convert_ids_to_tokens(ids[-1])
        ends = (self.tokenizer.eos_token, self.tokenizer.sep_token)
        if last in ends and not (isinstance(prompt, str) and prompt.rstrip().endswith(last)):
            self._note(_ENDS, last)
        return ids

    def _options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row gives the chat template beside its messages."""
        tools = _of_kind(row, "tools", list, "a list of tools' JSON schemas")
        if not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError("The column 'tools' must hold tools' JSON schemas: if it holds none, rename it.")
        given = _of_kind(row, "chat_template_kwargs", dict, "an object of arguments")
        options = {"chat_template_kwargs": given} if given else {}
        return options | ({"tools": tools} if tools else {})

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self.tokenizer
        has_template = tokenizer.chat_template is not None
        mentioned = self._special.search(text.lstrip().removeprefix(self._bos))
        if self.settings.prompt_format == "plain":
            ids = tokenizer(text, split_special_tokens=True)["input_ids"]
            body = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            if mentioned and tokenizer.convert_tokens_to_ids(mentioned.group()) in body:
                raise ValueError(f"The tokenizer cannot take {mentioned.group()!r} as ordinary text.")
            return list(ids)
        if mentioned and self.settings.prompt_format == "auto" and not has_template:
            self._note(_HOLDS, mentioned.group())
        if text.lstrip().startswith(self._bos) if self._bos else False:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not has_template:
            return list(tokenizer(text)["input_ids"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [tokenizer.bos_token_id, *ids] if self._begins_with_bos else list(ids)

    def _encode_chat(self, prompt: Prompt, options: dict[str, Any]) -> list[int]:
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError("The prompt is a list of chat messages, but the tokenizer has no chat template.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        arguments = options.pop("chat_template_kwargs", {})
        self._check_arguments(arguments, must_be_known=False)
        options |= self.settings.chat_template_kwargs | arguments
        if "tools" in options and not mentions(template, "tools"):
            self._note(_UNKNOWN, "tools")
        harmless = self._harmless(messages, options.get("tools"))
        try:
            self._check_rendering(messages, options)
            encoded = self.tokenizer.apply_chat_template(
                self._for_template(messages), add_generation_prompt=True, return_dict=True, **options, **harmless
            )
        except Exception as error:  # templates are other people's programs
            raise ValueError(f"the chat template does not take the prompt: {error}") from error
        return list(encoded["input_ids"])

    def _harmless(self, messages: list[dict], tools: Any) -> dict[str, bool]:
        """The option under which special tokens that the prompt's own text mentions are ordinary text."""
        # An answer's marks, such as those around a thought, are its own.
        asked = [message for message in messages if message["role"] != "assistant"]
        found = next((match for text in _texts([asked, tools]) if (match := self._special.search(text))), None)
        if found is None or self.settings.prompt_format == "formatted":
            return {}
        if "sanitize_control_tokens" not in inspect.signature(self.tokenizer.apply_chat_template).parameters:
            raise ValueError(
                f"The prompt mentions the special token {found.group()!r}, which this release of transformers cannot "
                "take as ordinary text: upgrade it, or, if the token is to act as one, `prompt_format='formatted'` "
                "(`--prompt-format formatted`)."
            )
        self._note(_MENTIONS, found.group())
        return {"sanitize_control_tokens": True}

    def _check_rendering(self, messages: list[dict], options: dict[str, Any]) -> None:
        """Raise if a content in parts is printed as Python has it; note messages that are not there as they were."""
        rendered, at, searches = self._render(messages, **options), 0, 0

        def stands(text: str) -> bool:
            nonlocal at, searches
            # As a rule behind the one before: to begin anew for each would take the square of a chat's length.
            place = rendered.find(text, at)
            if place < 0 and searches < _MOST_SEARCHES:
                searches, place = searches + 1, rendered.find(text)
            at = max(at, place + len(text)) if place >= 0 else at
            return place >= 0 or searches == _MOST_SEARCHES

        for message in messages:
            content = message.get("content") or ""
            if isinstance(content, list) and str(content) in rendered:
                raise ValueError("it takes contents as texts, not in parts")
            texts = [part["text"] for part in content] if isinstance(content, list) else [content]
            if message["role"] not in ("assistant", "tool") and not all(stands(text.strip()) for text in texts):
                self._note(_LOSES, message["role"])


def _of_kind(row: Mapping[str, Any], column: str, kind: type, expected: str) -> Any:
    """What a column for the chat template holds, itself or as JSON; an empty one where there is nothing."""
    value = row.get(column)
    if isinstance(value, str):
        # What is no JSON stays a text, and is named below.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value) if value.strip() else None
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(
            f"The column {column!r} holds {value!r}, expected {expected}: name it otherwise if it is none."
        )
    return value


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Mapping[str, Any],
    settings: TemplateSettings | None = None,
    **changes: Any,
) -> list[int]:
    """
    Token ids of a prompt, as all stages see it.

    Chat messages, and texts if the tokenizer has a chat template, go through the template (a text as the user's
    message). Special tokens that their own text mentions are ordinary text, and a warning says so. A text that begins
    and goes on as the template does is formatted already: it is taken as it is, its special tokens act as such, and
    nothing is added but the token that begins every text (BOS), if it is missing. Without a chat template a text is
    tokenized as the tokenizer does by default.

    Args:
        tokenizer:
            Of the base.
        prompt (`str`, `list[dict]` or `dict`):
            A text, chat messages, or a row with a `prompt` and, if need be, `tools` and `chat_template_kwargs`.
        settings ([`TemplateSettings`], *optional*), changes:
            How prompts are formatted; single settings as keywords.

    Raises:
        `ValueError`: for chat messages and a tokenizer without a chat template, a prompt without tokens, and what the
        template does not take.
    """
    encoder = PromptEncoder(tokenizer, TemplateSettings.of(settings, changes))
    ids = encoder.encode(prompt if isinstance(prompt, Mapping) else {"prompt": prompt})
    encoder.report()
    return ids
