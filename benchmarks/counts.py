"""What is counted of a control's step: units that flip on the way of an ascent, and what is read of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_recontrol import ControlConfig, ValueHead


@torch.no_grad()
def flips_of(heads: Sequence[ValueHead], states: torch.Tensor, control: ControlConfig) -> tuple[float, float]:
    """
    Sign changes of the heads' hidden units along the ascent of their mean, by the plain loop, and how many units ever
    change theirs; both a row.
    """
    edit, last, ever, count = torch.zeros_like(states), None, None, 0
    for _ in range(control.num_steps):
        move, signs = 0, []
        for head in heads:
            x, own = head.scaled(states + edit), []
            *hidden, out = head.value_mlp.layers
            for layer in hidden:
                x = layer(x)
                own.append(x > 0)
                x = x.relu()
            gap = torch.ones_like(out(x)) if control.target is None else control.target - out(x)
            gradient = gap @ out.weight
            for layer, active in zip(reversed(hidden), reversed(own), strict=True):
                gradient = (gradient * active) @ layer.weight
            move = move + head.state_scale * gradient / len(heads)
            signs += own
        signs = torch.cat(signs, dim=1)
        flipped = torch.zeros_like(signs) if last is None else signs != last
        ever = flipped if ever is None else ever | flipped
        count, last = count + int(flipped.sum()), signs
        edit = edit + control.step_size * move
    return count / len(states), int(ever.sum()) / len(states)


class MatrixBytes(TorchDispatchMode):
    """Counts what products read of matrices, and what is picked from them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("mm", "addmm", "mv", "addmv"):
            matrix = {"mm": 1, "addmm": 2, "mv": 0, "addmv": 1}[name]
            self.count += args[matrix].numel() * args[matrix].element_size()
        elif name in ("_embedding_bag", "_embedding_bag_forward_only"):
            self.count += args[1].numel() * args[0][0].numel() * args[0].element_size()
        elif name in ("index", "index_select"):
            self.count += result.numel() * result.element_size()
        return result
