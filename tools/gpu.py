"""The GPU job: build from source, test, sanitize, measure, and write one JSON file; `make gpu`.

    python tools/gpu.py --out results [--stage NAME ...] [--list] [--rehearse]

Every stage runs in a process of its own under its own time limit, and the JSON is rewritten after each, so that a
late failure loses nothing; stages that are run alone take the place of their earlier results of the same commit. The
output of all of them is in `log.txt`. `--rehearse` runs the whole job without a device: the tests skip by name and the
sanitizer and the measurements are noted as skipped, which proves the stages, the limits and the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SUBSET = (
    "test_empty or (test_linear and 7-33-17 and None and float32) or (test_linear and 7-34-18 and fused and bfloat16) "
    "or (test_reconstruct and 1- and float32-torch.float32)"
)


@dataclass(frozen=True)
class Stage:
    """One step of the job: its command, its time limit in seconds, and whether it needs a device."""

    name: str
    command: list[str]
    limit: int
    device: bool = True
    sanitized: bool = False


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    nvcc = ["nvcc", "-std=c++17", "-O2", "-arch=sm_90", "-Icsrc", "-o"]
    found = [
        Stage("build", [python, "tools/build_inplace.py", "--cuda", "ON"], 300, device=False),
        Stage("conformance-build", [*nvcc, f"{out}/conformance", "tests/cuda/conformance.cu"], 120, device=False),
        Stage("conformance", [f"{out}/conformance"], 60),
        Stage("tests", [*pytest, "tests/cuda", f"--junitxml={out}/cuda-tests.xml"], 240),
        Stage("planted-bug", [sanitizer, "--error-exitcode", "9", str(out / "planted")], 60),
    ]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *pytest,
            "tests/cuda/test_ops_cuda.py",
            "-k",
            SUBSET,
        ]
        found.append(Stage(tool, command, 120, sanitized=True))
    for tool in ("memcheck", "racecheck"):  # allocations of exact sizes, nothing of torch's around them
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", f"{out}/conformance"]
        found.append(Stage(f"{tool}-conformance", command, 120, sanitized=True))
    for name, limit in (("reconstruct", 60), ("linear", 240)):
        found.append(
            Stage(f"bench-{name}", [python, f"benchmarks/gpu_{name}.py", "--json", f"{out}/{name}.json"], limit)
        )
    return found


def build_planted_bug(out: Path) -> None:
    """Compile a kernel that writes one element past its buffer: unless this is found, the sanitizer never ran."""
    source = out / "planted.cu"
    source.write_text(
        "__global__ void planted(float* p, int n) { p[n] = 1.f; }\n"
        "int main() { float* p; cudaMalloc(&p, 1024); planted<<<1, 1>>>(p, 256);\n"
        "  return cudaDeviceSynchronize() != cudaSuccess; }\n"
    )
    subprocess.run(["nvcc", "-arch=sm_90", "-o", str(out / "planted"), str(source)], check=True)


def facts() -> dict[str, Any]:
    """Commit, device, driver and versions, each None where it cannot be had."""

    def ask(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() or None

    code = "import torch, json; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available()]))"
    torch_facts = json.loads(ask(sys.executable, "-c", code) or "[null, null, false]")
    nvcc = ask("nvcc", "--version")
    release = re.search(r"release ([\d.]+), V([\d.]+)", nvcc or "")
    return {
        "commit": ask("git", "rev-parse", "HEAD") or os.environ.get("TAPS_COMMIT"),
        "dirty": bool(ask("git", "status", "--porcelain", "--untracked-files=no")),
        "gpu": ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch_facts[0],
        "torch_cuda": torch_facts[1],
        "device": torch_facts[2],
        "nvcc": release.group(2) if release else None,
        "python": platform.python_version(),
    }


def run(stage: Stage, out: Path, have_device: bool) -> dict[str, Any]:
    """Run one stage; what it prints goes to `<out>/log.txt`, the end of it into the result."""
    if stage.device and not have_device and stage.name != "tests":
        return {"stage": stage.name, "status": "skipped", "why": "no CUDA device", "limit": stage.limit}
    log = out / "stage.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        if stage.name == "planted-bug":
            build_planted_bug(out)
        if stage.name == "conformance-build":
            (out / "conformance").unlink(missing_ok=True)  # a failed build must not leave the last one's
        with log.open("w", encoding="utf-8") as file:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TAPS_REQUIRE_CUDA": "1" if have_device else "0"}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            if stage.sanitized:  # one allocation for each tensor: a step beyond one is a step into nothing
                environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            # A group of its own, so that what the command has started ends with it.
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(stage.limit)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    except subprocess.TimeoutExpired:
        code = None
    except (OSError, subprocess.SubprocessError) as error:
        log.write_text(str(error), encoding="utf-8")
        code = -1
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    with (out / "log.txt").open("a", encoding="utf-8") as every:
        every.write(f"==== {stage.name}\n{text}\n")
    log.unlink(missing_ok=True)
    tail = text.splitlines()[-15:]
    wanted = 9 if stage.name == "planted-bug" else 0
    status = "timed out" if code is None else "passed" if code == wanted else "failed"
    seconds = round(time.monotonic() - start, 1)
    result = {"stage": stage.name, "status": status, "code": code, "seconds": seconds, "limit": stage.limit}
    if stage.name == "tests":
        result["counts"] = counts(out / "cuda-tests.xml")
        if status == "passed" and result["counts"].get("tests") == result["counts"].get("skipped"):
            result["status"] = "skipped"
    return {**result, "tail": tail}


def counts(path: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit file; empty if it was not written."""
    if not path.exists():
        return {}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--stage", nargs="*", default=[], help="run only these stages")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="run without a device")
    args = parser.parse_args()
    out = args.out.resolve()
    every = stages(out)
    names = [stage.name for stage in every]
    unknown = [name for name in args.stage if name not in names]
    if unknown:
        parser.error(f"--stage: expected some of {names}, got {unknown[0]!r}")
    if args.list:
        print("\n".join(f"{stage.name:18} {stage.limit:4} s" for stage in every))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"facts": facts(), "stages": []}
    earlier = json.loads((out / "gpu.json").read_text(encoding="utf-8")) if (out / "gpu.json").exists() else None
    if args.stage and earlier is not None and earlier["facts"] == report["facts"]:
        report = earlier
    else:
        (out / "log.txt").unlink(missing_ok=True)
    have_device = bool(report["facts"]["device"])
    if not have_device and not args.rehearse:
        print(
            "make gpu: no CUDA device here; `make gpu REHEARSE=1` runs what can be run without one",
            file=sys.stderr,
        )
        return 2
    for stage in every:
        if args.stage and stage.name not in args.stage:
            continue
        result = run(stage, out, have_device)
        report["stages"] = [r for r in report["stages"] if r["stage"] != stage.name] + [result]
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(
            f"{stage.name:18} {result['status']:9} {result.get('seconds', 0):6.1f} s of {stage.limit}",
            flush=True,
        )
        if result["status"] in ("failed", "timed out"):
            print("\n".join(f"    {line}" for line in result["tail"]), flush=True)
        if stage.name == "build" and result["status"] != "passed":
            break
    (out / "planted").unlink(missing_ok=True)
    (out / "planted.cu").unlink(missing_ok=True)
    bad = [r["stage"] for r in report["stages"] if r["status"] in ("failed", "timed out")]
    print(
        f"gpu.json: {len(report['stages']) - len(bad)} stages fine, {len(bad)} not{': ' if bad else ''}{', '.join(bad)}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
