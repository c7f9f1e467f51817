"""
From prompts to a head, whole: the four stages of `recontrol fit` against a plain script that does the same with
nothing but transformers and torch, each in a process of its own, in turn.

    python benchmarks/whole.py [--prompts 1600] [--samples 2] [--rounds 1] [--keep-states]

SmolLM2-135M-Instruct, VADER, responses of at most 48 tokens at temperature 0.9. Both sample, score, read states and
directions, and train V by TD(0.95), a linear critic, a static vector, a token bias and g, with the default settings of
sizes, rates and epochs. What the plain script lacks: seeds for each response, files, resuming, figures, processes, the
search for the token bias' penalty. What is left out of ours: the data curve, the search for a recommended control and
the report. `--keep-states` is for ours alone. Prints the seconds of each stage, and the ratio of the sums (above 1:
ours is faster).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import (
    embedded_model,
    label_rollouts,
    load_prompts,
    train_head,
    vader,
    write_rollouts,
    write_states,
)

PROMPTS = Path(__file__).parents[1] / "hf_recontrol" / "pipelines" / "demo_prompts.jsonl"
TEMPERATURE, NEW, BATCH = 0.9, 48, 32
STAGES = ("loading", "rollouts", "rewards", "states", "training")
Episodes = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]


class Clock:
    """Seconds of each stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, stage: str):
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin


def asked(count: int) -> list[str]:
    """So many prompts: those of the demo, again with other endings."""
    texts = [row["prompt"] for row in load_prompts(PROMPTS).rows]
    return [f"{texts[i % len(texts)]}{' Please.' * (i // len(texts))}" for i in range(count)]


