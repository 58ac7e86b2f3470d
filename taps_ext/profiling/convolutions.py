"""What torch's convolutions on a CPU allocate beside their results, for `estimate`.

oneDNN copies the weight into an order of its own, and images that are not channels_last into blocks of channels, as
many as a vector has lanes; their results lie in blocks, too, until they are copied out. torch's allocator makes these
copies, so that profilers and processes see them. Found by watching it in torch 2.15 on x86 with AVX-512 and AVX2; other
processors have other layouts, for which nothing is counted.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import unset_fake_temporarily

_FEWEST = 4  # fewer channels are read as they are


class Inside(NamedTuple):
    """Bytes at most at one time before there is a result, and then beside all results."""

    before: int = 0
    beside: int = 0


def known() -> bool:
    """True on processors for which the copies are counted."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def pixels(
    image: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Pixels of a convolution's result [B, O, H', W'], all images together; -1 of what is no convolution in 2-D."""
    if not len(stride) == len(padding) == len(dilation) == 2:
        return -1
    count = image.shape[0]
    for axis in (0, 1):
        span = image.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1
        count *= span // (stride[axis] or 1) + 1
    return int(count)


def forward(
    image: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Inside:
    """Of conv2d for images [B, C, H, W] and a weight [O, I/groups, kH, kW] in any type, of the layout given."""
    if not _by_onednn(image, weight, stride, padding, dilation, groups):
        return Inside()
    if _channels_last(image, weight):
        return Inside(beside=_filter(weight, image, groups))
    count = pixels(image, weight, stride, padding, dilation)
    result = count * _padded(weight.shape[0]) * image.element_size()
    read = _blocked(image.shape, image) if weight.shape[1] >= _FEWEST or groups > 1 else 0
    return Inside(before=read + _filter(weight, image, groups) + result, beside=result)


def backward(
    grad: Tensor,
    image: Tensor | None,
    size: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Inside:
    """Of the gradients that are `wanted`: the image's, the weight's. `image` may be missing or hold a part of the
    samples; `size` is (H, W)."""
    whole = grad.new_empty((grad.shape[0], weight.shape[1] * groups, *size))
    if not _by_onednn(whole, weight, stride, padding, dilation, groups):
        return Inside()
    grads, filters = _blocked(grad.shape, grad), _filter(weight, grad, groups)
    if _channels_last(grad, weight) or (image is not None and _channels_last(image, weight)):
        return Inside(beside=2 * filters if wanted[1] else filters)
    before = beside = 0
    if wanted[0]:
        beside = _blocked(whole.shape, grad) if whole.shape[1] >= _FEWEST else whole.nbytes
        before = grads + filters + beside
    if wanted[1] and image is not None:
        second = _for_weight(grads * image.shape[0] // max(1, grad.shape[0]), image, weight, groups, filters)
        own = weight.numel() * grad.element_size()  # which is not there yet
        before, beside = (before, max(beside, second - own, filters)) if wanted[0] else (second, filters)
    return Inside(before, beside)


def _for_weight(grads: int, image: Tensor, weight: Tensor, groups: int, filters: int) -> int:
    """Bytes of the copies for a weight's gradient. Groups have them where they are whole blocks, or single channels
    under a kernel of three places at most."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    if groups > 1 and (weight.shape[2] > 3 if inputs == 1 else inputs % _lanes() or outputs % _lanes()):
        return filters
    return grads + filters + (_blocked(image.shape, image) if inputs >= _FEWEST or groups > 1 else 0)


def _channels_last(*tensors: Tensor) -> bool:
    return any(suggest_memory_format(tensor) == torch.channels_last for tensor in tensors)


def _by_onednn(image: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    if image.device.type != "cpu" or image.dim() != 4 or not known():
        return False
    with unset_fake_temporarily():  # what decides is the real ones' device; of these a single element exists
        real = [torch.empty(1, dtype=image.dtype).expand(tensor.shape) for tensor in (image, weight)]
        settings = (list(stride), list(padding), list(dilation), False, [0, 0], groups, None)
        return torch._C._select_conv_backend(*real, None, *settings).name == "Mkldnn"


def _lanes() -> int:
    return 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


def _padded(channels: int) -> int:
    return -(-channels // _lanes()) * _lanes()


def _blocked(shape: Sequence[int], like: Tensor) -> int:
    """Bytes of images whose channels are rounded up to whole blocks."""
    samples, channels, height, width = shape
    return samples * _padded(channels) * height * width * like.element_size()


def _filter(weight: Tensor, like: Tensor, groups: int) -> int:
    outputs, inputs, height, width = weight.shape
    if inputs == 1 and groups > 1:
        return _padded(outputs) * height * width * like.element_size()
    inputs = inputs if inputs < _FEWEST else _padded(inputs)
    return groups * _padded(outputs // groups) * inputs * height * width * like.element_size()
