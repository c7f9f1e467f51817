"""What a head is, and the text of its `config.json`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..utils.checks import check_choice, check_digest, check_int, check_measured, check_number, check_widths
from ..utils.choices import ACTIVATIONS, HOOK_POINTS
from ..utils.json_objects import known_items
from .control import ControlConfig
from .record import TrainingRecord

FORMAT_VERSION = 1
# A configuration may be anybody's: this keeps a few bytes of it from asking for all the memory.
_MAX_BYTES = 1 << 20


@dataclass
class ValueHeadConfig:
    r"""
    What a head is: where it reads the hidden state, its shape, and what its numbers mean.

    Args:
        hidden_size (`int`):
            Width of the state at the hook point. For most models `config.hidden_size`.
        head_sizes (`list[int]`, *optional*, defaults to `[1024]`):
            Widths of the hidden layers of V. An empty list is a linear V.
        activation (`str`, *optional*, defaults to `"relu"`):
            `"relu"`, `"silu"`, `"gelu"` or `"tanh"`. One hidden ReLU layer has the fastest ascent.
        num_objectives (`int`, *optional*, defaults to 1):
            Number of rewards predicted. The ascent climbs their sum.
        hook_point (`str`, *optional*, defaults to `"decoder_layer"`):
            `"decoder_layer"`: the output of decoder layer `layer`. `"lm_head"`: the input of the LM head, after the
            final norm, the paper's `o_t`.
        layer (`int`, *optional*, defaults to -1):
            Index of the decoder layer, negative from the end. Not used at `"lm_head"`.
        advantage_sizes (`list[int]`, *optional*):
            Widths of the hidden layers of the advantage part g, or `None`: no advantage part. It needs
            `hook_point="lm_head"`, where the logits are linear in the state. An empty list is a linear g.
        static_vector (`bool`, *optional*, defaults to `False`):
            Whether the head holds a static vector b, one edit for all states. It needs `hook_point="lm_head"` too.
        token_bias_size (`int`, *optional*):
            Size of the vocabulary over which the head holds a token bias c, one number for each token, which goes with
            the advantage part and the static vector: what they cannot say of a token, because they see it through
            its row of the LM head alone. `None`: no token bias.
        reward_mean, reward_std (`float` or `list[float]`, *optional*, defaults to 0.0 and 1.0):
            The head's outputs are standardised; `V * reward_std + reward_mean` is in the reward's own units. A list
            holds one value for each objective.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The model whose states the head was trained on.
        control ([`ControlConfig`], *optional*):
            The recommended control, used when the caller names none.
        control_figures (`dict`, *optional*):
            What [`tune`] measured of a control: its settings (`control`), what it was chosen by (`criterion`), on how
            many `prompts`, for how many of them all controls had numbers (`counted`) and how many the head was
            `trained_on`, and its `figures`, of each by name its value and the ends of the 95 % interval.
        training ([`TrainingRecord`], *optional*):
            What the head was trained on and its held-out figures.
        prompts_digest (`str`, *optional*):
            Of the prompts that it has seen, which stand in a file of their own: saving sets it.
        format_version (`int`, *optional*):
            Version of the file format.

    Raises:
        `ValueError`: for a value outside the ranges above, naming the field.
    """

    hidden_size: int
    head_sizes: list[int] | None = None
    activation: str = "relu"
    num_objectives: int = 1
    hook_point: str = "decoder_layer"
    layer: int = -1
    advantage_sizes: list[int] | None = None
    static_vector: bool = False
    token_bias_size: int | None = None
    reward_mean: float | list[float] = 0.0
    reward_std: float | list[float] = 1.0
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    control: ControlConfig | None = None
    control_figures: dict[str, Any] | None = None
    training: TrainingRecord | None = None
    prompts_digest: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        check_int("format_version", self.format_version, low=1)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {self.format_version}, this release reads up to {FORMAT_VERSION}: upgrade "
                "hf_recontrol (`pip install -U hf_recontrol`)."
            )
        check_int("hidden_size", self.hidden_size, low=1)
        self.head_sizes = [1024] if self.head_sizes is None else check_widths("head_sizes", self.head_sizes)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_int("num_objectives", self.num_objectives, low=1)
        check_choice("hook_point", self.hook_point, HOOK_POINTS)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"`layer` must be an integer, got {self.layer!r}.")
        if self.advantage_sizes is not None:
            self.advantage_sizes = check_widths("advantage_sizes", self.advantage_sizes)
        if not isinstance(self.static_vector, bool):
            raise ValueError(f"`static_vector` must be True or False, got {self.static_vector!r}.")
        if self.token_bias_size is not None:
            check_int("token_bias_size", self.token_bias_size, low=1)
        for name, present in (
            ("advantage_sizes", self.advantage_sizes is not None),
            ("static_vector", self.static_vector),
            ("token_bias_size", self.token_bias_size is not None),
        ):
            if present and self.hook_point != "lm_head":
                raise ValueError(
                    f"`{name}` needs `hook_point='lm_head'`: the advantage edit is exact only where the logits are "
                    f"linear in the state, got hook_point={self.hook_point!r}."
                )
        self.reward_mean = self._check_per_objective("reward_mean", self.reward_mean)
        self.reward_std = self._check_per_objective("reward_std", self.reward_std)
        if min(self.reward_std if isinstance(self.reward_std, list) else [self.reward_std]) <= 0:
            raise ValueError(f"`reward_std` must be above 0, got {self.reward_std!r}.")
        for name in ("base_model_name_or_path", "base_model_revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string or None, got {value!r}.")
        # The Hub's cache has a file for each revision, so this name becomes part of a path.
        revision = self.base_model_revision
        if revision is not None and (revision.startswith("/") or ".." in re.split(r"[/\\]", revision)):
            raise ValueError(f"`base_model_revision` must be a branch, tag or commit, got {revision!r}.")
        if isinstance(self.control, dict):
            self.control = ControlConfig.from_dict(self.control, source="`control`")
        self.check_control(self.control)
        if isinstance(self.training, dict):
            self.training = TrainingRecord(**known_items(TrainingRecord, self.training, "`training`"))
        if self.training is not None and not isinstance(self.training, TrainingRecord):
            raise ValueError(f"`training` must be a TrainingRecord or None, got {self.training!r}.")
        if self.control_figures is not None:
            check_measured("control_figures", self.control_figures)
            ControlConfig.from_dict(self.control_figures["control"], source="`control_figures`")
        if self.prompts_digest is not None:
            check_digest("prompts_digest", self.prompts_digest)

    def _check_per_objective(self, name: str, value: Any) -> float | list[float]:
        if not isinstance(value, (list, tuple)):
            return check_number(name, value)
        if len(value) != self.num_objectives:
            raise ValueError(f"`{name}` has {len(value)} values for {self.num_objectives} objectives.")
        return [check_number(name, item) for item in value]

    def check_control(self, control: ControlConfig | None) -> None:
        """Raise if `control` asks for what a head of this configuration cannot do.

        Raises:
            `TypeError`: if `control` is no [`ControlConfig`]. `ValueError`: if it needs a missing advantage part, or
            its target is not one value for each objective.
        """
        if control is None:
            return
        if not isinstance(control, ControlConfig):
            raise TypeError(f"`control` must be a ControlConfig, got {type(control).__name__}.")
        if control.method == "advantage" and self.advantage_sizes is None:
            raise ValueError(
                "`method='advantage'` needs a head with an advantage part, this one has none (`advantage_sizes` is "
                "None). Train one, or use `method='ascent'`."
            )
        if control.method == "static" and not self.static_vector:
            raise ValueError(
                "`method='static'` needs a head with a static vector, this one has none (`static_vector` is False). "
                "Train one, or use `method='ascent'`."
            )
        count = len(control.target) if isinstance(control.target, tuple) else 1
        if control.target is not None and count != self.num_objectives:
            raise ValueError(f"`target` holds {count} values, this head has {self.num_objectives} objectives.")

    def changed_control(self, changes: dict[str, Any], default: ControlConfig | None = None) -> ControlConfig:
        """
        The recommended control with some settings changed.

        Args:
            changes (`dict`):
                Settings of a [`ControlConfig`] by name.
            default ([`ControlConfig`], *optional*):
                What stands for a recommendation if there is none. Without it another method needs its step size.

        Raises:
            `ValueError`: as [`ValueHeadConfig.check_control`]; if the method is another one and its step size is not
            named; for a setting that only the ascent uses, if the method is none.
        """
        recommended, method = self.control or default, changes.get("method")
        changed = replace(recommended or ControlConfig(), **changes)
        self.check_control(changed)
        # A client may send all of a control.
        changed.check_used(recommended)
        is_other = method is not None and (recommended is None or recommended.method != method)
        if is_other and "step_size" not in changes:
            raise ValueError(
                f"This head recommends no step size for {method!r}: name one, `step_size` (`--step-size`). That of "
                "another method is in other units."
            )
        return changed

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable `dict`, the inverse of [`ValueHeadConfig.from_dict`]."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["control"] = None if self.control is None else self.control.to_dict()
        values["training"] = None if self.training is None else asdict(self.training)
        return values

    def to_json(self) -> str:
        """
        The text of `config.json`.

        Raises:
            `ValueError`: if it is longer than what can be read again.
        """
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        if (size := len(text.encode())) > _MAX_BYTES:
            raise ValueError(
                f"The configuration of this head takes {size} bytes, and {_MAX_BYTES} can be read again: `training` "
                "holds too much."
            )
        return text

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "ValueHeadConfig") -> ValueHeadConfig:
        """Build from a `dict`. Unknown keys are warned about; a missing or bad value is an error naming `source`."""
        if isinstance(values, dict) and {"model_type", "architectures"} & values.keys():
            raise ValueError(
                f"{source} is the configuration of a model, not of a value head: name the head too, "
                "`ReControlForCausalLM.from_pretrained(model, value_head=head)`, or `recontrol serve model "
                "--value-head head`."
            )
        values = known_items(cls, values, source)
        if "hidden_size" not in values:
            raise ValueError(f"{source}: no `hidden_size`, so this is not the configuration of a value head.")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json_file(cls, path: str | Path) -> ValueHeadConfig:
        """Read a `config.json`.

        Raises:
            `ValueError`: if the file is no JSON object, or holds a bad value; names the file and the field.
        """
        try:
            if (size := os.path.getsize(path)) > _MAX_BYTES:
                raise ValueError(f"{size} bytes are more than the configuration of a head takes")
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a JSON file of a head ({error}).") from error
        return cls.from_dict(values, source=str(path))
