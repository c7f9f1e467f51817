"""The heads of one vLLM engine: which they are, whether they fit, and what a request asks of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ...configuration import ControlConfig
from ...control.controller import DEFAULT_NAME, Controller
from ...heads.value_head import ValueHead
from ...modeling.call_settings import CallSettings
from ...modeling.hook_points import HookPoint
from ..request_settings import FIELDS, Asked, RequestSettings

# Where a request's model stands among its extra arguments, beside `control` and `value_heads`.
MODEL_FIELD = "recontrol_model"
# Of the names by which [`Served`] travels to the processes of an engine.
_PREFIX = "x"


@dataclass(frozen=True)
class Served:
    """
    What one engine serves.

    Args:
        base (`str`):
            Name of the base that clients use.
        value_heads (mapping of `str` to `str`):
            Folder or Hub repo of each head, by name; the first one acts where a request names none.
        control (`dict`, *optional*):
            Settings of the first head, where requests do not change them. Defaults to what it recommends.
    """

    base: str
    value_heads: Mapping[str, str]
    control: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """All of it as one identifier: vLLM hands names of classes from process to process, and nothing else."""
        return _PREFIX + json.dumps(asdict(self)).encode().hex()

    @classmethod
    def from_name(cls, name: str) -> Served:
        """The inverse of `name`.

        Raises:
            `ValueError`: if it is none.
        """
        try:
            if not name.startswith(_PREFIX):
                raise ValueError(name)
            return cls(**json.loads(bytes.fromhex(name.removeprefix(_PREFIX))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name!r} is no name of served heads: `recontrol_engine_args` makes them.") from error

    @cached_property
    def heads(self) -> ServedHeads:
        """The heads, loaded."""
        return ServedHeads(self)


class ServedHeads:
    """
    The loaded heads of an engine.

    Args:
        served ([`Served`]):
            Which.

    Attributes:
        controller ([`Controller`]):
            Holds them.
        settings ([`RequestSettings`]):
            Reads requests.

    Raises:
        `OSError`, `ValueError`: if a head cannot be loaded, they do not go together, or one cannot do what it
        recommends.
    """

    def __init__(self, served: Served):
        heads = {name: ValueHead.from_pretrained(path) for name, path in served.value_heads.items()}
        control = None if served.control is None else ControlConfig.from_dict(dict(served.control))
        self.settings = RequestSettings(served.base, {name: head.config for name, head in heads.items()}, control)
        configs = [head.config for head in heads.values()]
        self.width = configs[0].hidden_size
        for name, head in heads.items():
            config = head.config
            if config.hook_point != "lm_head":
                raise ValueError(
                    f"The head {name!r} acts on a decoder layer, {config.layer}: in vLLM the layers are compiled and "
                    "captured together, so only heads at the LM head's input (`hook_point='lm_head'`) can act. Serve "
                    "it with `recontrol serve --engine transformers`."
                )
            if config.hidden_size != self.width:
                raise ValueError(
                    f"The heads read states of different widths: {self.width} and ({name!r}) {config.hidden_size}."
                )
        self.controller = Controller(next(iter(heads.values())))
        for name, head in heads.items():
            self.controller.add(name, head)
        if DEFAULT_NAME not in heads:
            self.controller.remove(DEFAULT_NAME)
        self._calls = CallSettings(
            self.controller, HookPoint(None, None, self.width, is_last=True), self.settings.read(None, {}).control
        )
        for name in heads:
            self._checked(self.settings.read(f"{served.base}:{name}", {}))

    def read(self, extra_args: Mapping[str, Any] | None) -> Asked:
        """
        What a request asks for.

        Args:
            extra_args (mapping, *optional*):
                Of its `SamplingParams`; what is not ours in there is somebody else's.

        Raises:
            `ValueError`, in words for the client: for anything that is wrong.
        """
        extra_args = extra_args or {}
        fields = {name: extra_args[name] for name in FIELDS if name in extra_args}
        # vLLM's own reading of a request's body makes numbers of booleans.
        if type(fields.get("control")) is int and fields["control"] in (0, 1):
            fields["control"] = bool(fields["control"])
        return self._checked(self.settings.read(extra_args.get(MODEL_FIELD), fields))

    def _checked(self, asked: Asked) -> Asked:
        if asked.control is not False and asked.control.per_row:
            raise ValueError(
                f"`step_size` must be one number, got {len(asked.control.step_size)}: a served request is one prompt."
            )
        try:
            self._calls.check(asked.control, asked.weights)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return asked
