"""
Gradient ascent on V (RE-Control) without autograd, for one head or a weighted sum of several.

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
from functools import partial

import torch
from torch import nn

from ..configuration import ControlConfig
from ..heads.value_head import ValueHead
from .method import ControlMethod
from .plan import WIDEST, HeadTensors, Plan
from .products import MANY_FLIPS, Active, Followed, Product, layer_products, of_few

# Steps taken without looking then: so many flips rarely become few at once, and looking costs as much as a small
# product.
_STEPS_WITHOUT_LOOKING = 8
# Fewer steps do not pay for putting rows together.
_FEW_STEPS = 8
# Steps run away from a target if they end more than so many times as far from it and so much, in standardised values.
# A step or two too far is no harm.
_FURTHER, _NEAR = 2, 1


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


def _first_layer_gradient(
    head: HeadTensors, z: torch.Tensor, target: torch.Tensor | None, products: Sequence[tuple[Product, Product]]
) -> torch.Tensor:
    """δ/ω at the first pre-activation, `(rows, width)`: a forward and a backward by hand."""
    slopes = []
    for (_, bias), (forward, _) in zip(head.layers[1:], products, strict=True):
        value, slope = _derivative(head.activation_name, z)
        slopes.append(slope)
        z = bias + forward(value)
    value, slope = _derivative(head.activation_name, z)
    if target is None:
        gradient = head.out_sum * slope
    else:
        weight, bias = head.out
        gradient = ((target - torch.addmm(bias, value, weight.T)) @ weight) * slope
    for (_, backward), slope in zip(reversed(products), reversed(slopes), strict=True):
        gradient = backward(gradient) * slope
    return gradient


def _gradient(
    plan: Plan, weights: Sequence, z: torch.Tensor, target: torch.Tensor | None, products: Sequence[list]
) -> torch.Tensor:
    """δ of all heads, `(rows, units of all first layers)`; `products` is of each head's further layers."""
    deltas = [
        weight * _first_layer_gradient(head, head_z, target, own)
        for head, weight, head_z, own in zip(plan.heads, weights, z.split(plan.widths, dim=1), products, strict=True)
    ]
    return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)


def _slopes(plan: Plan, weights: Sequence) -> torch.Tensor:
    """ω times the gradient at the last activations of all heads, `(units,)`, or `(rows, units)` for weights by row."""
    return torch.cat([weight * head.out_sum for head, weight in zip(plan.heads, weights, strict=True)], dim=-1)


def _combine(plan: Plan, coefficients: torch.Tensor) -> torch.Tensor:
    """u of `(rows, units)` coefficients: Σ_k scale_k ⊙ W_kᵀ c_k."""
    return sum(
        head.scale * (c @ head.layers[0][0])
        for head, c in zip(plan.heads, coefficients.split(plan.widths, dim=1), strict=True)
    )


def _first_layer(plan: Plan, moves: torch.Tensor) -> torch.Tensor:
    """What moves of the state, `(rows, hidden_size)`, do to the first pre-activations."""
    return torch.cat([(moves / head.scale) @ head.layers[0][0].T for head in plan.heads], dim=1)


def _reads_gram(plan: Plan) -> bool:
    """Whether a whole product with G reads less than two with the W_k."""
    return plan.gram is not None and sum(plan.widths) <= WIDEST * plan.heads[0].mean.shape[0]


def _moves(plan: Plan, delta: torch.Tensor) -> torch.Tensor:
    """`delta @ G`: by G, or by the W_k where they are less to read."""
    if _reads_gram(plan):
        return delta @ plan.gram
    return _first_layer(plan, _combine(plan, delta))


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
    heads = plan.heads
    # Finding the flips makes the host wait for the device at each step: a gain on a CPU only.
    follows = eager and hidden.device.type == "cpu" and len(hidden) > 0
    z = torch.cat([torch.addmm(head.layers[0][1], head.scaled(hidden), head.layers[0][0].T) for head in heads], dim=1)
    if all(head.is_linear for head in heads) and (target is None or len(heads) == 1):
        coefficients = _ascend_linear(plan, weights, z, alpha, decay, num_steps, target)
    elif follows and plan.gram is not None and plan.can_flip:
        if target is None:
            coefficients = _ascend_by_flips(plan, weights, z, alpha, decay, num_steps)
        else:
            coefficients = _approach_by_flips(plan, weights, z, alpha, decay, num_steps, target)
    else:
        coefficients = _ascend(plan, weights, z, alpha, decay, num_steps, target, follows)
    return _combine(plan, coefficients)


