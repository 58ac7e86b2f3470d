"""The compiled ops below autograd: exactness, layouts, determinism, messages."""

import itertools

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("taps_ext._C", reason="the extension is not built")

OPS = torch.ops.taps_ext
TAU = 0.1
OPEN, CLOSED = torch.tensor(0.2), torch.tensor(0.05)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    _C.force_isa(None)
    _C.force_path(None)


def merged(weight, delta, dtype):
    """round(W + Delta) once, in fp64 if anything is, else in fp32."""
    wide = torch.float64 if torch.float64 in (weight.dtype, delta.dtype, dtype) else torch.float32
    return (weight.to(wide) + delta.to(wide)).to(dtype)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- the module -----------------------------------------------------------------------------------


def test_build_info():
    info = _C.build_info()
    assert info["torch_target"] == "2.11"
    assert "baseline" in info["isas"] and info["isa"] == _C.isa() == _C.isas()[0]
    assert info["cuda"] is None or {"version", "architectures"} <= info["cuda"].keys()


def test_lists_cross_the_stable_abi():
    assert list(OPS._probe_optional_list([torch.zeros(3), None, torch.zeros(2, 2)])) == [3, -1, 4]
    assert list(OPS._probe_optional_list([])) == []
    parts = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.uint8)]
    assert list(OPS._probe_packed(parts, "bitmask")) == [7, 6, 7]


def test_choice_of_path():
    assert _C.choose(open=False) == "stock"
    assert _C.choose(open=True) == "rebuild"
    assert _C.choose(open=False, same_dtype=False) == "rebuild"
    large = {"open": True, "fusable": True, "outputs": 1024, "inputs": 384}
    for rows, more, path in (
        (256, {}, "fused"),
        (257, {}, "rebuild"),
        (256, {"inputs": 383}, "rebuild"),
        (1, {"fusable": False}, "rebuild"),
        (512, {"inputs": 2048}, "fused"),
        (512, {"inputs": 2047}, "rebuild"),
        (513, {"inputs": 2048}, "rebuild"),
        (32, {"narrow": True}, "fused"),
        (33, {"narrow": True}, "rebuild"),
        (3, {"narrow": True, "emulated": True, "inputs": 383}, "rebuild"),
        (4, {"narrow": True, "emulated": True, "inputs": 256}, "fused"),
        (4, {"narrow": True, "emulated": True, "inputs": 255}, "rebuild"),
        (10**6, {"narrow": True, "emulated": True}, "fused"),
        (10**6, {"narrow": True, "emulated": True, "fusable": False}, "rebuild"),
    ):
        assert _C.choose(rows=rows, **{**large, **more}) == path, (rows, more)
    assert _C.choose(open=True, fusable=True, rows=128, cuda=True) == "fused"
    assert _C.choose(open=False, same_dtype=False, fusable=True, rows=1) == "rebuild"  # torch's to the bit
    assert _C.choose(open=True, fusable=True, rows=129, cuda=True) == "rebuild"
    assert _C.choose(open=False, fusable=True, rows=1) == "stock"
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    _C.force_path("rebuild")
    same(OPS.gated_linear(x, weight, weight, None, None, False, TAU), F.linear(x, weight))
    _C.force_path("stock")
    with pytest.raises(RuntimeError, match="stock is forced, but the gate is open"):
        OPS.gated_linear(x, weight, weight, None, None, True, TAU)
    with pytest.raises(RuntimeError, match="expected stock, rebuild, fused or None, got turbo"):
        _C.force_path("turbo")
    _C.force_path("fused")
    with pytest.raises(RuntimeError, match="fused is forced, but the kernels do not know this layer"):
        OPS.gated_linear(x.double(), weight.double(), weight, None, None, True, TAU)
    mask = [False, True, False, False, False]
    with pytest.raises(RuntimeError, match="fused is forced, but the kernels do not know this gradient"):
        OPS.gated_linear_backward(torch.ones(2, 4), x, weight, weight, None, True, TAU, mask, None, 1.0)
    with pytest.raises(RuntimeError, match=r"expected one of .*baseline, got mmx"):
        _C.force_isa("mmx")


