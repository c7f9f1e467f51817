"""States to a head: V by TD(λ), then the advantage part by least squares on V's differences."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch
from torch.nn.functional import mse_loss
from transformers.utils import logging

from .activations import States
from .configuration import ValueHeadConfig
from .value_head import ValueHead

SCALINGS = ("feature", "scalar", "none")


def td_targets(values: torch.Tensor, rewards: torch.Tensor, lengths: torch.Tensor, td_lambda: float) -> torch.Tensor:
    r"""
    The TD(λ) targets of padded episodes: `v_T = r` at the last state, before it
    `v_t = (1 - λ) V(s_{t+1}) + λ v_{t+1}`. λ=0 is the paper's Bellman target, λ=1 is Monte Carlo.

    Args:
        values (`torch.Tensor` of shape `(episodes, longest, objectives)`):
            V of each state, of any value behind an episode's end. No gradient flows through the targets.
        rewards (`torch.Tensor` of shape `(episodes, objectives)`), lengths (`torch.Tensor` of shape `(episodes,)`):
            Standardised rewards, and the number of states.
        td_lambda (`float`):
            λ in [0, 1].

    Returns:
        `torch.Tensor` of the shape of `values`; meaningless behind an episode's end.
    """
    values = values.detach()
    targets = torch.empty_like(values)
    following = rewards
    last = lengths - 1
    for t in reversed(range(values.shape[1])):
        if t + 1 < values.shape[1]:
            bootstrapped = (1 - td_lambda) * values[:, t + 1] + td_lambda * following
            following = torch.where((last > t)[:, None], bootstrapped, rewards)
        targets[:, t] = following
    return targets


def value_differences(
    values: torch.Tensor, rewards: torch.Tensor, lengths: torch.Tensor, gae_lambda: float = 0.0
) -> torch.Tensor:
    r"""
    The targets of the advantage part, GAE(λ): `δ_t = V(s_{t+1}) - V(s_t)`, `r - V(s_T)` at the last state, and
    `A_t = δ_t + λ A_{t+1}`. Arguments and result as for [`td_targets`].
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    position = torch.arange(values.shape[1], device=values.device)
    following = torch.where((position[None] == lengths[:, None] - 1)[..., None], rewards[:, None], following)
    deltas = (following - values) * (position[None] < lengths[:, None])[..., None]
    advantage = torch.zeros_like(deltas[:, 0])
    result = torch.empty_like(deltas)
    for t in reversed(range(deltas.shape[1])):
        advantage = result[:, t] = deltas[:, t] + gae_lambda * advantage
    return result


