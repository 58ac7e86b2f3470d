"""Files with something wrong in them, drawn by a number: bytes that changed, and right digests over wrong content."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from store_files import Draft

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e300, 1e-300),
    *(float("inf"), float("nan"), "", "a", "layer", "own", "instead", "score", "delta", "int8", "sign", "bitmask"),
    *("../a", "a\x00b", "\ud800", "x" * 3000, "1e999", [], {}, [[]], [0], [2**62], {"": {}}, {"kind": "layer"}),
]
VALUES = [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 3e38, 1e-45, 0.0]
TABLES = ("taps.parts", "taps.method", "taps.tensors", "taps.labels", "taps.metrics", "taps.layers", "taps.contents")


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*way, key)
        yield from places(item, (*way, key))


class Mutants:
    """What can become of some honest files.

    Args:
        honest: their bytes. sign: makes a file of a draft; right digests by default.
    """

    def __init__(self, honest: list[bytes], sign: Callable[[Draft], bytes] = Draft.build) -> None:
        self.honest, self.sign = honest, sign
        self.drafts = [Draft.of(blob) for blob in honest]

    def draw(self, seed: int) -> bytes:
        """The file of this number."""
        chance = random.Random(seed)
        which = chance.randrange(len(self.honest))
        if chance.random() < 0.25:
            return self._bytes(self.honest[which], chance)
        draft = copy.deepcopy(self.drafts[which])
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            chance.choice((self._table, self._table, self._entry, self._values, self._tensors, self._metadata))(
                draft, chance
            )
        try:
            return self.sign(draft)
        except (UnicodeEncodeError, ValueError, TypeError, KeyError, AttributeError):  # nobody can write that
            return self._bytes(self.honest[which], chance)

    @staticmethod
    def _bytes(blob: bytes, chance: random.Random) -> bytes:
        made = bytearray(blob)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(made) + 1)
            kind = chance.randrange(4)
            if kind == 0 and at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del made[at : at + chance.randrange(1, 9)]
            elif kind == 2:
                made[at:at] = chance.randbytes(chance.randrange(1, 9))
            else:
                return bytes(made[:at])
        return bytes(made)

    @staticmethod
    def _nasty(chance: random.Random) -> Any:
        if chance.random() < 0.02:
            return deep(chance.choice((30, 300)))
        return copy.deepcopy(chance.choice(NASTY))

    def _table(self, draft: Draft, chance: random.Random) -> None:
        """One place in one of the JSON tables."""
        keys = [key for key in TABLES if key in draft.metadata]
        if not keys:
            return
        key = chance.choice(keys)
        try:
            table = json.loads(draft.metadata[key])
        except (ValueError, TypeError, RecursionError):  # an earlier change left no table
            return
        everywhere = list(places(table))
        if not everywhere:
            draft.metadata[key] = json.dumps(self._nasty(chance))
            return
        *way, last = chance.choice(everywhere)
        inside = table
        for step in way:
            inside = inside[step]
        kind = chance.randrange(4)
        if kind == 0:
            del inside[last]
        elif kind == 1 and isinstance(inside, dict):
            inside[chance.choice(("", "a.b", "kind", "x" * 600, "delta", "\x07"))] = inside.pop(last)
        else:
            inside[last] = self._nasty(chance)
        draft.metadata[key] = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def _entry(self, draft: Draft, chance: random.Random) -> None:
        """A tensor's entry in the header."""
        name = chance.choice(sorted(draft.tensors) or [""])
        key = chance.choice(("dtype", "shape", "data_offsets", "more"))
        value = chance.choice(("F32", "BF16", "U8", "BOOL", "I64", "F8_E4M3", "C64")) if key == "dtype" else None
        if key == "shape":
            value = [chance.choice((0, 1, 2, 3, 2**31, 2**40)) for _ in range(chance.randrange(4))]
        draft.entries[name] = {key: self._nasty(chance) if value is None or chance.random() < 0.3 else value}

    @staticmethod
    def _values(draft: Draft, chance: random.Random) -> None:
        """A tensor's bytes."""
        if not draft.tensors:
            return
        name = chance.choice(sorted(draft.tensors))
        dtype, shape, raw = draft.tensors[name]
        made = bytearray(raw)
        for _ in range(min(len(made), chance.choice((1, 4)))):
            if dtype == "F32":
                at = 4 * chance.randrange(len(made) // 4)
                made[at : at + 4] = struct.pack("<f", chance.choice(VALUES))
            else:
                made[chance.randrange(len(made))] = chance.randrange(256)
        draft.tensors[name] = (dtype, shape, bytes(made))

    @staticmethod
    def _tensors(draft: Draft, chance: random.Random) -> None:
        """A tensor more, fewer, twice as long, or by another name."""
        if not draft.tensors:
            return
        name = chance.choice(sorted(draft.tensors))
        dtype, shape, raw = draft.tensors.pop(name)
        kind = chance.randrange(4)
        if kind == 0:
            draft.tensors[name + chance.choice(("x", ".delta", "", "\x00", "y" * 500))] = (dtype, shape, raw)
        elif kind == 1:
            draft.tensors[name] = (dtype, [2, *shape], raw + raw)
        elif kind == 2:
            draft.tensors[name] = (dtype, shape[::-1], raw)

    def _metadata(self, draft: Draft, chance: random.Random) -> None:
        """A whole entry of the metadata."""
        key = chance.choice(sorted(draft.metadata) or ["taps.kind"])
        kind = chance.randrange(4)
        if kind == 3:
            draft.metadata[key] = "[" * 3000 + "]" * 3000
        elif kind == 0:
            draft.metadata.pop(key, None)
        elif kind == 1:
            draft.metadata["taps." + chance.choice(("parts", "kind", "new", "format"))] = draft.metadata.get(key, "")
        else:
            value = self._nasty(chance)
            draft.metadata[key] = value if chance.random() < 0.3 else json.dumps(value)
