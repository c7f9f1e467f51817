"""Every row's answers: drawn part by part into folders, in turn, so that a busy machine is slow for all alike."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...collection.kept_states import KeptInMemory
from ...collection.sampling import draw_settings, encode_all, sampling_config
from ...data.fingerprints import model_settings
from ...data.processes import Processes, Progress, progress_bar
from ...data.prompts import Prompts, report_bad_rows
from ...data.rollouts import Rollout, load_measured, load_rollouts, save_rollouts
from ...data.stage_folder import StageFolder
from ...data.templating import PromptEncoder
from ...utils.checks import check_json
from ...utils.code_fingerprints import UnknownStateError, code_fingerprint
from ..instructions import with_instruction
from ..likelihoods import Likelihood, likelihoods
from ..rivals.kinds import is_own_class
from ..rivals.plain import BestOfN, best_of_n_kl
from ..rivals.rival import Answer, Bench, Rival, answers_of
from .entries import Row
from .figures import TIMED_UNDER

logger = logging.get_logger(__name__)

ANSWERS_FOLDER = "answers"


def row_settings(row: Row, bench: Bench, prompts: Prompts) -> dict[str, Any]:
    """Everything that a row's answers depend on, as JSON."""
    config = sampling_config(bench.model, bench.tokenizer, bench.sampling)
    own = row.rival.depends_on()
    check_json(f"The control {row.entry.name!r}: its `depends_on` must return", own)
    return {
        **model_settings(bench.model),
        "prompts": prompts.fingerprint,
        **draw_settings(bench.tokenizer, config, bench.sampling),
        "kind": row.entry.kind,
        "settings": row.entry.settings,
        "code": _class_fingerprint(type(row.rival)) if is_own_class(row.entry.kind) else None,
        "depends_on": own,
        "strength": row.strength,
        "instruction": row.entry.instruction,
        "instruction_role": row.entry.instruction_role if row.entry.instruction else None,
    }


# Once in a process, before it answers: what a user's module counts while it works makes no other class of it.
@cache
def _class_fingerprint(cls: type[Rival]) -> str | None:
    """What tells a user's own class from what it was before its code changed."""
    try:
        return code_fingerprint(cls)
    except UnknownStateError as error:
        logger.warning(
            f"Whether the code of {cls.__name__} is still the same cannot be known later: it holds {error}. Let its "
            "`depends_on` tell what its answers depend on."
        )
        return None


