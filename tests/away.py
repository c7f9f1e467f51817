"""A device without float64, as MPS is one, made of the CPU: tensors that say they are there, and compute here."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

AWAY = torch.device("mps", 0)


class _Tensor(torch.Tensor):
    @staticmethod
    def __new__(cls, here):
        # To torch's own code it is on `meta`, which no kernel takes.
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), dtype=here.dtype, device="meta"
        )

    def __init__(self, here):
        self.here = here

    @property
    def device(self):
        return AWAY

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    given = []

    def here(tensor):
        given.append(tensor)
        return tensor.here

    args, kwargs = tree_map_only(_Tensor, here, (args, dict(kwargs)))
    away = bool(given)
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == AWAY.type
        kwargs["device"] = torch.device("cpu")
    result = function(*args, **kwargs)

    def there(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError(f"{AWAY.type} has no float64, which {function} would make.")
        # Of what works in place, the very tensor.
        same = [known for known in given if known.here is tensor]
        return same[0] if same else _Tensor(tensor)

    return tree_map_only(torch.Tensor, there, result) if away else result


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """`torch.tensor` and `new_tensor` ask no dispatcher for a place."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if function is torch.Tensor.new_tensor and isinstance(args[0], _Tensor):
            return args[0].here.new_tensor(*args[1:], **kwargs).to(AWAY)
        return function(*args, **kwargs)


@contextmanager
def device_without_float64():
    """Inside, `AWAY` is a device, to which tensors and modules can be moved."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Mode(), _Factories():
            yield AWAY
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
