"""States to a value head: V by TD(λ)."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..configuration import ValueHeadConfig
from ..data.processes import Processes, Progress
from ..data.states import States, StateStore
from ..heads.value_head import ValueHead
from ..settings import ValueSettings
from .held_out import POSITIONS, episode_summaries, split_by_prompt, value_figures
from .targets import Episodes, episode_mask, episodes_at_once, pad_episodes, td_targets
from .trainer import (
    EpisodeTrainer,
    TrainerCallback,
    check_training,
    own_randomness,
    shape_of,
    training_options,
)

logger = logging.get_logger(__name__)

# Episodes whose states are summed up at once, at most.
_EPISODES_AT_ONCE = 16
# Relative to a feature's mean square: below this, what is left of a feature that never varies is rounding.
_ROUNDING = 1e-12


class ValueModel(nn.Module):
    """V of a head as what the Trainer trains and saves, with the target network if there is one."""

    def __init__(self, head: ValueHead, with_target: bool):
        super().__init__()
        self.head = head
        self.target = deepcopy(head.value_mlp).requires_grad_(False) if with_target else None
        if head.advantage_mlp is not None:
            head.advantage_mlp.requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


class ValueTrainer(EpisodeTrainer):
    """
    Fits V: `Σ_t (V(s_t) - sg(v_t))²`. Override [`ValueTrainer.targets`] for another objective.

    Args:
        td_lambda, discount, target_update:
            As for [`train_value_head`].
        args, kwargs:
            As for [`EpisodeTrainer`].
    """

    def __init__(self, *args, td_lambda: float, discount: float, target_update: float | None, **kwargs):
        targets = {"td_lambda": td_lambda, "discount": discount, "target_update": target_update}
        super().__init__(*args, metric="value_error", description="value head", targets=targets, **kwargs)
        self.td_lambda, self.discount = td_lambda, discount
        if target_update is not None:
            self.add_callback(_TargetUpdate(target_update))

    def targets(self, values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The targets of a batch, padded: `values` and result have shape `(episodes, longest, objectives)`. `values`
        carry their gradient.
        """
        return td_targets(
            values,
            batch["rewards"],
            batch["lengths"],
            self.td_lambda,
            discount=self.discount,
            open_ended=batch.get("open_ended"),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of whole episodes."""
        values = pad_episodes(model(inputs["hidden"]).float(), inputs["lengths"])
        bootstrap = values
        target = self.accelerator.unwrap_model(model).target
        if target is not None:
            with torch.no_grad():
                scaled = self.accelerator.unwrap_model(model).head.scaled(inputs["hidden"])
                bootstrap = pad_episodes(target(scaled).float(), inputs["lengths"])
        errors = (values - self.targets(bootstrap, inputs)).square() * episode_mask(inputs["lengths"])[..., None]
        loss = errors.sum() / (self.normaliser(inputs) * values.shape[-1])
        return (loss, values) if return_outputs else loss

    def figures(self) -> dict[str, Any]:
        """Those of [`value_figures`]."""
        return measure(self.accelerator.unwrap_model(self.model).head, self.held_out, self.processes, self.discount)


@torch.no_grad()
def measure(head: ValueHead, episodes: Episodes, processes: Processes, discount: float) -> dict[str, Any]:
    """The figures of V on episodes, each process measuring its share; the same in every process."""
    device = next(head.parameters()).device
    width = len(POSITIONS) * head.config.num_objectives + 1
    own = [(torch.empty(0).long(), torch.empty(0, width))]
    for numbers, batch in episodes.batches(processes):
        values = pad_episodes(head(batch["hidden"].to(device)).float().cpu(), batch["lengths"])
        own.append((numbers, episode_summaries(values, batch["rewards"], batch["lengths"], discount)))
    gathered = torch.empty(len(episodes), width)
    for found, summaries in processes.gather(tuple(map(torch.cat, zip(*own, strict=True)))):
        gathered[found] = summaries
    store, chosen = episodes.store, episodes.episodes
    return value_figures(
        gathered,
        episodes.rewards(chosen),
        store.lengths[chosen],
        store.prompts[chosen],
        episodes.mean,
        episodes.std,
        discount,
    )


def measure_value_head(
    head: ValueHead,
    states: States | StateStore | str | os.PathLike,
    episodes: torch.Tensor | None = None,
    *,
    discount: float = 1.0,
) -> dict[str, Any]:
    """
    What V of a head is worth on responses, see [`value_figures`].

    Args:
        head ([`ValueHead`]):
            A trained head.
        states ([`States`], [`StateStore`], or folder of `recontrol states`):
            Episodes with their rewards, read where the head reads.
        episodes (`torch.Tensor`, *optional*):
            Numbers of the episodes to measure, for instance those that [`split_by_prompt`] holds out. Defaults to all.
        discount (`float`, *optional*, defaults to 1.0):
            The γ that V was trained with.

    Raises:
        `ValueError`: if the states are not those that the head reads, or lack a reward.
    """
    store = StateStore.of(states)
    check_states(store, head.config)
    episodes = torch.arange(len(store)) if episodes is None else episodes
    return measure(head, Episodes(store, episodes, head, ["hidden"], open_ended=False), Processes(), discount)


class _TargetUpdate(TrainerCallback):
    """After each step the target network moves a share of the way to V (Polyak averaging)."""

    def __init__(self, share: float):
        self.share = share

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for target, source in zip(model.target.parameters(), model.head.value_mlp.parameters(), strict=True):
            target.lerp_(source, self.share)


def check_states(store: StateStore, config: ValueHeadConfig) -> None:
    """Raise `ValueError` if a head of this configuration cannot be trained on these states."""
    found = (store.read_at["hook_point"], store.read_at["layer"])
    wanted = (config.hook_point, config.layer)
    if found[0] != wanted[0] or (found != wanted and found[0] == "decoder_layer"):
        raise ValueError(
            f"The states were read at {found}, the config asks for a head at {wanted}: give it the same `hook_point` "
            "and `layer`."
        )
    if store.hidden_size != config.hidden_size:
        raise ValueError(f"The states are {store.hidden_size} wide, `hidden_size` is {config.hidden_size}.")
    if store.rewards.shape[1] != config.num_objectives:
        raise ValueError(
            f"The data hold {store.rewards.shape[1]} rewards, `num_objectives` is {config.num_objectives}."
        )
    if not torch.isfinite(store.rewards).all():
        raise ValueError("The rewards hold NaN or infinite values.")


def sides(store: StateStore, settings: ValueSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Numbers of the episodes that are trained on, of those among them whose rewards count, and of those that are held
    out and whose rewards count.

    Raises:
        `ValueError`: if a side would be empty.
    """
    train, held_out = split_by_prompt(store.prompts, settings.validation_split, settings.seed)
    if not settings.open_truncated:
        return train, train, held_out
    # What a truncated response was given is not asked for, so it is no part of the units or the figures either.
    rewarded, held_out = train[store.finished[train]], held_out[store.finished[held_out]]
    if not len(rewarded) or not len(held_out):
        raise ValueError("`open_truncated` needs finished responses among the training and the held-out ones.")
    return train, rewarded, held_out


def new_head(
    store: StateStore,
    config: ValueHeadConfig,
    train: torch.Tensor,
    rewarded: torch.Tensor,
    scaling: str,
    seed: int,
) -> ValueHead:
    """
    An untrained head in the units of the training episodes: the mean and spread of the reward (of the `rewarded` ones)
    go into its configuration, those of the states (of the `train` ones) into its buffers.

    Raises:
        `ValueError`: if all rewards are equal, or the states are not finite.
    """
    rewards = store.rewards[rewarded].double()
    mean, std = rewards.mean(0), rewards.std(0, correction=0)
    if (rewards == rewards[0]).all(0).any():
        raise ValueError(
            "All rewards are equal in the training part, so there is nothing to learn. Score with others (`recontrol "
            "label ROLLOUTS --reward ... --again`) and read the states anew, or take more prompts."
        )
    one = config.num_objectives == 1
    config = replace(
        config,
        reward_mean=mean.item() if one else mean.tolist(),
        reward_std=std.item() if one else std.tolist(),
        base_model_name_or_path=config.base_model_name_or_path or store.read_at["base_model_name_or_path"],
        base_model_revision=config.base_model_revision or store.read_at["base_model_revision"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ValueHead(config)
    if scaling == "none":
        return head
    count, total, squares = 0, torch.zeros(store.hidden_size).double(), torch.zeros(store.hidden_size).double()
    shift = None
    for part in train.split(episodes_at_once(store, 2, _EPISODES_AT_ONCE)):
        hidden = store.gather("hidden", part).double()
        # Sums of squares around a state, not around 0, so that a large mean does not swallow a small spread.
        shift = hidden[0].clone() if shift is None else shift
        hidden -= shift
        count += len(hidden)
        total += hidden.sum(0)
        squares += hidden.square_().sum(0)
    if not torch.isfinite(squares).all():
        raise ValueError("The states hold NaN or infinite values.")
    variance = (squares / count - (total / count).square()).clamp(min=0)
    variance = variance.where(variance > _ROUNDING * squares / count, 0.0)
    if scaling == "scalar":
        variance = variance.mean().expand_as(variance)
    spread = variance.sqrt().float()
    head.state_mean.copy_(shift + total / count)
    # A feature that never varies says nothing: any scale does, as long as it divides.
    head.state_scale.copy_(spread.where(spread > 0, 1.0))
    return head


def train_value_head(
    states: States | StateStore | str | os.PathLike,
    config: ValueHeadConfig,
    settings: ValueSettings | None = None,
    *,
    output_dir: str | os.PathLike | None = None,
    trainer_class: type[ValueTrainer] = ValueTrainer,
    progress: Progress | None = None,
    **changes,
) -> tuple[ValueHead, dict[str, Any]]:
    """
    Train V: `Σ_t (V(s_t) - sg(v_t))²` with the targets of [`td_targets`], recomputed as V moves, by transformers'
    [`~transformers.Trainer`]. The epoch with the smallest held-out error is kept.

    Args:
        states ([`States`], [`StateStore`], or folder of `recontrol states`):
            Episodes with their rewards.
        config ([`ValueHeadConfig`]):
            The head's shape; its `reward_mean` and `reward_std` are set from the training episodes.
        settings ([`ValueSettings`], *optional*), changes:
            How to train; single settings as keywords. In states of which every k-th is kept, λ and γ are those of k
            tokens.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where checkpoints and logs go; a run that was stopped resumes from its last complete checkpoint there. By
            default a temporary folder.
        trainer_class (`type`, *optional*):
            A subclass of [`ValueTrainer`] with another objective.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (steps done, steps in all) instead of showing a bar.

    Returns:
        The head and its figures on the held-out prompts (which also chose the epoch), see [`value_figures`], with
        `log`, the Trainer's log.

    Raises:
        `ValueError`: if sizes do not fit, the data are not finite, all rewards are equal, or training diverged.
        `ImportError`: if accelerate is not installed.
    """
    settings = ValueSettings.of(settings, changes)
    head, figures = fit_values(StateStore.of(states), config, settings, output_dir, trainer_class, progress)
    for warning in figures["warnings"] if Processes().index == 0 else ():
        logger.warning(warning)
    return head, figures


def fit_values(
    store: StateStore,
    config: ValueHeadConfig,
    settings: ValueSettings,
    output_dir: str | os.PathLike | None = None,
    trainer_class: type[ValueTrainer] = ValueTrainer,
    progress: Progress | None = None,
) -> tuple[ValueHead, dict[str, Any]]:
    """[`train_value_head`], without telling the warnings that are among its figures."""
    check_training(settings, Processes())
    check_states(store, config)
    train, rewarded, held_out = sides(store, settings)
    head = new_head(store, config, train, rewarded, settings.scaling, settings.seed)
    with ExitStack() as stack:
        if output_dir is None:
            output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(own_randomness(settings.seed))
        trainer = trainer_class(
            ValueModel(head, settings.target_update is not None),
            Episodes(store, train, head, ["hidden"], settings.open_truncated),
            Episodes(store, held_out, head, ["hidden"], settings.open_truncated),
            training_options(settings, output_dir, settings.learning_rate, settings.num_epochs, settings.weight_decay),
            td_lambda=settings.td_lambda,
            discount=settings.discount,
            target_update=settings.target_update,
            patience=settings.patience,
            progress=progress,
            start={"head": shape_of(head), "scaling": settings.scaling},
        )
        if not trainer.fit():
            raise ValueError("Training diverged (the held-out error is not a number): lower `learning_rate`.")
        figures = trainer.figures()
        head = head.cpu()
        for parameter in head.parameters():
            parameter.requires_grad_(True)
    return head, figures | {"log": trainer.state.log_history}
