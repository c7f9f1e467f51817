"""The controls of this package as rivals: each is a control method of the head, its strength the step size."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ...configuration import ControlConfig
from ...data.fingerprints import control_settings
from ...data.prompts import Prompts
from ..likelihoods import acts_only_at_head
from ..strength import step_size_limit
from .rival import Answer, Bench, Rival

# Below what any penalty allows.
_SMALL = 1e-6


class Control(Rival):
    """
    A control method of the value head.

    Args:
        settings:
            Of [`ControlConfig`], beside `method`. `step_size` is the strength if the comparison names no other; by
            default that which the head recommends, if it recommends this method.
    """

    method: str
    start = 1.0

    def __init__(self, bench: Bench, **settings: Any):
        super().__init__(bench)
        head = bench.head_for(self.method)
        recommended = head.config.control
        same = recommended is not None and recommended.method == self.method
        if "method" in settings:
            raise ValueError(f"The control {self.method!r} has no setting 'method': its kind says it.")
        try:
            # Until a strength is named any step size stands for it that no penalty forbids.
            control = replace(recommended if same else ControlConfig(self.method, _SMALL), **settings)
        except TypeError as error:
            raise ValueError(f"The control {self.method!r} has no such setting: {error}.") from error
        control.check_used(recommended)
        bench.model.check_same_for_all_prompts(control)
        with bench.model.use_control(control):
            pass  # raises where the head has no such part
        self.control = control
        self.largest = step_size_limit(control)
        self.start = min(self.start, self.largest / 2)
        self.only_at_head = self.draws_from_base_states = acts_only_at_head(bench.model, control)
        self.strength = control.step_size if same or "step_size" in settings else None

    def at(self, strength: float | None) -> ControlConfig:
        """The control at a strength."""
        return self.control if strength is None else replace(self.control, step_size=strength)

    def check_strength(self, strength: float) -> None:
        self.at(strength)

    def answer(self, prompts: Prompts, strength: float | None) -> list[Answer]:
        return [Answer(rollout) for rollout in self.bench.draw(prompts, self.at(strength))]

    def policy(self, strength: float | None) -> AbstractContextManager:
        return self.bench.model.use_control(self.at(strength))

    def depends_on(self) -> dict[str, Any]:
        # Among the settings, so that a control that the head recommends counts as the same one written out.
        return control_settings(self.bench.model, replace(self.control, step_size=_SMALL)) | {
            "control": self.control.to_dict() | {"step_size": 1.0}
        }


class Ascent(Control):
    """The paper's ascent."""

    method = "ascent"


class Advantage(Control):
    """The advantage edit."""

    method = "advantage"


class StaticVector(Control):
    """The constant part of the advantage edit alone."""

    method = "static"
