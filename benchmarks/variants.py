"""
What makes a better static vector and g, measured without sampling: parts trained in several ways on one set of states,
by what they earn on responses to prompts that they were not trained on.

    python benchmarks/variants.py --fit FOLDER --output variants [--folds 4] [--ways WAY ...]

`--fit` is a folder of `recontrol fit` with `prefix_every`; ways with other k than multiples of that are left out. What
is earned is the first term of the series in the step size, as in `hf_recontrol.data_curve`: with `ℓ = Σ_t (w_y - w̄)ᵀ
u(h_t) + c_y - c̄(h_t)` of a response, u the edit and c the token bias, where there is one, `√2 Cov(ℓ, r) / sd(ℓ)`, in
deviations of the reward for the root of a nat a response. What of the reward the prompt alone explains (a ridge
regression on the first state) is taken off. Differences are to the static vector of the first way; intervals are 95 %,
by the jackknife over prompts. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_recontrol
from hf_recontrol import (
    States,
    StateStore,
    ValueHead,
    ValueHeadConfig,
    ValueSettings,
    fit_advantage,
    train_critic,
    train_value_head,
)

# λ of GAE; whether there is a critic; after how many tokens the response so far was scored for it, if it was; whether
# there is a token bias.
WAYS = {
    "V, λ 0": (0.0, False, None, False),
    "V, λ 0.8": (0.8, False, None, False),
    "critic, λ 0": (0.0, True, None, False),
    "critic, λ 0.8": (0.8, True, None, False),
    "critic, λ 0.8, tokens": (0.8, True, None, True),
    "critic, every 16, λ 0.8": (0.8, True, 16, False),
    "critic, every 8, λ 0.8": (0.8, True, 8, False),
    "critic, every 8, λ 0.8, tokens": (0.8, True, 8, True),
    "critic, every 4, λ 0": (0.0, True, 4, False),
    "critic, every 4, λ 0.5": (0.5, True, 4, False),
    "critic, every 4, λ 0.8": (0.8, True, 4, False),
    "critic, every 4, λ 0.5, tokens": (0.5, True, 4, True),
    "critic, every 4, λ 0.8, tokens": (0.8, True, 4, True),
    "critic, every 1, λ 0.5": (0.5, True, 1, False),
    "critic, every 1, λ 0.8": (0.8, True, 1, False),
    "critic, every 1, λ 0.5, tokens": (0.5, True, 1, True),
    "critic, every 1, λ 0.8, tokens": (0.8, True, 1, True),
}


@dataclass
class Pool:
    """All states of a fit in memory, and which fold each prompt is in."""

    store: StateStore
    folds: int
    temperature: float

    @classmethod
    def of(cls, fit: Path, folds: int) -> Pool:
        """The states of a folder of `recontrol fit`."""
        trained = ValueHeadConfig.from_json_file(fit / "head" / "config.json")
        return cls(StateStore.open(fit / "states"), folds, trained.training.sampling["temperature"])

    def __post_init__(self):
        store, everything = self.store, torch.arange(len(self.store))
        self.tokens = store.gather("tokens", everything)
        name = store.read_at["base_model_name_or_path"]
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        self.rows = base.get_output_embeddings().weight.detach()
        self.hidden, self.directions = (store.gather(name, everything) for name in ("hidden", "directions"))
        self.so_far = torch.cat([p.prefix_rewards for p in store.parts]) if store.has_prefix_rewards else None
        self.first = store.lengths.cumsum(0) - store.lengths
        self.episode = torch.repeat_interleave(everything, store.lengths)
        self.position = torch.arange(len(self.hidden)) - self.first[self.episode]
        distinct, self.prompt = store.prompts.unique(return_inverse=True)
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))
        self.fold = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) % self.folds)[self.prompt]
        rewards = store.rewards.double().sum(-1)
        self.rewards = (rewards - rewards.mean()) / rewards.std()
        self.left = self.rewards - self.by_prompt()

    def by_prompt(self) -> torch.Tensor:
        """What the first state says of the reward, fitted on the other folds."""
        first, found = self.hidden[self.first].double(), torch.empty_like(self.rewards)
        for number in range(self.folds):
            own = self.fold == number
            x, y = first[~own], self.rewards[~own]
            mean, scale = x.mean(0), x.std(0).clamp_min(1e-9)
            x = (x - mean) / scale
            square = x.T @ x + len(x) * torch.eye(x.shape[1], dtype=torch.float64)
            weight = torch.linalg.solve(square, x.T @ (y - y.mean()))
            found[own] = (first[own] - mean) / scale @ weight + y.mean()
        return found

    def part(self, episodes: torch.Tensor, every: int | None) -> States:
        """Some episodes; with the rewards of the response so far as they are known after every k-th token."""
        store, rows = self.store, torch.isin(self.episode, episodes)
        so_far = None
        if every is not None:
            if self.so_far is None:
                raise ValueError("The fit has no rewards of the response so far: it needs `prefix_every`.")
            so_far = self.so_far[self.first[self.episode] + self.position // every * every][rows]
        return States(
            self.hidden[rows],
            store.lengths[episodes],
            store.rewards[episodes],
            store.prompts[episodes],
            store.finished[episodes],
            directions=self.directions[rows],
            prefix_rewards=so_far,
            tokens=self.tokens[rows],
            vocabulary_size=len(self.rows),
        )

    @torch.no_grad()
    def scores(self, episodes: torch.Tensor, shifts: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """ℓ of each episode, of what gives the drawn tokens' shifts at some states."""
        found = torch.zeros(len(self.rewards), dtype=torch.float64)
        for rows in torch.isin(self.episode, episodes).nonzero()[:, 0].split(1024):
            found.index_add_(0, self.episode[rows], shifts(rows).double())
        return found[episodes]

    def by_edit(self, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Shifts by an edit of the state."""
        return lambda rows: (self.directions[rows] * edit(self.hidden[rows])).sum(-1)

    def by_bias(self, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Shifts by a token bias."""

        def shifts(rows: torch.Tensor) -> torch.Tensor:
            policy = torch.softmax(self.hidden[rows] @ self.rows.T / self.temperature, -1)
            return bias[self.tokens[rows]] - policy @ bias

        return shifts

    def interval(self, earned: torch.Tensor) -> tuple[float, float]:
        """(mean over responses, half of its interval's width)."""
        counts = torch.bincount(self.prompt).double()
        sums = torch.zeros_like(counts).index_add_(0, self.prompt, earned)
        without = (sums.sum() - sums) / (counts.sum() - counts)
        spread = (len(counts) - 1) / len(counts) * (without - without.mean()).square().sum()
        return float(earned.mean()), 1.96 * float(spread.sqrt())

    def earned(self, scores: Sequence[Sequence[float]]) -> torch.Tensor:
        """What each response earns, of the scores ℓ of each fold's responses, in the folds' order."""
        found = torch.zeros_like(self.left)
        for fold, each in enumerate(scores):
            own, shift = self.fold == fold, torch.tensor(each, dtype=torch.float64)
            found[own] = math.sqrt(2) * shift / shift.std() * self.left[own]
        return found


def shape_of(trained: ValueHeadConfig) -> ValueHeadConfig:
    """The configuration of a head of a trained one's shape, with a static vector and without a token bias."""
    return ValueHeadConfig(
        trained.hidden_size,
        head_sizes=trained.head_sizes,
        activation=trained.activation,
        num_objectives=trained.num_objectives,
        hook_point=trained.hook_point,
        advantage_sizes=trained.advantage_sizes,
        static_vector=True,
    )


def folder_of(output: Path, pool: Pool) -> Path:
    """Where what is measured of these states by this code is kept."""
    digest = hashlib.sha256()
    for tensor in (pool.store.rewards, pool.tokens, pool.hidden, pool.directions, pool.so_far):
        if tensor is not None:
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    for file in sorted(Path(hf_recontrol.__file__).with_name("training").glob("*.py")):
        digest.update(file.read_bytes())
    folder = output / digest.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(path: Path, found: dict[str, Any]) -> None:
    """Write what was measured, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(path)


def scores_of(way: str, pool: Pool, fold: int, config: ValueHeadConfig, output: Path) -> dict[str, list[float]]:
    """ℓ of the responses of a fold under the two parts that were trained on the others in one way."""
    kept = output / f"{way}, fold {fold} of {pool.folds}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    gae_lambda, with_critic, every, with_tokens = WAYS[way]
    train, own = (pool.fold != fold).nonzero()[:, 0], (pool.fold == fold).nonzero()[:, 0]
    states = pool.part(train, every)
    value = output / f"V of fold {fold} of {pool.folds}"
    if not (value / "config.json").is_file():
        head, _ = train_value_head(states, config)
        head.save_pretrained(value)
    config = ValueHeadConfig.from_json_file(value / "config.json")
    head = ValueHead(replace(config, token_bias_size=len(pool.rows) if with_tokens else None))
    head.load_state_dict(load_file(value / "model.safetensors"), strict=not with_tokens)
    critic = train_critic(states, config, ValueSettings())[0] if with_critic else None
    fit_advantage(head, states, gae_lambda=gae_lambda, critic=critic)
    edits = {"static vector": head.static_vector.expand_as, "g": head.advantage}
    by_bias = pool.scores(own, pool.by_bias(head.token_bias)) if with_tokens else 0
    found: dict[str, Any] = {
        part: (pool.scores(own, pool.by_edit(edit)) + by_bias).tolist() for part, edit in edits.items()
    }
    keep(kept, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    trained = ValueHeadConfig.from_json_file(arguments.fit / "head" / "config.json")
    pool = Pool.of(arguments.fit, arguments.folds)
    output = folder_of(arguments.output, pool)
    scored_every = json.loads((arguments.fit / "rollouts" / "manifest.json").read_text(encoding="utf-8"))[
        "prefix_every"
    ]
    ways = [way for way in arguments.ways if WAYS[way][2] is None or WAYS[way][2] % scored_every == 0]
    config = shape_of(trained)
    reference = None
    print(f"{len(pool.rewards)} responses\n\n| way | part | gain | difference |\n|---|---|---:|---:|")
    for way in ways:
        found = [scores_of(way, pool, fold, config, output) for fold in range(arguments.folds)]
        for part in ("static vector", "g"):
            earned = pool.earned([scores[part] for scores in found])
            reference = earned if reference is None else reference
            (gain, half), (more, width) = pool.interval(earned), pool.interval(earned - reference)
            print(
                f"| {way} | {part} | {gain:.3f} [{gain - half:.3f}, {gain + half:.3f}] "
                f"| {more:+.3f} [{more - width:+.3f}, {more + width:+.3f}] |",
                flush=True,
            )


if __name__ == "__main__":
    main()
