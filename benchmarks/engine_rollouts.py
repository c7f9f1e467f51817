"""
Rollouts drawn by another engine against those that `generate` draws: seconds a response, and seconds to start.

    python benchmarks/engine_rollouts.py BASE --prompts prompts.jsonl [--engine vllm] [--engine-arguments JSON]

Each round writes the rollouts of few and of many prompts, by both engines in turn. What many take longer than few is
the time of the responses themselves; the rest is what it takes to start, the check of the model included. Shown is the
median of the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import load_prompts, write_rollouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--engine-arguments", type=json.loads, default={})
    parser.add_argument("--few", type=int, default=32)
    parser.add_argument("--many", type=int, default=160)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32, help="of transformers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=arguments.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    prompts = {size: load_prompts(arguments.prompts, limit=size) for size in (arguments.few, arguments.many)}
    engines = {
        "transformers": {"batch_size": arguments.batch_size},
        arguments.engine: {"engine": arguments.engine, "engine_arguments": arguments.engine_arguments},
    }
    settings = {"max_new_tokens": arguments.max_new_tokens, "temperature": 1.0}
    marginal = {name: [] for name in engines}
    start = {name: [] for name in engines}
    for number in range(arguments.rounds):
        for name, engine in engines.items():
            seconds = {}
            for size, rows in prompts.items():
                with tempfile.TemporaryDirectory() as folder:
                    begun = time.perf_counter()
                    write_rollouts(
                        Path(folder) / "rollouts", model, tokenizer, rows, seed=number, progress=lambda *_: None,
                        **settings, **engine,
                    )  # fmt: skip
                    seconds[size] = time.perf_counter() - begun
            each = (seconds[arguments.many] - seconds[arguments.few]) / (arguments.many - arguments.few)
            marginal[name].append(each)
            start[name].append(seconds[arguments.few] - arguments.few * each)
            print(f"round {number + 1}, {name}: {each:.3f} s a response, {start[name][-1]:.1f} s to start", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(marginal["transformers"], marginal[arguments.engine], strict=True)]
    print(f"\n{arguments.many} prompts, {arguments.max_new_tokens} tokens, {arguments.dtype}")
    for name in engines:
        print(f"{name}: {median(marginal[name]):.3f} s a response, {median(start[name]):.1f} s to start")
    print(
        f"{arguments.engine} is {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times as fast as "
        "transformers, start apart"
    )


if __name__ == "__main__":
    main()
