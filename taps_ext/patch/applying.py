"""Patching a state in memory: all of it, or nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, TapsError
from ..store.errors import (
    DtypeMismatchError,
    MissingTensorError,
    Path,
    ShapeMismatchError,
    UnexpectedTensorError,
    UnsupportedTensorError,
    show,
)
from . import kernels
from .errors import AlreadyAppliedError, BaseMismatchError, OtherTensorsError, SharedMemoryError
from .format import Entry, Form, Patch, load
from .making import check_order, compose, digest
from .sources import Live, digest_of, forms_of, live
from .sums import MODULUS

VERIFY = ("full", "touched")
MANY = 1 << 16
"""Changed elements from which on threads share the work."""

_PLACED = (
    BaseMismatchError,
    MissingTensorError,
    UnexpectedTensorError,
    ShapeMismatchError,
    DtypeMismatchError,
)
"""How a state at another place of a chain is refused."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class Applied(NamedTuple):
    """What `apply` did.

    Attributes:
        before, after: the states' digests. tensors, elements: how many were written. verified: "full" if the digest
            before was proven of all of the state, "state" if it was a `State`'s and proven of the elements that were
            written, "touched" if of these alone. removed, added: how many of the tensors went or are new.
    """

    before: str
    after: str
    tensors: int
    elements: int
    verified: str
    removed: int = 0
    added: int = 0


class State:
    """A state in memory with its digest, kept from patch to patch.

    Making it reads the state once; each `apply` then proves that the patch begins where the state stands, for the cost
    of what changes. What is written to the tensors by other means is noticed where a patch touches it, and by `check`.

    Args:
        tensors: named tensors (`model.state_dict()`), on any device, of any strides.

    Raises:
        TaskFileError: naming a tensor that cannot be patched.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(tensors, Mapping):
            raise ConfigError(f"tensors: expected a mapping of names to tensors, got {type(tensors).__name__}")
        self.tensors = dict(tensors)
        self.forms: dict[str, Form] = forms_of(live(self.tensors, "State"))
        self.digest: str = digest_of(self.forms)

    def check(self) -> None:
        """Reads all of it again. Raises BaseMismatchError, naming a tensor that was written to by other means."""
        for name, form in forms_of(live(self.tensors, "State")).items():
            if form != self.forms[name]:
                raise BaseMismatchError("State", f"tensor {show(name)}: was written to since its sum was taken")


def as_chain(patch: Any) -> list[Patch]:
    """Patches in their order: one as it is or read from a path, or several.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(patch, Patch):
        return [patch]
    if isinstance(patch, (str, os.PathLike)):
        return [load(patch)]
    if isinstance(patch, Sequence) and patch:
        return [step for one in patch for step in as_chain(one)]
    got = f"{'an empty ' if isinstance(patch, Sequence) else ''}{type(patch).__name__}"
    raise ConfigError(f"patch: expected a Patch, a path, or a list of them, got {got}")


def as_patch(chain: Sequence[Patch]) -> Patch:
    """Several patches as one. Raises ChainOrderError unless they follow each other."""
    check_order(chain)
    return reduce(compose, chain)


@contextmanager
def placing(target: Any, chain: Sequence[Patch]) -> Iterator[None]:
    """A refusal of a state that is not where several patches begin says where it is: at its digest, and at which of
    them. That reads all of the state, once it is refused."""
    try:
        yield
    except _PLACED as error:
        if len(chain) < 2 or isinstance(error, AlreadyAppliedError):
            raise
        try:
            found = digest(target)
        except (TapsError, OSError):  # the refusal itself is the worse news
            raise error from None
        where = f"; it is at {found}"
        if found == chain[-1].after:
            where += f": all {len(chain)} patches are applied already"
        for done, one in enumerate(chain[1:], 1):
            if found == one.before:
                first = "patch is" if done == 1 else f"{done} patches are"
                where += f": the first {first} applied already; apply from {show(str(one.path))}"
                break
        raise type(error)(error.path, error.problem + where) from None


