"""How a head is applied."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..utils.checks import check_choice, check_int, check_number, check_numbers
from ..utils.choices import CONTROL_METHODS
from ..utils.json_objects import known_items

# A configuration may be anybody's: this keeps a few bytes of it from asking for hours.
_MAX_STEPS = 10_000


@dataclass(frozen=True)
class ControlConfig:
    r"""
    How a head edits the hidden state `h` while the model generates. Immutable: change a copy with
    `dataclasses.replace(control, step_size=0.3)`.

    - `method="ascent"` (RE-Control, Kong et al. 2024): from `x = (h - state_mean) / state_scale` and `d = 0`,
      `num_steps` steps of `d ← d + α (∇V(x + d) - 2 λ d)`; then `u = state_scale * d`.
      With a `target` they minimise `½‖V(x + d) - target‖²` instead, in standardised values (PRE-Control, arXiv
      2510.12121).
    - `method="advantage"`: `u = α g(h)` in one step, with `α = 1/τ`; then `softmax(W (h + u))` is the optimum of
      `E[A] - τ KL(π ‖ π0)` for the advantage `A(h, y) = (w_y - E_π0[w])ᵀ g(h)`. This holds for logits `W h` at
      temperature 1; where a base scales or soft-caps its logits the edit of the state is the same, the optimum is not.
    - `method="static"`: the same with one vector b for all states, `u = α b`. It shifts the logits by `α W b`, the
      same shift at every token.

    Both of these also shift what the LM head makes of the edited state by `α c`, where the head has a token bias c.

    Args:
        method (`str`, *optional*, defaults to `"ascent"`):
            `"ascent"`, `"advantage"` or `"static"`.
        step_size (`float` or a sequence of `float`, *optional*, defaults to 0.5):
            α: the ascent's step size, or 1/τ of the other two, in units where the values are standardised. A sequence
            holds one value for each prompt of the batch. At 0 the base's logits are untouched.
        num_steps (`int`, *optional*, defaults to 30):
            Number of ascent steps, at most 10,000. Only the ascent uses it. At 0 the base's logits are untouched.
        l2 (`float`, *optional*, defaults to 0.0):
            λ of the ascent's penalty `λ‖d‖²` on the edit in scaled coordinates. `step_size * l2` must be below 1, or
            the steps would run away. Only the ascent uses it.
        plausibility (`float`, *optional*, defaults to 0.0):
            p in [0, 1]: a token whose probability under the base is below p × that of the base's most likely token is
            masked (logit -inf) after control. At 0 nothing is masked.
        max_kl (`float`, *optional*):
            How far, in nats, each token's distribution may be from the base's: `KL(π ‖ π0)` at temperature 1, over the
            whole vocabulary. Where control would go further, the change of the logits (the edit itself, where they are
            linear in the state) is scaled down until it does not. Drawn at another temperature a token has another KL,
            below 1 often a larger one. At 0 the base's logits are untouched.
        target (`float` or a sequence of `float`, *optional*):
            For the ascent: values to approach, in the reward's own units, one for each objective. Above a target the
            edit lowers the value. Steps that are too long overshoot it further each time, which is an error.

    Raises:
        `ValueError`: for a value outside the ranges above, naming the field.
    """

    method: str = "ascent"
    step_size: float | tuple[float, ...] = 0.5
    num_steps: int = 30
    l2: float = 0.0
    plausibility: float = 0.0
    max_kl: float | None = None
    target: float | tuple[float, ...] | None = None

    def __post_init__(self):
        check_choice("method", self.method, CONTROL_METHODS)
        object.__setattr__(self, "step_size", check_numbers("step_size", self.step_size, "prompt", low=0))
        if self.target is not None:
            object.__setattr__(self, "target", check_numbers("target", self.target, "objective"))
            if self.method != "ascent":
                raise ValueError("`target` is for `method='ascent'`: the other methods know no values.")
        check_int("num_steps", self.num_steps, low=0)
        if self.num_steps > _MAX_STEPS:
            raise ValueError(f"`num_steps` must be at most {_MAX_STEPS}, got {self.num_steps}.")
        object.__setattr__(self, "l2", check_number("l2", self.l2, low=0))
        object.__setattr__(self, "plausibility", check_number("plausibility", self.plausibility, low=0, high=1))
        if self.max_kl is not None:
            object.__setattr__(self, "max_kl", check_number("max_kl", self.max_kl, low=0))
        if self.method == "ascent" and self.largest_step_size * self.l2 >= 1:
            raise ValueError(
                f"`step_size * l2` must be below 1, got {self.largest_step_size:g} * {self.l2:g}: each step would "
                "overshoot the penalty's minimum and the edit would grow without bound. Lower one of the two."
            )

    def check_used(self, *known: ControlConfig | None) -> None:
        """
        Raise `ValueError` if the method is no ascent, and a setting that only the ascent uses has neither its default
        nor the value that one of `known` has: those ask for nothing.
        """
        for name in ("num_steps", "l2") if self.method != "ascent" else ():
            if getattr(self, name) not in [getattr(each, name) for each in (*known, ControlConfig()) if each]:
                raise ValueError(
                    f"`{name}` is for `method='ascent'`, and this is {self.method!r}, where it changes nothing: "
                    "leave it out, or name the ascent and its step size too."
                )

    @property
    def per_row(self) -> bool:
        """Whether `step_size` holds one value for each prompt."""
        return isinstance(self.step_size, tuple)

    @property
    def largest_step_size(self) -> float:
        """`step_size`, or the largest one of the batch."""
        return max(self.step_size) if self.per_row else self.step_size

    @property
    def is_identity(self) -> bool:
        """Whether these settings leave every state as it is, so that no work is done at all."""
        return 0 in (self.largest_step_size, self.max_kl) or (self.method == "ascent" and self.num_steps == 0)

    @property
    def is_guarded(self) -> bool:
        """Whether it needs the base's logits beside the controlled ones."""
        return self.plausibility > 0 or self.max_kl is not None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable `dict`, the inverse of [`ControlConfig.from_dict`]."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "ControlConfig") -> ControlConfig:
        """Build from a `dict`. Unknown keys are warned about; `source` is named in messages."""
        return cls(**known_items(cls, values, source))
