"""The GPU job: build from source, test, sanitize, measure, and write one JSON file; `make gpu`.

    python tools/gpu.py --out results [--half A|B] [--prebuilt] [--stage NAME ...] [--seconds S] [--list] [--rehearse]

Every stage runs in a process of its own under its own time limit, and the JSON is rewritten after each, so that a
late failure loses nothing; stages that the job's own limit leaves no time for are noted as not reached, and
`--stage rest` runs what has not passed yet. Two halves fit a short lease, 240 seconds each: A is what would be missed
most (build, conformance, the operators' tests, a short benchmark), B the rest; nothing of A is lost without B.
`--prebuilt` takes the extension that is there, or the installed one, if it has kernels for the device, and compiles
nothing of it; without nvcc the stages that compile their own program are then noted as skipped.

Stages that are run alone take the place of their earlier results of the same commit, device and versions; results of
others are moved aside. A copy of the tree without its history is known by its sources, or by what TAPS_COMMIT says.
SIGTERM and a hang-up end the stage that runs; what ended before is kept. The output of all stages is in `log.txt`.
`--rehearse` runs the whole job without a device: the tests skip by name and the sanitizer and the measurements are
noted as skipped, which proves the stages, the limits and the file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
LEAST = 5  # seconds: less is not worth beginning a stage
# What has to be the same for results to stand in one file.
IDENTITY = ("commit", "gpu", "driver", "torch", "torch_cuda", "nvcc", "python", "capability")
SUBSET_FILES = tuple(f"tests/cuda/test_{name}_cuda.py" for name in ("ops", "reconstruct", "packed"))
MODELS = "tests/cuda/test_model_cuda.py"  # compiles, and takes as long as it likes
HALF_SECONDS = 240.0
SUBSET = (
    "test_empty or (test_linear and 7-33-17 and None and float32) or (test_linear and 7-34-18 and fused and bfloat16) "
    "or (test_reconstruct and 1- and float32-torch.float32) or test_bitmaps_that_lie"
)


@dataclass(frozen=True)
class Stage:
    """One step of the job: its command, its time limit in seconds, and what it needs."""

    name: str
    command: list[str]
    limit: int
    device: bool = True
    sanitized: bool = False
    half: str = "B"
    nvcc: bool = False  # runs a program that the job compiles


def stages(out: Path, capability: str | None = None, *, prebuilt: bool = False) -> list[Stage]:
    """In the order of what would be missed most. `capability`: of the device, such as "90"; without one Hopper's."""
    python, architecture = sys.executable, capability or "90"
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    nvcc = ["nvcc", "-std=c++17", "-O2", f"-arch=sm_{architecture}", "-Icsrc", "-o"]
    built_for = "90a-real" if architecture == "90" else f"{architecture}-real"
    checked = [sanitizer, "--error-exitcode", "9", "--report-api-errors", "no"]
    ours = [*checked, "--kernel-regex", "kns=taps"]  # beside torch's kernels; the planted bug is found through it too
    build = [python, "tools/build_inplace.py", "--cuda", "ON", "--architectures", built_for]
    there = [python, "tools/prebuilt.py", architecture]
    conformance = [*nvcc, f"{out}/conformance", "tests/cuda/conformance.cu"]
    linear, reconstruct, conv2d, step = (
        [python, f"benchmarks/gpu_{name}.py", "--json"] for name in ("linear", "reconstruct", "conv2d", "step")
    )
    found = [
        Stage("build", there if prebuilt else build, 300, device=False, half="A"),
        Stage("conformance-build", conformance, 120, False, half="A", nvcc=True),
        Stage("conformance", [f"{out}/conformance"], 60, half="A", nvcc=True),
        Stage("tests", [*pytest, *SUBSET_FILES, f"--junitxml={out}/tests.xml"], 120, half="A"),
        Stage("bench-linear-short", [*linear, f"{out}/linear-short.json", "--quick"], 60, half="A"),
        Stage("bench-reconstruct", [*reconstruct, f"{out}/reconstruct.json"], 60, half="A"),
        Stage("bench-step-short", [*step, f"{out}/step-short.json", "--quick"], 60, half="A"),
        Stage("bench-conv2d-short", [*conv2d, f"{out}/conv2d-short.json", "--quick"], 60, half="A"),
        Stage("planted-bug", [*ours, "--tool", "memcheck", str(out / "planted")], 60, nvcc=True),
    ]
    # Allocations of exact sizes and nothing of torch's around them. What torch's own kernels write initcheck does not
    # see through the filter, so that it is for this program alone.
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [*checked, "--tool", tool, f"{out}/conformance"]
        found.append(Stage(f"{tool}-conformance", command, 120, sanitized=True, nvcc=True))
    found.append(Stage("tests-models", [*pytest, MODELS, f"--junitxml={out}/tests-models.xml"], 240))
    found.append(Stage("bench-step", [*step, f"{out}/step.json"], 120))
    found.append(Stage("bench-conv2d", [*conv2d, f"{out}/conv2d.json"], 120))
    found.append(Stage("bench-linear", [*linear, f"{out}/linear.json"], 240))
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [*ours, "--tool", tool, *pytest, *SUBSET_FILES, "-k", SUBSET]
        found.append(Stage(tool, command, 120, sanitized=True))
    return found


