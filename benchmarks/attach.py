"""
Time and memory that wrapping adds to loading a model.

    python benchmarks/attach.py

SmolLM2-135M is loaded with and without a head (576 - 1024 - 1 and g 576 - 256 - 576), in turn, in one process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig, embedded_model


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    base = embedded_model()
    hidden_size = AutoConfig.from_pretrained(base).hidden_size
    torch.manual_seed(0)
    head = ValueHead(ValueHeadConfig(hidden_size, head_sizes=[1024], hook_point="lm_head", advantage_sizes=[256]))
    with tempfile.TemporaryDirectory() as folder:
        head.save_pretrained(folder)
        plain, wrapped, attach, added = [], [], [], []
        for _ in range(args.rounds + 1):
            begin = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            plain.append(time.perf_counter() - begin)
            model(torch.tensor([[1, 2, 3]]))  # loading maps the weights, the first forward reads them
            before, begin = resident_bytes(), time.perf_counter()
            model = ReControlForCausalLM.from_model(model, folder, ControlConfig())
            attach.append(time.perf_counter() - begin)
            model(torch.tensor([[1, 2, 3]]))  # the first use builds the Gram matrix
            added.append(resident_bytes() - before)
            del model
            gc.collect()
            begin = time.perf_counter()
            model = ReControlForCausalLM.from_pretrained(base, value_head=folder, dtype=torch.float32)
            wrapped.append(time.perf_counter() - begin)
            del model
            gc.collect()
    plain, wrapped, attach, added = (values[1:] for values in (plain, wrapped, attach, added))
    ratios = [w / p for w, p in zip(wrapped, plain, strict=True)]
    head_bytes = sum(tensor.numel() * 4 for tensor in head.state_dict().values())
    print(f"load base {1e3 * statistics.median(plain):.0f} ms, load wrapped {1e3 * statistics.median(wrapped):.0f} ms")
    print(f"ratio {statistics.median(ratios):.3f}x [{min(ratios):.3f}, {max(ratios):.3f}]")
    print(f"attach alone (head read from disk) {1e3 * statistics.median(attach):.1f} ms")
    print(f"memory after the first controlled forward +{statistics.median(added) / 1e6:.1f} MB")
    print(f"of which head {head_bytes / 1e6:.1f} MB, Gram matrix {4 * 1024**2 / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
