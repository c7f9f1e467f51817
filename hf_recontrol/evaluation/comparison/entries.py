"""What is compared: the entries of a comparison's `controls`, and the rows that come of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...collection.sampling import sampling_config
from ...modeling.causal_lm import ReControlForCausalLM
from ...settings import CompareSettings
from ...utils.checks import check_choice, check_json, check_number
from ..instructions import INSTRUCTION_ROLES
from ..recommendation import candidates
from ..rivals.kinds import make_rival, rival_class
from ..rivals.rival import Bench, Rival
from .figures import row_label

# The kinds of the head's own methods.
KIND_OF_METHOD = {"static": "static_vector", "advantage": "advantage", "ascent": "ascent"}
_COMMON = ("name", "kind", "instruction", "instruction_role", "strengths", "kl")


@dataclass(frozen=True)
class Entry:
    """
    One of the controls that are compared.

    Args:
        name (`str`):
            What it is called in the results.
        kind (`str`):
            One of [`KINDS`], or `module:Class`.
        instruction (`str`, *optional*), instruction_role (`str`, *optional*, defaults to `"system"`):
            What its prompts ask for beside what the user asked, and in whose turn.
        strengths (`tuple[float, ...]`), kl (`tuple[float, ...]`):
            Its own strengths, or the nats a token that its own strengths are to be found for, if it has any.
        settings (`dict`):
            What its class is called with.
    """

    name: str
    kind: str
    instruction: str | None = None
    instruction_role: str = "system"
    strengths: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """
    A control at one strength: a line of the table.

    Args:
        entry ([`Entry`]), rival ([`Rival`]):
            What answers.
        strength (`float`, *optional*):
            How strong; `None` for what has no strength.
        target_kl (`float`, *optional*):
            The KL, in nats a token, that the strength was found for.
    """

    entry: Entry
    rival: Rival
    strength: float | None = None
    target_kl: float | None = None

    @property
    def label(self) -> str:
        """Its name in messages."""
        return row_label(self.entry.name, self.strength)

    def folder_name(self, depends_on: Mapping[str, Any]) -> str:
        """A name for what belongs to this row, by all that it depends on: what the row is called is not among it."""
        text = json.dumps(depends_on, sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.entry.kind)[:40]}-{digest}"


def needs_search(entries: Sequence[Entry], settings: CompareSettings) -> bool:
    """Whether some control's strength is to be found by its KL."""
    return any(
        not entry.strengths and (entry.kl or settings.kl) and rival_class(entry.kind).start is not None
        for entry in entries
    )


def default_controls(bench: Bench) -> list[dict[str, Any]]:
    """
    The base, prompting, best of 4 (not of greedy answers, which are all the same), and each method that the head has,
    the simplest first.
    """
    controls = [{"kind": "base"}, {"kind": "prompting"}]
    if sampling_config(bench.model, bench.tokenizer, bench.sampling).do_sample:
        controls.append({"kind": "best_of_n", "n": 4})
    if isinstance(bench.model, ReControlForCausalLM):
        methods = [control.method for control in candidates(bench.model.value_head)]
        controls += [{"kind": KIND_OF_METHOD[method]} for method in methods]
    return controls


def entries_of(controls: Sequence[Any], settings: CompareSettings) -> list[Entry]:
    """
    Entries from what a comparison's file says under `controls`.

    Args:
        controls (sequence of `dict`):
            Each with `kind`, and if need be `name` (by default the kind), `instruction`, `instruction_role`,
            `strengths` or `kl`, and the settings of that kind. A text alone is a kind.

    Raises:
        `ValueError`: if there are none, one is no such object, two have one name, or the one that differences are to
        is not among them.
    """
    if isinstance(controls, (str, Mapping)) or not isinstance(controls, Sequence) or not controls:
        raise ValueError(f"`controls` must be a list with at least one control, got {controls!r}.")
    entries = [_entry(number, item, settings) for number, item in enumerate(controls)]
    names = [entry.name for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"Two controls have the name {twice[0]!r}: give each a `name` of its own.")
    if settings.against not in names:
        # What is misspelt is the better reason.
        for entry in entries:
            rival_class(entry.kind)
        raise ValueError(
            f"`against` names the control {settings.against!r}, which is not among {', '.join(map(repr, names))}."
        )
    return entries


