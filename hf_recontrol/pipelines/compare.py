"""`recontrol compare`: what a control is worth, against everything else that a user could pick, in one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..collection.sampling import sampling_config
from ..collection.scoring.responses import check_rows, check_tells_answers_apart, try_rewards
from ..collection.scoring.rewards import RewardFunction, load_reward, named_rewards, reward_fingerprint
from ..data.fingerprints import prompt_hashes
from ..data.processes import no_progress
from ..data.prompts import Prompts
from ..data.stage_folder import shared_folder
from ..data.tables import without_effect
from ..evaluation.comparison.answers import draw_answers, usable_prompts
from ..evaluation.comparison.assembly import TABLE_NAME, write_results
from ..evaluation.comparison.entries import default_controls, entries_of, needs_search, rows_of, without_twins
from ..evaluation.comparison.figures import Figure
from ..evaluation.comparison.matching import with_strengths
from ..evaluation.comparison.results import FIGURES_JSON_NAME
from ..evaluation.comparison.scores import reward_scorer, score_answers, scorers_of
from ..evaluation.judges.judge import Judge
from ..evaluation.judges.kinds import judge_of, own_settings
from ..evaluation.judges.person import PersonJudge
from ..evaluation.judges.scoring import JudgeScoring
from ..evaluation.rivals.plain import BestOfN
from ..evaluation.rivals.rival import Bench
from ..evaluation.strength import warn_of_other_temperature
from ..evaluation.unseen import TRAINED_ON, heads_of, load_unseen, unlearnt, unseen
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM
from ..settings import HELD_OUT_PROMPTS, CompareSettings, PromptSettings
from ..utils.code_fingerprints import UnknownStateError
from ..utils.extras import needs_extra
from ..utils.files import check_holds_no, check_target
from .loading import base_with_head, check_one
from .tune import TUNING_NAME

logger = logging.get_logger(__name__)

VERDICTS_NAME = "verdicts.jsonl"

# The KL of the default controls, where no strength is named.
_DEFAULT_KL = 0.1


def compare(
    base: str | os.PathLike | PreTrainedModel | None,
    prompts: Any,
    rewards: str | RewardFunction | Sequence[str | RewardFunction],
    output: str | os.PathLike,
    settings: CompareSettings | None = None,
    *,
    head: str | os.PathLike | None = None,
    judge: str | RewardFunction | dict[str, Any] | Judge | None = None,
    controls: Sequence[Any] | None = None,
    held_out: Any = None,
    rollouts: str | os.PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    **changes,
) -> list[Figure]:
    """
    Compare controls of a base model with one another and with what else a user could pick: each answers the same
    prompts, with the same sampling settings and the same noise. The same call again resumes one that was stopped, and
    draws and scores only what has changed or come on top; under `accelerate launch` processes share the work.

    The folder then holds `answers.parquet` (every answer with all its numbers), `figures.csv` and `figures.json`
    (every [`Figure`]), `table.md`, `frontier.svg` (reward against nats an answer), `diversity.svg` and `time.svg`.

    Args:
        base (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*), tokenizer (*optional*):
            The base, a single one: a folder or Hub name, or a loaded model (also a [`ReControlForCausalLM`]) with its
            tokenizer. By default that which the head names.
        prompts:
            Unseen prompts: a file or whatever else [`load_prompts`] takes.
        rewards (`str`, function, or sequence of these):
            What the head was trained on: as for [`load_reward`], or functions.
        output (`str` or `os.PathLike`):
            The folder. It must be none of [`tune`].
        settings ([`CompareSettings`], *optional*), changes:
            How they are compared; single settings as keywords.
        head (`str` or `os.PathLike`, *optional*):
            The value head, for the controls that need one.
        judge (`str`, function, `dict` or [`Judge`], *optional*):
            A reward that no head was trained on; a language model or a class of your own, as an object with its
            `kind`; or a judge of your own. See [docs/judging.md](judging.md).
        controls (sequence of `dict`, *optional*):
            What is compared, see [docs/comparing.md](comparing.md). By default the base, prompting, best of 4, and
            each method that the head has, at 0.1 nats a token if no strength is named.
        held_out (*optional*):
            Prompts to find strengths on, as `prompts`. By default some of `prompts` are set aside for it.
        rollouts (`str` or `os.PathLike`, *optional*):
            A folder of scored rollouts of the base, for controls that learn from them.
        quiet (`bool`, *optional*, defaults to `False`):
            Show no progress.

    Returns:
        `list[Figure]`: all figures.

    Raises:
        `ValueError`, `OSError`, `TypeError`, `ImportError`: for what cannot be compared; before any work where it can
        be known.
    """
    settings = CompareSettings.of(settings, changes)
    check_one(base=base, head=head, rollouts=rollouts)
    if controls is None and not settings.strengths and not settings.kl:
        settings = replace(settings, kl=(_DEFAULT_KL,))
    output = Path(output)
    check_target(output / TABLE_NAME)
    check_holds_no(output, {TUNING_NAME: "a search for a control"})
    if not (output / FIGURES_JSON_NAME).exists():
        check_holds_no(output, {TABLE_NAME: "the table of several bases"})
    with needs_extra("compare", "A comparison"):
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
    entries = None if controls is None else entries_of(controls, settings)
    with_head = head is not None or isinstance(base, ReControlForCausalLM)
    finds_strengths = (bool(settings.kl) and with_head) if entries is None else needs_search(entries, settings)
    if head is not None and not isinstance(head, torch.nn.Module):
        head = ValueHead.from_pretrained(head, token=settings.token)
    heads = heads_of(base) if head is None else [head]
    test, held = _prompts(prompts, held_out, settings, finds_strengths, heads)
    functions = named_rewards(rewards, test.columns)
    check_tells_answers_apart(functions.values())
    check_rows(functions, test, settings.on_bad_rows, settings.combine_rewards)
    try_rewards(functions, test, settings.on_bad_rows)
    scorers = scorers_of(functions, settings)
    named, judging = own_settings(judge), None
    judge = judge_of(judge) if isinstance(judge, dict) else judge
    if isinstance(judge, PersonJudge):
        judging = judge
        judging.read(output, settings.against)
    elif isinstance(judge, Judge):
        judging = JudgeScoring(judge, output / VERDICTS_NAME, named)
        judging.check()
        scorers.append(judging.scorer())
    elif judge is not None:
        judges = {"judge": _judge(judge, functions, test)}
        check_rows(judges, test, settings.on_bad_rows)
        try_rewards(judges, test, settings.on_bad_rows)
        scorers.append(reward_scorer("judge", judges, settings.on_bad_rows))
    with base_with_head(base, head, tokenizer, settings) as (model, tokenizer):
        heads = heads_of(model)
        warn_of_other_temperature(heads, sampling_config(model, tokenizer, settings))
        test = unseen(test, heads, "to compare on", settings.on_seen_prompts)
        # A strength is found by its KL, so that what else a head has seen may serve.
        held = unseen(held, heads, "to find strengths on", settings.on_seen_prompts, TRAINED_ON)
        bench = Bench(
            model,
            tokenizer,
            settings,
            functions,
            folder=output / "made",
            rollouts=None if rollouts is None else Path(rollouts),
            combine_rewards=settings.combine_rewards,
        )
        if entries is None:
            entries = entries_of(default_controls(bench), settings)
        rows = rows_of(entries, bench, settings)
        if not len(held) and (searched := [row.entry.name for row in rows if row.target_kl is not None]):
            raise ValueError(
                f"No prompts are left to find the strength of {searched[0]!r} on. If it is a class of your own, its "
                "`start` must stand in the class; else name other prompts (`held_out`), or give it `strengths`."
            )
        for row in rows:
            test = unlearnt(test, row.rival.learnt, f"what {row.entry.name!r} is", settings.on_seen_prompts)
        if (
            isinstance(judge, Judge)
            and judge.mode == "pair"
            and any(row.entry.name == settings.against and isinstance(row.rival, BestOfN) for row in rows)
        ):
            raise ValueError(
                f"A judge of pairs needs one answer to hold others against, and {settings.against!r} (`against`) "
                "draws several: name another control."
            )
        test, held = (usable_prompts(bench, rows, part, settings.on_bad_rows) for part in (test, held))
        if finds_strengths and len(held) < HELD_OUT_PROMPTS:
            logger.warning(
                f"Strengths are found on {len(held)} held-out prompts: of fewer than {HELD_OUT_PROMPTS} the KL is not "
                "well known."
            )
        progress = no_progress if quiet else None
        with shared_folder(output):
            rows, matches = with_strengths(output, rows, bench, held, progress)
            rows = without_twins(rows)
            if isinstance(judging, PersonJudge):
                judging.check_rows([(row.entry.name, row.strength) for row in rows])
            stages = draw_answers(output, rows, bench, test, settings.part_size, settings.perplexity, progress)
            reference = next(i for i, row in enumerate(rows) if row.entry.name == settings.against)
            scores = score_answers(stages, stages[reference], scorers, progress)
            return write_results(output, bench, rows, stages, scores, reference, test, matches, settings, judging)


def _prompts(
    prompts: Any, held_out: Any, settings: CompareSettings, finds_strengths: bool, heads: Sequence[torch.nn.Module]
) -> tuple[Prompts, Prompts]:
    """(those that are compared on, those that strengths are found on: none if no strength is to be found)."""
    test = load_unseen(prompts, _settings_for(prompts, held_out, settings), heads, "to compare on")
    if not finds_strengths:
        return test, test.take([])
    if held_out is not None:
        own = _settings_for(held_out, prompts, settings)
        held = load_unseen(held_out, own, heads, "to find strengths on", TRAINED_ON)
        seen = set(prompt_hashes(test))
        if shared := [index for index, said in enumerate(prompt_hashes(held)) if said in seen]:
            raise ValueError(
                f"{len(shared)} held-out prompts are also compared on (the first: {held.place(shared[0])}): strengths "
                "must not be found on the prompts that they are measured on."
            )
    else:
        if len(test) <= settings.num_held_out:
            raise ValueError(
                f"There are {len(test)} prompts, and {settings.num_held_out} are to be set aside to find strengths on "
                "(`num_held_out`): give more prompts, or name others (`held_out`)."
            )
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        held = test.take(sorted(order[: settings.num_held_out]))
        hashes, seen = prompt_hashes(test), set(prompt_hashes(held))
        others = sorted(order[settings.num_held_out :])
        kept = [i for i in others if hashes[i] not in seen]
        if len(kept) < len(others):
            logger.warning(
                f"{len(others) - len(kept)} prompts stand among those set aside too, and are not compared on."
            )
        if not kept:
            raise ValueError("Every prompt is among those set aside: give more prompts, or name others (`held_out`).")
        test = test.take(kept)
    return test, held


def _settings_for(source: Any, other: Any, settings: CompareSettings) -> CompareSettings:
    """Settings for `source`, without those that say something of `other` alone, where the rest comes from."""
    idle_there = () if isinstance(other, Prompts) else without_effect(other, settings)
    defaults = PromptSettings()
    elsewhere = {n: getattr(defaults, n) for n in without_effect(source, settings) if n not in idle_there}
    return replace(settings, **elsewhere)


def _judge(judge: Any, rewards: dict[str, RewardFunction], prompts: Prompts) -> RewardFunction:
    if not (isinstance(judge, str) or callable(judge)):
        raise ValueError(f"`judge` must be a function, its name, a Judge or an object with a `kind`, got {judge!r}.")
    function = load_reward(judge, prompts.columns) if isinstance(judge, str) else judge
    if isinstance(function, type) and issubclass(function, Judge):
        instead = f"an instance of it, `{function.__name__}(...)`"
        if isinstance(judge, str):
            instead = f"its name as a kind, `judge: {{kind: {judge}}}`, with its settings beside it"
        raise ValueError(f"The judge is a class: give {instead}.")
    named_rewards(function, prompts.columns)
    check_tells_answers_apart([function])
    if any(function is reward or _is_same(function, reward) for reward in rewards.values()):
        raise ValueError("The judge is also one of the rewards: name one that no head was trained on.")
    return function


def _is_same(one: RewardFunction, other: RewardFunction) -> bool:
    """Whether two rewards are known to be the same."""
    try:
        return reward_fingerprint(one) == reward_fingerprint(other)
    except UnknownStateError:
        return False
