"""Several heads on one model: added by name, and mixed by weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers.utils import logging

from ..heads.base_model import has_acting_adapter
from ..heads.hub import portable_name
from ..heads.value_head import ValueHead
from .call_settings import HeadWeights, checked_weights
from .checks import check_head
from .hooks import ControlHooks

logger = logging.get_logger(__name__)

# Names are folders in a checkpoint.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class ValueHeadMixtureMixin:
    r"""
    The heads of a [`ReControlForCausalLM`]. That which the model was made with is called `"default"`.

    The heads with a weight act together, on the state h of one hook point: the ascent climbs `Σ_k ω_k V_k(h)`, each
    V_k in the scaled coordinates of its head, that is `u ← u + α Σ_k ω_k scale_k² ⊙ ∇V_k(h + u)`; the advantage edit
    is `u = α Σ_k ω_k g_k(h)`, with `α Σ_k ω_k c_k` at the logits, exact for the advantages' weighted sum. V, g and the
    token bias c are standardised, so weights compare heads whatever the units of their rewards; a negative weight
    steers away.
    """

    _recontrol: ControlHooks

    @property
    def value_heads(self) -> Mapping[str, nn.Module]:
        """All heads by name."""
        return MappingProxyType(self._recontrol.settings.controller.heads)

    @property
    def value_head(self) -> ValueHead:
        """
        The head. It is no submodule of the model.

        Raises:
            `ValueError`: if the model has several, and not just one of them has a weight.
        """
        return self._one_head(None)

    @property
    def value_head_weights(self) -> HeadWeights:
        """The weights of calls that name none; change them with [`ReControlForCausalLM.set_value_heads`]."""
        return MappingProxyType(dict(self._recontrol.settings.weights))

    @property
    def active_value_heads(self) -> HeadWeights:
        """The weights in force in this thread, of the heads that have one."""
        return MappingProxyType(dict(self._recontrol.settings.active_weights()))

    def add_value_head(self, name: str, value_head: ValueHead | nn.Module | str | os.PathLike, **kwargs) -> None:
        """
        Add a head. It has no weight, and changes nothing, until [`ReControlForCausalLM.set_value_heads`] or a call
        gives it one.

        Args:
            name (`str`):
                What to call it: up to 64 letters, digits, `_`, `-` and `.`.
            value_head ([`ValueHead`], `nn.Module`, `str` or `os.PathLike`):
                A head for the same hook point as the model's others, or where to load it from.
            kwargs:
                As for [`ValueHead.from_pretrained`]: `revision`, `subfolder`, `token`, ...

        Raises:
            `TypeError`, `ValueError`, `OSError`: if there is such a name, or the head cannot be loaded, reads another
            hook point, or does not fit the model; the model is then as before.
        """
        settings = self._recontrol.settings
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"`name` must be up to 64 letters, digits, `_`, `-` and `.`, got {name!r}.")
        if name.casefold() in map(str.casefold, settings.controller.heads):
            raise ValueError(f"This model has a head {name!r} already: delete it first, or take another name.")
        if isinstance(value_head, (str, os.PathLike)):
            value_head = ValueHead.from_pretrained(value_head, **kwargs)
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} say where to load a head from, but `value_head` is a head.")
        ours, other = self.hook_point, check_head(self, value_head)
        if ours.layer != other.layer:
            raise ValueError(f"The model's heads act at {ours}, this one at {other}: heads must share a hook point.")
        settings.controller.add(name, value_head)

    def set_value_heads(self, weights: Mapping[str, float | Sequence[float]]) -> None:
        """
        Set which heads act, and how much, in calls that name no `value_heads`.

        Args:
            weights (mapping of `str` to `float` or a sequence of `float`):
                The weight of each head, by name; a sequence holds one value for each prompt of the batch. Heads that
                are not named do not act.

        Raises:
            `TypeError`, `ValueError`: if there is no such head, a weight is no finite number, or a head cannot do what
            `model.control` asks for; the model is then as before.
        """
        settings = self._recontrol.settings
        weights = checked_weights(weights)
        settings.check(settings.control, weights)
        settings.weights = weights

    def delete_value_head(self, name: str) -> None:
        """
        Delete a head that has no weight. Not while a call that gives it one is running in another thread.

        Raises:
            `ValueError`: if there is no such head, it has a weight, or it is the last one.
        """
        settings = self._recontrol.settings
        settings.check(False, {name: 0.0})
        if len(settings.controller.heads) == 1:
            raise ValueError(f"{name!r} is the model's last head: `unload()` takes it off.")
        if name in settings.nonzero(settings.weights):
            raise ValueError(
                f"The head {name!r} has a weight: set others with `set_value_heads` first, or `unload()` them all."
            )
        settings.weights = {other: weight for other, weight in settings.weights.items() if other != name}
        settings.controller.remove(name)

    def _one_head(self, name: str | None) -> nn.Module:
        """The head of that name, or the only one, or the only one that acts."""
        settings = self._recontrol.settings
        heads = settings.controller.heads
        if name is not None:
            settings.check(False, {name: 0.0})
            return heads[name]
        names = list(heads) if len(heads) == 1 else list(settings.nonzero(settings.weights))
        if len(names) != 1:
            raise ValueError(f"This model has several heads, {sorted(heads)}: name one (`model.value_heads[name]`).")
        return heads[names[0]]

    def _named_head(self, name: str | None) -> ValueHead:
        """The head of that name, or the only one, as it is saved: with its base and the control in force."""
        head = self._one_head(name)
        if not isinstance(head, ValueHead):
            raise TypeError(f"Only a ValueHead can be saved, this head is a {type(head).__name__}.")
        changes: dict[str, Any] = {}
        if not head.config.base_model_name_or_path and has_acting_adapter(self):
            logger.warning("An adapter acts in this model, so the saved head names no base: load it with one.")
        elif not head.config.base_model_name_or_path:
            changes["base_model_name_or_path"] = portable_name(self.config._name_or_path)
            changes["base_model_revision"] = getattr(self.config, "_commit_hash", None)
        # Settings for a mixture, or for another head, say nothing of this one alone.
        settings = self._recontrol.settings
        alone = [(self.value_heads[other], weight) for other, weight in settings.nonzero(settings.weights).items()]
        if alone == [(head, 1.0)] and not self.control.per_row:
            changes["control"] = self.control
        # A copy that shares all tensors: saving leaves the live head as it is.
        saved = copy(head)
        saved.config = replace(head.config, **changes)
        return saved
