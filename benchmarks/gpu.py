"""
Control on a GPU: whether it is right there, and what it costs. Needs torch, transformers and this package.

    make bench-gpu                                # python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --device cpu --small # the same path where there is no GPU

Four parts:

- *right*: the logits of every control on the device against float64 and autograd on the CPU, as a share of what it
  does to them. In float64 all rows agree; in float32 nine in ten do: a unit at its kink may turn by rounding. Heads at
  the LM head have what `fit` gives them (a static vector, g, a token bias); one more reads a decoder layer.
- `overhead.py --model 7b` on the device: controlled over plain decoding, a step.
- *edit*: milliseconds that one edit at 7B geometry (hidden 4096, one hidden layer of 4096) adds to a step of a base of
  one thin layer, in eager mode and compiled whole, on CUDA with CUDA graphs; the median of the rounds, in turn.
- *modes*: what is compiled, of one control of each kind (the rows of `MODES`; the others run in eager mode alone): 12
  greedy tokens of two prompts by `generate` with a static cache, by a step that is compiled whole and, on CUDA, by one
  in CUDA graphs, against those of eager mode. Sampling, beams and other modes of `generate` are not among them.

What is not begun --minutes after the start is left out and named; `overhead.py` gets half of what is left after the
first part and is then stopped, and what it has printed stands. The exit status is 1 where something is not right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from overhead import timer
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig

# Of float32, the share of what control does to the logits, that nine rows in ten may differ from float64.
NEAR = 1e-3
EXACT = 1e-8
# The share that compiled code may do otherwise.
SAME = 1e-2
VOCABULARY = 1000


def base_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # logits as far apart as a trained model's
    return model


class Called(ValueHead):
    """A head that the controller does not know, and so climbs by autograd."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)


def random_head(seed: int = 0, **config) -> ValueHead:
    torch.manual_seed(seed)
    head = ValueHead(ValueHeadConfig(**({"hidden_size": 256, "head_sizes": [256], "hook_point": "lm_head"} | config)))
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.06)
    if head.config.static_vector:
        torch.nn.init.normal_(head.static_vector, std=0.1)
    if head.config.token_bias_size is not None:
        torch.nn.init.normal_(head.token_bias, std=0.5)
    return head


# What `fit` gives a head beside V.
FITTED = {"advantage_sizes": [64], "static_vector": True, "token_bias_size": VOCABULARY}
HEADS = {
    "default": {},
    "other": {"seed": 1},
    "deep": {"head_sizes": [128, 64]},
    "deeper": {"head_sizes": [128, 64, 64]},
    "gelu": {"activation": "gelu"},
    "linear": {"head_sizes": []},
    "fitted": FITTED,
    "fitted2": {"seed": 1, **FITTED},
}
# A model's heads share a hook point: this one has a model of its own.
AT_A_LAYER = {"default": {"hook_point": "decoder_layer", "layer": 0}}
ASCENT = ControlConfig(step_size=0.5, num_steps=30)
ADVANTAGE = ControlConfig("advantage", step_size=2.0)
STATIC = ControlConfig("static", step_size=2.0)
# (name, heads with their weights, control).
CONTROLS = [
    ("ascent, n=30", {"default": 1.0}, ASCENT),
    ("ascent, n=200", {"default": 1.0}, replace(ASCENT, num_steps=200)),
    ("ascent with a penalty", {"default": 1.0}, replace(ASCENT, l2=0.05)),
    ("ascent to a target", {"default": 1.0}, replace(ASCENT, step_size=0.05, target=3.0)),
    ("ascent of two layers", {"deep": 1.0}, ASCENT),
    ("ascent of three layers", {"deeper": 1.0}, ASCENT),
    ("ascent, GELU", {"gelu": 1.0}, ASCENT),
    ("ascent, linear V", {"linear": 1.0}, ASCENT),
    ("ascent of a mixture", {"default": 0.7, "other": -0.4}, ASCENT),
    ("ascent, a step by row", {"default": 1.0}, replace(ASCENT, step_size=(0.1, 0.3, 0.5, 1.0))),
    ("advantage", {"fitted": 1.0}, ADVANTAGE),
    ("advantage of a mixture", {"fitted": 0.7, "fitted2": -0.4}, ADVANTAGE),
    ("advantage, by row", {"fitted": 1.0}, replace(ADVANTAGE, step_size=(0.5, 1.0, 2.0, 3.0))),
    ("static", {"fitted": 1.0}, STATIC),
    ("static of a mixture", {"fitted": 0.7, "fitted2": -0.4}, STATIC),
    ("plausibility", {"default": 1.0}, replace(ASCENT, plausibility=0.1)),
    ("a limit on KL", {"fitted": 1.0}, replace(ADVANTAGE, max_kl=0.05)),
]
LAYER_CONTROLS = [("ascent at a layer", {"default": 1.0}, ASCENT)]
MODES = ("ascent, n=30", "ascent of two layers", "advantage", "static", "plausibility", "a limit on KL")


