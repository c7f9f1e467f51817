"""`ReControlForCausalLM`: any decoder-only model of transformers, under the control of a value head."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import ControlConfig
from ..heads.base_model import hub_options, load_base_model
from ..heads.resolution import resolve_head_and_base
from ..heads.value_head import ValueHead, in_eval, read_values
from .call_settings import HeadWeights
from .checks import head_config, matched_head
from .fused_lm_head import controlled_forward, original_forward
from .generation import CACHED_MANAGER, ControlledGenerationMixin, check_padding, with_positions
from .hook_points import HookPoint, read_states, uncompiled
from .hooks import ControlHooks
from .mixture import ValueHeadMixtureMixin

# Attributes that only make sense for the class or the process they were made in.
_TRANSIENT = ("_compiled_call", "_last_compile_config", "_batching_under")


class ReControlForCausalLM(ValueHeadMixtureMixin, ControlledGenerationMixin):
    """
    A mixin that puts a loaded causal language model under the control of a head.

    [`ReControlForCausalLM.from_pretrained`] and [`ReControlForCausalLM.from_model`] give the loaded model a class
    `(ReControlForCausalLM, type(model))`, so it stays what it was (an instance of its own class, with its own
    weights) and everything that takes a transformers model takes it. The head is no submodule: it is not in
    `state_dict()`, `parameters()` or `num_parameters()`, so training, counting and saving the base see the base alone;
    it is at `model.value_head`, and what control needs of it is copied to the model's device on first use.

    ```python
    model = ReControlForCausalLM.from_pretrained("org/base", value_head="user/my-value-head")
    model.generate(**inputs)  # controlled by model.control
    model.generate(**inputs, control=ControlConfig(step_size=1.0, num_steps=30))  # this call only
    model.generate(**inputs, control=False)  # the base, bit for bit
    ```

    Control applies to the positions whose logits are kept (`logits_to_keep`; all of them in a plain forward). Settings
    belong to a thread: `disable_control()` does not reach a thread that is started inside it (as the streamer pattern
    does); pass `control=False` to the `generate` call in that thread.

    A head on a layer other than the last feeds the key-value cache, so there an edited position stays edited for all
    later ones. Generation edits the prompt's last position and every later one; a plain forward edits all positions
    whose logits are kept. Modes where that cannot hold raise: `use_cache=False`, chunked prefill, classifier-free
    guidance, use as a draft model, continuous batching.
    """

    def __new__(cls, *args, **kwargs):
        # `type(model)(config)` and what transformers makes by it: a new base has no head.
        if (args or kwargs) and issubclass(cls, PreTrainedModel):
            return _base_class(cls)(*args, **kwargs)
        return super().__new__(cls)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        value_head: ValueHead | nn.Module | str | os.PathLike | None = None,
        control: ControlConfig | None = None,
        value_head_revision: str | None = None,
        value_head_subfolder: str = "",
        revision: str | None = None,
        subfolder: str = "",
        **kwargs,
    ) -> ReControlForCausalLM:
        """
        Load a base model and put it under control.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A base model; or, without `value_head`, a head (folder or Hub repo) that knows its base model.
            value_head ([`ValueHead`], `str` or `os.PathLike`, *optional*):
                The head, if the first argument names the base.
            control ([`ControlConfig`], *optional*):
                Settings of calls that name none. Defaults to those that the head recommends.
            value_head_revision, value_head_subfolder (`str`, *optional*):
                Where `value_head` is in its repo.
            revision, subfolder (`str`, *optional*):
                Where the first argument is in its repo. Without a revision, the base that the head names is loaded at
                the revision that it names.
            model_args, kwargs:
                As in [`~transformers.AutoModelForCausalLM.from_pretrained`] (for a base that also takes images,
                [`~transformers.AutoModelForImageTextToText.from_pretrained`]): `dtype`, `device_map`, `token`,
                `quantization_config`, `cache_dir`, `local_files_only`, `trust_remote_code`, ...

        Called on the class of a controlled model, without a head, it loads what the base's own class would: a plain
        base.

        Raises:
            `OSError`: if files cannot be loaded, or an adapter is named as the base. `ValueError`, `TypeError`: if the
            head and the base do not fit, or the base's files lack weights.
        """
        if issubclass(cls, PreTrainedModel) and value_head is None and control is None:
            place = {"subfolder": subfolder} | ({} if revision is None else {"revision": revision})
            return _base_class(cls).from_pretrained(pretrained_model_name_or_path, *model_args, **place, **kwargs)
        head, base, revision, subfolder = resolve_head_and_base(
            pretrained_model_name_or_path,
            value_head,
            value_head_revision=value_head_revision,
            value_head_subfolder=value_head_subfolder,
            revision=revision,
            subfolder=subfolder,
            **hub_options(kwargs),
        )
        head_config(head).check_control(control)
        model = load_base_model(base, *model_args, revision=revision, subfolder=subfolder, **kwargs)
        return cls.from_model(model, head, control)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        value_head: ValueHead | nn.Module | str | os.PathLike,
        control: ControlConfig | None = None,
    ) -> ReControlForCausalLM:
        """
        Put a loaded model under control, in place. Everything is checked before anything is changed.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                A decoder-only model with an LM head.
            value_head ([`ValueHead`], `nn.Module`, `str` or `os.PathLike`):
                A head, or where to load it from. Another module must have a [`ValueHeadConfig`] as `config` and map
                `(rows, hidden_size)` to `(rows, num_objectives)`; it is climbed by autograd.
            control ([`ControlConfig`], *optional*):
                Settings of calls that name none. Defaults to those that the head recommends, else to
                `ControlConfig()`.

        Returns:
            `model` itself.

        Raises:
            `TypeError`: if `model` or `value_head` is of the wrong kind. `ValueError`: if they do not fit together, or
            the head would do nothing.
        """
        if isinstance(model, ReControlForCausalLM):
            raise ValueError("This model already has a value head: call `model.unload()` first.")
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            raise TypeError(
                "A PeftModel cannot be controlled itself: control its base, "
                "`ReControlForCausalLM.from_model(peft_model.get_base_model(), ...)`; the adapters stay active."
            )
        value_head, control, hook_point = matched_head(model, value_head, control)
        hooks = ControlHooks(model, value_head, hook_point, control)
        try:
            hooks.settings.check(control, hooks.settings.weights)
        except ValueError:
            hooks.remove()
            raise
        return _attach(model, hooks)

    def unload(self) -> PreTrainedModel:
        """Take the control off again: hooks gone, original class back. Returns the base model, the same object."""
        if hasattr(self, CACHED_MANAGER):
            self.destroy_cached_continuous_batching_manager()
        if _base_class(type(self)) is not type(self).__bases__[1]:
            raise ValueError(
                f"{type(self).__name__} is a class that something else has derived from the controlled model's, as "
                "FSDP2's `fully_shard` does: call `unload()` before that."
            )
        self._recontrol.remove()
        del self._recontrol
        _drop_transient(self.__dict__)
        if "forward" in self.__dict__:
            self.__dict__["forward"] = original_forward(self.__dict__["forward"])
        self.__class__ = _base_class(type(self))
        return self

    @property
    def control(self) -> ControlConfig:
        """The settings of calls that name none. Assign another [`ControlConfig`] to change them."""
        return self._recontrol.settings.control

    @control.setter
    def control(self, control: ControlConfig) -> None:
        if control is False:
            raise TypeError("`control` must be a ControlConfig: `disable_control()` or `control=False` turn it off.")
        settings = self._recontrol.settings
        settings.check(control, settings.weights)
        settings.control = control

    @property
    def active_control(self) -> ControlConfig | None:
        """The settings in force in this thread, or `None` where the model is the base."""
        return self._recontrol.settings.active_control()

    @property
    def hook_point(self) -> HookPoint:
        """Where the heads read and edit the state. `hook_point.is_last`: an edit is in no key-value cache."""
        return self._recontrol.hook_point

    def use_control(
        self, control: ControlConfig | bool | None, value_heads: HeadWeights | None = None
    ) -> AbstractContextManager[None]:
        """
        A context manager for settings of the calls inside it, in this thread; arguments as for
        [`ReControlForCausalLM.generate`].

        Raises:
            `TypeError`, `ValueError`: if the heads cannot do what `control` and `value_heads` ask for.
        """
        return self._recontrol.call(control, value_heads)

    def disable_control(self) -> AbstractContextManager[None]:
        """A context manager in which the model is the base, in this thread."""
        return self.use_control(False)

    def check_same_for_all_prompts(self, control: ControlConfig | bool | None = None) -> None:
        """
        Raise `ValueError` if `control`, by default the settings in force, holds one value for each prompt. For callers
        that make batches of their own.
        """
        self._recontrol.settings.check_same_for_all(control)

    def edit_lm_head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        What the LM head would be given instead of these states under the settings in force, for callers that read its
        weight instead of calling it.

        Raises:
            `ValueError`: if the heads act elsewhere, or add a token bias to the logits.
        """
        settings = self._recontrol.settings
        if self.hook_point.layer is not None:
            raise ValueError(f"The heads of this model act at {self.hook_point}, not at the LM head.")
        control = settings.active_control()
        if control is not None and settings.controller.shifts_tokens(control, settings.active_weights()):
            raise ValueError(
                f"`method={control.method!r}` of a head with a token bias also acts behind the LM head, which is not "
                "called here: use the head without it (`head.without_token_bias()`), or `method='ascent'`."
            )
        (edited,) = self._recontrol.edit_head_input(self.hook_point.module, (hidden,)) or (hidden,)
        return edited

    def values(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        value_head: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        V at every position of the base's (uncontrolled) states, in the reward's own units, without dropout. A padded
        row has the values of the row alone: positions come from the mask, as in `generate`. Not
        while another thread compiles the model: that fails where hooks come and go.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`), attention_mask (*optional*, same shape), kwargs:
                As in the base's forward.
            value_head (`str`, *optional*):
                Which head, by name, if the model has several.

        Returns:
            `torch.Tensor` of shape `(batch, seq, num_objectives)`. Values at padded positions mean nothing.

        Raises:
            `ValueError`: if a row is padded on a side where this model reads the padding although it is masked.
        """
        self._recontrol.follow(self)
        head = self._one_head(value_head)
        if self.hook_point.layer is not None and self._supports_logits_to_keep():
            kwargs.setdefault("logits_to_keep", 1)
        check_padding(self, attention_mask)
        inputs = with_positions(self, {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})
        with self.disable_control(), in_eval(self), uncompiled(self), read_states(self.hook_point) as states:
            self(**inputs)
        if not states:
            raise RuntimeError(
                f"The forward did not reach {self.hook_point}, where the head reads: `config.num_hidden_layers` is "
                "lower than when the head was put on. Set it back."
            )
        return read_values(head, states[0])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        value_head: str | None = None,
        license: str | None = None,
        **kwargs,
    ) -> None:
        """
        Save the head, its configuration and its card; never the base. `model.control` is saved as the recommended
        control of the head that acts alone, with weight 1.

        Args:
            save_directory (`str` or `os.PathLike`):
                A folder.
            value_head (`str`, *optional*):
                Which head, by name, if the model has several.
            license (`str`, *optional*):
                As for [`ValueHead.save_pretrained`].

        A call with `state_dict=...`, as [`~transformers.Trainer`] makes for its checkpoints, is about the base: it
        saves the base as the base would, and the head in the folder `value_head` inside (several heads in folders of
        their names in there), so that nothing is lost.
        """
        if kwargs and "state_dict" not in kwargs:
            raise TypeError(
                f"save_pretrained() of a controlled model saves the head and does not know {sorted(kwargs)}. To save "
                "the base, `unload()` the head first; to push the head, call `push_to_hub`."
            )
        if not kwargs:
            self._named_head(value_head).save_pretrained(save_directory, license=license)
            return
        names = list(self.value_heads) if value_head is None else [value_head]
        heads = {name: self._named_head(name) for name in names}
        super().save_pretrained(save_directory, **kwargs)
        for name, head in heads.items():
            parts = ["value_head"] if len(heads) == 1 else ["value_head", name]
            head.save_pretrained(os.path.join(save_directory, *parts), license=license)

    def push_to_hub(self, repo_id: str, *, value_head: str | None = None, **kwargs):
        """[`ValueHead.push_to_hub`] of what [`ReControlForCausalLM.save_pretrained`] saves; never the base."""
        return self._named_head(value_head).push_to_hub(repo_id, **kwargs)

    def __setattr__(self, name, value):
        # TRL's trainers give the model a `forward` that reads the LM head's weight past every hook on it.
        super().__setattr__(name, controlled_forward(value) if name == "forward" else value)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._recontrol.in_use = True

    def __reduce_ex__(self, protocol):
        # The dynamic class has no importable name, so the copy is rebuilt from the base's. Also what deepcopy uses.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new_instance, (_base_class(type(self)),), _drop_transient(dict(state))


def _attach(model: PreTrainedModel, hooks: ControlHooks) -> ReControlForCausalLM:
    """Make a plain model a controlled one, whose hooks are on it."""
    model._recontrol = hooks
    _drop_transient(model.__dict__)
    model.__class__ = _controlled_class(type(model))
    if "forward" in model.__dict__:
        model.forward = model.__dict__["forward"]
    return model


@contextmanager
def without_heads(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A model without its heads inside the block, if it has any, so that others can be put on it."""
    if not isinstance(model, ReControlForCausalLM):
        yield model
        return
    hooks = model._recontrol
    model.unload()
    try:
        yield model
    finally:
        hooks.register(model)
        _attach(model, hooks)


def _drop_transient(attributes: dict[str, Any]) -> dict[str, Any]:
    for name in _TRANSIENT:
        attributes.pop(name, None)
    return attributes


@cache
def _controlled_class(base: type) -> type:
    # Named as the base: pipelines compare class names, and transformers keys registries on the class's text.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ReControlForCausalLM, base), names)


def _base_class(controlled: type) -> type:
    # Others derive classes of their own from ours.
    return next(each for each in controlled.__mro__ if ReControlForCausalLM in each.__bases__).__bases__[1]


def _new_instance(base: type):
    controlled = _controlled_class(base)
    return controlled.__new__(controlled)
