"""Task files: reading beside the digest's own rate and a bare read, folders of many tasks, headers of many tensors.

    python benchmarks/files.py [--megabytes 100] [--json FILE]

One run, one thread, the best of several turns that alternate, files in the page cache. `digest` is SHA-256 over bytes
that are in memory already, 16 MiB at a time, `bare read` reads the file into one buffer, `fresh read` into memory of
its own, `mapped` maps it and hashes the pages. `load` opens, proves and keeps the tensors, `verify` proves them. Each
folder is opened, asked for a task and its header read; a process of its own keeps a hundred such folders, and what it
holds is compared. A header of more tensors, parts or tokens than a task may have is one that is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import fastest, write

from taps_ext import TaskFolder, store
from taps_ext.store.format import DIGEST_KEY, MAX_TASK_TENSORS, MAX_TENSORS, encode_header, header_digest
from taps_ext.store.strict_json import dumps
from taps_ext.store.tensors import CHUNK_BYTES, memory

PARENT = "sha256:" + "0" * 64
GATE = {"learn": True, "open": True, "threshold": 0.1}
LAYER = {"kind": "layer", "gate": GATE, "change": {"kind": "dense"}}

RESIDENT = """
import sys
from pathlib import Path
from taps_ext import TaskFolder

def held():
    words = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")).split()
    return int(words[1]) * 1024

warm, path = sys.argv[1:]
TaskFolder(warm).header("task 0")
before = held()
folders = [TaskFolder(path) for _ in range(100)]
for folder in folders:
    folder.header("task 7")
print(before, held())
"""


def task(count: int, rows: int, columns: int) -> store.TaskFile:
    """A task of so many layers, each with a Delta and a score."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"layers.{index}": store.Record(
            LAYER, {"delta": torch.randn(rows, columns, generator=generator), "score": torch.tensor(0.15)}
        )
        for index in range(count)
    }
    return store.TaskFile(parent=PARENT, name="task", method={"method": "taps"}, parts=parts)


def _hashed(view: memoryview) -> str:
    digest = hashlib.sha256()
    for begin in range(0, len(view), CHUNK_BYTES):
        digest.update(view[begin : begin + CHUNK_BYTES])
    return digest.hexdigest()


def _read(path: Path, into: Tensor) -> None:
    fd, view, done = os.open(path, os.O_RDONLY), memory(into), 0
    try:
        while done < len(view):
            done += os.readv(fd, [view[done : done + CHUNK_BYTES]])
    finally:
        os.close(fd)


