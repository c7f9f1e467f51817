"""What all engines share: which sampling they can do, what they are asked, and whether they hold the same model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...configuration import ControlConfig
from ...data.fingerprints import NO_CONTROL, control_settings
from ...data.rollouts import Rollout
from ...heads.value_head import in_eval
from ...modeling.causal_lm import ReControlForCausalLM
from ..batches import teacher_forced
from ..sampling import (
    TOP_K_WHERE_UNSET,
    changes_nothing,
    listed_ids,
    response_seed,
    temperature_of,
    vocabulary_size,
)
from ..stop_strings import cut_response

# Of each of so many prompts so many greedy tokens are compared with the model's own.
_PROBES, _PROBE_TOKENS = 4, 16
# Nats by which such a token may be less likely than the likeliest: far more than the rounding of any dtype.
_TOLERANCE = 1.0
# vLLM raises what is lower to this, and says so in its log alone.
_LOWEST_TEMPERATURE = 0.01
# Settings of a generation config that engines have too, and those that say nothing of a draw.
_TAKEN = ("do_sample", "eos_token_id", "max_new_tokens", "stop_strings", "temperature", "top_k", "top_p")
_SILENT = (
    *(
        "bos_token_id",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "max_length",
        "num_return_sequences",
    ),
    *("pad_token_id", "transformers_version", "use_cache"),
)


class Request(NamedTuple):
    """A response to draw: a key that tells it from the others, the prompt's token ids, and its seed of 63 bits."""

    key: Any
    prompt_ids: list[int]
    seed: int


class Completion(NamedTuple):
    """What was drawn: the request's key, the token ids, and whether the engine found an end."""

    key: Any
    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class EngineSampling:
    """How an engine draws, under vLLM's names. All of it is said with each request, so that no default can act."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, config: GenerationConfig) -> EngineSampling:
        """
        That of a complete generation config.

        Raises:
            `ValueError`: for settings that engines do not have.
        """
        given = {name: value for name, value in config.to_diff_dict().items() if name[0] != "_"}
        other = [name for name in given.keys() - {*_TAKEN, *_SILENT} if not changes_nothing(name, given[name])]
        if other:
            raise ValueError(
                f"An engine draws with temperature, top_k and top_p, or greedily, and has no `{min(other)}` as "
                "transformers has it: leave that out, or take `engine='transformers'`."
            )
        drawn, temperature = bool(config.do_sample), temperature_of(config)
        top_p = (1.0 if config.top_p is None else config.top_p) if drawn else 1.0
        if 0 < temperature < _LOWEST_TEMPERATURE or top_p == 0:
            raise ValueError(
                f"An engine draws at no temperature below {_LOWEST_TEMPERATURE} and at no `top_p` of 0, got "
                f"{temperature:g} and {top_p:g}: take temperature 0, which is greedy."
            )
        return cls(
            config.max_new_tokens,
            temperature,
            top_p,
            (TOP_K_WHERE_UNSET if config.top_k is None else config.top_k) if drawn else 0,
            tuple(config.stop_strings or ()),
            tuple(listed_ids(config.eos_token_id)),
        )

    def fields(self) -> dict[str, Any]:
        """A request's fields: no other end than ours, and none that hides what was drawn."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return fields | {
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
        }


