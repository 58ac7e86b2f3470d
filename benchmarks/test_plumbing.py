"""What the package's own calls cost, asserted: `make bench` runs it, `make test` does not.

Ratios to the plain model in the same process, which a busy machine moves little: measured were 1.24 closed and 1.70
open without gradients, 1.62 and 1.75 with them; 2.8 open by the operator, whose dispatch is torch's, 1.85 both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import plumbing
import pytest
import torch

BOUNDS = {
    ("no gradients", "closed"): 1.5,
    ("no gradients", "open"): 2.2,
    ("no gradients, operator", "closed"): 1.5,
    ("no gradients, operator", "open"): 3.5,
    ("forward and backward", "closed"): 1.8,
    ("forward and backward", "open"): 2.0,
    ("forward and backward, operator", "closed"): 1.9,
    ("forward and backward, operator", "open"): 2.2,
}


@pytest.fixture(scope="module")
def small() -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    yield plumbing.small(500)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("run", "gate"), BOUNDS)
def test_a_small_call_stays_cheap(small: dict[str, Any], run: str, gate: str) -> None:
    assert small[run][gate] <= BOUNDS[run, gate]
