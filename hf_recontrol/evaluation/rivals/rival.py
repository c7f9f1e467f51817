"""What a comparison compares: rivals, each one way of answering prompts, and what they all work with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...collection.batches import recorded_control, shown_control
from ...collection.kept_states import KeptInMemory
from ...collection.rollouts import draw_rollouts
from ...collection.sampling import sampling_config, temperature_of
from ...collection.scoring.rewards import RewardFunction, objective_names
from ...configuration import ControlConfig
from ...data.fingerprints import drawn_by_another, model_settings
from ...data.processes import no_progress
from ...data.prompts import Prompts
from ...data.rollouts import Rollout, load_rollouts
from ...data.stage_folder import read_manifest
from ...data.templating import encode_prompt
from ...data.text_files import is_text
from ...heads.value_head import ValueHead
from ...modeling.causal_lm import ReControlForCausalLM
from ...settings import SamplingSettings
from ...utils.checks import check_number
from ...utils.files import without_place
from ..metrics import summed_reward

logger = logging.get_logger(__name__)


@dataclass
class Answer:
    """
    One response of a rival.

    Args:
        rollout ([`Rollout`]):
            The response: its prompt, text and token ids, and how it ended.
        kl (`list[float]`, *optional*):
            Nats to the base at each of the response's tokens, the exact expectation over the vocabulary, from a rival
            that knows it. `None`: it is read by teacher forcing under [`Rival.policy`], if there is one.
    """

    rollout: Rollout
    kl: list[float] | None = None


@dataclass(frozen=True)
class Bench:
    """
    What all rivals of a comparison work with.

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer:
            The base; a [`ReControlForCausalLM`] if there is a head.
        sampling ([`SamplingSettings`]):
            How responses are drawn, the same for all.
        rewards (`dict[str, RewardFunction]`):
            What the head was trained on, by name.
        folder (`Path`):
            For what a rival makes of its own, such as a trained adapter: kept from one run to the next.
        rollouts (`Path`, *optional*):
            A folder of scored rollouts of the base, for rivals that learn from them.
        combine_rewards (`str`, *optional*, defaults to `"none"`):
            As for [`score_rollouts`].
        keep ([`KeptInMemory`], *optional*):
            Where the states that responses are drawn from are kept.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingSettings
    rewards: dict[str, RewardFunction]
    folder: Path
    rollouts: Path | None = None
    combine_rewards: str = "none"
    keep: KeptInMemory | None = None

    def head_for(self, kind: str) -> ValueHead:
        """The value head; `ValueError` if there is none, which names the kind of rival that needs it."""
        if not isinstance(self.model, ReControlForCausalLM):
            raise ValueError(f"The control {kind!r} needs a value head: name it (`head`).")
        return self.model.value_head

    def draw(self, prompts: Prompts, control: ControlConfig | bool = False) -> list[Rollout]:
        """[`generate_rollouts`] with the comparison's settings, `num_samples` responses to each prompt."""
        settings, model, tokenizer = self.sampling, self.model, self.tokenizer
        return draw_rollouts(model, tokenizer, prompts, settings, control, progress=no_progress, keep=self.keep)


class Rival(ABC):
    """
    One way of answering prompts. A rival of your own is a class like this, named by its import path,
    `kind: my_module:MyRival`; what `compare.yaml` says beside `name` and `kind` comes as keywords.

    Only [`Rival.answer`] must be written.

    Attributes:
        start (`float`, *optional*):
            A strength from which the search for a given KL starts; `None`: it has no strength, so it is measured once.
        largest (`float`):
            The strength that such a search does not go beyond.
        only_at_head (`bool`):
            Whether its policy differs from the base at the LM head alone, see [`likelihoods`].
        draws_from_base_states (`bool`):
            Whether its answers are `bench.draw`'s, from states at the LM head's input that are the base's: then these
            are kept, and its KL and perplexity need no forward.
        learnt (`frozenset[int]`):
            The [`prompt_hash`] of each prompt that it learns from: nothing is compared on these.
    """

    start: float | None = None
    largest: float = math.inf
    only_at_head: bool = False
    draws_from_base_states: bool = False
    learnt: frozenset[int] = frozenset()

    def __init__(self, bench: Bench):
        self.bench = bench

    @abstractmethod
    def answer(self, prompts: Prompts, strength: float | None) -> Sequence[Answer | Rollout | str]:
        """
        Answer prompts.

        Args:
            prompts ([`Prompts`]):
                What to answer, with an instruction already in it, if the comparison asks for one.
            strength (`float`, *optional*):
                How strong; `None` for a rival without a strength.

        Returns:
            `bench.sampling.num_samples` answers to each prompt, which follow each other, in the order of `prompts`:
            [`Answer`]s, [`Rollout`]s, or texts alone: one counts as finished if it is shorter than `max_new_tokens`,
            and a token that ended it is not known, so that its length and KL are without.
        """

    def check_strength(self, strength: float) -> None:
        """Raises `ValueError` for a strength that it cannot have: called before any work."""
        return None

    def prepare(self) -> None:
        """What must be done once before it can answer, such as training: not timed. In each process."""
        return None

    def policy(self, strength: float | None) -> AbstractContextManager | None:
        """
        A context in which a forward of `bench.model` is the policy that answers were drawn from, so that their KL to
        the base can be read by teacher forcing; `None`: it cannot be had that way.
        """
        return None

    def depends_on(self) -> dict[str, Any]:
        """What its answers depend on beside the base, the prompts, the sampling and its own settings, as JSON."""
        return {}


