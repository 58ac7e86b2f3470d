"""Bodies of requests: an image or an array becomes a task's input, at a price that was known before."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor

from ..data.folder import decode_image
from ..data.source import apply_normalize
from ..errors import SourceError
from ..files.images import Geometry
from .errors import InputError


def image_input(body: bytes, geometry: Geometry | None, task: str, dtype: torch.dtype, most: int) -> Tensor:
    """An image file as the task's images were made in its training: `[channels, height, width]`.

    Args:
        most: pixels that an image may say that it has.

    Raises:
        InputError: no image, or one that is too large; a task of which it is not known how its images are made.
    """
    if geometry is None:
        raise InputError(
            f"body: the file of task {task!r} does not say how images become its inputs; send an array "
            "(application/x-npy), or start the server with --size and --channels"
        )
    if geometry.channels not in (1, 3):
        raise InputError(f"body: task {task!r} takes {geometry.channels} channels, got an image; send an array")
    try:
        pixels = decode_image(body, geometry.height, geometry.width, geometry.channels, most)
    except SourceError as error:
        raise InputError(f"body: {error}") from error
    return apply_normalize(pixels, geometry.normalize).to(dtype)


def array_input(body: bytes) -> Tensor:
    """A NumPy file (`.npy`) as the tensor that it holds; its header is proven before anything is allocated.

    Raises:
        InputError: no such file, objects in it, or a type that torch has not.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = header(file)
    except (ValueError, KeyError, SyntaxError, TypeError, EOFError, RecursionError) as error:
        raise InputError(f"body: expected a NumPy file (.npy), got none ({error})") from error
    data = memoryview(body)[file.tell() :]
    wanted = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or wanted != len(data):
        what = "objects" if dtype.hasobject else f"{len(data)} bytes"
        raise InputError(f"body: expected {wanted} bytes of {dtype} {list(shape)}, got {what}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    try:
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=True))
    except TypeError as error:
        raise InputError(f"body: expected a type that torch has, got {dtype}") from error
