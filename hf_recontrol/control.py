"""Applies heads to states: which form of the edit, in which dtype, with what guards. Knows nothing of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .ascent import Plan, advantage_edit, ascend, build_plan
from .configuration import ControlConfig
from .value_head import ValueHead

# Rows edited at once: bounds the memory of a long teacher-forced forward to a few arrays of this many rows.
_MAX_ROWS = 4096
DEFAULT_NAME = "default"

# Of each head that acts, by name: its weight, a number or one value for each state, `hidden.shape[:-1] + (1,)`.
Weights = Mapping[str, "float | torch.Tensor"]


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


class Controller:
    """
    Applies heads to states: owns the heads and their prepared tensors, knows nothing of the model.

    Args:
        head ([`ValueHead`] or `nn.Module`):
            V. A module that is no plain [`ValueHead`] must map `(rows, hidden_size)` to `(rows, num_objectives)`; it
            is climbed by autograd.

    Attributes:
        heads (`dict[str, nn.Module]`):
            All heads by name, this one as `"default"`. All read states of one place.
    """

    def __init__(self, head: nn.Module):
        self.heads = {DEFAULT_NAME: head}
        # One plan for each device, dtype and set of heads, with what the heads were when it was made.
        self._plans: dict[tuple[torch.device, torch.dtype, tuple[str, ...]], tuple[_Snapshot, Plan]] = {}
        # The plan used last, and its heads: traced code can neither build nor look one up.
        self._last_plan: Plan | None = None
        self._last_names: tuple[str, ...] = ()

    def __getstate__(self):
        return {"heads": self.heads}

    def __setstate__(self, state):
        self.__init__(None)
        self.heads = dict(state["heads"])

    def remove(self, name: str) -> None:
        """Forget a head and what was prepared of it."""
        del self.heads[name]
        self._plans = {key: value for key, value in self._plans.items() if name not in key[2]}
        if name in self._last_names:
            self._last_plan, self._last_names = None, ()

    def _are_plain(self, names: Sequence[str]) -> bool:
        """Whether all are [`ValueHead`]s whose methods are the ones that the fast forms restate."""
        return all(
            isinstance(self.heads[name], ValueHead)
            and all(
                getattr(type(self.heads[name]), method) is getattr(ValueHead, method)
                for method in ("forward", "scaled", "advantage")
            )
            for name in names
        )

    def edit(
        self,
        hidden: torch.Tensor,
        control: ControlConfig,
        step_size: float | torch.Tensor,
        weights: Weights | None = None,
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
            weights (mapping of `str` to `float`, or to `torch.Tensor` as `step_size`, *optional*):
                The heads that act, by name, and the weight of each; all numbers or all tensors. Defaults to the only
                head, once.
            check_states (`bool`, *optional*, defaults to `False`):
                Whether states that are not finite to begin with are an error too. Without it they stay as they are: a
                base may give NaN at padded positions that nothing reads.
            prepared (`bool`, *optional*, defaults to `False`):
                Whether [`Controller.refresh`] was called since the heads last changed. Only compiled code asks: it can
                then use the Gram matrix, and reads the heads' own weights otherwise.

        Raises:
            `FloatingPointError`: if an edited state is not finite. Compiled code cannot raise: it clamps the edited
            state to the range of its dtype.
        """
        states = hidden.detach()
        rows = states.reshape(-1, states.shape[-1])
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32

        def by_row(value: float | torch.Tensor) -> float | torch.Tensor:
            if not isinstance(value, torch.Tensor):
                return value
            # The dtype first: not every device knows float64.
            return value.to(dtype).to(rows.device).expand(*states.shape[:-1], 1).reshape(-1, 1)

        weights = dict.fromkeys(self.heads, 1.0) if weights is None else weights
        names = tuple(weights)
        numbers = [by_row(step_size), *map(by_row, weights.values())]
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            parts = (rows,) if compiling else rows.split(_MAX_ROWS)
            columns = [x.split(len(parts[0])) if isinstance(x, torch.Tensor) else [x] * len(parts) for x in numbers]
            edits = [
                self._edit_rows(part.to(dtype), control, alpha, names, omegas, prepared)
                for part, alpha, *omegas in zip(parts, *columns, strict=True)
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

    def _edit_rows(
        self, rows: torch.Tensor, control: ControlConfig, alpha, names: tuple[str, ...], weights, prepared: bool
    ) -> torch.Tensor:
        """u for `(rows, hidden_size)` states in the compute dtype; `alpha` and `weights` as for [`ascend`]."""
        decay = 1.0 - 2.0 * control.l2 * alpha if control.l2 else 1.0
        if not self._are_plain(names):
            return self._edit_rows_by_modules(rows, control, alpha, decay, [self.heads[x] for x in names], weights)
        compiling = torch.compiler.is_compiling()
        plan = self._traced_plan(rows, names, prepared) if compiling else self._plan(names, rows.device, rows.dtype)
        if control.method == "advantage":
            return advantage_edit(plan, rows, weights, alpha)
        target = _target_values(self.heads[names[0]], control, rows)
        return ascend(plan, rows, weights, alpha, decay, control.num_steps, target, eager=not compiling)

    def _edit_rows_by_modules(self, rows: torch.Tensor, control: ControlConfig, alpha, decay, heads, weights):
        for head in heads:
            if next(head.parameters(), rows).device != rows.device:
                head.to(rows.device)
        if control.method != "advantage":
            return _ascend_by_autograd(heads, rows, weights, alpha, decay, control)
        return alpha * sum(
            weight * head.advantage(rows.to(next(head.parameters(), rows).dtype)).to(rows.dtype)
            for head, weight in zip(heads, weights, strict=True)
        )

    def _plan(self, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Plan:
        """The plan for these heads, built on first use and again if a head has changed since."""
        slot = (device, dtype, names)
        tensors = [tensor for name in names for tensor in self.heads[name].state_dict().values()]
        known = self._plans.get(slot)
        if known is None or not known[0].matches(tensors):
            with torch.inference_mode(False):
                plan = build_plan([self.heads[name] for name in names], device, dtype)
                known = self._plans[slot] = (_Snapshot(tensors), plan)
        self._last_plan, self._last_names = known[1], names
        return known[1]

    def refresh(self, names: tuple[str, ...]) -> None:
        """Renew what was prepared of heads if they have changed since. Called before code that may be compiled."""
        if names and self._last_plan is not None and self._are_plain(names):
            mean = self._last_plan.parts[0].mean
            self._plan(names, mean.device, mean.dtype)

    def _traced_plan(self, rows: torch.Tensor, names: tuple[str, ...], prepared: bool) -> Plan:
        if torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                "A strict export does not take the weights of a head, which is no submodule of the model: call "
                "`torch.export.export(..., strict=False)`, its default."
            )
        plan = self._last_plan
        usable = prepared and plan is not None and self._last_names == names
        if not usable or plan.parts[0].mean.device != rows.device or plan.parts[0].mean.dtype != rows.dtype:
            return build_plan([self.heads[name] for name in names], rows.device, rows.dtype, with_gram=False)
        return plan
