"""What control does at each token of a response that was drawn: read by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...collection.batches import forward_batches, teacher_forced
from ...collection.sampling import RowSampler, response_seed
from ...data.rollouts import Rollout
from ...heads.value_head import in_eval, read_values
from ...modeling.causal_lm import ReControlForCausalLM
from ...modeling.hook_points import read_states
from ...modeling.hooks import read_edits
from ..likelihoods import kl_by_token, log_policy_of
from .record import TokenChance, TracedResponse, TracedToken
from .texts import TokenTexts

logger = logging.get_logger(__name__)

# Share of tokens that a reading may not draw again: near ties, in short dtypes.
_FEW = 0.1


@dataclass(frozen=True)
class _Reading:
    """States, `(tokens, width)`, and logits, `(tokens, vocabulary)`, that the tokens of a response were drawn from."""

    before: torch.Tensor
    after: torch.Tensor
    base_logits: torch.Tensor
    own_logits: torch.Tensor


def check_readable(model: ReControlForCausalLM) -> None:
    """
    Raise `ValueError` if teacher forcing under the control in force is not what generation does: for a model that is
    not causal, and for a head on a middle layer of one that cannot leave the prompt unedited.
    """
    forward_batches(model, [], 1)


@torch.no_grad()
def read_response(
    model: ReControlForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    seconds: Sequence[float],
    *,
    seed: int,
    num_alternatives: int,
) -> TracedResponse:
    """
    What the control in force does at each token of a response, whoever drew it.

    Args:
        model ([`ReControlForCausalLM`]), tokenizer:
            The base with its heads. Heads at a middle layer edit from the prompt's last position on, as they do in
            generation.
        rollout ([`Rollout`]):
            The response.
        seconds (sequence of `float`):
            What drawing each of its tokens took.
        seed (`int`):
            Of its sampling: what each policy would have drawn is found with the same noise.
        num_alternatives (`int`):
            How many of the likeliest tokens of each policy are kept.

    Raises:
        `FloatingPointError`: if logits or V are not finite. `RuntimeError`: if the edits cannot be read.
    """
    if not rollout.completion_ids:
        return TracedResponse(rollout.completion, rollout.finished, [])
    read = _read(model, rollout)
    log_base, log_own = (log_policy_of(rollout, logits) for logits in (read.base_logits, read.own_logits))
    kl = kl_by_token(log_base, log_own)
    draws = [_draws(rollout, logits, seed) for logits in (read.base_logits, read.own_logits)]
    _check_draws(rollout, draws[0 if rollout.control is None else 1])
    values = [_values(model, states) for states in (read.before, read.after)]
    if not all(torch.isfinite(value).all() for value in values):
        raise FloatingPointError("V is no finite number at some tokens: its head cannot be traced in this dtype.")
    before = read.before.double()
    lengths = torch.linalg.vector_norm(read.after.double() - before, dim=-1)
    relative = lengths / torch.linalg.vector_norm(before, dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    texts = TokenTexts(tokenizer)
    chances = [log.exp().cpu() for log in (log_base, log_own)]
    likeliest = [chance.topk(min(num_alternatives, chance.shape[-1]), dim=-1).indices.tolist() for chance in chances]
    columns = (
        rollout.completion_ids,
        texts.of_response(rollout.completion_ids),
        *draws,
        *(value.tolist() for value in values),
        lengths.tolist(),
        relative.tolist(),
        kl.tolist(),
        kl.cumsum(0).tolist(),
        *likeliest,
        seconds[: len(rollout.completion_ids)],
    )
    tokens = []
    for place, row in enumerate(zip(*columns, strict=True)):
        token, text, base_draw, own_draw, value, edited, length, share, nats, sum_of_nats, of_base, of_own, time = row

        def chance(token: int, place: int = place) -> TokenChance:
            base, own = (float(each[place, token]) for each in chances)
            return TokenChance(token, texts.alone(token), base, own)

        listed = dict.fromkeys([token, base_draw, own_draw, *of_base, *of_own])
        tokens.append(
            TracedToken(
                drawn=replace(chance(token), text=text),
                base_draw=chance(base_draw),
                controlled_draw=chance(own_draw),
                value_before=value,
                value_after=edited,
                edit=length,
                edit_relative=share,
                kl=nats,
                nats=sum_of_nats,
                alternatives=sorted(map(chance, listed), key=lambda each: (-each.controlled, -each.base, each.id)),
                seconds=time,
            )
        )
    return TracedResponse(rollout.completion, rollout.finished, tokens)


def _read(model: ReControlForCausalLM, rollout: Rollout) -> _Reading:
    inputs, (part,) = teacher_forced(model, [rollout], keep_logits=True)
    with in_eval(model):
        with model.disable_control():
            base = model(**inputs).logits
        with read_states(model.hook_point, keep_logits=True) as states, read_edits(model) as edits:
            own = model(**inputs).logits
    if model.active_control is not None and len(edits) != 1:
        raise RuntimeError(
            f"The edits of this model cannot be read: {len(edits)} were seen in one forward. If it is compiled, trace "
            "it before you compile it."
        )
    # A decoder layer is seen at all positions, the logits only from the prompt's last one on.
    kept = states[0][:, -own.shape[1] :]
    before, after = edits[0] if edits else (kept, kept)
    return _Reading(before[0, part], after[0, part], base[0, part], own[0, part])


def _draws(rollout: Rollout, logits: torch.Tensor, seed: int) -> list[int]:
    """What is drawn from logits, `(tokens, vocabulary)`, with the noise that a response was drawn with."""
    if rollout.temperature == 0:
        return logits.float().argmax(-1).tolist()
    sampler = RowSampler([response_seed(seed, rollout.prompt_number, rollout.sample)], logits.device)
    scores = logits.float() / rollout.temperature
    return [int(sampler(None, row[None]).argmax()) for row in scores]


def _check_draws(rollout: Rollout, draws: Sequence[int]) -> None:
    """Warn where a reading draws others than the tokens that were drawn: then it is not what they were drawn from."""
    others = sum(drawn != token for drawn, token in zip(draws, rollout.completion_ids, strict=True))
    if others > max(1, _FEW * len(draws)):
        logger.warning(
            f"{others} of {len(draws)} tokens are not those that a forward of the whole response draws again: its "
            "numbers are not quite those of generation. Rounding does that in short dtypes: try `dtype='float32'`."
        )


def _values(model: ReControlForCausalLM, states: torch.Tensor) -> torch.Tensor:
    """V of states, `(tokens, objectives)`, of all heads that act behind each other."""
    return torch.cat([read_values(model.value_heads[name], states) for name in traced_heads(model)], dim=-1).cpu()


def traced_heads(model: ReControlForCausalLM) -> list[str]:
    """The heads whose V is told: those that act, or all if none does."""
    return list(model.active_value_heads) or list(model.value_heads)
