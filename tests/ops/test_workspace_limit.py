"""Work in panels under a limit on the workspace: same results within rounding, closed layers bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

import taps_ext
from taps_ext.ops import HAS_EXTENSION, gated_conv2d, gated_linear

if not HAS_EXTENSION:
    pytest.skip("the compiled extension owns the workspace", allow_module_level=True)

LIMIT = 4096


@pytest.fixture(autouse=True)
def no_limit_afterwards() -> Iterator[None]:
    yield
    taps_ext.set_workspace_limit(None)


# name: input shape, weight shape, keyword arguments of conv2d (None: linear)
SHAPES = {
    "linear": ([6, 40], [200, 40], None),
    "linear 3-d": ([2, 3, 40], [101, 40], None),
    "one panel of two": ([3, 2000], [5, 2000], None),
    "3x3": ([2, 16, 9, 9], [50, 16, 3, 3], {"padding": 1}),
    "1x1 strided": ([2, 64, 7, 7], [70, 64, 1, 1], {"stride": 2}),
    "output 1x1": ([2, 16, 3, 3], [50, 16, 3, 3], {}),
    "dilated, single": ([16, 9, 9], [50, 16, 3, 3], {"dilation": 2}),
    "groups": ([2, 32, 6, 6], [64, 8, 3, 3], {"padding": 1, "groups": 4}),
    "a group above the limit": ([2, 32, 6, 6], [80, 16, 3, 3], {"padding": 1, "groups": 2}),
    "depthwise": ([2, 600, 6, 6], [600, 1, 3, 3], {"padding": 1, "groups": 600}),
}


def leaves(shape: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[list[torch.Tensor], dict | None]:
    torch.manual_seed(0)
    x, w, kwargs = SHAPES[shape]
    tensors = [torch.randn(x), torch.randn(w), torch.randn(w), torch.tensor(0.5), torch.randn(w[0])]
    score_type = torch.float64 if weight_dtype == torch.float64 else torch.float32
    types = [dtype, weight_dtype, weight_dtype, score_type, weight_dtype]
    return [t.to(d).requires_grad_() for t, d in zip(tensors, types, strict=True)], kwargs


def run(inputs: list[torch.Tensor], kwargs: dict | None, gate: bool | None, upstream: torch.Tensor | None = None):
    """Output and all five gradients."""
    y = gated_linear(*inputs, gate=gate) if kwargs is None else gated_conv2d(*inputs, **kwargs, gate=gate)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y) if upstream is None else upstream, allow_unused=True)
    return [y.detach(), *grads]  # a closed Delta has none


def reference(inputs: list[torch.Tensor], kwargs: dict | None, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The same in float64 by plain torch, at an open gate."""
    x, w, d, s, b = (t.detach().double().requires_grad_() for t in inputs)
    weight = w + s / s.detach() * d  # d/ds at the gate's value 1 is <G, Delta> * 1/s
    y = F.linear(x, weight, b) if kwargs is None else F.conv2d(x, weight, b, **kwargs)
    dx, dw, dd, ds, db = torch.autograd.grad(y, [x, w, d, s, b], upstream.double())
    return [y.detach(), dx, dw, dd, ds * s.detach(), db]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_panels_give_the_reference(shape: str, gate: bool | None, dtype: torch.dtype) -> None:
    inputs, kwargs = leaves(shape, dtype, dtype)
    run(inputs, kwargs, gate)
    largest = inputs[1].nbytes
    assert taps_ext.workspace_bytes() >= largest > LIMIT  # or there would be nothing to cut
    taps_ext.set_workspace_limit(LIMIT)
    assert taps_ext.workspace_limit() == LIMIT
    got = run(inputs, kwargs, gate, upstream := torch.randn_like(run(inputs, kwargs, gate)[0]))
    least = 2 * inputs[1][0].nbytes  # two channels
    assert 0 < taps_ext.workspace_bytes() <= max(LIMIT, -(-least // 4096) * 4096)
    want = reference(inputs, kwargs, upstream)
    x, w, d = (t.detach() for t in inputs[:3])
    weight = w + d
    taps, channels = w[0].numel(), w.shape[0]
    rows = upstream.numel() // channels
    read = x.shape[-1] if kwargs is None else x.shape[-3]  # every input channel meets numel / read weights
    terms = [taps + 1, w.numel() // read + 16, rows, rows]
    factors = [(x, weight), (upstream, weight), (upstream, x), (upstream, x)]
    for result, expected, count, pair in zip(got[:4], want[:4], terms, factors, strict=True):
        assert_close(result, expected, dtype, count, *pair)
    assert_close(got[4], want[4], dtype, rows, upstream, x, d, outer=w.numel())
    assert_close(got[5], want[5], dtype, rows, upstream)


@pytest.mark.parametrize("shape", SHAPES)
def test_panels_under_autocast(shape: str) -> None:
    """bfloat16 products from float32 weights: every result within the rounding of one without a limit."""
    inputs, kwargs = leaves(shape, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = run(inputs, kwargs, True)
        taps_ext.set_workspace_limit(LIMIT)
        parts = run(inputs, kwargs, True)
    x, w, d = (t.detach() for t in inputs[:3])
    rows = whole[0].numel() // w.shape[0]
    one = torch.ones(1)
    # Both sides are rounded; dinput adds rounded panels in float32: together they err as much as one rounding more.
    pairs = [(w[0].numel(), (x, w + d), 2), (w.numel(), (one, w + d), 3), (rows, (one, x), 2), (rows, (one, x), 2)]
    for a, b, (terms, factors, outer) in zip(whole[:4], parts[:4], pairs, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b.double(), torch.bfloat16, terms, *factors, outer=outer)


@pytest.mark.parametrize("panels", [8, 128])
def test_the_sum_over_panels_is_not_rounded_at_every_panel(panels: int) -> None:
    """Terms of one sign, so that a running bfloat16 sum would lose them: 5 % at 128 panels."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 64, dtype=torch.bfloat16).requires_grad_(), torch.rand(4096, 64, dtype=torch.bfloat16)
    d, dy = torch.rand(4096, 64, dtype=torch.bfloat16), torch.rand(4, 4096, dtype=torch.bfloat16)
    taps_ext.set_workspace_limit(w.nbytes // panels)
    gated_linear(x, w, d, gate=True).backward(dy)
    want = dy.double() @ (w.double() + d.double())
    # W + Delta, each panel's sum and the whole are rounded once each: eps / 2 apiece at worst.
    worst = 3 * torch.finfo(torch.bfloat16).eps / 2
    assert float((x.grad.double() / want - 1).abs().max()) <= worst


def test_a_closed_half_precision_convolution_keeps_the_limit() -> None:
    """The gate gradient of a closed layer casts its float32 Delta, in panels as well."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 6, 6, dtype=torch.bfloat16).requires_grad_()
    w, d = torch.randn(64, 64, 3, 3, dtype=torch.bfloat16), torch.randn(64, 64, 3, 3)
    score = torch.tensor(0.0, requires_grad=True)
    grads = []
    for limit in (None, LIMIT):
        taps_ext.set_workspace_limit(limit)
        y = gated_conv2d(x, w, d, score, padding=1, gate=False)
        grads.append(torch.autograd.grad(y, [x, score], torch.ones_like(y)))
    assert taps_ext.workspace_bytes() <= LIMIT
    assert torch.equal(grads[0][0], grads[1][0])
    assert_close(grads[1][1], grads[0][1].double(), torch.bfloat16, 64 * 9, x, d, outer=2 * 2 * 64 * 36)


def test_closed_layers_under_autocast_are_the_base_bit_for_bit() -> None:
    inputs, _ = leaves("linear", torch.float32, torch.float32)
    x, w, _, _, b = inputs
    taps_ext.set_workspace_limit(LIMIT)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(inputs, None, False)
        stock = F.linear(x, w, b)
    assert torch.equal(got[0], stock)
    assert torch.equal(got[1], torch.autograd.grad(stock, [x], torch.ones_like(stock))[0])


def test_a_panel_too_small_to_tell_its_layout() -> None:
    x, w, d = torch.randn(2, 3, 1, 1), torch.randn(9, 1, 1, 1), torch.randn(9, 1, 1, 1)
    taps_ext.set_workspace_limit(1)

    def run_it(x: torch.Tensor) -> torch.Tensor:
        return gated_conv2d(x, w, d, padding=1, groups=3, gate=True)

    eager = run_it(x)
    assert eager.is_contiguous() and torch.equal(torch.compile(run_it)(x), eager)


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_layers_are_the_base_bit_for_bit_under_a_limit(shape: str) -> None:
    inputs, kwargs = leaves(shape, torch.float32, torch.float32)
    x, w, _, _, b = inputs
    taps_ext.set_workspace_limit(LIMIT)
    got = run(inputs, kwargs, False)
    stock = F.linear(x, w, b) if kwargs is None else F.conv2d(x, w, b, **kwargs)
    (dx,) = torch.autograd.grad(stock, [x], torch.ones_like(stock))
    assert torch.equal(got[0], stock)
    assert torch.equal(got[1], dx)
    assert got[3] is None
    assert taps_ext.workspace_bytes() <= max(LIMIT, 2 * w[0].nbytes + 4096)


@pytest.mark.parametrize("shape", ["3x3", "1x1 strided", "output 1x1", "groups", "depthwise"])
def test_panels_keep_channels_last(shape: str) -> None:
    inputs, kwargs = leaves(shape, torch.float32, torch.float32)
    inputs = [t.detach().to(memory_format=torch.channels_last).requires_grad_() if t.dim() == 4 else t for t in inputs]
    whole = run(inputs, kwargs, True)
    taps_ext.set_workspace_limit(LIMIT)
    parts = run(inputs, kwargs, True)
    for a, b in zip(whole, parts, strict=True):
        assert torch.empty_like(a).stride() == torch.empty_like(b).stride()


def test_sampled_rows_in_panels() -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(8, 16, 6, 6), torch.randn(50, 16, 3, 3), torch.randn(50, 16, 3, 3)
    dy, rows, s = torch.randn(8, 50, 4, 4), torch.tensor([5, 1, 6]), torch.tensor(0.5)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.ops.taps_ext.gated_conv2d_backward(
            dy, x[rows], [6, 6], w, d, s, True, 0.1, [1, 1], [0, 0], [1, 1], 1, [True] * 5, rows, 8 / 3
        )

    whole = backward()
    taps_ext.set_workspace_limit(LIMIT)
    parts = backward()
    terms = [50 * 9, 48, 48 * d.numel(), 128, 48]
    factors = [(dy, w + d), (dy, x), (dy, x, d), (dy,), (dy, x)]
    for a, b, count, pair in zip(whole, parts, terms, factors, strict=True):
        assert_close(a, b.double(), torch.float32, count, *pair, outer=2 * 3)


def test_opcheck_and_compile_under_a_limit() -> None:
    inputs, kwargs = leaves("3x3", torch.float32, torch.float32)
    taps_ext.set_workspace_limit(LIMIT)
    x, w, d, s, b = inputs
    torch.library.opcheck(
        torch.ops.taps_ext.gated_conv2d.default, (x, w, d, s, b, [1, 1], [1, 1], [1, 1], 1, True, 0.1)
    )
    eager = run(inputs, kwargs, True)
    compiled = torch.compile(lambda *t: gated_conv2d(*t, **kwargs, gate=True), fullgraph=True)(*inputs)
    assert torch.equal(compiled, eager[0])


def test_a_model_trains_under_a_limit() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3), torch.nn.ReLU(), torch.nn.Conv2d(40, 40, 3))
    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.5))
    model.add_task("t", head=None)
    taps_ext.set_workspace_limit(16384)
    model(torch.randn(2, 3, 8, 8), task="t").square().mean().backward()
    assert 0 < taps_ext.workspace_bytes() <= 16384
    assert all(part.delta.grad.abs().max() > 0 for _, part in model.state("t").gated())


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "1", 2**63])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(taps_ext.ConfigError, match="limit: expected a positive int, of bytes, or None"):
        taps_ext.set_workspace_limit(limit)  # type: ignore[arg-type]
