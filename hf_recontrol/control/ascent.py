"""
Gradient ascent on V without autograd, for one head or a weighted sum of several, and the advantage edit.

Notation, for head k with weight ω_k: `x = (h - state_mean) / state_scale` is the scaled state, `z = W x + b` the first
pre-activation, `δ = ω ∂V/∂z`. A step is `u ← (1 - 2αλ) u + α Σ_k ω_k scale_k² ⊙ ∇V_k(h + u)`, for one head plain
ascent in its scaled coordinates. It never leaves the row spaces of the W_k: `u = Σ_k scale_k ⊙ W_kᵀ c_k` with
`c ← (1 - 2αλ) c + α δ`, and `z = z₀ + c G` with the Gram matrix G of the blocks
`G_jk = W_j diag(scale_j / scale_k) W_kᵀ` (for one head `W Wᵀ`). So a step costs one product with G instead of two with
the W_k, and no autograd graph. It is exact, for any depth and activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..heads.value_head import ValueHead


@dataclass(frozen=True)
class Part:
    """One head's tensors as the ascent and the advantage edit need them. A linear V is a layer without activation."""

    mean: torch.Tensor
    scale: torch.Tensor
    # The activation's name, for V's derivative, and itself, for g.
    name: str
    activation: nn.Module
    # (weight, bias) of each hidden layer of V, and of the layer from the last activation to the objectives.
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    out: tuple[torch.Tensor, torch.Tensor]
    # The gradient of the summed objectives at the last activation.
    out_sum: torch.Tensor
    # Of a linear V: eigenvalues and eigenvectors of W Wᵀ.
    eigen: tuple[torch.Tensor, torch.Tensor] | None
    # (weight, bias) of each layer of g, where there is one.
    advantage: list[tuple[torch.Tensor, torch.Tensor]] | None

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
        return len(self.layers) == 1 and self.name == "relu"

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """x of `(rows, hidden_size)` states."""
        return (hidden - self.mean) / self.scale


@dataclass(frozen=True)
class Plan:
    """The tensors of the heads that act together, in one dtype on one device."""

    parts: list[Part]
    # Over the first layers' units of all parts, one after another.
    gram: torch.Tensor | None

    @property
    def can_flip(self) -> bool:
        """Whether V's gradient is piecewise constant in the first layers' units, see [`_ascend_by_flips`]."""
        return all(part.is_one_relu or part.is_linear for part in self.parts)

    @property
    def widths(self) -> list[int]:
        """Units of each part's first layer."""
        return [part.width for part in self.parts]


def build_plan(heads: Sequence[ValueHead], device: torch.device, dtype: torch.dtype, with_gram: bool = True) -> Plan:
    """The plan for heads that act together. The Gram matrix is left out where it would cost more than it saves."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device=device, dtype=dtype)

    def pairs(layers) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(convert(layer.weight), convert(layer.bias)) for layer in layers]

    parts = []
    for head in heads:
        *layers, out = pairs(head.value_mlp.layers)
        name, eigen = head.config.activation, None
        if not layers:
            # Not every device knows float64 and eigenvectors.
            weight = head.value_mlp.layers[-1].weight.detach().double().cpu()
            eigen = tuple(map(convert, torch.linalg.eigh(weight @ weight.T)))
            layers, name = [out], "identity"
            out = (torch.eye(len(out[1]), device=device, dtype=dtype), torch.zeros_like(out[1]))
        g = head.advantage_mlp
        parts.append(
            Part(
                mean=convert(head.state_mean),
                scale=convert(head.state_scale),
                name=name,
                activation=head.value_mlp.activation,
                layers=layers,
                out=out,
                out_sum=out[0].sum(0),
                eigen=eigen,
                advantage=None if g is None else pairs(g.layers),
            )
        )
    plan = Plan(parts, None)
    # Beyond twice the state's width two products with the W_k are cheaper than one with G; where a few of its rows are
    # enough, it is its memory that counts.
    widest = 4 if plan.can_flip and device.type == "cpu" else 2
    if with_gram and sum(plan.widths) <= widest * parts[0].mean.shape[0]:
        plan = Plan(parts, _gram(parts))
    return plan


def _gram(parts: Sequence[Part]) -> torch.Tensor:
    def block(a: Part, b: Part) -> torch.Tensor:
        weight = a.layers[0][0] if a is b else a.layers[0][0] * (a.scale / b.scale)
        return weight @ b.layers[0][0].T

    return torch.cat([torch.cat([block(a, b) for b in parts], dim=1) for a in parts])


def _derivative(activation: str, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and derivative of an activation. The ReLU's derivative at 0 is 0, as in autograd."""
    if activation == "relu":
        return z.relu(), (z > 0).to(z.dtype)
    if activation == "tanh":
        value = z.tanh()
        return value, 1 - value * value
    if activation == "silu":
        gate = z.sigmoid()
        return z * gate, gate * (1 + z * (1 - gate))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return z * cdf, cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    if activation == "identity":
        return z, torch.ones_like(z)
    raise ValueError(f"No derivative is known of the activation {activation!r}.")


