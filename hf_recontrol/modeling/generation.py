"""
A controlled model's generation: settings of one call, what its modes allow, continuous batching. And what a forward
must be given to see what generation sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from ..configuration import ControlConfig
from ..control.guards import AnyTokenLeft, FiniteLogits
from ..heads.value_head import in_eval
from .call_settings import HeadWeights
from .hooks import ControlHooks

# Where a model keeps a manager of continuous batching for the next calls.
CACHED_MANAGER = "_cached_continuous_batching_manager"
# The probe for padding: rows of so many tokens, beside as much padding.
_PROBE_LENGTH, _PROBE_ROWS = 8, 4
# How much of the next token's distribution may move: what rounding does to it stays below in float32 (and float64),
# and in the shorter dtypes.
_ROUNDING, _COARSE_ROUNDING = 1e-3, 0.1

# Prompts that are read together are at least this share of the longest one's length.
_LENGTHS_TOGETHER = 0.75

# By the model without its LM head, which shallow copies of a model share.
_known: WeakKeyDictionary[torch.nn.Module, frozenset[str]] = WeakKeyDictionary()


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
            `FloatingPointError`: if a state is not finite, or control made it so, or the logits that are drawn from.
        """
        self._recontrol.follow(self)
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
        self._recontrol.follow(self)
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
        self._recontrol.follow(self)
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
            # What a manager that is kept has captured in graphs is another control.
            asked = active, weights, hooks.settings.controller.versions()
            if self.__dict__.get("_batching_under") != asked and hasattr(self, CACHED_MANAGER):
                self.destroy_cached_continuous_batching_manager()
            self._batching_under = asked
            manager = super().init_continuous_batching(*args, **kwargs)
        for name in ("warmup", "_run_generation_loop"):
            function = getattr(type(manager), name).__get__(manager)
            setattr(manager, name, _with_settings(hooks, active, weights, function))
        return manager

    @contextmanager
    def continuous_batching_context_manager(
        self,
        *args,
        control: ControlConfig | bool | None = None,
        value_heads: HeadWeights | None = None,
        **kwargs,
    ) -> Iterator[Any]:
        """[`~transformers.GenerationMixin.continuous_batching_context_manager`] under control."""
        with ExitStack() as stack:
            with self._recontrol.call(control, value_heads):
                manager = stack.enter_context(super().continuous_batching_context_manager(*args, **kwargs))
            yield manager

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        settings = self._recontrol.settings
        call, active = settings.current, settings.active_control()
        # What continuous batching records in a CUDA graph cannot raise.
        if call is None or not call.generating or active is None:
            return processors
        if active.plausibility > 0 and not call.has_drafts:
            ends = [generation_config._eos_token_tensor, generation_config._pad_token_tensor]
            ends = [end.flatten() for end in ends if end is not None]
            processors.append(AnyTokenLeft(generation_config.num_beams or 1, input_ids_seq_length or 0, ends))
        if generation_config.do_sample:
            processors.append(FiniteLogits(active.largest_step_size))
        return processors

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        hooks = self._recontrol
        active, call = hooks.settings.active_control(), hooks.settings.current
        if call is not None:
            is_verified = generation_mode == GenerationMode.ASSISTED_GENERATION
            call.has_drafts = is_verified or bool(generation_config.is_assistant)
            call.has_early_exits = is_verified and generation_config.assistant_early_exit is not None
        if active is not None and active.plausibility > 0 and generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                "`plausibility` forbids tokens, which so have no logits for `guidance_scale` to take differences of: "
                "leave one of the two out."
            )
        if not hooks.hook_point.is_last and active is not None:
            drafts = (
                generation_mode_kwargs.get("assistant_model"),
                generation_config.prompt_lookup_num_tokens,
                generation_config.assistant_early_exit,
            )
            reasons = {
                "`use_cache=False`": not generation_config.use_cache,
                "`prefill_chunk_size`": generation_config.prefill_chunk_size is not None,
                "`guidance_scale`": generation_config.guidance_scale not in (None, 1),
                "use as a draft model": generation_config.is_assistant,
                "drafts on a base that knows no `logits_to_keep`": not hooks.knows_logits_to_keep and any(drafts),
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


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong: also if its weights wait elsewhere, and come only as they are used."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)  # accelerate's
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook])]
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def with_positions(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of a model's forward with the positions that `generate` gives to the same tokens: counted by the
    attention mask, from 0. A forward without them also counts the padding, in families such as GPT-2, or counts from
    another number.
    """
    mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if (
        inputs.get("position_ids") is not None
        or tokens is None
        or not (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2))
        or "position_ids" not in inspect.signature(model.forward).parameters
    ):
        return inputs
    others = {name: value for name, value in inputs.items() if value is not None and name != "input_ids"}
    position_ids = model._prepare_position_ids_for_generation(tokens, others)
    # With a cache the mask holds its tokens too.
    return {**inputs, "position_ids": position_ids[..., -tokens.shape[1] :]}


def read_padding(model: PreTrainedModel, length: int | None = None) -> frozenset[str]:
    """
    On which sides, `"left"` and `"right"`, padding changes what a model makes of a row, although it is masked: as in
    models that know no attention mask, recurrent ones that keep reading, or positions that count the padding. Found
    once for each model, by small forwards of rows alone and padded. Rotary positions that are rescaled for long texts
    are so for all rows of a batch: `length` is that of the longest, by default beyond every limit.
    """
    limit = _rescales_beyond(model)
    if limit is not None and (length is None or length > limit):
        return frozenset({"left", "right"})
    return _seen_beside_rows(model) & {"left", "right"}


def _rescales_beyond(model: PreTrainedModel) -> int | None:
    """From which length on rotary positions depend on the longest row of a batch."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    # Some models have parameters for each type of layer.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    found = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    limits = [kind.get("original_max_position_embeddings") or config.max_position_embeddings for kind in found]
    return min(limits, default=None)


def check_padding(model: PreTrainedModel, attention_mask: torch.Tensor | None) -> None:
    """Raise `ValueError` if a row of a mask, `(batch, seq)`, is padded on a side where the model reads the padding."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or attention_mask.all():
        return
    present = attention_mask.bool()
    padded = {"left": ~present[:, 0], "right": ~present[:, -1]}
    for side in sorted(read_padding(model, attention_mask.shape[1])):
        if rows := padded[side].nonzero()[:, 0].tolist():
            raise ValueError(
                f"Row {rows[0]} is padded on the {side}, and {type(model).__name__} reads padding there although it "
                f"is masked: pad on the {'right' if side == 'left' else 'left'}, or give rows of one length together."
            )


@torch.no_grad()
def read_prompts_once(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> None:
    """
    Fill the empty cache of a generation with its prompts but for the last token of each, so that what is left of the
    first forward is one token a row. Equal prompts are read once, and those of other lengths apart, where a forward
    of the whole batch would read a prompt for each of its samples, and the padding. Nothing is done where that could
    change what is read: for a cache other than of plain and sliding attention, positions that count the padding or
    depend on the longest row, and prompts whose tokens see later ones.

    Args:
        prompts (sequence of `list[int]`):
            The prompt of each row.
        input_ids (`torch.Tensor` of shape `(rows, width)`):
            The prompts, padded on the left.
        model_kwargs (`dict`):
            What transformers' decoding method calls the model with.
    """
    distinct = {tuple(prompt): row for row, prompt in reversed(list(enumerate(prompts)))}
    groups: list[list[tuple[int, ...]]] = []
    for prompt in sorted(distinct, key=len, reverse=True):
        # Of a prompt of one token nothing is read here, so a group of such would be an empty batch.
        if not groups or 1 < len(prompt) < _LENGTHS_TOGETHER * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(prompt)
    saves = len(groups) > 1 or len(distinct) < len(prompts)
    if not (saves and _can_read_apart(model, distinct, input_ids, model_kwargs)):
        return
    given = [name for name in ("attention_mask", "position_ids") if model_kwargs.get(name) is not None]
    read, width = [], input_ids.shape[1]
    for group in groups:
        rows, start = [distinct[prompt] for prompt in group], width - len(group[0])
        inputs = {name: model_kwargs[name][rows, start:-1] for name in given} | {
            "input_ids": input_ids[rows, start:-1],
            "past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True)),
        }
        if model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        with model.disable_control() if isinstance(model, ControlledGenerationMixin) else nullcontext():
            read.append(model(**inputs, use_cache=True).past_key_values)
        if read[-1].get_seq_length() != len(group[0]) - 1:
            return
    order = {prompt: number for number, prompt in enumerate(prompt for group in groups for prompt in group)}
    rows = [order[tuple(prompt)] for prompt in prompts]
    for number, layers in enumerate(zip(*(part.layers for part in read), strict=True)):
        if layers[0].is_initialized:  # a layer that shares another's keys has none
            keys, values = (
                torch.cat([pad(states, (0, 0, width - 1 - states.shape[-2], 0)) for states in each])
                for each in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
            )
            model_kwargs["past_key_values"].update(keys[rows], values[rows], number)


def _can_read_apart(
    model: PreTrainedModel,
    prompts: Collection[Sequence[int]],
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
) -> bool:
    """Whether a prompt's keys and values are the same without its last token, its padding and the other prompts."""
    cache, width = model_kwargs.get("past_key_values"), input_ids.shape[1]
    given = {name for name, value in model_kwargs.items() if isinstance(value, torch.Tensor)}
    return (
        width > 1
        and type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and not cache.offloading
        and all(
            type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and width < layer.sliding_window)
            for layer in cache.layers
        )
        and given <= {"attention_mask", "position_ids"}
        and all(model_kwargs[name].shape == input_ids.shape for name in given)
        and "past_key_values" in inspect.signature(model.forward).parameters
        # A model that is not told the positions counts them, from the padding on.
        and ("position_ids" in given or len(set(map(len, prompts))) == 1)
        and _rescales_beyond(model) is None
        and "later tokens" not in _seen_beside_rows(model)
    )


