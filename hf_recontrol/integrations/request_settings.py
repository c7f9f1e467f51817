"""What a request to a server may say of control: `control` and `value_heads`, by the same names on every server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..configuration import ControlConfig, ValueHeadConfig
from ..utils.checks import check_number

# What a request's fields are called, at the top of its body or under `vllm_xargs`.
FIELDS = ("control", "value_heads")


class Asked(NamedTuple):
    """The control and the weights of heads that one request asks for."""

    # `False`: the base alone.
    control: ControlConfig | bool
    weights: dict[str, float]


class UnknownModel(ValueError):
    """A request names a model that is not served."""


class RequestSettings:
    """
    The models of a server, and what requests may change. A server of the base `org/base` with the heads `default` and
    `polite` serves `org/base`, where the first head acts, and `org/base:default` and `org/base:polite`, where that
    head acts as it recommends.

    Args:
        base (`str`):
            Name of the base that clients use.
        heads (mapping of `str` to [`ValueHeadConfig`]):
            The loaded heads by name; the first one acts where a request names none.
        control ([`ControlConfig`], *optional*):
            The first head's, where requests do not change it. Defaults to what it recommends, else to
            `ControlConfig()`.

    Raises:
        `ValueError`: if there is no head, a name cannot stand in a model's name, or a head recommends a step size for
        each prompt.
    """

    def __init__(self, base: str, heads: Mapping[str, ValueHeadConfig], control: ControlConfig | None = None):
        if not heads:
            raise ValueError("A server of a controlled model needs a head (`--value-head`).")
        if odd := [name for name in heads if not name or ":" in name or name != name.strip()]:
            raise ValueError(f"A head's name must be a text without ':' and spaces around it, got {odd[0]!r}.")
        self.base, self.first = base, next(iter(heads))
        # What is recommended is what a request's changes begin with.
        self.heads = dict(heads)
        if control is not None:
            self.heads[self.first] = replace(heads[self.first], control=control)
        for name, config in self.heads.items():
            if config.control is not None and config.control.per_row:
                raise ValueError(
                    f"The head {name!r} recommends a `step_size` for each prompt, and a request has one prompt: let "
                    "it recommend one number, or, for the first head, name one (`--step-size`)."
                )

    @property
    def models(self) -> list[str]:
        """The names that clients may ask for."""
        return [self.base, *(f"{self.base}:{name}" for name in self.heads)]

    def head_of(self, model: str | None) -> str:
        """
        Which head acts in a model, by the model's name (`None`: the base's).

        Raises:
            [`UnknownModel`]: if no model has this name.
        """
        if model is None or model == self.base:
            return self.first
        base, _, head = str(model).rpartition(":")
        if base != self.base or head not in self.heads:
            raise UnknownModel(f"No model {model!r} is served here. There are: {', '.join(self.models)}.")
        return head

    def read(self, model: str | None, fields: Mapping[str, Any]) -> Asked:
        """
        What a request asks for.

        Args:
            model (`str`, *optional*):
                The request's model.
            fields (mapping):
                Its `control` (`False`: the base alone; or settings of a [`ControlConfig`] by name, which change those
                of the model's head) and `value_heads` (weights by name of the heads that act), if it has them. Each
                may also be its JSON as a text, for servers that carry texts and numbers alone.

        Raises:
            [`UnknownModel`]: for a model that is not served. `ValueError`, in words for the client: for anything else
            that is wrong.
        """
        if unknown := sorted(map(str, fields.keys() - set(FIELDS))):
            raise ValueError(f"Unknown fields {unknown}: of control there are {', '.join(FIELDS)}.")
        name = self.head_of(model)
        weights = self._weights(_parsed(fields.get("value_heads")), name)
        changes = _parsed(fields.get("control"))
        if changes is False:
            return Asked(False, weights)
        if changes is None or changes is True:
            changes = {}
        if not isinstance(changes, Mapping):
            raise ValueError(f"`control` must be an object of settings, or false, got {_shown(changes)}.")
        known = ControlConfig.__dataclass_fields__
        if unknown := sorted(map(str, changes.keys() - known.keys())):
            raise ValueError(f"`control` knows no {unknown}: there are {', '.join(known)}.")
        if "step_size" in changes and not isinstance(changes["step_size"], (int, float)):
            raise ValueError(f"`step_size` must be one number, got {_shown(changes['step_size'])}.")
        return Asked(self.heads[name].changed_control(dict(changes), default=ControlConfig()), weights)

    def _weights(self, given: Any, name: str) -> dict[str, float]:
        if given is None:
            return {name: 1.0}
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"`value_heads` must be an object with weights of heads by name, got {_shown(given)}.")
        if unknown := sorted(map(str, given.keys() - self.heads.keys())):
            raise ValueError(f"`value_heads` names {unknown}: this server has {', '.join(self.heads)}.")
        return {head: check_number(f"value_heads[{head!r}]", weight) for head, weight in given.items()}


def _parsed(value: Any) -> Any:
    """A field's value, also where it is JSON as a text; a text that is none stays one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
