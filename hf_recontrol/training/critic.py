"""A critic: a linear value function that sees more than the head can, only to give the advantage part its targets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..configuration import ValueHeadConfig
from ..data.processes import Processes
from ..data.stage_folder import read_manifest
from ..data.states import States, StateStore, places
from ..heads.value_head import ValueHead
from ..settings import ValueSettings
from .ridge import Moments, ridge
from .targets import Episodes, critic_inputs, episode_mask, episodes_at_once, td_targets
from .value import check_states, measure, new_head, sides

# The reward of the response so far is one number among hundreds and says more than any other: in a smaller unit it is
# penalised less.
_PREFIX_UNIT = 0.1


class CriticStore(StateStore):
    """
    States as a critic reads them: the head's own; the sum of the directions so far (of the states that are kept);
    where there are any, the rewards of the response so far, and the states of another layer with their mean over the
    response so far.

    Args:
        store ([`StateStore`]):
            States with directions.
    """

    def __init__(self, store: StateStore):
        super().__init__(store.parts, store.folders)
        self._store = store

    def __reduce__(self):
        return CriticStore, (self._store,)

    @property
    def hidden_size(self) -> int:
        part = self.parts[0]
        others = self.prefix_columns.numel() + (2 * part.context.shape[1] if self.has_context else 0)
        return 2 * part.hidden.shape[1] + others

    @property
    def prefix_columns(self) -> torch.Tensor:
        """Which columns hold the rewards of the response so far."""
        count = self.rewards.shape[1] if self.has_prefix_rewards else 0
        return 2 * self.parts[0].hidden.shape[1] + torch.arange(count)

    def gather(self, name: str, episodes: torch.Tensor) -> torch.Tensor:
        """As [`StateStore.gather`], with `"hidden"` what the critic reads."""
        if name != "hidden":
            return super().gather(name, episodes)
        return critic_inputs(
            super().gather("hidden", episodes),
            super().gather("directions", episodes),
            self.prefix_rewards(episodes),
            super().gather("context", episodes) if self.has_context else None,
            self.lengths[episodes],
        )


def train_critic(
    states: States | StateStore | str | os.PathLike,
    config: ValueHeadConfig,
    settings: ValueSettings | None = None,
    **changes,
) -> tuple[ValueHead, dict[str, Any]]:
    r"""
    Fit a critic: the linear V of all that training knows of the response so far which is nearest to the reward at all
    states, by ridge regression in closed form, with the penalty that is best on the held-out prompts. It reads the
    state, the sum of the directions of the tokens drawn so far and, where the states hold them, the rewards of the
    response so far and the states of another layer with their mean. It is linear, because its differences from token
    to token are what is used, and those of a network that was fitted to a few thousand rewards are mostly noise.

    Args:
        states ([`States`], [`StateStore`], or folder of `recontrol states`):
            Episodes with their rewards and directions.
        config ([`ValueHeadConfig`]):
            The head's.
        settings ([`ValueSettings`], *optional*), changes:
            Of these `validation_split`, `seed`, `open_truncated` and `discount` count, as for [`train_value_head`].

    Returns:
        The critic, for [`fit_advantage`] (a value head without a hidden layer, over what it reads), and its figures,
        see [`value_figures`], with `reads`: what must be known to give it other responses.

    Raises:
        `ValueError`: if the states have no directions; else as [`train_value_head`].
    """
    store, settings, processes = StateStore.of(states), ValueSettings.of(settings, changes), Processes()
    if not store.has_directions:
        raise ValueError("The states have no directions: collect them at `lm_head`, with `directions`.")
    check_states(store, config)
    wide = CriticStore(store)
    config = replace(
        config,
        hidden_size=wide.hidden_size,
        head_sizes=[],
        advantage_sizes=None,
        static_vector=False,
        token_bias_size=None,
    )
    train, rewarded, held_out = sides(store, settings)
    critic = new_head(wide, config, train, rewarded, "feature", settings.seed)
    critic.state_scale[wide.prefix_columns] *= _PREFIX_UNIT
    critic = critic.to(processes.device)
    parts = [Episodes(wide, chosen, critic, ["hidden"], open_ended=False) for chosen in (rewarded, held_out)]
    fitted, measured = (
        Moments.of(
            _rows(critic, part, settings.discount, processes),
            (wide.hidden_size, config.num_objectives),
            processes.device,
            processes,
        )
        for part in parts
    )
    weight = ridge(fitted.around(fitted.x, fitted.y), measured.around(fitted.x, fitted.y))
    [layer] = critic.value_mlp.layers
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(fitted.y - fitted.x @ weight.double())
    figures = measure(critic, parts[1], processes, settings.discount)
    return critic.cpu(), figures | {"reads": _reads(store)}


def _reads(store: StateStore) -> dict[str, Any]:
    """How the states were made that a critic reads, as JSON."""
    part, prefix_every, means = store.parts[0], None, None
    if store.has_prefix_rewards:
        manifests = [read_manifest(folder, "states", "recontrol states") for folder in store.folders]
        found = {manifest["source"].get("prefix_every") for manifest in manifests}
        prefix_every = found.pop() if len(found) == 1 else None
        means = _prefix_means(store).tolist()
    return {
        "every": part.every,
        "critic_layer": part.context_layer,
        "prefix_every": prefix_every,
        "prefix_means": means,
    }


def _prefix_means(store: StateStore) -> torch.Tensor:
    """
    What [`StateStore.prefix_rewards`] takes off at each place, `(places, num_objectives)`; where no reward is known,
    what it takes off before that, or first.
    """
    given = torch.cat([part.prefix_rewards for part in store.parts]).double()
    known = given.isfinite().all(1)
    taken_off = (given - store.prefix_rewards(torch.arange(len(store))))[known]
    at, first = places(store.lengths)[known].unique(return_inverse=True)
    if not len(at):
        return given.new_zeros(1, given.shape[1])
    means = given.new_empty(len(at), given.shape[1]).index_copy_(0, first, taken_off)
    before = torch.searchsorted(at, torch.arange(int(store.lengths.max())), right=True) - 1
    return means[before.clamp(min=0)]


@torch.no_grad()
def _rows(
    critic: ValueHead, episodes: Episodes, discount: float, processes: Processes
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the critic reads at each state of this process's share, in its units, and the discounted reward."""
    for _, batch in episodes.batches(processes):
        lengths = batch["lengths"]
        nothing = torch.zeros(*episode_mask(lengths).shape, batch["rewards"].shape[1])
        targets = td_targets(nothing, batch["rewards"], lengths, 1.0, discount=discount)[episode_mask(lengths)]
        yield critic.scaled(batch["hidden"].to(processes.device)), targets


@torch.no_grad()
def critic_values(critic: ValueHead, store: StateStore, processes: Processes) -> list[torch.Tensor]:
    """Standardised values of each episode's states, `(states, objectives)` each."""
    wide, critic = CriticStore(store), critic.to(processes.device)
    values: list[torch.Tensor] = []
    for episodes in torch.arange(len(wide)).split(episodes_at_once(wide)):
        flat = critic(wide.gather("hidden", episodes).to(processes.device)).float().cpu()
        values += flat.split(wide.lengths[episodes].tolist())
    critic.cpu()
    return values
