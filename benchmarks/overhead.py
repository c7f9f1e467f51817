"""
Time of controlled over base generation, a token.

    python benchmarks/overhead.py --model smollm2
    python benchmarks/overhead.py --model 7b --batch-sizes 1 8 32       # `make bench`, with --rounds 5 --table

Each decoding step runs the base and every control in turn, in one process, on the same cache; what is printed is the
median over rounds of the ratio to the base's step of the same round, with the 10th and 90th percentile. `7b` has the
geometry of a 7B Llama (hidden 4096, 32 layers, vocabulary 32,000, bf16) with random weights: 2 and 4 layers are timed,
the step of 32 layers is t2 + 15 (t4 - t2), and the control's own time (which does not depend on the number of layers)
is the difference to the base at 2 layers. Heads are random; their last layer is scaled so that the ascent at n=30
moves a state by --relative-edit of its norm, and each control is checked to move the logits.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig, embedded_model

STEP_SIZE = 0.5
# At batch 1.
TARGETS = {
    "ascent n=30": 1.05,
    "ascent n=200": 1.10,
    "ascent, 4 heads, n=30": 1.15,
    "ascent, two layers, n=30": 1.3,
    "ascent, two layers, n=200": 2,
    "advantage": 1.01,
}


@dataclass
class Variant:
    """A control of some of the model's heads; or a rival's edit of the state, at the same place."""

    name: str
    heads: tuple[str, ...] = ()
    control: ControlConfig | None = None
    rival: Callable[[torch.Tensor], torch.Tensor] | None = None


def authors_loop(head: ValueHead, num_steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """V as the authors climb it: a forward and a backward of the network at each step, also to its own parameters."""

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            edited = hidden.detach().float().requires_grad_(True)
            optimizer = torch.optim.SGD([edited], lr=STEP_SIZE)
            for _ in range(num_steps):
                optimizer.zero_grad()
                (-head(edited).sum()).backward()
                optimizer.step()
        return edited.detach().to(hidden.dtype)

    return edit


def direct_loop(head: ValueHead, num_steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same steps without autograd, for one hidden layer: two products with W₁ each."""
    first, last = head.value_mlp.layers

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        x = head.scaled(hidden)
        for _ in range(num_steps):
            active = torch.nn.functional.linear(x, first.weight, first.bias) > 0
            x = x + STEP_SIZE * ((active * last.weight[0]) @ first.weight)
        return (x * head.state_scale + head.state_mean).to(hidden.dtype)

    return edit


def scaled_head(config: ValueHeadConfig, states: torch.Tensor, relative_edit: float) -> ValueHead:
    """A random head whose 30 steps move `states` by `relative_edit` of their norm."""
    torch.manual_seed(0)
    head = ValueHead(config)
    head.state_mean.copy_(states.mean(0))
    head.state_scale.copy_(states.std())
    for _ in range(6):
        x = start = head.scaled(states).detach()
        for _ in range(30):
            x = x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(head.value_mlp(x).sum(), x)
            x = (x + STEP_SIZE * gradient).detach()
        edit = (x - start) * head.state_scale
        with torch.no_grad():
            head.value_mlp.layers[-1].weight.mul_(relative_edit * states.norm() / edit.norm())
    if head.advantage_mlp is not None:
        nn.init.normal_(head.advantage_mlp.layers[-1].bias, std=float(relative_edit * states.std() / STEP_SIZE))
        nn.init.normal_(head.advantage_mlp.layers[-1].weight, std=1e-3)
    return head


