"""
From a hidden state `h` to the edited state `h + u`: gradient ascent on V, or the advantage edit.

Notation: `x = (h - state_mean) / state_scale` is the scaled state, `z = W₁ x + b₁` the first pre-activation,
`δ = ∂V/∂z` and `d` the edit in scaled coordinates, so `∇ₓV = W₁ᵀ δ` and `u = state_scale * d`. The ascent never leaves
the row space of W₁: `d = W₁ᵀ c` with `c ← (1 - 2αλ) c + α δ`, and `z = z₀ + G c` with the Gram matrix `G = W₁ W₁ᵀ`.
So a step costs one product with G instead of two with W₁, and no autograd graph. It is exact, for any depth and
activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .configuration import ControlConfig
from .value_head import ValueHead

# Rows edited at once: bounds the memory of a long teacher-forced forward to a few arrays of this many rows.
_MAX_ROWS = 4096


@dataclass(frozen=True)
class _Plan:
    """The head's tensors as the ascent and the advantage edit need them, in one dtype on one device."""

    mean: torch.Tensor
    scale: torch.Tensor
    # (weight, bias) of each hidden layer of V, and the gradient of the summed objectives at its last activation.
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    out: torch.Tensor
    gram: torch.Tensor | None
    # (weight, bias) of each layer of g, where there is one.
    advantage: list[tuple[torch.Tensor, torch.Tensor]] | None


def _build_plan(head: ValueHead, device: torch.device, dtype: torch.dtype, with_gram: bool = True) -> _Plan:
    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device=device, dtype=dtype)

    *hidden, last = head.value_mlp.layers
    layers = [(convert(layer.weight), convert(layer.bias)) for layer in hidden]
    # Beyond twice the state's width two products with W₁ are cheaper than one with G.
    with_gram = with_gram and bool(layers) and layers[0][0].shape[0] <= 2 * layers[0][0].shape[1]
    advantage = head.advantage_mlp
    return _Plan(
        mean=convert(head.state_mean),
        scale=convert(head.state_scale),
        layers=layers,
        out=convert(last.weight).sum(0),
        gram=layers[0][0] @ layers[0][0].T if with_gram else None,
        advantage=None if advantage is None else [(convert(x.weight), convert(x.bias)) for x in advantage.layers],
    )