class _Episodes:
    """Padded batches of whole episodes out of ragged states."""

    def __init__(self, states: States, indices: torch.Tensor, rewards: torch.Tensor):
        self.states, self.indices, self.rewards = states, indices, rewards
        self.starts = states.lengths.cumsum(0) - states.lengths

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple]:
        """(rows into the states `(episodes, longest)`, their mask, rewards, lengths), shuffled with a generator."""
        order = self.indices
        if generator is not None:
            order = order[torch.randperm(len(order), generator=generator)]
        for chosen in order.split(batch_size):
            lengths = self.states.lengths[chosen]
            position = torch.arange(int(lengths.max()))
            mask = position[None] < lengths[:, None]
            rows = (self.starts[chosen][:, None] + position[None]).where(mask, self.starts[chosen][:, None])
            yield rows, mask, self.rewards[chosen], lengths


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def split_by_prompt(states: States, validation_split: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Numbers of the training and the validation episodes; no prompt is in both.

    Raises:
        `ValueError`: if one side would be empty.
    """
    prompts = states.prompts.unique()
    count = round(len(prompts) * validation_split)
    if not 0 < count < len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts cannot be split with validation_split={validation_split}: at least one prompt is "
            "needed on each side."
        )
    chosen = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:count]]
    held_out = torch.isin(states.prompts, chosen)
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def train_value_head(
    states: States,
    config: ValueHeadConfig,
    *,
    td_lambda: float = 0.95,
    learning_rate: float = 3e-4,
    num_epochs: int = 30,
    batch_size: int = 64,
    weight_decay: float = 0.01,
    scaling: str = "feature",
    validation_split: float = 0.1,
    seed: int = 0,
) -> tuple[ValueHead, dict[str, float]]:
    """
    Train V: `Σ_t (V(s_t) - sg(v_t))²` with the targets of [`td_targets`], AdamW, and the epoch with the smallest
    held-out error kept.

    Args:
        states ([`States`]):
            Episodes with their rewards.
        config ([`ValueHeadConfig`]):
            The head's shape; its `reward_mean` and `reward_std` are set from the training episodes.
        td_lambda (`float`, *optional*, defaults to 0.95):
            λ in [0, 1].
        learning_rate, num_epochs, batch_size, weight_decay (*optional*):
            The optimiser's; `batch_size` in episodes.
        scaling (`str`, *optional*, defaults to `"feature"`):
            `"feature"`: each feature is standardised; `"scalar"`: one scale for all; `"none"`: the paper.
        validation_split (`float`, *optional*, defaults to 0.1):
            Share of the prompts held out.
        seed (`int`, *optional*, defaults to 0):
            Of the split, the initial weights and the order.

    Returns:
        The head and its figures on the held-out prompts (which also chose the epoch): `value_error` (mean squared
        error to the final reward over that of the training episodes' mean reward), `correlation_first` and
        `correlation_last` (with the final reward, at the first and the last token), and `held_out_episodes`, how many
        responses these are of: with a handful they mean little.

    Raises:
        `ValueError`: if sizes do not fit, the data are not finite, or all rewards are equal.
    """
    place, wanted = (states.hook_point, states.layer), (config.hook_point, config.layer)
    if place[0] != wanted[0] or (place != wanted and place[0] == "decoder_layer"):
        raise ValueError(f"The states were read at {place}, the config asks for a head at {wanted}.")
    if states.hidden.shape[1] != config.hidden_size:
        raise ValueError(f"The states are {states.hidden.shape[1]} wide, `hidden_size` is {config.hidden_size}.")
    if states.rewards.shape[1] != config.num_objectives:
        raise ValueError(
            f"The data hold {states.rewards.shape[1]} rewards, `num_objectives` is {config.num_objectives}."
        )
    if not 0 <= td_lambda <= 1:
        raise ValueError(f"`td_lambda` must be between 0 and 1, got {td_lambda}.")
    if scaling not in SCALINGS:
        raise ValueError(f"`scaling` must be one of {SCALINGS}, got {scaling!r}.")
    for name in ("hidden", "rewards"):
        if not torch.isfinite(getattr(states, name)).all():
            raise ValueError(f"The {'states' if name == 'hidden' else name} hold NaN or infinite values.")
    train, held_out = split_by_prompt(states, validation_split, seed)
    mean, std = states.rewards[train].mean(0), states.rewards[train].std(0, correction=0)
    if not (std > 0).all():
        raise ValueError("All rewards are equal, so there is nothing to learn: check the reward function.")
    one = config.num_objectives == 1
    config = replace(
        config,
        reward_mean=mean.item() if one else mean.tolist(),
        reward_std=std.item() if one else std.tolist(),
        base_model_name_or_path=config.base_model_name_or_path or states.base_model_name_or_path,
    )
    rewards = (states.rewards - mean) / std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ValueHead(config)
    _set_scaling(head, states, train, scaling)
    training, validation = _Episodes(states, train, rewards), _Episodes(states, held_out, rewards)

    optimizer = torch.optim.AdamW(head.value_mlp.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    best_error, best_weights = float("inf"), None
    for _ in logging.tqdm(range(num_epochs), desc="value head"):
        for rows, mask, reward, lengths in training.batches(batch_size, generator):
            values = head(states.hidden[rows])
            targets = td_targets(values, reward, lengths, td_lambda)
            loss = mse_loss(values[mask], targets[mask])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error = _value_figures(head, validation)["value_error"]
        if error < best_error:
            best_error, best_weights = error, deepcopy(head.state_dict())
    if best_weights is None:
        raise ValueError("Training diverged (the held-out error is not a number): lower `learning_rate`.")
    head.load_state_dict(best_weights)
    return head, _value_figures(head, validation)


def _set_scaling(head: ValueHead, states: States, train: torch.Tensor, scaling: str) -> None:
    if scaling == "none":
        return
    episodes = torch.repeat_interleave(torch.arange(len(states.lengths)), states.lengths)
    hidden = states.hidden[torch.isin(episodes, train)]
    std, mean = torch.std_mean(hidden, dim=0, correction=0)
    if scaling == "scalar":
        std = (hidden - mean).square().mean().sqrt().expand_as(std)
    # A feature that never varies says nothing: any scale does, as long as it divides.
    head.state_mean.copy_(mean)
    head.state_scale.copy_(std.where(std > 0, torch.ones_like(std)))


@torch.no_grad()
def _value_figures(head: ValueHead, episodes: _Episodes) -> dict[str, float]:
    squared = torch.zeros(())
    baseline = torch.zeros(())
    first, last, realised = [], [], []
    for rows, mask, reward, lengths in episodes.batches(256):
        values = head(episodes.states.hidden[rows])
        final = reward[:, None].expand_as(values)
        squared += (values - final)[mask].square().sum()
        # Standardised on the training episodes, so that their mean reward is 0.
        baseline += final[mask].square().sum()
        first.append(values[:, 0].sum(-1))
        last.append(values[torch.arange(len(lengths)), lengths - 1].sum(-1))
        realised.append(reward.sum(-1))
    realised = torch.cat(realised)
    return {
        "value_error": float(squared / baseline.clamp(min=1e-12)),
        "held_out_episodes": len(realised),
        "correlation_first": _correlation(torch.cat(first), realised),
        "correlation_last": _correlation(torch.cat(last), realised),
    }


def fit_advantage(
    head: ValueHead,
    states: States,
    *,
    gae_lambda: float = 0.0,
    learning_rate: float = 1e-4,
    num_epochs: int = 6,
    batch_size: int = 64,
    validation_split: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    r"""
    Fit g, in place, by least squares on V's differences: `(w_y - w̄(h_t))ᵀ g(h_t) ≈ A_t` (see
    [`value_differences`]). First its constant part, the last layer's bias, by ridge regression in closed form (the
    penalty is the one with the smallest held-out error); then the MLP on what is left, AdamW, with the epoch with the
    smallest held-out error kept, which may be the one before the first.

    Args:
        head ([`ValueHead`]):
            A head with a trained V and an advantage part.
        states ([`States`]):
            The same episodes, with `directions`.
        gae_lambda (`float`, *optional*, defaults to 0.0):
            λ of GAE.
        learning_rate, num_epochs, batch_size (*optional*):
            The MLP's optimiser; `batch_size` in episodes.
        validation_split, seed (*optional*):
            As for [`train_value_head`]: use the same ones, so that the same prompts are held out.

    Returns:
        Correlations with V's differences on the held-out prompts (which also chose the penalty and the epoch):
        `advantage_correlation`, and `constant_correlation` of the constant part alone.

    Raises:
        `ValueError`: if the head has no advantage part or the states have no directions.
    """
    if head.advantage_mlp is None:
        raise ValueError("This head has no advantage part: give `advantage_sizes` in its ValueHeadConfig.")
    if states.directions is None:
        raise ValueError("The states have no directions: collect them with a config that has `advantage_sizes`.")
    if not torch.isfinite(states.directions).all():
        raise ValueError("The directions hold NaN or infinite values.")
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"`gae_lambda` must be between 0 and 1, got {gae_lambda}.")
    train, held_out = split_by_prompt(states, validation_split, seed)
    mean, std = (states.rewards.new_tensor(x) for x in (head.config.reward_mean, head.config.reward_std))
    rewards = (states.rewards - mean) / std
    targets = torch.empty(len(states.hidden))
    with torch.no_grad():
        everything = _Episodes(states, torch.arange(len(states.lengths)), rewards)
        for rows, mask, reward, lengths in everything.batches(256):
            differences = value_differences(head(states.hidden[rows]), reward, lengths, gae_lambda).sum(-1)
            targets[rows[mask]] = differences[mask]
    training, validation = _Episodes(states, train, rewards), _Episodes(states, held_out, rewards)
    *_, last = head.advantage_mlp.layers
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(_ridge(states.directions, targets, _rows(training), _rows(validation)))
    constant = _advantage_figures(head, states, targets, validation)

    optimizer = torch.optim.AdamW(head.advantage_mlp.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best_error, best_weights = constant[0], deepcopy(head.advantage_mlp.state_dict())
    for _ in logging.tqdm(range(num_epochs), desc="advantage"):
        for rows, mask, *_ in training.batches(batch_size, generator):
            chosen = rows[mask]
            advantage = (states.directions[chosen] * head.advantage(states.hidden[chosen])).sum(-1)
            loss = mse_loss(advantage, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error, _ = _advantage_figures(head, states, targets, validation)
        if error < best_error:
            best_error, best_weights = error, deepcopy(head.advantage_mlp.state_dict())
    head.advantage_mlp.load_state_dict(best_weights)
    return {
        "advantage_correlation": _advantage_figures(head, states, targets, validation)[1],
        "constant_correlation": constant[1],
    }


def _rows(episodes: _Episodes) -> torch.Tensor:
    return torch.cat([rows[mask] for rows, mask, *_ in episodes.batches(256)])


def _ridge(inputs: torch.Tensor, targets: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """The vector b of `min ‖X b - y‖² + ρ‖b‖²` on the training rows, for the ρ that is best on the others."""
    x, y = inputs[train].double(), targets[train].double()
    eigenvalues, basis = torch.linalg.eigh(x.T @ x / len(x))
    projected = basis.T @ (x.T @ y / len(x))
    x, y = inputs[held_out].double(), targets[held_out].double()
    penalties = eigenvalues.max() * torch.logspace(-6, 2, 17, dtype=torch.float64)
    solutions = [basis @ (projected / (eigenvalues.clamp(min=0) + penalty)) for penalty in penalties]
    return min(solutions, key=lambda b: float((x @ b - y).square().mean())).float()


@torch.no_grad()
def _advantage_figures(
    head: ValueHead, states: States, targets: torch.Tensor, episodes: _Episodes
) -> tuple[float, float]:
    rows = _rows(episodes)
    advantage = (states.directions[rows] * head.advantage(states.hidden[rows])).sum(-1)
    return float(mse_loss(advantage, targets[rows])), _correlation(advantage, targets[rows])