class Drawer:
    """
    Draws answers of rows to prompts, and measures how far each row's policy is from the base.

    Args:
        bench ([`Bench`]):
            What all rows work with.
        perplexity (`bool`, *optional*, defaults to `False`):
            Whether answers are also read under the base where their KL is known without.
    """

    def __init__(self, bench: Bench, perplexity: bool = False):
        self.bench, self.perplexity = bench, perplexity
        self.encoder = PromptEncoder(bench.tokenizer, bench.sampling)

    def asked(self, row: Row, prompts: Prompts) -> Prompts:
        """The prompts as a row asks them."""
        entry = row.entry
        if entry.instruction is None:
            return prompts
        return with_instruction(prompts, entry.instruction, entry.instruction_role, self.encoder)

    def draw(self, row: Row, prompts: Prompts) -> tuple[list[Answer], list[Likelihood], float]:
        """A row's answers to prompts, how likely each is, and the seconds that drawing one took."""
        bench, asked = row.rival.bench, self.asked(row, prompts)
        begin = time.perf_counter()
        with _named(row), self._keeping(row) as kept:
            returned = row.rival.answer(asked, row.strength)
        seconds = time.perf_counter() - begin
        answers = answers_of(bench, asked, returned, row.entry.name)
        asked_ids = None
        if row.entry.instruction is not None:
            asked_ids = [answer.rollout.prompt_ids for answer in answers]
            answers = [self._as_asked_by_the_user(answer, prompts) for answer in answers]
        seconds /= max(1, len(answers))
        policy = _policy(row) if any(answer.kl is None for answer in answers) else None
        if policy is None and not self.perplexity:
            return answers, [Likelihood()] * len(answers), seconds
        rollouts = [answer.rollout for answer in answers]
        return answers, self._likelihoods(row, rollouts, policy, asked_ids, kept), seconds

    def likelihoods_on(self, row: Row, rollouts: Sequence[Rollout], prompts: Prompts) -> list[Likelihood]:
        """How likely others' responses to these prompts are under a row's policy: no responses are drawn."""
        asked = None
        if row.entry.instruction is not None:
            encoded = {
                number: self.encoder.encode(prompt)
                for number, prompt in zip(prompts.numbers, self.asked(row, prompts).rows, strict=True)
            }
            asked = [encoded[rollout.prompt_number] for rollout in rollouts]
        return self._likelihoods(row, rollouts, _policy(row), asked)

    def _likelihoods(
        self,
        row: Row,
        rollouts: Sequence[Rollout],
        policy: Callable[[], AbstractContextManager] | None,
        asked: Sequence[list[int]] | None,
        kept: KeptInMemory | None = None,
    ) -> list[Likelihood]:
        return likelihoods(
            self.bench.model,
            rollouts,
            policy,
            asked=asked,
            batch_size=self.bench.sampling.batch_size,
            only_at_head=row.rival.only_at_head,
            kept=kept,
        )

    @contextmanager
    def _keeping(self, row: Row) -> Iterator[KeptInMemory | None]:
        """What is kept of the states that a row's answers are drawn from in the block, if these are read from them."""
        bench = row.rival.bench
        if not self._keeps(row):
            yield None
            return
        row.rival.bench = replace(bench, keep=KeptInMemory(bench.model))
        try:
            yield row.rival.bench.keep
        finally:
            row.rival.bench = bench

    def _keeps(self, row: Row) -> bool:
        is_read = self.perplexity or row.strength is not None
        # The base is asked without the instruction.
        return is_read and row.rival.draws_from_base_states and row.entry.instruction is None

    def _as_asked_by_the_user(self, answer: Answer, prompts: Prompts) -> Answer:
        place = prompts.numbers.index(answer.rollout.prompt_number)
        prompt = prompts.rows[place]
        rollout = replace(answer.rollout, prompt=prompt["prompt"], prompt_ids=self.encoder.encode(prompt))
        # What a rival knows itself is how far it is from the base with the instruction.
        return replace(answer, rollout=rollout, kl=None)


def _policy(row: Row) -> Callable[[], AbstractContextManager] | None:
    """Makes contexts in which the model is a row's policy, if there are any."""
    make = partial(row.rival.policy, row.strength)
    return None if make() is None else make