class _Snapshot:
    """What a head's tensors were, to notice that they have changed."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.identities = [self._identity(tensor) for tensor in tensors]
        # Fused optimizers do not count the version up, but they change the biases.
        self.vectors = [tensor.detach().clone() for tensor in tensors if tensor.ndim == 1]

    @staticmethod
    def _identity(tensor: torch.Tensor) -> tuple[int, int]:
        # A change in place gives another version, a replaced tensor has another address.
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    def matches(self, tensors: list[torch.Tensor]) -> bool:
        return self.identities == [self._identity(tensor) for tensor in tensors] and all(
            map(torch.equal, self.vectors, (tensor for tensor in tensors if tensor.ndim == 1))
        )


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
    raise ValueError(f"No derivative is known of the activation {activation!r}.")


def _first_layer_gradient(plan: _Plan, activation: str, z: torch.Tensor) -> torch.Tensor:
    """δ = ∂V/∂z at the first pre-activation, shape `(rows, width)`: a forward and a backward by hand."""
    slopes = []
    for weight, bias in plan.layers[1:]:
        value, slope = _derivative(activation, z)
        slopes.append(slope)
        z = torch.addmm(bias, value, weight.T)
    delta = _derivative(activation, z)[1] * plan.out
    for (weight, _), slope in zip(reversed(plan.layers[1:]), reversed(slopes), strict=True):
        delta = (delta @ weight) * slope
    return delta


def _ascend(plan: _Plan, activation: str, z: torch.Tensor, alpha, decay, num_steps: int) -> torch.Tensor:
    """The coefficients c after `num_steps` dense steps from `z`, both `(rows, width)`."""
    coefficients = torch.zeros_like(z)
    start, moved = z, torch.zeros_like(z)
    for step in range(num_steps):
        delta = _first_layer_gradient(plan, activation, z)
        coefficients = decay * coefficients + alpha * delta
        if step < num_steps - 1:
            if plan.gram is not None:
                change = delta @ plan.gram
            else:
                weight = plan.layers[0][0]
                change = (delta @ weight) @ weight.T
            moved = decay * moved + alpha * change
            z = start + moved
    return coefficients


def _ascend_by_flips(plan: _Plan, z: torch.Tensor, alpha, decay, num_steps: int) -> torch.Tensor:
    """
    [`_ascend`] for one hidden ReLU layer. There δ = w₂ ⊙ 1[z > 0] changes only where a unit's sign flips, so `G δ` is
    kept up to date from those rows of G alone, and where no unit flips the steps go on in a straight line and are
    taken at once. Which units flip is data, so this is for eager mode.
    """
    weight, gram = plan.out, plan.gram
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
        if 4 * len(units) > len(weight):
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


def _ascend_by_autograd(head: nn.Module, hidden: torch.Tensor, scale, alpha, decay, num_steps: int) -> torch.Tensor:
    """The edit d for any module that maps states to values; `hidden` and the result are `(rows, hidden_size)`."""
    # generate() may run under inference_mode, whose tensors cannot be saved for a backward.
    with torch.inference_mode(False), torch.enable_grad():
        hidden, scale = hidden.clone(), scale.clone()
        edit = torch.zeros_like(hidden)
        for _ in range(num_steps):
            leaf = edit.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(head(hidden + scale * leaf).sum(), leaf)
            edit = decay * edit + alpha * gradient
    return edit.detach()


class Controller:
    """
    Applies a head to states: owns the head and its prepared tensors, knows nothing of the model.

    Args:
        head ([`ValueHead`] or `nn.Module`):
            V. A module that is no plain [`ValueHead`] must map `(rows, hidden_size)` to `(rows, num_objectives)`; it
            is climbed by autograd.
    """

    def __init__(self, head: nn.Module):
        self.head = head
        # One plan for each device and compute dtype, with what the head was when it was made.
        self._plans: dict[tuple[torch.device, torch.dtype], tuple[_Snapshot, _Plan]] = {}
        # The plan used last: traced code can neither build nor look one up.
        self._last_plan: _Plan | None = None

    def __getstate__(self):
        return {"head": self.head}

    def __setstate__(self, state):
        self.__init__(state["head"])

    @property
    def is_plain(self) -> bool:
        """Whether the head is a [`ValueHead`] whose methods are the ones that the fast forms restate."""
        kind = type(self.head)
        return isinstance(self.head, ValueHead) and all(
            getattr(kind, name) is getattr(ValueHead, name) for name in ("forward", "scaled", "advantage")
        )

    def edit(
        self,
        hidden: torch.Tensor,
        control: ControlConfig,
        step_size: float | torch.Tensor,
        check_states: bool = False,
        prepared: bool = False,
    ) -> torch.Tensor:
        """
        The edited states `h + u`, in the dtype of `hidden`. u is computed in float32 (float64 for float64 states; in
        its own dtype by a head that is no plain [`ValueHead`], which is moved to the states' device).

        Args:
            hidden (`torch.Tensor` of shape `(..., hidden_size)`):
                The states. Gradients pass through `h + u` as through `h`: the edit is a constant.
            control ([`ControlConfig`]):
                What to do; its `step_size` is not read.
            step_size (`float` or `torch.Tensor` that broadcasts to `hidden.shape[:-1] + (1,)`):
                α of each state.
            check_states (`bool`, *optional*, defaults to `False`):
                Whether states that are not finite to begin with are an error too. Without it they stay as they are: a
                base may give NaN at padded positions that nothing reads.
            prepared (`bool`, *optional*, defaults to `False`):
                Whether [`Controller.refresh`] was called since the head last changed. Only compiled code asks: it can
                then use the Gram matrix, and reads the head's own weights otherwise.

        Raises:
            `FloatingPointError`: if an edited state is not finite. Compiled code cannot raise: it clamps the edited
            state to the range of its dtype.
        """
        states = hidden.detach()
        rows = states.reshape(-1, states.shape[-1])
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        if isinstance(step_size, torch.Tensor):
            # The dtype first: not every device knows float64.
            step_size = step_size.to(dtype).to(rows.device).expand(*states.shape[:-1], 1).reshape(-1, 1)
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            parts = (rows,) if compiling else rows.split(_MAX_ROWS)
            steps = step_size.split(len(parts[0])) if isinstance(step_size, torch.Tensor) else [step_size] * len(parts)
            edits = [
                self._edit_rows(part.to(dtype), control, step, prepared)
                for part, step in zip(parts, steps, strict=True)
            ]
            edit = edits[0] if len(edits) == 1 else torch.cat(edits)
            if compiling:
                edit = torch.nan_to_num(edit)
        edited = hidden.to(dtype) + edit.view(states.shape)
        if compiling:
            limit = torch.finfo(states.dtype).max
            edited = edited.clamp(-limit, limit).to(states.dtype)
            return torch.where(torch.isfinite(states).all(-1, keepdim=True), edited, hidden)
        edited = edited.to(states.dtype)
        if torch.isfinite(edited).all():
            return edited
        usable = torch.isfinite(states).all(-1, keepdim=True)
        if not torch.isfinite(edited[usable.squeeze(-1)]).all():
            raise FloatingPointError(
                f"The {control.method} edit left the range of {states.dtype}: `step_size` "
                f"{control.largest_step_size:g} is too large for this head."
            )
        if check_states:
            raise FloatingPointError(
                f"The base model's hidden states hold NaN or infinite values ({states.dtype}), so there is nothing to "
                "control. Load it in another dtype (bfloat16 has a wider range than float16)."
            )
        return torch.where(usable, edited, hidden)

    def _edit_rows(self, rows: torch.Tensor, control: ControlConfig, alpha, prepared: bool) -> torch.Tensor:
        """u for `(rows, hidden_size)` states in the compute dtype, with `alpha` a number or `(rows, 1)`."""
        decay = 1.0 - 2.0 * control.l2 * alpha if control.l2 else 1.0
        if not self.is_plain:
            return self._edit_rows_by_module(rows, control, alpha, decay)
        plan = self._traced_plan(rows, prepared) if torch.compiler.is_compiling() else self._plan(rows)
        activation = self.head.config.activation
        x = (rows - plan.mean) / plan.scale
        if control.method == "advantage":
            *hidden, (weight, bias) = plan.advantage
            for w, b in hidden:
                x = self.head.advantage_mlp.activation(torch.addmm(b, x, w.T))
            return alpha * torch.addmm(bias, x, weight.T)
        if not plan.layers:
            # A linear V has the same gradient everywhere.
            return plan.scale * alpha * sum(decay**k for k in range(control.num_steps)) * plan.out.expand_as(rows)
        weight, bias = plan.layers[0]
        z = torch.addmm(bias, x, weight.T)
        one_relu = len(plan.layers) == 1 and activation == "relu"
        # Finding the flips makes the host wait for the device at each step: a gain on a CPU only.
        by_flips = one_relu and plan.gram is not None and rows.device.type == "cpu" and len(rows) > 0
        if by_flips and not torch.compiler.is_compiling():
            coefficients = _ascend_by_flips(plan, z, alpha, decay, control.num_steps)
        else:
            coefficients = _ascend(plan, activation, z, alpha, decay, control.num_steps)
        return plan.scale * (coefficients @ weight)

    def _edit_rows_by_module(self, rows: torch.Tensor, control: ControlConfig, alpha, decay) -> torch.Tensor:
        parameter = next(self.head.parameters(), rows)
        if parameter.device != rows.device:
            self.head.to(rows.device)
        inputs = rows.to(parameter.dtype)
        if control.method == "advantage":
            return alpha * self.head.advantage(inputs).to(rows.dtype)
        scale = getattr(self.head, "state_scale", torch.ones(1)).to(rows.device, parameter.dtype)
        edit = _ascend_by_autograd(self.head, inputs, scale, alpha, decay, control.num_steps)
        return (scale * edit).to(rows.dtype)

    def _plan(self, rows: torch.Tensor) -> _Plan:
        """The plan for such rows, built on first use and again if the head has changed since."""
        slot = (rows.device, rows.dtype)
        tensors = list(self.head.state_dict().values())
        known = self._plans.get(slot)
        if known is None or not known[0].matches(tensors):
            with torch.inference_mode(False):
                known = self._plans[slot] = (_Snapshot(tensors), _build_plan(self.head, *slot))
        self._last_plan = known[1]
        return known[1]

    def refresh(self) -> None:
        """Renew the plan used last if the head has changed since. Called before code that may be compiled."""
        if self._last_plan is not None and self.is_plain:
            self._plan(self._last_plan.mean)

    def _traced_plan(self, rows: torch.Tensor, prepared: bool) -> _Plan:
        if torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                "A strict export does not take the weights of a head, which is no submodule of the model: call "
                "`torch.export.export(..., strict=False)`, its default."
            )
        plan = self._last_plan
        if not prepared or plan is None or plan.mean.device != rows.device or plan.mean.dtype != rows.dtype:
            return _build_plan(self.head, rows.device, rows.dtype, with_gram=False)
        return plan
