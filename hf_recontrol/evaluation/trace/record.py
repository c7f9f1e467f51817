"""What a trace holds: of each token what control did there, as plain numbers that JSON has too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...data.prompts import Prompt

KIND = "hf_recontrol trace"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenChance:
    """
    A token, and how likely each policy was to draw it.

    Attributes:
        id (`int`), text (`str`):
            The token. Its text may be broken where it is a part of a character.
        base, controlled (`float`):
            Its probabilities under the base and under control, at the temperature of the sampling (1 if greedy).
    """

    id: int
    text: str
    base: float
    controlled: float


@dataclass(frozen=True)
class TracedToken:
    """
    One token of a response, and the state that it was drawn from.

    Attributes:
        drawn ([`TokenChance`]):
            The token. The texts of a response's tokens make its text; a token that ends in the middle of a character
            has none, the one that completes it has all.
        base_draw, controlled_draw ([`TokenChance`]):
            What each policy draws here with the noise of this place; the likeliest token if greedy.
        value_before, value_after (`list[float]`):
            V of the state before and after the edit, one number for each objective, in the reward's own units.
            `max_kl` acts behind the edit: `kl` shows it, these and the edit's length do not.
        edit (`float`):
            Length ‖u‖ of the edit, as it arrived in the dtype of the state.
        edit_relative (`float`):
            ‖u‖ / ‖h‖, h the state.
        kl (`float`):
            `KL(π ‖ π0)` of this place in nats: exact over the vocabulary, at the temperature of the sampling.
        nats (`float`):
            The sum of `kl` up to this token, this one included.
        alternatives (`list[TokenChance]`):
            The likeliest tokens of each policy and those drawn, the likeliest under control first.
        seconds (`float`):
            What drawing it took; the first one's time holds that of reading the prompt.
        reward_so_far (`list[float | None]`):
            What each reward that was asked says of the response up to this token, this one included; `None` where
            that is no number.
        critic (`list[float | None]`):
            What the critics of the heads foresee, a number for each objective as for `value_before`, of the same
            place and in the same units; `None` for a head without one. Empty if there is none.
    """

    drawn: TokenChance
    base_draw: TokenChance
    controlled_draw: TokenChance
    value_before: list[float]
    value_after: list[float]
    edit: float
    edit_relative: float
    kl: float
    nats: float
    alternatives: list[TokenChance]
    seconds: float
    reward_so_far: list[float | None] = field(default_factory=list)
    critic: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class TracedResponse:
    """
    A response, token by token.

    Attributes:
        text (`str`):
            The response as a user sees it, without what ended it.
        finished (`bool`):
            Whether it ended by itself, not at the token limit.
        tokens (`list[TracedToken]`):
            Its tokens, with the one that ended it.
    """

    text: str
    finished: bool
    tokens: list[TracedToken]

    @property
    def nats(self) -> float:
        """`KL(π ‖ π0)` summed over the response."""
        return self.tokens[-1].nats if self.tokens else 0.0

    @property
    def seconds(self) -> float:
        """What drawing it took."""
        return sum(token.seconds for token in self.tokens)


@dataclass(frozen=True)
class Trace:
    """
    What control did to the response to one prompt, and what it would have done along the base's.

    Attributes:
        prompt (`str` or `list[dict[str, Any]]`), prompt_ids (`list[int]`):
            What was asked, and the tokens that the model saw.
        base, controlled ([`TracedResponse`]):
            The base's response and that under control, drawn with the same noise. Along the base's, edits and KL are
            those that control would make there; it spent none.
        model (`str`):
            The base.
        hook_point (`str`):
            Where the heads act.
        control (`dict[str, Any]`, *optional*):
            The settings of [`ControlConfig`]; `None` where control is off.
        heads (`dict[str, float]`):
            The heads that act, by name, and the weight of each.
        objectives (`list[str]`):
            What the numbers of V are of.
        temperature (`float`), seed (`int`):
            Of the sampling; temperature 0 is greedy.
        rewards (`list[str]`):
            What the numbers of `reward_so_far` are of; empty if no reward was asked.
        silent_critics (`dict[str, str]`):
            The heads whose critic is there and says nothing, by name, and why.
    """

    prompt: Prompt
    prompt_ids: list[int]
    base: TracedResponse
    controlled: TracedResponse
    model: str
    hook_point: str
    control: dict[str, Any] | None
    heads: dict[str, float]
    objectives: list[str]
    temperature: float
    seed: int
    rewards: list[str] = field(default_factory=list)
    silent_critics: dict[str, str] = field(default_factory=dict)
    kind: str = field(default=KIND, init=False)
    format_version: int = field(default=FORMAT_VERSION, init=False)

    @property
    def parts_at(self) -> int | None:
        """The place of the first token that differs between the two responses; `None` if they are the same."""
        ours, theirs = ([token.drawn.id for token in each.tokens] for each in (self.controlled, self.base))
        if ours == theirs:
            return None
        same = (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
        return next(same, min(len(ours), len(theirs)))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return asdict(self)