# --- reconstruct ----------------------------------------------------------------------------------

SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65519.9,
        65520.0,
        1e30,
        -1e30,
        3.4e38,
        1e-8,
        -6e-8,
        6.1e-5,
        2.98e-8,
        INF,
        -INF,
        NAN,
    ]
)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("out, weight, delta", list(itertools.product(FLOATS, FLOATS, FLOATS)))
def test_reconstruct_is_exact(isa, out, weight, delta):
    _C.force_isa(isa)
    for n in (0, 1, 3, 17, 1024, 2061):
        w, d = torch.randn(n) * 8, torch.randn(n)
        if n > 1024:
            w[: len(SPECIAL)], d[: len(SPECIAL)] = SPECIAL, 0
            w[-len(SPECIAL) :], d[-len(SPECIAL) :] = SPECIAL, 1e-6
        w, d = w.to(weight), d.to(delta)
        for gate, score, expected in (
            (True, None, merged(w, d, out)),
            (None, OPEN, merged(w, d, out)),
            (False, OPEN, w.to(out)),
            (None, CLOSED, w.to(out)),
        ):
            got = torch.empty(n, dtype=out)
            OPS.reconstruct(got, w, d, score, gate, TAU)
            same(got, expected)
        OPS.reconstruct(got, w, torch.full_like(d, NAN), None, False, TAU)
        same(got, w.to(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    out, wide = torch.empty_like(values), torch.empty(2**16)
    for isa in _C.isas():
        _C.force_isa(isa)
        OPS.reconstruct(out, values, None, None, False, TAU)
        same(out, values)
        OPS.reconstruct(wide, values, None, None, False, TAU)
        same(wide, values.float())


def layouts(*shape):
    """The same shape in different memory: dense ones, one with gaps, a transposed one, an expanded one."""
    dense = torch.randn(*shape)
    yield dense
    yield torch.randn(*[s + 2 for s in shape])[tuple(slice(1, s + 1) for s in shape)]
    yield torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))
    yield torch.randn(*shape[:-1], 1).expand(*shape)
    if len(shape) == 4:
        yield dense.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5, 7), (6, 5, 3, 3), (300, 130), (4, 1, 1, 9), (3, 0)])
def test_reconstruct_walks_any_strides(shape):
    for out, weight, delta in itertools.product(*(list(layouts(*shape)) for _ in range(3))):
        if 0 in out.stride() and out.numel():
            with pytest.raises(RuntimeError, match="out: expected distinct memory"):
                OPS.reconstruct(out, weight, delta, None, True, TAU)
            continue
        out = out.clone(memory_format=torch.preserve_format) if out.is_contiguous() else out
        OPS.reconstruct(out, weight, delta, None, True, TAU)
        same(out, weight + delta)


# --- linear ---------------------------------------------------------------------------------------


def linear_case(leading=(2, 5), n=6, k=7, dtype=torch.float64):
    x, g = torch.randn(*leading, k, dtype=dtype), torch.randn(*leading, n, dtype=dtype)
    return x, g, torch.randn(n, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)


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


# --- messages -------------------------------------------------------------------------------------


