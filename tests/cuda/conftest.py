"""Everything here needs a CUDA device and kernels built for it; without one a single item skips, and says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def _reason() -> str | None:
    from taps_ext import ops

    if not torch.cuda.is_available():
        return "no CUDA device"
    if ops._C is None or not ops._C.build_info().get("cuda"):
        return "the extension was built without CUDA kernels"
    return None


class _Waiting(pytest.Item):
    """Stands for the tests that cannot run here."""

    def __init__(self, *, reason: str, **settings) -> None:
        super().__init__(**settings)
        self.reason = reason

    def runtest(self) -> None:
        pytest.skip(self.reason)

    def reportinfo(self) -> tuple[Path, None, str]:
        return FOLDER, None, self.name


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]):
    reason = _reason()
    if reason is not None and os.environ.get("TAPS_REQUIRE_CUDA") == "1":
        raise pytest.UsageError(f"TAPS_REQUIRE_CUDA=1, but {reason}")
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.cuda)
    yield  # -m and -k choose
    ours = {item for item in items if FOLDER in item.path.parents}
    if reason is not None and ours:
        text = f"{reason}: {len(ours)} tests of tests/cuda wait (make gpu)"
        waiting = _Waiting.from_parent(session, name="tests/cuda", nodeid="tests/cuda", reason=text)
        items[:] = [item for item in items if item not in ours] + [waiting]


@pytest.fixture(autouse=True)
def _exact_float32():
    """float32 means float32 in these tests, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