def _entry(number: int, item: Any, settings: CompareSettings) -> Entry:
    item = {"kind": item} if isinstance(item, str) else item
    if not isinstance(item, Mapping) or not isinstance(item.get("kind"), str):
        raise ValueError(f"`controls[{number}]` must be an object with a `kind`, got {item!r}.")
    name = item.get("name", item["kind"])
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(f"`controls[{number}]`: `name` must be a text on one line that is not empty, got {name!r}.")
    instruction = item.get("instruction")
    if instruction is None and item["kind"] == "prompting":
        instruction = settings.instruction
    role = item.get("instruction_role", "system")
    if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
        raise ValueError(f"The control {name!r}: `instruction` must be a text that is not empty.")
    check_choice(f"controls[{number}].instruction_role", role, INSTRUCTION_ROLES)
    if item["kind"] in KIND_OF_METHOD.values() and "step_size" in item:
        if "strengths" in item or "kl" in item:
            raise ValueError(f"The control {name!r}: `step_size` is its strength, so leave out `strengths` and `kl`.")
        item = {key: value for key, value in item.items() if key != "step_size"} | {"strengths": item["step_size"]}
    strengths, kl = (_numbers(number, name, key, item.get(key, ())) for key in ("strengths", "kl"))
    if strengths and kl:
        raise ValueError(f"The control {name!r}: `strengths` and `kl` both say how strong it is: use one of them.")
    rest = {key: value for key, value in item.items() if key not in _COMMON}
    check_json(f"The control {name!r}: its settings must be", rest)
    return Entry(name, item["kind"], instruction, role, strengths, kl, rest)


def _numbers(number: int, name: str, key: str, value: Any) -> tuple[float, ...]:
    value = [value] if isinstance(value, (int, float)) else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"The control {name!r}: `{key}` must be a list of numbers, got {value!r}.")
    return tuple(check_number(f"controls[{number}].{key}", each, above=0) for each in value)


def rows_of(entries: Sequence[Entry], bench: Bench, settings: CompareSettings) -> list[Row]:
    """
    The rows of a comparison: each control at each of its strengths. Rows whose strength is still to be found have a
    `target_kl` and no strength.

    Raises:
        `ValueError`: if a control cannot be made, or has strengths and cannot be scaled; names it. If the control that
            differences are to is more than one row.
    """
    rows = []
    for entry in entries:
        rival_class(entry.kind)
        strengths = entry.strengths or (() if entry.kl else settings.strengths)
        try:
            rival = make_rival(entry.kind, bench, entry.settings)
            for strength in () if rival.start is None else strengths:
                rival.check_strength(strength)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The control {entry.name!r} cannot be used: {error}") from error
        if rival.start is None:
            if entry.strengths or entry.kl:
                raise ValueError(f"The control {entry.name!r} has no strength: leave out its `strengths` or `kl`.")
            rows.append(Row(entry, rival))
        elif strengths:
            rows += [Row(entry, rival, strength) for strength in strengths]
        elif entry.kl or settings.kl:
            rows += [Row(entry, rival, None, target) for target in entry.kl or settings.kl]
        else:
            own = getattr(rival, "strength", None)
            if own is None:
                raise ValueError(
                    f"How strong is the control {entry.name!r}? Give `strengths` (there or for all), or `kl` for "
                    "strengths that are found."
                )
            rows.append(Row(entry, rival, own))
    rows = without_twins(rows)
    if (several := sum(row.entry.name == settings.against for row in rows)) > 1:
        raise ValueError(
            f"`against` names {settings.against!r}, which has {several} strengths: give it one (`strengths` of that "
            "control), so that it is clear what differences are to."
        )
    return rows


def without_twins(rows: Sequence[Row]) -> list[Row]:
    """The rows, each control once at each strength."""
    return list({(row.entry.name, row.strength, row.strength is None and row.target_kl): row for row in rows}.values())