@contextmanager
def _named(row: Row) -> Iterator[None]:
    """Errors of answering say whose they are."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"The control {row.label!r}: {error}") from error
    except Exception as error:
        if not is_own_class(row.entry.kind):
            raise
        raise RuntimeError(f"The control {row.label!r} failed: {type(error).__name__}: {error}") from error


def kl_of(row: Row, answer: Answer, likelihood: Likelihood) -> float | None:
    """Nats of a whole response from the base."""
    if isinstance(row.rival, BestOfN):
        # With an instruction what is chosen from is not the base's own: its responses' log-ratios come on top.
        pool = likelihood.log_ratio if row.entry.instruction is not None else 0.0
        return best_of_n_kl(row.rival.pool) + pool
    return likelihood.kl if answer.kl is None else sum(answer.kl)


def usable_prompts(bench: Bench, rows: Sequence[Row], prompts: Prompts, on_bad_rows: str) -> Prompts:
    """
    The prompts that the model can take, also with each instruction of the rows.

    Raises:
        `ValueError`: for others if they are an error; if none is left, or an instruction does not reach the model.
    """
    if not len(prompts):
        return prompts
    drawer, most = Drawer(bench), sampling_config(bench.model, bench.tokenizer, bench.sampling).max_new_tokens
    encoder = drawer.encoder
    usable, bad = encode_all(encoder, bench.model, prompts, range(len(prompts)), most, bench.sampling)
    report_bad_rows(bad, on_bad_rows)
    instructed = {
        (row.entry.instruction, row.entry.instruction_role): row for row in rows if row.entry.instruction is not None
    }
    for (_, role), row in instructed.items():
        asked = drawer.asked(row, prompts)
        encoded, bad = encode_all(encoder, bench.model, asked, sorted(usable), most, bench.sampling)
        report_bad_rows(bad, on_bad_rows)
        if encoded and all(ids == usable[i] for i, ids in encoded.items()):
            raise ValueError(
                f"The instruction of the control {row.entry.name!r} does not reach the model: its chat template "
                f"leaves out the {role}'s turn. Give it an `instruction_role: user`."
            )
        usable = {i: usable[i] for i in encoded}
    if not usable:
        raise ValueError("No prompt can be used.")
    return prompts if len(usable) == len(prompts) else prompts.take(sorted(usable))


def draw_answers(
    folder: Path,
    rows: Sequence[Row],
    bench: Bench,
    prompts: Prompts,
    part_size: int,
    perplexity: bool = False,
    progress: Progress | None = None,
) -> list[StageFolder]:
    """
    Draw all rows' answers that are not there yet; part by part, each row in turn. Under `accelerate launch` the
    processes share the parts.

    Args:
        folder (`Path`):
            Each row gets a folder of its own in it, by all that its answers depend on.
        part_size (`int`):
            Prompts that each row answers before the next one's turn.
        perplexity (`bool`, *optional*, defaults to `False`):
            As for [`Drawer`].

    Returns:
        `list[StageFolder]`, of each row: its finished folder.

    Raises:
        As [`generate_rollouts`] and [`StageFolder`].
    """
    num_parts = -(-len(prompts) // part_size)
    drawer = Drawer(bench, perplexity)
    with ExitStack() as stack:
        stages: list[StageFolder] = []
        opened: dict[Path, StageFolder] = {}
        for row in rows:
            known = row_settings(row, bench, prompts) | {"part_size": part_size, "perplexity": perplexity}
            path = folder / ANSWERS_FOLDER / row.folder_name(known)
            if path not in opened:  # rows that are the same under two names share their answers
                opened[path] = stack.enter_context(StageFolder(path, "answers", known, num_parts, ".parquet"))
            stages.append(opened[path])
        for stage in opened.values():
            if stage.is_counted():
                stage.check_counted()
        missing = [set(stage.missing_parts()) for stage in stages]
        for row, parts in zip(rows, missing, strict=True):
            if parts:
                row.rival.prepare()
        if any(missing):
            bench.draw(prompts.take([0]))  # or the first row would pay for what is made at the first use
        total = sum(len(stage.own_parts()) for stage in stages)
        with progress_bar("answers", total, progress, stages[0].processes.index) as advance:
            advance(total - sum(map(len, missing)))
            for part in stages[0].own_parts():
                some = prompts.take(range(len(prompts))[part * part_size : (part + 1) * part_size])
                for row, stage, parts in zip(rows, stages, missing, strict=True):
                    if part in parts and not stage.part_path(part).is_file():
                        _write_part(drawer, row, some, stage.part_path(part))
                    if part in parts:
                        advance(1)
        for stage in opened.values():
            if not stage.is_counted():
                stage.finish(_count_part)
    return stages


def _write_part(drawer: Drawer, row: Row, prompts: Prompts, path: Path) -> None:
    answers, found, seconds = drawer.draw(row, prompts)
    measured = {
        "seconds": [seconds] * len(answers),
        TIMED_UNDER: [_timed_under(drawer.bench)] * len(answers),
        "kl": [kl_of(row, answer, likelihood) for answer, likelihood in zip(answers, found, strict=True)],
        "base": [likelihood.base if drawer.perplexity else None for likelihood in found],
    }
    save_rollouts([answer.rollout for answer in answers], path, measured=measured)


def _timed_under(bench: Bench) -> float:
    """A number for the batch size, the device and how many processes there are."""
    device = bench.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return float(zlib.crc32(f"{bench.sampling.batch_size} {name} {Processes().count}".encode()))


def _count_part(path: Path) -> dict[str, float]:
    rollouts = load_rollouts(path)
    return {"answers": len(rollouts), "tokens": sum(len(rollout.completion_ids) for rollout in rollouts)}


def load_answers(stage: StageFolder) -> tuple[list[Rollout], dict[str, list[float | None]]]:
    """A row's answers, and what was measured of each while it was drawn."""
    rollouts: list[Rollout] = []
    measured: dict[str, list[float | None]] = {}
    for path in map(stage.part_path, range(stage.num_parts)):
        rollouts += load_rollouts(path)
        for name, values in load_measured(path).items():
            measured.setdefault(name, []).extend(values)
    return rollouts, measured
