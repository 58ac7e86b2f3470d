"""The custom operators: one file each, with its signature, what backward keeps, its backward and its fake.

Schemas live in `csrc/ops.cpp`. `_C` is the compiled extension, or None where it could not be loaded: then the
plain-torch `taps_ext.reference` does the work.
"""

from ..extension import C as _C
from . import flops
from .call import autocast_dtype
from .conv2d import gated_conv2d
from .lending import lending
from .linear import gated_linear
from .mixed import mixed_linear
from .mixed_conv2d import mixed_conv2d
from .mixed_lowrank import mixed_lowrank
from .reconstruct import foreach_reconstruct_, reconstruct_
from .weight import effective_weight, unread_weight
from .weights import Gated, foreach_effective_weight

HAS_EXTENSION: bool = _C is not None
if HAS_EXTENSION:
    flops.register()

__all__ = [
    "HAS_EXTENSION",
    "Gated",
    "autocast_dtype",
    "effective_weight",
    "foreach_effective_weight",
    "foreach_reconstruct_",
    "gated_conv2d",
    "gated_linear",
    "lending",
    "mixed_conv2d",
    "mixed_linear",
    "mixed_lowrank",
    "reconstruct_",
    "unread_weight",
]
