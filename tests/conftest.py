"""Settings for all tests: one thread (small tensors only wait for a second one) and a seed."""

from __future__ import annotations

import pytest
import torch
from fused import C, instructions

from taps_ext.cli import main


@pytest.fixture(autouse=True)
def _settings() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=C.isas() if C is not None else [])
def isa(request: pytest.FixtureRequest):
    """Each instruction set of this machine in turn."""
    with instructions(request.param):
        yield request.param


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
