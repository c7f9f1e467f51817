"""
The stages of training against bare equivalents, in turn in one process: median of the ratios over rounds [10 %, 90 %].

    python benchmarks/pipeline.py [--model FOLDER] [--rounds 5] [--only rollouts,batching,states,kept,...]

The model is SmolLM2-135M-Instruct by default (see `hf_recontrol.embedded_model`). A ratio above 1 means that ours is
faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from hf_recontrol import (
    ClassifierReward,
    Rollout,
    States,
    StateStore,
    ValueHead,
    ValueHeadConfig,
    ValueTrainer,
    embedded_model,
    encode_prompt,
    generate_rollouts,
    label_rollouts,
    load_prompts,
    load_rollouts,
    td_targets,
    train_value_head,
    write_rollouts,
    write_states,
)

PROMPTS = Path(__file__).parents[1] / "hf_recontrol" / "pipelines" / "demo_prompts.jsonl"


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(name: str, ours: Callable[[], object], bare: Callable[[], object], rounds: int) -> None:
    """Print how much faster `ours` is than `bare`."""
    ours(), bare()
    ratios = torch.tensor([seconds(bare) / seconds(ours) for _ in range(rounds)])
    low, median, high = torch.quantile(ratios, torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{name}: {median:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def padded(rows: list[list[int]], pad_id: int, side: str, device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of one batch."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def by_length(rollouts: list[Rollout]) -> list[Rollout]:
    """The longest first, as the stages make their batches."""
    return sorted(rollouts, key=lambda r: -len(r.prompt_ids) - len(r.completion_ids))


def length(prompts, completions, **columns):
    """A reward that costs nothing."""
    return [float(len(text)) for text in completions]


def rollouts(model, tokenizer, rounds: int) -> None:
    """
    Samples with seeds of their own against `generate(do_sample=True)` on the same batch, without an end token; one and
    eight samples of a prompt.
    """
    for batch_size, samples in ((8, 1), (32, 1), (32, 8)):
        prompts = load_prompts(PROMPTS, limit=batch_size // samples)
        config = GenerationConfig(do_sample=True, temperature=0.9, top_k=0, max_new_tokens=48, eos_token_id=-1)
        config.pad_token_id = tokenizer.pad_token_id
        encoded = [encode_prompt(tokenizer, row["prompt"]) for row in prompts.rows]
        inputs = padded(encoded, config.pad_token_id, "left", model.device)
        options = {"generation_config": config, "batch_size": batch_size, "num_samples": samples}

        def ours(prompts=prompts, options=options):
            return generate_rollouts(model, tokenizer, prompts, **options)

        def bare(inputs=inputs, config=config, samples=samples):
            ids = model.generate(**inputs, generation_config=config, num_return_sequences=samples)
            return tokenizer.batch_decode(ids)

        compare(f"rollouts, batch {batch_size}, {samples} of a prompt, over generate", ours, bare, rounds)


def batching(model, tokenizer, rounds: int) -> None:
    """Continuous batching against generate: responses of one length, and of ragged lengths in batches of 32."""
    prompts = load_prompts(PROMPTS, limit=64)
    encoded = [encode_prompt(tokenizer, row["prompt"]) for row in prompts.rows]
    # Which tokens end a response decides how ragged the lengths are: with a tenth of the vocabulary some end at once.
    ragged = list(range(0, model.config.vocab_size, 40))
    for name, end in (("equal lengths", -1), ("ragged lengths", ragged)):
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=48, eos_token_id=end)
        config.pad_token_id = tokenizer.pad_token_id

        def continuous(config=config):
            settings = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=256)
            return model.generate_batch(encoded, config, continuous_batching_config=settings, progress_bar=False)

        def bare(config=config):
            order = sorted(encoded, key=len)
            for start in range(0, len(order), 32):
                inputs = padded(order[start : start + 32], config.pad_token_id, "left", model.device)
                model.generate(**inputs, generation_config=config)

        try:
            compare(f"continuous batching, {name}, over generate", continuous, bare, rounds)
        except Exception as error:  # what this machine or this release cannot run
            print(f"continuous batching, {name}: {type(error).__name__}: {error}")


def states(model, tokenizer, rounds: int) -> None:
    """The states stage against a bare forward with logits over the same batches; disk; int8; share of the time."""
    width = model.config.hidden_size
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = {"max_new_tokens": 48, "temperature": 0.9, "batch_size": 32, "part_size": 32}
        took = seconds(
            lambda: write_rollouts(folder / "r", model, tokenizer, load_prompts(PROMPTS, limit=48), **options)
        )
        label_rollouts(folder / "r", [length])
        # The batches of the stage: of 16, sorted in each file.
        files = [by_length(load_rollouts(path)) for path in sorted((folder / "r").glob("part-*.parquet"))]
        batches = [rows[start : start + 16] for rows in files for start in range(0, len(rows), 16)]
        number = iter(range(10**6))

        @torch.no_grad()
        def bare():
            for batch in batches:
                ids = [rollout.prompt_ids + rollout.completion_ids for rollout in batch]
                model(**padded(ids, 0, "right", model.device), use_cache=False)

        for directions in (False, True):
            for dtype in ("float32", "bfloat16", "int8"):

                def ours(directions=directions, dtype=dtype):
                    into = folder / f"s{next(number)}"
                    return write_states(into, model, folder / "r", directions=directions, states_dtype=dtype)

                what = "states and directions" if directions else "states"
                compare(f"{what}, {dtype}, over a bare forward", ours, bare, rounds)
        last = folder / f"s{next(number)}"
        spent = seconds(lambda: write_states(last, model, folder / "r", states_dtype="float32"))
        print(f"states and directions take {spent / took:.3f} of the time of the rollouts")
        on_disk = sum(path.stat().st_size for path in last.glob("part-*"))
        counted = StateStore.open(last).num_states * width * 4 * 2
        print(f"disk over states x width x bytes: {on_disk / counted:.4f}")
        counts = write_states(folder / "int8", model, folder / "r", states_dtype="int8")
        error = (counts["int8_squared_error"] / counts["states"]) ** 0.5
        print(f"int8 error: {error:.4f} of each feature's spread")


def labels(model, tokenizer, rounds: int) -> None:
    """Labels by a classifier (MiniLM's geometry, random weights) against its forward over the same chats."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    classifier = BertForSequenceClassification(config).eval()
    reward = ClassifierReward(classifier, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = {"max_new_tokens": 48, "temperature": 0.9, "batch_size": 32, "part_size": 128}
        write_rollouts(folder, model, tokenizer, load_prompts(PROMPTS, limit=128), **options)
        rows = [rollout for path in sorted(folder.glob("part-*.parquet")) for rollout in load_rollouts(path)]
        chats = [
            [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}] for row in rows
        ]

        @torch.no_grad()
        def bare():
            ids = sorted(tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"], key=len)
            for start in range(0, len(ids), 32):
                classifier(**padded(ids[start : start + 32], tokenizer.pad_token_id, "right", "cpu")).logits.tolist()

        def ours():
            return label_rollouts(folder, [reward], again=True)

        compare("labels by a classifier, over its bare forward", ours, bare, rounds)


def kept(model, tokenizer, rounds: int) -> None:
    """Rollouts and states with states kept while sampling, against a forward of their own."""
    prompts = load_prompts(PROMPTS, limit=64)
    options = {"max_new_tokens": 48, "batch_size": 32, "part_size": 32}
    for directions in (False, True):

        def both(keep, directions=directions):
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                write_rollouts(
                    folder / "r", model, tokenizer, prompts, keep_states=keep, directions=directions, **options
                )
                label_rollouts(folder / "r", [length])
                write_states(folder / "s", model, folder / "r", directions=directions)

        what = "states and directions" if directions else "states"
        compare(f"rollouts with {what}, kept over read", partial(both, True), partial(both, False), rounds)


def synthetic(folder: Path, width: int, episodes: int, dtype: torch.dtype) -> StateStore:
    """A memory-mapped store of random states in one file."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (episodes,), generator=generator)
    count = int(lengths.sum())
    tensors = {
        "hidden": torch.randn(count, width, generator=generator).to(dtype),
        "lengths": lengths,
        "rewards": torch.randn(episodes, 1, generator=generator),
        "prompts": torch.arange(episodes),
        "finished": torch.ones(episodes, dtype=torch.bool),
    }
    path = folder / f"{width}-{dtype}.safetensors"
    save_file(tensors, path, metadata={"hf_recontrol": json.dumps({"hook_point": "lm_head"})})
    return StateStore([States.open(path)])


NUM_STEPS = 16


def bare_training(store: StateStore, hidden: torch.Tensor, head: ValueHead) -> None:
    """What the Trainer does in so many steps, as a plain loop over tensors in RAM."""
    optimizer = torch.optim.AdamW(head.value_mlp.parameters(), lr=3e-4)
    ends = store.lengths.cumsum(0)
    starts = ends - store.lengths
    for step in range(NUM_STEPS):
        chosen = torch.arange(step * 64, step * 64 + 64) % len(store)
        rows = torch.cat([torch.arange(starts[i], ends[i]) for i in chosen.tolist()])
        values = torch.nn.utils.rnn.pad_sequence(head(hidden[rows]).split(store.lengths[chosen].tolist()), True)
        targets = td_targets(values, store.rewards[chosen], store.lengths[chosen], 0.95)
        mask = torch.arange(values.shape[1])[None] < store.lengths[chosen, None]
        loss = ((values - targets).square() * mask[..., None]).sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()


class Trained(Exception):
    """Ends a run once its steps are taken: what follows is measuring, which the bare loop does not do."""


class StepsOnly(ValueTrainer):
    """The steps of our Trainer, without its figures."""

    def fit(self):
        self.train()
        raise Trained


def trainer_training(store: StateStore, config: ValueHeadConfig) -> None:
    """As many steps of our Trainer, its start included, without evaluation and checkpoints."""
    options = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    with suppress(Trained):
        train_value_head(
            store,
            config,
            scaling="none",
            patience=None,
            validation_split=0.01,
            trainer_class=StepsOnly,
            training_arguments=options | {"max_steps": NUM_STEPS},
        )


def training(model, tokenizer, rounds: int) -> None:
    """The Trainer from a memory-mapped store against a bare loop over tensors in RAM: the same steps."""
    sizes = [(576, 2048, torch.float32), (576, 2048, torch.bfloat16), (4096, 512, torch.bfloat16)]
    for width, episodes, dtype in sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = synthetic(Path(folder), width, episodes, dtype)
            config = ValueHeadConfig(width, head_sizes=[1024], hook_point="lm_head")
            hidden = store.gather("hidden", torch.arange(len(store)))
            compare(
                f"training, width {width}, {str(dtype).removeprefix('torch.')}, over a bare loop in RAM",
                partial(trainer_training, store, config),
                partial(bare_training, store, hidden, ValueHead(config)),
                rounds,
            )


@torch.no_grad()
def directions(model, tokenizer, rounds: int) -> None:
    """Directions read from the store against directions computed again from the states."""
    weight = model.get_output_embeddings().weight
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = {"max_new_tokens": 48, "batch_size": 32}
        write_rollouts(folder / "r", model, tokenizer, load_prompts(PROMPTS, limit=64), **options)
        label_rollouts(folder / "r", [length])
        write_states(folder / "s", model, folder / "r", states_dtype="bfloat16")
        store = StateStore.open(folder / "s")
        everything = torch.arange(len(store))
        tokens = torch.tensor([t for r in load_rollouts(folder / "r") if r.completion_ids for t in r.completion_ids])
        hidden = store.gather("hidden", everything).to(weight.dtype)

        def again():
            return weight[tokens] - torch.softmax(hidden @ weight.T, dim=-1) @ weight

        compare(
            "directions from the store over computing them again",
            lambda: store.gather("directions", everything),
            again,
            rounds,
        )


STAGES = {
    "rollouts": rollouts,
    "batching": batching,
    "labels": labels,
    "states": states,
    "kept": kept,
    "training": training,
    "directions": directions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name; default: the demo's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(STAGES), help="comma-separated stages")
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    for stage in arguments.only.split(","):
        STAGES[stage](model, tokenizer, arguments.rounds)


if __name__ == "__main__":
    main()
