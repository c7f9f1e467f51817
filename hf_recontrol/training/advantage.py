"""States and values to the advantage part: least squares on their differences, the static vector in closed form."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..data.processes import Processes, Progress
from ..data.states import States, StateStore
from ..heads.value_head import ValueHead
from ..settings import AdvantageSettings
from .critic import critic_values
from .held_out import split_by_prompt
from .ridge import Moments, ridge
from .targets import episode_mask, pad_episodes, value_differences
from .trainer import Episodes, EpisodeTrainer, check_training, own_randomness, training_options

logger = logging.get_logger(__name__)

# Below this correlation g has found next to nothing.
_USELESS = 0.05


class AdvantageModel(nn.Module):
    """g of a head, or its static vector if that is all it has, as what the Trainer trains and saves; V is frozen."""

    def __init__(self, head: ValueHead):
        super().__init__()
        self.head = head
        head.value_mlp.requires_grad_(False)
        if head.advantage_mlp is not None:
            head.advantage_mlp.requires_grad_(True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.head.advantage_mlp is None:
            return self.head.static_vector.expand_as(hidden)
        return self.head.advantage(hidden)


def advantage_targets(
    head: ValueHead, batch: dict[str, torch.Tensor], gae_lambda: float, discount: float
) -> torch.Tensor:
    """
    The targets of a batch of episodes, one after the other: `(states,)`, summed over the objectives. They are of the
    batch's own `values` or, where it has none, of V's.
    """
    with torch.no_grad():
        flat = batch["values"] if "values" in batch else head(batch["hidden"]).float()
        values = pad_episodes(flat, batch["lengths"])
        differences = value_differences(
            values,
            batch["rewards"],
            batch["lengths"],
            gae_lambda,
            discount=discount,
            open_ended=batch.get("open_ended"),
        )
        return differences.sum(-1)[episode_mask(batch["lengths"])]


class AdvantageTrainer(EpisodeTrainer):
    """
    Fits g by least squares: `(w_y - w̄(h_t))ᵀ g(h_t) ≈ A_t`.

    Args:
        gae_lambda, discount (`float`):
            As for [`fit_advantage`].
        args, kwargs:
            As for [`EpisodeTrainer`].
    """

    def __init__(self, *args, gae_lambda: float, discount: float, **kwargs):
        super().__init__(*args, metric="advantage_error", description="advantage", **kwargs)
        self.gae_lambda, self.discount = gae_lambda, discount

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of whole episodes."""
        head = self.accelerator.unwrap_model(model).head
        targets = advantage_targets(head, inputs, self.gae_lambda, self.discount)
        advantage = (inputs["directions"] * model(inputs["hidden"])).sum(-1).float()
        loss = (advantage - targets).square().sum() / self.normaliser(inputs)
        return (loss, advantage) if return_outputs else loss

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """`advantage_error` (mean squared, relative to that of 0) and `advantage_correlation`."""
        model = self.accelerator.unwrap_model(self.model)
        head = model.head
        device = next(head.parameters()).device
        sums = torch.zeros(6, dtype=torch.float64)
        for _, batch in self.held_out.batches(64, self.processes):
            batch = {name: value.to(device) for name, value in batch.items()}
            # The CPU first: not every device knows float64.
            target = advantage_targets(head, batch, self.gae_lambda, self.discount).cpu().double()
            advantage = (batch["directions"] * model(batch["hidden"])).sum(-1).cpu().double()
            products = (advantage, target, advantage.square(), target.square(), advantage * target)
            sums += torch.stack([torch.tensor(float(len(target))).double(), *(x.sum() for x in products)])
        count, a, t, aa, tt, at = torch.stack(self.processes.gather(sums)).sum(0).tolist()
        norm = max((aa - a * a / count) * (tt - t * t / count), 0.0) ** 0.5
        return {
            "advantage_error": (aa - 2 * at + tt) / max(tt, 1e-30),
            "advantage_correlation": (at - a * t / count) / norm if norm > 1e-12 * max(tt, 1e-30) else 0.0,
        }


def _moments(head: ValueHead, episodes: Episodes, gae_lambda: float, discount: float, processes: Processes) -> Moments:
    """Those of the directions and their targets."""
    device = next(head.parameters()).device

    def rows() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _, batch in episodes.batches(64, processes):
            batch = {name: value.to(device) for name, value in batch.items()}
            yield batch["directions"], advantage_targets(head, batch, gae_lambda, discount)[:, None]

    return Moments.of(rows(), (episodes.store.hidden_size, 1), device, processes)


