"""What `make abi` checks of one wheel under several versions of torch, of the extension that is here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from taps_ext import ops


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
def test_the_checks_pass() -> None:
    found = subprocess.run(
        [sys.executable, Path(__file__).parent / "abi" / "check.py"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["failures"] == []
