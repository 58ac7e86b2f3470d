"""What is measured: gated layers in the situations that matter, each beside its alternatives.

Every case has a variant "taps" and a variant "stock": the stock op on a merged weight, which is what a task costs that
has the model to itself. The others are what one would write without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError

Variant = Callable[[int], Any]
COLD = 2**27  # bytes of weights and Deltas that take turns, so that those of large layers come from memory
MOST_WEIGHTS = 512  # that take turns


def describe(group: str, layer: str, rows: int, dtype: torch.dtype) -> str:
    """The name of a case and of what came of it."""
    return f"{group}: {layer}, {rows}, {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Case:
    """One layer in one situation: `make()` gives its variants, `moved` and `operations` are the least that it takes.

    Without `gradients` the variants run under `no_grad`.
    """

    group: str
    layer: str
    rows: int
    dtype: torch.dtype
    make: Callable[[], dict[str, Variant]]
    moved: int = 0
    operations: int = 0
    gradients: bool = False

    @property
    def name(self) -> str:
        return describe(self.group, self.layer, self.rows, self.dtype)


def suite(groups: Sequence[str] | None = None, *, full: bool = False, device: torch.device | str = "cpu") -> list[Case]:
    """The cases of some groups (all); `full` has more shapes, types and layouts.

    Raises:
        ConfigError: an unknown group.
    """
    chosen = list(GROUPS) if groups is None else list(groups)
    for group in chosen:
        if group not in GROUPS:
            raise ConfigError(f"groups: expected some of {', '.join(GROUPS)}, got {group!r}")
    return [case for group in chosen for case in GROUPS[group](full, torch.device(device))]


def _layer(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, format: torch.memory_format
) -> tuple[Any, ...]:
    """Weights that take turns, Deltas in fp32 and in the weights' type, merged weights, and a buffer for one."""
    nbytes = torch.Size(shape).numel() * (dtype.itemsize + 4)
    count = max(2, min(MOST_WEIGHTS, COLD // max(1, nbytes)))

    def draw(kind: torch.dtype) -> list[Tensor]:
        return [t.to(kind).contiguous(memory_format=format) for t in torch.randn(count, *shape, device=device).unbind()]

    weights, deltas = draw(dtype), draw(torch.float32)
    merged = [(w.float() + d).to(dtype) for w, d in zip(weights, deltas, strict=True)]
    return weights, deltas, [d.to(dtype) for d in deltas], merged, torch.empty_like(weights[0])


def _forward(
    gated: Callable[..., Tensor], stock: Callable[..., Tensor], x: Tensor, layer: tuple[Any, ...]
) -> dict[str, Variant]:
    """An open layer's forward, without gradients, and what could stand in its place."""
    weights, deltas, narrow, merged, buffer = layer
    n = len(weights)
    return {
        "stock": lambda i: stock(x, merged[i % n]),
        "taps": lambda i: gated(x, weights[i % n], deltas[i % n], gate=True),
        "add + op": lambda i: stock(x, torch.add(weights[i % n], narrow[i % n], out=buffer)),
        "two products": lambda i: stock(x, weights[i % n]).add_(stock(x, narrow[i % n])),
    }


def _linears(full: bool, device: torch.device) -> Iterator[Case]:
    shapes = [(4096, 4096), (3072, 768), (1024, 1024), *([(1000, 1003)] if full else [])]
    for outputs, inputs in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 4, 7, 8, 16, 32, 37, 64, 256, 1576) if full else (1, 8, 32, 256):
                if device.type == "cpu" and rows * outputs * inputs > 2**32 and dtype == torch.bfloat16:
                    continue  # seconds each where bf16 is emulated
                for narrow in (False, True) if dtype != torch.float32 else (False,):
                    delta = dtype if narrow else torch.float32
                    yield Case(
                        "linear",
                        f"{outputs} x {inputs}{', Delta too' if narrow else ''}",
                        rows,
                        dtype,
                        linear_maker(rows, outputs, inputs, dtype, delta, device),
                        outputs * inputs * (dtype.itemsize + delta.itemsize)
                        + rows * (outputs + inputs) * dtype.itemsize,
                        2 * rows * outputs * inputs,
                    )


def linear_maker(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, delta: torch.dtype, device: torch.device
) -> Callable[[], dict[str, Variant]]:
    """An open linear layer's forward, Delta in a type of its own, and what could stand in its place."""

    def make() -> dict[str, Variant]:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        layer = _layer((outputs, inputs), dtype, device, torch.contiguous_format)
        weights, _, narrow, *rest = layer
        if delta == dtype:
            layer = (weights, narrow, narrow, *rest)
        n = len(weights)

        def accumulated(i: int) -> Tensor:
            y = F.linear(x, weights[i % n])
            return torch.addmm(y, x, narrow[i % n].t(), out=y)

        return {**_forward(ops.gated_linear, F.linear, x, layer), "two products": accumulated}

    return make


# Output channels, input channels, kernel, side, stride.
RESNET50 = (
    (64, 3, 7, 224, 2),
    (64, 64, 1, 56, 1),
    (64, 64, 3, 56, 1),
    (256, 64, 1, 56, 1),
    (64, 256, 1, 56, 1),
    (128, 128, 3, 28, 1),
    (512, 128, 1, 28, 1),
    (128, 512, 1, 28, 1),
    (256, 256, 3, 14, 1),
    (1024, 256, 1, 14, 1),
    (256, 1024, 1, 14, 1),
    (512, 512, 3, 14, 2),
    (2048, 1024, 1, 14, 2),
    (512, 512, 3, 7, 1),
    (2048, 512, 1, 7, 1),
    (512, 2048, 1, 7, 1),
)


def _convolutions(full: bool, device: torch.device) -> Iterator[Case]:
    for channels_last in (False, True) if full else (False,):
        for batch in (1, 8):
            for case in RESNET50 if full else RESNET50[2:15:3] + RESNET50[-1:]:
                outputs, inputs, kernel, side, stride = case
                out = -(-side // stride)
                layout = ", channels_last" if channels_last else ""
                yield Case(
                    "conv2d",
                    f"{inputs} -> {outputs}, {kernel}x{kernel} on {side}x{side}{f' / {stride}' * (stride > 1)}{layout}",
                    batch,
                    torch.float32,
                    conv2d_maker(batch, *case, channels_last, torch.float32, device),
                    4 * (2 * outputs * inputs * kernel**2 + batch * (inputs * side**2 + outputs * out**2)),
                    2 * batch * out**2 * outputs * inputs * kernel**2,
                )


def conv2d_maker(
    batch: int,
    outputs: int,
    inputs: int,
    kernel: int,
    side: int,
    stride: int,
    channels_last: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], dict[str, Variant]]:
    """An open convolution's forward, Delta in fp32, and what could stand in its place."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    strides, padding = (stride, stride), (kernel // 2, kernel // 2)

    def gated(x: Tensor, weight: Tensor, delta: Tensor, gate: bool) -> Tensor:
        return ops.gated_conv2d(x, weight, delta, None, None, strides, padding, gate=gate)

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, strides, padding)

    def make() -> dict[str, Variant]:
        x = torch.randn(batch, inputs, side, side, device=device).to(dtype).contiguous(memory_format=format)
        return _forward(gated, stock, x, _layer((outputs, inputs, kernel, kernel), dtype, device, format))

    return make


def _closed(full: bool, device: torch.device) -> Iterator[Case]:
    score = torch.tensor(0.05, device=device)
    for outputs, inputs, rows in ((4096, 4096, 1), (3072, 768, 256), *([(4096, 4096, 64)] if full else [])):

        def make(outputs: int = outputs, inputs: int = inputs, rows: int = rows) -> dict[str, Variant]:
            x = torch.randn(rows, inputs, device=device)
            weights, deltas, *_ = _layer((outputs, inputs), torch.float32, device, torch.contiguous_format)
            n = len(weights)
            return {
                "stock": lambda i: F.linear(x, weights[i % n]),
                "taps": lambda i: ops.gated_linear(x, weights[i % n], deltas[i % n], score, gate=False),
            }

        moved = 4 * (outputs * inputs + rows * (inputs + outputs))
        yield Case("closed", f"{outputs} x {inputs}", rows, torch.float32, make, moved, 2 * rows * outputs * inputs)


def _gradients(full: bool, device: torch.device) -> Iterator[Case]:
    for rows in (256, 1576):
        for gate in (True, False):
            for outputs, inputs in ((3072, 768), *([(1024, 1024)] if full else [])):

                def make(
                    rows: int = rows, gate: bool = gate, outputs: int = outputs, inputs: int = inputs
                ) -> dict[str, Variant]:
                    x, dy = torch.randn(rows, inputs, device=device), torch.randn(rows, outputs, device=device)
                    weights, deltas, *_ = _layer((outputs, inputs), torch.float32, device, torch.contiguous_format)
                    n, score = len(weights), torch.tensor(0.15, device=device)
                    backward = torch.ops.taps_ext.gated_linear_backward.default
                    mask = [False, gate, True, False, False]

                    def alternative(i: int) -> Any:
                        gradient = dy.t() @ x
                        return gradient, torch.dot(gradient.view(-1), deltas[i % n].view(-1))

                    def taps(i: int) -> Any:
                        weight, delta = weights[i % n], deltas[i % n]
                        return backward(dy, x, weight, delta, score, gate, 0.1, mask, None, 1.0)

                    return {"stock": lambda i: dy.t() @ x, "taps": taps, "product and dot": alternative}

                yield Case(
                    "gradient",
                    f"{outputs} x {inputs}, {'open' if gate else 'closed'}",
                    rows,
                    torch.float32,
                    make,
                    4 * (outputs * inputs * (1 + gate) + rows * (outputs + inputs)),
                    2 * rows * outputs * inputs,
                )


def _calls(full: bool, device: torch.device) -> Iterator[Case]:
    def forward(gate: bool) -> dict[str, Variant]:
        x, weight, delta = (torch.randn(*shape, device=device) for shape in ((1, 64), (64, 64), (64, 64)))
        score, merged, buffer = torch.tensor(0.15, device=device), weight + delta, torch.empty_like(weight)
        found: dict[str, Variant] = {
            "stock": lambda i: F.linear(x, merged),
            "taps": lambda i: ops.gated_linear(x, weight, delta, score, gate=gate),
        }
        if gate:
            found["add + op"] = lambda i: F.linear(x, torch.add(weight, delta, out=buffer))
        return found

    def both(gate: bool) -> dict[str, Variant]:
        x, delta, merged, dy = (torch.randn(*s, device=device) for s in ((1, 64), (64, 64), (64, 64), (1, 64)))
        weight, score = torch.randn(64, 64, device=device), torch.tensor(0.15, device=device)
        for leaf in (x, delta, merged, score):
            leaf.requires_grad_()

        def stepped(output: Callable[[], Tensor]) -> Variant:
            def step(i: int) -> None:
                for leaf in (x, delta, merged, score):
                    leaf.grad = None
                output().backward(dy)

            return step

        def written_out() -> Tensor:
            opened = (score >= 0.1).float() + score - score.detach()  # straight-through
            return F.linear(x, weight + opened * delta)

        return {
            "stock": stepped(lambda: F.linear(x, merged)),
            "taps": stepped(lambda: ops.gated_linear(x, weight, delta, score, gate=gate)),
            "by autograd": stepped(written_out),
        }

    for gate in (False, True):
        state = "open" if gate else "closed"
        yield Case("call", f"64 x 64, {state}, forward", 1, torch.float32, lambda g=gate: forward(g))  # type: ignore[misc]
        maker: Any = lambda g=gate: both(g)  # noqa: E731
        yield Case("call", f"64 x 64, {state}, both ways", 1, torch.float32, maker, gradients=True)


class _Naive(nn.Module):
    """W + g * Delta by autograd, on every call."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros_like(conv.weight))
        self.score = nn.Parameter(torch.tensor(0.15, device=conv.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        gate = (self.score >= 0.1).float() + self.score - self.score.detach()
        conv = self.conv
        return F.conv2d(x, conv.weight + gate * self.delta, conv.bias, conv.stride, conv.padding)


def _steps(full: bool, device: torch.device) -> Iterator[Case]:
    batch = 32
    for label, closed, fraction in (
        ("all open", False, 1.0),
        ("all closed", True, 1.0),
        ("all closed, 1/8", True, 0.125),
    ):
        yield Case(
            "step",
            f"ResNet-14, 16-64 channels, 32x32, {label}",
            batch,
            torch.float32,
            _step_maker(batch, closed, fraction, device),
            gradients=True,
        )


def _step_maker(batch: int, closed: bool, fraction: float, device: torch.device) -> Callable[[], dict[str, Variant]]:
    from .. import TapsConfig, TaskModel
    from ..zoo import SmallResNet

    def base() -> SmallResNet:
        return SmallResNet(10, 3, blocks=2).to(device)

    def make() -> dict[str, Variant]:
        x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)

        def stepped(model: nn.Module, parameters: Any, penalty: Callable[[], Any] = lambda: 0.0) -> Variant:
            optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
            model.train()

            def step(i: int) -> None:
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + penalty()).backward()
                optimizer.step()

            return step

        stock, naive, written_out = base(), base(), []
        for name, module in list(naive.named_modules()):
            if isinstance(module, nn.Conv2d):
                parent, _, leaf = name.rpartition(".")
                written_out.append(_Naive(module))
                setattr(naive.get_submodule(parent), leaf, written_out[-1])
        model = TaskModel(base(), TapsConfig(lam=0.5, gate_fraction=fraction))
        model.add_task("task", num_classes=10)
        if closed:
            with torch.no_grad():
                for _, _, gate in model.state("task").learned():
                    if gate.score is not None:
                        gate.score.fill_(0.05)
        model.set_task("task")
        return {
            "stock": stepped(stock, stock.parameters()),
            "taps": stepped(model, model.parameter_groups("task", lr=0.0), model.sparsity_loss),
            "by autograd": stepped(
                naive,
                [p for p in naive.parameters() if p.requires_grad],
                lambda: 0.5 * torch.stack([layer.score for layer in written_out]).abs().mean(),
            ),
        }

    return make


GROUPS: dict[str, Callable[[bool, torch.device], Iterator[Case]]] = {
    "linear": _linears,
    "conv2d": _convolutions,
    "closed": _closed,
    "gradient": _gradients,
    "call": _calls,
    "step": _steps,
}
