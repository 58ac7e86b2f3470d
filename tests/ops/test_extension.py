"""The compiled module: facts, the choice of path, reconstruct, and what the operators refuse."""

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


def linear_case(leading=(2, 5), n=6, k=7, dtype=torch.float64):
    x, g = torch.randn(*leading, k, dtype=dtype), torch.randn(*leading, n, dtype=dtype)
    return x, g, torch.randn(n, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)


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
    narrow = {"stock": "usual", "wide": False, "pairs": False}
    wide = {**narrow, "wide": True}
    pairs = {**wide, "pairs": True, "narrow": True}
    emulated = {**narrow, "stock": "emulated", "narrow": True}
    halved = {**wide, "stock": "halved"}
    unit = {**pairs, "stock": "matrix unit"}
    for rows, more, path in (
        (256, narrow, "fused"),
        (257, narrow, "rebuild"),
        (256, {**narrow, "inputs": 383}, "rebuild"),
        (1, {**narrow, "fusable": False}, "rebuild"),
        (8, {**narrow, "outputs": 15, "inputs": 1 << 20}, "rebuild"),
        (8, {**narrow, "outputs": 16, "inputs": 1 << 20}, "fused"),
        (512, {**narrow, "inputs": 2048}, "fused"),
        (512, {**narrow, "inputs": 2047}, "rebuild"),
        (513, {**narrow, "inputs": 2048}, "rebuild"),
        (256, {**wide, "inputs": 256}, "fused"),
        (256, {**wide, "inputs": 255}, "rebuild"),
        (512, {**wide, "inputs": 1024}, "fused"),
        (512, {**wide, "inputs": 1023}, "rebuild"),
        (513, {**wide, "inputs": 1 << 20}, "rebuild"),
        (256, {**wide, "places": 9, "inputs": 1024}, "fused"),
        (256, {**wide, "places": 9, "inputs": 1023}, "fused"),
        (257, {**wide, "places": 9, "inputs": 1023}, "rebuild"),
        (257, {**wide, "places": 9, "inputs": 1024}, "rebuild"),
        (64, {**pairs, "inputs": 1}, "fused"),
        (65, {**pairs, "inputs": 255}, "rebuild"),
        (256, {**pairs, "inputs": 256}, "fused"),
        (257, {**pairs, "inputs": 2047}, "rebuild"),
        (512, {**pairs, "inputs": 2048}, "fused"),
        (513, {**pairs, "inputs": 2048}, "rebuild"),
        (400, {**pairs, "inputs": 2048, "places": 9}, "fused"),
        (401, {**pairs, "inputs": 2048, "places": 9}, "rebuild"),
        (257, {**pairs, "inputs": 2047, "places": 9}, "rebuild"),
        (32, {**wide, "narrow": True}, "fused"),
        (33, {**wide, "narrow": True}, "rebuild"),
        (3, {**emulated, "inputs": 383}, "rebuild"),
        (4, {**emulated, "inputs": 256}, "fused"),
        (4, {**emulated, "inputs": 255}, "rebuild"),
        (10**6, emulated, "fused"),
        (10**6, {**emulated, "fusable": False}, "rebuild"),
        (4, {**halved, "inputs": 128}, "fused"),
        (3, {**halved, "inputs": 128}, "rebuild"),
        (10**6, {**halved, "inputs": 128}, "fused"),
        (10**6, {**halved, "inputs": 127}, "rebuild"),
        (15, unit, "fused"),
        (16, unit, "rebuild"),
        (15, {**unit, "inputs": 383}, "rebuild"),
    ):
        assert _C.choose(rows=rows, **{**large, **more}) == path, (rows, more)
    with pytest.raises(RuntimeError, match="stock: expected usual, .*, got slow"):
        _C.choose(open=True, stock="slow")
    assert _C.choose(open=True, fusable=True, rows=64, cuda=True) == "fused"
    assert _C.choose(open=False, same_dtype=False, fusable=True, rows=1) == "rebuild"  # torch's to the bit
    assert _C.choose(open=True, fusable=True, rows=65, cuda=True) == "rebuild"
    wide = {"open": True, "fusable": True, "cuda": True, "outputs": 2560, "inputs": 2048}
    assert [_C.choose(rows=rows, **wide) for rows in (65, 128, 129)] == ["fused", "fused", "rebuild"]
    assert _C.choose(rows=128, **{**wide, "inputs": 2047}) == "rebuild"
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
    with pytest.raises(RuntimeError, match="fused is forced, but this layer cannot be"):
        OPS.gated_linear(x.double(), weight.double(), weight, None, None, True, TAU)
    mask = [False, True, False, False, False]
    with pytest.raises(RuntimeError, match="fused is forced, but this gradient cannot be"):
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
