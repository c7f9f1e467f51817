"""States and values to the advantage part: least squares on their differences, the static vector in closed form."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..data.processes import Processes, Progress
from ..data.states import States, StateStore
from ..heads.value_head import ValueHead
from ..settings import AdvantageSettings
from ..utils.code_fingerprints import model_fingerprint
from .critic import critic_values
from .held_out import split_by_prompt
from .ridge import Moments, ridge
from .targets import Episodes, episode_mask, pad_episodes, value_differences
from .token_bias import TokenSums, check_tokens, token_means
from .trainer import EpisodeTrainer, check_training, own_randomness, shape_of, training_options

logger = logging.get_logger(__name__)

# Below this correlation g has found next to nothing.
_USELESS = 0.05
# The token bias is cross-validated over so many parts of the training prompts.
_FOLDS = 5


class AdvantageModel(nn.Module):
    """g of a head, or its static vector if that is all it has, as what the Trainer trains and saves; V is frozen."""

    def __init__(self, head: ValueHead):
        super().__init__()
        self.head = head
        head.value_mlp.requires_grad_(False)
        if head.advantage_mlp is not None:
            head.advantage_mlp.requires_grad_(True)

    def forward(
        self, hidden: torch.Tensor, directions: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        A of drawn tokens, `(states,)`, of `(states, hidden_size)` states and directions and, where the head has a
        token bias, the tokens; its mean under the policy is taken for 0, as it is on average.
        """
        head = self.head
        g = head.static_vector.expand_as(hidden) if head.advantage_mlp is None else head.advantage(hidden)
        advantage = (directions * g).sum(-1).float()
        return advantage if tokens is None else advantage + head.token_bias[tokens]


def _with_target(batch: dict[str, torch.Tensor]) -> torch.Tensor | slice:
    """Which states of a batch have a target: of what follows the last one of an open response nothing is known."""
    if "open_ended" not in batch:
        return slice(None)
    known = torch.ones(int(batch["lengths"].sum()), dtype=torch.bool, device=batch["lengths"].device)
    known[batch["lengths"].cumsum(0)[batch["open_ended"]] - 1] = False
    return known


