"""Patches that version 0.2 wrote load for ever, and are read here once more by the words of docs/patch.md alone."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from patch_states import copies, example, flat, same
from test_patch_kernels import by_definition
from torch import Tensor

from taps_ext import patch
from taps_ext.store.format import ALL_DTYPES

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from make_patches import forms  # noqa: E402

PAIRS = {"codings": example, "forms": forms}
SHA256 = {
    "codings": "7388ed9e6286cc2f52c147bbecd096ac48f5e8026b007d0caee2419e53e8c067",
    "forms": "5dbbaf6ae4744c800b2db48a1ff3e1e76ef73f42d31fa9ea870809ad7d62bbc5",
}


def by_the_page(blob: bytes, old: dict[str, Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor after the patch, from the page's description, without a line of the package."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    data, strings = blob[8 + length :], header.pop("__metadata__")
    stored = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    for name, digest in json.loads(strings["taps.digests"]).items():
        head = json.dumps(["U8", [len(stored[name])]]).encode() + b"\n"
        assert digest == "sha256:" + hashlib.sha256(head + stored[name]).hexdigest()
    found: dict[str, bytes] = {}
    ends: dict[str, list[bytes]] = {"before": [], "after": []}
    for name, entry in sorted(json.loads(strings["taps.tensors"]).items()):
        for end, lines in ends.items():
            if (form := entry[end]) is not None:
                lines.append(json.dumps([name, form["dtype"], form["shape"], form["sum"]]).encode() + b"\n")
        before, after, coding = entry["before"], entry["after"], entry.get("coding")
        if before is not None:
            assert int(before["sum"], 16) == by_definition(bytes(flat(old[name]).tolist()))
        if after is None:
            continue
        if coding is None:
            found[name] = bytes(flat(old[name]).tolist())
        elif coding == "whole":
            found[name] = stored[f"values:{name}"]
        else:
            found[name] = sparse(bytes(flat(old[name]).tolist()), entry, stored, name)
        assert int(after["sum"], 16) == by_definition(found[name])
    for end, lines in ends.items():
        assert strings[f"taps.{end}"] == "sha256:" + hashlib.sha256(b"taps state 1\n" + b"".join(lines)).hexdigest()
    return found


def sparse(data: bytes, entry: dict, stored: dict[str, bytes], name: str) -> bytes:  # type: ignore[type-arg]
    unit = min(ALL_DTYPES[entry["after"]["dtype"]].itemsize, 8)
    index, values = stored[f"index:{name}"], stored[f"values:{name}"]
    numbers: list[int] = []
    if entry["coding"] == "bitmask":
        numbers = [8 * at + bit for at, byte in enumerate(index) for bit in range(8) if byte >> bit & 1]
    else:
        width = {"gap8": 1, "gap16": 2, "gap32": 4}[entry["coding"]]
        last, gap = -1, 0
        for at in range(0, len(index), width):
            code = int.from_bytes(index[at : at + width], "little")
            gap += code
            if code < 256**width - 1:
                last, gap = last + gap, 0
                numbers.append(last)
    made, replaced = bytearray(data), bytearray(len(data))
    for which, number in enumerate(numbers):
        there = slice(number * unit, (number + 1) * unit)
        replaced[there] = data[there]
        made[there] = values[which * unit : (which + 1) * unit]
    assert int(entry["replaced"], 16) == by_definition(bytes(replaced))
    return bytes(made)


@pytest.mark.parametrize("name", PAIRS)
def test_the_golden_file(name: str) -> None:
    old, new = PAIRS[name]()
    path = GOLDEN / f"{name}.tapspatch"
    blob = path.read_bytes()
    assert hashlib.sha256(blob).hexdigest() == SHA256[name]
    read = patch.load(path)
    assert (read.before, read.after) == (patch.digest(old), patch.digest(new))
    assert by_the_page(blob, old) == {n: bytes(flat(tensor).tolist()) for n, tensor in new.items()}
    assert patch.parse(blob).to_bytes() == blob == patch.diff(old, new).to_bytes()
    if name == "codings":
        codings = {entry.part.coding for entry in read.entries.values() if entry.part}
        assert codings == {"gap8", "gap16", "bitmask", "whole"}
        target = copies(old)
        patch.apply(target, read, verify="full")
        assert same(target, new)


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.glob("*.tapspatch")) < 30_000
