"""The compiled part. Importing it registers `torch.ops.taps_ext.*`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def workspace_bytes() -> int: ...
def workspace_clear() -> None: ...
def linear(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    gate: bool,
    training: bool,
    outermost: bool,
    /,
) -> Tensor | None: ...
def conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    gate: bool,
    training: bool,
    outermost: bool,
    /,
) -> Tensor | None: ...
def isa() -> str: ...
def isas() -> list[str]: ...

most_places: int
twin: bool

def force_isa(name: str | None) -> None: ...
def choose(
    *,
    open: bool,
    same_dtype: bool = True,
    rows: int = 0,
    outputs: int = 0,
    inputs: int = 0,
    cuda: bool = False,
    fusable: bool = False,
    narrow: bool = False,
    places: int = 0,
    stock: str | None = None,
    wide: bool | None = None,
    pairs: bool | None = None,
    depthwise: bool = False,
) -> str: ...
def fused_bytes(*, convolution: bool, narrow: bool, rows: int, inputs: int) -> int: ...
def choose_rules() -> list[dict[str, Any]]: ...
def taken_path() -> str | None: ...
def taken_by_prediction() -> bool: ...
def force_path(path: str | None) -> None: ...
def choose_mixing(*, addable: bool, fused: bool, rows: int, outputs: int, inputs: int) -> str: ...
def force_adding(adding: str | None) -> None: ...
def force_mixing(mixing: str | None) -> None: ...