def answers_of(bench: Bench, prompts: Prompts, returned: Sequence[Any], name: str) -> list[Answer]:
    """
    What a rival returned, as [`Answer`]s.

    Raises:
        `TypeError`, `ValueError`: if it is something else, or of another length; names the rival.
    """
    count = bench.sampling.num_samples
    wanted = len(prompts) * count
    if isinstance(returned, str) or not isinstance(returned, Sequence) or len(returned) != wanted:
        found = len(returned) if hasattr(returned, "__len__") and not isinstance(returned, str) else returned
        raise ValueError(f"The control {name!r} returned {found!r}, expected a list of {wanted} answers.")
    encoded: dict[int, list[int]] = {}
    vocabulary = bench.model.config.get_text_config().vocab_size
    answers = []
    for place, answer in enumerate(returned):
        if isinstance(answer, str) and is_text(answer):
            answer = _of_text(bench, prompts, place, answer, encoded)
        if isinstance(answer, Rollout):
            answer = Answer(answer)
        if isinstance(answer, str):
            raise ValueError(f"The control {name!r} returned a text that is not UTF-8 as answer {place}.")
        if not isinstance(answer, Answer) or not isinstance(answer.rollout, Rollout):
            raise TypeError(
                f"The control {name!r} returned a {type(answer).__name__} among its answers, expected Answer, Rollout "
                "or a text."
            )
        number, sample = divmod(place, count)
        prompt, rollout = prompts.rows[number]["prompt"], answer.rollout
        if rollout.prompt != prompt:
            raise ValueError(
                f"The control {name!r} returned as answer {place} one to another prompt: answers must be in the order "
                "of the prompts, those to one prompt behind each other."
            )
        answer = replace(answer, rollout=replace(rollout, prompt_number=prompts.numbers[number], sample=sample))
        try:
            answers.append(_checked(answer, vocabulary))
        except ValueError as error:
            raise ValueError(f"The control {name!r} returned as answer {place} one that cannot be: {error}") from error
    return answers


def _checked(answer: Answer, vocabulary: int) -> Answer:
    """An answer with plain numbers; `ValueError` if one is none, or the text cannot be kept."""
    rollout, kl = answer.rollout, answer.kl
    if not isinstance(rollout.completion, str) or not is_text(rollout.completion):
        raise ValueError("its `completion` must be a text that UTF-8 can hold.")
    ids, kl = (values.tolist() if hasattr(values, "tolist") else values for values in (rollout.completion_ids, kl))
    if not isinstance(ids, Sequence) or not all(isinstance(each, int) and 0 <= each < vocabulary for each in ids):
        raise ValueError(f"its `completion_ids` must be token ids below {vocabulary}.")
    if kl is not None:
        if not isinstance(kl, Sequence) or len(kl) != len(ids):
            raise ValueError(f"its `kl` must hold one number for each of its {len(ids)} tokens.")
        kl = [check_number("kl", each) for each in kl]
    return replace(answer, rollout=replace(rollout, completion_ids=list(ids), finished=bool(rollout.finished)), kl=kl)


