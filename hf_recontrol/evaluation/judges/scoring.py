"""A judge as a scorer of a comparison's answers, and how often it was asked, refused and changed its mind."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...data.processes import Processes
from ...data.rollouts import Rollout
from ...utils.checks import check_choice, check_json, check_number
from ..comparison.scores import Scorer, Scores, matched_references
from .cache import VerdictCache
from .endpoint import EndpointJudge
from .judge import MODES, REFUSED, UNPARSABLE, Judge, Question, Verdict, shown_prompt
from .language import LanguageJudge

logger = logging.get_logger(__name__)

_PAIR_VALUES = (0.0, 0.5, 1.0)
# A language model whose first so many replies cannot be read is asked no more.
_UNREADABLE = 36
_REMEDY = (
    "Name another model, give its replies more room (`max_tokens`: a model that thinks first needs thousands) or "
    "change `criteria`"
)


class JudgeScoring:
    """
    Asks a judge about answers, and counts.

    Args:
        judge ([`Judge`]):
            The judge.
        cache (`Path`):
            The file of verdicts, in a folder that exists when answers are scored.
        settings (mapping, *optional*):
            What else its verdicts depend on, as JSON, if anything.
    """

    def __init__(self, judge: Judge, cache: Path, settings: Mapping[str, Any] | None = None):
        check_choice("mode", judge.mode, MODES)
        self.judge, self.cache = judge, VerdictCache(cache)
        known = judge.depends_on()
        said = f"`depends_on` of {type(judge).__name__} must be"
        self._depends_on = None if known is None else check_json(said, known)
        # Two judges may well say the same of what they depend on, such as their version.
        told = f"{type(judge).__qualname__} {self._depends_on}"
        if settings:
            told += f" {json.dumps(settings, sort_keys=True)}"
        self._name = hashlib.sha256(told.encode()).hexdigest()[:16]
        self._counts: Counter[str] = Counter()
        self._used: dict[str, Verdict] = {}

    def check(self) -> None:
        """Raise if the judge cannot judge. One that has judged here before is not asked."""
        if Processes().index > 0:
            return
        if self._depends_on is None or not self.cache.has_judge(self._name):
            self.judge.check()
        elif isinstance(self.judge, EndpointJudge):
            try:
                _ = self.judge.client
            except (ImportError, ValueError) as error:
                logger.warning(f"{error} Only what it has judged here before can be used: a new answer is an error.")

    def scorer(self) -> Scorer:
        """The judge as a scorer. Its verdicts are kept in the cache alone."""
        is_pair = self.judge.mode == "pair"
        return Scorer("verdicts", None, self._pairs if is_pair else self._scores, uses_references=is_pair)

    def counts(self) -> dict[str, Any]:
        """What is said of the judge in the results, over all processes."""
        gathered = Processes().gather((dict(self._counts), self._used))
        counts, used = Counter(), {}
        for own, verdicts in gathered:
            counts.update(own)
            used |= verdicts
        calls, read, written = (
            sum(getattr(verdict, name) for verdict in used.values())
            for name in ("calls", "input_tokens", "output_tokens")
        )
        prices = self.judge.input_price, self.judge.output_price
        names = ["answers", REFUSED, UNPARSABLE]
        if self.judge.mode == "pair":
            names += ["identical", "orders_disagree"]
        return {
            "mode": self.judge.mode,
            **({"judge": json.loads(self._depends_on)} if self._depends_on else {}),
            **{name: counts[name] for name in names},
            "calls": calls,
            "new_calls": counts["new_calls"],
            "verdicts_from_cache": counts["from_cache"],
            "input_tokens": read,
            "output_tokens": written,
            "cost": None if None in prices else read * prices[0] + written * prices[1],
        }

    def note(self, counts: dict[str, Any]) -> str:
        """What stands under the table."""
        text = f"Judge: {counts['answers']} answers judged"
        if counts["mode"] == "pair":
            text += (
                f" in both orders; on {counts['orders_disagree']} the orders disagree, which is a tie; "
                f"{counts['identical']} more are the same as the one compared against, which is a tie too"
            )
        text += (
            f". No verdict on {counts['refused'] + counts['unparsable']} ({counts['refused']} refused, "
            f"{counts['unparsable']} not readable): left out. {counts['calls']:,} calls, {counts['new_calls']:,} of "
            f"them in this run; {counts['input_tokens']:,} tokens in, {counts['output_tokens']:,} out"
        )
        return text + ("." if counts["cost"] is None else f"; cost {counts['cost']:.4f}.")

    def is_silent(self, counts: Mapping[str, Any]) -> bool:
        """Whether it was asked about answers and gave no verdict on any of them."""
        return 0 < counts["answers"] == counts[REFUSED] + counts[UNPARSABLE]

    def without_verdicts(self) -> str:
        """What an error says if there is no verdict at all, over all processes."""
        counts, is_language = self.counts(), isinstance(self.judge, LanguageJudge)
        text = (
            f"The judge gave no verdict on any of the {counts['answers']} answers ({counts['refused']} refused, "
            f"{counts['unparsable']} not readable)."
        )
        begun = Processes().gather(self.judge.without_verdict if is_language else [])
        if replies := [reply for own in begun for reply in own]:
            text += f" One reply begins: {replies[0]!r}."
        if not is_language:
            return f"{text} Look at what its `verdicts` returns."
        return f"{text} {_REMEDY}; with more `max_retries` the same questions are asked again."

    def _check_readable(self) -> None:
        """Raise if a language model has been asked often, and nothing that it replied could be read."""
        is_language = isinstance(self.judge, LanguageJudge)
        if not is_language or len(self._used) < _UNREADABLE or any(v.why != UNPARSABLE for v in self._used.values()):
            return
        begun = [f" One begins: {reply!r}." for reply in self.judge.without_verdict]
        raise ValueError(
            f"The judge's replies to the first {len(self._used)} questions hold no verdict, so it is asked no more."
            f"{''.join(begun)} {_REMEDY}."
        )

    def _scores(self, rollouts: list[Rollout], references: list[Rollout]) -> Scores:
        found = self._asked([Question(shown_prompt(r.prompt), r.completion) for r in rollouts])
        self._count(found)
        return {"judge": [verdict.value for verdict in found]}

    def _pairs(self, rollouts: list[Rollout], references: list[Rollout]) -> Scores:
        others = [references[place].completion for place in matched_references(rollouts, references)]
        asked = [i for i, rollout in enumerate(rollouts) if rollout.completion != others[i]]
        questions = []
        for i in asked:
            prompt, answer = shown_prompt(rollouts[i].prompt), rollouts[i].completion
            questions += [Question(prompt, answer, others[i]), Question(prompt, others[i], answer)]
        found = self._asked(questions)
        values: list[float | None] = [0.5] * len(rollouts)
        for i, forth, back in zip(asked, found[::2], found[1::2], strict=True):
            if forth.value is None or back.value is None:
                values[i] = None
            elif forth.value == 1 - back.value:
                values[i] = forth.value
            else:
                self._counts["orders_disagree"] += 1
        self._count([max(pair, key=_weight) for pair in zip(found[::2], found[1::2], strict=True)])
        if rollouts is not references:
            self._counts["identical"] += len(rollouts) - len(asked)
        return {"win_rate": values, "ties": [None if value is None else float(value == 0.5) for value in values]}

    def _count(self, verdicts: Sequence[Verdict]) -> None:
        self._counts["answers"] += len(verdicts)
        for verdict in verdicts:
            if verdict.value is None:
                self._counts[REFUSED if verdict.why == REFUSED else UNPARSABLE] += 1

    def _asked(self, questions: Sequence[Question]) -> list[Verdict]:
        """A verdict on each question. Each is written before the next question is asked."""
        keys = [self._key(question) for question in questions]
        open_ones: dict[str, Question] = {}
        for key, question in zip(keys, questions, strict=True):
            known = self._known(key)
            if known is not None and (known.value is not None or known.retries >= self.judge.max_retries):
                self._counts["from_cache"] += key not in self._used
                self._used.setdefault(key, known)
            else:
                open_ones[key] = question
        size = max(1, self.judge.batch_size)
        pending = list(open_ones.items())
        batches = [pending[start : start + size] for start in range(0, len(pending), size)]
        with ThreadPoolExecutor(max(1, self.judge.concurrency)) as pool:
            try:
                for verdicts, calls in pool.map(self._ask, batches):
                    self._used |= verdicts
                    self._counts["new_calls"] += calls
                    self._check_readable()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [self._used[key] for key in keys]

    def _ask(self, batch: Sequence[tuple[str, Question]]) -> tuple[dict[str, Verdict], int]:
        """(verdicts by key, written to the cache; how many calls they took)"""
        returned = self.judge.verdicts([question for _, question in batch])
        returned = list(returned) if isinstance(returned, Iterable) else returned
        if not isinstance(returned, list) or len(returned) != len(batch):
            found = len(returned) if isinstance(returned, list) else f"{returned!r}, not"
            raise ValueError(
                f"The judge {type(self.judge).__name__} returned {found} verdicts on {len(batch)} questions."
            )
        found, calls = {}, 0
        for (key, _), each in zip(batch, returned, strict=True):
            verdict = each if isinstance(each, Verdict) else Verdict(each, retries=self.judge.max_retries)
            verdict = replace(verdict, value=self._checked(verdict.value))
            calls += verdict.calls
            if (before := self._known(key)) is not None:  # asked again: what was paid stays paid
                spent = ("calls", "input_tokens", "output_tokens")
                verdict = replace(verdict, **{name: getattr(verdict, name) + getattr(before, name) for name in spent})
            if self._depends_on is not None:
                self.cache.add(key, self._name, verdict)
            found[key] = verdict
        return found, calls

    def _checked(self, value: Any) -> float | None:
        """A verdict's value as a plain number."""
        name = f"The verdict of {type(self.judge).__name__}"
        value = value.item() if hasattr(value, "item") else value
        if value is None:
            return None
        if self.judge.mode == "score":
            return check_number(name, value)
        if value not in _PAIR_VALUES:
            raise ValueError(f"{name} on a pair must be 1, 0.5, 0 or None, got {value!r}.")
        return float(value)

    def _known(self, key: str) -> Verdict | None:
        if key in self._used or self._depends_on is None:
            return self._used.get(key)
        return self.cache.get(key)

    def _key(self, question: Question) -> str:
        told = [self._name, question.prompt, question.answer, question.other]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _weight(verdict: Verdict) -> int:
    """Of two orders that one counts which has no verdict, of two such the refusal."""
    return 0 if verdict.value is not None else 2 if verdict.why == REFUSED else 1