class Engine(ABC):
    """
    Another program that draws responses.

    Args:
        name (`str`), arguments (`dict`):
            `engine` and `engine_arguments` of [`EngineSettings`].
        model ([`~transformers.PreTrainedModel`]), tokenizer:
            What the engine stands for, and what the states of its responses will be read from.
        config ([`~transformers.GenerationConfig`]):
            Complete, see [`sampling_config`].
        control ([`ControlConfig`] or `False`):
            What to sample under.

    Attributes:
        control (`dict`):
            As [`control_settings`] tells it.

    Raises:
        `ValueError`: for sampling or arguments that it cannot do.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        control: ControlConfig | bool,
    ):
        self.name, self.arguments = name, dict(arguments)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        sampling, known = EngineSampling.of(config), range(vocabulary_size(model))
        # An end that no model can draw may be a default of its architecture. vLLM takes none.
        ends = tuple(token for token in sampling.stop_token_ids if token in known)
        self.sampling = replace(sampling, stop_token_ids=ends)
        self.control = control_settings(model, control)
        self._control = control
        self.check_arguments(self.arguments)
        self.check_control()

    @property
    def is_controlled(self) -> bool:
        """Whether responses are drawn under a control."""
        return self.control != NO_CONTROL

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What responses depend on of the engine, as JSON: the same distribution is drawn from in other ways."""

    @classmethod
    @abstractmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """
        Raises:
            `ValueError`: for arguments that it does not take. `ImportError`: names the extra.
        """

    @abstractmethod
    def check_control(self) -> None:
        """
        Raises:
            `ValueError`: for a control that it cannot draw under.
        """

    @abstractmethod
    def running(self, longest: int) -> AbstractContextManager[None]:
        """
        The engine at work, inside the block; `longest` is the number of tokens of the longest prompt.

        Raises:
            `OSError`, `ValueError`: if it does not start or does not answer.
        """

    @abstractmethod
    def complete(self, requests: Iterable[Request], sampling: EngineSampling) -> Iterator[Completion]:
        """
        Draw responses, each as soon as it is complete. Requests are taken one by one as there is room for them.

        Raises:
            `OSError`: if the engine is gone. `ValueError`: for a request that it does not take.
        """

    def check_model(self, prompts: Sequence[list[int]]) -> None:
        """
        Compare the engine's greedy tokens with the model's own likeliest ones.

        Raises:
            `ValueError`: if the engine holds another model, or another control.
        """
        few = prompts[:_PROBES]
        tokens = min(_PROBE_TOKENS, self.sampling.max_tokens)
        greedy = EngineSampling(tokens, 0.0, 1.0, 0, (), self.sampling.stop_token_ids)
        for key, ids, ended in self.complete((Request(number, ids, 0) for number, ids in enumerate(few)), greedy):
            self._check_tokens(ids, ended, greedy)
            lost = self._lost(few[key], ids)
            if lost > _TOLERANCE:
                under = " under this control" if self.is_controlled else ""
                raise ValueError(
                    f"The engine {self.name} holds another model than {self.model.config._name_or_path}{under}: a "
                    f"token that it holds for the likeliest is {lost:.1f} nats less likely than the model's own. Let "
                    "both be the same checkpoint."
                )

    @torch.no_grad()
    def _lost(self, prompt_ids: list[int], ids: list[int]) -> float:
        """How many nats the likeliest token is likelier than that of `ids`, where this is most."""
        inputs, (where,) = teacher_forced(self.model, [Rollout("", "", prompt_ids, ids, False)], True)
        controlled = isinstance(self.model, ReControlForCausalLM)
        with in_eval(self.model), self.model.use_control(self._control) if controlled else nullcontext():
            logits = self.model(**inputs).logits[0, where].float()
        chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
        return float((logits.max(-1).values - chosen).max())

    def draw_parts(
        self, parts: Mapping[int, Sequence[tuple[list[int], int, int]]], seed: int, advance: Any
    ) -> Iterator[tuple[int, list[tuple[str, list[int], bool]]]]:
        """
        Draw parts, each as soon as all of it is there.

        Args:
            parts (mapping):
                Of each part's number its rows: the prompt's token ids, the prompt's number, the sample's number.
            seed (`int`):
                The run's.
            advance (`Callable[[int], None]`):
                Told of each response.

        Yields:
            A part's number, and of each of its rows the text, the tokens and whether it ended by itself.
        """
        left = {number: len(rows) for number, rows in parts.items()}
        drawn: dict[int, list] = {number: [None] * len(rows) for number, rows in parts.items()}
        yield from ((number, drawn.pop(number)) for number, count in left.items() if not count)
        for (number, row), ids, ended in self.complete(self._requests(parts, seed), self.sampling):
            drawn[number][row] = self._response(ids, ended)
            left[number] -= 1
            advance(1)
            if not left[number]:
                yield number, drawn.pop(number)

    @staticmethod
    def _requests(parts: Mapping[int, Sequence[tuple[list[int], int, int]]], seed: int) -> Iterator[Request]:
        for number, rows in parts.items():
            for row, (ids, *numbers) in enumerate(rows):
                noise = np.random.SeedSequence(response_seed(seed, *numbers)).generate_state(1, np.uint64)[0]
                # Engines take signed integers.
                yield Request((number, row), ids, int(noise >> np.uint64(1)))

    def _check_room(self, longest: int, room: Any) -> None:
        """Raise `ValueError` if the engine's context, of `room` tokens if that is known, is too short for a prompt."""
        needed = longest + self.sampling.max_tokens
        if isinstance(room, int) and room < needed:
            raise ValueError(
                f"The engine {self.name} has room for {room} tokens, and the longest prompt with its response may "
                f"have {needed}: raise its `max_model_len`, or lower `max_new_tokens`."
            )

    def _check_tokens(self, ids: list[int], ended: bool, sampling: EngineSampling) -> None:
        """Raise `ValueError` if these cannot be all tokens that were drawn."""
        if not 1 <= len(ids) <= sampling.max_tokens:
            raise ValueError(
                f"The engine {self.name} returned {len(ids)} tokens where 1 to {sampling.max_tokens} can be drawn."
            )
        if (highest := max(ids)) >= (size := vocabulary_size(self.model)):
            raise ValueError(
                f"The engine {self.name} holds another model than {self.model.config._name_or_path}, which has {size} "
                f"tokens: it returned the token {highest}. Let both be the same checkpoint."
            )
        if ended and not sampling.stop and set(ids).isdisjoint(sampling.stop_token_ids):
            raise ValueError(
                f"The engine {self.name} says that a response ended, and returned no token that ends one: rollouts "
                "need that token, too, as vLLM returns it."
            )

    def _response(self, ids: list[int], ended: bool) -> tuple[str, list[int], bool]:
        self._check_tokens(ids, ended, self.sampling)
        text, kept, finished = cut_response(
            self.tokenizer, ids, list(self.sampling.stop_token_ids), self.sampling.stop
        )
        if not (finished or ended) and len(ids) < self.sampling.max_tokens:
            raise ValueError(
                f"The engine {self.name} cut a response after {len(ids)} tokens, {self.sampling.max_tokens} were "
                "asked for: let it take longer contexts (vLLM's `max_model_len`)."
            )
        return text, kept, finished or ended