def ours(count: int, samples: int, keep_states: bool) -> dict[str, float]:
    """The seconds of the stages of this package."""
    clock = Clock()
    with clock.of("loading"):
        tokenizer = AutoTokenizer.from_pretrained(embedded_model())
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    options = {"num_samples": samples, "max_new_tokens": NEW, "temperature": TEMPERATURE, "batch_size": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompts = load_prompts(asked(count))
        with clock.of("rollouts"):
            write_rollouts(folder / "rollouts", model, tokenizer, prompts, keep_states=keep_states, **options)
        with clock.of("rewards"):
            label_rollouts(folder / "rollouts", [vader])
        with clock.of("states"):
            write_states(folder / "states", model, folder / "rollouts", batch_size=BATCH)
        with clock.of("training"):
            train_head(folder / "head", folder / "states")
    return clock.seconds


@torch.no_grad()
def plain_rollouts(model, tokenizer, texts: list[str], samples: int) -> list[tuple[int, list[int], list[int]]]:
    """(number of the prompt, its tokens, the response's) of each sample."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    encoded = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    order = sorted([i for i in range(len(texts)) for _ in range(samples)], key=lambda i: len(encoded[i]))
    end, found = tokenizer.eos_token_id, []
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        width = max(len(encoded[i]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(encoded[i]) :], mask[row, width - len(encoded[i]) :] = torch.tensor(encoded[i]), 1
        sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": NEW}
        drawn = model.generate(input_ids=ids, attention_mask=mask, **sampling)[:, width:].tolist()
        for i, tokens in zip(batch, drawn, strict=True):
            found.append((i, encoded[i], tokens[: tokens.index(end) + 1] if end in tokens else tokens))
    return found


@torch.no_grad()
def plain_states(model, rollouts) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(states at the LM head's input, directions, tokens) of each response."""
    weight, found = model.lm_head.weight, [None] * len(rollouts)
    order = sorted(range(len(rollouts)), key=lambda k: -len(rollouts[k][1]) - len(rollouts[k][2]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        rows = [torch.tensor(rollouts[k][1] + rollouts[k][2]) for k in batch]
        ids = nn.utils.rnn.pad_sequence(rows, True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, k in enumerate(batch):
            _, prompt, response = rollouts[k]
            state = hidden[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
            policy, drawn = torch.softmax(state @ weight.T / TEMPERATURE, -1), torch.tensor(response)
            found[k] = (state.clone(), weight[drawn] - policy @ weight, drawn)
    return found


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors of unlike lengths as one, and where they are."""
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, True), torch.arange(int(lengths.max()))[None] < lengths[:, None]


def backwards(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, weight: float, differences: bool):
    """TD(λ) targets, or GAE(λ), of padded values, `(episodes, longest)`."""
    found, after = torch.zeros_like(values), torch.zeros(len(values))
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros(len(mask), 1, dtype=torch.bool)], 1)
    for t in range(values.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(values))
        if differences:
            now = torch.where(last[:, t], rewards - values[:, t], following - values[:, t] + weight * after)
        else:
            now = torch.where(last[:, t], rewards, (1 - weight) * following + weight * after)
        found[:, t] = after = now * mask[:, t]
    return found


def descend(net: nn.Module, loss, error, train: list[int], held: list[int], rate: float, epochs: int, patience: int):
    """AdamW over batches of 64 episodes; the epoch of the smallest held-out error is kept."""
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01, fused=True)
    best, kept, waited = float("inf"), None, 0
    for _ in range(epochs):
        random.shuffle(train)
        for start in range(0, len(train), 64):
            optimizer.zero_grad()
            loss(train[start : start + 64]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            now = sum(float(error(held[start : start + 64])) for start in range(0, len(held), 64))
        waited += 1
        if now < best:
            best, kept, waited = now, {name: value.clone() for name, value in net.state_dict().items()}, 0
        if waited == patience:
            break
    net.load_state_dict(kept)


def ridge(x: torch.Tensor, y: torch.Tensor, held_x: torch.Tensor, held_y: torch.Tensor) -> torch.Tensor:
    """The weights with the best of 17 penalties."""
    values, basis = torch.linalg.eigh((x.T @ x).double() / len(x))
    product = basis.T @ ((x.T @ y).double() / len(x))
    tried = [basis @ (product / (values + values.max() * p)) for p in torch.logspace(-6, 2, 17)]
    return min(tried, key=lambda w: float((held_y - held_x @ w.float()).square().mean())).float()


def plain_training(episodes: Episodes, prompts: list[int]) -> None:
    """V, a critic, the static vector, the token bias and g."""
    width, numbers = episodes[0][0].shape[1], sorted(set(prompts))
    out = set(random.Random(0).sample(numbers, max(1, len(numbers) // 10)))
    train = [k for k, number in enumerate(prompts) if number not in out]
    held = [k for k, number in enumerate(prompts) if number in out]
    everything = torch.cat([episodes[k][0] for k in train])
    mean, scale = everything.mean(0), everything.std(0)
    rewards = torch.tensor([each[3] for each in episodes])
    rewards = (rewards - rewards[train].mean()) / rewards[train].std()
    value = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def values_of(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        states, mask = padded([episodes[k][0] for k in batch])
        return value((states - mean) / scale)[..., 0], mask

    def value_loss(batch: list[int]) -> torch.Tensor:
        found, mask = values_of(batch)
        targets = backwards(found.detach(), rewards[batch], mask, 0.95, False)
        return ((found - targets).square() * mask).sum() / mask.sum()

    def value_error(batch: list[int]) -> torch.Tensor:
        found, mask = values_of(batch)
        return ((found - rewards[batch][:, None]).square() * mask).sum()

    descend(value, value_loss, value_error, train, held, 3e-4, 30, 5)
    read = [torch.cat([state, ahead.cumsum(0) - ahead], 1) for state, ahead, _, _ in episodes]
    middle = torch.cat([read[k] for k in train]).mean(0)

    def rows(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([read[k] for k in chosen]) - middle
        return x, torch.cat([rewards[k].expand(len(read[k])) for k in chosen])

    critic = ridge(*rows(train), *rows(held))
    values, mask = padded([(each - middle) @ critic for each in read])
    targets = backwards(values, rewards, mask, 0.8, True)
    flat = [targets[k, : len(each)] for k, each in enumerate(read)]
    ahead = {name: torch.cat([episodes[k][1] for k in part]) for name, part in (("train", train), ("held", held))}
    gains = {name: torch.cat([flat[k] for k in part]) for name, part in (("train", train), ("held", held))}
    # What is linear in the state says nothing of the token.
    seen = {name: torch.cat([episodes[k][0] for k in part]) for name, part in (("train", train), ("held", held))}
    of_state = ridge(*((seen[name] - mean) / scale if x else gains[name] for name in seen for x in (True, False)))
    gains = {name: gains[name] - (seen[name] - mean) / scale @ of_state for name in gains}
    static = ridge(ahead["train"], gains["train"], ahead["held"], gains["held"])
    drawn, left = torch.cat([episodes[k][2] for k in train]), gains["train"] - ahead["train"] @ static
    bias, count = torch.zeros(49152).index_add_(0, drawn, left), torch.bincount(drawn, minlength=49152)
    bias = bias / (count + 3)
    advantage = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, width))
    with torch.no_grad():
        advantage[2].weight.zero_()
        advantage[2].bias.copy_(static)

    def advantage_loss(batch: list[int]) -> torch.Tensor:
        states, directions, tokens = (torch.cat([episodes[k][part] for k in batch]) for part in range(3))
        found = (advantage((states - mean) / scale) * directions).sum(-1) + bias[tokens]
        return (found - torch.cat([flat[k] for k in batch])).square().mean()

    descend(advantage, advantage_loss, advantage_loss, train, held, 1e-4, 6, 2)


def plain(count: int, samples: int) -> dict[str, float]:
    """The seconds of the same stages of a plain script."""
    clock, texts = Clock(), asked(count)
    with clock.of("loading"):
        tokenizer = AutoTokenizer.from_pretrained(embedded_model())
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    with clock.of("rollouts"):
        rollouts = plain_rollouts(model, tokenizer, texts, samples)
    with clock.of("rewards"):
        texts = [tokenizer.decode(response, skip_special_tokens=True) for _, _, response in rollouts]
        rewards = vader([""] * len(texts), texts)
    with clock.of("states"):
        states = plain_states(model, rollouts)
    with clock.of("training"):
        episodes = [(*each, reward) for each, reward in zip(states, rewards, strict=True)]
        plain_training(episodes, [number for number, _, _ in rollouts])
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1600)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep-states", action="store_true")
    parser.add_argument("--run", choices=["ours", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.prompts, arguments.samples)
    if arguments.run is not None:
        found = plain(*sizes) if arguments.run == "plain" else ours(*sizes, arguments.keep_states)
        print(json.dumps(found))
        return
    print(f"| script | {' | '.join(STAGES)} | all |\n|---|{'---:|' * (len(STAGES) + 1)}", flush=True)
    # Both find the weights in the page cache.
    for file in Path(embedded_model()).glob("*.safetensors"):
        file.read_bytes()
    for turn in range(arguments.rounds):
        sums = {}
        for name in ("plain", "ours") if turn % 2 == 0 else ("ours", "plain"):
            command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds = json.loads(output.strip().splitlines()[-1])
            sums[name] = sum(seconds.values())
            cells = " | ".join(f"{seconds[stage]:.1f}" for stage in STAGES)
            print(f"| {name} | {cells} | {sums[name]:.1f} |", flush=True)
        print(f"\nPlain over ours: {sums['plain'] / sums['ours']:.3f}\n", flush=True)


if __name__ == "__main__":
    main()
