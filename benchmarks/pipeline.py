"""
The stages of training against bare equivalents, in turn in one process: median of the ratios over rounds [10 %, 90 %].

    python benchmarks/pipeline.py [--model FOLDER] [--rounds 5] [--only rollouts,batching,states,kept,...]

The model is SmolLM2-135M-Instruct by default (see `hf_recontrol.pipelines.demo.embedded_model`). A ratio above 1 means that ours
is faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from hf_recontrol import ValueHeadConfig
from hf_recontrol.collection.labels import label_rollouts
from hf_recontrol.collection.rollouts import generate_rollouts, pad_batch, write_rollouts
from hf_recontrol.collection.states import teacher_forced, write_states
from hf_recontrol.data.prompts import encode_prompt, load_prompts
from hf_recontrol.data.rollouts import load_rollouts, rollout_parts
from hf_recontrol.data.states import States, StateStore, StateWriter
from hf_recontrol.heads.value_head import ValueHead
from hf_recontrol.modeling.hook_points import find_lm_head, hook_width
from hf_recontrol.pipelines.demo import embedded_model
from hf_recontrol.training.targets import pad_episodes, td_targets
from hf_recontrol.training.trainer import Episodes
from hf_recontrol.training.value import ValueModel, ValueTrainer, new_head

PROMPTS = Path(__file__).parents[1] / "examples" / "prompts.jsonl"


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


def length(prompts, completions, **columns):
    """A reward that costs nothing."""
    return [float(len(text)) for text in completions]


def rollouts(model, tokenizer, rounds: int) -> None:
    """Samples with seeds of their own against `generate(do_sample=True)` on the same batch, without an end token."""
    for batch_size in (8, 32):
        prompts = load_prompts(PROMPTS, limit=batch_size)
        config = GenerationConfig(do_sample=True, temperature=0.9, top_k=0, max_new_tokens=48, eos_token_id=-1)
        config.pad_token_id = tokenizer.pad_token_id
        encoded = [encode_prompt(tokenizer, row["prompt"]) for row in prompts.rows]
        inputs = pad_batch(encoded, config.pad_token_id, "left", model.device)

        def ours(prompts=prompts, config=config, batch_size=batch_size):
            return generate_rollouts(model, tokenizer, prompts, generation_config=config, batch_size=batch_size)

        def bare(inputs=inputs, config=config):
            return tokenizer.batch_decode(model.generate(**inputs, generation_config=config))

        compare(f"rollouts, batch {batch_size}, over generate", ours, bare, rounds)


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
                inputs = pad_batch(order[start : start + 32], config.pad_token_id, "left", model.device)
                model.generate(**inputs, generation_config=config)

        try:
            compare(f"continuous batching, {name}, over generate", continuous, bare, rounds)
        except Exception as error:  # what this machine or this release cannot run
            print(f"continuous batching, {name}: {type(error).__name__}: {error}")


def states(model, tokenizer, rounds: int) -> None:
    """The states stage against a bare forward with logits over the same batches; disk; int8; share of the time."""
    config = ValueHeadConfig(1, hook_point="lm_head")
    width = hook_width(model, config)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = {"max_new_tokens": 48, "temperature": 0.9, "batch_size": 32, "part_size": 32}
        took = seconds(
            lambda: write_rollouts(folder / "r", model, tokenizer, load_prompts(PROMPTS, limit=48), **options)
        )
        label_rollouts(folder / "r", [length])
        # The batches of the stage: of 16, sorted in each file.
        files = [
            sorted(load_rollouts(path), key=lambda r: -len(r.prompt_ids) - len(r.completion_ids))
            for path in rollout_parts(folder / "r")
        ]
        batches = [rows[start : start + 16] for rows in files for start in range(0, len(rows), 16)]
        number = iter(range(10**6))

        @torch.no_grad()
        def bare():
            for batch in batches:
                inputs, _ = teacher_forced(model, batch, keep_logits=False)
                model(**inputs, use_cache=False)

        for advantage in (None, []):
            shape = ValueHeadConfig(width, hook_point="lm_head", advantage_sizes=advantage)
            for dtype in ("float32", "bfloat16", "int8"):

                def ours(shape=shape, dtype=dtype):
                    return write_states(folder / f"s{next(number)}", model, folder / "r", shape, dtype=dtype)

                what = "states and directions" if advantage == [] else "states"
                compare(f"{what}, {dtype}, over a bare forward", ours, bare, rounds)
        last = folder / f"s{next(number)}"
        spent = seconds(lambda: write_states(last, model, folder / "r", shape, dtype="float32"))
        print(f"states and directions take {spent / took:.3f} of the time of the rollouts")
        on_disk = sum(path.stat().st_size for path in last.glob("part-*"))
        counted = StateStore.open(last).num_states * width * 4 * 2
        print(f"disk over states x width x bytes: {on_disk / counted:.4f}")
        counts = write_states(folder / "int8", model, folder / "r", shape, dtype="int8")
        error = (counts["int8_squared_error"] / counts["states"]) ** 0.5
        print(f"int8 error: {error:.4f} of each feature's spread")


def kept(model, tokenizer, rounds: int) -> None:
    """Rollouts and states with states kept while sampling, against a forward of their own."""
    prompts = load_prompts(PROMPTS, limit=64)
    options = {"max_new_tokens": 48, "batch_size": 32, "part_size": 32}
    for advantage in (None, []):
        config = ValueHeadConfig(1, hook_point="lm_head", advantage_sizes=advantage)

        def both(keep, config=config):
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                write_rollouts(folder / "r", model, tokenizer, prompts, keep_states=keep, **options)
                label_rollouts(folder / "r", [length])
                write_states(folder / "s", model, folder / "r", config)

        what = "states and directions" if advantage == [] else "states"
        compare(f"rollouts with {what}, kept over read", partial(both, config), partial(both, None), rounds)


def synthetic(folder: Path, width: int, episodes: int, dtype: torch.dtype) -> StateStore:
    """A memory-mapped store of random states in one file."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (episodes,), generator=generator)
    small = {
        "lengths": lengths,
        "rewards": torch.randn(episodes, 1, generator=generator),
        "prompts": torch.arange(episodes),
        "finished": torch.ones(episodes, dtype=torch.bool),
    }
    path, count = folder / f"{width}-{dtype}.safetensors", int(lengths.sum())
    with StateWriter(path, small, count, width, dtype, ["hidden"], {"hook_point": "lm_head"}) as writer:
        for start in range(0, count, 4096):
            writer.write("hidden", start, torch.randn(min(4096, count - start), width, generator=generator))
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
        values = pad_episodes(head(hidden[rows]), store.lengths[chosen])
        targets = td_targets(values, store.rewards[chosen], store.lengths[chosen], 0.95)
        loss = (values - targets).square().sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()


