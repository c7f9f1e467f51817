"""
What control costs on vLLM: requests a second of a controlled server over those of a plain one.

    python benchmarks/serve.py BASE HEAD --dtype float32

Two servers of one base are up, vLLM's own and `recontrol serve --engine vllm`. Each round asks both in turn, one after
another, with 1, 8 and 32 requests at a time: `plain` (vLLM alone), `off` (our server, `control` false), `advantage`,
and `ascent` (30 steps). A round's ratio compares an arm with its own round's `plain`, so what slows the machine for
minutes slows both; shown is the median of the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.request import Request, urlopen

ARMS = {
    "plain": None,
    "off": False,
    "advantage": {"method": "advantage", "step_size": 2.0},
    "ascent": {"method": "ascent", "step_size": 0.5, "num_steps": 30},
}
STARTS_WITHIN = 600


@contextmanager
def running(command: list[str], port: int):
    """A server in a process group of its own, once it answers; ended with all its processes."""
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            until = time.monotonic() + STARTS_WITHIN
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > until:
                        log.seek(0)
                        sys.exit(f"{command[:4]} did not start:\n{log.read()[-3000:]}")
                    time.sleep(1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rate(port: int, control: dict | bool | None, prompts: list[str], concurrency: int, tokens: int) -> float:
    """Requests a second, `concurrency` at a time."""

    def ask(prompt: str) -> None:
        body = {"model": "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        if control is not None:
            body["control"] = control
        request = Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=600) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == tokens

    begin = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(ask, prompts))
    return len(prompts) / (time.perf_counter() - begin)


def measure(ports: dict[str, int], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Requests a second by concurrency, arm and round."""
    found = {}
    for concurrency in options.concurrency:
        rates = {arm: [] for arm in ARMS}
        count = max(options.requests, 2 * concurrency)
        # A round that is not counted: first requests compile and fill what the others find.
        for number in range(-1, options.rounds):
            for arm, control in ARMS.items():
                # Prompts of their own in each round and arm, so that none finds its prefix in the cache.
                prompts = [
                    f"{number} {arm} {i}: tell me about the weather on day {i} of the year" for i in range(count)
                ]
                each = rate(
                    ports["plain" if arm == "plain" else "ours"], control, prompts, concurrency, options.tokens
                )
                if number >= 0:
                    rates[arm].append(each)
        found[str(concurrency)] = rates
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| requests at a time | arm | requests a second | over plain | smallest, largest |",
        "|---|---|---|---|---|",
    ]
    for concurrency, rates in found.items():
        for arm, each in rates.items():
            ratios = [one / plain for one, plain in zip(each, rates["plain"], strict=True)]
            spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
            lines.append(f"| {concurrency} | {arm} | {median(each):.2f} | {median(ratios):.2f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="folder or Hub repo")
    parser.add_argument("head", help="a head with an advantage part: folder or Hub repo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="of one arm in a round, at least")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output", type=Path, help="where all figures go, as JSON")
    options = parser.parse_args()

    ports = {"plain": free_port(), "ours": free_port()}
    shared = ["--dtype", options.dtype, "--max-model-len", "512", "--max-num-seqs", "32"]
    vllm = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", options.base]
    plain = [*vllm, "--port", str(ports["plain"]), "--served-model-name", "base", *shared]
    ours = [sys.executable, "-m", "hf_recontrol", "serve", options.base, "--engine", "vllm"]
    ours += ["--value-head", options.head, "--port", str(ports["ours"]), "--served-model-name", "base"]
    with running(plain, ports["plain"]), running([*ours, "--dtype", options.dtype, "--", *shared[2:]], ports["ours"]):
        found = measure(ports, options)
    print(table(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