def check_forms(patch: Patch, got: Mapping[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Raise unless the state has exactly the tensors that the patch begins with, of its dtypes and shapes."""
    for name, entry in patch.entries.items():
        if entry.before is None:
            if name in got:
                raise UnexpectedTensorError(path, f"tensor {show(name)}: is there, but the patch adds it")
            continue
        if name not in got:
            raise MissingTensorError(path, f"tensor {show(name)}: expected one, as the patch begins with, got none")
        dtype, shape = got[name]
        if shape != entry.before.shape:
            raise ShapeMismatchError(
                path,
                f"tensor {show(name)}: expected shape {show(list(entry.before.shape))}, got {show(list(shape))}",
            )
        if dtype != entry.before.dtype:
            raise DtypeMismatchError(path, f"tensor {show(name)}: expected {entry.before.dtype}, got {dtype}")
    if surplus := sorted(got.keys() - patch.entries.keys()):
        raise UnexpectedTensorError(path, f"tensor {show(surplus[0])}: the patch knows none of this name")


def apply_live(target: Mapping[str, Tensor] | State, patch: Patch, verify: str) -> Applied:
    """See `patch.apply`."""
    tensors = target.tensors if isinstance(target, State) else target
    given = live(tensors, "apply")
    changed = patch.changed
    for name, entry in changed.items():
        if not entry.in_place:
            word = "adds" if entry.before is None else "removes" if entry.after is None else "reshapes or retypes"
            raise OtherTensorsError(patch.path, f"tensor {show(name)}: the patch {word} it; a live state cannot")
    check_forms(patch, given.forms(), "apply")
    _check_memory(given, changed)
    if isinstance(target, State):
        known = {n: form for n, e in patch.entries.items() if (form := e.before) is not None}
        _expect(patch, known, target.forms, "apply")
    if verify == "full":
        _expect(patch, {n: e.before for n, e in patch.entries.items() if e.before}, forms_of(given), "apply")
    numbers = {name: entry.numbers() for name, entry in changed.items()}
    threads = _threads([given.tensors[name] for name in changed], patch.elements)
    quick = _swappable(given, numbers)
    others = [name for name in changed if name not in quick]
    swaps = _each(lambda name: kernels.Swap(given.tensors[name], numbers[name]), quick, threads)
    ready = _each(lambda name: kernels.prepare(given.tensors[name], numbers[name]), others, threads)
    sums = {name: replaced for name, (replaced, _) in zip(others, ready, strict=True)}
    with torch.no_grad():
        _swap(patch, dict(zip(quick, swaps, strict=True)), sums, threads)
        interrupt = _run([write for _, write in ready], threads)
    torch.autograd.graph.increment_version([t for n, t in tensors.items() if n in changed and not t.is_inference()])
    if isinstance(target, State):
        target.forms = {name: form for name, e in patch.entries.items() if (form := e.after) is not None}
        target.digest = patch.after
    if interrupt is not None:
        raise interrupt
    proven = "state" if isinstance(target, State) and verify == "touched" else verify
    return Applied(patch.before, patch.after, len(changed), patch.elements, proven)


def _swappable(given: Live, numbers: Mapping[str, kernels.Numbers]) -> list[str]:
    """The tensors that can be written while they are proven: those of the compiled kernels, each the only one in its
    memory. What a swap has written would be taken for another base under a second name."""
    owners = Counter(given.tensors[name].data_ptr() for name in numbers)
    return [
        name
        for name, change in numbers.items()
        if owners[given.tensors[name].data_ptr()] == 1 and kernels.Swap.fits(given.tensors[name], change)
    ]


def _swap(patch: Patch, swaps: Mapping[str, kernels.Swap], sums: Mapping[str, int], threads: int) -> None:
    """Write all swaps if they and the others (their `sums`) replace what the patch says; else none of them."""
    wanted = {name: e.part.replaced for name, e in patch.changed.items() if e.part is not None}
    wrong = {name: number for name, number in sums.items() if number != wanted[name]}

    def one(name: str) -> int:
        if wrong:  # nothing will be written; which others are wrong is still to be said
            return swaps[name].look()
        number = swaps[name].swap()
        if number != wanted[name]:
            wrong[name] = number
        return number

    try:
        found = {**sums, **dict(zip(swaps, _each(one, list(swaps), threads), strict=True))}
        if wrong:
            ordered = {name: found[name] for name in wanted if found[name] != wanted[name]}
            raise mismatch(patch, ordered, "apply")
    except BaseException:
        interrupt = _run([swap.back for swap in swaps.values()], threads)
        if interrupt is not None:
            raise interrupt from None
        raise


def new_sum(entry: Entry) -> int:
    """The sum of the elements that a tensor's change writes, alone."""
    assert entry.part is not None and entry.before is not None and entry.after is not None
    return (entry.after.sum - entry.before.sum + entry.part.replaced) % MODULUS


def mismatch(patch: Patch, wrong: Mapping[str, int], path: Path) -> BaseMismatchError:
    """The error for tensors in which the elements to be written have other sums than the patch says."""
    if all(name in wrong and wrong[name] == new_sum(entry) for name, entry in patch.changed.items()):
        return AlreadyAppliedError(path, f"the patch to {patch.after} is already applied")
    name = next(iter(wrong))
    also = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return BaseMismatchError(
        path, f"tensor {show(name)}{also}: does not hold what the patch begins with ({patch.before})"
    )


def _expect(patch: Patch, wanted: Mapping[str, Form], got: Mapping[str, Form], path: Path) -> None:
    """Raise AlreadyAppliedError or BaseMismatchError unless all tensors are those that the patch begins with."""
    wrong = [name for name, form in wanted.items() if got[name].sum != form.sum]
    if not wrong:
        return
    ends = {name: entry.after for name, entry in patch.entries.items()}
    if all(form is not None and got[name].sum == form.sum for name, form in ends.items()):
        raise AlreadyAppliedError(path, f"the patch to {patch.after} is already applied")
    also = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise BaseMismatchError(
        path, f"tensor {show(wrong[0])}{also}: is not the one that the patch begins with ({patch.before})"
    )


def _threads(tensors: Sequence[Tensor], elements: int) -> int:
    """How many threads take tensors at a time: torch's for the compiled kernels and many elements, else this one, whose
    modes and streams hold for it alone."""
    apart = all(tensor.device.type == "cpu" and not tensor.is_inference() for tensor in tensors)
    return min(torch.get_num_threads(), len(tensors)) if apart and elements >= MANY else 1


def _each(call: Callable[[_T], _R], items: Sequence[_T], threads: int) -> list[_R]:
    if threads < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))


