"""`taps selftest`: does this installation compute what it should?"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TapsError
from .common import emit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PURPOSE = "Compare the compiled kernels with the reference and try a save and load; a few seconds."
EXAMPLE = "taps selftest"

LINEAR = ((3, 5, 7), (17, 33, 257), (64, 128, 96))  # rows, outputs, inputs
CONV = ((2, 3, 9, 8, 3, 1, 1, 1), (1, 8, 7, 8, 1, 2, 0, 1), (3, 8, 11, 8, 3, 2, 1, 4))
"""batch, channels, side, outputs, kernel, stride, padding, groups"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


class Failed(TapsError):
    """A check found something wrong."""


def _require(good: bool, problem: str) -> None:
    if not good:
        raise Failed(problem)


def _close(got: Tensor | None, wanted: Tensor | None, depth: int, what: str) -> float:
    """The largest error relative to the largest value, at most 16 eps sqrt(depth) of the type."""
    import torch

    if got is None or wanted is None:
        _require(got is None and wanted is None, f"{what}: one of the two is missing")
        return 0.0
    bound = 16 * torch.finfo(got.dtype).eps * math.sqrt(depth)
    scale = max(float(wanted.abs().max()), 1e-6) if wanted.numel() else 1.0
    error = float((got.double() - wanted.double()).abs().max()) / scale if wanted.numel() else 0.0
    _require(error <= bound, f"{what}: relative error {error:.2g}, at most {bound:.2g} allowed")
    return error


