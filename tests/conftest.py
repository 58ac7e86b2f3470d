"""Settings for all tests: one thread (small tensors only wait for a second one) and a seed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _settings() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
