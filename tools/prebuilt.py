"""See that the extension is in taps_ext/ and has kernels for a device; without one there, copy the installed one.

    python tools/prebuilt.py 90           # the device's compute capability, 9.0

The tree comes before what is installed when Python looks for `taps_ext`, so that a wheel's extension serves it only
from there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = tuple(f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)


def place(package: Path, installed: list[Path]) -> str:
    """Bring the extension into `package`, from the first of the folders `installed` that has one for this Python.

    Returns:
        What was done.

    Raises:
        SystemExit: there is none.
    """
    if there := [name for name in NAMES if (package / name).exists()]:
        return f"{there[0]} is in {package.name}/"
    for folder in installed:
        for name in NAMES:
            if (folder / name).exists():
                shutil.copy2(folder / name, package / name)
                return f"{name} was copied from {folder}"
    raise SystemExit(
        f"no extension for Python {sys.version_info.major}.{sys.version_info.minor} in {package} and none installed: "
        f"install the wheel, or copy its taps_ext/{NAMES[0]} there"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", help="of the device, without a dot: 80, 90, 120")
    capability = parser.parse_args().capability
    elsewhere = [Path(entry or ".").resolve() for entry in sys.path]
    print(place(ROOT / "taps_ext", [entry / "taps_ext" for entry in elsewhere if entry != ROOT]))
    sys.path.insert(0, str(ROOT))
    from taps_ext import extension

    if extension.C is None:
        raise SystemExit("the extension cannot be loaded; the warning above says why")
    info = extension.C.build_info()
    print(info)
    architectures = (info["cuda"] or {}).get("architectures", "")
    if not extension.has_kernels(architectures, (int(capability[:-1]), int(capability[-1]))):
        raise SystemExit(
            f"expected kernels for compute capability {capability}, got those for {architectures or 'none'}"
        )


if __name__ == "__main__":
    main()
