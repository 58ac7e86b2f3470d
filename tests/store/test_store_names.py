"""Tasks' names as names of files: one of each other, on any file system."""

from __future__ import annotations

import re

from taps_ext import store

NAMES = ["birds", "a b (c)+,=@", "a/b", "a%2Fb", "a:b", "ä", ".hidden", "..", "a\\b", "a\nb", "CON?", "%", "%25", "鳥"]


def test_names_stay_different_and_come_back() -> None:
    files = [store.names.file_name(name) for name in NAMES]
    assert len(set(files)) == len(NAMES) and [store.names.name_of(file) for file in files] == NAMES
    assert all(re.fullmatch(r"[A-Za-z0-9_.~%()+,=@ -]+", file) for file in files)
    assert files[:2] == NAMES[:2]
