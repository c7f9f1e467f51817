"""What releases of transformers lack themselves."""

import pytest
import transformers
from packaging.version import Version

TRANSFORMERS = Version(transformers.__version__)


def since(release: str, lack: str) -> pytest.MarkDecorator:
    """Skips a test on releases of transformers before `release`, and says what they lack."""
    return pytest.mark.skipif(
        TRANSFORMERS < Version(release), reason=f"transformers {TRANSFORMERS}, before {release}: {lack}"
    )
