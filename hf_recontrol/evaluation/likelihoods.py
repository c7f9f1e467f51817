"""How likely responses are, and how far the policy that they are from is from the base: read by teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..collection.batches import forward_batches, teacher_forced
from ..collection.kept_states import KeptInMemory, are_same
from ..configuration import ControlConfig
from ..data.rollouts import Rollout
from ..heads.value_head import in_eval
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.hook_points import find_lm_head, lm_head_device


@dataclass(frozen=True)
class Likelihood:
    """
    Of one response, sums over its tokens in nats.

    Attributes:
        base (`float`, *optional*):
            `-log π0`, at temperature 1; `None` where it was not read.
        kl (`float`, *optional*):
            `KL(π ‖ π0)`, at each token the exact expectation over the vocabulary at the temperature of the sampling (1
            for a greedy response); `None` where the policy is not known.
        log_ratio (`float`, *optional*):
            `log π - log π0` of the tokens themselves, at that temperature.
    """

    base: float | None = None
    kl: float | None = None
    log_ratio: float | None = None


def base_only(model: PreTrainedModel) -> AbstractContextManager:
    """A context in which a model is its base."""
    return model.disable_control() if isinstance(model, ReControlForCausalLM) else nullcontext()


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    policy: Callable[[], AbstractContextManager] | None = None,
    *,
    asked: Sequence[Sequence[int]] | None = None,
    batch_size: int = 8,
    only_at_head: bool = False,
    kept: KeptInMemory | None = None,
) -> list[Likelihood]:
    """
    How likely responses are under the base, and how far the policy is from it along them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base, or the base with a head.
        rollouts (sequence of [`Rollout`]):
            The responses; `prompt_ids` is what the base is asked.
        policy (`Callable[[], AbstractContextManager]`, *optional*):
            Makes a context in which a forward of `model` is the policy; outside of it the model (without its heads) is
            the base. `None`: only the base is read.
        asked (sequence of lists of `int`, *optional*):
            What the policy was asked, where that is not what the base is asked (an instruction).
        only_at_head (`bool`, *optional*, defaults to `False`):
            Whether the policy differs from the base at the LM head alone: then its states are the base's, and one
            forward does for both. Where logits do not come of the LM head alone (caps, scales), two are made.
        kept ([`KeptInMemory`], *optional*):
            States of the base at the LM head's input that responses were drawn from, for a policy that differs there
            alone: a response whose states are there needs no forward.

    Returns:
        `list[Likelihood]`, in the order of `rollouts`; of an empty response all zeros.
    """
    seen = [replace(r, prompt_ids=list(ids)) for r, ids in zip(rollouts, asked, strict=True)] if asked else rollouts
    states = [None if kept is None else kept.find(rollout) for rollout in rollouts]
    known = [i for i, rollout in enumerate(rollouts) if rollout.completion_ids and states[i] is None]
    found = [Likelihood(0.0, *((0.0, 0.0) if policy is not None else ()))] * len(rollouts)
    for i, own in enumerate(states):
        if own is not None and rollouts[i].completion_ids:
            found[i] = _of_states(model, rollouts[i], own, policy)
    with nullcontext() if policy is None else policy():
        batches, _ = forward_batches(model, [seen[i] for i in known], batch_size)
    for batch in batches:
        rows = [known[i] for i in batch]
        with in_eval(model):
            with base_only(model), _at_head(model) as states:
                inputs, parts = teacher_forced(model, [rollouts[i] for i in rows], keep_logits=True)
                base = model(**inputs).logits
            if policy is not None:
                shared = only_at_head and asked is None and _is_all_of_logits(model, states, base)
                with policy():
                    if shared:
                        own, own_parts = find_lm_head(model)(states[0]), parts
                    else:
                        inputs, own_parts = teacher_forced(model, [seen[i] for i in rows], keep_logits=True)
                        own = model(**inputs).logits
        for place, i in enumerate(rows):
            own_logits = None if policy is None else own[place, own_parts[place]]
            found[i] = _likelihood(rollouts[i], base[place, parts[place]], own_logits)
    return found


def _of_states(
    model: PreTrainedModel,
    rollout: Rollout,
    states: torch.Tensor,
    policy: Callable[[], AbstractContextManager] | None,
) -> Likelihood:
    """[`likelihoods`] of one response, from the states of its tokens, `(tokens, hidden_size)`."""
    lm_head = find_lm_head(model)
    states = states[None].to(lm_head_device(lm_head))
    with in_eval(model):
        with base_only(model):
            base = lm_head(states)[0]
        if policy is None:
            return _likelihood(rollout, base, None)
        with policy():
            return _likelihood(rollout, base, lm_head(states)[0])


def check_controlled(model: object) -> None:
    """Raise `TypeError` if a model has no head."""
    if not isinstance(model, ReControlForCausalLM):
        raise TypeError(
            f"`model` must be a controlled model, got {type(model).__name__}: `ReControlForCausalLM.from_model(model, "
            "value_head)` puts a head on it."
        )


def acts_only_at_head(model: PreTrainedModel, control: ControlConfig | None) -> bool:
    """Whether a control of a model's heads differs from the base at the LM head alone: guards act behind it."""
    return model.hook_point.layer is None and (control is None or not control.is_guarded)


