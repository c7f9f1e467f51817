"""
What the static vector and g should learn from: heads of one set of scored rollouts, compared at equal KL.

    python benchmarks/targets.py --fit FOLDER --reward hf_recontrol:vader --prompts FILE --held-out FILE \
        --output targets [--heads none critic-16 branches-16 ...] [--kl 0.1]
    python benchmarks/targets.py --output targets --table

`--fit` is a folder of `recontrol fit`, whose base, sampling settings and scored rollouts are used. Heads:

- `none`: targets are the differences of V, along the tokens that were drawn, without GAE.
- `critic-L`: those of a critic that also reads decoder layer L, as `fit` takes them.
- `branches-L`: the values that this critic gives to the states after each of the likeliest tokens, of every third
  state: `Σ_y p(y) ((w_y - w̄)ᵀ g(h) - (V(s') - Σ_y' p(y') V(s'')))²`, p the base's probabilities of these tokens.

Of each head the static vector and g answer `--prompts` at the strengths found on `--held-out` for each KL. Differences
are to the static vector of `none` at the same KL, paired over prompts. All of it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_recontrol import (
    CompareSettings,
    Prompts,
    Rollout,
    StateStore,
    ValueHead,
    compare,
    load_prompts,
    load_rollouts,
    paired_interval,
    split_by_prompt,
    train_head,
    write_states,
)

CONTROLS = [{"kind": "base"}, {"kind": "static_vector"}, {"kind": "advantage"}]
METRICS = ("reward", "judge", "diversity", "kl_per_token", "kl_per_response")
TOKENS, EVERY = 8, 3
PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)
EPOCHS, RATE, BATCH = 4, 3e-4, 256


@dataclass
class Run:
    """What all heads share."""

    model: Any
    tokenizer: Any
    fit: Path
    output: Path
    reward: str
    judge: str | None
    prompts: Prompts
    held_out: Prompts
    kl: tuple[float, ...]
    sampling: dict[str, Any]
    every_rollout: int = 1

    def make(self, name: str) -> None:
        """Train one head and compare its methods."""
        folder = self.output / name
        if not (folder / "comparison" / "table.md").is_file():
            kind, _, layer = name.partition("-")
            layer = int(layer) if layer else None
            states = self.output / f"states-{layer}"
            write_states(states, self.model, self.fit / "rollouts", critic_layer=layer, states_dtype="float32")
            trained = self.output / (name if kind != "branches" else f"critic-{layer}") / "head"
            # Branches say nothing of a token bias.
            without = {"token_bias": False} | ({} if layer else {"critic": False, "gae_lambda": 0.0})
            train_head(trained, states, **without)
            if kind == "branches" and not (folder / "head" / "config.json").is_file():
                self.learn_from_branches(folder / "head", trained, states, layer)
            compare(
                self.model,
                self.prompts,
                self.reward,
                folder / "comparison",
                CompareSettings(
                    kl=self.kl,
                    perplexity=False,
                    batch_size=64,
                    part_size=64,
                    on_seen_prompts="skip",
                    **self.sampling,
                ),
                head=folder / "head",
                judge=self.judge,
                controls=CONTROLS,
                held_out=self.held_out,
                tokenizer=self.tokenizer,
            )

    def learn_from_branches(self, target: Path, trained: Path, states: Path, layer: int) -> None:
        """A head with b and g fitted to what the critic says of the likeliest tokens."""
        head = ValueHead.from_pretrained(trained)
        critic = ValueHead.from_pretrained(trained / "training" / "critic")
        kept = states.with_name(f"branches-{layer}.pt")
        if not kept.is_file():
            torch.save(self.branches(critic, layer), kept)
        found = torch.load(kept, weights_only=True)
        # The episodes of the states are the rollouts that have a token and a reward, in their order.
        store = StateStore.open(states)
        sides = split_by_prompt(store.prompts, 0.1, 0)
        train, held_out = (torch.isin(found["episode"], side) for side in sides)
        rows = self.model.get_output_embeddings().weight.detach()
        b = ridge(*(moments(found, side, rows) for side in (train, held_out)))
        error = learn_g(head, found, train, held_out, rows, b)
        with torch.no_grad():
            head.static_vector.copy_(b)
        print(f"branches-{layer}: held-out error of b and of g, of 0's: {error[0]:.3f}, {error[1]:.3f}", flush=True)
        head.config.control = None
        head.save_pretrained(target)

    @torch.no_grad()
    def branches(self, critic: ValueHead, layer: int) -> dict[str, torch.Tensor]:
        """Of every third state: the likeliest tokens, their probabilities, and the critic's value behind each."""
        parts: dict[str, list[torch.Tensor]] = {}
        rollouts = [r for r in load_rollouts(self.fit / "rollouts") if r.completion_ids and r.reward is not None]
        for episode, rollout in enumerate(rollouts):
            if episode % self.every_rollout:
                continue
            for name, value in self.branches_of(rollout, critic, layer).items():
                parts.setdefault(name, []).append(value)
            count = len(parts["hidden"][-1])
            parts.setdefault("episode", []).append(torch.full((count,), episode))
            if episode % 100 == 0:
                print(f"branches: {episode} of {len(rollouts)}", flush=True)
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.no_grad()
    def branches_of(self, rollout: Rollout, critic: ValueHead, layer: int) -> dict[str, torch.Tensor]:
        """
        Those of one response: all in one forward behind it, each attending to its own past and itself alone.
        """
        model, start, length = self.model, len(rollout.prompt_ids) - 1, len(rollout.completion_ids)
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        # Behind the last token nothing comes: what it is worth is the reward.
        chosen = torch.arange((length - 2) % EVERY, length - 1, EVERY) if length > 1 else torch.arange(0)
        if not len(chosen):
            empty = {name: torch.empty(0, TOKENS) for name in ("chance", "value")}
            width = model.get_output_embeddings().weight.shape[1]
            return empty | {"hidden": torch.empty(0, width), "tokens": torch.empty(0, TOKENS).long()}
        cache = DynamicCache(config=model.config)
        with self.reading(layer) as seen:
            hidden = model.get_decoder()(ids, past_key_values=cache).last_hidden_state[0]
        rows = model.get_output_embeddings().weight
        all_logits = model.get_output_embeddings()(hidden[start : start + length]).float() / (
            rollout.temperature or 1.0
        )
        mean_row = all_logits.softmax(-1) @ rows
        logits = all_logits[chosen]
        ends = torch.tensor(model.generation_config.eos_token_id or []).reshape(-1)
        logits[:, ends] = -torch.inf  # where an answer ends there is no next state
        chance, tokens = logits.softmax(-1).topk(TOKENS)
        context = seen[0][0, start : start + length]

        total, count = ids.shape[1], tokens.numel()
        own = (start + chosen).repeat_interleave(TOKENS)  # the place that each branch follows
        mask = torch.cat([torch.arange(total)[None] <= own[:, None], torch.eye(count, dtype=torch.bool)], 1)
        with self.reading(layer) as seen:
            after = model.get_decoder()(
                tokens.reshape(1, -1),
                attention_mask=mask[None, None],
                position_ids=own[None] + 1,
                past_key_values=cache,
            ).last_hidden_state[0]
        after_context = seen[0][0]
        # The critic also reads the directions of the tokens so far, and the layer's mean over the response's states so
        # far, both with the branch's own.
        directions = rows[torch.tensor(rollout.completion_ids)] - mean_row
        drawn_before = (directions.cumsum(0) - directions)[chosen].repeat_interleave(TOKENS, 0)
        drawn_before += rows[tokens.reshape(-1)] - mean_row[chosen].repeat_interleave(TOKENS, 0)
        so_far = context.cumsum(0)[chosen].repeat_interleave(TOKENS, 0) + after_context
        mean = so_far / (chosen + 2).repeat_interleave(TOKENS)[:, None]
        value = critic(torch.cat([after, drawn_before, after_context, mean], 1).float()).sum(-1)
        drawn = tokens.eq(torch.tensor(rollout.completion_ids)[chosen][:, None])
        expected = hidden[start + chosen + 1]
        assert torch.allclose(
            after.view(len(chosen), TOKENS, -1)[drawn], expected[drawn.any(1)], rtol=1e-2, atol=1e-2
        ), "the branch of the token that was drawn is not what followed"
        return {
            "hidden": hidden[start + chosen],
            "tokens": tokens,
            "chance": chance / chance.sum(-1, keepdim=True),
            "value": value.view(len(chosen), TOKENS),
        }

    def reading(self, layer: int):
        """Collects what a decoder layer gives."""
        return _Reading(self.model.get_decoder().layers[layer])