def build_planted_bug(out: Path, capability: str | None = None) -> None:
    """Compile a kernel that writes one element past its buffer: unless this is found, the sanitizer never ran."""
    source = out / "planted.cu"
    source.write_text(
        "namespace taps { __global__ void planted(float* p, int n) { p[n] = 1.f; } }\n"
        "int main() { float* p; cudaMalloc(&p, 1024); taps::planted<<<1, 1>>>(p, 256);\n"
        "  return cudaDeviceSynchronize() != cudaSuccess; }\n"
    )
    subprocess.run(["nvcc", f"-arch=sm_{capability or '90'}", "-o", str(out / "planted"), str(source)], check=True)


def sources(root: Path = ROOT) -> str:
    """What stands for the commit where there is none: a digest of all that is compiled, tested and run."""
    digest = hashlib.sha256()
    kinds = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".toml", ".txt")
    for folder in ("csrc", "taps_ext", "tests", "benchmarks", "tools"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in kinds and "results" not in path.parts and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return f"sources {digest.hexdigest()[:16]}"


def facts() -> dict[str, Any]:
    """Commit, device, driver and versions, each None where it cannot be had."""

    def ask(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() or None

    code = (
        "import torch, json; there = torch.cuda.is_available(); "
        "capability = '%d%d' % torch.cuda.get_device_capability() if there else None; "
        "print(json.dumps([torch.__version__, torch.version.cuda, there, capability]))"
    )
    torch_facts = json.loads(ask(sys.executable, "-c", code) or "[null, null, false, null]")
    nvcc = ask("nvcc", "--version")
    release = re.search(r"release ([\d.]+), V([\d.]+)", nvcc or "")
    return {
        "commit": ask("git", "rev-parse", "HEAD") or os.environ.get("TAPS_COMMIT") or sources(),
        "dirty": bool(ask("git", "status", "--porcelain", "--untracked-files=no")),
        "gpu": ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch_facts[0],
        "torch_cuda": torch_facts[1],
        "device": torch_facts[2],
        "capability": torch_facts[3],
        "nvcc": release.group(2) if release else None,
        "python": platform.python_version(),
    }


def run(stage: Stage, out: Path, facts: dict[str, Any], left: float) -> dict[str, Any]:
    """Run one stage, for `left` seconds at most; what it prints goes to `<out>/log.txt`, the end into the result."""
    have_device = bool(facts["device"])
    limit = min(stage.limit, int(left))
    result: dict[str, Any] = {"stage": stage.name, "limit": stage.limit}
    if stage.device and not have_device and not stage.name.startswith("tests"):
        return {**result, "status": "skipped", "why": "no CUDA device"}
    if stage.nvcc and not facts.get("nvcc"):
        return {**result, "status": "skipped", "why": "no nvcc"}
    if left < LEAST:
        return {**result, "status": "not reached", "why": "the job's time was over"}
    log = out / "stage.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        if stage.name == "planted-bug":
            build_planted_bug(out, facts.get("capability"))
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
                code: int | None = process.wait(limit)
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
    result |= {"status": status, "code": code, "seconds": round(time.monotonic() - start, 1), "limit": limit}
    if stage.name.startswith("tests"):
        result["counts"] = counts(out / f"{stage.name}.xml")
        if status == "passed" and result["counts"].get("tests") == result["counts"].get("skipped"):
            result |= {"status": "skipped", "why": "every test skipped: no CUDA device, or no kernels for it"}
    return {**result, "tail": tail}


def counts(path: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit file; empty if it was not written."""
    if not path.exists():
        return {}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    return {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}


def write(report: dict[str, Any], out: Path) -> None:
    """Replace `gpu.json` at once: there is never half of one."""
    part = out / "gpu.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(part, out / "gpu.json")


def opened(out: Path, now: dict[str, Any], keep: bool) -> dict[str, Any]:
    """The report to go on with: with `keep` the earlier one, if it is of the same things; else a new one.

    An earlier report that is not gone on with moves aside, its log with it.
    """
    path = out / "gpu.json"
    earlier: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
    facts = earlier.get("facts", {})
    if keep and now.get("commit") and all(facts.get(key) == now.get(key) for key in IDENTITY):
        earlier["facts"] = {**now, "dirty": bool(facts.get("dirty") or now.get("dirty"))}
        return earlier
    for name in ("gpu.json", "log.txt"):
        if (out / name).exists():
            aside = out / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}-{name}"
            os.replace(out / name, aside)
            print(f"make gpu: {name} of another run is kept as {aside.name}")
    return {"facts": now, "stages": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument(
        "--stage", nargs="*", default=[], help='run only these stages; "rest": all that have not passed'
    )
    parser.add_argument("--half", choices=["A", "B"], help="run only the stages of this half")
    parser.add_argument("--prebuilt", action="store_true", help="compile nothing: the extension is there")
    parser.add_argument("--seconds", type=float, help="for all stages together (default: 540; of a half 240)")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="run without a device")
    args = parser.parse_args()
    begun = time.monotonic()
    out = args.out.resolve()
    now = facts()
    every = stages(out, now.get("capability"), prebuilt=args.prebuilt)
    seconds = args.seconds or (540.0 if args.half is None else HALF_SECONDS)
    names = [stage.name for stage in every]
    unknown = [name for name in args.stage if name not in [*names, "rest"]]
    if unknown:
        parser.error(f"--stage: expected rest or some of {names}, got {unknown[0]!r}")
    if args.list:
        print("\n".join(f"{stage.half}  {stage.name:22} {stage.limit:4} s" for stage in every))
        return 0
    if now.get("torch") is None:
        print(
            f"make gpu: {sys.executable} cannot import torch; `make gpu PYTHON=.venv/bin/python` takes another Python",
            file=sys.stderr,
        )
        return 2
    if not now["device"] and not args.rehearse:
        print("make gpu: no CUDA device here; `make gpu REHEARSE=1` runs what needs none", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):  # leaves through `run`, which ends its stage
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    out.mkdir(parents=True, exist_ok=True)
    report = opened(out, now, keep=bool(args.stage) or args.half is not None)
    passed = [r["stage"] for r in report["stages"] if r["status"] == "passed"]
    wanted = [name for name in names if name not in passed] if "rest" in args.stage else args.stage or names
    for stage in every:
        if stage.name not in wanted or args.half not in (None, stage.half):
            continue
        result = run(stage, out, now, seconds - (time.monotonic() - begun))
        report["stages"] = [r for r in report["stages"] if r["stage"] != stage.name] + [result]
        write(report, out)
        print(
            f"{stage.name:22} {result['status']:11} {result.get('seconds', 0):6.1f} s of {result['limit']}", flush=True
        )
        if result["status"] in ("failed", "timed out"):
            print("\n".join(f"    {line}" for line in result["tail"]), flush=True)
        if stage.name == "build" and result["status"] != "passed":
            break
    (out / "planted").unlink(missing_ok=True)
    (out / "planted.cu").unlink(missing_ok=True)
    by = {kind: [r["stage"] for r in report["stages"] if r["status"] == kind] for kind in ("passed", "skipped")}
    bad = [r["stage"] for r in report["stages"] if r["status"] not in by]
    print(
        f"{out.name}/gpu.json: {len(by['passed'])} stages passed, {len(by['skipped'])} skipped, {len(bad)} not fine"
        + (f": {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
