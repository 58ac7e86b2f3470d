"""Patches from two states, and from two patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..store.errors import Path, show
from . import kernels
from .codes import WIDTHS, encode
from .errors import ChainOrderError
from .format import Entry, Form, Part, Patch, make
from .kernels import WHOLE, Change, Numbers, unit_of, units_of
from .sources import digest_of, forms_of, source
from .sums import MODULUS, UNITS, sum_at


def diff(old: Any, new: Any, *, out: Path | None = None) -> Patch:
    """The patch from one state to another, bit for bit; also written to `out` where that is given.

    Args:
        old, new: a safetensors file, a folder of them or a `*.safetensors.index.json`, or named tensors
            (`state_dict()`), on any device, of any strides. Files are read tensor by tensor.

    Bits are compared, not values: -0.0 differs from 0.0, and a NaN equals itself. Tensors that are new, gone, or of
    another dtype or shape are part of the patch, which then applies to a single file alone.

    Raises:
        TaskFileError: in a subclass that names file and tensor, for what is no such state.
        ConfigError: an argument that is neither.

    Example:
        >>> old = {"w": torch.zeros(1000)}
        >>> new = {"w": old["w"].index_fill(0, torch.tensor([7]), 1.0)}
        >>> patch = diff(old, new)
        >>> patch.elements, apply(old, patch).tensors, torch.equal(old["w"], new["w"])
        (1, 1, True)
    """
    entries: dict[str, Entry] = {}
    with source(old, "diff: old") as first, source(new, "diff: new") as second:
        before, after = first.forms(), second.forms()
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) == after.get(name):
                entries[name] = _entry(before[name], first.read(name), second.read(name))
                continue
            gone = come = part = None
            if name in before:
                gone = Form(*before[name], kernels.sum_of(first.read(name)))
            if name in after:
                tensor = second.read(name)
                come = Form(*after[name], kernels.sum_of(tensor))
                part = _part(kernels.whole(tensor), 0 if gone is None else gone.sum)
            entries[name] = Entry(gone, come, part)
    patch = make(entries, "diff" if out is None else out)
    if out is not None:
        patch.save(out)
    return patch


def digest(state: Any) -> str:
    """The digest "sha256:<hex>" of a state as patches name it. Reads all of it. Raises as `diff` does."""
    with source(state, "digest") as given:
        return digest_of(forms_of(given))


def _part(change: Change, replaced: int) -> Part:
    return Part(change.coding, change.places, change.values, replaced if change.replaced is None else change.replaced)


def _entry(form: tuple[str, tuple[int, ...]], old: Tensor, new: Tensor) -> Entry:
    before = Form(*form, kernels.sum_of(old))
    change = kernels.find(old, new)
    if change is None:
        return Entry(before, before, None)
    part = _part(change, before.sum)
    dtype = before.torch_dtype
    held = Numbers(part.coding, part.places, part.values, unit_of(dtype), units_of(dtype, before.shape))
    after = (before.sum - part.replaced + kernels.check(held)) % MODULUS
    return Entry(before, Form(*form, after), part)


def compose(first: Patch, second: Patch) -> Patch:
    """The patch that does what `first` and then `second` does.

    Elements that the second changes back stay in it, unless the whole tensor is as before.

    Raises:
        ChainOrderError: the second does not begin where the first ends.
    """
    check_order([first, second])
    entries: dict[str, Entry] = {}
    for name in sorted(first.entries.keys() | second.entries.keys()):
        a, b = first.entries.get(name), second.entries.get(name)
        before = None if a is None else a.before
        after = None if b is None else b.after
        if before is None and after is None:
            continue
        entries[name] = Entry(before, after, None if before == after else _joined(a, b))
    return make(entries, "compose")


def check_order(patches: Sequence[Patch]) -> None:
    """Raise ChainOrderError, which names the right order if there is one, unless each begins where the last ends."""
    for number, (one, other) in enumerate(itertools.pairwise(patches), 2):
        if one.after != other.before:
            ends = {patch.before: patch for patch in patches}
            starts = [patch for patch in patches if patch.before not in {p.after for p in patches}]
            order: list[str] = []
            at = starts[0] if len(starts) == 1 else None
            while at is not None and len(order) < len(patches):
                order.append(show(str(at.path)))
                at = ends.get(at.after)
            right = f"; the right order is {', '.join(order)}" if len(order) == len(patches) else ""
            raise ChainOrderError(
                other.path,
                f"patch {number} of {len(patches)}: begins at {other.before}, the one before it ends at {one.after}"
                f"{right}",
            )


def _joined(a: Entry | None, b: Entry | None) -> Part | None:
    """What two changes of one tensor, one after the other, hold; None where it is gone in the end."""
    if b is None or b.after is None:
        return None
    start = None if a is None else a.before
    replaced = 0 if start is None else start.sum
    if b.part is None:
        assert a is not None and a.part is not None
        return a.part
    if b.part.coding == WHOLE:
        return b.part._replace(replaced=replaced)
    assert a is not None
    if a.part is None:
        return b.part
    if a.part.coding == WHOLE:
        values = a.part.values.clone()
        kernels.prepare(values.view(UNITS[b.numbers().unit]), b.numbers())[1]()
        return Part(WHOLE, a.part.places, values, replaced)
    return _both(a.numbers(), a.part, b.numbers(), b.part)


def _both(a: Numbers, first: Part, b: Numbers, second: Part) -> Part:
    """Two sparse changes: what either touches, as the second leaves it."""
    unit = a.unit
    ours, theirs = kernels.numbers_of(a), kernels.numbers_of(b)
    old, new = (values.clone().view(UNITS[unit]) for values in (a.values, b.values))
    numbers = torch.unique(torch.cat([ours, theirs]))  # sorted
    values = torch.empty(len(numbers), dtype=old.dtype)
    values[torch.searchsorted(numbers, ours)] = old
    values[torch.searchsorted(numbers, theirs)] = new
    again = torch.isin(ours, theirs)
    replaced = (first.replaced + second.replaced - sum_at(ours[again], old[again], unit)) % MODULUS
    indices = {coding: encode(numbers, width, a.units) for coding, width in WIDTHS.items()}
    coding = min(indices, key=lambda name: len(indices[name]))
    return Part(coding, indices[coding], values.view(torch.uint8), replaced)
