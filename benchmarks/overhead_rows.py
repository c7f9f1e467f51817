"""The rows of overhead.py: controls and their targets, rivals' loops, and the random heads that all of them need."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig

STEP_SIZE = 0.5
# What a step may take of the base's, and at which batch sizes.
TARGETS = {
    "ascent, n=30": (1.05, (1,)),
    "ascent, n=200": (1.10, (1, 8, 32)),
    "mixture of 4 heads, n=30": (1.15, (1,)),
    "two hidden layers, n=30": (1.3, (1,)),
    "two hidden layers, n=200": (2, (1,)),
    "three hidden layers, n=30": (1.3, (1,)),
    "three hidden layers, n=200": (2, (1,)),
    "advantage": (1.01, (1,)),
}
# Heads by name: the widths of V's hidden layers.
DEPTHS = {"default": 1, "two": 2, "three": 3}
SEVERAL = ("default", "other1", "other2", "other3")


@dataclass
class Variant:
    """A control of some of the model's heads; or a rival's edit of the state, at the same place."""

    name: str
    heads: tuple[str, ...]
    control: ControlConfig | None = None
    # Makes the rival's edit of a head.
    rival: Callable[[ValueHead], Callable[[torch.Tensor], torch.Tensor]] | None = None
    # Whether it is timed until its interval is narrow.
    precise: bool = False
    most_rows: int | None = None

    @property
    def is_ascent(self) -> bool:
        """Whether units may flip on its way."""
        return self.control is not None and self.control.method == "ascent"


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


def all_variants() -> list[Variant]:
    """Every row of the table."""
    ascents = [ControlConfig(step_size=STEP_SIZE, num_steps=n) for n in (30, 200)]
    edit = ControlConfig("advantage", STEP_SIZE)
    return [
        *(Variant(f"ascent, n={c.num_steps}", SEVERAL[:1], c) for c in ascents),
        Variant("advantage", ("advantage",), edit, precise=True),
        # A limit that is always broken, so that it is always looked for.
        Variant("advantage with a limit on KL, reached at each token", ("advantage",), replace(edit, max_kl=1e-6)),
        Variant("static", ("advantage",), replace(edit, method="static"), precise=True),
        *(Variant(f"ascent to a target, n={c.num_steps}", SEVERAL[:1], replace(c, target=1.0)) for c in ascents),
        *(Variant(f"mixture of {k} heads, n={c.num_steps}", SEVERAL[:k], c) for k in (2, 4) for c in ascents),
        *(Variant(f"two hidden layers, n={c.num_steps}", ("two",), c) for c in ascents),
        *(Variant(f"three hidden layers, n={c.num_steps}", ("three",), c, most_rows=1) for c in ascents),
        *(Variant(f"the direct loop, n={n}", SEVERAL[:1], rival=partial(direct_loop, num_steps=n)) for n in (30, 200)),
        Variant("the authors' loop, n=30", SEVERAL[:1], rival=partial(authors_loop, num_steps=30)),
    ]


def chosen_variants(only: Sequence[str] | None) -> list[Variant]:
    """Those whose names hold one of the words."""
    variants = all_variants()
    if only is None:
        return variants
    if odd := [word for word in only if not any(word in variant.name for variant in variants)]:
        raise ValueError(f"no row's name holds {odd[0]!r}; the rows: {'; '.join(row.name for row in variants)}")
    return [variant for variant in variants if any(word in variant.name for word in only)]


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
        spread = float(relative_edit * states.std() / STEP_SIZE)
        nn.init.normal_(head.advantage_mlp.layers[-1].bias, std=spread)
        nn.init.normal_(head.advantage_mlp.layers[-1].weight, std=1e-3)
        nn.init.normal_(head.static_vector, std=spread)
        nn.init.normal_(head.token_bias, std=0.1)
    return head


def shuffled(head: ValueHead, seed: int) -> ValueHead:
    """A head that differs from this one: its features in another order, each with a scale of its own."""
    order = torch.randperm(head.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(head)
    with torch.no_grad():
        other.value_mlp.layers[0].weight.copy_(head.value_mlp.layers[0].weight[:, order])
        other.state_scale.mul_(0.8 + 0.4 * order.to(head.state_scale) / len(order))
    return other


def with_heads(
    model: nn.Module, variants: list[Variant], args: argparse.Namespace
) -> tuple[ReControlForCausalLM, torch.Tensor]:
    """The model with all heads that the variants need, and states of it, `(64, hidden_size)`, float32 on the CPU."""
    torch.manual_seed(0)
    states = []
    output = model.get_output_embeddings()
    handle = output.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].detach()))
    with torch.no_grad():
        model(torch.randint(3, model.config.vocab_size, (1, 64), device=model.device))
    handle.remove()
    states = states[0][0].float().cpu()
    hidden_size, names = states.shape[-1], {name for variant in variants for name in variant.heads}
    shape = {"hidden_size": hidden_size, "hook_point": "lm_head"}
    heads = {}
    for name, depth in DEPTHS.items():
        # The mixtures' heads are made of the first one, which the model is put together with anyway.
        if name in names | {"default"}:
            config = ValueHeadConfig(head_sizes=[args.width or hidden_size] * depth, **shape)
            heads[name] = scaled_head(config, states, args.relative_edit)
    if "advantage" in names:
        parts = {"advantage_sizes": [args.advantage_width], "static_vector": True}
        config = ValueHeadConfig(head_sizes=[8], token_bias_size=len(output.weight), **parts, **shape)
        heads["advantage"] = scaled_head(config, states, args.relative_edit)
    for seed, name in enumerate(SEVERAL[1:], 1):
        if name in names:
            heads[name] = shuffled(heads["default"], seed)
    heads = {name: head.to(model.device) for name, head in heads.items()}
    model = ReControlForCausalLM.from_model(model, heads.pop("default"), ControlConfig(step_size=STEP_SIZE))
    for name, head in heads.items():
        model.add_value_head(name, head)
    return model, states


def target_of(name: str, batch_size: int) -> float | None:
    target, batch_sizes = TARGETS.get(name, (None, ()))
    return target if batch_size in batch_sizes else None
