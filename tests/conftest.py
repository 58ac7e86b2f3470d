"""For all tests: one thread (small tensors only wait for a second one), a seed, and which of them this run covers."""

from __future__ import annotations

import os

import pytest
import stages
import torch
from fused import C, instructions

from taps_ext.cli import main
from taps_ext.model import gathering


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    stages.leave_out(session.config, items)
    stages.fold(session, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was drawn, and how to draw it again."""
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    drawn = sorted({value for report in reports for key, value in report.user_properties if key == "drawn"})
    if drawn:
        terminalreporter.section(f"drawn by TAPS_SEED={stages.SEED}")
        for value in drawn:
            terminalreporter.line(value)


@pytest.fixture(autouse=True)
def _settings() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """TAPS_GATHER=1: forwards make the weights of all layers at once, as on a GPU."""
    if os.environ.get("TAPS_GATHER"):
        monkeypatch.setattr(gathering, "forced", True)


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
