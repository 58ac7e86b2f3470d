"""Compile the extension into taps_ext/ with CMake and ninja, on all cores, where nothing may be installed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", choices=["AUTO", "ON", "OFF"], default="AUTO")
    parser.add_argument("--architectures", default="90a-real")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "inplace")
    args = parser.parse_args()
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(args.build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DTAPS_CUDA={args.cuda}",
        f"-DTAPS_CUDA_ARCHITECTURES={args.architectures}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(args.build), "--parallel", str(os.cpu_count() or 2)], check=True)
    subprocess.run(["cmake", "--install", str(args.build), "--prefix", str(ROOT)], check=True)
    check = "import torch, taps_ext._C as c; print(c.build_info())"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