def _run(writes: Sequence[Callable[[], None]], threads: int) -> KeyboardInterrupt | None:
    """Write all; gives back a Ctrl-C that came meanwhile, since writing again what was written is the same."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            _each(lambda write: write(), writes, threads)
            return interrupt
        except KeyboardInterrupt as error:
            interrupt = error


def _check_memory(given: Live, changed: Mapping[str, Entry]) -> None:
    """Raise unless each tensor to be written has memory of its own, or shares all of it with one that gets the same."""
    spans: list[tuple[int, int, str]] = []
    for name, tensor in given.tensors.items():
        if name in changed and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise UnsupportedTensorError(
                "apply", f"tensor {show(name)}: expected a normal tensor outside of inference mode"
            )
        if tensor.numel() == 0:
            continue
        if name in changed and _overlaps(tensor):
            raise SharedMemoryError("apply", f"tensor {show(name)}: elements share memory (expanded?)")
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        spans.append((begin, begin + (steps + 1) * tensor.element_size(), name))
    spans.sort()
    end, last = 0, ""
    for begin, to, name in spans:
        if begin < end and (name in changed or last in changed) and not _same(given, changed, last, name):
            raise SharedMemoryError(
                "apply", f"tensor {show(name)}: shares memory with {show(last)}, and the patch changes them apart"
            )
        if to > end:
            end, last = to, name


def _same(given: Live, changed: Mapping[str, Entry], one: str, other: str) -> bool:
    """Whether two names are of one tensor, for which the patch has one future."""
    a, b = given.tensors[one], given.tensors[other]
    alike = (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())
    return alike and one in changed and other in changed and changed[one].after == changed[other].after


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may lie in one place."""
    reach = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False