def _both(kind: str, shape: tuple[int, ...], gate: bool, dtype: torch.dtype, device: str) -> float:
    """Forward and every gradient of one op, against the reference in float64."""
    import torch

    from .. import ops, reference

    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {}
    sizes: list[tuple[int, ...]]
    if kind == "linear":
        rows, outputs, inputs = shape
        sizes, depth = [(rows, inputs), (outputs, inputs)], max(inputs, rows)
    else:
        batch, channels, side, outputs, kernel, stride, padding, groups = shape
        sizes = [(batch, channels, side, side), (outputs, channels // groups, kernel, kernel)]
        depth = max(channels * kernel**2, batch * side**2)
        settings = {"stride": stride, "padding": padding, "groups": groups}
    x, weight = (torch.randn(size, generator=generator) for size in sizes)
    delta = torch.randn(sizes[1], generator=generator) / 4
    bias = torch.randn(outputs, generator=generator)
    score = torch.tensor(0.2 if gate else 0.0)
    results = []
    for module, kind_of, place in ((ops, dtype, device), (reference, torch.float64, "cpu")):
        leaves = [t.to(dtype).to(place, kind_of).detach() for t in (x, weight, delta, bias)]
        leaves = [t.clone().requires_grad_(i != 1) for i, t in enumerate(leaves)]
        own = score.to(place).requires_grad_()
        call = getattr(module, f"gated_{kind}")
        y = call(leaves[0], leaves[1], leaves[2], own, leaves[3], gate=gate, **settings)
        cotangent = torch.randn(y.shape, generator=generator.manual_seed(1)).to(dtype).to(place, y.dtype)
        y.backward(cotangent)
        results.append([y.detach(), *(t.grad for t in (leaves[0], leaves[2], leaves[3])), own.grad])
    names = ("output", "input gradient", "Delta gradient", "bias gradient", "score gradient")
    worst = 0.0
    for name, got, wanted in zip(names, *results, strict=True):
        got = None if got is None else got.cpu()
        # <G, Delta> sums over all weights, so its error grows with them and cancellation is part of it
        extra = delta.numel() * 16 if name == "score gradient" else 1
        worst = max(worst, _close(got, wanted, depth * extra, f"{kind} {list(shape)} {name}"))
    return worst


def check_op(kind: str, device: str) -> str:
    """Open and closed, float32 and float64, forward and backward."""
    import torch

    shapes = LINEAR if kind == "linear" else CONV
    worst = max(
        _both(kind, shape, gate, dtype, device)
        for shape in shapes
        for gate in (True, False)
        for dtype in (torch.float32, torch.float64)
    )
    return f"{4 * len(shapes)} cases, largest relative error {worst:.1e}"


def check_closed(device: str) -> str:
    """A closed gate gives the stock op's bits and never reads Delta."""
    import torch
    import torch.nn.functional as F

    from .. import gated_conv2d, gated_linear

    x, weight = torch.randn(9, 31, device=device), torch.randn(13, 31, device=device)
    nothing = torch.full_like(weight, float("nan"))
    same = torch.equal(gated_linear(x, weight, nothing, gate=False), F.linear(x, weight))
    _require(same, "linear differs from F.linear")
    x, weight = torch.randn(2, 4, 9, 9, device=device), torch.randn(6, 4, 3, 3, device=device)
    nothing = torch.full_like(weight, float("inf"))
    got = gated_conv2d(x, weight, nothing, gate=False, padding=1)
    same = torch.equal(got, F.conv2d(x, weight, padding=1))
    _require(same, "convolution differs from F.conv2d")
    return "bit-equal to F.linear and F.conv2d, with NaN and Inf in Delta"


def check_files() -> str:
    """Save, verify, load: same bits; a flipped byte is noticed; the base is untouched."""
    import torch

    from .. import TapsConfig, TaskModel, store
    from ..zoo import SmallResNet

    base = SmallResNet(widths=(8, 16), blocks=1).eval()
    model = TaskModel(base, TapsConfig(lam=1.0))
    before = model.fingerprint()
    model.add_task("a", num_classes=3)
    state = model.state("a")
    with torch.no_grad():
        for index, (_, part, gate) in enumerate(state.gated()):
            assert gate.score is not None
            for parameter in part.changes():
                parameter.normal_(std=0.05)
            gate.score.fill_(0.2 if index % 2 else 0.05)
    model.eval()
    x = torch.randn(4, 1, 16, 16)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.taps"
        wanted = model(x, task="a")
        model.save_task("a", path)
        _require(store.verify(path).ok, "a fresh file does not verify")
        name = model.load_task(path, name="b")
        _require(torch.equal(model(x, task=name), wanted), "the loaded task gives other outputs")
        _require(model.fingerprint() == before, "the base has changed")
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes(raw)
        _require(not store.verify(path).ok, "a flipped bit went unnoticed")
    return "save, verify and load give the same bits; a flipped bit is noticed"


def check_extension() -> str:
    """The compiled extension is there."""
    from .. import ops

    if ops._C is None:
        raise Failed("the compiled extension is MISSING; everything runs on the slower pure-torch reference")
    return f"loaded, CPU path {ops._C.isa()}, torch target {ops._C.build_info()['torch_target']}"


def checks() -> dict[str, Callable[[], str]]:
    """The checks by name, in order."""
    import torch

    from .. import ops

    found: dict[str, Callable[[], str]] = {"extension": check_extension}
    devices = ["cpu"]
    if ops._C is not None and torch.cuda.is_available() and ops._C.build_info()["cuda"]:
        devices.append("cuda")
    for device in devices:
        for kind in ("linear", "conv2d"):
            found[f"{kind} on {device}"] = lambda kind=kind, device=device: check_op(kind, device)  # type: ignore[misc]
        found[f"closed gate on {device}"] = lambda device=device: check_closed(device)  # type: ignore[misc]
    found["task files"] = check_files
    return found


def run(args: argparse.Namespace) -> int:
    import torch

    results = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, check in checks().items():
            try:
                result = {"check": name, "ok": True, "detail": check()}
            except Exception as error:  # a kernel that raises is a failed check like any other
                text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
                result = {"check": name, "ok": False, "detail": " ".join(text.split())}
            results.append(result)
            if not args.json:
                print(f"{'ok  ' if result['ok'] else 'FAIL'} {name}: {result['detail']}", flush=True)
    good = all(result["ok"] for result in results)
    if args.json:
        emit({"ok": good, "checks": results})
    return 0 if good else 1
