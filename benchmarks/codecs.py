"""What each codec makes of real task files: bytes, the answers that stay the same, the error of the logits.

    python benchmarks/codecs.py run [--files runs/task-files] [--data ../shared/data] [--json FILE]
    python benchmarks/codecs.py table [--json FILE]
    python benchmarks/codecs.py plot [--json FILE] [--docs docs]

The files are those of `make task-files`. Every codec packs every open layer; what it leaves as it is (layers that it
would not make smaller) is counted as it is. Agreement: test images whose first answer is that of the unpacked task.
Logit error: |logits - unpacked| / |unpacked|, Frobenius norms, of logits less their mean over the classes. Beside the
codecs, without a format here: the bits of fine-tuned weights XORed with the base's, byte by byte in planes, compressed
by zstandard (where that is installed), lossless.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real import base_of, task_of
from task_files import RUNS
from torch import Tensor

import taps_ext
from taps_ext.plot import Point, tradeoff

CODECS = ("bitmask", "int8", "int4", "bitmask:0.1", "lowrank:8", "sign")
METHODS = ("taps", "full")


def logits_of(model: taps_ext.TaskModel, task: str, x: Tensor) -> Tensor:
    """Of the whole split."""
    with torch.no_grad():
        return torch.cat([model(part, task=task) for part in x.split(64)])


def centred(logits: Tensor) -> Tensor:
    """Without what softmax does not see."""
    return logits.double() - logits.double().mean(dim=1, keepdim=True)


def xor_zstd(model: taps_ext.TaskModel, task: str) -> int | None:
    """Bytes of the open layers' weights as bits that differ from the base's, or None without zstandard."""
    try:
        import zstandard
    except ImportError:
        return None
    total = 0
    for name, part, _ in model.state(task).gated():
        if name not in model.state(task).open_layers():
            continue
        weight = model.base.get_submodule(name).weight.detach()
        own = part.fold(weight)
        bits = (own.contiguous().view(torch.int32) ^ weight.contiguous().view(torch.int32)).numpy()
        planes = np.ascontiguousarray(bits.view(np.uint8).reshape(-1, 4).T)  # the high bytes are mostly zero
        total += len(zstandard.ZstdCompressor(level=9).compress(planes.tobytes()))
    return total


def measure(file: Path, base: str, size: int, task: str, data: Path) -> dict[str, Any]:
    """One file under every codec."""
    test, _ = task_of(data, task, size)
    assert test.test is not None
    x, y = test.test[0], test.test[1]
    rows = []
    plain = torch.empty(0)
    for codec in (None, *CODECS):
        model = taps_ext.TaskModel(base_of(data, base, size)).eval()
        model.load_task(file)
        packing = None if codec is None else model.pack_task(task, codec=codec)
        if codec is None:
            plain = logits_of(model, task, x)
            open_bytes = sum(
                model.base.get_submodule(name).weight.numel() * 4 for name in model.state(task).open_layers()
            )
            zstd = xor_zstd(model, task)
        logits = plain if codec is None else logits_of(model, task, x)
        with tempfile.TemporaryDirectory() as folder:
            model.save_task(task, Path(folder) / "packed.taps")
            nbytes = (Path(folder) / "packed.taps").stat().st_size
        lost = (centred(logits) - centred(plain)).norm() / centred(plain).norm()
        rows.append(
            {
                "codec": codec or "dense",
                "file_bytes": nbytes,
                "delta_bytes": open_bytes if packing is None else packing.bytes,
                "of_open_fp32": 1.0 if packing is None else packing.bytes / open_bytes,
                "accuracy": float((logits.argmax(1) == y).double().mean()),
                "agreement": float((logits.argmax(1) == plain.argmax(1)).double().mean()),
                "logit_error": float(lost),
            }
        )
        model.unload()
    found: dict[str, Any] = {"images": len(y), "open_bytes": open_bytes, "rows": rows}
    if zstd is not None:
        found["xor_zstd_of_open_fp32"] = zstd / open_bytes
    return found


def run(files: Path, data: Path, to: Path) -> None:
    """Measure all files."""
    results = {}
    for base, size, task, _ in RUNS:
        for method in METHODS:
            name = f"{base}-{task}-{method}"
            results[name] = measure(files / name / f"{task}.taps", base, size, task, data)
            print(name, flush=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({"torch": torch.__version__, "files": results}, indent=1) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """In Markdown: a line for each file and codec."""
    lines = [
        "| file | codec | file | Deltas, of open fp32 | accuracy | same answer | logit error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results["files"].items():
        for row in found["rows"]:
            lines.append(
                f"| {name} | {row['codec']} | {row['file_bytes'] / 1e6:.2f} MB | {row['of_open_fp32']:.3f} | "
                f"{100 * row['accuracy']:.2f} | {100 * row['agreement']:.2f} % | {100 * row['logit_error']:.2f} % |"
            )
        if (zstd := found.get("xor_zstd_of_open_fp32")) is not None:
            lines.append(f"| {name} | XOR, zstandard | | {zstd:.3f} | | 100 % | 0 |")
    return "\n".join(lines)


def plot(results: dict[str, Any], docs: Path) -> None:
    """A panel for each file."""
    panels = {
        name: [Point(row["codec"], row["file_bytes"], 100 * row["accuracy"]) for row in found["rows"]]
        for name, found in results["files"].items()
    }
    tradeoff(docs / "codecs.png", panels, columns=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("--files", type=Path, default=Path("runs/task-files"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/codecs.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if args.command == "run":
        for folder in (args.files, args.data):
            if not folder.is_dir():
                parser.error(f"no folder {folder}; make task-files writes the files")
        run(args.files, args.data, args.json)
        return
    results = json.loads(args.json.read_text(encoding="utf-8"))
    if args.command == "plot":
        plot(results, args.docs)
    else:
        print(table(results))


if __name__ == "__main__":
    main()
