"""
A naive reference: the plain base, one full forward a token, no cache, every position edited by plain autograd ascent
(or by the advantage formula) in float64. It shares no code with the package beyond the head's tensors and the
settings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_recontrol import ControlConfig, ValueHead

from .tiny_models import layers_of, lm_head_of

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "silu": nn.functional.silu, "gelu": nn.functional.gelu}


def _mlp(layers: nn.ModuleList, activation: str, x: torch.Tensor) -> torch.Tensor:
    for index, layer in enumerate(layers):
        x = x @ layer.weight.detach().to(x.dtype).T + layer.bias.detach().to(x.dtype)
        if index < len(layers) - 1:
            x = _ACTIVATIONS[activation](x)
    return x


@dataclass
class Mixture:
    """Heads with a weight each: a number, or one for each row."""

    heads: list[ValueHead]
    weights: list

    @property
    def config(self):
        return self.heads[0].config

    def edit(self, hidden: torch.Tensor, control: ControlConfig, dtype: torch.dtype) -> torch.Tensor:
        """The naive sum, in the coordinates of the state itself: u <- u + a (sum w scale^2 grad V(h + u) - 2 l2 u)."""
        with torch.inference_mode(False), torch.enable_grad():
            rows = [torch.tensor(x, dtype=dtype) for x in (control.step_size, *self.weights)]
            step_size, *weights = [x[:, None, None] if x.ndim else x for x in rows]
            hidden = hidden.detach().clone().to(dtype)
            edit = torch.zeros_like(hidden)
            for _ in range(control.num_steps if control.method == "ascent" else 1):
                change = torch.zeros_like(hidden)
                for head, weight in zip(self.heads, weights, strict=True):
                    mean, scale = head.state_mean.detach().to(dtype), head.state_scale.detach().to(dtype)
                    moved = (hidden + edit).detach().requires_grad_(True)
                    x = (moved - mean) / scale
                    if control.method == "static":
                        change += weight * head.static_vector.to(dtype)
                        continue
                    if control.method == "advantage":
                        change += weight * _mlp(head.advantage_mlp.layers, head.config.activation, x).detach()
                        continue
                    values = _mlp(head.value_mlp.layers, head.config.activation, x)
                    total = values.sum()
                    if control.target is not None:
                        target, r_mean, r_std = (
                            torch.tensor(y, dtype=dtype)
                            for y in (control.target, head.config.reward_mean, head.config.reward_std)
                        )
                        total = -0.5 * (values - (target - r_mean) / r_std).square().sum()
                    change += weight * scale**2 * torch.autograd.grad(total, moved)[0]
                edit = edit + step_size * (change - 2 * control.l2 * edit)
            return edit.detach()


def reference_edit(
    head: ValueHead | Mixture, hidden: torch.Tensor, control: ControlConfig, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """u for states of shape `(rows, positions, width)`, computed in `dtype`."""
    if isinstance(head, Mixture):
        return head.edit(hidden, control, dtype)
    with torch.inference_mode(False), torch.enable_grad():
        step_size = torch.tensor(control.step_size, dtype=dtype)
        if control.per_row:
            assert len(step_size) == len(hidden)
            step_size = step_size[:, None, None]
        mean, scale = head.state_mean.detach().to(dtype), head.state_scale.detach().to(dtype)
        x = (hidden.detach().clone().to(dtype) - mean) / scale
        if control.method == "static":
            return step_size * head.static_vector.to(dtype).expand_as(x)
        if control.method == "advantage":
            return step_size * _mlp(head.advantage_mlp.layers, head.config.activation, x)
        edit = torch.zeros_like(x)
        for _ in range(control.num_steps):
            leaf = edit.clone().requires_grad_(True)
            value = _mlp(head.value_mlp.layers, head.config.activation, x + leaf).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
            edit = edit + step_size * (gradient - 2 * control.l2 * edit)
        return (scale * edit).detach()


def reference_shift(head: ValueHead | Mixture, logits: torch.Tensor, control: ControlConfig) -> torch.Tensor:
    """Logits `(rows, positions, vocabulary)` of the LM head with the token bias, where the control has it."""
    heads, weights = (head.heads, head.weights) if isinstance(head, Mixture) else ([head], [1.0])
    if control.method == "ascent":
        return logits
    result = logits.double().clone()
    for one, weight in zip(heads, weights, strict=True):
        if getattr(one, "token_bias", None) is not None:
            factor = torch.as_tensor(control.step_size).double() * torch.as_tensor(weight).double()
            factor = factor[:, None, None] if factor.ndim else factor
            # Tokens that were added to the vocabulary have none.
            result[..., : len(one.token_bias)] += factor * one.token_bias.double()
    return result.to(logits.dtype)


def reference_within(
    base: torch.Tensor, controlled: torch.Tensor, max_kl: float, masked: torch.Tensor
) -> torch.Tensor:
    """The logits on the way from the base's to the controlled ones at which the KL is `max_kl`, by halving."""
    base = base.double()
    log_base, shift = torch.log_softmax(base, -1), controlled.double() - base

    def kl_at(share):
        log_policy = torch.log_softmax((base + share * shift).masked_fill(masked, -math.inf), -1)
        return (log_policy.exp() * (log_policy - log_base)).masked_fill(masked, 0).sum(-1, keepdim=True)

    low, high = torch.zeros_like(base[..., :1]), torch.ones_like(base[..., :1])
    fits = kl_at(high) <= max_kl
    for _ in range(60):
        middle = (low + high) / 2
        below = kl_at(middle) <= max_kl
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(fits, controlled, (base + low * shift).to(controlled.dtype))


