"""Tasks' names as names of files: one of each other, on any file system."""

from __future__ import annotations

import hashlib
import re

from taps_ext import store

NAMES = ["birds", "a b (c)+,=@", "a/b", "a%2Fb", "a:b", "ä", ".hidden", "..", "a\\b", "a\nb", "CON?", "%", "%25", "鳥"]


def test_names_stay_different_and_come_back() -> None:
    files = [store.names.file_name(name) for name in NAMES]
    assert len(set(files)) == len(NAMES) and [store.names.name_of(file) for file in files] == NAMES
    assert all(re.fullmatch(r"[A-Za-z0-9_.~%()+,=@ -]+", file) for file in files)
    assert files[:2] == NAMES[:2]


def test_long_names_are_cut_and_stay_different() -> None:
    """From the first one that no file could have; shorter ones keep their files to the byte."""
    for ending in ("", ".taps", ".shared.taps"):
        most = 255 - len(ending)
        assert store.names.file_name("x" * most, ending) == "x" * most + ending
        names = ["x" * (most + 1), "x" * most + "y", "\u9ce5" * 60, "\u9ce5" * 61, "x" * 512, "%" * 200]
        files = [store.names.file_name(name, ending) for name in names]
        assert len(set(files)) == len(names) and {len(file.encode()) for file in files} == {255}
        assert all(file.endswith(ending) and store.names.name_of(file.removesuffix(ending)) is None for file in files)
    digest = hashlib.sha256(("x" * 251).encode()).hexdigest()
    assert store.names.file_name("x" * 251, ".taps") == "x" * 180 + f"%long-{digest}.taps"
    assert store.names.name_of(store.names.file_name(f"a%long-{digest}")) == f"a%long-{digest}"
