"""Everything here needs a CUDA device and kernels built for it; without one each test skips, by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def _reason() -> str | None:
    from taps_ext import ops

    if not torch.cuda.is_available():
        return "no CUDA device"
    if ops._C is None or not ops._C.build_info().get("cuda"):
        return "the extension was built without CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason()
    if reason is not None and os.environ.get("TAPS_REQUIRE_CUDA") == "1":
        raise pytest.UsageError(f"TAPS_REQUIRE_CUDA=1, but {reason}")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _exact_float32():
    """float32 means float32 in these tests, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
