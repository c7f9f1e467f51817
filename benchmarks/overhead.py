"""
Time of controlled over base generation, a token.

    python benchmarks/overhead.py --model smollm2
    python benchmarks/overhead.py --model 7b --batch-sizes 1 8 32 --table       # `make bench`
    python benchmarks/overhead.py --model 7b --only advantage static "ascent, n=200" "three hidden"

Decoding steps of the base and of the controls of one head run in turn, in one process, on the same cache. Printed is
the median over rounds of the ratio to the base's step of the same round, and the 95 % interval of that median (by
bootstrap of the rounds). The advantage edit and the static one, whose shares are small, are timed in as many more
rounds as it takes for their intervals to be narrower than --interval.

`7b` has the geometry of a 7B Llama (hidden 4096, 32 layers, vocabulary 32,000, bf16) with random weights: 2 and 4
layers are timed, the step of 32 layers is t2 + 15 (t4 - t2), and the control's own time (which does not depend on the
number of layers) is the difference to the base at 2 layers. The intervals do not hold the error of that one step, by
which all rows are divided. `tiny` is the same of a few units, to see that it runs.

Heads are random; their last layer is scaled so that the ascent at n=30 moves a state by --relative-edit of its norm,
and each control is checked to move the logits. The head of the advantage edit has what `fit` gives it: a static vector
and a token bias, which is added to all logits. Three hidden layers are timed at a batch of 1 alone: at others their
steps take seconds.

Beside a time stands what the control's products read of matrices in that step: of those that are read whole, all, of
others the rows that are picked, each time that one is. Beside an ascent's also stand how often units change their sign
on its way, and how many of them ever do, a row (in all hidden layers, by the plain loop).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from counts import MatrixBytes, flips_of
from overhead_rows import Variant, chosen_variants, target_of, with_heads
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hf_recontrol import ReControlForCausalLM, embedded_model

GEOMETRIES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512},
}
# Of what is timed until its interval is narrow: after how many rounds each that is looked at (which takes longer than
# a step), and rounds at most, as a multiple of --rounds.
LOOKED_AT, AT_MOST = 20, 100
# States of which flips are counted.
COUNTED = 8


def timer(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Decoding:
    """
    A decoding step of `batch_size` rows behind a prompt, the same at each call. The base's step of a model with heads
    is its step with control off, hooks included (some 20 microseconds).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batch_size: int, prompt_length: int):
        self.model, self.device = model, next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (batch_size, prompt_length), generator=generator)
        ids = ids.to(self.device)
        self.cache, self.token = DynamicCache(config=model.config), ids[:, -1:]
        with self.under(None):
            model(ids, past_key_values=self.cache, logits_to_keep=1)

    def under(self, variant: Variant | None) -> ExitStack:
        """A block in which the model is under that control, or the base."""
        stack, model = ExitStack(), self.model
        if variant is not None and variant.rival is None:
            weights = dict.fromkeys(variant.heads, 1 / len(variant.heads))
            stack.enter_context(model.use_control(variant.control, weights))
            return stack
        is_controlled = isinstance(model, ReControlForCausalLM)
        stack.enter_context(model.disable_control() if is_controlled else nullcontext())
        if variant is not None:
            hook = partial(rival_hook, variant.rival(model.value_heads[variant.heads[0]]))
            stack.callback(model.get_output_embeddings().register_forward_pre_hook(hook).remove)
        return stack

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """The logits."""
        logits = self.model(self.token, past_key_values=self.cache, logits_to_keep=1).logits
        self.cache.crop(-1)
        return logits

    def seconds(self, variant: Variant | None = None) -> float:
        """What one step takes."""
        with self.under(variant):
            begin = timer(self.device)
            self.step()
            return timer(self.device) - begin

    def warm_up(self, variant: Variant | None = None) -> tuple[torch.Tensor, int]:
        """Logits, and the bytes of matrices that a step reads. Builds plans and fills caches."""
        with self.under(variant):
            logits = self.step()
            with MatrixBytes() as read:
                self.step()
        return logits, read.count


