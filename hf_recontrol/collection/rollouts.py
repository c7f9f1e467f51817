"""Prompts to responses: sample rollouts, each from its own seed, in memory or part by part into a folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from ..configuration import ControlConfig
from ..data.fingerprints import NO_CONTROL, control_settings, model_settings
from ..data.processes import Progress, progress_bar
from ..data.prompts import Prompt, Prompts, load_prompts, report_bad_rows
from ..data.rollouts import Rollout, load_rollouts, save_rollouts
from ..data.stage_folder import StageFolder
from ..data.templating import PromptEncoder
from ..heads.base_model import check_nameable, check_type
from ..heads.value_head import in_eval
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.generation import input_device
from ..modeling.hook_points import HookPoint, lm_head_rows
from ..modeling.hooks import follow
from ..settings import OWN_ENGINE, RolloutSettings, SamplingSettings
from ..utils.files import make_folder
from .batches import batches, pad_batch
from .engines import engine_of
from .engines.engine import Engine
from .kept_states import (
    KEPT_FOLDER,
    KeptInFiles,
    KeptInMemory,
    StateKeeper,
    has_kept,
    kept_path,
    kept_settings,
    remove_kept,
)
from .sampling import (
    Reweighing,
    RowSampler,
    draw_settings,
    draw_with,
    encode_all,
    listed_ids,
    needs_equal_lengths,
    response_seed,
    sampling_config,
    temperature_of,
)
from .stop_strings import StopStrings, cut_response

logger = logging.get_logger(__name__)


class Sampler:
    """
    Draws responses to encoded prompts.

    Args:
        model, tokenizer, config ([`~transformers.GenerationConfig`]):
            The base, or a controlled model, and the complete generation config.
        control ([`ControlConfig`] or `False`):
            What to sample under.
        reweigh (`Callable`, *optional*):
            Makes a batch's [`Reweighing`], of each row's prompt number and sample.
        streamer ([`~transformers.TextStreamer`], *optional*):
            Shows a single row as it is drawn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        control: ControlConfig | bool,
        reweigh: Callable[[list[tuple[int, int]]], Reweighing] | None = None,
        streamer: TextStreamer | None = None,
    ):
        self.reweigh, self.streamer = reweigh, streamer
        # generate() fills what is unset from the model's own generation config, but rollouts are draws from the model
        # itself: no penalties, beams or processors of its authors. A shallow copy leaves the model as it is.
        self.model = copy.copy(model)
        self.model.generation_config = GenerationConfig(bos_token_id=model.generation_config.bos_token_id)
        self.tokenizer = tokenizer
        self.config, self.stop_strings = copy.copy(config), config.stop_strings or ()
        self.config.stop_strings = None
        self.options = {"control": control} if isinstance(model, ReControlForCausalLM) else {}
        self.control = control_settings(model, control)
        self.end_ids = listed_ids(config.eos_token_id)
        self.needs_equal_lengths = needs_equal_lengths(model, config)

    def draw(
        self, prompts: Sequence[list[int]], seed: int, drawn: list[tuple[int, int]], keeper: StateKeeper | None
    ) -> list[tuple[str, list[int], bool]]:
        """Of each row, named in `drawn`: the response's text, its tokens, whether it ended by itself."""
        model, options = self.model, self.options | {"streamer": self.streamer}
        device = input_device(model)
        inputs = pad_batch(prompts, self.config.pad_token_id, "left", device)
        width = inputs["input_ids"].shape[1]
        if self.stop_strings:
            options["stopping_criteria"] = [StopStrings(self.tokenizer, self.stop_strings, width)]
        first = [] if keeper is None else [keeper]
        last = [] if self.reweigh is None else [self.reweigh(drawn)]
        if self.config.do_sample:
            last.append(RowSampler([response_seed(seed, *each) for each in drawn], device))
        if first or last:
            options["custom_generate"] = draw_with(prompts, first=first, last=last, streamer=self.streamer)
        follow(model)
        with in_eval(model), nullcontext() if keeper is None else keeper.reading():
            output = model.generate(**inputs, generation_config=self.config, **options)
        rows = output[:, width:].tolist()
        return [cut_response(self.tokenizer, ids, self.end_ids, self.stop_strings) for ids in rows]


