"""A controlled model's generation: settings of one call, what its modes allow, continuous batching."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ..configuration import ControlConfig
from .call_settings import HeadWeights
from .hooks import ControlHooks


class ControlledGenerationMixin:
    """The generation of a [`ReControlForCausalLM`]."""

    _recontrol: ControlHooks

    def generate(
        self,
        *args,
        control: ControlConfig | bool | None = None,
        value_heads: HeadWeights | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`] under control.

        Args:
            control ([`ControlConfig`] or `False`, *optional*):
                Settings of this call; `False` gives the base, bit for bit. Defaults to `model.control`. A `step_size`
                that holds one value for each prompt follows beams and `num_return_sequences`.
            value_heads (mapping of `str` to `float` or a sequence of `float`, *optional*):
                Weights of the heads in this call, as for [`ReControlForCausalLM.set_value_heads`]. Defaults to those
                set there.
            args, kwargs:
                As in the base.

        Raises:
            `ValueError`: if the head, the control and the generation mode do not go together.
            `FloatingPointError`: if a state is not finite, or control made it so.
        """
        self._follow()
        with self._recontrol.call(control, value_heads, generating=True):
            return super().generate(*args, **kwargs)

    def generate_batch(
        self,
        *args,
        control: ControlConfig | bool | None = None,
        value_heads: HeadWeights | None = None,
        **kwargs,
    ):
        """[`~transformers.GenerationMixin.generate_batch`] (continuous batching) under control."""
        self._follow()
        with self._recontrol.call(control, value_heads):
            return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(
        self,
        *args,
        control: ControlConfig | bool | None = None,
        value_heads: HeadWeights | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.init_continuous_batching`] under control. The manager generates in a thread of
        its own, with the settings in force now.

        Raises:
            `ValueError`: for step sizes or weights per row, and for a head on a layer other than the last.
        """
        hooks = self._recontrol
        self._follow()
        with hooks.call(control, value_heads):
            active, weights = hooks.settings.active_control(), hooks.settings.active_weights()
            if by_row := hooks.settings.by_row():
                raise ValueError(
                    f"Continuous batching packs requests into one row, so {next(iter(by_row))} cannot differ "
                    "between them."
                )
            if active is not None and not hooks.hook_point.is_last:
                raise ValueError(
                    f"A head on layer {hooks.hook_point.layer} feeds the cache, whose blocks continuous batching "
                    "shares between requests: generate without it, or use a head on the last layer."
                )
            manager = super().init_continuous_batching(*args, **kwargs)
        for name in ("warmup", "_run_generation_loop"):
            function = getattr(type(manager), name).__get__(manager)
            setattr(manager, name, _with_settings(hooks, active, weights, function))
        return manager

    def _follow(self) -> None:
        self._recontrol.follow(self, next(iter(self.value_heads.values())).config)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        hooks = self._recontrol
        if not hooks.hook_point.is_last and hooks.settings.active_control() is not None:
            reasons = {
                "`use_cache=False`": not generation_config.use_cache,
                "`prefill_chunk_size`": generation_config.prefill_chunk_size is not None,
                "`guidance_scale`": generation_config.guidance_scale not in (None, 1),
                "use as a draft model": generation_config.is_assistant,
                "a base without a cache": not {"past_key_values", "cache_params"}
                & inspect.signature(self.forward).parameters.keys(),
            }
            found = [reason for reason, holds in reasons.items() if holds]
            if found:
                raise ValueError(
                    f"A head on layer {hooks.hook_point.layer} feeds the cache from the prompt's last position on, "
                    f"which does not hold with {' and '.join(found)}: generate without it, or use a head on the last "
                    "layer."
                )
        return super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        if input_ids is not None:
            self._recontrol.settings.expand(len(input_ids), expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )


def _with_settings(
    hooks: ControlHooks, control: ControlConfig | None, weights: HeadWeights, function: Callable
) -> Callable:
    def run(*args, **kwargs):
        with hooks.call(control or False, weights):
            return function(*args, **kwargs)

    return run
