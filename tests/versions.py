"""What releases of transformers lack themselves."""

import pytest
import transformers
from packaging.version import Version


def since(release: str, lack: str) -> pytest.MarkDecorator:
    """Skips a test on releases of transformers before `release`, and says what they lack."""
    installed = Version(transformers.__version__)
    return pytest.mark.skipif(
        installed < Version(release), reason=f"transformers {installed}, before {release}: {lack}"
    )