def likelihoods_in_force(
    model: ReControlForCausalLM,
    rollouts: Sequence[Rollout],
    batch_size: int = 8,
    kept: KeptInMemory | None = None,
) -> list[Likelihood]:
    """[`likelihoods`] of responses where the policy is the model under the settings in force."""
    only_at_head = acts_only_at_head(model, model.active_control)
    return likelihoods(model, rollouts, nullcontext, batch_size=batch_size, only_at_head=only_at_head, kept=kept)


@contextmanager
def _at_head(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What the LM head is handed in the block."""
    states: list[torch.Tensor] = []
    with find_lm_head(model).register_forward_pre_hook(lambda head, args: states.append(args[0])):
        yield states


def _is_all_of_logits(model: PreTrainedModel, states: Sequence[torch.Tensor], logits: torch.Tensor) -> bool:
    """Whether a forward's logits are what the LM head makes of its states, and nothing else."""
    if len(states) != 1 or states[0].shape[:-1] != logits.shape[:-1]:
        return False
    with base_only(model):
        last = find_lm_head(model)(states[0][:, -1:])
    return are_same(last, logits[:, -1:])


def _likelihood(rollout: Rollout, base: torch.Tensor, own: torch.Tensor | None) -> Likelihood:
    """Of the logits, `(tokens, vocabulary)`, that a response's tokens were drawn from."""
    tokens = torch.tensor(rollout.completion_ids, device=base.device)[:, None]
    log_plain = torch.log_softmax(base.float(), dim=-1)
    plain = -log_plain.gather(-1, tokens).cpu().double().sum()
    if own is None:
        return Likelihood(float(plain))
    is_plain = (rollout.temperature or 1.0) == 1.0
    log_base, log_policy = log_plain if is_plain else log_policy_of(rollout, base), log_policy_of(rollout, own)
    ratio = (log_policy.gather(-1, tokens) - log_base.gather(-1, tokens)).cpu().double().sum()
    return Likelihood(float(plain), float(kl_by_token(log_base, log_policy).sum()), float(ratio))


def log_policy_of(rollout: Rollout, logits: torch.Tensor) -> torch.Tensor:
    """`log π` of logits, `(tokens, vocabulary)`, at the temperature that a response was sampled at (1 if greedy)."""
    return torch.log_softmax(logits.float() / (rollout.temperature or 1.0), dim=-1)


def kl_by_token(log_base: torch.Tensor, log_policy: torch.Tensor) -> torch.Tensor:
    """
    `KL(π ‖ π0)` in nats at each token, exact over the vocabulary: `(tokens, vocabulary)` to `(tokens,)`, in float64 on
    the CPU.

    Raises:
        `FloatingPointError`: if a policy holds NaN, or the other one rules out what this one may draw.
    """
    # A masked token has policy 0 and adds nothing, where 0 * -inf would be NaN.
    terms = (log_policy.exp() * (log_policy - log_base)).masked_fill(log_policy == -torch.inf, 0.0)
    kl = terms.sum(-1).cpu().double()
    if not torch.isfinite(kl).all():
        raise FloatingPointError(
            "The model's logits hold NaN or infinite values, so no KL can be read: load it in another dtype (bfloat16 "
            "has a wider range than float16)."
        )
    return kl