def fit_advantage(
    head: ValueHead,
    states: States | StateStore | str | os.PathLike,
    settings: AdvantageSettings | None = None,
    *,
    critic: ValueHead | None = None,
    output_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
    **changes,
) -> dict[str, Any]:
    r"""
    Fit the advantage part, in place, by least squares on differences of values: `(w_y - w̄(h_t))ᵀ g(h_t) ≈ A_t` (see
    [`value_differences`]). First the static vector b, a g that is the same for all states, by ridge regression in
    closed form (streamed normal equations; the penalty is the one with the smallest held-out error); then the MLP from
    there on, by transformers' Trainer, with the epoch with the smallest held-out error kept, which may be the one
    before the first.

    Args:
        head ([`ValueHead`]):
            A head with a trained V, and with an advantage part, a static vector, or both.
        states:
            The same episodes, with directions.
        settings ([`AdvantageSettings`], *optional*), changes:
            How to train; single settings as keywords. Use the `validation_split` and `seed` of V, so that the same
            prompts are held out.
        critic ([`ValueHead`], *optional*):
            Of [`train_critic`] on the same states: the targets are then its values' differences instead of V's.
        output_dir, progress:
            As for [`train_value_head`].

    Returns:
        On the held-out prompts (which also chose the penalty and the epoch): `advantage_correlation` and
        `constant_correlation`, with their targets, of g and of b; `advantage_error` and `constant_error`, mean
        squared, relative to that of 0; `log`, the Trainer's log. Of g only where there is one.

    Raises:
        `ValueError`: if the head has neither part, or the states have no directions or are not finite.
    """
    settings = AdvantageSettings.of(settings, changes)
    check_training(settings, Processes())
    if head.advantage_mlp is None and not head.config.static_vector:
        raise ValueError(
            "This head has no advantage part and no static vector: give `advantage_sizes` or `static_vector` in its "
            "ValueHeadConfig."
        )
    store = StateStore.of(states)
    if not store.has_directions:
        raise ValueError("The states have no directions: collect them at `lm_head`, with `directions`.")
    values = None if critic is None else critic_values(critic, store, Processes())
    train, held_out = (
        Episodes(store, episodes, head, ["hidden", "directions"], settings.open_truncated, values)
        for episodes in split_by_prompt(store.prompts, settings.validation_split, settings.seed)
    )
    with ExitStack() as stack:
        if output_dir is None:
            output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(own_randomness(settings.seed))
        trainer = AdvantageTrainer(
            AdvantageModel(head),
            train,
            held_out,
            training_options(
                settings,
                output_dir,
                settings.advantage_learning_rate,
                settings.advantage_num_epochs,
                settings.advantage_weight_decay,
            ),
            gae_lambda=settings.gae_lambda,
            discount=settings.discount,
            patience=settings.advantage_patience,
            progress=progress,
        )
        constant = _fit_constant(trainer, head, train, held_out, settings)
        figures = {}
        if head.advantage_mlp is not None:
            figures = _fit_rest(trainer, head, constant["advantage_error"], settings.advantage_num_epochs)
        head.cpu()
        head.value_mlp.requires_grad_(True)
    return figures | {
        "constant_error": constant["advantage_error"],
        "constant_correlation": constant["advantage_correlation"],
        "log": trainer.state.log_history,
    }


def _fit_constant(
    trainer: AdvantageTrainer, head: ValueHead, train: Episodes, held_out: Episodes, settings: AdvantageSettings
) -> dict[str, Any]:
    """Set b, and g to b, in closed form; returns its held-out figures."""
    moments = [
        _moments(head, part, settings.gae_lambda, settings.discount, trainer.processes) for part in (train, held_out)
    ]
    vector = ridge(*moments)[:, 0]
    with torch.no_grad():
        if head.config.static_vector:
            head.static_vector.copy_(vector)
        if head.advantage_mlp is not None:
            *_, last = head.advantage_mlp.layers
            last.weight.zero_()
            last.bias.copy_(vector)
    return trainer.figures()


def _fit_rest(trainer: AdvantageTrainer, head: ValueHead, constant_error: float, num_epochs: int) -> dict[str, Any]:
    """Train g from b on, and keep it if that is better; returns the held-out figures of g then."""
    before = deepcopy(head.advantage_mlp.state_dict())
    if not (num_epochs > 0 and trainer.fit() and trainer.state.best_metric < constant_error):
        head.advantage_mlp.load_state_dict(before)
    figures = trainer.figures()
    if figures["advantage_correlation"] < _USELESS and trainer.processes.index == 0:
        logger.warning(
            f"On held-out prompts g's correlation with its targets is {figures['advantage_correlation']:.3f}: "
            "the advantage edit can hardly steer. Use more rollouts, or another control."
        )
    return figures