def _ascend_linear(plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int, target) -> torch.Tensor:
    """
    [`_ascend`] in closed form for linear values: their gradient is the same everywhere; towards a target,
    `c = α ω Σ_i ((1 - 2αλ) I - α ω G)^i (target - V)`, by the eigenvectors of G.
    """
    if target is None:
        total = alpha * sum(decay**i for i in range(num_steps))
        return (total * _slopes(plan, weights)).expand_as(z)
    (head,), (weight,) = plan.heads, weights
    values, vectors = head.eigen
    # Σ_i (1 - q)^i = (1 - (1 - q)^n) / q, without cancellation where q is small.
    q = (1 - decay) + alpha * weight * values.expand_as(z)
    powers = torch.where(q < 1, -torch.expm1(num_steps * torch.log1p(-q)), 1 - (1 - q) ** num_steps)
    series = torch.where(q == 0, float(num_steps), powers / q)
    return ((alpha * weight * (target - z)) @ vectors * series) @ vectors.T


def _ascend(
    plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int, target, follows: bool = False
) -> torch.Tensor:
    """
    The coefficients c after `num_steps` dense steps from `z`, both `(rows, units)`. Where it `follows`, steps may
    depend on the data.
    """
    coefficients = torch.zeros_like(z)
    alone = follows and len(z) == 1 and num_steps > _FEW_STEPS
    products = [layer_products(head, target, follows, alone) for head in plan.heads]
    moves: Product = partial(_moves, plan)
    if alone and _reads_gram(plan) and all(head.activation_name == "relu" for head in plan.heads):
        moves = Active(plan.gram)
    start, moved = z, torch.zeros_like(z)
    for step in range(num_steps):
        delta = _gradient(plan, weights, z, target, products)
        coefficients = decay * coefficients + alpha * delta
        if step < num_steps - 1:
            moved = decay * moved + alpha * moves(delta)
            z = start + moved
    return coefficients


def _ascend_by_flips(plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int) -> torch.Tensor:
    """
    [`_ascend`] for one hidden ReLU layer. There δ = w₂ ⊙ 1[z > 0] changes only where a unit's sign flips, so `G δ` is
    kept up to date from those rows of G alone, and where no unit flips the steps go on in a straight line and are
    taken at once. Which units flip is data, so this is for eager mode. The units of a linear V never flip.
    """
    if any(head.is_linear for head in plan.heads):
        blocks = zip(plan.heads, z.split(plan.widths, dim=1), strict=True)
        z = torch.cat([x.new_full(x.shape, torch.inf) if head.is_linear else x for head, x in blocks], dim=1)
    weight, gram = _slopes(plan, weights), plan.gram
    penalised = isinstance(decay, torch.Tensor) or decay != 1.0
    limit = torch.finfo(z.dtype).max

    def step(total: torch.Tensor, direction: torch.Tensor, times: int = 1) -> torch.Tensor:
        if penalised:
            total = total.mul_(decay)
        if isinstance(alpha, torch.Tensor):
            return total.addcmul_(alpha, direction, value=times)
        length = alpha * times
        # A factor that its dtype does not hold is an error there; what it leads to is told of the edited states.
        return total.add_(direction, alpha=length if abs(length) <= limit else math.inf)

    start, moved = z, torch.zeros_like(z)
    coefficients = torch.zeros_like(z)
    delta = (z > 0) * weight
    change = _moves(plan, delta)
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
            change = _moves(plan, delta)
            continue
        difference = delta - before
        rows, units = difference.nonzero(as_tuple=True)
        if len(units) > MANY_FLIPS * difference.numel():
            without_looking = _STEPS_WITHOUT_LOOKING
            change = _moves(plan, delta)
        elif len(units) > 0:
            change += of_few(gram, difference, rows, units)
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


