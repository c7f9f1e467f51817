"""A language model behind an OpenAI-compatible endpoint as the judge of pairs of answers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...utils.extras import needs_extra

_ASK = """Two answers to one request follow. Which is better? {criteria}
Reply with JSON alone: {{"verdict": "A"}}, {{"verdict": "B"}} or {{"verdict": "tie"}}.

<request>
{prompt}
</request>
<answer A>
{first}
</answer A>
<answer B>
{second}
</answer B>"""
_VALUES = {"A": 1.0, "B": 0.0, "TIE": 0.5}


@dataclass(frozen=True)
class EndpointJudge:
    """
    A language model that is asked which of two answers is better, in both orders.

    Args:
        model (`str`):
            The name that the endpoint knows it by.
        base_url (`str`, *optional*):
            Of the endpoint. By default OpenAI's.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            The environment variable that holds the key; `None` where none is needed. The key is never written.
        criteria (`str`, *optional*, defaults to `""`):
            What makes an answer better.
        max_retries (`int`, *optional*, defaults to 3):
            How often a call that fails, and a reply without a verdict, is tried again.
        timeout (`float`, *optional*, defaults to 60):
            Seconds a call may take.
        max_tokens (`int`, *optional*, defaults to 256):
            Of a reply.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    criteria: str = ""
    max_retries: int = 3
    timeout: float = 60.0
    max_tokens: int = 256

    @classmethod
    def of(cls, given: dict[str, Any]) -> EndpointJudge:
        """
        From a `judge` of compare.yaml.

        Raises:
            `ValueError`: for another kind, an unknown name, or a key.
        """
        names = [field.name for field in fields(cls)]
        if given.get("kind") != "llm":
            raise ValueError("A judge given as an object needs `kind: llm`.")
        if "api_key" in given:
            raise ValueError("A key does not belong in a file: name its environment variable (`api_key_env`).")
        if unknown := sorted(set(given) - {"kind", *names}):
            raise ValueError(f"The judge has no {', '.join(unknown)}. There is {', '.join(names)}.")
        if not given.get("model"):
            raise ValueError("The judge needs a `model`.")
        return cls(**{name: value for name, value in given.items() if name != "kind"})

    def client(self) -> Any:
        """
        Raises:
            `ImportError`: names the extra.
            `ValueError`: if the environment variable is not set.
        """
        with needs_extra("compare", "A judge behind an endpoint"):
            from openai import OpenAI
        key = "none" if self.api_key_env is None else os.environ.get(self.api_key_env)
        if not key:
            raise ValueError(f"The judge's key is missing: set {self.api_key_env}, or `api_key_env: null`.")
        return OpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries)

    def verdict(self, client: Any, cache: Path, prompt: str, first: str, second: str) -> float | None:
        """
        Of one order: 1 if the first answer is better, 0.5 for a tie, 0, or `None` without a verdict. Verdicts in
        `cache` (a JSONL file) are not paid again.

        Raises:
            `OSError`: names an endpoint that does not answer.
        """
        what = {name: asdict(self)[name] for name in ("model", "base_url", "criteria", "max_tokens")}
        key = hashlib.sha256(json.dumps([what, prompt, first, second], sort_keys=True).encode()).hexdigest()
        with FileLock(f"{cache}.lock"):
            known = read_verdicts(cache)
            if key not in known:
                known[key] = self._asked(client, prompt, first, second)
                with open(cache, "a", encoding="utf-8") as file:
                    # A run killed while writing leaves half a line: the new one begins its own.
                    file.write("\n" + json.dumps({"key": key, "value": known[key]}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return known[key]

    def pair(self, client: Any, cache: Path, prompt: str, own: str, other: str) -> tuple[float | None, bool]:
        """
        (1 if `own` is better than `other`, 0.5 for a tie, 0, or `None` without a verdict; whether the two orders
        disagree, which is a tie).
        """
        if own == other:
            return 0.5, False
        forth = self.verdict(client, cache, prompt, own, other)
        back = self.verdict(client, cache, prompt, other, own)
        if forth is None or back is None:
            return None, False
        return (forth, False) if forth == 1 - back else (0.5, True)

    def _asked(self, client: Any, prompt: str, first: str, second: str) -> float | None:
        from openai import APIError

        text = _ASK.format(criteria=self.criteria, prompt=prompt, first=first, second=second)
        messages = [{"role": "user", "content": text}]
        for attempt in range(self.max_retries + 1):
            try:
                found = client.chat.completions.create(
                    model=self.model, messages=messages, temperature=0, max_tokens=self.max_tokens
                )
                reply = found.choices[0].message.content or ""
            except (APIError, ValueError, AttributeError, TypeError, IndexError) as error:
                if isinstance(error, APIError) or attempt == self.max_retries:
                    # Without its cause: an endpoint may repeat the key in its answer.
                    raise OSError(
                        f"The judge at {client.base_url} does not answer ({type(error).__name__}). What it judged is "
                        "kept: the same call goes on from there."
                    ) from None
                continue
            if (value := parsed(reply)) is not None:
                return value
            messages = [*messages[:1], {"role": "assistant", "content": reply}, {"role": "user", "content": _AGAIN}]
        return None


_AGAIN = 'That held no verdict. Reply with {"verdict": "A"}, {"verdict": "B"} or {"verdict": "tie"} alone.'


def parsed(reply: str) -> float | None:
    """The last verdict in a reply, also among prose, thoughts and code fences; `None` without one."""
    for text in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            verdict = str(json.loads(text).get("verdict")).strip().upper()
        except ValueError:
            continue
        if verdict in _VALUES:
            return _VALUES[verdict]
    return None


def read_verdicts(cache: Path) -> dict[str, float | None]:
    """All whole lines of a cache."""
    found = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []:
        try:
            known = json.loads(line)
            found[known["key"]] = known["value"]
        except (ValueError, KeyError, TypeError):
            continue
    return found