def controlled(
    dtype: torch.dtype, device: str, configs: dict[str, dict] = HEADS, by_autograd: bool = False
) -> ReControlForCausalLM:
    """A small base with all heads of `configs`. The same weights whatever the dtype."""
    heads = {name: random_head(**config).to(dtype) for name, config in configs.items()}
    if by_autograd:
        for head in heads.values():
            head.__class__ = Called
    base = base_model().to(device, dtype)
    model = ReControlForCausalLM.from_model(base, heads.pop("default"), ASCENT)
    for name, head in heads.items():
        model.add_value_head(name, head)
    return model


@torch.no_grad()
def logits_of(model: ReControlForCausalLM, ids: torch.Tensor, control, heads: dict[str, float]) -> torch.Tensor:
    with model.use_control(control, heads):
        return model(ids.to(model.device)).logits.double().cpu()


def right(device: str) -> list[dict]:
    """Every control's logits against float64 on the CPU, where heads compute by their own methods and by autograd."""
    parts = ((HEADS, CONTROLS), (AT_A_LAYER, LAYER_CONTROLS))
    return [row for configs, controls in parts for row in right_of(device, configs, controls)]


def right_of(device: str, configs: dict[str, dict], controls: list[tuple]) -> list[dict]:
    ids = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    reference, rows = controlled(torch.float64, "cpu", configs, by_autograd=True), []
    with reference.disable_control(), torch.no_grad():
        plain = reference(ids).logits
    wanted = {name: logits_of(reference, ids, control, heads) for name, heads, control in controls}
    for dtype, limit, share in ((torch.float64, EXACT, 1.0), (torch.float32, NEAR, 0.9)):
        model = controlled(dtype, device, configs)
        for name, heads, control in controls:
            found = logits_of(model, ids, control, heads)
            # What plausibility excludes is -inf in both; a row where it is so in one alone is wrong.
            kept = wanted[name].isfinite()
            alike = (torch.where(kept, 0, wanted[name]) == torch.where(found.isfinite(), 0, found)).all(-1)
            gap, size = (torch.where(kept, x, 0).norm(dim=-1) for x in (found - wanted[name], wanted[name] - plain))
            errors = torch.where(alike, gap / size, torch.inf).nan_to_num(torch.inf).flatten()
            # The limit is found by trials, to 0.1 % of itself.
            allowed = limit if control.max_kl is None else max(limit, 2e-3)
            worst = float(errors.quantile(share))
            rows.append({"control": name, "dtype": str(dtype), "error": worst, "right": worst <= allowed})
            print(f"  {name:24s} {str(dtype)[6:]:8s} {worst:.1e}{'' if worst <= allowed else '   WRONG'}", flush=True)
    return rows


def is_late(end: float, name: str) -> bool:
    """Whether there is no time left for this row, which is then said."""
    late = time.monotonic() > end
    if late:
        print(f"  {name:24s} left out: no time is left", flush=True)
    return late


def modes(device: str, whole: dict, fastest: dict, end: float) -> list[dict]:
    """Greedy tokens of what is compiled against those of eager mode."""
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1)).to(device)
    settings = {"do_sample": False, "max_new_tokens": 12}
    rows = []
    for name, heads, control in [row for row in CONTROLS if row[0] in MODES]:
        if is_late(end, name):
            continue
        model = controlled(torch.float32, device)
        with model.use_control(control, heads):
            eager = model.generate(ids, **settings).tolist()
            found = {"static cache": model.generate(ids, cache_implementation="static", **settings).tolist()}
            found["compiled whole"] = decoded(model, ids, 12, **whole)
            if fastest != whole:
                found["CUDA graphs"] = decoded(model, ids, 12, **fastest)
        for mode, tokens in found.items():
            rows.append({"control": name, "mode": mode, "right": tokens == eager})
            print(f"  {name:24s} {mode:16s} {'equal' if tokens == eager else 'WRONG'}", flush=True)
    return rows


@torch.no_grad()
def decoded(model: ReControlForCausalLM, ids: torch.Tensor, count: int, **options) -> list[list[int]]:
    """Greedy tokens by a forward that is compiled whole, over a static cache."""
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, **options)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + count)
    sequence = ids
    tokens = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    for position in range(ids.shape[1], ids.shape[1] + count):
        sequence = torch.cat([sequence, tokens], dim=1)
        positions = torch.tensor([[position]], device=ids.device).expand(len(ids), 1)
        logits = step(tokens, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True).clone()
    return sequence.tolist()


def stepper(model: ReControlForCausalLM, size: int, called: Callable) -> Callable[[], torch.Tensor]:
    """One decoding step of `size` rows over a static cache, the same at each call."""
    ids = torch.randint(3, model.config.vocab_size, (size, 4), generator=torch.Generator().manual_seed(size))
    ids = ids.to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(ids, past_key_values=cache, logits_to_keep=1)
    positions = torch.full((size, 1), 4, device=ids.device)

    def step() -> torch.Tensor:
        cache.reset()
        return called(ids[:, -1:], past_key_values=cache, position_ids=positions, logits_to_keep=1).logits

    return step