def _approach_by_flips(
    plan: Plan, weights, z: torch.Tensor, alpha, decay, num_steps: int, target: torch.Tensor
) -> torch.Tensor:
    """
    [`_ascend`] of one hidden ReLU layer towards a target. There `δ = ω Σ_j (target_j - V_j) w_j ⊙ 1[z > 0]` for the
    objectives j: the gaps change at each step, the products of `w_j ⊙ 1[z > 0]` with G where a unit's sign flips.
    """
    (head,), (omega,) = plan.heads, weights
    weight, bias = head.out
    start, moved, coefficients = z, torch.zeros_like(z), torch.zeros_like(z)
    followed = Followed(plan.gram)
    for step in range(num_steps):
        basis = (z > 0)[:, None] * weight
        gaps = (alpha * omega * (target - torch.addmm(bias, z.relu(), weight.T)))[:, None]
        coefficients = decay * coefficients + (gaps @ basis)[:, 0]
        if step < num_steps - 1:
            moved = decay * moved + (gaps @ followed(basis.flatten(0, 1)).view(basis.shape))[:, 0]
            z = start + moved
    return coefficients


def _target_values(head: nn.Module, control: ControlConfig, like: torch.Tensor) -> torch.Tensor | None:
    """The target in standardised values, `(num_objectives,)`, or `None`."""
    if control.target is None:
        return None
    target, mean, std = (
        like.new_tensor(value) for value in (control.target, head.config.reward_mean, head.config.reward_std)
    )
    return ((target - mean) / std).expand(head.config.num_objectives)


def _ascend_by_autograd(
    heads: Sequence[nn.Module], hidden: torch.Tensor, weights: Sequence, alpha, decay, control: ControlConfig
) -> torch.Tensor:
    """[`ascend`] for any modules that map states to values; `hidden` and the result are `(rows, hidden_size)`."""
    # generate() may run under inference_mode, whose tensors cannot be saved for a backward.
    with torch.inference_mode(False), torch.enable_grad():
        hidden = hidden.clone()
        edit = torch.zeros_like(hidden)
        for _ in range(control.num_steps):
            direction = torch.zeros_like(hidden)
            for head, weight in zip(heads, weights, strict=True):
                parameter = next(head.parameters(), hidden)
                scale = getattr(head, "state_scale", torch.ones(1)).detach().clone().to(hidden)
                leaf = torch.zeros_like(hidden).requires_grad_(True)
                values = head((hidden + edit + scale * leaf).to(parameter.dtype))
                target = _target_values(head, control, values)
                total = values.sum() if target is None else -0.5 * (values - target).square().sum()
                (gradient,) = torch.autograd.grad(total, leaf)
                direction = direction + weight * scale * gradient
            edit = decay * edit + alpha * direction
    return edit.detach()


def _check_nearer(head: nn.Module, control: ControlConfig, rows: torch.Tensor, edit: torch.Tensor) -> None:
    parameter = next(head.parameters(), rows)
    before, after = (head(x.to(parameter.device, parameter.dtype)) for x in (rows, rows + edit))
    target = _target_values(head, control, before)
    before, after = (torch.linalg.vector_norm(values - target, dim=-1) for values in (before, after))
    if (after > _FURTHER * before + _NEAR).any():
        raise FloatingPointError(
            f"The steps overshoot the target further each time: `step_size` {control.largest_step_size:g} is too "
            "large for this head."
        )


class Ascent(ControlMethod):
    """`num_steps` steps up V, or towards its target."""

    part = "the last layer of its value part"
    needs_gram = True

    def is_idle(self, head: ValueHead) -> bool:
        """Whether V is constant. The bias of its last layer moves no state."""
        return not head.value_mlp.layers[-1].weight.any()

    def edit(self, heads, rows, weights, alpha, control, plan, eager) -> torch.Tensor:
        """By [`ascend`]; of any modules by autograd."""
        decay = _decay(control, alpha)
        if plan is None:
            edit = _ascend_by_autograd(heads, rows, weights, alpha, decay, control)
        else:
            target = _target_values(heads[0], control, rows)
            edit = ascend(plan, rows, weights, alpha, decay, control.num_steps, target, eager=eager)
        if control.target is not None and eager:
            _check_nearer(heads[0], control, rows, edit)
        return edit


def _decay(control: ControlConfig, alpha: float | torch.Tensor) -> float | torch.Tensor:
    return 1.0 - 2.0 * control.l2 * alpha if control.l2 else 1.0