def _mapped(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages, memoryview(pages) as view:
        return _hashed(view)


def reading(folder: Path, megabytes: float, turns: int) -> dict[str, Any]:
    """A file of 16 layers: load and verify beside what they cannot do without."""
    path = folder / "large.taps"
    size = store.save(path, task(16, 1024, max(1, round(megabytes * 1e6 / 16 / 1024 / 4))))
    kept = torch.empty(size, dtype=torch.uint8)
    view = memory(kept)
    _read(path, kept)
    times = fastest(
        {
            "digest": lambda: _hashed(view),
            "bare read": lambda: _read(path, kept),
            "fresh read": lambda: _read(path, torch.empty(size, dtype=torch.uint8)),
            "mapped": lambda: _mapped(path),
            "load": lambda: store.load(path),
            "verify": lambda: store.verify(path),
            "header": lambda: store.read_header(path),
        },
        turns,
    )
    return {
        "bytes": size,
        "ms": {name: round(value, 2) for name, value in times.items()},
        "load_over_digest": round(times["load"] / times["digest"], 3),
        "verify_over_digest": round(times["verify"] / times["digest"], 3),
        "load_over_read_and_digest": round(times["load"] / (times["fresh read"] + times["digest"]), 3),
        "verify_over_read_and_digest": round(times["verify"] / (times["bare read"] + times["digest"]), 3),
        "load_over_bare_read": round(times["load"] / times["bare read"], 3),
        "mapped_over_read_and_digest": round(times["mapped"] / (times["fresh read"] + times["digest"]), 3),
    }


def folders(folder: Path, turns: int) -> dict[str, Any]:
    """Ten tasks and a thousand: the time to open and to look into one, and the memory of a hundred such folders."""
    content = folder / "small.taps"
    store.save(content, task(8, 8, 8))
    paths = {}
    for count in (10, 1000):
        paths[count] = folder / f"{count} tasks"
        paths[count].mkdir()
        for index in range(count):
            (paths[count] / f"task {index}.taps").write_bytes(content.read_bytes())

    def use(path: Path) -> None:
        for _ in range(20):
            TaskFolder(path).header("task 7")

    times = fastest({str(count): lambda path=path: use(path) for count, path in paths.items()}, turns)  # type: ignore[misc]
    held = {}
    for count, path in paths.items():
        command = [sys.executable, "-c", RESIDENT, str(paths[10]), str(path)]
        before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        held[count] = {"process": int(after), "beyond": int(after) - int(before)}
    return {
        "ms": {count: round(value / 20, 3) for count, value in times.items()},
        "a_thousand_over_ten": round(times["1000"] / times["10"], 3),
        "resident_bytes": held,
        "resident_over": round(held[1000]["process"] / held[10]["process"], 4),
    }


def forge(path: Path, parts: int, words: int) -> None:
    """A task of so many parts without tensors, and so many words in its method, metrics and labels each, whatever the
    limits are."""
    strings = {
        "taps.format": "1.2",
        "taps.kind": "task",
        "taps.parent": PARENT,
        "taps.versions": "{}",
        "taps.digests": "{}",
        "taps.parts": dumps({f"{i:05}": {"facts": {"kind": "x"}, "tensors": []} for i in range(parts)}),
        "taps.method": dumps({"method": "taps", "x": [0] * words}),
        "taps.metrics": dumps({"x": [0] * words}),
        "taps.labels": dumps([""] * words),
    }
    strings[DIGEST_KEY] = header_digest({}, strings, path=path)
    path.write_bytes(encode_header({}, strings, path=path))


def headers(folder: Path, turns: int) -> dict[str, Any]:
    """As many tensors as a task may have, in layers, in one part and one a part with other entries to the limit; parts
    and entries of many words without tensors; and 65,536 tensors, of a task (refused) and a state."""
    refused = ("a task's, refused", "parts and words, refused")
    names = ("layers", "one part", "one a part, and words", "parts and words", *refused, "a state's")
    paths = {name: folder / f"{name}.taps" for name in names}
    forge(paths["parts and words"], MAX_TASK_TENSORS, 27_000)  # 98,000 tokens of parts, 162,000 of the others
    forge(paths["parts and words, refused"], 20_000, 262_000 // 2)
    gate = {"learn": False, "open": True, "threshold": 0.5}
    facts = {"kind": "layer", "gate": gate, "change": {"kind": "dense"}}
    full = {f"layers.{i}": store.Record(facts, {"delta": torch.zeros(1)}) for i in range(MAX_TASK_TENSORS)}
    labels = [str(i) for i in range(16_000)]
    store.save(
        paths["one a part, and words"],
        store.TaskFile(parent=PARENT, method={"method": "taps"}, parts=full, labels=labels),
    )
    store.save(paths["layers"], task(MAX_TASK_TENSORS // 2, 1, 1))
    one = {f"t{index}": torch.zeros(1) for index in range(MAX_TASK_TENSORS)}
    store.save(
        paths["one part"],
        store.TaskFile(parent=PARENT, method={"method": "taps"}, parts={"a": store.Record({"kind": "x"}, one)}),
    )
    values = {f"t{index}": torch.zeros(1) for index in range(MAX_TENSORS)}
    store.save(paths["a state's"], store.TaskFile(kind="state", parent=PARENT, values=values))
    content = paths["a state's"].read_bytes()
    paths["a task's, refused"].write_bytes(content.replace(b'"taps.kind":"state"', b'"taps.kind":"task" ', 1))

    def read(path: Path) -> None:
        try:
            store.read_header(path)
        except store.errors.LimitError:
            assert path.stem in refused

    times = fastest({name: lambda path=path: read(path) for name, path in paths.items()}, turns)  # type: ignore[misc]
    counts = {name: MAX_TENSORS if "'s" in name else MAX_TASK_TENSORS for name in paths if not name.startswith("parts")}
    return {
        "tensors": counts,
        "bytes": {name: path.stat().st_size for name, path in paths.items()},
        "ms": {name: round(value, 2) for name, value in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="of the large file (default: 100)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = reading(folder, args.megabytes, args.turns)
        many = folders(folder, args.turns)
        tables = headers(folder, args.turns)
    size = large["bytes"]
    print(f"a file of {size / 1e6:.1f} MB")
    for what, milliseconds in large["ms"].items():
        rate = "" if what == "header" else f"  {size / milliseconds / 1e6:6.2f} GB/s"
        print(f"  {what:<12} {milliseconds:9.2f} ms{rate}")
    for key, value in large.items():
        if "_over_" in key:
            print(f"  {key.replace('_', ' '):<32} {value:6.2f}")
    ms, held = many["ms"], many["resident_bytes"]
    print(f"a folder of 10 tasks {ms['10']:.3f} ms, of 1,000 {ms['1000']:.3f} ms: {many['a_thousand_over_ten']:.2f}")
    for count, found in held.items():
        print(f"  a process with a hundred of {count:,}: {found['process']:,} bytes, {found['beyond']:,} of them new")
    print(f"  {many['resident_over']:.4f} of the memory")
    print("a header")
    for what, milliseconds in tables["ms"].items():
        tensors = f"{tables['tensors'][what]:,} tensors ({what})" if what in tables["tensors"] else what
        print(f"  of {tensors}: {milliseconds:.2f} ms")
    if args.json:
        write(args.json, {"reading": large, "folders": many, "headers": tables}, load)


if __name__ == "__main__":
    main()