def _sample(
    sampler: Sampler,
    prompts: Prompts,
    encoded: dict[int, list[int]],
    rows: Sequence[tuple[int, int]],
    settings: SamplingSettings,
    advance: Callable[[int], None],
    keep: KeptInFiles | KeptInMemory | None = None,
) -> list[Rollout]:
    """Rollouts of `rows`, (index of the prompt, number of the sample) each, in their order."""
    if keep is not None:
        # Reading from inside a compiled graph would break it.
        sampler.config.disable_compile = True
    rollouts: list[Rollout | None] = [None] * len(rows)
    lengths = [len(encoded[i]) for i, _ in rows]
    together = batches(lengths, settings.batch_size, lengths if sampler.needs_equal_lengths else None)
    for number, batch in enumerate(together):
        keeper = None if keep is None else keep.keeper(temperature_of(sampler.config))
        responses = sampler.draw(
            [encoded[rows[k][0]] for k in batch],
            settings.seed,
            [(prompts.numbers[rows[k][0]], rows[k][1]) for k in batch],
            keeper,
        )
        for k, response in zip(batch, responses, strict=True):
            rollouts[k] = _rollout(sampler, prompts, encoded, rows[k], response)
        if keeper is not None:
            keep.take(number, keeper, [rollouts[k] for k in batch])
        advance(len(batch))
    return rollouts


def _rollout(
    sampler: Sampler | Engine,
    prompts: Prompts,
    encoded: dict[int, list[int]],
    row: tuple[int, int],
    response: tuple[str, list[int], bool],
) -> Rollout:
    i, sample = row
    return Rollout(
        prompts.rows[i]["prompt"],
        response[0],
        encoded[i],
        response[1],
        response[2],
        temperature=temperature_of(sampler.config),
        columns={key: value for key, value in prompts.rows[i].items() if key != "prompt"},
        prompt_number=prompts.numbers[i],
        sample=sample,
        control=None if sampler.control == NO_CONTROL else sampler.control,
    )


def _sampled_elsewhere(
    engine: Engine,
    prompts: Prompts,
    encoded: dict[int, list[int]],
    parts: dict[int, list[tuple[int, int]]],
    seed: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, list[Rollout]]]:
    """(number, rollouts) of each part, as an engine completes them."""
    if not any(parts.values()):
        yield from ((index, []) for index in parts)
        return
    asked = {index: [(encoded[i], prompts.numbers[i], sample) for i, sample in rows] for index, rows in parts.items()}
    prompt_ids = list(encoded.values())
    with engine.running(max(map(len, prompt_ids))):
        engine.check_model(prompt_ids)
        for index, responses in engine.draw_parts(asked, seed, advance):
            each = zip(parts[index], responses, strict=True)
            yield index, [_rollout(engine, prompts, encoded, row, response) for row, response in each]


def _checked_control(model: PreTrainedModel, control: ControlConfig | bool | None) -> ControlConfig | bool:
    """The control that rollouts are sampled under; `None` is the model's own."""
    if not isinstance(model, ReControlForCausalLM):
        if control:
            raise ValueError("This model has no value head, so rollouts cannot be sampled under a control.")
        return False
    control = model.control if control is None else control
    model.check_same_for_all_prompts(control)
    return control


