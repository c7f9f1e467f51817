"""Controlled decoding: at each step the likeliest tokens are tried, and drawn the more, the better what follows is."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...collection.rollouts import draw_rollouts
from ...collection.sampling import (
    Reweighing,
    draws_from_policy,
    listed_ids,
    sampling_config,
    vocabulary_size,
)
from ...collection.scoring.responses import scored_rollouts
from ...collection.scoring.rewards import note_calls, reward_fingerprint
from ...collection.stop_strings import StopStrings, cut_response
from ...data.fingerprints import head_fingerprint
from ...data.processes import no_progress
from ...data.prompts import Prompts
from ...data.rollouts import Rollout
from ...modeling.causal_lm import ReControlForCausalLM
from ...modeling.generation import with_positions
from ...modeling.hook_points import read_states
from ...settings import ScoringSettings
from ...utils.checks import check_choice, check_int
from ...utils.code_fingerprints import UnknownStateError
from .rival import Answer, Bench, Rival, standardised


class CandidateDraw(Reweighing):
    """
    What one batch's tokens are drawn from, see [`ControlledDecoding`].

    Args:
        rival ([`ControlledDecoding`]), strength (`float`):
            What knows the candidates' worth, and how strong it is.
        asked (sequence of `dict`):
            The prompt's row that each row answers.

    Attributes:
        kls (`list[torch.Tensor]`):
            Of each step the KL to the base in nats, shape `(rows,)`.
        ended (`list[bool]`):
            Which rows have ended: what is still drawn there is padding.
        width (`int`):
            Of the padded prompts.
    """

    def __init__(self, rival: ControlledDecoding, strength: float, asked: Sequence[dict[str, Any]]):
        self.rival, self.strength, self.asked = rival, strength, asked
        self.kls: list[torch.Tensor] = []
        self.ended = [False] * len(asked)

    def begin(self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> None:
        mask = model_kwargs.get("attention_mask")
        self.width, self.mask = input_ids.shape[1], torch.ones_like(input_ids) if mask is None else mask
        found = {name: model_kwargs.get(name) for name in ("past_key_values", "cache_params")}
        # Generation fills it in place.
        self.caches = {name: cache for name, cache in found.items() if isinstance(cache, Cache)}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self.width:
            for row, drawn in enumerate(input_ids[:, self.width :].tolist()):
                self.ended[row] |= self.rival.ends(drawn)
        base = torch.log_softmax(scores.float(), dim=-1)
        likeliest = base.topk(self.rival.top_k, dim=-1)
        values, known = self.rival.values(self, input_ids, likeliest.indices)
        known = known & (likeliest.values > -torch.inf)
        weights = torch.where(known, likeliest.values.exp(), 0.0)
        values = torch.where(known, values, 0.0)
        mean = (weights * values).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        moved = likeliest.values + self.strength * torch.where(known, values - mean, 0.0)
        kept = base if self.rival.rest == "keep" else torch.full_like(base, -torch.inf)
        own = torch.log_softmax(kept.scatter(-1, likeliest.indices, moved), dim=-1)
        self.kls.append((own.exp() * (own - base)).where(own > -torch.inf, 0.0).sum(-1))
        return own

    def inputs_of(
        self, model: PreTrainedModel, input_ids: torch.LongTensor, candidates: torch.LongTensor
    ) -> dict[str, Any]:
        """What to call a model with for each row followed by each of its candidates, `(rows * top_k)` rows."""
        rows, count = candidates.shape
        repeated = torch.arange(rows, device=input_ids.device).repeat_interleave(count)
        texts = torch.cat([input_ids[repeated], candidates.reshape(-1, 1)], dim=1)
        drawn = self.mask.new_ones(len(texts), texts.shape[1] - self.width)
        mask = torch.cat([self.mask[repeated], drawn], dim=1)
        caches = copy.deepcopy(self.caches)
        for cache in caches.values():
            # As in a beam search: all kinds of cache know how, where `batch_repeat_interleave` is for attention alone.
            cache.reorder_cache(repeated)
        return model.prepare_inputs_for_generation(
            **with_positions(model, {"input_ids": texts, "attention_mask": mask}),
            next_sequence_length=1 if caches else None,
            use_cache=bool(caches),
            **caches,
        )


class ControlledDecoding(Rival):
    r"""
    At each step the base's `top_k` likeliest tokens are tried. With `v_y` the worth of the response that goes on with
    `y`, in standard deviations of the reward, and `v̄` its mean over these tokens, weighted by `π0`,

    `π(y) ∝ π0(y) exp(strength · (v_y - v̄))`,

    where `π0` is the base as it is sampled from: at its temperature, or at 1 for greedy responses, which take the
    likeliest token of `π`. The KL to `π0` is known exactly at each token, unless top-p, a repetition penalty or the
    like reshape `π0`: the KL of others is to the base without these.

    Args:
        top_k (`int`, *optional*, defaults to 10):
            How many tokens are tried: the cost grows with it.
        rest (`str`, *optional*, defaults to `"keep"`):
            What becomes of all other tokens. `"keep"`: they count as worth `v̄`, so that the policy becomes the base as
            the strength goes to 0. `"drop"`: they are never drawn, as in top-k sampling; that alone is some KL to the
            base, so that small KLs cannot be matched.

    Raises:
        `ValueError`: for settings out of range, and for a beam search.
    """

    start = 1.0

    def __init__(self, bench: Bench, top_k: int = 10, rest: str = "keep"):
        super().__init__(bench)
        check_int("top_k", top_k, 2, vocabulary_size(bench.model))
        check_choice("rest", rest, ("keep", "drop"))
        self.top_k, self.rest = top_k, rest
        config = sampling_config(bench.model, bench.tokenizer, bench.sampling)
        if (config.num_beams or 1) > 1:
            raise ValueError(
                "Controlled decoding draws one token after the other, and the generation config asks for beams "
                f"(`num_beams={config.num_beams}`): leave them out."
            )
        self._knows_kl = draws_from_policy(config)
        self.end_ids, self.stop_strings = listed_ids(config.eos_token_id), config.stop_strings or ()
        self._stops = StopStrings(bench.tokenizer, self.stop_strings) if self.stop_strings else None

    def depends_on(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "rest": self.rest}

    def ends(self, drawn: Sequence[int]) -> bool:
        """Whether the last of a response's tokens ends it."""
        return drawn[-1] in self.end_ids or (self._stops is not None and self._stops.ends(drawn))

    @abstractmethod
    def values(
        self, batch: CandidateDraw, input_ids: torch.LongTensor, candidates: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What candidates are worth.

        Args:
            batch ([`CandidateDraw`]):
                What they are drawn for.
            input_ids (`torch.LongTensor` of shape `(rows, positions)`):
                Prompts, padded on the left, and what was drawn so far.
            candidates (`torch.LongTensor` of shape `(rows, top_k)`):
                Next tokens.

        Returns:
            Two tensors of the shape of `candidates`: their worth in standard deviations of the reward, and whether it
            is known. What is not known counts as `v̄`.
        """

    def answer(self, prompts: Prompts, strength: float | None) -> list[Answer]:
        strength = self.start if strength is None else strength
        rows = dict(zip(prompts.numbers, prompts.rows, strict=True))
        begun: list[tuple[list[tuple[int, int]], CandidateDraw]] = []

        def reweigh(drawn: list[tuple[int, int]]) -> CandidateDraw:
            batch = CandidateDraw(self, strength, [rows[number] for number, _ in drawn])
            begun.append((drawn, batch))
            return batch

        bench = self.bench
        rollouts = draw_rollouts(
            bench.model, bench.tokenizer, prompts, bench.sampling, progress=no_progress, reweigh=reweigh
        )
        kls: dict[tuple[int, int], list[float]] = {}
        for drawn, batch in begun:
            kls |= dict(zip(drawn, torch.stack(batch.kls, dim=1).tolist(), strict=True))
        if not self._knows_kl:
            return [Answer(r) for r in rollouts]
        # Behind its end a row was padded.
        return [Answer(r, kls[r.prompt_number, r.sample][: len(r.completion_ids)]) for r in rollouts]


class PrefixDecoding(ControlledDecoding):
    """
    CD-prefix, the token-wise controlled decoding of Mudgal et al. (2023) with the head's V as the prefix scorer, see
    [`ControlledDecoding`]: `v_y = V(s_{t+1})`, standardised (of several objectives the sum), of the base's state
    behind `y`. Of tokens that end a response nothing is known: V was trained on states that tokens are drawn from, and
    behind an end there is none.

    A step costs one more forward of the base, with `top_k` times as many rows and as large a cache.
    """

    def __init__(self, bench: Bench, top_k: int = 10, rest: str = "keep"):
        self._head = bench.head_for("cd_prefix")
        super().__init__(bench, top_k, rest)

    def depends_on(self) -> dict[str, Any]:
        return super().depends_on() | {"head": head_fingerprint(self._head)}

    def values(
        self, batch: CandidateDraw, input_ids: torch.LongTensor, candidates: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.bench.model
        inputs = batch.inputs_of(model, input_ids, candidates)
        if model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        with read_states(model.hook_point) as states:
            model(**inputs)
        parameter = next(self._head.parameters())
        values = self._head(states[0][:, -1].to(parameter.device, parameter.dtype)).sum(-1)
        ends = torch.tensor(self.end_ids, dtype=candidates.dtype, device=candidates.device)
        return values.to(candidates.device).float().view_as(candidates), ~torch.isin(candidates, ends)


class RewardDecoding(ControlledDecoding):
    """
    Controlled decoding with the reward itself, see [`ControlledDecoding`]: `v_y` is the reward of the text so far with
    `y` at its end, as if the response ended there (several rewards: their sum in standard deviations; without a head
    the plain reward). Under an instruction the reward is told the prompt with it, where answers are scored without.

    A step costs `top_k` rewards for each response, and no further forward of the base.
    """

    def __init__(self, bench: Bench, top_k: int = 10, rest: str = "keep"):
        super().__init__(bench, top_k, rest)
        self._fingerprints = {}
        for name, function in bench.rewards.items():
            try:
                self._fingerprints[name] = reward_fingerprint(function)
            except UnknownStateError as error:
                raise ValueError(
                    f"Answers that are drawn by the reward {name} depend on it, and whether it is still the same "
                    f"cannot be known, since it holds {error}. Give it a text of your own that changes when it does: "
                    f"`{name}.fingerprint = 'version 1'`."
                ) from error

    def depends_on(self) -> dict[str, Any]:
        units = None
        if isinstance(self.bench.model, ReControlForCausalLM):
            config = self.bench.model.value_head.config
            units = [config.reward_mean, config.reward_std]
        return super().depends_on() | {
            "rewards": self._fingerprints,
            "combine_rewards": self.bench.combine_rewards,
            "units": units,
        }

    def answer(self, prompts: Prompts, strength: float | None) -> list[Answer]:
        answers = super().answer(prompts, strength)
        for name, function in self.bench.rewards.items():
            note_calls(function, self._fingerprints[name])
        return answers

    def values(
        self, batch: CandidateDraw, input_ids: torch.LongTensor, candidates: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        drawn, tried = input_ids[:, batch.width :].tolist(), candidates.tolist()
        places = [
            (row, column) for row in range(len(tried)) if not batch.ended[row] for column in range(len(tried[row]))
        ]
        rollouts = []
        for row, column in places:
            ids = [*drawn[row], tried[row][column]]
            text, ids, finished = cut_response(self.bench.tokenizer, ids, self.end_ids, self.stop_strings)
            columns = {name: value for name, value in batch.asked[row].items() if name != "prompt"}
            rollouts.append(Rollout(batch.asked[row]["prompt"], text, [], ids, finished, columns=columns))
        values = torch.full(candidates.shape, torch.nan)
        if rollouts:
            sampling, functions = self.bench.sampling, list(self.bench.rewards.values())
            on_bad_rows = sampling.on_bad_rows if isinstance(sampling, ScoringSettings) else "error"
            scored, _ = scored_rollouts(
                rollouts, functions, on_bad_rows, self.bench.combine_rewards, "texts that controlled decoding tries"
            )
            for place, rollout in zip(places, scored, strict=True):
                worth = standardised(self.bench, rollout.reward)
                values[place] = torch.nan if worth is None else worth
        values = values.to(candidates.device)
        return values, ~values.isnan()
