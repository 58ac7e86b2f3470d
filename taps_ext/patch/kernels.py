"""The change of one tensor: found, proven, written. Compiled for dense tensors on the CPU; plain torch for the others.

Bytes are seen in units: an element, or half of one of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from ..extension import C
from . import codes, sums
from .codes import WIDTHS, CodeFault, Fault
from .sums import UNITS

WHOLE = "whole"


class Change(NamedTuple):
    """What differs, as a patch holds it: uint8 on the CPU. `replaced`: the sum of what was there, there;
    for `whole`, None."""

    coding: str
    places: Tensor
    values: Tensor
    replaced: int | None


class Numbers(NamedTuple):
    """A change of a tensor of `units` units of `unit` bytes."""

    coding: str
    places: Tensor
    values: Tensor
    unit: int
    units: int


def unit_of(dtype: torch.dtype) -> int:
    """Bytes of a unit."""
    return min(dtype.itemsize, 8)


def units_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Units of a tensor."""
    return math.prod(shape) * dtype.itemsize // unit_of(dtype)


def data_of(tensor: Tensor) -> Tensor:
    """The row-major bytes as a vector of uint8, on the tensor's device; a copy where it is not contiguous."""
    return _bytes_of(tensor.detach().contiguous())


def sum_of(tensor: Tensor) -> int:
    """sum(T); see `sums`."""
    data = data_of(tensor)
    if _compiled(data):
        return _joined(torch.ops.taps_ext.patch_sum(data, 0))
    return sums.sum_of(data)


def find(before: Tensor, after: Tensor) -> Change | None:
    """The change between two tensors of one dtype and shape in the fewest bytes, or None where their bits are the same.

    On two devices, both are brought to the CPU.
    """
    if before.device != after.device:
        before, after = before.cpu(), after.cpu()
    unit = unit_of(before.dtype)
    old, new = data_of(before), data_of(after)
    return _find_compiled(old, new, unit) if _compiled(old, new) else _find_plain(old, new, unit)


def whole(tensor: Tensor) -> Change:
    """All of a tensor."""
    data = data_of(tensor)
    return Change(WHOLE, _bytes(0), data.cpu() if data.is_cuda else data.clone(), None)


