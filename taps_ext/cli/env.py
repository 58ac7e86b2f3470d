"""`taps env`: the facts that a bug report needs."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from ..version import __version__
from .common import emit

PURPOSE = "Show versions, the compiled extension, the instruction set and the devices."
EXAMPLE = "taps env --json"

OPTIONAL = ("numpy", "torchvision", "timm", "scikit-learn", "matplotlib", "pillow", "rich", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def facts() -> dict[str, Any]:
    """Everything `taps env` shows, JSON-ready."""
    import torch

    from .. import ops
    from ..extension import has_kernels

    extension: dict[str, Any] = {"loaded": ops.HAS_EXTENSION}
    if ops._C is not None:
        info = ops._C.build_info()
        extension.update(file=ops._C.__file__, isa=ops._C.isa(), isas=list(ops._C.isas()), build=info)
    built = (extension.get("build") or {}).get("cuda") or {}
    devices = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        kind = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
        kernels = has_kernels(built.get("architectures", ""), (p.major, p.minor))
        devices.append({"device": f"cuda:{index}", **kind, "kernels": kernels})
    return {
        "taps_ext": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": extension,
        "cpu": {
            "model": _processor(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {"available": torch.cuda.is_available(), "version": torch.version.cuda, "devices": devices},
        "packages": {name: _version(name) for name in OPTIONAL},
    }


def shareable_facts() -> dict[str, Any]:
    """:func:`facts` for a file that others read: without where things lie on this machine."""
    found = facts()
    found["extension"].pop("file", None)
    return found


def run(args: argparse.Namespace) -> int:
    env = facts()
    if args.json:
        emit(env)
        return 0
    extension, cuda = env["extension"], env["cuda"]
    print(f"taps_ext   {env['taps_ext']}")
    print(f"torch      {env['torch']}")
    print(f"python     {env['python']} on {env['platform']}")
    if extension["loaded"]:
        build = extension["build"]
        cuda_build = build["cuda"]
        kernels = "NO CUDA kernels"
        if cuda_build:
            kernels = f"CUDA {cuda_build['version']} for architectures {cuda_build['architectures']}"
        print(f"extension  {extension['file']}")
        print(f"           {build['compiler']}, target torch {build['torch_target']}, {kernels}")
        print(f"CPU path   {extension['isa']} (this machine runs {', '.join(extension['isas'])})")
    else:
        print("extension  MISSING: the slower pure-torch reference is used")
    print(f"CPU        {env['cpu']['threads']} threads, {env['cpu']['capability']}")
    state = "available" if cuda["available"] else "not available"
    print(f"CUDA       {state}, torch built for {cuda['version']}")
    for device in cuda["devices"]:
        size = f"{device['memory'] / 2**30:.0f} GiB, compute capability {device['capability']}"
        print(f"           {device['device']}: {device['name']}, {size}")
        if not device["kernels"]:
            wanted = device["capability"].replace(".", "") + "-real"
            print(f"           NO KERNELS for it: install with TAPS_CUDA=ON TAPS_CUDA_ARCHITECTURES={wanted}")
    packages = (f"{name} {version or 'absent'}" for name, version in env["packages"].items())
    print("packages   " + ", ".join(packages))
    return 0