class _Reading:
    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        self.handle = self.module.register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        return seen

    def __exit__(self, *error) -> None:
        self.handle.remove()


def batches(found: dict[str, torch.Tensor], chosen: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple]:
    """(states, directions of their branches, targets, probabilities) of some states, a few at a time."""
    for part in chosen.split(BATCH):
        chance = found["chance"][part]
        directions = rows[found["tokens"][part].long()]
        directions = directions - (chance[..., None] * directions).sum(1, keepdim=True)
        value = found["value"][part]
        yield found["hidden"][part], directions, value - (chance * value).sum(1, keepdim=True), chance


def moments(found: dict[str, torch.Tensor], side: torch.Tensor, rows: torch.Tensor) -> tuple:
    """`XᵀX` and `Xᵀy`, weighted by the probabilities, over the states of a side."""
    width = rows.shape[1]
    square, product = torch.zeros(width, width).double(), torch.zeros(width).double()
    for _, directions, target, chance in batches(found, side.nonzero()[:, 0], rows):
        x = (directions * chance.sqrt()[..., None]).flatten(0, 1).double()
        y = (target * chance.sqrt()).flatten().double()
        square, product = square + x.T @ x, product + x.T @ y
    count = float(side.sum())
    return square / count, product / count


def ridge(train: tuple, held_out: tuple) -> torch.Tensor:
    """b by ridge regression, the penalty by the held-out error."""
    eigenvalues, basis = torch.linalg.eigh(train[0])
    projected = basis.T @ train[1]
    solutions = [basis @ (projected / (eigenvalues.clamp(min=0) + p)) for p in eigenvalues.max() * PENALTIES]
    return min(solutions, key=lambda b: float(b @ held_out[0] @ b - 2 * b @ held_out[1])).float()