def rival_hook(edit: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, inputs: tuple) -> tuple:
    return (edit(inputs[0]), *inputs[1:])


def base_seconds(shallow: Decoding, deep: Decoding, rounds: int) -> float:
    """A step of 32 layers, of those of 2 and of 4 in turn."""
    for decoding in (shallow, deep):
        decoding.warm_up()
    pairs = [(shallow.seconds(), deep.seconds()) for _ in range(rounds)]
    two, four = (statistics.median(times) for times in zip(*pairs, strict=True))
    return two + 15 * (four - two)


def measure(
    decoding: Decoding, variants: list[Variant], whole: float | None, args: argparse.Namespace
) -> tuple[list[dict], float]:
    """
    Rows of the variants, whose heads are the same, and the median of the base's seconds. A ratio is to the base's step
    of its round; with `whole`, the seconds of a deeper base's step, what is added to it in that round, to `whole`.
    """
    base_logits, base_bytes = decoding.warm_up()
    rows = []
    for variant in variants:
        logits, read = decoding.warm_up(variant)
        if torch.equal(logits, base_logits):
            raise RuntimeError(f"{variant.name} did not move the logits.")
        rows.append({"control": variant.name, "matrix_bytes": read - base_bytes})
    ratios: list[list[float]] = [[] for _ in variants]
    base: list[float] = []

    def are_enough() -> bool:
        if len(base) < args.rounds:
            return False
        to_narrow = [values for variant, values in zip(variants, ratios, strict=True) if variant.precise]
        if not to_narrow or len(base) >= AT_MOST * args.rounds:
            return True
        return len(base) % LOOKED_AT == 0 and max(np.ptp(interval(values)) for values in to_narrow) <= args.interval

    while not are_enough():
        base.append(decoding.seconds())
        for variant, values in zip(variants, ratios, strict=True):
            if len(values) == args.rounds and not variant.precise:
                continue
            taken = decoding.seconds(variant)
            values.append(taken / base[-1] if whole is None else 1 + (taken - base[-1]) / whole)
    for row, values in zip(rows, ratios, strict=True):
        low, high = interval(values)
        row |= {"ratio": statistics.median(values), "low": low, "high": high, "rounds": len(values)}
    return rows, statistics.median(base)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by bootstrap."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def batch(
    decoding: Decoding, variants: list[Variant], whole: float | None, flips: dict, args: argparse.Namespace
) -> dict:
    """What is known of one batch size. Controls of the same heads are timed together: what they share is made once."""
    batch_size = len(decoding.token)
    variants = [row for row in variants if row.most_rows is None or batch_size <= row.most_rows]
    found, base = {}, []
    for heads in dict.fromkeys(variant.heads for variant in variants):
        rows, seconds = measure(decoding, [row for row in variants if row.heads == heads], whole, args)
        base.append(seconds)
        found |= {row["control"]: row for row in rows}
    rows = [
        found[variant.name] | {"target": target_of(variant.name, batch_size)} | flips.get(variant.name, {})
        for variant in variants
    ]
    result = {"batch_size": batch_size, "base_seconds": whole or statistics.median(base), "rows": rows}
    report(result)
    return result


def report(result: dict) -> None:
    print(f"\nbatch {result['batch_size']}: base {1e3 * result['base_seconds']:.1f} ms a step")
    for row in result["rows"]:
        target = "" if row["target"] is None else f"   target {row['target']:g}"
        notes = [f"{row['rounds']} rounds", f"{row['matrix_bytes'] / 1e6:.0f} MB of matrices"]
        if "flips" in row:
            notes.append(f"{row['flips']:,.0f} flips of {row['flippers']:,.0f} units a row")
        print(f"  {row['control']:52s} {cell(row)}{target}   ({', '.join(notes)})", flush=True)