def generate_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | Sequence[Prompt | dict[str, Any]],
    settings: SamplingSettings | None = None,
    *,
    control: ControlConfig | bool = False,
    progress: Progress | None = None,
    **changes,
) -> list[Rollout]:
    """
    Sample responses, in memory.

    A response depends on the model, its prompt, the seed, the prompt's number and the sample's number, not on what
    else is in its batch (up to the rounding of another batch's arithmetic) or on how many processes work. Where
    padding would be read (`repetition_penalty` and other processors that look back, models that read masked padding),
    only prompts of one length share a batch, which is slower.

    Args:
        model, tokenizer:
            A causal language model and its tokenizer.
        prompts ([`Prompts`], or sequence of `str`, chat messages, or rows with a `prompt`):
            What to answer. Further columns of a row are kept for the reward function.
        settings ([`SamplingSettings`], *optional*), changes:
            How to sample; single settings as keywords. The responses of a prompt follow each other in the result.
        control ([`ControlConfig`] or `False`, *optional*, defaults to `False`):
            Control of a [`ReControlForCausalLM`], for instance to fit a new V on the controlled policy.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        `list[Rollout]`, in the order of `prompts`.

    Raises:
        `ValueError`: if there are no prompts, one is empty or too long for the model, or the generation mode is not
        supported. `TypeError`: if `model` is no [`~transformers.PreTrainedModel`], such as a `PeftModel`.
    """
    settings = SamplingSettings.of(settings, changes)
    check_type(model)
    return draw_rollouts(model, tokenizer, load_prompts(prompts), settings, control, progress)


def draw_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    settings: SamplingSettings,
    control: ControlConfig | bool = False,
    progress: Progress | None = None,
    reweigh: Callable[[list[tuple[int, int]]], Reweighing] | None = None,
    keep: KeptInMemory | None = None,
) -> list[Rollout]:
    """[`generate_rollouts`], from what `reweigh` makes of each batch's distribution; its states are kept in `keep`."""
    config = sampling_config(model, tokenizer, settings)
    if (config.num_beams or 1) > 1 or config.cache_implementation is not None:
        keep = None  # rows of a beam search change places, and what is compiled is not read
    sampler = Sampler(model, tokenizer, config, _checked_control(model, control), reweigh)
    encoder = PromptEncoder(tokenizer, settings)
    encoded, bad = encode_all(encoder, model, prompts, range(len(prompts)), config.max_new_tokens, settings)
    report_bad_rows(bad, "error", can_skip=False)
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(settings.num_samples)]
    with progress_bar("rollouts", len(rows), progress) as advance:
        return _sample(sampler, prompts, encoded, rows, settings, advance, keep)


