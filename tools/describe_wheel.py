"""Print a wheel's size, its files and what its binaries need at run time."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

for path in map(Path, sys.argv[1:]):
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        for info in archive.infolist():
            print(f"  {info.file_size:>10,}  {info.filename}")
            if ".so" in info.filename:
                binary = archive.extract(info, folder)
                dynamic = subprocess.run(["readelf", "-d", binary], check=True, text=True, stdout=subprocess.PIPE)
                for line in dynamic.stdout.splitlines():
                    if "(NEEDED)" in line or "PATH)" in line:
                        print(" " * 14 + line.split(")", 1)[1].strip())