def learn_g(head: ValueHead, found, train, held_out, rows, b: torch.Tensor) -> tuple[float, float]:
    """Train g from b on; the epoch with the smallest held-out error is kept. Returns the errors of b and of g."""
    torch.manual_seed(0)
    last = head.advantage_mlp.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(b)

    def loss_of(hidden, directions, target, chance) -> torch.Tensor:
        said = (directions @ head.advantage(hidden)[..., None])[..., 0]
        return (chance * (said - target).square()).sum(1)

    @torch.no_grad()
    def error() -> float:
        wrong = right = 0.0
        for batch in batches(found, held_out.nonzero()[:, 0], rows):
            wrong += float(loss_of(*batch).sum())
            right += float((batch[3] * batch[2].square()).sum())
        return wrong / right

    best, kept = error(), {k: v.clone() for k, v in head.advantage_mlp.state_dict().items()}
    of_b = best
    optimizer = torch.optim.AdamW(head.advantage_mlp.parameters(), lr=RATE, weight_decay=0.0)
    numbers = train.nonzero()[:, 0]
    for _ in range(EPOCHS):
        for batch in batches(found, numbers[torch.randperm(len(numbers))], rows):
            loss = loss_of(*batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (now := error()) < best:
            best, kept = now, {k: v.clone() for k, v in head.advantage_mlp.state_dict().items()}
    head.advantage_mlp.load_state_dict(kept)
    return of_b, best


def answers(folder: Path) -> dict[tuple[str, float | None], dict[str, float]]:
    """Of each row of a comparison: each prompt's reward."""
    found: dict[tuple[str, float | None], dict[str, float]] = {}
    for row in pyarrow.parquet.read_table(folder / "answers.parquet").to_pylist():
        found.setdefault((row["control"], row["strength"]), {})[json.dumps(row["prompt"])] = row["reward"]
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The controlled rows of a comparison, with the KL that their strength was found for."""
    written = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    wanted = {}
    for label, match in written["strengths"].items():
        control, kl = label.split(" at KL ")
        wanted[control, match["strength"]] = float(kl)
    by_row: dict[tuple[str, float], dict[str, Any]] = {}
    for figure in written["figures"]:
        key = (figure["control"], figure["strength"])
        if key in wanted and figure["metric"] in METRICS:
            by_row.setdefault(key, {"key": key, "control": key[0], "kl": wanted[key]})
            by_row[key][figure["metric"]] = figure["value"]
    rewards = answers(folder)
    return [row | {"rewards": rewards[row["key"]]} for row in by_row.values()]


def table(output: Path, names: Sequence[str]) -> str:
    """All rows, with their differences to the static vector of `none`."""
    lines = [
        "| head | control | KL a token | KL an answer | reward | Δ reward | judge | diversity |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    plain = [row for row in rows_of(output / "none" / "comparison") if row["control"] == "static_vector"]
    reference = {row["kl"]: row["rewards"] for row in plain}
    for name in names:
        for row in rows_of(output / name / "comparison"):
            other = reference[row["kl"]]
            differences = [reward - other[prompt] for prompt, reward in row["rewards"].items() if prompt in other]
            low, high = paired_interval(differences)
            change = f"{sum(differences) / len(differences):+.3f} [{low:+.3f}, {high:+.3f}]"
            judge = f"{row['judge']:.3f}" if "judge" in row else ""
            lines.append(
                f"| {name} | {row['control']} | {row['kl_per_token']:.3f} | {row['kl_per_response']:.2f} "
                f"| {row['reward']:.3f} | {change} | {judge} | {row['diversity']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fit", type=Path)
    parser.add_argument("--reward")
    parser.add_argument("--judge")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--limit", type=int, default=150, help="prompts that are compared on")
    parser.add_argument("--heads", nargs="+", default=["none", "critic-16", "branches-16"])
    parser.add_argument("--kl", type=float, nargs="+", default=[0.1])
    parser.add_argument("--every-rollout", type=int, default=1, help="branch from one rollout in so many")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        if None in (arguments.fit, arguments.reward, arguments.prompts, arguments.held_out):
            parser.error("name --fit, --reward, --prompts and --held-out, or --table")
        config = json.loads((arguments.fit / "head" / "config.json").read_text(encoding="utf-8"))
        name = config["base_model_name_or_path"]
        manifest = json.loads((arguments.fit / "rollouts" / "manifest.json").read_text(encoding="utf-8"))
        if manifest.get("prefix_every") is not None and any(head.startswith("branches") for head in arguments.heads):
            parser.error("the critic of branches knows no rewards of the response so far: --fit without prefix_every")
        sampling = manifest["settings"]["generation_config"]
        run = Run(
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(name),
            arguments.fit,
            arguments.output,
            arguments.reward,
            arguments.judge,
            load_prompts(arguments.prompts, limit=arguments.limit),
            load_prompts(arguments.held_out, limit=64),
            tuple(arguments.kl),
            {"max_new_tokens": sampling["max_new_tokens"], "temperature": sampling["temperature"]},
            arguments.every_rollout,
        )
        for head in arguments.heads:
            run.make(head)
    names = sorted(path.parent.parent.name for path in arguments.output.glob("*/comparison/table.md"))
    print(table(arguments.output, sorted(names, key=lambda name: (name != "none", name))))


if __name__ == "__main__":
    main()
