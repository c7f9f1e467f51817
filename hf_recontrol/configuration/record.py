"""How a head was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..utils.checks import check_int, check_number
from .control import ControlConfig


@dataclass(frozen=True)
class TrainingRecord:
    """
    What a head was trained on and what was measured, for its card. Whatever is not known is `None` or empty.

    Args:
        rewards (`list[str]`):
            Names of the rewards, one for each objective.
        dataset (`str`, *optional*):
            The Hub data set that the prompts are from.
        prompts, responses, finished, tokens, states (`int`, *optional*):
            Numbers of prompts, responses, responses that ended by themselves, tokens drawn, hidden states kept.
        states_dtype (`str`, *optional*):
            What the states were stored as.
        sampling (`dict`):
            The generation config that the responses were drawn with.
        control (`dict`):
            What they were sampled under: `control`, the settings of [`ControlConfig`], `heads`, for each head that
            acted its name, weight and fingerprint, and `sources`, where these were loaded from. Empty: the base alone.
            With `rounds`, the responses are of so many, each under a control of its own or none: this is the last.
        figures (`dict[str, float]`), warnings (`list[str]`):
            Held-out figures, see [`train_head`], and what is to be said of them.
        command (`str`, *optional*):
            What measured them.

    Raises:
        `ValueError`: for a value of another type, naming the field.
    """

    rewards: list[str] = field(default_factory=list)
    dataset: str | None = None
    prompts: int | None = None
    responses: int | None = None
    finished: int | None = None
    tokens: int | None = None
    states: int | None = None
    states_dtype: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    command: str | None = None

    @property
    def temperature(self) -> float | None:
        """What the responses were drawn at; 0 if they are greedy, `None` if that is not known."""
        if not self.sampling:
            return None
        if not self.sampling.get("do_sample"):
            return 0.0
        try:
            # What a generation config leaves out is 1.
            return 1.0 if (found := self.sampling.get("temperature")) is None else check_number("temperature", found)
        except ValueError:
            return None

    def __post_init__(self):
        for name in ("rewards", "warnings"):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"`{name}` must be a list of strings, got {value!r}.")
        for name in ("dataset", "states_dtype", "command"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string or None, got {value!r}.")
        for name in ("prompts", "responses", "finished", "tokens", "states"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=0)
        for name in ("sampling", "control", "figures"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"`{name}` must be a dict, got {getattr(self, name)!r}.")
        for name in ("control", "heads", "sources") if self.control else ():
            if not isinstance(self.control.get(name), dict):
                raise ValueError(f"`control` must hold a dict `{name}`, got {self.control!r}.")
        if self.control:
            check_int("rounds", self.control.get("rounds", 1), low=1)
            ControlConfig.from_dict(self.control["control"], source="`control` of the training")
        for name, value in self.figures.items():
            check_number(f"figures[{name!r}]", value)
