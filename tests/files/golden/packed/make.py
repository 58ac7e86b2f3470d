"""Made the golden files of packed tasks: `full-conv.taps` of version 0.1, packed. Kept to say what they hold; they are
never made again.

PYTHONPATH=.:tests/files/golden:tests/helpers python tests/files/golden/packed/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from bases import base_of
from golden_facts import digest

from taps_ext import TaskModel, store

HERE = Path(__file__).parent
CODECS = {
    "bitmask": "bitmask",
    "largest": "bitmask:0.25",
    "int8": "int8",
    "int4": "int4",
    "sign": "sign",
    "lowrank": "lowrank:2",
}


def main() -> None:
    torch.set_num_threads(1)
    facts = {}
    for name, codec in CODECS.items():
        model = TaskModel(base_of("conv")).eval()
        model.load_task(HERE.parent / "full-conv.taps", "t")
        if name == "bitmask":  # of which two thirds are zero
            with torch.no_grad():
                for _, part, _ in model.state("t").gated():
                    for delta in part.changes():
                        delta.mul_(torch.arange(delta.numel()).view(delta.shape) % 3 == 0)
        model.pack_task("t", codec=codec)
        model.save_task("t", HERE / f"{name}.taps")
        parts = store.load(HERE / f"{name}.taps").parts
        facts[name] = {
            module: {"facts": record.facts, "tensors": {n: digest(t) for n, t in sorted(record.tensors.items())}}
            for module, record in parts.items()
        }
    (HERE / "facts.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
