"""
What control costs in vLLM: requests a second, controlled over plain, in the environment of `make test-serve`.

    .venv-serve/bin/python benchmarks/serve.py --base FOLDER --head FOLDER [--dtype float32] [--rounds 5]

A plain and a controlled engine of one base stand in one process. Each round asks the plain one, the controlled one
without control (`control: false`), and each control in turn, at each concurrency; a line is the median over rounds of
the ratio within a round, with the smallest and the largest. Answers are greedy, of `--tokens` tokens, to prompts of
random tokens; no prefix is cached.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm

from hf_recontrol import recontrol_engine_args

# Strengths at which an answer stays an answer; what an edit costs does not depend on them.
CONTROLS = {
    "control: false": False,
    "static": {"method": "static", "step_size": 1.0},
    "advantage": {"method": "advantage", "step_size": 1.0},
    "ascent, n=30": {"method": "ascent", "step_size": 0.1, "num_steps": 30},
    "advantage, max_kl": {"method": "advantage", "step_size": 1.0, "max_kl": 0.1},
}


def requests_a_second(engine: vllm.LLM, prompts: list[list[int]], tokens: int, extra: dict) -> float:
    """Answers a second when all prompts are asked at once."""
    params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
    begin = time.perf_counter()
    engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return len(prompts) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    arguments = parser.parse_args()
    settings = {"dtype": arguments.dtype, "max_model_len": 256, "enable_prefix_caching": False}
    # Two engines share the memory.
    settings |= {"gpu_memory_utilization": 0.4, "max_num_seqs": max(arguments.concurrency)}
    plain = vllm.LLM(model=arguments.base, **settings)
    controlled = vllm.LLM(**recontrol_engine_args(arguments.base, {"default": arguments.head}), **settings)
    size = plain.get_tokenizer().vocab_size
    for count in arguments.concurrency:
        ratios: dict[str, list[float]] = {name: [] for name in CONTROLS}
        base = []
        for number in range(arguments.rounds + 1):
            draw = random.Random(number)
            prompts = [[draw.randrange(size) for _ in range(32)] for _ in range(count)]
            base.append(requests_a_second(plain, prompts, arguments.tokens, {}))
            for name, control in CONTROLS.items():
                speed = requests_a_second(controlled, prompts, arguments.tokens, {"control": control})
                ratios[name].append(speed / base[-1])
        print(f"concurrency {count}: plain {statistics.median(base[1:]):.2f} requests a second")
        for name, values in ratios.items():
            # The first round warms up.
            kept = values[1:]
            print(f"  {name}: {statistics.median(kept):.3f} of plain ({min(kept):.3f} to {max(kept):.3f})", flush=True)


if __name__ == "__main__":
    main()
