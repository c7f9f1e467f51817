"""Importing is local. tests/core_only.py runs the same script on an installed wheel without the extras."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_recontrol.utils.extras import needs_extra

from .fresh import run_fresh

SCRIPT = Path(__file__).with_name("import_all.py")


def online() -> dict[str, str]:
    """The environment of somebody who never set HF_HUB_OFFLINE."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}


def test_importing_touches_no_network():
    done = subprocess.run([sys.executable, SCRIPT], env=online(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert {
        f"hf_recontrol.{name}"
        for name in ("modeling.causal_lm", "heads.hub", "training.trainer", "cli", "evaluation.pages.report")
    } <= imported


def test_an_import_that_touches_the_network_is_noticed():
    """Even where the importing code goes on as if nothing had happened."""
    script = (
        "import contextlib, runpy, socket, sys\n"
        "class Careless:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'hf_recontrol.heads.hub':\n"
        "            with contextlib.suppress(OSError):\n"
        "                socket.socket()\n"
        "sys.meta_path.insert(0, Careless())\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    code, _, error = run_fresh(script, (), online(), timeout=120)
    assert code != 0 and "touched the network: ['socket.__new__" in error


def test_an_import_that_fails_for_another_reason_than_a_missing_package_says_why():
    missing = r"^X needs `pip install 'hf_recontrol\[demo\]'` \(No module named 'no_such'\)\.$"
    with pytest.raises(ImportError, match=missing), needs_extra("demo", "X"):
        import no_such  # noqa: F401
    broken = r"^X cannot import something that is installed: cannot import name 'no_such_name'"
    with pytest.raises(ImportError, match=broken), needs_extra("demo", "X"):
        from json import no_such_name  # noqa: F401
