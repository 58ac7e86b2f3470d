"""Made the golden patches (`python tests/patch/golden/make_patches.py`); never again, since they must load for ever."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "helpers"))

import torch  # noqa: E402
from patch_states import example  # noqa: E402

from taps_ext import patch  # noqa: E402


def forms() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state, and one that has lost a tensor, won one, and holds another two in other forms."""
    old, new = example()
    del new["one"]
    new.update(two=torch.arange(7), gap=new["gap"].reshape(100, 30), stays=new["stays"].short())
    return old, new


if __name__ == "__main__":
    patch.diff(*example(), out=HERE / "codings.tapspatch")
    patch.diff(*forms(), out=HERE / "forms.tapspatch")