def cell(row: dict) -> str:
    return f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def print_table(results: list[dict]) -> None:
    """All batch sizes side by side, in Markdown, each target beside its figure."""
    first = results[0]["batch_size"]
    batches = [f"batch {result['batch_size']}" for result in results]
    names = ["control", *batches, "flips", "units that flip", f"MB read at batch {first}"]
    print("\n| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    by_name = [{row["control"]: row for row in result["rows"]} for result in results]
    for name in dict.fromkeys(row["control"] for result in results for row in result["rows"]):
        cells = []
        for row in (rows.get(name) for rows in by_name):
            target = "" if row is None or row["target"] is None else f", target {row['target']:g}"
            cells.append("" if row is None else cell(row) + target)
        known = by_name[0].get(name, {})
        cells += [f"{known[key]:,.0f}" if key in known else "" for key in ("flips", "flippers")]
        cells.append(f"{known['matrix_bytes'] / 1e6:.0f}" if known else "")
        print("| " + " | ".join([name, *cells]) + " |")


def llama(geometry: dict, num_layers: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(num_hidden_layers=num_layers, **geometry)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def print_bytes(shallow: ReControlForCausalLM) -> None:
    head = shallow.value_heads["default"]
    head_bytes = 4 * (sum(t.numel() for t in head.state_dict().values()) + head.config.head_sizes[0] ** 2)
    layer_bytes = sum(p.numel() * 2 for p in shallow.model.layers[0].parameters())
    model_bytes = sum(p.numel() * 2 for p in shallow.parameters()) + 30 * layer_bytes
    print(
        f"\nBytes: head with Gram matrix {head_bytes / 1e6:.0f} MB (float32), model {model_bytes / 1e9:.1f} GB "
        f"(bf16): a step that reads each once takes {1 + head_bytes / model_bytes:.4f}x."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", *GEOMETRIES), required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=11, help="of every row (default: %(default)s)")
    parser.add_argument(
        "--interval",
        type=float,
        default=0.005,
        help="how wide the 95 %% interval of the advantage edit and of the static one may be: as many more rounds as "
        f"that takes, up to {AT_MOST} times --rounds (default: %(default)s)",
    )
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--width", type=int, help="of V's hidden layers; default: the hidden size")
    parser.add_argument("--advantage-width", type=int, default=1024)
    parser.add_argument("--relative-edit", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="print a table of all batch sizes too")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if min(args.rounds, args.prompt_length, *args.batch_sizes) < 1:
        parser.error("--rounds, --prompt-length and --batch-sizes are 1 or more")
    if args.output and not args.output.resolve().parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.resolve().parent}")
    try:
        variants = chosen_variants(args.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    device = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{args.model} on {device}, torch {torch.__version__}, {platform.machine()}", flush=True)
    if args.model == "smollm2":
        deep, plain = None, AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
        plain = plain.to(args.device)
    else:
        plain, deep = (llama(GEOMETRIES[args.model], layers, args.device) for layers in (2, 4))
    model, states = with_heads(plain, variants, args)
    states = states[:COUNTED].to(model.device)
    flips = {}
    for variant in variants:
        if variant.is_ascent:
            heads = [model.value_heads[name] for name in variant.heads]
            count, units = flips_of(heads, states, variant.control)
            flips[variant.name] = {"flips": count, "flippers": units}
    results = []
    for batch_size in args.batch_sizes:
        decoding, whole = Decoding(model, batch_size, args.prompt_length), None
        if deep is not None:
            whole = base_seconds(decoding, Decoding(deep, batch_size, args.prompt_length), args.rounds)
        results.append(batch(decoding, variants, whole, flips, args))
    if deep is not None:
        print_bytes(model)
    if args.table:
        print_table(results)
    if args.output:
        figures = {"device": device, "torch": torch.__version__, "model": args.model, "results": results}
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