def check(change: Numbers) -> int:
    """The sum of the new values in their places. Raises CodeFault for an index that is not one of the tensor."""
    if change.coding == WHOLE:
        return sum_of(change.values)
    width = WIDTHS[change.coding]
    if _compiled(change.places):
        return _proven(
            torch.ops.taps_ext.patch_check(None, change.places, change.values, change.unit, change.units, width)
        )
    numbers = codes.decode(change.places, width, change.units, change.values.numel() // change.unit)
    return sums.sum_at(numbers, _as_units(change.values, change.unit), change.unit)


def numbers_of(change: Numbers) -> Tensor:
    """The numbers of the changed units, int64."""
    return codes.decode(change.places, WIDTHS[change.coding], change.units, change.values.numel() // change.unit)


def prepare(target: Tensor, change: Numbers) -> tuple[int, Callable[[], None]]:
    """The sum of what the change would replace in `target`, and what writes it. Nothing is written before that."""
    target = target.detach()
    if change.coding == WHOLE:
        new = change.values.clone().view(target.dtype).reshape(target.shape)
        return sum_of(target), lambda: _copy(target, new)
    width = WIDTHS[change.coding]
    if target.is_contiguous() and _compiled(target):
        data = _bytes_of(target)
        arguments = (change.places, change.values, change.unit)
        replaced = _proven(torch.ops.taps_ext.patch_check(data, *arguments, change.units, width))

        def write() -> None:
            _proven(torch.ops.taps_ext.patch_write(data, *arguments, width))

        return replaced, write
    view = _units_view(target)
    there = target.device
    values = _as_units(change.values, change.unit).to(there)
    numbers = codes.decode(change.places.to(there), width, change.units, len(values))
    places = _places(view, numbers)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    memory = view.as_strided((reach if view.numel() else 0,), (1,), view.storage_offset())

    def put() -> None:
        memory[places] = values

    return sums.sum_at(numbers, memory[places], change.unit), put


class Swap:
    """A change of a dense tensor on the CPU that goes in while what it replaces is summed and kept, in one pass over
    the memory; `back` undoes it. The index is proven first, and that reads nothing of the tensor.

    Raises:
        CodeFault: an index that is not one of the tensor.
    """

    def __init__(self, target: Tensor, change: Numbers) -> None:
        self._data = _bytes_of(target.detach())
        self._change = change
        self._width = WIDTHS[change.coding]
        self._old = torch.empty_like(change.values)
        self._swapped = torch.zeros(5, dtype=torch.int64)  # written by the kernel: Ctrl-C takes away what is returned
        self._lock = Lock()  # a thread may still be writing when Ctrl-C has another one put back
        self._over = False
        count = change.values.numel() // change.unit
        _proven(torch.ops.taps_ext.patch_prove(change.places, count, change.units, self._width))

    @staticmethod
    def fits(target: Tensor, change: Numbers) -> bool:
        """Whether this is a road for them; for others there is `prepare`."""
        return change.coding != WHOLE and target.is_contiguous() and _compiled(target)

    def look(self) -> int:
        """The sum of what would be replaced; nothing is written."""
        change = self._change
        return _proven(
            torch.ops.taps_ext.patch_check(
                self._data, change.places, change.values, change.unit, change.units, self._width
            )
        )

    def swap(self) -> int:
        """Writes, once; the sum of what was replaced."""
        change = self._change
        with self._lock:
            if not self._over:
                self._over = True
                torch.ops.taps_ext.patch_swap(
                    self._data,
                    change.places,
                    change.values,
                    self._old,
                    _bytes_of(self._swapped),
                    change.unit,
                    self._width,
                )
        return _proven(self._swapped.tolist()[:4])

    def back(self) -> None:
        """Puts back what `swap` replaced, however far it came; it writes nothing after that. Can be called again."""
        unit = self._change.unit
        with self._lock:
            self._over = True
            old = self._old[: int(self._swapped[4]) * unit]
            torch.ops.taps_ext.patch_write(self._data, self._change.places, old, unit, self._width)


def _find_compiled(old: Tensor, new: Tensor, unit: int) -> Change | None:
    count, *coded = torch.ops.taps_ext.patch_measure(old, new, unit)
    if count == 0:
        return None
    units = old.numel() // unit
    lengths = {"gap8": coded[0], "gap16": 2 * coded[1], "gap32": 4 * coded[2], "bitmask": (units + 7) // 8}
    coding = _best(lengths, count * unit, old.numel())
    if coding == WHOLE:
        return whole(new)
    index, values = _bytes(lengths[coding]), _bytes(count * unit)
    replaced = torch.ops.taps_ext.patch_encode(old, new, index, values, unit, WIDTHS[coding])
    return Change(coding, index, values, _joined(replaced))


def _find_plain(old: Tensor, new: Tensor, unit: int) -> Change | None:
    first, second = _as_units(old, unit), _as_units(new, unit)
    numbers = (first != second).nonzero().reshape(-1)
    if len(numbers) == 0:
        return None
    lengths = codes.sizes(codes.gaps_of(numbers), len(first))
    coding = _best(lengths, len(numbers) * unit, old.numel())
    if coding == WHOLE:
        return whole(new)
    index = codes.encode(numbers, WIDTHS[coding], len(first)).cpu()
    values = second[numbers].view(torch.uint8).cpu()
    return Change(coding, index, values, sums.sum_at(numbers, first[numbers], unit))


def _bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's own memory; sizes of 0 and 1 let it have any strides."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _best(lengths: dict[str, int], values: int, everything: int) -> str:
    coding = min(lengths, key=lambda name: lengths[name])  # the first of equals
    return coding if lengths[coding] + values < everything else WHOLE


def _compiled(*tensors: Tensor) -> bool:
    return C is not None and all(tensor.device.type == "cpu" for tensor in tensors)


def _joined(halves: Sequence[int]) -> int:
    low, high = (half % (1 << 64) for half in halves)
    return low | high << 64


def _proven(told: Sequence[int]) -> int:
    fault, at, *halves = told
    if fault:
        raise CodeFault(Fault(fault), at)
    return _joined(halves)


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def _as_units(data: Tensor, unit: int) -> Tensor:
    """A vector of uint8 as integers; a copy where it does not lie as they must."""
    if data.storage_offset() % unit or data.data_ptr() % unit:
        data = data.clone()
    return data.view(UNITS[unit])


def _units_view(tensor: Tensor) -> Tensor:
    """The tensor's own memory as integers; elements of 16 bytes get a dimension of their halves."""
    if tensor.dtype.itemsize > 8:
        tensor = torch.view_as_real(tensor)
    return tensor.view(UNITS[tensor.dtype.itemsize])


def _places(view: Tensor, numbers: Tensor) -> Tensor:
    """Where the units lie, counted from the first, whatever the strides."""
    if view.is_contiguous():
        return numbers
    places, rest = torch.zeros_like(numbers), numbers
    for size, stride in zip(reversed(view.shape), reversed(view.stride()), strict=True):
        places = places + rest % size * stride
        rest = rest // size
    return places


def _copy(target: Tensor, new: Tensor) -> None:
    _units_view(target).copy_(_units_view(new))