def _of_text(bench: Bench, prompts: Prompts, place: int, text: str, encoded: dict[int, list[int]]) -> Rollout:
    row = place // bench.sampling.num_samples
    if row not in encoded:
        encoded[row] = encode_prompt(bench.tokenizer, prompts.rows[row], bench.sampling)
    ids = bench.tokenizer(text, add_special_tokens=False)["input_ids"]
    sampling = sampling_config(bench.model, bench.tokenizer, bench.sampling)
    longest = sampling.max_new_tokens
    columns = {key: value for key, value in prompts.rows[row].items() if key != "prompt"}
    return Rollout(
        prompts.rows[row]["prompt"],
        text,
        encoded[row],
        list(ids),
        longest is None or len(ids) < longest,
        columns=columns,
        temperature=temperature_of(sampling),
    )


def standardised(bench: Bench, reward: Sequence[float] | None, names: Sequence[str] | None = None) -> float | None:
    """
    The [`summed_reward`] of a response, in the units of the comparison's head if it has one; of rewards of these
    names, by default the comparison's.
    """
    if reward is None:
        return None
    if not isinstance(bench.model, ReControlForCausalLM):
        return float(sum(reward))
    names = objective_names(list(bench.rewards), bench.combine_rewards) if names is None else names
    return summed_reward(reward, bench.model.value_head.config, names)


def rollouts_for(bench: Bench, folder: str | Path, what: str) -> dict[str, Any]:
    """
    The manifest of the scored rollouts that something is made of.

    Warns where they are those of another model or of other weights, or sampled under a control, or have other rewards.

    Raises:
        `ValueError`: if they have no rewards. `OSError`: as [`read_manifest`].
    """
    manifest = read_manifest(folder, "rollouts", "recontrol rollout")
    if manifest.get("rewards") is None:
        raise ValueError(f"The rollouts in {folder} have no rewards: score them with `recontrol label`.")
    own = model_settings(bench.model)
    if said := drawn_by_another(manifest["settings"], own, f"The rollouts in {folder}", f"the {what} is for"):
        logger.warning(said)
    control = recorded_control(manifest)
    if control["control"]:
        logger.warning(f"The rollouts in {folder} were sampled under {shown_control(control)}, not from the base.")
    if _places(bench, manifest["rewards"]) is None:
        logger.warning(
            f"The rollouts in {folder} are scored by {', '.join(manifest['rewards'])}, the comparison's rewards are "
            f"{', '.join(bench.rewards)}: the {what} follows the former."
        )
    return manifest


def _places(bench: Bench, names: Sequence[str]) -> list[int] | None:
    """Where among the rewards of rollouts the comparison's own are; `None` if some are not."""
    known = [without_place(name) for name in names]
    wanted = [without_place(name) for name in objective_names(list(bench.rewards), bench.combine_rewards)]
    return [known.index(name) for name in wanted] if set(wanted) <= set(known) else None


def scored_by_prompt(bench: Bench, folder: str | Path, names: Sequence[str]) -> dict[int, list[tuple[float, Rollout]]]:
    """
    Of each prompt's number its scored responses that have a token, each behind its [`standardised`] reward: by the
    comparison's own rewards, if the rollouts have them, else by all of theirs.

    Args:
        names (sequence of `str`):
            Of the rewards that the rollouts have, as their manifest says.
    """
    places = _places(bench, names)
    used = range(len(names)) if places is None else places
    found: dict[int, list[tuple[float, Rollout]]] = {}
    for rollout in load_rollouts(folder):
        rewards = None if rollout.reward is None else [rollout.reward[place] for place in used]
        reward = standardised(bench, rewards, [names[place] for place in used])
        if reward is not None and rollout.completion_ids:
            found.setdefault(rollout.prompt_number, []).append((reward, rollout))
    return found


def learnt_from(bench: Bench, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the order of scored rollouts depends on, as JSON: their parts, and what their rewards are summed by."""
    found = {"rollouts": manifest["parts"], "rewards": objective_names(list(bench.rewards), bench.combine_rewards)}
    if isinstance(bench.model, ReControlForCausalLM):
        # Several rewards are summed in these units.
        config = bench.model.value_head.config
        found |= {"reward_mean": config.reward_mean, "reward_std": config.reward_std}
    return found


def with_samples(bench: Bench, num_samples: int) -> Bench:
    """The bench with another number of answers to each prompt."""
    return replace(bench, sampling=SamplingSettings.of(bench.sampling, {"num_samples": num_samples}))
