"""The compiled kernels give what plain torch gives, and plain torch what the definition says."""

from __future__ import annotations

import random

import pytest
import torch

from taps_ext.patch import codes, kernels, sums
from taps_ext.patch.codes import CodeFault, Fault
from taps_ext.patch.kernels import Numbers

if kernels.C is None:
    pytest.skip("the extension is missing", allow_module_level=True)

OPS = torch.ops.taps_ext
MASK = (1 << 64) - 1


def splitmix(count: int) -> list[int]:
    """The generator as published: a state that steps, and a finaliser."""
    state, found = 0, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def by_definition(data: bytes) -> int:
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    return sum(key * word for key, word in zip(splitmix(len(words)), words, strict=True)) % (1 << 128)


def test_the_first_keys_are_those_published() -> None:
    assert splitmix(2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert [key & MASK for key in sums.keys(torch.arange(500)).tolist()] == splitmix(500)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31, 32, 33, 4099])
def test_the_sum_is_its_definition(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randint(0, 256, (length,), dtype=torch.uint8)
    data[: length // 3] = 255  # carries
    expected = by_definition(bytes(data.tolist()))
    monkeypatch.setattr(sums, "CHUNK", 5)
    assert sums.sum_of(data) == expected == kernels.sum_of(data)
    assert kernels._joined(OPS.patch_sum(data, 0)) == expected


def test_a_sum_goes_on_where_another_ends() -> None:
    data = torch.randint(0, 256, (101,), dtype=torch.uint8)
    parts = [OPS.patch_sum(data[:48], 0), OPS.patch_sum(data[48:], 6)]
    assert sum(map(kernels._joined, parts)) % sums.MODULUS == kernels.sum_of(data)


@pytest.mark.parametrize("unit", [1, 2, 4, 8])
def test_one_flipped_bit_swaps_and_shifts_change_the_sum(unit: int) -> None:
    data = torch.randint(0, 256, (256,), dtype=torch.uint8)
    seen = {kernels.sum_of(data)}
    for bit in range(2048):
        other = data.clone()
        other[bit // 8] ^= 1 << bit % 8
        seen.add(kernels.sum_of(other))
    rows = data.view(-1, unit)
    for step in range(1, len(rows)):
        seen.add(kernels.sum_of(rows.roll(step, 0).reshape(-1)))
    assert len(seen) == 1 + 2048 + len(rows) - 1


@pytest.mark.parametrize("unit", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01, 0.1, 0.5, 1.0])
def test_compiled_is_plain(unit: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 7, 64, 129, 5003):
        old = torch.randint(0, 256, (count * unit,), dtype=torch.uint8)
        new = old.clone()
        at = torch.rand(count) < density
        new.view(-1, unit)[at] ^= 1 << 7
        made, plain = kernels._find_compiled(old, new, unit), kernels._find_plain(old, new, unit)
        if made is None or plain is None:
            assert made is plain is None and not at.any()
            continue
        assert (made.coding, made.replaced) == (plain.coding, plain.replaced)
        assert torch.equal(made.places, plain.places) and torch.equal(made.values, plain.values)
        for coding, width in codes.WIDTHS.items():
            numbers = at.nonzero().reshape(-1)
            index, values = codes.encode(numbers, width, count), new.view(-1, unit)[at].reshape(-1)
            room, news = torch.empty_like(index), torch.empty_like(values)
            replaced = kernels._joined(OPS.patch_encode(old, new, room, news, unit, width))
            assert torch.equal(room, index) and torch.equal(news, values)
            assert replaced == sums.sum_at(numbers, old.view(sums.UNITS[unit])[numbers], unit)
            assert torch.equal(codes.decode(index, width, count, len(numbers)), numbers)
            change = Numbers(coding, index, values, unit, count)
            added = kernels.check(change)
            target, other = old.clone(), old.clone()
            found = kernels.prepare(target.view(sums.UNITS[unit]), change)
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "C", None)
                assert kernels.check(change) == added
                again = kernels.prepare(other.view(sums.UNITS[unit]), change)
            assert found[0] == again[0] == replaced and torch.equal(target, old) and torch.equal(other, old)
            third = old.clone()
            swap = kernels.Swap(third.view(sums.UNITS[unit]), change)
            assert swap.look() == replaced and torch.equal(third, old)
            assert swap.swap() == replaced and torch.equal(third, new)
            swap.back()
            assert torch.equal(third, old)
            found[1]()
            again[1]()
            assert torch.equal(target, new) and torch.equal(other, new)
            assert (kernels.sum_of(old) - replaced + added) % sums.MODULUS == kernels.sum_of(new)


def gaps(width: int, *values: int) -> torch.Tensor:
    return torch.tensor(bytearray(b"".join(value.to_bytes(width, "little") for value in values)), dtype=torch.uint8)


def faults(width: int) -> list[tuple[str, torch.Tensor, int, int, Fault, int]]:
    """name, index, units, values, what is wrong and where."""
    top = (1 << 8 * width) - 1
    return [
        ("zero first", gaps(width, 0), 9, 1, Fault.RANGE, -1),
        ("twice", gaps(width, 3, 0), 9, 2, Fault.TWICE, 2),
        ("past the end", gaps(width, 3, 7), 9, 2, Fault.RANGE, 9),
        ("just the end", gaps(width, 10), 9, 1, Fault.RANGE, 9),
        ("within a gap", gaps(width, 1, top), top + 9, 1, Fault.OPEN, top),
        ("too few", gaps(width, 1, 2), 9, 3, Fault.COUNT, 2),
        ("too many", gaps(width, 1, 2, 3), 9, 2, Fault.COUNT, 3),
        ("none", gaps(width), 9, 1, Fault.COUNT, 0),
    ]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_faults_of_gaps(width: int) -> None:
    for name, index, units, count, fault, at in faults(width):
        values = torch.zeros(count, dtype=torch.uint8)
        told = OPS.patch_check(None, index, values, 1, units, width)
        assert told[:2] == [fault, at], name
        assert OPS.patch_prove(index, count, units, width)[:2] == [fault, at], name
        with pytest.raises(CodeFault) as stop:
            codes.decode(index, width, units, count)
        assert (stop.value.fault, stop.value.at) == (fault, at), name
        target = torch.full((min(units, 5000),), 7, dtype=torch.uint8)
        if units == len(target):
            assert OPS.patch_check(target, index, values, 1, units, width)[0] == fault
            OPS.patch_write(target, index, values, 1, width)  # stays within the target, whatever the index says


def test_faults_of_a_bitmask() -> None:
    for byte, count, fault, at in ((128, 1, Fault.RANGE, 15), (1, 2, Fault.COUNT, 1), (3, 1, Fault.COUNT, 2)):
        index = torch.tensor([0, byte], dtype=torch.uint8)
        told = OPS.patch_check(None, index, torch.zeros(count, dtype=torch.uint8), 1, 10, 0)
        assert told[:2] == OPS.patch_prove(index, count, 10, 0)[:2] == [fault, at]
        with pytest.raises(CodeFault) as stop:
            codes.decode(index, 0, 10, count)
        assert (stop.value.fault, stop.value.at) == (fault, at)


def test_a_gap_of_exactly_an_escape() -> None:
    for distance in (254, 255, 256, 509, 510, 511):
        numbers = torch.tensor([distance - 1, 2 * distance - 1])
        index = codes.encode(numbers, 1, 2000)
        assert torch.equal(codes.decode(index, 1, 2000, 2), numbers)
        assert OPS.patch_check(None, index, torch.zeros(2, dtype=torch.uint8), 1, 2000, 1)[0] == 0


def test_arguments() -> None:
    ok, other = torch.zeros(8, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    calls = [
        (lambda: OPS.patch_sum(torch.zeros(3), 0), "vector of uint8"),
        (lambda: OPS.patch_sum(torch.zeros(3, 3, dtype=torch.uint8), 0), "vector of uint8"),
        (lambda: OPS.patch_sum(ok[::2], 0), "next to each other"),
        (lambda: OPS.patch_measure(ok, other, 1), "8 bytes like before, got 9"),
        (lambda: OPS.patch_measure(other, other, 2), "multiple of 2"),
        (lambda: OPS.patch_measure(ok, ok, 3), "unit: expected 1, 2, 4 or 8, got 3"),
        (lambda: OPS.patch_check(None, ok, ok, 1, 8, 3), "width: expected"),
        (lambda: OPS.patch_check(None, other, ok, 1, 8, 2), "index: expected a multiple of 2"),
        (lambda: OPS.patch_check(None, ok, ok, 1, 8, 0), "index: expected 1 bytes for 8 bits"),
        (lambda: OPS.patch_check(None, ok, ok, 8, 1 << 62, 1), "units"),
        (lambda: OPS.patch_check(None, ok, ok, 1, -1, 1), "units"),
        (lambda: OPS.patch_check(ok, ok, ok, 1, 9, 1), "target: expected 9 bytes, got 8"),
        (lambda: OPS.patch_prove(other, 1, 8, 2), "index: expected a multiple of 2"),
        (lambda: OPS.patch_prove(ok, 1, -1, 1), "units"),
        (lambda: OPS.patch_swap(ok, ok, ok, other, torch.zeros(40, dtype=torch.uint8), 1, 1), "old: expected 8 bytes"),
        (lambda: OPS.patch_swap(ok, ok, ok, ok.clone(), ok.clone(), 1, 1), "swapped: expected 40 bytes, got 8"),
        (lambda: OPS.patch_encode(ok, ok + 1, ok.clone(), ok[:1].clone(), 1, 1), "room"),
    ]
    for call, words in calls:
        with pytest.raises(RuntimeError, match=words):
            call()


def test_random_bytes_as_an_index_stay_in_bounds() -> None:
    """Whatever is decoded, compiled and plain agree on whether it is an index, and nothing outside is written."""
    chance = random.Random(0)
    for _ in range(2000):
        width = chance.choice((1, 2, 4))
        index = torch.tensor(
            bytearray(chance.choices((0, 1, 2, 255, chance.randrange(256)), k=width * chance.randint(0, 9))),
            dtype=torch.uint8,
        )
        units, count = chance.choice((1, 5, 300, 70_000)), chance.randint(0, 9)
        values = torch.ones(count, dtype=torch.uint8)
        room = torch.zeros(units + 128, dtype=torch.uint8)
        told = OPS.patch_write(room[64 : 64 + units], index, values, 1, width)
        assert not room[:64].any() and not room[64 + units :].any()
        try:
            numbers = codes.decode(index, width, units, count)
        except CodeFault:
            assert told[0] != 0
        else:
            assert told[0] == 0 and torch.equal(room[64 : 64 + units].nonzero().reshape(-1), numbers)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_fault_at_any_code_of_a_long_index(width: int) -> None:
    """Around the ends of batches and blocks: proof, check and swap say the same, and what was written goes back."""
    clean = torch.full((5000,), 2, dtype=torch.int64)
    for place in (0, 1, 126, 127, 128, 129, 255, 256, 257, 4094, 4095, 4096, 4097, 4999):
        for code, fault in ((0, Fault.TWICE), ((1 << 8 * width) - 1, None), (3, Fault.NONE)):
            codes_ = clean.clone()
            codes_[place] = code
            index = codes_.to(sums.UNITS[width]).view(torch.uint8)
            units, count = 10_001, 5000
            values = torch.ones(count, dtype=torch.uint8)
            target = torch.randint(0, 256, (units,), dtype=torch.uint8)
            before, old, swapped = target.clone(), torch.empty_like(values), torch.zeros(5, dtype=torch.int64)
            told = OPS.patch_check(target, index, values, 1, units, width)
            if fault is not None:
                assert told[0] == (Fault.RANGE if (place, code) == (0, 0) else fault)
            else:
                assert told[0] != Fault.NONE
            assert OPS.patch_prove(index, count, units, width)[:2] == told[:2]
            OPS.patch_swap(target, index, values, old, swapped.view(torch.uint8), 1, width)
            *result, done = swapped.tolist()
            assert result == told and (done == count) == (told[0] == Fault.NONE)
            OPS.patch_write(target, index, old[:done], 1, width)
            assert torch.equal(target, before)


def test_a_swap_that_was_put_back_writes_no_more() -> None:
    """The thread that was to do it may come late."""
    old, new = torch.zeros(500, dtype=torch.uint8), torch.zeros(500, dtype=torch.uint8)
    new[::50] = 1
    made = kernels.find(old, new)
    assert made is not None
    swap = kernels.Swap(old, Numbers(made.coding, made.places, made.values, 1, 500))
    swap.back()
    swap.swap()
    assert not old.any()