@torch.no_grad()
def edits(device: str, width: int, batch_sizes: list[int], rounds: int, options: dict, end: float) -> list[dict]:
    """Milliseconds that one edit adds to the step of a base of one thin layer, in eager mode and compiled whole."""
    place, rows, vocabulary = torch.device(device), [], 8 * width
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=width // 16,
        vocab_size=vocabulary,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(place)
    fitted = {"advantage_sizes": [width // 4], "static_vector": True, "token_bias_size": vocabulary}
    head = random_head(hidden_size=width, head_sizes=[width], **fitted)
    model = ReControlForCausalLM.from_model(base, head.to(place), ASCENT)
    model.add_value_head("deep", random_head(hidden_size=width, head_sizes=[width, width]).to(place))
    ascent, long = replace(ASCENT, step_size=0.01), replace(ASCENT, step_size=0.01, num_steps=200)
    kinds = [
        *(("ascent, n=30", "default", ascent, size) for size in batch_sizes),
        ("ascent, n=200", "default", long, batch_sizes[0]),
        ("two layers, n=30", "deep", ascent, batch_sizes[0]),
        *(("advantage", "default", replace(ADVANTAGE, step_size=0.01), size) for size in batch_sizes),
        ("static", "default", replace(STATIC, step_size=0.01), batch_sizes[0]),
    ]
    for name, which, control, size in kinds:
        if is_late(end, f"{name}, batch {size}"):
            continue
        torch.compiler.reset()
        forms = {"eager": model, "compiled": torch.compile(model, fullgraph=True, dynamic=False, **options)}
        steps = {form: stepper(model, size, called) for form, called in forms.items()}
        seconds: dict[tuple[str, bool], list[float]] = {(form, on): [] for form in forms for on in (False, True)}
        moved = {}
        for number in range(-3, rounds):
            for (form, on), times in seconds.items():
                with model.use_control(control if on else False, {which: 1.0}):
                    begin = timer(place)
                    logits = steps[form]()
                    if number >= 0:
                        times.append(timer(place) - begin)
                    else:
                        moved[form, on] = logits.float().clone()
        effects = [moved[form, True] - moved[form, False] for form in forms]
        equal = bool((effects[1] - effects[0]).norm() <= SAME * effects[0].norm()) and bool(effects[0].any())
        pairs = {form: zip(seconds[form, True], seconds[form, False], strict=True) for form in forms}
        added = {form: 1e3 * statistics.median(on - off for on, off in times) for form, times in pairs.items()}
        plain = {form: 1e3 * statistics.median(seconds[form, False]) for form in forms}
        rows.append({"control": name, "batch_size": size, "added_ms": added, "base_ms": plain, "right": equal})
        said = ", ".join(f"{form} {added[form]:.3f} ms (base {plain[form]:.3f})" for form in forms)
        print(f"  {name:18s} batch {size:2d}  {said}{'' if equal else '   WRONG'}", flush=True)
    return rows


def overheads(device: str, batch_sizes: list[int], rounds: int, small: bool, seconds: float) -> dict | None:
    """What `overhead.py` measures at 7B geometry, in a process whose memory is free; `None` if it takes longer."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "overhead.json"
        words = ["--model", "tiny" if small else "7b", "--device", device, "--rounds", str(rounds)]
        words += ["--output", str(output), "--batch-sizes", *map(str, batch_sizes)]
        try:
            subprocess.run(
                [sys.executable, Path(__file__).with_name("overhead.py"), *words], check=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            print(f"stopped after {seconds:.0f} s: `overhead.py` alone has no limit", flush=True)
            return None
        return json.loads(output.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--small", action="store_true", help="widths of 64, traced but not compiled")
    parser.add_argument("--minutes", type=float, default=10, help="nothing is begun later (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    device, small, end = arguments.device, arguments.small, time.monotonic() + 60 * arguments.minutes
    if min(arguments.rounds, *arguments.batch_sizes) < 1:
        parser.error("--rounds and --batch-sizes are 1 or more")
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.resolve().parent}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --device cpu --small takes the same path without one")
    # Tracing alone on a small model; CUDA graphs where there are any.
    whole = {"backend": "aot_eager"} if small else {}
    fastest = {"mode": "reduce-overhead"} if device == "cuda" else whole
    name = torch.cuda.get_device_name(device) if device == "cuda" else device
    print(f"{name}, torch {torch.__version__}")
    print("\nright: the worst row (float32: of the best nine tenths), against float64 on the CPU")
    figures = {"device": name, "torch": torch.__version__, "right": right(device)}
    print("\noverhead.py: a controlled step over the base's", flush=True)
    seconds = max(1, (end - time.monotonic()) / 2)
    figures["overhead"] = overheads(device, arguments.batch_sizes, arguments.rounds, small, seconds)
    print("\nedit: one edit")
    width = 64 if small else 4096
    figures["edit"] = edits(device, width, arguments.batch_sizes, arguments.rounds, fastest, end)
    print("\nmodes: greedy tokens, against eager mode")
    figures["modes"] = modes(device, whole, fastest, end)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not all(row["right"] for part in ("right", "modes", "edit") for row in figures[part]):
        sys.exit(1)


if __name__ == "__main__":
    main()
