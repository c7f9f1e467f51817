"""A static steering vector: the base with one vector added to the output of a middle decoder layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...collection.batches import forward_batches, teacher_forced
from ...data.fingerprints import model_settings, prompt_hash
from ...data.prompts import Prompts
from ...data.rollouts import Rollout, load_rollouts
from ...heads.value_head import in_eval
from ...modeling.hook_points import HookPoint, find_decoder_layers, read_states
from ...settings import HookPointSettings
from ...utils.checks import check_int, check_number
from ...utils.files import atomic_path, make_folder
from ..likelihoods import base_only
from .rival import Answer, Bench, Rival, learnt_from, rollouts_for, scored_by_prompt


class SteeringVector(Rival):
    r"""
    The difference of the mean states of good and of bad responses, added to the output of one decoder layer:
    `h ← h + strength · v`, `v = E[h | high reward] - E[h | low reward]`.

    `h` is the layer's output, averaged over a response's tokens; each response counts the same. The vector is added at
    every position, those of the prompt too (as in Zou et al. 2023 and Arditi et al. 2024; Rimsky et al. add it behind
    the prompt only), so that generation and a forward of the whole text are the same policy. The strength counts plain
    differences: at 1 a bad response's mean state becomes a good one's.

    Sources: contrastive activation addition (Rimsky et al. 2024), ActAdd (Turner et al. 2023), difference of means
    (Marks & Tegmark 2023).

    Args:
        layer (`int`, *optional*):
            The decoder layer, counted from 0, or from the end if negative. By default the middle one.
        rollouts (`str`, *optional*):
            A folder of scored rollouts; by default the comparison's (`rollouts`). Several rewards count by their sum
            in standard deviations.
        share (`float`, *optional*, defaults to 0.25):
            Which share of the responses, by their reward, are the good and which the bad ones, up to 0.5, at least one
            each. Where prompts have several responses, the shares are of each prompt's own, so that the prompt itself
            makes no difference; all responses to prompts with a single one are ranked together.

    Raises:
        `ValueError`, `OSError`: if there are no scored rollouts, or the model has no such layer.
    """

    start = 1.0

    def __init__(self, bench: Bench, layer: int | None = None, rollouts: str | None = None, share: float = 0.25):
        super().__init__(bench)
        count = len(find_decoder_layers(bench.model))
        if layer is None:
            layer = count // 2
        check_int("layer", layer, -count, count - 1)
        check_number("share", share, above=0, high=0.5)
        self.layer, self.share = layer % count, share
        self.folder = bench.rollouts if rollouts is None else rollouts
        if self.folder is None:
            raise ValueError(
                "A steering vector is made of scored rollouts: name their folder (`rollouts`), as `recontrol rollout` "
                "and `recontrol label` make it, for the comparison or for this control."
            )
        self.manifest = rollouts_for(bench, self.folder, "steering vector")
        self.hook_point = HookPoint.find(bench.model, HookPointSettings(hook_point="decoder_layer", layer=self.layer))
        self._vector: torch.Tensor | None = None
        self.learnt = frozenset(prompt_hash(rollout.prompt) for rollout in load_rollouts(self.folder))

    def depends_on(self) -> dict[str, Any]:
        return {"layer": self.layer, "share": self.share, **learnt_from(self.bench, self.manifest)}

    def prepare(self) -> None:
        known = json.dumps(model_settings(self.bench.model) | self.depends_on(), sort_keys=True)
        name = f"steering-vector-{hashlib.sha256(known.encode()).hexdigest()[:12]}.safetensors"
        path = make_folder(self.bench.folder) / name
        if not path.is_file():
            good, bad = self._contrasted()
            vector = self._mean_state(good) - self._mean_state(bad)
            with atomic_path(path) as temporary:
                save_file({"vector": vector}, temporary)
        self._vector = load_file(path)["vector"]

    def _contrasted(self) -> tuple[list[Rollout], list[Rollout]]:
        """(good responses, as many bad ones to the same prompts)."""
        groups: dict[int | None, list[tuple[float, Rollout]]] = {}
        for number, scored in scored_by_prompt(self.bench, self.folder, self.manifest["rewards"]).items():
            groups.setdefault(number if len(scored) > 1 else None, []).extend(scored)
        good, bad = [], []
        for scored in groups.values():
            scored.sort(key=lambda each: each[0])
            count = max(1, int(self.share * len(scored)))
            pairs = zip(scored[-count:], scored[:count], strict=True)
            for (high, best), (low, worst) in pairs:
                if high > low:
                    good.append(best)
                    bad.append(worst)
        if not good:
            raise ValueError(
                f"The rollouts in {self.folder} hold no two responses of different reward to compare: sample more, or "
                "several for each prompt."
            )
        return good, bad

    @torch.no_grad()
    def _mean_state(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """The layer's output, `(width,)`, averaged over the tokens of each response, then over these."""
        model, total = self.bench.model, 0.0
        with base_only(model), in_eval(model):
            together, _ = forward_batches(model, rollouts, self.bench.sampling.batch_size, keep_logits=False)
            for batch in together:
                chosen = [rollouts[i] for i in batch]
                inputs, drawn_from = teacher_forced(model, chosen, keep_logits=False)
                if model._supports_logits_to_keep():
                    inputs["logits_to_keep"] = 1
                with read_states(self.hook_point) as states:
                    model(**inputs, use_cache=False)
                for row, part in enumerate(drawn_from):
                    # A token's own state is one position behind the one that it was drawn from.
                    own = states[0][row, part.start + 1 : part.stop + 1]
                    total = total + own.float().mean(0).cpu().double()
        return (total / len(rollouts)).float()

    def answer(self, prompts: Prompts, strength: float | None) -> list[Answer]:
        with self.policy(strength):
            return [Answer(rollout) for rollout in self.bench.draw(prompts)]

    def policy(self, strength: float | None) -> AbstractContextManager:
        if self._vector is None:
            self.prepare()
        return self._steered(self._vector * (self.start if strength is None else strength))

    @contextmanager
    def _steered(self, shift: torch.Tensor) -> Iterator[None]:
        def add(layer, args, output):
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            hidden = hidden + shift.to(hidden.device, hidden.dtype)
            return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden

        with base_only(self.bench.model), self.hook_point.module.register_forward_hook(add):
            yield
