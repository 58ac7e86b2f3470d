"""The compiled gated layers below autograd: what backward is asked for, layouts, casts, samples, determinism."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_extension import (  # noqa: F401  (a fixture among them)
    _C,
    CLOSED,
    FLOATS,
    INF,
    NAN,
    OPEN,
    OPS,
    TAU,
    layouts,
    linear_case,
    merged,
    same,
    seeded,
)

# --- linear ---------------------------------------------------------------------------------------


def gradients(function, x, weight, bias, delta, grad):
    x, merged_weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    function(x, merged_weight, bias).backward(grad)
    g = merged_weight.grad
    return x.grad, g, (g * delta).sum(), bias.grad, g


MASKS = [[bool(i >> bit & 1) for bit in range(5)] for i in range(32)]


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 5), (2, 3, 1), (0,), (3, 0)])
@pytest.mark.parametrize("gate", [True, False])
def test_linear_backward_gives_what_is_asked(leading, gate):
    x, g, weight, delta, bias = linear_case(leading)
    score = torch.tensor([0.3], dtype=torch.float64)
    used = weight + delta if gate else weight
    want = list(gradients(F.linear, x, used, bias, delta, g))
    want[1] = want[1] if gate else torch.zeros_like(delta)
    want[2] = want[2].reshape(1)
    for mask in MASKS:
        got = OPS.gated_linear_backward(g, x, weight, delta, score, gate, TAU, mask, None, 1.0)
        for asked, a, b in zip(mask, got, want, strict=True):
            torch.testing.assert_close(a, b if asked else torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize("n, k", [(0, 4), (4, 0), (1, 1), (257, 3), (17, 257)])
def test_linear_odd_sizes(n, k):
    x, g, weight, delta, bias = linear_case((3,), n, k)
    out = OPS.gated_linear(x, weight, delta, OPEN, bias, None, TAU)
    torch.testing.assert_close(out, F.linear(x, weight + delta, bias))
    got = OPS.gated_linear_backward(g, x, weight, delta, OPEN, True, TAU, [True] * 5, None, 1.0)
    for a, b in zip(got, gradients(F.linear, x, weight + delta, bias, delta, g), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_closed_linear_is_the_stock_op(dtype):
    x, _, weight, delta, bias = linear_case(dtype=dtype)
    for bad in (NAN, INF):
        got = OPS.gated_linear(x, weight, torch.full_like(delta, bad), OPEN, bias, False, TAU)
        same(got, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [True, False])
def test_linear_casts_the_weight(dtype, gate):
    x, g, weight, delta, bias = linear_case(dtype=torch.float32)
    x, g = x.to(dtype), g.to(dtype)
    used = merged(weight, delta, dtype) if gate else weight.to(dtype)
    out = OPS.gated_linear(x, weight, delta, OPEN, bias, gate, TAU)
    torch.testing.assert_close(out, F.linear(x, used, bias.to(dtype)))
    got = OPS.gated_linear_backward(g, x, weight, delta, OPEN, gate, TAU, [True] * 5, None, 1.0)
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32, dtype, torch.float32]
    product = (g.flatten(0, 1).t() @ x.flatten(0, 1)).float()
    same(got[0], (g.flatten(0, 1) @ used).view_as(x))
    same(got[1], product if gate else torch.zeros_like(product))
    same(got[4], product)
    torch.testing.assert_close(got[2], (product.double() * delta.double()).sum().float())


def test_linear_non_contiguous_operands():
    for x, weight, delta in itertools.product(layouts(4, 7), layouts(6, 7), layouts(6, 7)):
        g = torch.randn(6, 4).t()
        out = OPS.gated_linear(x, weight, delta, OPEN, None, True, TAU)
        torch.testing.assert_close(out, F.linear(x, weight + delta))
        got = OPS.gated_linear_backward(g, x, weight, delta, OPEN, True, TAU, [True] * 5, None, 1.0)
        torch.testing.assert_close(got[1], g.t() @ x)
        torch.testing.assert_close(got[2], ((g.t() @ x) * delta).sum(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got[4], g.t() @ x)
        assert got[1].stride() == torch.empty_like(delta).stride()


def test_linear_expanded_gradient():
    x, _, weight, delta, _ = linear_case()
    g = torch.ones((), dtype=torch.float64).expand(2, 5, 6)
    got = OPS.gated_linear_backward(g, x, weight, delta, OPEN, True, TAU, [True] * 5, None, 1.0)
    flat = g.reshape(10, 6)
    torch.testing.assert_close(got[0].flatten(0, 1), flat @ (weight + delta))
    torch.testing.assert_close(got[1], flat.t() @ x.flatten(0, 1))


# --- conv2d ---------------------------------------------------------------------------------------

GEOMETRIES = [
    # weight,        stride, padding, dilation, groups, image
    ((4, 6, 3, 3), [1, 1], [1, 1], [1, 1], 1, (9, 8)),
    ((4, 3, 3, 3), [2, 1], [1, 0], [1, 2], 2, (9, 8)),
    ((6, 1, 3, 3), [2, 2], [1, 1], [1, 1], 6, (8, 7)),
    ((5, 6, 1, 1), [2, 2], [0, 0], [1, 1], 1, (7, 6)),
    ((1, 6, 1, 3), [1, 3], [0, 1], [1, 1], 1, (1, 17)),
]


@pytest.mark.parametrize("shape, stride, padding, dilation, groups, image", GEOMETRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gate", [True, False])
def test_conv2d(shape, stride, padding, dilation, groups, image, layout, gate):
    geometry = (stride, padding, dilation, groups)
    x = torch.randn(3, 6, *image, dtype=torch.float64).to(memory_format=layout)
    weight, delta = (torch.randn(*shape, dtype=torch.float64).to(memory_format=layout) for _ in range(2))
    bias, score = torch.randn(shape[0], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, *geometry)

    used = weight + delta if gate else weight
    out = plain(x, used, bias)
    got = OPS.gated_conv2d(x, weight, delta, score, bias, *geometry, gate, TAU)
    # Bit for bit when closed; open, BLAS may round by where the workspace happens to lie.
    equal = torch.testing.assert_close if gate else same
    equal(got, out)
    assert got.stride() == out.stride()
    equal(OPS.gated_conv2d(x[1], weight, delta, score, bias, *geometry, gate, TAU), plain(x[1], used, bias))

    g = torch.randn_like(out)
    want = list(gradients(plain, x, used, bias, delta, g))
    want[1] = want[1] if gate else torch.zeros_like(delta)
    for mask in MASKS:
        without_weight_side = not (mask[1] or mask[2] or mask[4])
        for given in (x, None) if without_weight_side else (x,):
            got = OPS.gated_conv2d_backward(
                g, given, list(image), weight, delta, score, gate, TAU, *geometry, mask, None, 1.0
            )
            for asked, a, b in zip(mask, got, want, strict=True):
                torch.testing.assert_close(a, b if asked else torch.empty(0, dtype=torch.float64))
            if mask[1]:
                assert got[1].stride() == torch.empty_like(delta).stride()

    single = OPS.gated_conv2d_backward(
        g[1],
        x[1],
        list(image),
        weight,
        delta,
        score,
        gate,
        TAU,
        *geometry,
        [True, False, True, True, True],
        None,
        1.0,
    )
    for a, b in zip(single, gradients(plain, x[1], used, bias, delta, g[1]), strict=True):
        if a.shape != (0,):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gate", [True, False])
def test_conv2d_casts_the_weight(gate):
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x, g = torch.randn(2, 6, 9, 8).bfloat16(), torch.randn(2, 4, 9, 8).bfloat16()
    weight, delta = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    used = merged(weight, delta, torch.bfloat16) if gate else weight.bfloat16()
    same(
        OPS.gated_conv2d(x, weight, delta, OPEN, None, *geometry, gate, TAU),
        F.conv2d(x, used, None, *geometry),
    )
    got = OPS.gated_conv2d_backward(g, x, [9, 8], weight, delta, OPEN, gate, TAU, *geometry, [True] * 5, None, 1.0)
    assert [t.dtype for t in got] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]
    only_score = OPS.gated_conv2d_backward(
        g, x, [9, 8], weight, delta, OPEN, gate, TAU, *geometry, [False, False, True, False, False], None, 1.0
    )
    scale = (got[4].abs() * delta.abs()).sum().item()
    assert abs(only_score[2].item() - got[2].item()) < 2**-7 * scale


def test_zero_sized_batch():
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x, weight, delta = torch.randn(0, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    out = OPS.gated_conv2d(x, weight, delta, OPEN, None, *geometry, True, TAU)
    assert out.shape == (0, 4, 5, 5)
    got = OPS.gated_conv2d_backward(out, x, [5, 5], weight, delta, OPEN, True, TAU, *geometry, [True] * 5, None, 1.0)
    assert got[0].shape == x.shape and not got[1].any() and got[2] == 0 and not got[3].any()


# --- sampled gate gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("indices", [[0], [3, 1], [0, 1, 2, 3], []])
def test_rows_sample_the_weight_side_only(gate, indices):
    rows, scale = torch.tensor(indices, dtype=torch.int64), 1.5
    x, g, weight, delta, _ = linear_case((4, 2))
    of_samples = (2 * rows[:, None] + torch.arange(2)).flatten()  # a matrix's rows: of each sample two
    full = OPS.gated_linear_backward(g, x, weight, delta, OPEN, gate, TAU, [True] * 5, None, 1.0)
    part = OPS.gated_linear_backward(g[rows], x[rows], weight, delta, OPEN, gate, TAU, [True] * 5, None, 1.0)
    taken = x.reshape(8, -1)[of_samples]
    got = OPS.gated_linear_backward(g, taken, weight, delta, OPEN, gate, TAU, [True] * 5, of_samples, scale)
    same(got[0], full[0])
    same(got[3], full[3])
    for i in (1, 2, 4):
        torch.testing.assert_close(got[i], scale * part[i])

    geometry = ([2, 1], [1, 1], [1, 1], 1)
    x, weight, delta = torch.randn(4, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    g = torch.randn_like(F.conv2d(x, weight, None, *geometry))

    def backward(g, x, mask, rows, scale):
        return OPS.gated_conv2d_backward(g, x, [6, 5], weight, delta, OPEN, gate, TAU, *geometry, mask, rows, scale)

    for mask in ([True] * 5, [True, False, True, True, False]):
        full, part = backward(g, x, mask, None, 1.0), backward(g[rows], x[rows], mask, None, 1.0)
        got = backward(g, x[rows], mask, rows, scale)
        torch.testing.assert_close(got[0], full[0])
        same(got[3], full[3])
        for i in (1, 2, 4):
            torch.testing.assert_close(got[i], scale * part[i], rtol=1e-4, atol=1e-4)


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_score_gradient_does_not_depend_on_threads_or_isa(layout):
    x, g = torch.ones(1, 64), torch.ones(1, 300)
    weight = torch.zeros(300, 64)
    delta = torch.randn(300, 64) * 10.0 ** torch.randint(-6, 6, (300, 64))
    if layout == torch.channels_last:
        delta = delta.t().contiguous().t()
    before, results = torch.get_num_threads(), set()
    try:
        for threads, isa in itertools.product((1, 2, 3), _C.isas()):
            torch.set_num_threads(threads)
            _C.force_isa(isa)
            got = OPS.gated_linear_backward(
                g, x, weight, delta, OPEN, False, TAU, [False, False, True, False, False], None, 1.0
            )[2]
            results.add(got.item())
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1
    assert results.pop() == pytest.approx(delta.double().sum().item(), rel=1e-6)
