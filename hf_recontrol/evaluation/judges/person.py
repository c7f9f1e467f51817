"""A person as the judge: verdicts that a page has saved, read back by the key in the comparison's folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.rollouts import Rollout
from ..comparison.figures import row_label
from ..comparison.results import written_prompt
from ..comparison.scores import Scores, matched_references
from .judge import check_settings

# Of a page's key, which says who wrote which, in the comparison's folder.
KEY_NAME = "judge-key-{}.json"
_PAGE = re.compile(r"[0-9a-f]{12}")
_CHOICES = ("left", "right", "tie")
# Of a control's answer its row and prompt.
_Place = tuple[str, float | None, int]


def digest_of(prompt: str, answer: str, other: str) -> str:
    """What tells a pair of answers from others."""
    return hashlib.sha256(json.dumps([prompt, answer, other]).encode()).hexdigest()[:16]


@dataclass
class PersonJudge:
    """
    Verdicts of one or several persons.

    Args:
        verdicts (sequence of `str`):
            Files that pages have saved.
    """

    verdicts: Sequence[str]
    _digests: dict[_Place, str] = field(default_factory=dict, init=False)
    _values: dict[_Place, list[float]] = field(default_factory=dict, init=False)
    _identical: set[_Place] = field(default_factory=set, init=False)
    _pairs: set[_Place] = field(default_factory=set, init=False)
    _compared: set[_Place] = field(default_factory=set, init=False)

    @classmethod
    def of(cls, given: dict[str, Any]) -> PersonJudge:
        """
        From what a comparison's file says under `judge`, without its `kind`.

        Raises:
            `ValueError`: if it does not name files.
        """
        check_settings(given, ["verdicts"])
        files = given.get("verdicts")
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, Sequence) or not files or not all(isinstance(file, str) for file in files):
            raise ValueError("`judge.verdicts` must be the file that a page has saved, or a list of such files.")
        if len({Path(file).resolve() for file in files}) < len(files):
            raise ValueError("`judge.verdicts` names a file twice, which would count double.")
        return cls(files)

    def read(self, comparison: Path, against: str) -> None:
        """
        Read all files.

        Args:
            comparison (`Path`):
                Its folder, where the pages' keys are.
            against (`str`):
                What it is against.

        Raises:
            `OSError`, `ValueError`: for a file that no page of this comparison has saved, or of two pages with other
            answers.
        """
        for file in self.verdicts:
            page, said = read_saved(Path(file))
            path = comparison / KEY_NAME.format(page)
            if not path.is_file():
                raise ValueError(f"{file} is of the page {page}, which is not of the comparison in {comparison}.")
            key = json.loads(path.read_text(encoding="utf-8"))
            if key["against"] != against:
                raise ValueError(
                    f"In {file} {key['control']!r} is judged against {key['against']!r}, and this comparison is "
                    f"against {against!r}: make a new page."
                )
            if unknown := sorted(set(said) - set(key["pairs"])):
                raise ValueError(f"{file} has a verdict on {unknown[0]!r}, which is not on the page {page}.")
            names = list(key["pairs"])
            is_done = all(name in said for name in names if key["pairs"][name]["side"] is not None)
            # Where somebody stopped early, ties that came later count as little as pairs that came later.
            reached = len(names) if is_done else 1 + max(map(names.index, said))
            for position, (name, pair) in enumerate(key["pairs"].items()):
                place = (key["control"], key["strength"], pair["prompt_number"])
                if self._digests.setdefault(place, pair["digest"]) != pair["digest"]:
                    raise ValueError(
                        f"{file} is of other answers of {key['control']!r} than a file before it (first at prompt "
                        f"{pair['prompt_number']}): leave out the one that was judged before answers changed."
                    )
                if pair["side"] is not None:
                    self._pairs.add(place)
                    if name in said:
                        value = 0.5 if said[name] == "tie" else float(said[name] == pair["side"])
                        self._values.setdefault(place, []).append(value)
                elif position < reached:
                    self._identical.add(place)
                    self._values[place] = [0.5]

    def scores(
        self, control: str, strength: float | None, rollouts: Sequence[Rollout], references: Sequence[Rollout]
    ) -> Scores:
        """
        Of a row's answers 1 if a person put it above the reference's, 0.5 for a tie, 0, or `None` if nobody judged it;
        of several persons the mean.

        Raises:
            `ValueError`: if the answers are not those that were judged.
        """
        won: list[float | None] = []
        tied: list[float | None] = []
        for rollout, reference in zip(rollouts, matched_references(rollouts, references), strict=True):
            place = (control, strength, rollout.prompt_number)
            self._compared.add(place)
            values = self._values.get(place, []) if rollout.sample == 0 else []
            if values and self._digests[place] != digest_of(
                written_prompt(rollout.prompt), rollout.completion, references[reference].completion
            ):
                raise ValueError(
                    f"The answers of {control!r} are no longer those that were judged (first at prompt "
                    f"{rollout.prompt_number}): make a new page."
                )
            won.append(sum(values) / len(values) if values else None)
            tied.append(values.count(0.5) / len(values) if values else None)
        return {"win_rate": won, "ties": tied}

    def check_rows(self, rows: Sequence[tuple[str, float | None]]) -> None:
        """Raise `ValueError` if a row that was judged is not among those compared."""
        for control, strength, _ in self._digests:
            if (control, strength) not in rows:
                label = row_label(control, strength)
                raise ValueError(f"The control {label!r} was judged, and is not compared here.")

    def counts(self) -> dict[str, Any]:
        """What is said of the judge in the results, once all rows have their `scores`."""
        rows = list(dict.fromkeys(place[:2] for place in self._digests))
        judged = self._values.keys() - self._identical
        compared = judged & self._compared
        return {
            "mode": "person",
            "controls": [{"control": control, "strength": strength} for control, strength in rows],
            "answers": len(compared),
            "not_judged": len((self._pairs - judged) & self._compared),
            "not_compared": len(judged - compared),
            "identical": len(self._identical & self._compared),
        }

    def note(self, counts: dict[str, Any]) -> str:
        """What stands under the table."""
        rows = [row_label(row["control"], row["strength"]) for row in counts["controls"]]
        gone = (
            f" {counts['not_compared']} more were judged, to prompts that are not among those compared on: left out."
            if counts["not_compared"]
            else ""
        )
        return (
            f"Judge: a person, of {', '.join(rows)} alone; {counts['answers']} answers judged, {counts['not_judged']} "
            f"on the page not judged: left out; {counts['identical']} more are the same as the one compared against: "
            f"ties.{gone}"
        )


def read_saved(path: Path) -> tuple[str, dict[str, str]]:
    """(page, verdicts) in a file that may be anybody's."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))
        page, said = saved["page"], saved["verdicts"]
        fits = isinstance(page, str) and _PAGE.fullmatch(page) and all(said[name] in _CHOICES for name in said)
    except OSError as error:
        raise OSError(
            f"`judge.verdicts` names {path}, which cannot be read ({error.strerror}): give the file that the page has "
            "saved, where it is now. A browser puts it among the downloads."
        ) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no file of verdicts that a page has saved ({type(error).__name__}).") from None
    if not fits or not isinstance(said, dict):
        raise ValueError(f"{path} is no file of verdicts that a page has saved.")
    if not said:
        raise ValueError(f"{path} holds no verdict: nothing was judged.")
    return page, said
