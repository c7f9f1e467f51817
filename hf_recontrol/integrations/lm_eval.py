"""
The model type `recontrol` of lm-evaluation-harness: a base model under the control of a head.

lm-eval has no plugins: it knows a model type once the module that registers it is imported. So its command with this
module imported is `python -m hf_recontrol.integrations.lm_eval`:

```bash
python -m hf_recontrol.integrations.lm_eval run --model recontrol --tasks ifeval \
    --model_args pretrained=org/base,value_head=user/head,step_size=0.5
```

```python
import hf_recontrol.integrations.lm_eval, lm_eval

lm_eval.simple_evaluate("recontrol", model_args={"pretrained": "user/head", "step_size": 0.5}, tasks=["ifeval"])
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..configuration import ControlConfig
from ..heads.base_model import check_base, load_base_model
from ..heads.resolution import resolve_head_and_base
from ..modeling.causal_lm import ReControlForCausalLM
from ..utils.extras import needs_extra

with needs_extra("lm-eval", "The lm-eval model type"):
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM


class _Base:
    """What lm-eval loads models by, as all of this package loads them."""

    from_pretrained = staticmethod(load_base_model)


@register_model("recontrol")
class ReControlLM(HFLM):
    """
    lm-eval's `hf` model under the control of a head.

    Responses are generated under control, and log-likelihoods are those of the controlled policy: every position of a
    scored text is edited, as in a plain forward of [`ReControlForCausalLM`]. Under `plausibility` a masked token has
    log-likelihood -inf.

    Args:
        pretrained (`str`):
            A base model; or, without `value_head`, a head (folder or Hub repo) that knows its base model.
        value_head (`str`, *optional*):
            The head, if `pretrained` names the base.
        value_head_revision, value_head_subfolder (`str`, *optional*):
            Where the head is in its repo, if `value_head` names it.
        method (`str`, *optional*), step_size (`float`, *optional*), num_steps (`int`, *optional*),
        l2 (`float`, *optional*), plausibility (`float`, *optional*), max_kl (`float`, *optional*),
        target (`float` or a list of `float`, *optional*):
            What to change in the settings that the head recommends, as in [`ControlConfig`]. `step_size=0` evaluates
            the base.
        revision, subfolder (`str`, *optional*):
            Where `pretrained` is in its repo.
        kwargs:
            As in lm-eval's `hf`: `dtype`, `device`, `batch_size`, `tokenizer`, `peft`, `parallelize`, ...; no `token`,
            for which it has HF_TOKEN.

    Raises:
        `OSError`: if files cannot be loaded. `ValueError`, `TypeError`: if base, head and settings do not go together.
    """

    def __init__(
        self,
        pretrained: str,
        value_head: str | None = None,
        value_head_revision: str | None = None,
        value_head_subfolder: str = "",
        method: str | None = None,
        step_size: float | None = None,
        num_steps: int | None = None,
        l2: float | None = None,
        plausibility: float | None = None,
        max_kl: float | None = None,
        target: float | Sequence[float] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs,
    ):
        if not isinstance(pretrained, str):
            raise TypeError(
                "The model type `recontrol` loads its base by name. A model that is loaded already goes to lm-eval's "
                "own type: `HFLM(pretrained=model, tokenizer=tokenizer)`."
            )
        if "token" in kwargs:
            raise TypeError(
                "lm-eval writes its model arguments beside its results, a `token` too: set HF_TOKEN, or run `hf auth "
                "login`."
            )
        self._head_name = pretrained if value_head is None else value_head
        head, pretrained, revision, subfolder = resolve_head_and_base(
            pretrained,
            value_head,
            value_head_revision=value_head_revision,
            value_head_subfolder=value_head_subfolder or "",
            revision=revision,
            subfolder=subfolder,
        )
        given = {
            "method": method,
            "step_size": step_size,
            "num_steps": num_steps,
            "l2": l2,
            "plausibility": plausibility,
            "max_kl": max_kl,
            "target": target,
        }
        given = {name: value for name, value in given.items() if value is not None}
        self._head, self._control = head, head.config.changed_control(given, default=ControlConfig())
        check_base(pretrained, revision=revision, subfolder=subfolder)
        super().__init__(pretrained, revision=revision or "main", subfolder=subfolder, **kwargs)

    def _create_model(self, *args, **kwargs) -> None:
        self.AUTO_MODEL_CLASS, auto_class = _Base, self.AUTO_MODEL_CLASS
        super()._create_model(*args, **kwargs)
        self.AUTO_MODEL_CLASS = auto_class
        # A PEFT adapter stays around its base, which is what can be controlled.
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        ReControlForCausalLM.from_model(base, self._head, self._control)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results: also the head and the settings."""
        return {**super().get_model_info(), "value_head": self._head_name, "control": asdict(self._control)}


if __name__ == "__main__":
    cli_evaluate()
