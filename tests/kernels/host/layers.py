"""The operators on the device's kernels, which the twin runs: every gate, type and layout against float64.

    python tests/kernels/host/layers.py PATH_OF_C

Run by test_layers_on_twin.py with a build of its own (TAPS_TWIN); prints the number of cases.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

spec = importlib.util.spec_from_file_location("taps_ext._C", sys.argv[1])
assert spec is not None and spec.loader is not None
_C = sys.modules["taps_ext._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

from mixed_layers import mixed  # noqa: E402
from tolerance import assert_close  # noqa: E402

from taps_ext import TapsConfig, TaskModel, gated_conv2d, gated_linear, ops, reference  # noqa: E402
from taps_ext.ops.codec import CODECS  # noqa: E402
from taps_ext.ops.unpack import packed_weight, unpacked  # noqa: E402

OPS = torch.ops.taps_ext
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GATES = (True, False, None)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def layer(shape: tuple[int, ...], k: int, n: int, dtype: torch.dtype, delta: torch.dtype, gate: bool | None) -> None:
    """Forward and backward through autograd; a gate that the host does not know is read by the kernels."""
    rows = math.prod(shape)
    for value in (0.05, 0.15):
        score = torch.tensor(value, dtype=torch.float64 if dtype == torch.float64 else F32)
        host = [draw(*shape, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, k, dtype=delta), score]
        host.append(draw(n, dtype=dtype))
        got = [t.clone().requires_grad_(i != 1) for i, t in enumerate(host)]
        want = [t.double().requires_grad_(i != 1) for i, t in enumerate(host)]
        is_open = value >= 0.1 if gate is None else gate
        output = gated_linear(*got, gate=gate)
        expected = reference.gated_linear(*want, gate=is_open)
        wt = host[1].double() + (host[2].double() if is_open else 0)
        assert_close(output, expected, dtype, k + 1, host[0], wt)
        grad = draw(*shape, n, dtype=dtype)
        output.backward(grad)
        expected.backward(grad.double())
        bounds = {0: (n, (grad, wt), 1), 2: (rows, (grad, host[0]), 1), 4: (rows, (grad,), 1)}
        bounds[3] = rows, (grad, host[0], host[2]), n * k
        for i, (terms, factors, outer) in bounds.items():
            if want[i].grad is None:
                assert got[i].grad is None or not got[i].grad.any()
            else:
                assert got[i].grad.dtype == got[i].dtype
                assert_close(got[i].grad, want[i].grad, dtype, terms, *factors, outer=outer)


def layouts(offset: int, padding: int, kind: torch.dtype) -> None:
    """The raw operators: rows at 4 and at 16 bytes, a strided bias, leading dimensions, samples picked and scaled."""
    x = draw(6, 5, 96 + padding, dtype=BF16)[..., :96]
    w = draw(40, 96 + offset + padding, dtype=kind)[:, offset : offset + 96]
    d = draw(40, 96 + offset + padding, dtype=F32)[:, offset : offset + 96]
    bias, score = draw(80, dtype=BF16)[::2], torch.tensor(0.2)
    y = OPS.gated_linear(x, w, d, score, bias, None, 0.1)
    wt = w.double() + d.double()
    assert_close(y, x.double() @ wt.t() + bias.double(), BF16, 97, x, wt)
    grad, picked = draw(6, 5, 40, dtype=BF16), torch.tensor([4, 1, 2])
    mask = [True, True, True, True, False]
    rows = (5 * picked[:, None] + torch.arange(5)).flatten()
    found = OPS.gated_linear_backward(grad, x.flatten(0, 1)[rows], w, d, score, None, 0.1, mask, rows, 2.0)
    g = grad[picked].double().flatten(0, 1).t() @ x[picked].double().flatten(0, 1)
    assert_close(found[0], grad.double() @ wt, BF16, 40, grad, wt)
    assert_close(found[1], 2 * g, F32, 15, 2 * grad, x)
    assert_close(found[2], 2 * (g * d.double()).sum(), F32, 15, 2 * grad, x, d, outer=40 * 96)
    assert_close(found[3], grad.double().sum((0, 1)), BF16, 30, grad)


def convolution(
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
    image: tuple[int, ...],
    kernel: tuple[int, ...],
    gate: bool | None,
    *,
    step: int = 1,
    padding: int = 0,
    dilation: int = 1,
    laid: str = "last",
    formats: tuple[torch.memory_format, torch.memory_format] = (torch.channels_last,) * 2,
    path: str | None = "fused",
) -> None:
    """A forward on that path, or any, by the operator and straight from Python, against float64.

    `laid`: x with channels last, with those of another image between its pixels, or as torch has it by itself;
    `formats`: of W and Delta.
    """
    dtype, of_weight, of_delta = kinds
    x = draw(*image, dtype=dtype)
    if laid == "apart":  # views of images with more channels
        b, c, h, w_ = image
        x = draw(b, c + 16, h, w_, dtype=dtype).contiguous(memory_format=torch.channels_last)[:, 8 : c + 8]
    elif laid == "last" and len(image) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    w, d = (draw(*kernel, dtype=kind) for kind in (of_weight, of_delta))
    w, d = (t.contiguous(memory_format=form) for t, form in zip((w, d), formats, strict=True))
    bias = draw(2 * kernel[0], dtype=dtype)[::2]
    geometry = [step] * 2, [padding] * 2, [dilation] * 2, 1
    for value in (0.05, 0.15) if gate is None else (0.15,):
        score = torch.tensor(value, dtype=F32)
        is_open = value >= 0.1 if gate is None else gate
        wt = w.double() + (d.double() if is_open else 0)
        want = torch.nn.functional.conv2d(x.double(), wt, bias.double(), *geometry)
        y = OPS.gated_conv2d(x, w, d, score, bias, *geometry, gate, 0.1)
        taken = _C.taken_path()
        assert path in (None, taken), (kinds, image, kernel, gate, taken)
        assert_close(y, want, dtype, w[0].numel() + 1, x, wt)
        assert y.stride() == torch.nn.functional.conv2d(x, w.to(dtype), bias, *geometry).stride()
        with torch.autocast("cpu", dtype, enabled=dtype != of_weight):
            again = gated_conv2d(x, w, d, score, bias, *geometry, gate=gate)
        assert torch.equal(again, y) and again.stride() == y.stride()


def no_convolution(*args: Any, **kwargs: Any) -> None:
    try:
        convolution(*args, **kwargs)
    except RuntimeError as error:
        assert "fused is forced, but this layer cannot be" in str(error), error
    else:
        raise AssertionError(f"expected a refusal: {args}, {kwargs}")


def convolutions() -> int:
    """Fused forwards: types and gates; kernels, strides, paddings and layouts; what does not fit, and many pixels."""
    kinds = [(BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F32), (F16, F16, F16), (BF16, F32, F32), (F16, F32, F32)]
    cases = 0
    _C.force_path("fused")
    for types, gate in itertools.product(kinds, (True, None)):
        convolution(types, (2, 24, 5, 4), (18, 24, 3, 3), gate, padding=1)
        convolution(types, (2, 30, 3, 4), (9, 30, 1, 1), gate)  # a linear layer: no pieces of 16 bytes
        cases += 2
    geometries = [{"step": 2, "padding": 2}, {"padding": 3, "dilation": 2}, {"step": 3}]
    for kernel, geometry, laid in itertools.product([(3, 3), (1, 1), (2, 5)], geometries, ("last", "apart")):
        convolution(kinds[1], (2, 40, 7, 9), (12, 40, *kernel), None, laid=laid, **geometry)
        cases += 1
    convolution(kinds[0], (2, 16, 4, 4), (8, 16, 1, 1), True, laid="apart")  # pixels apart, a linear layer
    convolution(kinds[0], (5, 16, 1, 1), (8, 16, 1, 1), True, laid="itself")
    convolution(kinds[0], (1, 512, 3, 3), (20, 512, 3, 3), True, padding=1)  # deep: split
    convolution(kinds[0], (16, 1, 1), (8, 16, 1, 1), True, laid="itself")  # one image, without a batch
    cases += 4
    unfit: list[tuple] = [
        (kinds[0], (1, 16, 8, 8), (8, 16, 3, 3), False),  # a closed gate is torch's
        (kinds[0], (1, 12, 4, 4), (8, 12, 3, 3), True),  # no whole pieces
        (kinds[0], (1, 7, 4, 4), (8, 7, 1, 1), True),  # pixels at odd elements
        ((BF16, BF16, F16), (1, 16, 4, 4), (8, 16, 3, 3), True),
        ((F32, F32, F32), (1, 16, 4, 4), (8, 16, 3, 3), True),
        (kinds[0], (1, 16, 9, 9), (8, 16, 9, 9), True),  # more places than kMostPlaces
    ]
    for one in unfit:
        no_convolution(*one)
    last, rows = torch.channels_last, torch.contiguous_format
    no_convolution(kinds[0], (1, 16, 4, 4), (8, 16, 3, 3), True, laid="itself")
    no_convolution(kinds[0], (1, 16, 4, 4), (8, 16, 3, 3), True, formats=(rows, rows))
    no_convolution(kinds[0], (1, 16, 4, 4), (8, 16, 3, 3), True, formats=(last, rows))
    # Left to itself, it finds its way by the CPU's rules.
    _C.force_path(None)
    for side, one in itertools.product((8, 9), [*unfit, (kinds[0], (1, 16, 8, 8), (8, 16, 3, 3), True)]):
        types, (batch, channels, *_), kernel, gate = one
        convolution(types, (batch, channels, side, side + 1), kernel, gate, padding=1, path=None)
        cases += 1
    return cases + len(unfit) + 3


def depthwise(
    shape: tuple[int, ...],
    kernel: int,
    stride: Any,
    padding: Any,
    kinds: tuple[torch.dtype, ...],
    gate: bool | None,
    *,
    stock: bool = False,
) -> None:
    """A depthwise convolution, forward and backward through autograd. `kinds`: of x, W and Delta. `stock`: on rebuilt
    weights, whose dL/dx is torch's own to the bit: where no instruction multiplies bf16, torch's sums in it err by more
    than the bound, which is of sums in fp32."""
    dtype, of_weight, of_delta = kinds
    channels, last = shape[1], torch.channels_last
    for value in (0.05, 0.15):
        score = torch.tensor(value, dtype=torch.float64 if channels % 2 else F32)
        taps = (channels, 1, kernel, kernel)
        host = [draw(*shape, dtype=dtype), draw(*taps, dtype=of_weight), draw(*taps, dtype=of_delta), score]
        host.append(draw(channels, dtype=dtype))
        got = [t.clone().requires_grad_(i != 1) for i, t in enumerate(host)]
        got[0] = host[0].to(memory_format=last).requires_grad_()
        want = [t.double().requires_grad_(i != 1) for i, t in enumerate(host)]
        is_open = value >= 0.1 if gate is None else gate
        how: dict[str, Any] = {"stride": stride, "padding": padding, "groups": channels}
        output = gated_conv2d(*got, **how, gate=gate)
        expected = reference.gated_conv2d(*want, **how, gate=is_open)
        wt, places = host[1].double() + (host[2].double() if is_open else 0), kernel * kernel
        assert output.is_contiguous(memory_format=last) and output.dtype == dtype
        assert_close(output, expected, dtype, places + 1, host[0], wt)
        grad = draw(*expected.shape, dtype=dtype)
        output.backward(grad.to(memory_format=last))
        expected.backward(grad.double())
        assert got[0].grad is not None and got[0].grad.is_contiguous(memory_format=last)
        pixels = grad.numel() // channels
        bounds = {0: (places, (grad, wt), 1), 2: (pixels, (grad, host[0]), 1), 4: (pixels, (grad,), 1)}
        bounds[3] = pixels, (grad, host[0], host[2]), channels * places
        if stock:
            del bounds[0]
            x = got[0].detach().requires_grad_()
            rebuilt = (host[1].float() + host[2].float() if is_open else host[1]).to(dtype)
            torch.conv2d(x, rebuilt, None, **how).backward(grad.to(memory_format=last))
            assert torch.equal(got[0].grad, x.grad)
        for i, (terms, factors, outer) in bounds.items():
            if want[i].grad is None:
                assert got[i].grad is None or not got[i].grad.any()
            else:
                assert got[i].grad.dtype == got[i].dtype
                assert_close(got[i].grad, want[i].grad, dtype, terms, *factors, outer=outer)


def depthwise_operators(of_weight: torch.dtype) -> None:
    """The raw operators: weights with gaps between channels, a strided bias, no input, one result at a time."""
    x = draw(2, 16, 9, 8, dtype=BF16).to(memory_format=torch.channels_last)
    w = draw(16, 2, 3, 3, dtype=of_weight)[:, :1]
    d = draw(16, 3, 3, 3, dtype=F32)[:, 1:2]
    bias, score = draw(32, dtype=BF16)[::2], torch.tensor(0.2)
    geometry = ([2, 1], [1, 2], [1, 1], 16)
    wt = w.double() + d.double()
    y = OPS.gated_conv2d(x, w, d, score, bias, *geometry, None, 0.1)
    assert_close(y, torch.conv2d(x.double(), wt, bias.double(), *geometry), BF16, 10, x, wt)
    grad = draw(*y.shape, dtype=BF16).to(memory_format=torch.channels_last)
    exact = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), wt, None, *geometry[:3], False, [0, 0], 16, [True, True, False]
    )
    pixels = grad.numel() // 16
    backward = [grad, [9, 8], w, d, score]

    def found(
        mask: list[bool], gate: bool | None, image: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, ...]:
        operands = (backward[0], image, *backward[1:], gate, 0.1, *geometry)
        return OPS.gated_conv2d_backward(*operands, [*mask, False, False], None, scale)

    for (delta, of_score), gate in itertools.product(((True, False), (False, True), (True, True)), GATES):
        _, of_delta, its_score, *_ = found([False, delta, of_score], gate, x, 2.0)
        if delta:
            want = 2 * exact[1] if gate is not False else torch.zeros_like(exact[1])
            assert_close(of_delta, want, F32, pixels, 2 * grad, x)
        if of_score:
            assert_close(its_score, 2 * (exact[1] * d.double()).sum(), F32, pixels, 2 * grad, x, d, outer=d.numel())
    alone = found([True, False, False], None, None, 1.0)
    assert_close(alone[0], exact[0], BF16, 9, grad, wt)
    # Samples that were picked are in planes, and nothing to dL/dx.
    sampled = (grad, x[:1].contiguous(), *backward[1:], None, 0.1, *geometry)
    some = OPS.gated_conv2d_backward(*sampled, [True, False, False, False, False], torch.tensor([1]), 1.0)
    assert torch.equal(some[0], alone[0])
    # G for dW is torch's, whatever makes dL/dx.
    operands = (grad, x, *backward[1:], None, 0.1, *geometry)
    both = OPS.gated_conv2d_backward(*operands, [True, True, False, False, True], None, 1.0)
    assert torch.equal(both[0], alone[0])
    assert_close(both[4], exact[1], BF16, pixels, grad, x)
    first, second = (found([True, True, True], None, x, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(first[0], alone[0])


def depthwise_refused() -> int:
    """What is left to the rebuild: it says so where the kernels are forced."""
    last = torch.channels_last
    x, w = draw(1, 8, 9, 9, dtype=BF16).to(memory_format=last), draw(8, 1, 3, 3, dtype=BF16)
    two, far = draw(16, 1, 3, 3, dtype=BF16), draw(3, 3, 1, 8, dtype=BF16).permute(3, 2, 0, 1)
    seven, wide = draw(8, 1, 7, 7, dtype=BF16), draw(8, 1, 3, 3, dtype=torch.float64)
    plain = ([1, 1], [1, 1], [1, 1], 8)
    cases: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]] = [
        (x.contiguous(), w, w, plain),  # planes
        (x[:, :4], w[:4], w[:4], (*plain[:3], 4)),  # pixels with gaps
        (x, two, two, plain),  # two outputs a channel
        (x, far, w, plain),  # channels innermost, of W and of Delta
        (x, w, far, plain),
        (x, w, wide, plain),
        (x, w, w, ([1, 1], [2, 2], [2, 2], 8)),
        (x, w, w, ([3, 3], [1, 1], [1, 1], 8)),
        (x, seven, seven, ([2, 2], [3, 3], [1, 1], 8)),
    ]
    for image, weight, delta, geometry in cases:
        try:
            OPS.gated_conv2d(image, weight, delta, None, None, *geometry, True, 0.1)
        except RuntimeError as error:
            assert "fused is forced, but this layer cannot be" in str(error)
        else:
            raise AssertionError(f"expected a refusal of {geometry}")
    return len(cases)


def sums_in_memory(run: Any) -> tuple[Any, bool]:
    """What it gives, and whether it took memory: a second kernel that adds splits does, a cluster does not."""
    _C.workspace_clear()
    return run(), _C.workspace_bytes() > 0


def splits() -> int:
    """Products so deep that they are split, added as on devices without clusters and as on those with them."""
    score = torch.tensor(0.2)
    rows, wide, deep = draw(7, 8192, dtype=BF16), draw(32, 8192, dtype=F32), draw(32, 8192, dtype=F32)
    grad, tall, other = draw(20, 4096, dtype=F16), draw(4096, 64, dtype=F32), draw(4096, 64, dtype=F32)
    bias, none = draw(32, dtype=BF16), [False] * 4
    kinds = (BF16, F32, F32)
    expected = rows.double() @ (wide.double() + deep.double()).t() + bias.double()
    found = []
    for adding in ("kernel", "cluster"):
        _C.force_adding(adding)
        y, held = sums_in_memory(lambda: OPS.gated_linear(rows, wide, deep, score, bias, None, 0.1))
        assert held == (adding == "kernel")
        assert_close(y, expected, BF16, 8193, rows, wide.double() + deep.double())
        operands = (grad, None, tall, other, score, None, 0.1, [True, *none], None, 1.0)
        dx, held = sums_in_memory(lambda operands=operands: OPS.gated_linear_backward(*operands)[0])
        assert held == (adding == "kernel")
        wt = tall.double() + other.double()
        assert_close(dx, grad.double() @ wt, F16, 4096, grad, wt)
        # A convolution under one place is a linear layer; one under several keeps the second kernel.
        _, held = sums_in_memory(lambda: convolution(kinds, (1, 8192, 3, 3), (32, 8192, 1, 1), True))
        assert held == (adding == "kernel")
        _, held = sums_in_memory(lambda: convolution(kinds, (1, 1024, 3, 3), (32, 1024, 3, 3), True, padding=1))
        assert held
        found.append((y, dx))
    _C.force_adding(None)
    y, held = sums_in_memory(lambda: OPS.gated_linear(rows, wide, deep, score, bias, None, 0.1))
    assert not held and torch.equal(y, found[1][0])  # as on 9.0
    return 9


def rebuilt() -> int:
    """W_t and many of them, in every type, by the device's kernels: to the bit torch's sum, rounded once."""
    kinds = [F32, torch.float64, BF16, F16]
    lists: tuple[list, list, list, list, list] = ([], [], [], [], [])
    for out, weight, delta in itertools.product(kinds, repeat=3):
        for gate, value in ((True, 0.05), (False, 0.15), (None, 0.15), (None, 0.05)):
            w, d = draw(5, 7, dtype=weight), draw(5, 7, dtype=delta)
            if len(lists[0]) % 5 == 0:  # rows apart
                w = draw(5, 9, dtype=weight)[:, :7]
            score = torch.tensor(value)
            kind = torch.float64 if torch.float64 in (out, weight, delta) else F32
            is_open = value >= 0.1 if gate is None else gate
            want = (w.to(kind) + d.to(kind) if is_open else w.to(kind)).to(out)
            got = torch.full((5, 7), math.nan, dtype=out)
            OPS.reconstruct(got, w, d, score, gate, 0.1)
            assert torch.equal(got, want), (out, weight, delta, gate, value)
            for column, entry in zip(lists, (got, w, d, score, gate), strict=True):
                column.append(entry)
    outs, weights, deltas, scores, gates = lists
    wanted = [out.clone() for out in outs]
    for out in outs:
        out.fill_(math.nan)
    ops.foreach_reconstruct_(outs, weights, deltas, scores, gates=gates)
    assert all(torch.equal(out, want) for out, want in zip(outs, wanted, strict=True))
    return len(outs)


def settled() -> int:
    """Many W_t at once, and their gradients: to the bit, whatever the types, gates and layouts."""
    cases = 0
    for out, weight, delta in itertools.product([F32, BF16, F16, torch.float64], repeat=3):
        layers, gradients = [], []
        for shape, (gate, value), turned in itertools.product(
            [(5, 7), (130, 129), (4, 3, 3, 3)], ((True, 0.05), (False, 0.15), (None, 0.15), (None, 0.05)), (0, 1, 2)
        ):
            w, d = draw(*shape, dtype=weight), draw(*shape, dtype=delta)
            grad = draw(*shape, dtype=out)
            if turned == 1:
                grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
            elif turned == 2 and len(shape) == 4:  # as cuDNN lays out the gradient of an input with channels last
                grad = grad.contiguous(memory_format=torch.channels_last)
            score = torch.tensor(value, dtype=torch.float64 if torch.float64 in (out, weight, delta) else F32)
            layers.append(ops.Gated(w, d.requires_grad_(), score.requires_grad_(), gate, 0.1, out))
            gradients.append(grad)
        made = ops.foreach_effective_weight(layers)
        torch.autograd.backward(made, [g.clone() for g in gradients])
        for got, layer, grad in zip(made, layers, gradients, strict=True):
            w, d, score, gate = layer.weight, layer.delta.detach(), layer.score.detach(), layer.gate
            is_open = score.item() >= 0.1 if gate is None else gate
            kind = torch.float64 if torch.float64 in (out, weight, delta) else F32
            assert torch.equal(got, (w.to(kind) + d.to(kind) if is_open else w).to(out))
            if layer.delta.grad is not None:
                assert torch.equal(layer.delta.grad, grad.to(kind).to(delta) if is_open else torch.zeros_like(d))
            else:
                assert gate is False
            products = grad.double() * d.double()
            bound = products.abs().sum() * (2 * products.numel() + 2) * 2**-53
            bound += products.sum().abs() * 2**-24 * (score.dtype == F32)
            assert (layer.score.grad.double() - products.sum()).abs() <= bound
            cases += 1
    return cases


def trained() -> int:
    """A model's step: no launch but those for all layers together."""
    found: dict[str, int] = {}

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "taps_ext":
                found[func.overloadpacket.__name__] = found.get(func.overloadpacket.__name__, 0) + 1
            return func(*args, **(kwargs or {}))

    for layers in (2, 7):
        base = torch.nn.Sequential(
            *(m for _ in range(layers) for m in (torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU())),
            torch.nn.Flatten(),
            torch.nn.Linear(64, 8),
            torch.nn.Linear(8, 3),
        )
        model = TaskModel(base, TapsConfig(lam=0.5))
        model.add_task("t")
        model.set_task("t")
        with torch.no_grad():
            for index, (_, _, gate) in enumerate(model.state("t").gated()):
                gate.score.fill_(0.05 if index == 1 else 0.15)
        model.train()
        found.clear()
        with Operators():
            model(torch.randn(2, 4, 4, 4)).square().sum().backward()
        assert found == {"foreach_reconstruct": 1, "foreach_settle": 1}, found
    return 2