@contextmanager
def reference_control(
    model: PreTrainedModel, head: ValueHead, control: ControlConfig | None, start: int = 0
) -> Iterator[PreTrainedModel]:
    """
    Puts naive hooks on a plain base: every position from `start` on is edited. For forwards without a cache only. With
    a guard the base runs a second time.
    """
    if control is None:
        yield model
        return
    paused = False

    def edited(hidden):
        assert hidden.ndim == 3
        edit = reference_edit(head, hidden[:, start:], control).to(hidden.dtype)
        return torch.cat([hidden[:, :start], hidden[:, start:] + edit], dim=1)

    def on_layer(module, args, output):
        if paused:
            return None
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    def on_head(module, args):
        return None if paused else (edited(args[0]), *args[1:])

    def behind_head(module, args, output):
        shifted = reference_shift(head, output[:, start:], control)
        return None if paused else torch.cat([output[:, :start], shifted], dim=1)

    def on_model(module, args, kwargs, output):
        nonlocal paused
        if paused or not control.is_guarded:
            return None
        paused = True
        base = module(*args, **kwargs).logits.float()
        paused = False
        masked = torch.zeros_like(base, dtype=torch.bool)
        if control.plausibility:
            masked = base < base.amax(-1, keepdim=True) + math.log(control.plausibility)
        if control.max_kl is not None:
            output.logits = reference_within(base, output.logits, control.max_kl, masked)
        output.logits = output.logits.masked_fill(masked, -math.inf)
        return output

    handles = [model.register_forward_hook(on_model, with_kwargs=True)]
    if head.config.hook_point == "lm_head":
        handles.append(lm_head_of(model).register_forward_pre_hook(on_head))
        handles.append(lm_head_of(model).register_forward_hook(behind_head))
    else:
        handles.append(layers_of(model)[head.config.layer].register_forward_hook(on_layer))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def full_inputs(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
    """Arguments of a plain forward that sees what generate shows the model: the mask and the positions it implies."""
    inputs = {"input_ids": ids}
    parameters = inspect.signature(model.forward).parameters
    mask = torch.ones_like(ids) if mask is None else mask
    if "attention_mask" in parameters and not mask.all():
        inputs["attention_mask"] = mask
    if "position_ids" in parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def reference_logits(
    model: PreTrainedModel,
    head: ValueHead,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    control: ControlConfig | None = None,
    start: int = 0,
) -> torch.Tensor:
    """Controlled logits at every position, `(batch, seq, vocab)`. `control=None` gives the base's."""
    with torch.no_grad(), reference_control(model, head, control, start):
        return model(**full_inputs(model, ids, mask), use_cache=False).logits


def reference_generate(
    model: PreTrainedModel,
    head: ValueHead,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    control: ControlConfig | None = None,
    max_new_tokens: int = 8,
    pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Prompts and `max_new_tokens` new tokens, `(batch, seq)`. `pick` maps the tokens so far and the next token's float32
    logits (generate casts them so) to the next tokens; the default takes the most likely one. Under a head on an
    earlier layer the prompt's last position and all later ones are edited.
    """
    layer = head.config.layer % len(layers_of(model)) if head.config.hook_point == "decoder_layer" else None
    start = ids.shape[1] - 1 if layer is not None and layer < len(layers_of(model)) - 1 else 0
    for _ in range(max_new_tokens):
        logits = reference_logits(model, head, ids, mask, control, start)[:, -1].float()
        token = logits.argmax(-1) if pick is None else pick(ids, logits)
        ids = torch.cat([ids, token[:, None]], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
    return ids


def reference_greedy(*args, **kwargs) -> torch.Tensor:
    """[`reference_generate`] with the most likely token."""
    return reference_generate(*args, **kwargs)
