"""What answers are worth: each scorer's numbers of every answer, kept beside the answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ...collection.scoring.responses import scored_rollouts
from ...collection.scoring.rewards import RewardFunction, note_calls, reward_fingerprint
from ...data.processes import Processes, Progress, progress_bar
from ...data.rollouts import Rollout, load_rollouts
from ...data.stage_folder import StageFolder
from ...data.templating import prompt_text
from ...settings import AnswerSettings
from ...utils.code_fingerprints import UnknownStateError, model_fingerprint
from ...utils.extras import needs_extra
from ...utils.files import read_json, write_json
from ..rivals.rival import Bench, standardised

logger = logging.get_logger(__name__)

# Of answers, by name one number each.
Scores = dict[str, list[float | None]]


@dataclass(frozen=True)
class Scorer:
    """
    Something that gives every answer one or several numbers.

    Args:
        name (`str`):
            Of the folder that the numbers are kept in.
        depends_on (`dict`):
            Everything that the numbers depend on beside the answers, as JSON; `None` where nobody can know, or the
            scorer keeps them itself: then it is called by each run.
        score (`Callable`):
            `f(rollouts, references)`: the numbers of each answer, by name. Of the reference itself both are one list.
        uses_references (`bool`, *optional*, defaults to `False`):
            Whether the numbers depend on the reference's answers too.
    """

    name: str
    depends_on: dict[str, Any] | None
    score: Callable[[list[Rollout], list[Rollout]], Scores]
    uses_references: bool = False


def scorers_of(rewards: dict[str, RewardFunction], settings: AnswerSettings) -> list[Scorer]:
    """What every answer is scored by: the rewards, and coherence if a model for it is named."""
    scorers = [reward_scorer("reward", rewards, settings.on_bad_rows, settings.combine_rewards)]
    return scorers if settings.embeddings is None else [*scorers, coherence_scorer(settings.embeddings)]


def reward_scorer(
    name: str, rewards: dict[str, RewardFunction], on_bad_rows: str, combine_rewards: str = "none"
) -> Scorer:
    """
    Rewards as a scorer. A response that a reward does not score has no number.

    Args:
        name (`str`):
            Of the scorer.
        rewards (`dict[str, RewardFunction]`):
            By name. One alone, and several that are combined, give one number of the scorer's name; others one number
            each, `SCORER REWARD`, so that no reward's name can be taken for another number's.
    """
    fingerprints: dict[str, str] | None = {}
    for label, function in rewards.items():
        try:
            fingerprints[label] = reward_fingerprint(function)
        except UnknownStateError as error:
            logger.warning(
                f"The reward {label} is scored anew by each run: whether it is still the same cannot be known, since "
                f"it holds {error}. Give it a text of your own that changes when it does: `{label}.fingerprint = "
                "'version 1'`."
            )
            fingerprints = None
            break

    def score(rollouts: list[Rollout], references: list[Rollout]) -> Scores:
        def scored(functions: list[RewardFunction], combine: str) -> list[float | None]:
            found, _ = scored_rollouts(rollouts, functions, on_bad_rows, combine, "answers")
            return [None if rollout.reward is None else rollout.reward[0] for rollout in found]

        if combine_rewards != "none" or len(rewards) == 1:
            found = {name: scored(list(rewards.values()), combine_rewards)}
        else:
            found = {f"{name} {label}": scored([function], "none") for label, function in rewards.items()}
        for label, function in rewards.items():
            note_calls(function, None if fingerprints is None else fingerprints[label])
        return found

    depends_on = {"rewards": fingerprints, "combine_rewards": combine_rewards, "on_bad_rows": on_bad_rows}
    return Scorer(name, None if fingerprints is None else depends_on, score)


def coherence_scorer(model_name: str) -> Scorer:
    """
    The cosine of the embeddings of prompt and response, as in Kong et al. (2024), in [-1, 1]; of an empty response
    none.

    Args:
        model_name (`str`):
            A model of sentence-transformers: a folder or Hub name.

    Raises:
        `ImportError`: names the extra.
    """
    with needs_extra("compare", "Coherence"):
        from sentence_transformers import SentenceTransformer
    try:
        model = SentenceTransformer(model_name, device=str(Processes().device))
    except (OSError, ValueError) as error:
        raise ValueError(f"The model for coherence (`embeddings`: {model_name}) cannot be loaded: {error}") from error

    def score(rollouts: list[Rollout], references: list[Rollout]) -> Scores:
        prompts = [prompt_text(rollout.prompt) for rollout in rollouts]
        texts = prompts + [rollout.completion for rollout in rollouts]
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        cosines = (vectors[: len(prompts)] * vectors[len(prompts) :]).sum(-1).tolist()
        values = [float(c) if r.completion.strip() else None for c, r in zip(cosines, rollouts, strict=True)]
        return {"coherence": values}

    return Scorer("coherence", {"embeddings": str(model_name), "fingerprint": model_fingerprint(model)}, score)


def score_answers(
    stages: Sequence[StageFolder],
    reference: StageFolder,
    scorers: Sequence[Scorer],
    progress: Progress | None = None,
) -> list[Scores]:
    """
    All numbers of all rows' answers. What was scored before is not scored again.

    Args:
        stages (sequence of [`StageFolder`]):
            Of each row its finished answers.
        reference ([`StageFolder`]):
            Of the row that the others are held against.

    Returns:
        `list[Scores]`, of each row.
    """
    total = sum(len(stage.own_parts()) for stage in stages) * len(scorers)
    with progress_bar("scores", total, progress, stages[0].processes.index) as advance:
        found = []
        for stage in stages:
            scores: Scores = {}
            for scorer in scorers:
                scores |= _row_scores(stage, reference, scorer, advance)
            found.append(scores)
    return found


def _row_scores(stage: StageFolder, reference: StageFolder, scorer: Scorer, advance: Callable[[int], None]) -> Scores:
    known = {"scorer": scorer.name, "depends_on": scorer.depends_on}
    if scorer.uses_references:
        known["reference"] = reference.settings
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    folder = StageFolder(stage.path / f"{scorer.name}-{digest}", "scores", known, stage.num_parts, ".json")
    with folder:
        is_known = scorer.depends_on is not None and folder.is_counted()
        if is_known:
            folder.check_counted()
        parts = folder.own_parts() if scorer.depends_on is None else folder.missing_parts()
        advance(len(folder.own_parts()) - len(parts))
        for part in parts:
            rollouts = load_rollouts(stage.part_path(part))
            references = []
            if scorer.uses_references:
                references = rollouts if stage is reference else load_rollouts(reference.part_path(part))
            write_json(folder.part_path(part), scorer.score(rollouts, references))
            advance(1)
        if not is_known:
            folder.finish(lambda path: {})
        scores: Scores = {}
        for part in range(folder.num_parts):
            for name, values in read_json(folder.part_path(part)).items():
                scores.setdefault(name, []).extend(values)
    return scores


def with_reward(bench: Bench, found: Scores) -> Scores:
    """What was measured and scored of each answer, with `reward` as the one number that answers are ranked by."""
    if "reward" in found:
        return found
    values = zip(*(found[f"reward {name}"] for name in bench.rewards), strict=True)
    return found | {"reward": [None if None in each else standardised(bench, each) for each in values]}


def wins(
    own: Sequence[float | None], other: Sequence[float | None], alike: Sequence[bool]
) -> tuple[list[float | None], list[float | None]]:
    """
    Of answers and what each is held against, by their scores: (1 above it, 0.5 a tie, 0 below it; 1 a tie).

    Args:
        alike (sequence of `bool`):
            Whether the two are one text: then they tie. A model's number of a text depends on its batch, by rounding.
    """
    pairs = [(b if same else a, b) for a, b, same in zip(own, other, alike, strict=True)]
    known = [None not in pair for pair in pairs]
    won = [(0.5 if a == b else float(a > b)) if both else None for (a, b), both in zip(pairs, known, strict=True)]
    return won, [None if each is None else float(each == 0.5) for each in won]


def best_places(rollouts: Sequence[Rollout], rewards: Sequence[float | None]) -> list[int]:
    """Of each prompt the place of its answer with the highest reward, the first one of several."""
    best: dict[int, int] = {}
    ranked = [-math.inf if reward is None else reward for reward in rewards]
    for place, rollout in enumerate(rollouts):
        if ranked[place] > ranked[best.setdefault(rollout.prompt_number, place)]:
            best[rollout.prompt_number] = place
    return list(best.values())


def matched_references(
    rollouts: Sequence[Rollout], references: Sequence[Rollout], among: Sequence[int] | None = None
) -> list[int]:
    """
    Of each answer the place of the reference's answer to the same prompt: its same sample, if there is one.

    Args:
        among (sequence of `int`, *optional*):
            The reference's answers that count; by default all.
    """
    by_prompt: dict[int, list[int]] = {}
    for place in range(len(references)) if among is None else among:
        by_prompt.setdefault(references[place].prompt_number, []).append(place)
    return [
        by_prompt[rollout.prompt_number][rollout.sample % len(by_prompt[rollout.prompt_number])]
        for rollout in rollouts
    ]