def trainer_training(store: StateStore, head: ValueHead, folder: str) -> None:
    """As many steps of our Trainer, its start included, without evaluation and checkpoints."""
    everything = torch.arange(len(store))
    options = {"save_strategy": "no", "load_best_model_at_end": False, "eval_strategy": "no", "logging_strategy": "no"}
    ValueTrainer(
        ValueModel(head, with_target=False),
        Episodes(store, everything, head, ["hidden"], False),
        Episodes(store, everything[:8], head, ["hidden"], False),
        {"output_dir": folder, "batch_size": 64, "learning_rate": 3e-4, "max_steps": NUM_STEPS, **options},
        td_lambda=0.95,
        discount=1.0,
        target_update=None,
    ).train()


def training(model, tokenizer, rounds: int) -> None:
    """The Trainer from a memory-mapped store against a bare loop over tensors in RAM: the same steps."""
    sizes = [(576, 2048, torch.float32), (576, 2048, torch.bfloat16), (4096, 512, torch.bfloat16)]
    for width, episodes, dtype in sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = synthetic(Path(folder), width, episodes, dtype)
            everything = torch.arange(len(store))
            config = ValueHeadConfig(width, head_sizes=[1024], hook_point="lm_head")
            head = new_head(store, config, everything, everything, "none", 0)
            compare(
                f"training, width {width}, {str(dtype).removeprefix('torch.')}, over a bare loop in RAM",
                partial(trainer_training, store, head, folder),
                partial(bare_training, store, store.gather("hidden", everything), head),
                rounds,
            )


@torch.no_grad()
def directions(model, tokenizer, rounds: int) -> None:
    """Directions read from the store against directions computed again from the states."""
    weight = find_lm_head(model).weight
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = {"max_new_tokens": 48, "batch_size": 32}
        write_rollouts(folder / "r", model, tokenizer, load_prompts(PROMPTS, limit=64), **options)
        label_rollouts(folder / "r", [length])
        config = ValueHeadConfig(hook_width(model, ValueHeadConfig(1, hook_point="lm_head")), hook_point="lm_head")
        config.advantage_sizes = []
        write_states(folder / "s", model, folder / "r", config, dtype="bfloat16")
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
