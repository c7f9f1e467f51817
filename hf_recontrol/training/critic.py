"""A critic: a value function that sees more than the head can, only to give the advantage part its targets."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from ..configuration import ValueHeadConfig
from ..data.processes import Processes, Progress
from ..data.states import StateStore
from ..heads.value_head import ValueHead
from ..settings import ValueSettings
from .targets import pad_episodes
from .value import fit_values

# Episodes whose values are computed at once.
_EPISODES_AT_ONCE = 64


class CriticStore(StateStore):
    """
    States as a critic reads them, `(states, hidden_size + 2 * context_size)`: the head's own, those of another layer,
    and the mean of these over the response up to there.

    Args:
        store ([`StateStore`]):
            States with a context.
    """

    def __init__(self, store: StateStore):
        super().__init__(store.parts, store.folder)
        self._store = store

    def __reduce__(self):
        return CriticStore, (self._store,)

    @property
    def hidden_size(self) -> int:
        part = self.parts[0]
        return part.hidden.shape[1] + 2 * part.context.shape[1]

    def gather(self, name: str, episodes: torch.Tensor) -> torch.Tensor:
        """As [`StateStore.gather`], with `"hidden"` what the critic reads."""
        if name != "hidden":
            return super().gather(name, episodes)
        context = super().gather("context", episodes)
        mean = running_mean(context, self.lengths[episodes])
        return torch.cat([super().gather("hidden", episodes), context, mean], dim=1)


def running_mean(flat: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of episodes one after the other, `(states, width)`: the mean of each one's states up to and with this one."""
    position = torch.arange(len(flat)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    padded = pad_episodes(flat, lengths).cumsum(1)
    return padded[pad_episodes(torch.ones(len(flat)), lengths) > 0] / (position + 1)[:, None]


def train_critic(
    store: StateStore,
    config: ValueHeadConfig,
    settings: ValueSettings,
    *,
    output_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> tuple[ValueHead, dict[str, Any]]:
    """
    Train a critic as [`train_value_head`] trains V: the same shape, episodes and targets.

    Args:
        store ([`StateStore`]):
            States with a context.
        config ([`ValueHeadConfig`]):
            The head's.
        settings ([`ValueSettings`]):
            How to train.
        output_dir, progress:
            As for [`train_value_head`].

    Returns:
        The critic, a value head over what [`CriticStore`] holds, and its figures.

    Raises:
        As [`train_value_head`].
    """
    wide = CriticStore(store)
    config = replace(config, hidden_size=wide.hidden_size, advantage_sizes=None, static_vector=False)
    return fit_values(wide, config, settings, output_dir, progress=progress)


@torch.no_grad()
def critic_values(critic: ValueHead, store: StateStore, processes: Processes) -> list[torch.Tensor]:
    """Standardised values of each episode's states, `(states, objectives)` each."""
    wide, critic = CriticStore(store), critic.to(processes.device)
    values: list[torch.Tensor] = []
    for episodes in torch.arange(len(wide)).split(_EPISODES_AT_ONCE):
        flat = critic(wide.gather("hidden", episodes).to(processes.device)).float().cpu()
        values += flat.split(wide.lengths[episodes].tolist())
    critic.cpu()
    return values