def linear(x=None, w=None, d=None, s=None, b=None, gate=True):
    w = torch.randn(4, 7) if w is None else w
    x = torch.randn(2, 7) if x is None else x
    return OPS.gated_linear(x, w, d, s, b, gate, TAU)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"x": torch.randn(2, 6)},
            r"input: expected shape \[..., 7\] for a weight of shape \[4, 7\], got \[2, 6\]",
        ),
        (
            {"x": torch.ones(2, 7, dtype=torch.int64)},
            r"input: expected dtype float32, float64, bfloat16 or float16",
        ),
        ({"w": torch.randn(7)}, r"weight: expected 2 dimensions, got shape \[7\]"),
        ({"d": torch.randn(4, 6)}, r"delta: expected shape \[4, 7\], got \[4, 6\]"),
        ({"b": torch.randn(5)}, r"bias: expected shape \[4\], got \[5\]"),
        ({"s": torch.randn(2)}, r"score: expected one element, got shape \[2\]"),
        ({"s": torch.tensor(0.1).half()}, r"score: expected dtype float32 or float64, got float16"),
        ({"d": torch.randn(4, 7), "gate": None}, r"gate: expected a bool, or a score to read it from"),
        (
            {"d": torch.randn(4, 7), "s": torch.tensor(NAN), "gate": None},
            r"score: expected a number, got NaN",
        ),
    ],
)
def test_messages_of_linear(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        linear(**arguments)


def test_messages_of_backward():
    x, g, weight, delta, _ = linear_case()

    def backward(x=x, delta=delta, score=OPEN, gate=False, mask=(False, False, True, False, False), rows=None):
        return OPS.gated_linear_backward(g, x, weight, delta, score, gate, TAU, list(mask), rows, 1.0)

    with pytest.raises(RuntimeError, match="input: expected a tensor, weight gradients are asked for"):
        backward(x=None)
    with pytest.raises(RuntimeError, match="delta: expected a tensor, the score's gradient"):
        backward(delta=None)
    with pytest.raises(RuntimeError, match="score: expected a tensor, its gradient"):
        backward(score=None)
    with pytest.raises(RuntimeError, match=r"rows: expected indices in \[0, 10\), got 10"):
        backward(rows=torch.tensor([10]))
    with pytest.raises(RuntimeError, match=r"input: expected shape \[1, 7\], got \[2, 5, 7\]"):
        backward(rows=torch.tensor([1]))
    for bad in (NAN, INF):
        poisoned = delta.clone()
        poisoned[1, 2] = bad
        with pytest.raises(RuntimeError, match="delta: expected finite values in a closed layer during training"):
            backward(delta=poisoned)
        backward(delta=poisoned, mask=(True, False, False, False, False))
    # A gradient that overflowed is not the delta's fault.
    assert not OPS.gated_linear_backward(
        g * INF, x, weight, delta, OPEN, False, TAU, [False, False, True, False, False], None, 1.0
    )[2].isfinite()


def test_messages_of_conv2d():
    x, weight, delta = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    ones = ([1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError, match=r"input: expected shape \[B, 3, H, W\] or \[3, H, W\]"):
        OPS.gated_conv2d(x[:, :2], weight, delta, OPEN, None, *ones, True, TAU)
    with pytest.raises(RuntimeError, match=r"groups: expected a divisor of the 4 output channels, got 3"):
        OPS.gated_conv2d(x, weight, delta, OPEN, None, [1, 1], [0, 0], [1, 1], 3, True, TAU)
    with pytest.raises(RuntimeError, match="stride: expected two integers of at least 1"):
        OPS.gated_conv2d(x, weight, delta, OPEN, None, [0, 1], [0, 0], [1, 1], 1, True, TAU)
    with pytest.raises(RuntimeError, match="no smaller than the kernel"):
        OPS.gated_conv2d(x[..., :2], weight, delta, OPEN, None, *ones, True, TAU)
    g, score_only = torch.randn(2, 4, 3, 3), [False, False, True, False, False]
    with pytest.raises(RuntimeError, match="grad_output: expected size 4 on axis 2 for an input of 6, got 3"):
        OPS.gated_conv2d_backward(
            g, None, [6, 5], weight, delta, OPEN, True, TAU, *ones, [True] + [False] * 4, None, 1.0
        )
    delta[0, 0, 0, 0] = NAN
    with pytest.raises(RuntimeError, match="delta: expected finite values in a closed layer during training"):
        OPS.gated_conv2d_backward(g, x, [5, 5], weight, delta, OPEN, False, TAU, *ones, score_only, None, 1.0)
