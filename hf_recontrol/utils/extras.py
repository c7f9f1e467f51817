"""Optional dependencies: an import that fails names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """
    For imports in the block that an extra of this package brings.

    Args:
        extra (`str`):
            Its name in setup.cfg: `"train"`, `"demo"`, `"lm-eval"`, ...
        what (`str`):
            What it is for, the beginning of the message: `"Training"`.

    Raises:
        `ImportError`: names the command that installs the extra, and says what could not be imported.
    """
    try:
        yield
    except ImportError as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        if isinstance(first, ModuleNotFoundError):
            raise ImportError(f"{what} needs `pip install 'hf_recontrol[{extra}]'` ({first}).") from error
        raise ImportError(
            f"{what} cannot import something that is installed: {first}. Other releases may mend it: `pip install -U "
            f"'hf_recontrol[{extra}]'`."
        ) from error