def packed() -> int:
    """W_t of packed Deltas, in every type, row-major and not: to the bit the codec's own Delta, added and rounded."""
    cases = 0
    kinds, shapes = [F32, torch.float64, BF16, F16], [(7, 9), (6, 4, 3, 3), (0, 4)]
    for kind, dtype, shape in itertools.product(CODECS, kinds, shapes):
        delta = draw(*shape, dtype=F32) * (torch.rand(shape) < 0.5)
        tensors = CODECS[kind].encode(delta.flatten(1))
        decoded = CODECS[kind].decode(tensors, shape[0], math.prod(shape[1:])).view(shape)
        assert torch.equal(unpacked(kind, tensors, shape).view(torch.int32), decoded.view(torch.int32))
        weight = draw(*shape, dtype=dtype)
        turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
        wide = torch.promote_types(dtype, F32)
        for laid, (gate, value) in itertools.product(
            (weight, turned), ((True, 0.05), (False, 0.15), (None, 0.15), (None, 0.05))
        ):
            is_open = value >= 0.1 if gate is None else gate
            want = (laid.to(wide) + decoded.to(wide)).to(dtype) if is_open else laid
            got = packed_weight(laid, kind, tensors, torch.tensor(value), gate=gate)
            assert torch.equal(got, want) and got.dtype == dtype, (kind, dtype, shape, gate, value)
            cases += 1
    return cases


