"""vLLM, started here, as what draws rollouts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from itertools import count, islice
from threading import Event, Thread
from typing import Any

from ...data.processes import Processes
from ...utils.extras import needs_extra
from .engine import Completion, Engine, EngineSampling, Request

# What is set here, and where it is set instead.
_OURS = {
    "model": "it is the base",
    "generation_config": "all sampling is said with each response",
    "seed": "each response has its own",
    "skip_tokenizer_init": "stop strings need the tokenizer",
}
# Arguments that change which distribution is drawn from.
_DECIDE = ("dtype", "hf_overrides", "kv_cache_dtype", "quantization")
_SECONDS_BETWEEN_LOOKS = 1
# How many requests wait for each that can run, so that none of the engine's places is ever empty.
_AHEAD = 2


def _wake_if_dead(core: Any, over: Event) -> None:
    """vLLM notes that its process was killed (out of memory, say), and its `step` waits for an answer all the same."""
    from vllm.v1.engine.exceptions import EngineDeadError

    resources, answers = getattr(core, "resources", None), getattr(core, "outputs_queue", None)
    while resources is not None and answers is not None and not over.wait(_SECONDS_BETWEEN_LOOKS):
        if resources.engine_dead:
            return answers.put_nowait(EngineDeadError())


def _hold_heads(arguments: Mapping[str, Any]) -> bool:
    """Whether an engine's arguments are those of `recontrol_engine_args`."""
    return arguments.get("load_format") == "recontrol"


def _runs_own_code(*parts: Any) -> bool:
    """Whether one of these was loaded from code in its own repo, which transformers keeps as modules of this name."""
    kinds = [kind for part in parts for kind in type(part).__mro__]
    return any(kind.__module__.partition(".")[0] == "transformers_modules" for kind in kinds)


class VLLMEngine(Engine):
    """vLLM in this process (its workers in others, as it likes). One process runs it; `tensor_parallel_size` and the
    like spread the model."""

    @property
    def settings(self) -> dict[str, Any]:
        decided = {name: self.arguments[name] for name in _DECIDE if name in self.arguments}
        return {"name": "vllm"} | decided

    @property
    def _has_heads(self) -> bool:
        return _hold_heads(self.arguments)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        with needs_extra("vllm", "`engine='vllm'`"):
            if find_spec("vllm") is None:
                raise ImportError("vllm")
        taken = sorted(arguments.keys() & (_OURS.keys() - ({"model"} if _hold_heads(arguments) else set())))
        if taken:
            raise ValueError(f"`engine_arguments` must not hold {taken[0]!r}: {_OURS[taken[0]]}.")
        if Processes().count > 1:
            raise ValueError(
                "vLLM is started by one process: without `accelerate launch`, with `tensor_parallel_size` or "
                "`data_parallel_size` of `vllm serve` and its URL as `engine`."
            )

    def check_control(self) -> None:
        if self.is_controlled and not self._has_heads:
            raise ValueError(
                "Responses under a control need an engine with the heads: `recontrol rollout --head`, or "
                "`engine_arguments=recontrol_engine_args(base, {name: head})`, the names as in the model."
            )

    @contextmanager
    def running(self, longest: int) -> Iterator[None]:
        if self._has_heads:
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform

        known = {item.name for item in fields(EngineArgs)} | set(inspect.signature(LLM).parameters)
        if unknown := sorted(self.arguments.keys() - known):
            raise ValueError(f"`engine_arguments`: vLLM knows no {unknown[0]!r}.")
        source = {"model": self.model.config._name_or_path, "tokenizer": self.tokenizer.name_or_path}
        if commit := getattr(self.model.config, "_commit_hash", None):
            source["revision"] = commit
        wanted = {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_model_len": longest + self.sampling.max_tokens,
        }
        if _runs_own_code(self.model, self.model.config, self.tokenizer):
            wanted["trust_remote_code"] = True
        if current_platform.is_cpu():
            # vLLM moves the noise of a response back where its prompt is read in pieces, which no CPU's generator can.
            wanted["enable_chunked_prefill"] = False
        engine = LLM(**(source | wanted | self.arguments), generation_config="vllm", seed=0).llm_engine
        self._engine = engine
        over = Event()
        Thread(target=_wake_if_dead, args=(engine.engine_core, over), name="vllm-watch", daemon=True).start()
        try:
            self._check_room(longest, engine.vllm_config.model_config.max_model_len)
            yield
        finally:
            over.set()
            del self._engine
            engine.engine_core.shutdown()

    def complete(self, requests: Iterable[Request], sampling: EngineSampling) -> Iterator[Completion]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, requests, numbers = self._engine, iter(requests), count()
        room = _AHEAD * engine.vllm_config.scheduler_config.max_num_seqs
        control = self._control_fields()
        keys: dict[str, Any] = {}
        while True:
            for key, ids, seed in islice(requests, room - len(keys)):
                params = SamplingParams(
                    **sampling.fields(),
                    seed=seed,
                    extra_args=control,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = str(next(numbers))
                (prompt,) = engine.renderer.render_cmpl([TokensPrompt(prompt_token_ids=ids)])
                engine.add_request(name, prompt, params)
                keys[name] = key
            if not keys:
                return
            try:
                outputs = engine.step()
            except EngineDeadError as error:
                raise OSError(
                    "vLLM stopped, what it wrote above may say why. What was drawn is kept: the same call goes on "
                    "from there."
                ) from error
            for output in outputs:
                if output.finished:
                    (drawn,) = output.outputs
                    if drawn.finish_reason not in ("stop", "length"):
                        raise ValueError(f"vLLM gave a response up ({drawn.finish_reason!r}).")
                    yield Completion(keys.pop(output.request_id), list(drawn.token_ids), drawn.finish_reason == "stop")

    def _control_fields(self) -> dict[str, Any] | None:
        if not self._has_heads:
            return None
        if not self.is_controlled:
            return {"control": False}
        weights = {name: weight for name, (weight, _) in self.control["heads"].items()}
        return {"control": self.control["control"], "value_heads": weights}