def write_rollouts(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | Sequence[Prompt | dict[str, Any]],
    settings: RolloutSettings | None = None,
    *,
    control: ControlConfig | bool = False,
    progress: Progress | None = None,
    **changes,
) -> dict[str, float]:
    """
    Sample responses into a folder of Parquet files, see [`save_rollouts`] for their columns. Under `accelerate launch`
    the processes share the files.

    Args:
        folder (`str` or `os.PathLike`):
            Made if need be. A run that was stopped resumes there; of a finished one nothing is done again.
        model, tokenizer, prompts, control:
            As for [`generate_rollouts`].
        settings ([`RolloutSettings`], *optional*), changes:
            How to sample; single settings as keywords. With `keep_states` the states at the settings' hook point are
            kept in `kept_states/` as tokens are drawn from them, for [`write_states`] to copy instead of a forward of
            its own. The responses are the same. That folder may be removed at any time; what it lacks is read.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: `rollouts`, `finished` and `tokens`.

    Raises:
        As [`generate_rollouts`] and [`StageFolder`]; `ValueError` also if an adapter acts in the model.
    """
    settings = RolloutSettings.of(settings, changes)
    prompts = load_prompts(prompts, on_bad_rows=settings.on_bad_rows)
    check_nameable(model)
    config = sampling_config(model, tokenizer, settings)
    wanted = _checked_control(model, control)
    if settings.engine == OWN_ENGINE:
        sampler, elsewhere = Sampler(model, tokenizer, config, wanted), {}
    else:
        sampler = engine_of(settings, model=model, tokenizer=tokenizer, config=config, control=wanted)
        elsewhere = {"engine": sampler.settings}
    encoder = PromptEncoder(tokenizer, settings)
    kept_from = _kept_from(model, settings, config)
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(settings.num_samples)]
    known = {
        **model_settings(model),
        "prompts": prompts.fingerprint,
        **draw_settings(tokenizer, config, settings),
        **sampler.control,
        **elsewhere,
        "part_size": settings.part_size,
    }
    stage = StageFolder(folder, "rollouts", known, -(-len(rows) // settings.part_size), ".parquet")
    with stage:
        if stage.is_counted():
            if kept_from is not None and not has_kept(folder):
                logger.warning(f"The rollouts in {folder} are finished, so no states are kept: `states` reads them.")
            return stage.counts()
        if kept_from is not None:
            make_folder(Path(folder) / KEPT_FOLDER)
        bad = _write_parts(stage, sampler, encoder, prompts, rows, settings, kept_from, progress)
        bad_rows = len(prompts.bad_rows) + sum(stage.processes.gather(bad))
        sources = {name: getattr(model.value_heads[name], "source", None) for name in sampler.control["heads"]}
        more = {"bad_rows": bad_rows, "dataset": prompts.dataset, "rewards": None, "head_sources": sources}
        return stage.finish(_count_part, more)


def _kept_from(
    model: PreTrainedModel, settings: RolloutSettings, config: GenerationConfig
) -> tuple[HookPoint, torch.Tensor | None] | None:
    """Where states are kept while sampling, and the LM head's rows if directions are; checked before any work."""
    if not settings.keep_states:
        return None
    if (config.num_beams or 1) > 1:
        raise ValueError("States cannot be kept in a beam search, where rows change places: leave `keep_states` out.")
    return HookPoint.find(model, settings), lm_head_rows(model) if settings.with_directions else None


def _write_parts(
    stage: StageFolder,
    sampler: Sampler | Engine,
    encoder: PromptEncoder,
    prompts: Prompts,
    rows: Sequence[tuple[int, int]],
    settings: RolloutSettings,
    kept_from: tuple[HookPoint, torch.Tensor | None] | None,
    progress: Progress | None,
) -> int:
    """Write the parts of this process that are missing; returns how many of its prompts cannot be used."""
    size = settings.part_size
    parts = {index: rows[index * size : (index + 1) * size] for index in stage.own_parts()}
    # The prompts of finished parts too, so that the count of bad rows does not depend on earlier stops.
    needed = sorted({i for part in parts.values() for i, _ in part})
    max_new_tokens = sampler.config.max_new_tokens
    encoded, bad = encode_all(encoder, sampler.model, prompts, needed, max_new_tokens, settings)
    report_bad_rows(bad, settings.on_bad_rows)
    missing = stage.missing_parts()
    total = sum(len(part) for part in parts.values())
    with progress_bar("rollouts", total, progress, stage.processes.index) as advance:
        advance(sum(len(part) for index, part in parts.items() if index not in missing))
        usable = {index: [row for row in parts[index] if row[0] in encoded] for index in missing}
        if isinstance(sampler, Engine):
            drawn = _sampled_elsewhere(sampler, prompts, encoded, usable, settings.seed, advance)
            # The engine goes also where a part cannot be written.
            with closing(drawn):
                for index, rollouts in drawn:
                    save_rollouts(rollouts, stage.part_path(index))
            return len(bad)
        for index, part in usable.items():
            # Of an earlier run that was stopped in this part.
            remove_kept(stage.path, index)
            keep = None
            if kept_from is not None:
                path = partial(kept_path, stage.path, index)
                keep = KeptInFiles(*kept_from, kept_settings(kept_from[0], stage.settings), path)
            save_rollouts(_sample(sampler, prompts, encoded, part, settings, advance, keep), stage.part_path(index))
    return len(bad)


def _count_part(path: Path) -> dict[str, float]:
    rollouts = load_rollouts(path)
    return {
        "rollouts": len(rollouts),
        "finished": sum(rollout.finished for rollout in rollouts),
        "tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
    }
