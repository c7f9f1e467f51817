"""Heads' tensors, prepared for control: in one dtype on one device, with the Gram matrix of the ascent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..heads.value_head import ValueHead

# Units of all first layers, in widths of the state, up to which there is a Gram matrix G. Beyond twice the width two
# products with the W_k are cheaper than one with G. Where a few rows of G are read instead of all, only its memory
# counts.
WIDEST = 2
_WIDEST_BY_FLIPS = 4


@dataclass(frozen=True)
class HeadTensors:
    """One head's tensors as the ascent and the advantage edit need them. A linear V is a layer without activation."""

    mean: torch.Tensor
    scale: torch.Tensor
    # The activation's name, for V's derivative, and itself, for g.
    activation_name: str
    activation: nn.Module
    # (weight, bias) of each hidden layer of V, and of the layer from the last activation to the objectives.
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    out: tuple[torch.Tensor, torch.Tensor]
    # The gradient of the summed objectives at the last activation.
    out_sum: torch.Tensor
    # Of several hidden layers of ReLUs on a CPU: the transposes of the weights after the first, whose rows are read.
    columns: list[torch.Tensor] | None
    # Of a linear V: eigenvalues and eigenvectors of W Wᵀ.
    eigen: tuple[torch.Tensor, torch.Tensor] | None
    # (weight, bias) of each layer of g, where there is one.
    advantage: list[tuple[torch.Tensor, torch.Tensor]] | None
    # b and c, where there are any.
    static: torch.Tensor | None
    token_bias: torch.Tensor | None

    @property
    def width(self) -> int:
        """Units of the first layer."""
        return self.layers[0][0].shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether V has no hidden layer."""
        return self.eigen is not None

    @property
    def is_one_relu(self) -> bool:
        """Whether V has one hidden layer, of ReLUs."""
        return len(self.layers) == 1 and self.activation_name == "relu"

    @property
    def is_deep_relu(self) -> bool:
        """Whether V has several hidden layers, of ReLUs."""
        return len(self.layers) > 1 and self.activation_name == "relu"

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """x of `(rows, hidden_size)` states."""
        return (hidden - self.mean) / self.scale


@dataclass(frozen=True)
class Plan:
    """The tensors of the heads that act together, in one dtype on one device."""

    heads: list[HeadTensors]
    # Over the first layers' units of all heads, one after another.
    gram: torch.Tensor | None

    @property
    def can_flip(self) -> bool:
        """Whether V's gradient is piecewise constant in the first layers' units, as [`ascend`] can use."""
        return all(head.is_one_relu or head.is_linear for head in self.heads)

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [] if self.gram is None else [self.gram]
        for head in self.heads:
            tensors += head.columns or []
            pairs = [*head.layers, head.out, *([head.eigen] if head.eigen else []), *(head.advantage or [])]
            vectors = [head.mean, head.scale, head.out_sum]
            vectors += [vector for vector in (head.static, head.token_bias) if vector is not None]
            tensors += [*vectors, *(tensor for pair in pairs for tensor in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def widths(self) -> list[int]:
        """Units of each head's first layer."""
        return [head.width for head in self.heads]


def build_plan(
    value_heads: Sequence[ValueHead], device: torch.device, dtype: torch.dtype, with_gram: bool = True
) -> Plan:
    """The plan for heads that act together. The Gram matrix is left out where it would cost more than it saves."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device=device, dtype=dtype)

    def pairs(layers) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(convert(layer.weight), convert(layer.bias)) for layer in layers]

    heads = []
    for head in value_heads:
        *layers, out = pairs(head.value_mlp.layers)
        name, eigen = head.config.activation, None
        if not layers:
            # Not every device knows float64 and eigenvectors.
            weight = head.value_mlp.layers[-1].weight.detach().cpu().double()
            eigen = tuple(map(convert, torch.linalg.eigh(weight @ weight.T)))
            layers, name = [out], "identity"
            out = (torch.eye(len(out[1]), device=device, dtype=dtype), torch.zeros_like(out[1]))
        columns = None
        if with_gram and len(layers) > 1 and name == "relu" and device.type == "cpu":
            columns = [weight.T.contiguous() for weight, _ in layers[1:]]
        g = head.advantage_mlp
        heads.append(
            HeadTensors(
                mean=convert(head.state_mean),
                scale=convert(head.state_scale),
                activation_name=name,
                activation=head.value_mlp.activation,
                layers=layers,
                out=out,
                out_sum=out[0].sum(0),
                columns=columns,
                eigen=eigen,
                advantage=None if g is None else pairs(g.layers),
                static=convert(head.static_vector) if head.config.static_vector else None,
                token_bias=None if head.config.token_bias_size is None else convert(head.token_bias),
            )
        )
    plan = Plan(heads, None)
    widest = _WIDEST_BY_FLIPS if plan.can_flip and device.type == "cpu" else WIDEST
    if with_gram and sum(plan.widths) <= widest * heads[0].mean.shape[0]:
        plan = replace(plan, gram=_gram(heads))
    return plan


def _gram(heads: Sequence[HeadTensors]) -> torch.Tensor:
    def block(a: HeadTensors, b: HeadTensors) -> torch.Tensor:
        weight = a.layers[0][0] if a is b else a.layers[0][0] * (a.scale / b.scale)
        return weight @ b.layers[0][0].T

    return torch.cat([torch.cat([block(a, b) for b in heads], dim=1) for a in heads])