def shuffled(head: ValueHead, seed: int) -> ValueHead:
    """A head that differs from this one: its features in another order, each with a scale of its own."""
    order = torch.randperm(head.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(head)
    with torch.no_grad():
        other.value_mlp.layers[0].weight.copy_(head.value_mlp.layers[0].weight[:, order])
        other.state_scale.mul_(0.8 + 0.4 * order.to(head.state_scale) / len(order))
    return other


def flips_per_row(head: ValueHead, states: torch.Tensor, num_steps: int) -> float:
    """Sign changes of V's hidden units along the ascent, a row, by the plain loop."""
    first, last = head.value_mlp.layers
    x = (states - head.state_mean) / head.state_scale
    count, before = 0, None
    for _ in range(num_steps):
        active = first(x) > 0
        count += 0 if before is None else int((active != before).sum())
        before = active
        x = x + STEP_SIZE * ((active * last.weight.sum(0)) @ first.weight)
    return count / len(states)


def timer(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure(
    model, variants: list[Variant], batch_size: int, prompt_length: int, rounds: int
) -> dict[str, list[float]]:
    """
    Seconds of one decoding step under each control, and of the base, `rounds` times in turn. With variants the model
    is a controlled one, and the base's step is its step with control off, hooks included (some 20 microseconds).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch_size, prompt_length), generator=generator).to(device)
    cache = DynamicCache(config=model.config)
    off = model.disable_control if isinstance(model, ReControlForCausalLM) else nullcontext
    with off():
        model(ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]

    def step() -> torch.Tensor:
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits
        cache.crop(-1)
        return logits

    with off():
        base_logits = step()
    seconds: dict[str, list[float]] = {"base": []} | {variant.name: [] for variant in variants}

    def timed(name: str) -> torch.Tensor:
        begin = timer(device)
        logits = step()
        seconds[name].append(timer(device) - begin)
        return logits

    for round_number in range(-1, rounds):
        with off():
            timed("base")
        for variant in variants:
            with ExitStack() as stack:
                if variant.rival is None:
                    weights = dict.fromkeys(variant.heads, 1 / len(variant.heads))
                    stack.enter_context(model.use_control(variant.control, weights))
                else:
                    stack.enter_context(off())
                    hook = partial(rival_hook, variant.rival)
                    stack.callback(model.get_output_embeddings().register_forward_pre_hook(hook).remove)
                logits = timed(variant.name)
            if torch.equal(logits, base_logits):
                raise RuntimeError(f"{variant.name} did not move the logits.")
        if round_number < 0:  # the first round builds plans and fills caches
            for times in seconds.values():
                times.clear()
    return seconds


def rival_hook(edit: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, inputs: tuple) -> tuple:
    return (edit(inputs[0]), *inputs[1:])


def make_variants(model, hidden_size: int, args) -> tuple[ReControlForCausalLM, list[Variant], dict[str, float]]:
    """The model with all heads on it, what to measure, and flips a row."""
    width = args.width or hidden_size
    torch.manual_seed(0)
    states = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: states.append(inputs[0].detach())
    )
    with torch.no_grad():
        model(torch.randint(3, model.config.vocab_size, (1, 64), device=model.device))
    handle.remove()
    states = states[0][0].float().cpu()
    shape = {"hidden_size": hidden_size, "hook_point": "lm_head"}
    one = scaled_head(ValueHeadConfig(head_sizes=[width], **shape), states, args.relative_edit)
    two = scaled_head(ValueHeadConfig(head_sizes=[width, width], **shape), states, args.relative_edit)
    advantage = scaled_head(
        ValueHeadConfig(head_sizes=[8], advantage_sizes=[args.advantage_width], **shape), states, args.relative_edit
    )
    one, two, advantage = (head.to(model.device) for head in (one, two, advantage))
    model = ReControlForCausalLM.from_model(model, one, ControlConfig(step_size=STEP_SIZE))
    heads = {"two": two, "advantage": advantage} | {f"other{seed}": shuffled(one, seed) for seed in (1, 2, 3)}
    for name, head in heads.items():
        model.add_value_head(name, head)
    several = ("default", "other1", "other2", "other3")
    variants = []
    for n in (30, 200):
        control = ControlConfig(step_size=STEP_SIZE, num_steps=n)
        variants += [
            Variant(f"ascent n={n}", several[:1], control),
            Variant(f"ascent, 2 heads, n={n}", several[:2], control),
            Variant(f"ascent, 4 heads, n={n}", several, control),
            Variant(f"ascent to a target, n={n}", several[:1], replace(control, target=1.0)),
            Variant(f"ascent, two layers, n={n}", ("two",), control),
            Variant(f"direct loop n={n}", rival=direct_loop(one, n)),
        ]
    variants.append(Variant("authors' loop n=30", rival=authors_loop(one, 30)))
    variants.append(Variant("advantage", ("advantage",), ControlConfig("advantage", STEP_SIZE)))
    # A limit that is always broken, so that it is always looked for.
    variants.append(Variant("advantage, max_kl", ("advantage",), ControlConfig("advantage", STEP_SIZE, max_kl=1e-6)))
    flips = {f"ascent n={n}": flips_per_row(one, states.to(model.device), n) for n in (30, 200)}
    return model, variants, flips


def llama_7b(num_layers: int, device: str) -> nn.Module:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        vocab_size=32000,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def percentiles(values: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), deciles[0], deciles[-1]


def report(title: str, base: float, ratios: dict[str, list[float]], flips: dict[str, float]) -> list[dict]:
    print(f"\n{title}: base {1e3 * base:.1f} ms a step")
    rows = []
    for name, values in ratios.items():
        median, low, high = percentiles(values)
        note = f"   {flips[name]:.0f} flips a row" if name in flips else ""
        print(f"  {name:28s} {median:7.3f}x  [{low:.3f}, {high:.3f}]{note}")
        rows.append({"control": name, "ratio": median, "low": low, "high": high, "flips": flips.get(name)})
    return rows


def print_table(results: list[dict]) -> None:
    """All batch sizes side by side, in Markdown, with the targets."""
    names = ["control", *(f"batch {result['batch_size']}" for result in results), "target at batch 1"]
    print("\n| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for rows in zip(*(result["rows"] for result in results), strict=True):
        cells = [f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows]
        print("| " + " | ".join([rows[0]["control"], *cells, str(TARGETS.get(rows[0]["control"], ""))]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "7b"), required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--width", type=int, help="of V's hidden layers; default: the hidden size")
    parser.add_argument("--advantage-width", type=int, default=1024)
    parser.add_argument("--relative-edit", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="print a table of all batch sizes too")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    device = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{device}, torch {torch.__version__}, {platform.machine()}")
    results = []
    if args.model == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval().to(args.device)
        model, variants, flips = make_variants(model, model.config.hidden_size, args)
        for batch_size in args.batch_sizes:
            seconds = measure(model, variants, batch_size, args.prompt_length, args.rounds)
            base = statistics.median(seconds["base"])
            ratios = {
                name: [t / b for t, b in zip(times, seconds["base"], strict=True)]
                for name, times in seconds.items()
                if name != "base"
            }
            rows = report(f"SmolLM2-135M, batch {batch_size}", base, ratios, flips)
            results.append({"batch_size": batch_size, "base_seconds": base, "rows": rows})
    else:
        shallow, deep = llama_7b(2, args.device), llama_7b(4, args.device)
        shallow, variants, flips = make_variants(shallow, 4096, args)
        for batch_size in args.batch_sizes:
            layers4 = statistics.median(measure(deep, [], batch_size, args.prompt_length, args.rounds)["base"])
            seconds = measure(shallow, variants, batch_size, args.prompt_length, args.rounds)
            layers2 = statistics.median(seconds["base"])
            base = layers2 + 15 * (layers4 - layers2)
            ratios = {
                name: [1 + (t - b) / base for t, b in zip(times, seconds["base"], strict=True)]
                for name, times in seconds.items()
                if name != "base"
            }
            rows = report(f"7B geometry, batch {batch_size} (32 layers extrapolated)", base, ratios, flips)
            results.append({"batch_size": batch_size, "base_seconds": base, "rows": rows})
        head = shallow.value_heads["default"]
        head_bytes = 4 * (sum(t.numel() for t in head.state_dict().values()) + head.config.head_sizes[0] ** 2)
        layer_bytes = sum(p.numel() * 2 for p in shallow.model.layers[0].parameters())
        other_bytes = sum(p.numel() * 2 for p in shallow.parameters()) - 2 * layer_bytes
        model_bytes = other_bytes + 32 * layer_bytes
        print(
            f"\nBytes: head with Gram matrix {head_bytes / 1e6:.0f} MB (float32), model {model_bytes / 1e9:.1f} GB "
            f"(bf16): a step that reads each once takes {1 + head_bytes / model_bytes:.4f}x."
        )
    if args.table:
        print_table(results)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"device": device, "model": args.model, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
