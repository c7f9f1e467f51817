"""
Whole episodes in batches, their targets without a loop over tokens (TD(λ) for V, GAE(λ) for the advantage), and what a
critic reads of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset

from ..data.processes import Processes
from ..data.states import StateStore, places
from ..heads.value_head import ValueHead

# Numbers that are read at once (256 MB), and episodes at most.
_NUMBERS_AT_ONCE, _EPISODES_AT_ONCE = 2**26, 64


def episodes_at_once(store: StateStore, num_tensors: int = 1, most: int = _EPISODES_AT_ONCE) -> int:
    """How many whole episodes are read at once, `num_tensors` as wide as a state of each: fewer of what is large."""
    longest = int(store.lengths.max()) * store.hidden_size * num_tensors
    return max(1, min(most, _NUMBERS_AT_ONCE // longest))


class Episodes(Dataset):
    """
    Whole episodes of a store, fetched a batch at a time: `hidden` (and `directions`) of shape `(states, hidden_size)`,
    and `tokens` of shape `(states,)`, one episode after the other, as far as they are named, with `lengths`,
    standardised `rewards`, `open_ended` and, where they are given, the `values` of each state.
    """

    def __init__(
        self,
        store: StateStore,
        episodes: torch.Tensor,
        head: ValueHead,
        names: list[str],
        open_ended: bool,
        values: Sequence[torch.Tensor] | None = None,
    ):
        self.store, self.episodes, self.names, self.open_ended = store, episodes, names, open_ended
        self.values = values
        self.mean, self.std = (
            torch.tensor(x, dtype=torch.float64) for x in (head.config.reward_mean, head.config.reward_std)
        )

    def __len__(self) -> int:
        return len(self.episodes)

    def rewards(self, episodes: torch.Tensor) -> torch.Tensor:
        """Standardised rewards of episodes of the store, in float32."""
        return ((self.store.rewards[episodes].double() - self.mean) / self.std).float()

    def fingerprint(self) -> str:
        """What tells them from other episodes: their prompts, lengths and rewards, and the states of the first."""
        store = self.store
        parts = [store.prompts[self.episodes], store.lengths[self.episodes], self.rewards(self.episodes)]
        parts += [store.gather(name, self.episodes[:1]).float() for name in self.names]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        chosen = self.episodes[torch.as_tensor(indices)]
        batch = {name: self.store.gather(name, chosen) for name in self.names}
        batch |= {"lengths": self.store.lengths[chosen], "rewards": self.rewards(chosen)}
        if self.values is not None:
            batch["values"] = torch.cat([self.values[i] for i in chosen.tolist()])
        return batch | ({"open_ended": ~self.store.finished[chosen]} if self.open_ended else {})

    def batches(self, processes: Processes) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """(numbers of the episodes, batch) of this process's share, in order; as many as [`episodes_at_once`]."""
        numbers = torch.arange(len(self))[processes.index :: processes.count]
        size = episodes_at_once(self.store, len(set(self.names) - {"tokens"}))
        for part in numbers.split(size) if len(numbers) else ():
            yield part, self.__getitems__(part.tolist())


def pad_episodes(flat: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Episodes one after the other, `(states, ...)`, to `(episodes, longest, ...)`; 0 behind an episode's end."""
    mask = episode_mask(lengths)
    padded = flat.new_zeros(*mask.shape, *flat.shape[1:])
    padded[mask] = flat
    return padded


def episode_mask(lengths: torch.Tensor) -> torch.Tensor:
    """True at the states of each episode: shape `(episodes, longest)`."""
    return torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]


