"""Applies heads to states: which form of the edit, in which dtype, with what guards. Knows nothing of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import nn

from ..configuration import ControlConfig
from ..heads.value_head import ValueHead, in_eval
from .advantage import Advantage
from .ascent import Ascent
from .method import ControlMethod, may_wait
from .plan import Plan, build_plan
from .static import Static
from .token_bias import token_bias_of, token_shift

# Rows edited at once: bounds the memory of a long teacher-forced forward to a few arrays of this many rows.
_MAX_ROWS = 4096
# Bytes of prepared tensors that are kept, the last used ones first: each mixture has a Gram matrix of its own.
_MAX_BYTES = 2**30
# Of a matrix so many rows and columns are looked at, to notice that it has changed.
_SAMPLED = 8
DEFAULT_NAME = "default"

METHODS: dict[str, ControlMethod] = {"ascent": Ascent(), "advantage": Advantage(), "static": Static()}

# Of each head that acts, by name: its weight, a number or one value for each state, `hidden.shape[:-1] + (1,)`.
Weights = Mapping[str, "float | torch.Tensor"]


class _Snapshot:
    """What a head's tensors were, to notice that they have changed."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.identities = [self.identity(tensor) for tensor in tensors]
        # Neither fused optimizers nor edits through `.data` count the version up.
        self.values = [self._some_values(tensor).clone() for tensor in tensors]

    @staticmethod
    def identity(tensor: torch.Tensor) -> tuple[int, int]:
        """What a replaced or a changed tensor has another of."""
        # A change in place gives another version, a replaced tensor has another address.
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    @staticmethod
    def _some_values(tensor: torch.Tensor) -> torch.Tensor:
        """A vector whole, of a matrix an evenly spread few: to read all of it at each token would take too long."""
        steps = [max(1, size // _SAMPLED) for size in tensor.shape] if tensor.ndim > 1 else [1]
        return tensor.detach()[tuple(slice(None, None, step) for step in steps)]

    def matches(self, tensors: list[torch.Tensor]) -> bool:
        return self.identities == [self.identity(tensor) for tensor in tensors] and all(
            map(torch.equal, self.values, map(self._some_values, tensors))
        )


def _of_one_kind(weights: list[float | torch.Tensor]) -> list[float | torch.Tensor]:
    """All as tensors if one is."""
    if not any(isinstance(weight, torch.Tensor) for weight in weights):
        return weights
    return [
        weight if isinstance(weight, torch.Tensor) else torch.tensor([weight], dtype=torch.float64)
        for weight in weights
    ]


def _by_row(value: float | torch.Tensor, states: torch.Tensor, dtype: torch.dtype) -> float | torch.Tensor:
    """One value for each of the states, `(states, 1)`, or the number that holds for all."""
    if not isinstance(value, torch.Tensor):
        return value
    # The dtype first: not every device knows float64.
    return value.to(dtype).to(states.device).expand(*states.shape[:-1], 1).reshape(-1, 1)


class Controller:
    """
    Applies heads to states: owns the heads and their prepared tensors, knows nothing of the model.

    Args:
        head ([`ValueHead`] or `nn.Module`):
            V. A module that is no plain [`ValueHead`] must map `(rows, hidden_size)` to `(rows, num_objectives)`; it
            is climbed by autograd.

    Attributes:
        heads (`dict[str, nn.Module]`):
            All heads by name, this one as `"default"`. All read states at one hook point.
    """

    def __init__(self, head: nn.Module):
        self.heads = {DEFAULT_NAME: head}
        # One plan for each device, dtype, set of heads and need of a Gram matrix, with what the heads were then; the
        # last used one stands last.
        self._plans: dict[tuple[torch.device, torch.dtype, tuple[str, ...], bool], tuple[_Snapshot, Plan]] = {}
        # The plan used last, and what for: traced code can neither build nor look one up.
        self._last: tuple[tuple[str, ...], bool, Plan] | None = None

    def __getstate__(self):
        return {"heads": self.heads}

    def __setstate__(self, state):
        self.__init__(None)
        self.heads = dict(state["heads"])

    def add(self, name: str, head: nn.Module) -> None:
        """Take another head on."""
        # A new dict: other threads may be reading the old one.
        self.heads = self.heads | {name: head}

    def remove(self, name: str) -> None:
        """Forget a head and what was prepared of it."""
        self.heads = {other: head for other, head in self.heads.items() if other != name}
        for slot in [slot for slot in list(self._plans) if name in slot[2]]:
            self._plans.pop(slot, None)
        if self._last is not None and name in self._last[0]:
            self._last = None

    def versions(self) -> dict[str, list[tuple[int, int]]]:
        """Of each head, by name, what is another once a tensor of it was replaced, or changed in place."""
        return {
            name: [(id(head), 0), *map(_Snapshot.identity, head.state_dict().values())]
            for name, head in self.heads.items()
        }

    def _are_plain(self, names: Sequence[str]) -> bool:
        """Whether all are [`ValueHead`]s whose methods and parts are the ones that the fast forms restate."""
        return all(_is_plain(self.heads[name]) for name in names)

    def edit(
        self,
        hidden: torch.Tensor,
        control: ControlConfig,
        step_size: float | torch.Tensor,
        weights: Weights | None = None,
        check_states: bool = False,
        prepared: bool = False,
        clamp: bool = False,
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
                The heads that act, by name, and the weight of each. Defaults to the only head, once.
            check_states (`bool`, *optional*, defaults to `False`):
                Whether states that are not finite to begin with are an error too. Without it they stay as they are: a
                base may give NaN at padded positions that nothing reads.
            prepared (`bool`, *optional*, defaults to `False`):
                Whether [`Controller.refresh`] was called since the heads last changed. Only compiled code asks: it can
                then use the Gram matrix, and reads the heads' own weights otherwise.
            clamp (`bool`, *optional*, defaults to `False`):
                Whether edited states are clamped to the range of their dtype instead of being an error, for callers
                whose rows belong to strangers. Compiled code and CUDA graphs always clamp: they cannot raise.

        Raises:
            `FloatingPointError`: if an edited state is not finite, or further from a target than before.
        """
        if not torch.compiler.is_compiling() and _is_autocast(hidden.device):
            with torch.autocast(hidden.device.type, enabled=False):
                return self.edit(hidden, control, step_size, weights, check_states, prepared, clamp)
        states = hidden.detach()
        rows = states.reshape(-1, states.shape[-1])
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        weights = dict.fromkeys(self.heads, 1.0) if weights is None else weights
        names, omegas = tuple(weights), _of_one_kind(list(weights.values()))
        numbers = [_by_row(value, states, dtype) for value in (step_size, *omegas)]
        compiling = torch.compiler.is_compiling()
        clamp = clamp or not may_wait(hidden.device)
        with torch.no_grad():
            chunks = (rows,) if compiling else rows.split(_MAX_ROWS)
            columns = [x.split(len(chunks[0])) if isinstance(x, torch.Tensor) else [x] * len(chunks) for x in numbers]
            edits = [
                self._edit_rows(chunk.to(dtype), control, alpha, names, chunk_omegas, prepared, clamp)
                for chunk, alpha, *chunk_omegas in zip(chunks, *columns, strict=True)
            ]
            edit = edits[0] if len(edits) == 1 else torch.cat(edits)
            if clamp:
                edit = torch.nan_to_num(edit)
        edited = hidden.to(dtype) + edit.view(states.shape)
        if clamp:
            limit = torch.finfo(states.dtype).max
            edited = edited.clamp(-limit, limit).to(states.dtype)
            return torch.where(torch.isfinite(states).all(-1, keepdim=True), edited, hidden)
        edited = edited.to(states.dtype)
        if torch.isfinite(edited).all():
            return edited
        usable = torch.isfinite(states).all(-1, keepdim=True)
        if not torch.isfinite(edited[usable.squeeze(-1)]).all():
            all_one = all(isinstance(omega, float) and omega == 1 for omega in omegas)
            raise FloatingPointError(
                f"The {control.method} edit left the range of {states.dtype}: `step_size` "
                f"{control.largest_step_size:g}{'' if all_one else ', times the weights,'} is too large for this head."
            )
        if check_states:
            raise FloatingPointError(
                f"The base model's hidden states hold NaN or infinite values ({states.dtype}), so there is nothing to "
                "control. Load it in another dtype (bfloat16 has a wider range than float16)."
            )
        return torch.where(usable, edited, hidden)

    def shifts_tokens(self, control: ControlConfig, names: Iterable[str]) -> bool:
        """Whether a control of these heads also adds their token bias to the logits."""
        return METHODS[control.method].shifts_tokens and any(
            token_bias_of(self.heads[name]) is not None for name in names
        )

    def shifted(
        self,
        logits: torch.Tensor,
        control: ControlConfig,
        step_size: float | torch.Tensor,
        weights: Weights | None = None,
        prepared: bool = False,
        clamp: bool = False,
    ) -> torch.Tensor:
        """
        Logits with the token bias of the heads that act, `logits + α Σ_k ω_k c_k`: what goes behind the LM head with
        [`Controller.edit`] before it.

        Args:
            logits (`torch.Tensor` of shape `(..., vocabulary)`):
                Of edited states, as the LM head makes them.
            control, step_size, weights, prepared, clamp:
                As for [`Controller.edit`], of these states.

        Raises:
            `FloatingPointError`: if what is added leaves the range of their dtype. `ValueError`: if they are of
            fewer tokens than a token bias.
        """
        weights = dict.fromkeys(self.heads, 1.0) if weights is None else weights
        if not self.shifts_tokens(control, weights):
            return logits
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        biases = self._token_biases(tuple(weights), logits.new_empty(0, dtype=dtype), control, prepared)
        size = max(len(bias) for bias in biases if bias is not None)
        if logits.shape[-1] < size:
            raise ValueError(
                f"The head's token bias is of {size} tokens, the model's LM head of {logits.shape[-1]}: it was made "
                "for another vocabulary."
            )
        alpha, *omegas = (
            # The dtype first: not every device knows float64.
            value.to(dtype).to(logits.device) if isinstance(value, torch.Tensor) else value
            for value in (step_size, *_of_one_kind(list(weights.values())))
        )
        shift = token_shift(biases, omegas, alpha, logits.shape[-1])
        limit = torch.finfo(logits.dtype).max
        if clamp or not may_wait(logits.device):
            moved = (logits.to(dtype) + torch.nan_to_num(shift)).clamp(-limit, limit).to(logits.dtype)
            # A base may itself mask tokens with -inf.
            return torch.where(torch.isfinite(logits), moved, logits)
        # Half of it is left to the logits.
        if not (shift.abs() < limit / 2).all():
            raise FloatingPointError(
                f"The token bias left the range of {logits.dtype}: `step_size` {control.largest_step_size:g} is too "
                "large for this head."
            )
        return (logits.to(dtype) + shift).to(logits.dtype)

    def _token_biases(
        self, names: tuple[str, ...], like: torch.Tensor, control: ControlConfig, prepared: bool
    ) -> list[torch.Tensor | None]:
        """c of each head, where there is one, in the dtype and on the device of `like`."""
        if not self._are_plain(names):
            found = [token_bias_of(self.heads[name]) for name in names]
            return [None if bias is None else bias.detach().to(like) for bias in found]
        with_gram, last = METHODS[control.method].needs_gram, self._last
        if torch.compiler.is_compiling():
            return [head.token_bias for head in self._traced_plan(like, names, with_gram, prepared).heads]
        plan = None
        if last is not None and last[:2] == (names, with_gram):
            mean = last[2].heads[0].mean
            # That which the states were edited by just now, so it need not be held against the heads again.
            plan = last[2] if (mean.device, mean.dtype) == (like.device, like.dtype) else None
        plan = plan or self._plan(names, like.device, like.dtype, with_gram)
        return [head.token_bias for head in plan.heads]

    def _edit_rows(
        self,
        rows: torch.Tensor,
        control: ControlConfig,
        alpha,
        names: tuple[str, ...],
        weights,
        prepared: bool,
        clamp: bool,
    ) -> torch.Tensor:
        """u of `(rows, hidden_size)` states in the compute dtype; `alpha`, `weights` as for [`ControlMethod.edit`]."""
        method, heads = METHODS[control.method], [self.heads[name] for name in names]
        eager = not torch.compiler.is_compiling()
        plan = None
        if not self._are_plain(names):
            for head in heads:
                if next(head.parameters(), rows).device != rows.device:
                    head.to(rows.device)
        elif eager:
            plan = self._plan(names, rows.device, rows.dtype, method.needs_gram)
        else:
            plan = self._traced_plan(rows, names, method.needs_gram, prepared)
        # What is eager towards a target raises where the steps run away from it.
        may_depend = may_wait(rows.device) and not (clamp and control.target is not None)
        if eager and plan is None:
            with ExitStack() as stack:
                # A module of the user's own may still be in the state that it was trained in.
                for head in heads:
                    stack.enter_context(in_eval(head))
                return method.edit(heads, rows, weights, alpha, control, plan, may_depend)
        return method.edit(heads, rows, weights, alpha, control, plan, may_depend)

    def _plan(self, names: tuple[str, ...], device: torch.device, dtype: torch.dtype, with_gram: bool) -> Plan:
        """The plan for these heads, built on first use and again if a head has changed since."""
        slot = (device, dtype, names, with_gram)
        tensors = [tensor for name in names for tensor in self.heads[name].state_dict().values()]
        known = self._plans.get(slot)
        # While a CUDA graph is recorded, tensors can be neither compared nor made.
        if known is None or (may_wait(device) and not known[0].matches(tensors)):
            autocast = torch.autocast(device.type, enabled=False) if _is_autocast(device) else nullcontext()
            with torch.inference_mode(False), autocast:
                plan = build_plan([self.heads[name] for name in names], device, dtype, with_gram)
                known = (_Snapshot(tensors), plan)
            # Room for it, whatever its own size.
            self._plans.pop(slot, None)
            room = _MAX_BYTES - plan.num_bytes
            for other, (_, kept) in reversed(list(self._plans.items())):
                room -= kept.num_bytes
                if room < 0:
                    self._plans.pop(other, None)
        if self._last is None or known[1] is not self._last[2]:
            self._plans.pop(slot, None)
            self._plans[slot] = known
        self._last = names, with_gram, known[1]
        return known[1]

    def refresh(self, names: tuple[str, ...], control: ControlConfig) -> None:
        """Renew what was prepared of heads if they have changed since. Called before code that may be compiled."""
        if self._last is not None and self._are_plain(names):
            mean = self._last[2].heads[0].mean
            self._plan(names, mean.device, mean.dtype, METHODS[control.method].needs_gram)

    def _traced_plan(self, rows: torch.Tensor, names: tuple[str, ...], with_gram: bool, prepared: bool) -> Plan:
        # torch 2.7 takes `is_exporting` for true in whatever is compiled; the flag behind it tells.
        exporting = torch.compiler.is_exporting() and getattr(torch.compiler, "_is_exporting_flag", True)
        if exporting and torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                "A strict export does not take the weights of a head, which is no submodule of the model: call "
                "`torch.export.export(..., strict=False)`, its default."
            )
        if prepared and self._last is not None and self._last[:2] == (names, with_gram):
            plan = self._last[2]
            if plan.heads[0].mean.device == rows.device and plan.heads[0].mean.dtype == rows.dtype:
                return plan
        return build_plan([self.heads[name] for name in names], rows.device, rows.dtype, with_gram=False)


def _is_autocast(device: torch.device) -> bool:
    """Whether operations on a device are done in a shorter dtype than their tensors'."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _is_plain(head: nn.Module) -> bool:
    return (
        isinstance(head, ValueHead)
        and all(
            getattr(type(head), method) is getattr(ValueHead, method) for method in ("forward", "scaled", "advantage")
        )
        and (torch.compiler.is_compiling() or "forward" not in head.__dict__)
        and all(part is None or part.is_plain(head.config.activation) for part in (head.value_mlp, head.advantage_mlp))
    )
