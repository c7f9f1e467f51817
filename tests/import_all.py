"""
Imports every module of hf_recontrol and prints the names of those that imported; one may ask for an extra by its name
instead. A socket, the look-up of a host, or anything else of the network is an error: an audit hook sees it in C code,
too, and when the importing code swallows the exception.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from functools import partial

touched: list[str] = []


def forbid_network(event: str, args: tuple) -> None:
    if event.startswith("socket."):
        touched.append(f"{event}{args}")
        raise OSError(f"importing must not touch the network: {event}{args}")


def unless_an_extra_is_missing(load: Callable[[], object]) -> bool:
    """Whether something loads; it may ask for an extra by its name instead."""
    try:
        load()
    except ImportError as error:
        if "pip install 'hf_recontrol[" not in str(error):
            raise
        return False
    return True


def main() -> None:
    sys.addaudithook(forbid_network)
    package = importlib.import_module("hf_recontrol")
    for name in package.__all__:
        unless_an_extra_is_missing(partial(getattr, package, name))
    for module in pkgutil.walk_packages(package.__path__, "hf_recontrol."):
        # The first runs the command; the second is lm-eval's own start, which asks whether there is IPv6.
        if module.name in ("hf_recontrol.__main__", "hf_recontrol.integrations.lm_eval"):
            continue
        if unless_an_extra_is_missing(partial(importlib.import_module, module.name)):
            print(module.name)
    if touched:
        raise SystemExit(f"importing hf_recontrol touched the network: {touched}")


if __name__ == "__main__":
    main()