class AdvantageTargets:
    """
    What an [`AdvantageModel`] reads of the states of a batch of episodes that have a target, one after the other, and
    the targets: `(states,)`, summed over the objectives. They are of a batch's own `values` or, where it has none, of
    V's.

    Args:
        gae_lambda, discount (`float`):
            As for [`fit_advantage`].

    Attributes:
        baseline (`(torch.Tensor, torch.Tensor)`, *optional*):
            Weights `(hidden_size,)` over the scaled state, and a constant: what is taken off.
    """

    def __init__(self, gae_lambda: float, discount: float):
        self.gae_lambda, self.discount = gae_lambda, discount
        self.baseline: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(
        self, head: ValueHead, batch: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        flat = batch["values"] if "values" in batch else head(batch["hidden"]).float()
        differences = value_differences(
            pad_episodes(flat, batch["lengths"]),
            batch["rewards"],
            batch["lengths"],
            self.gae_lambda,
            discount=self.discount,
            open_ended=batch.get("open_ended"),
        )
        chosen = _with_target(batch)
        read = {name: batch[name][chosen] for name in ("hidden", "directions", "tokens") if name in batch}
        targets = differences.sum(-1)[episode_mask(batch["lengths"])][chosen]
        if self.baseline is None:
            return read, targets
        # The dtype first: not every device knows float64.
        weight, constant = (x.to(targets.dtype).to(targets.device) for x in self.baseline)
        return read, targets - head.scaled(read["hidden"]).to(targets) @ weight - constant

    def moments(
        self,
        head: ValueHead,
        episodes: Episodes,
        inputs: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        processes: Processes,
    ) -> Moments:
        """Those of what is taken of the states with a target, `(states, hidden_size)`, and their targets."""
        device = next(head.parameters()).device
        read = (self(head, batch) for _, batch in _on(device, episodes, processes))
        rows = ((inputs(states), targets[:, None]) for states, targets in read)
        return Moments.of(rows, (episodes.store.hidden_size, 1), device, processes)

    def take_off_what_states_explain(
        self, head: ValueHead, train: Episodes, held_out: Episodes, processes: Processes
    ) -> None:
        """
        Set the baseline, by ridge regression. Under the policy an advantage has the mean 0 at each state, whatever the
        errors of the values that it is made of: a mean that differs from state to state would be put down to the
        tokens that are drawn there.
        """

        def scaled(read: dict[str, torch.Tensor]) -> torch.Tensor:
            return head.scaled(read["hidden"]).detach()

        fitted, measured = (self.moments(head, part, scaled, processes) for part in (train, held_out))
        weight = ridge(fitted.around(fitted.x, fitted.y), measured.around(fitted.x, fitted.y))
        self.baseline = weight[:, 0], fitted.y[0] - fitted.x @ weight[:, 0].double()


def _on(
    device: torch.device, episodes: Episodes, processes: Processes
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """As [`Episodes.batches`], of this process's share, on a device."""
    for numbers, batch in episodes.batches(processes):
        yield numbers, {name: value.to(device) for name, value in batch.items()}


class AdvantageTrainer(EpisodeTrainer):
    """
    Fits g by least squares: `(w_y - w̄(h_t))ᵀ g(h_t) + c_y ≈ A_t`.

    Args:
        targets ([`AdvantageTargets`]):
            The A_t.
        args, kwargs:
            As for [`EpisodeTrainer`].
    """

    def __init__(self, *args, targets: AdvantageTargets, **kwargs):
        known = {"gae_lambda": targets.gae_lambda, "discount": targets.discount}
        super().__init__(*args, metric="advantage_error", description="advantage", targets=known, **kwargs)
        self.targets = targets

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of whole episodes."""
        head = self.accelerator.unwrap_model(model).head
        read, targets = self.targets(head, inputs)
        advantage = model(**read)
        loss = (advantage - targets).square().sum() / self.normaliser(inputs)
        return (loss, advantage) if return_outputs else loss

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """`advantage_error` (mean squared, relative to that of 0) and `advantage_correlation`."""
        model = self.accelerator.unwrap_model(self.model)
        head = model.head
        device = next(head.parameters()).device
        sums = torch.zeros(6, dtype=torch.float64)
        for _, batch in _on(device, self.held_out, self.processes):
            # The CPU first: not every device knows float64.
            read, target = self.targets(head, batch)
            target, advantage = target.cpu().double(), model(**read).cpu().double()
            products = (advantage, target, advantage.square(), target.square(), advantage * target)
            sums += torch.stack([torch.tensor(float(len(target))).double(), *(x.sum() for x in products)])
        count, a, t, aa, tt, at = torch.stack(self.processes.gather(sums)).sum(0).tolist()
        norm = max((aa - a * a / count) * (tt - t * t / count), 0.0) ** 0.5
        return {
            "advantage_error": (aa - 2 * at + tt) / max(tt, 1e-30),
            "advantage_correlation": (at - a * t / count) / norm if norm > 1e-12 * max(tt, 1e-30) else 0.0,
        }


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
    Fit the advantage part, in place, by least squares on differences of values (see [`value_differences`]), less what
    of them is linear in the state: `(w_y - w̄(h_t))ᵀ g(h_t) + c_y ≈ A_t`. First the static vector b, a g that is the
    same for all states, by ridge regression in closed form (streamed normal equations; the penalty is the one with the
    smallest held-out error); then, where the head has one, the token bias c, of what b leaves of the targets (see
    [`token_means`]), all zeros if that makes the held-out error no smaller; then the MLP from there on, by
    transformers' Trainer, with the epoch with the smallest held-out error kept, which may be the one before the first.

    Args:
        head ([`ValueHead`]):
            A head with a trained V, and with an advantage part, a static vector, or both.
        states:
            The same episodes, with directions; with the drawn tokens, for a head with a token bias.
        settings ([`AdvantageSettings`], *optional*), changes:
            How to train; single settings as keywords. Use the `validation_split` and `seed` of V, so that the same
            prompts are held out.
        critic ([`ValueHead`], *optional*):
            Of [`train_critic`] on the same states: the targets are then its values' differences instead of V's.
        output_dir, progress:
            As for [`train_value_head`].

    Returns:
        On the held-out prompts (which also chose the penalty and the epoch): `advantage_correlation` and
        `constant_correlation`, with their targets, of g and of b, each with c; `advantage_error` and
        `constant_error`, mean squared, relative to that of 0; `log`, the Trainer's log. Of g only where there is one,
        with `warnings`, which are also logged.

    Raises:
        `ValueError`: if the head has neither part, or the states have no directions, lack the tokens of a token bias
        or are of another vocabulary, or are not finite.
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
    names = ["hidden", "directions"]
    if head.config.token_bias_size is not None:
        check_tokens(store, head.config.token_bias_size)
        names.append("tokens")
    values = None if critic is None else critic_values(critic, store, Processes())
    train, held_out = (
        Episodes(store, episodes, head, names, settings.open_truncated, values)
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
            targets=AdvantageTargets(settings.gae_lambda, settings.discount),
            patience=settings.advantage_patience,
            progress=progress,
            # Of V and the critic, which the targets are of.
            start={
                "head": shape_of(head),
                "value": model_fingerprint(head.value_mlp),
                "critic": critic and model_fingerprint(critic),
            },
        )
        constant = _fit_constant(trainer, head, train, held_out)
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


def _fit_constant(trainer: AdvantageTrainer, head: ValueHead, train: Episodes, held_out: Episodes) -> dict[str, Any]:
    """Set b, g to b, and c, in closed form; returns their held-out figures."""
    targets, processes = trainer.targets, trainer.processes
    targets.take_off_what_states_explain(head, train, held_out, processes)
    moments = [targets.moments(head, part, itemgetter("directions"), processes) for part in (train, held_out)]
    vector = ridge(*moments)[:, 0]
    with torch.no_grad():
        if head.config.static_vector:
            head.static_vector.copy_(vector)
        if head.advantage_mlp is not None:
            *_, last = head.advantage_mlp.layers
            last.weight.zero_()
            last.bias.copy_(vector)
        if head.config.token_bias_size is None:
            return trainer.figures()
        head.token_bias.zero_()
        without = trainer.figures()
        head.token_bias.copy_(token_means(_left_to_tokens(trainer, train)))
        figures = trainer.figures()
        if figures["advantage_error"] < without["advantage_error"]:
            return figures
        head.token_bias.zero_()
        return without


def _left_to_tokens(trainer: AdvantageTrainer, train: Episodes) -> list[TokenSums]:
    """What the static vector leaves of the targets, summed over the states of each token, in folds of prompts."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    head = model.head
    device = next(head.parameters()).device
    folds = [TokenSums.zeros(head.config.token_bias_size) for _ in range(_FOLDS)]
    fold_of = train.store.prompts[train.episodes].unique(return_inverse=True)[1] % _FOLDS
    for numbers, batch in _on(device, train, trainer.processes):
        read, targets = trainer.targets(head, batch)
        left, tokens = (targets - model(**read)).cpu(), read["tokens"].cpu()
        counts = batch["lengths"].cpu()
        if "open_ended" in batch:
            counts = counts - batch["open_ended"].cpu().long()
        own = torch.repeat_interleave(fold_of[numbers], counts)
        for number, fold in enumerate(folds):
            fold.add(tokens[own == number], left[own == number])
    return [TokenSums(*(trainer.processes.sum(x) for x in (fold.count, fold.left))) for fold in folds]


def _fit_rest(trainer: AdvantageTrainer, head: ValueHead, constant_error: float, num_epochs: int) -> dict[str, Any]:
    """Train g from b on, and keep it if that is better; returns the held-out figures of g then."""
    before = deepcopy(head.advantage_mlp.state_dict())
    if not (num_epochs > 0 and trainer.fit() and trainer.state.best_metric < constant_error):
        head.advantage_mlp.load_state_dict(before)
    figures, warnings = trainer.figures(), []
    if figures["advantage_correlation"] < _USELESS:
        warnings.append(
            f"On held-out prompts g's correlation with its targets is {figures['advantage_correlation']:.3f}: "
            "the advantage edit can hardly steer. Use more rollouts, or another control."
        )
    for warning in warnings if trainer.processes.index == 0 else ():
        logger.warning(warning)
    return figures | {"warnings": warnings}