def check_causal(model: PreTrainedModel) -> None:
    """Raise `ValueError` if positions of a model see later tokens: then its states are not those of generation."""
    if "later tokens" in _seen_beside_rows(model):
        raise ValueError(
            f"{type(model).__name__} lets a position see the tokens behind it, so what is read of a whole response is "
            "not what its tokens were drawn from: only causal models can be used (a BERT-like one needs "
            "`is_decoder=True` in its configuration)."
        )


def _seen_beside_rows(model: PreTrainedModel) -> frozenset[str]:
    body = model.base_model
    if body not in _known:
        _known[body] = _probe(model)
    return _known[body]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> frozenset[str]:
    """What changes what a model makes of a row: masked padding on the `"left"`, on the `"right"`, `"later tokens"`."""
    vocabulary = model.get_input_embeddings().num_embeddings
    numbers = torch.arange(_PROBE_ROWS)[:, None] + torch.arange(_PROBE_LENGTH)
    rows = (1 + numbers % (vocabulary - 1)).to(input_device(model))
    padding, present = torch.zeros_like(rows), torch.ones_like(rows)

    def distributions(own: slice, *pieces: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, masks = (torch.cat(part, dim=1) for part in zip(*pieces, strict=True))
        inputs = with_positions(model, {"input_ids": ids, "attention_mask": masks})
        return torch.softmax(model(**inputs, use_cache=False).logits[:, own].float(), dim=-1)

    with in_eval(model), model.disable_control() if isinstance(model, ControlledGenerationMixin) else nullcontext():
        first, last = slice(_PROBE_LENGTH), slice(-_PROBE_LENGTH, None)
        alone = distributions(first, (rows, present))
        beside = {
            "left": distributions(last, (padding, padding), (rows, present)),
            "right": distributions(first, (rows, present), (padding, padding)),
            "later tokens": distributions(first, (rows, present), (rows.flip(1), present)),
        }
    rounding = _ROUNDING if model.dtype in (torch.float32, torch.float64) else _COARSE_ROUNDING
    # The median: rounding may send a token of a mixture of experts another way.
    moved = {name: float(((found - alone).abs().sum(-1) / 2).median()) for name, found in beside.items()}
    return frozenset(name for name, share in moved.items() if not share <= rounding)
