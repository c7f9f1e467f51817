"""What releases of transformers and torch lack themselves."""

import pytest
import torch
import transformers
from packaging.version import Version


def since(release: str, lack: str) -> pytest.MarkDecorator:
    """Skips a test on releases of transformers before `release`, and says what they lack."""
    installed = Version(transformers.__version__)
    return pytest.mark.skipif(
        installed < Version(release), reason=f"transformers {installed}, before {release}: {lack}"
    )


traces_transformers = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8"), reason="torch before 2.8 cannot trace transformers' models whole"
)