def _scan(offsets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """
    `x_t = offsets_t + factors_t x_{t+1}` along dimension 1, with 0 behind the end, in log₂(length) steps: each doubles
    how many states one term spans (Hillis & Steele, 1986).
    """
    offsets, factors, span = offsets.clone(), factors.clone(), 1
    while span < offsets.shape[1]:
        offsets[:, :-span] += factors[:, :-span] * offsets[:, span:]
        # Behind the last full span nothing follows.
        factors[:, :-span] *= factors[:, span:].clone()
        factors[:, -span:] = 0
        span *= 2
    return offsets


def td_targets(
    values: torch.Tensor,
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    td_lambda: float,
    *,
    discount: float = 1.0,
    open_ended: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The TD(λ) targets of padded episodes: `v_T = r` at the last state, before it
    `v_t = γ ((1 - λ) V(s_{t+1}) + λ v_{t+1})`. λ=0 is the paper's Bellman target, λ=1 is Monte Carlo.

    Args:
        values (`torch.Tensor` of shape `(episodes, longest, objectives)`):
            V of each state, of any finite value behind an episode's end. No gradient flows through the targets.
        rewards (`torch.Tensor` of shape `(episodes, objectives)`), lengths (`torch.Tensor` of shape `(episodes,)`):
            Standardised rewards, and the number of states.
        td_lambda (`float`), discount (`float`, *optional*, defaults to 1.0):
            λ and γ in [0, 1].
        open_ended (`torch.Tensor` of shape `(episodes,)`, *optional*):
            Episodes that were cut off: there `v_T = V(s_T)` (bootstrapping), so their last state teaches nothing and
            their reward is not used.

    Returns:
        `torch.Tensor` of the shape of `values`; 0 behind an episode's end.
    """
    values = values.detach()
    last, inside, ends = _ends(values, rewards, lengths, open_ended)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    offsets = torch.where(last, ends, discount * (1 - td_lambda) * following) * inside
    return _scan(offsets, _factors(last, inside, values, discount * td_lambda))


def value_differences(
    values: torch.Tensor,
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    gae_lambda: float = 0.0,
    *,
    discount: float = 1.0,
    open_ended: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The targets of the advantage part, GAE(λ): `δ_t = γ V(s_{t+1}) - V(s_t)`, `r - V(s_T)` at the last state (0 in
    `open_ended` episodes), and `A_t = δ_t + γ λ A_{t+1}`. Arguments and result as for [`td_targets`].
    """
    values = values.detach()
    last, inside, ends = _ends(values, rewards, lengths, open_ended)
    following = discount * torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (torch.where(last, ends, following) - values) * inside
    return _scan(deltas, _factors(last, inside, values, discount * gae_lambda))


def _factors(last: torch.Tensor, inside: torch.Tensor, values: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.full_like(values, factor).masked_fill(last | ~inside, 0.0)


def _ends(
    values: torch.Tensor, rewards: torch.Tensor, lengths: torch.Tensor, open_ended: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each episode's last state is, where its states are, and what follows its last one."""
    last = (torch.arange(values.shape[1], device=values.device)[None] == lengths[:, None] - 1)[..., None]
    ends = rewards[:, None].expand_as(values)
    if open_ended is not None:
        ends = torch.where(open_ended[:, None, None], values, ends)
    return last, episode_mask(lengths)[..., None], ends


def sum_before(flat: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of episodes one after the other, `(states, width)`: the sum of each one's rows before this one."""
    return pad_episodes(flat, lengths).cumsum(1)[episode_mask(lengths)] - flat


def running_mean(flat: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of episodes one after the other, `(states, width)`: the mean of each one's states up to and with this one."""
    return (sum_before(flat, lengths) + flat) / (places(lengths) + 1)[:, None]


def critic_inputs(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    prefix_rewards: torch.Tensor,
    context: torch.Tensor | None,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """
    What a critic reads at the states of whole episodes, one after the other: `(states, columns)`.

    Args:
        hidden, directions (`torch.Tensor` of shape `(states, hidden_size)`):
            Of [`States`].
        prefix_rewards (`torch.Tensor` of shape `(states, num_objectives)`, or `(states, 0)`):
            As [`StateStore.prefix_rewards`] gives them.
        context (`torch.Tensor` of shape `(states, context_size)`, *optional*):
            The states of another layer.
        lengths (`torch.Tensor` of shape `(episodes,)`):
            How many states each episode has.
    """
    columns = [hidden, sum_before(directions, lengths), prefix_rewards]
    if context is not None:
        columns += [context, running_mean(context, lengths)]
    return torch.cat(columns, dim=1)
