"""One wheel under several torches: run check.py in each environment, inspect the binary's symbols.

    python tests/ops/abi/run.py --wheel W.whl --python .abi/2.11.0/bin/python ... --target .venv/bin/python

The wheel is installed into each `--python`; for a `--target` it goes into a folder of its own, so that
an environment with a development install can serve as well.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")


def output_of(command, **options):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def run_check(python, wheel, folder):
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel]
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if folder:
        install += ["--target", folder, "--upgrade"]
        environment["PYTHONPATH"] = folder
    subprocess.run(install, check=True)
    # From another folder, so that the checkout's own taps_ext is not what gets imported.
    done = subprocess.run(
        [python, HERE / "check.py"],
        cwd=tempfile.gettempdir(),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
    )
    lines = done.stdout.strip().splitlines()
    row = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"failures": ["did not run"]}
    row["passed"] = done.returncode == 0
    return row


def symbols(path, which):
    listing = output_of(["nm", "-D", which, path])
    return {line.split()[-1] for line in listing.splitlines() if line.strip()}


def torch_folder(python):
    code = "import importlib.util as u; print(list(u.find_spec('torch').submodule_search_locations)[0])"
    return Path(subprocess.run([python, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout.strip())


def symbol_faults(binary, pythons):
    """Undefined symbols that break a promise: C++ ones of torch, or ones that a CPU-only libtorch lacks."""
    undefined = {s for s in symbols(binary, "--undefined-only") if not SYSTEM.search(s)}
    plain = {s.split("@")[0] for s in undefined}
    names = subprocess.run(["c++filt"], input="\n".join(sorted(plain)), check=True, text=True, stdout=subprocess.PIPE)
    faults = [f"C++ symbol of torch: {s}" for s in names.stdout.splitlines() if re.search(r"\b(at|c10)::", s)]
    # Weak ones that every toolchain leaves behind, and CPython's own.
    ours = {s for s in plain if not re.match(r"_?Py|_ITM_|__gmon_start__|__cxa_finalize|__tls_get_addr", s)}
    cpu_only = [p for p in map(torch_folder, pythons) if not (p / "lib" / "libtorch_cuda.so").exists()]
    if not cpu_only:
        return [*faults, "none of the torches is a CPU-only build, so its exports could not be compared"], 0
    exported = {s.split("@")[0] for s in symbols(cpu_only[0] / "lib" / "libtorch_cpu.so", "--defined-only")}
    faults += [f"not exported by a CPU-only libtorch: {s}" for s in sorted(ours - exported)]
    return faults, len(ours & exported)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", required=True)
    parser.add_argument("--python", action="append", default=[], help="environment to install the wheel into")
    parser.add_argument("--target", action="append", default=[], help="environment to leave alone")
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for python in args.python:
            rows.append(run_check(os.path.abspath(python), args.wheel, None))
        for python in args.target:
            rows.append(run_check(os.path.abspath(python), args.wheel, folder))
        with zipfile.ZipFile(args.wheel) as archive:
            (name,) = (n for n in archive.namelist() if re.search(r"_C\..*so$", n))
            binary = archive.extract(name, Path(folder) / "unpacked")
        faults, count = symbol_faults(binary, [os.path.abspath(p) for p in args.python + args.target])

    print(f"wheel: {Path(args.wheel).name}")
    columns = {"torch": 14, "torch_cuda": 11, "built_against": 14, "kernels": 11, "isa": 7, "checks": 7}
    print("  ".join(name.ljust(width) for name, width in columns.items()) + "  result")
    for row in rows:
        cells = (str(row.get(name) or "-").ljust(width) for name, width in columns.items())
        print("  ".join(cells) + ("  passed" if row["passed"] else f"  FAILED {row['failures']}"))
    print(f"symbols: {count} from libtorch, all exported by a CPU-only build" if not faults else "\n".join(faults))
    return 0 if all(row["passed"] for row in rows) and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