def _first_layer_gradient(part: Part, z: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """δ/ω at the first pre-activation, `(rows, width)`: a forward and a backward by hand."""
    slopes = []
    for weight, bias in part.layers[1:]:
        value, slope = _derivative(part.name, z)
        slopes.append(slope)
        z = torch.addmm(bias, value, weight.T)
    value, slope = _derivative(part.name, z)
    if target is None:
        gradient = part.out_sum * slope
    else:
        weight, bias = part.out
        gradient = ((target - torch.addmm(bias, value, weight.T)) @ weight) * slope
    for (weight, _), slope in zip(reversed(part.layers[1:]), reversed(slopes), strict=True):
        gradient = (gradient @ weight) * slope
    return gradient


def _gradient(plan: Plan, weights: Sequence, z: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """δ of all parts, `(rows, units of all first layers)`."""
    deltas = [
        weight * _first_layer_gradient(part, part_z, target)
        for part, weight, part_z in zip(plan.parts, weights, z.split(plan.widths, dim=1), strict=True)
    ]
    return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)


def _slopes(plan: Plan, weights: Sequence) -> torch.Tensor:
    """ω times the gradient at the last activations of all parts, `(units,)`, or `(rows, units)` for weights by row."""
    return torch.cat([weight * part.out_sum for part, weight in zip(plan.parts, weights, strict=True)], dim=-1)


def _combine(plan: Plan, coefficients: torch.Tensor) -> torch.Tensor:
    """u of `(rows, units)` coefficients: Σ_k scale_k ⊙ W_kᵀ c_k."""
    return sum(
        part.scale * (c @ part.layers[0][0])
        for part, c in zip(plan.parts, coefficients.split(plan.widths, dim=1), strict=True)
    )


def _first_layer(plan: Plan, moves: torch.Tensor) -> torch.Tensor:
    """What moves of the state, `(rows, hidden_size)`, do to the first pre-activations."""
    return torch.cat([(moves / part.scale) @ part.layers[0][0].T for part in plan.parts], dim=1)


def ascend(
    plan: Plan,
    hidden: torch.Tensor,
    weights: Sequence,
    alpha,
    decay,
    num_steps: int,
    target: torch.Tensor | None = None,
    eager: bool = True,
) -> torch.Tensor:
    """
    u after `num_steps` steps from `(rows, hidden_size)` states.

    Args:
        plan ([`Plan`]):
            Of the heads.
        weights (sequence of `float` or `torch.Tensor` of shape `(rows, 1)`):
            ω of each head; all of one kind.
        alpha, decay (`float` or `torch.Tensor` of shape `(rows, 1)`):
            α, and `1 - 2αλ`.
        target (`torch.Tensor` of shape `(num_objectives,)`, *optional*):
            Standardised values to approach: the objective is then `-½‖V - target‖²` instead of the sum of V.
        eager (`bool`, *optional*, defaults to `True`):
            Whether steps may depend on the data, which traced code cannot do.
    """
    parts = plan.parts
    z = torch.cat([torch.addmm(part.layers[0][1], part.scaled(hidden), part.layers[0][0].T) for part in parts], dim=1)
    if all(part.is_linear for part in parts) and (target is None or len(parts) == 1):
        coefficients = _ascend_linear(plan, weights, z, alpha, decay, num_steps, target)
    # Finding the flips makes the host wait for the device at each step: a gain on a CPU only.
    elif (
        eager
        and target is None
        and plan.gram is not None
        and plan.can_flip
        and hidden.device.type == "cpu"
        and len(hidden) > 0
    ):
        coefficients = _ascend_by_flips(plan, weights, z, alpha, decay, num_steps)
    else:
        coefficients = _ascend(plan, weights, z, alpha, decay, num_steps, target)
    return _combine(plan, coefficients)


def _ascend_linear(plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int, target) -> torch.Tensor:
    """
    [`_ascend`] in closed form for linear values: their gradient is the same everywhere; towards a target,
    `c = α ω Σ_i ((1 - 2αλ) I - α ω G)^i (target - V)`, by the eigenvectors of G.
    """
    if target is None:
        total = alpha * sum(decay**i for i in range(num_steps))
        return (total * _slopes(plan, weights)).expand_as(z)
    (part,), (weight,) = plan.parts, weights
    values, vectors = part.eigen
    # Σ_i (1 - q)^i = (1 - (1 - q)^n) / q, without cancellation where q is small.
    q = (1 - decay) + alpha * weight * values.expand_as(z)
    powers = torch.where(q < 1, -torch.expm1(num_steps * torch.log1p(-q)), 1 - (1 - q) ** num_steps)
    series = torch.where(q == 0, float(num_steps), powers / q)
    return ((alpha * weight * (target - z)) @ vectors * series) @ vectors.T


def _ascend(plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int, target) -> torch.Tensor:
    """The coefficients c after `num_steps` dense steps from `z`, both `(rows, units)`."""
    coefficients = torch.zeros_like(z)
    start, moved = z, torch.zeros_like(z)
    for step in range(num_steps):
        delta = _gradient(plan, weights, z, target)
        coefficients = decay * coefficients + alpha * delta
        if step < num_steps - 1:
            change = delta @ plan.gram if plan.gram is not None else _first_layer(plan, _combine(plan, delta))
            moved = decay * moved + alpha * change
            z = start + moved
    return coefficients


def _ascend_by_flips(plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int) -> torch.Tensor:
    """
    [`_ascend`] for one hidden ReLU layer. There δ = w₂ ⊙ 1[z > 0] changes only where a unit's sign flips, so `G δ` is
    kept up to date from those rows of G alone, and where no unit flips the steps go on in a straight line and are
    taken at once. Which units flip is data, so this is for eager mode. The units of a linear V never flip.
    """
    if any(part.is_linear for part in plan.parts):
        blocks = zip(plan.parts, z.split(plan.widths, dim=1), strict=True)
        z = torch.cat([x.new_full(x.shape, torch.inf) if part.is_linear else x for part, x in blocks], dim=1)
    weight, gram = _slopes(plan, weights), plan.gram
    penalised = isinstance(decay, torch.Tensor) or decay != 1.0

    def step(total: torch.Tensor, direction: torch.Tensor, times: int = 1) -> torch.Tensor:
        if penalised:
            total = total.mul_(decay)
        if isinstance(alpha, torch.Tensor):
            return total.addcmul_(alpha, direction, value=times)
        return total.add_(direction, alpha=alpha * times)

    start, moved = z, torch.zeros_like(z)
    coefficients = torch.zeros_like(z)
    delta = (z > 0) * weight
    change = delta @ gram
    remaining, without_looking = num_steps, 0
    while remaining > 0:
        coefficients = step(coefficients, delta)
        remaining -= 1
        if remaining == 0:
            break
        moved = step(moved, change)
        z = start + moved
        before, delta = delta, (z > 0) * weight
        if without_looking > 0:
            without_looking -= 1
            change = delta @ gram
            continue
        difference = delta - before
        units = (difference if len(difference) == 1 else difference.any(0)[None]).nonzero()[:, 1]
        if 4 * len(units) > len(gram):
            # So many rarely become few at once, and looking costs as much as a small product.
            without_looking = 8
            change = delta @ gram
        elif len(units) > 0:
            change = torch.addmm(change, difference[:, units], gram[units])
        elif not penalised:  # a penalty bends the path; without a product with G its steps are cheap enough
            # How many more steps can be taken before a unit flips? One short of it: rounding must not step over.
            velocity = alpha * change
            crossing = torch.where(((z > 0) != (velocity > 0)) & (velocity != 0), -z / velocity, torch.inf)
            free = float(crossing.nan_to_num_(torch.inf).min()) - 1
            jump = remaining if free >= remaining else int(free)
            if jump > 0:
                coefficients = step(coefficients, delta, jump)
                moved = step(moved, change, jump)
                remaining -= jump
    return coefficients


def advantage_edit(plan: Plan, hidden: torch.Tensor, weights: Sequence, alpha) -> torch.Tensor:
    """u = α Σ_k ω_k g_k(h) of `(rows, hidden_size)` states; `weights` and `alpha` as for [`ascend`]."""
    edit = torch.zeros_like(hidden)
    for part, omega in zip(plan.parts, weights, strict=True):
        *layers, (weight, bias) = part.advantage
        x = part.scaled(hidden)
        for w, b in layers:
            x = part.activation(torch.addmm(b, x, w.T))
        edit = edit + omega * torch.addmm(bias, x, weight.T)
    return alpha * edit