def refused(x: torch.Tensor, w: torch.Tensor, d: torch.Tensor) -> None:
    try:
        OPS.gated_linear(x, w, d, None, None, True, 0.1)
    except RuntimeError as error:
        assert "fused is forced, but this layer cannot be" in str(error)
    else:
        raise AssertionError("expected a refusal")


IMAGES = [  # shape, kernel, stride, padding
    ((2, 24, 9, 11), 3, 1, 1),
    ((1, 13, 10, 7), 3, 2, 1),
    ((2, 8, 12, 9), 5, (1, 2), 2),
    ((1, 40, 8, 8), 5, (2, 1), (0, 4)),
    ((1, 16, 7, 9), 7, 1, 3),
    ((3, 1, 5, 6), 3, 1, 0),
]


def depthwise_layers() -> int:
    kinds = [(BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F16), (F16, F16, F32), (F32, F32, F32)]
    listed = list(itertools.product(IMAGES, kinds, GATES))
    for image, types, gate in listed:
        depthwise(*image, types, gate)
    for of_weight in (BF16, F32):
        depthwise_operators(of_weight)
    return len(listed) + 2 + depthwise_refused()


def main() -> None:
    torch.manual_seed(0)
    assert ops._C is _C
    cases = 0
    _C.force_path("fused")
    shapes = [((1,), 64, 64), ((7,), 34, 18), ((3, 40), 130, 66), ((2, 3, 5), 16, 8), ((3,), 2100, 12)]
    types = [(BF16, BF16), (BF16, F32), (F16, F32), (F16, F16)]
    for (shape, k, n), (dtype, delta), gate in itertools.product(shapes, types, GATES):
        layer(shape, k, n, dtype, delta, gate)
        cases += 1
    for (offset, padding), kind in itertools.product([(0, 0), (2, 2), (8, 8), (2, 8)], [BF16, F32]):
        layouts(offset, padding, kind)
        cases += 1
    half = draw(4, 8, dtype=BF16)
    refused(half, draw(6, 8, dtype=F32), draw(6, 8, dtype=BF16))  # W wider than Delta
    refused(draw(4, 7, dtype=BF16), draw(6, 7, dtype=BF16), draw(6, 7, dtype=BF16))  # rows at odd elements
    refused(half, draw(8, 6, dtype=BF16).t(), draw(6, 8, dtype=BF16))  # columns of W far apart
    refused(draw(4, 8, dtype=F32), draw(6, 8, dtype=F32), draw(6, 8, dtype=F32))
    cases += depthwise_layers() + splits()
    # Left to itself: few rows are fused, many are not, and neither are layers that do not fit.
    _C.force_path(None)
    for rows, k in ((128, 16), (129, 16), (0, 16), (5, 15)):
        layer((rows,), k, 8, BF16, F32, True)
        cases += 1
    cases += rebuilt() + packed() + settled() + trained() + convolutions()
    _C.force_path("rebuild")  # torch's products, and gradients selected, scaled and multiplied with Delta
    for (dtype, delta), gate in itertools.product([*types, (F32, F32), (torch.float64, torch.float64)], GATES):
        layer((3, 5), 40, 24, dtype, delta, gate)
        cases += 1
    for (dtype, delta), gate in itertools.product([(BF16, F32), (F32, F32)], GATES):
        depthwise(*IMAGES[0], (dtype, dtype, delta), gate, stock=True)
        cases += 1
    cases += mixed()
    print(f"{cases} cases")


if __name__ == "__main__":
    main()
