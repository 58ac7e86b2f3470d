"""The custom operators against `reference.py` in float64: values, every gradient, gates, layouts, tracing."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from taps_ext import gated_conv2d, gated_linear, ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GATES = [pytest.param(True, id="open"), pytest.param(False, id="closed"), pytest.param(None, id="device")]
CONVS = {
    "1x1": dict(shape=(6, 5, 1, 1)),
    "3x3": dict(shape=(6, 5, 3, 3), padding=1),
    "stride": dict(shape=(6, 5, 3, 3), padding=1, stride=2),
    "same": dict(shape=(6, 5, 2, 4), padding="same"),
    "same-dilated": dict(shape=(6, 5, 3, 2), padding="same", dilation=(1, 3)),
    "valid": dict(shape=(6, 5, 3, 3), padding="valid"),
    "groups": dict(shape=(6, 2, 3, 3), channels=4, groups=2),
    "depthwise": dict(shape=(8, 1, 3, 3), channels=8, groups=8, padding=1),
    "rectangular": dict(shape=(6, 5, 1, 3), padding=(0, 1), stride=(2, 1)),
}

pytestmark = pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")


def test_extension_is_built() -> None:
    assert ops.HAS_EXTENSION


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def linear_case(dtype: torch.dtype, rows: tuple[int, ...] = (7,), k: int = 33, n: int = 17, score: float = 0.15):
    """(input, weight, delta, score, bias), all with gradients."""
    delta_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [draw(*rows, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, k, dtype=delta_dtype)]
    tensors += [torch.tensor(score, dtype=delta_dtype), draw(n, dtype=dtype)]
    return [t.requires_grad_() for t in tensors]


def to_double(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def exact_weight(weight: torch.Tensor, delta: torch.Tensor, is_open: bool, dtype: torch.dtype) -> torch.Tensor:
    """W_t in float64, rounded once to the compute type as the kernels define it."""
    with torch.no_grad():
        return reference.reconstruct(weight, delta, gate=is_open, dtype=dtype).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("score", [0.15, 0.05])
def test_linear_matches_the_float64_reference(dtype, gate, score) -> None:
    torch.manual_seed(0)
    case = linear_case(dtype, rows=(3, 7), score=score)
    is_open = gate if gate is not None else score >= 0.1
    exact = to_double(case)
    output = gated_linear(*case, gate=gate)
    expected = reference.gated_linear(*exact, gate=is_open)
    input, weight, delta, _, _ = case
    k, n, rows = weight.shape[1], weight.shape[0], 21
    wt = weight.detach().double() + (delta.detach().double() if is_open else 0)
    assert output.dtype == dtype
    assert_close(output, expected, dtype, k + 1, input, wt)
    grad = draw(*output.shape, dtype=dtype)
    output.backward(grad)
    expected.backward(grad.double())
    for got, want, terms, factors, outer in [
        (case[0], exact[0], n, (grad, wt), 1),
        (case[1], exact[1], rows, (grad, input), 1),
        (case[2], exact[2], rows, (grad, input), 1),
        (case[3], exact[3], rows, (grad, input, delta), n * k),
        (case[4], exact[4], rows, (grad,), 1),
    ]:
        if want.grad is None:  # the closed Delta rests; only a gate read on the device must give zeros instead
            assert got.grad is None or (gate is None and not got.grad.any())
        else:
            assert got.grad.dtype == got.dtype
            assert_close(got.grad, want.grad, dtype, terms, *factors, outer=outer)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_conv2d_matches_the_float64_reference(name, dtype, gate, layout) -> None:
    torch.manual_seed(1)
    arguments = dict(CONVS[name])
    shape, channels = arguments.pop("shape"), arguments.pop("channels", 5)
    delta_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    score = 0.05 if gate is None else 0.15
    case = [
        draw(2, channels, 9, 8, dtype=dtype).to(memory_format=layout),
        draw(*shape, dtype=dtype).to(memory_format=layout),
        draw(*shape, dtype=delta_dtype).to(memory_format=layout),
        torch.tensor(score, dtype=delta_dtype),
        draw(shape[0], dtype=dtype),
    ]
    case = [t.requires_grad_() for t in case]
    exact = to_double(case)
    is_open = bool(gate)
    output = gated_conv2d(*case, **arguments, gate=gate)
    expected = reference.gated_conv2d(*exact, **arguments, gate=is_open)
    input, weight, delta = (t.detach() for t in case[:3])
    wt = weight.double() + (delta.double() if is_open else 0)
    taps = weight[0].numel()
    assert_close(output, expected, dtype, taps + 1, input, wt)
    grad = draw(*output.shape, dtype=dtype)
    output.backward(grad)
    expected.backward(grad.double())
    places = grad[:, 0].numel()
    for got, want, terms, factors, outer in [
        (case[0], exact[0], weight.numel() // channels, (grad, wt), 1),
        (case[1], exact[1], places, (grad, input), 1),
        (case[2], exact[2], places, (grad, input), 1),
        (case[3], exact[3], places, (grad, input, delta), weight.numel()),
        (case[4], exact[4], places, (grad,), 1),
    ]:
        if want.grad is None:
            assert got.grad is None or (gate is None and not got.grad.any())
        else:
            assert_close(got.grad, want.grad, dtype, terms, *factors, outer=outer)


@pytest.mark.parametrize("rows", [0, 1, 3, 17, 257])
@pytest.mark.parametrize("k,n", [(1, 1), (3, 17), (257, 3), (17, 257), (0, 5), (5, 0)])
def test_linear_sizes(rows, k, n) -> None:
    torch.manual_seed(rows + k)
    case = linear_case(torch.float32, (rows,), k, n)
    exact = to_double(case)
    output = gated_linear(*case, gate=True)
    expected = reference.gated_linear(*exact, gate=True)
    assert_close(output, expected, torch.float32, k + 1, case[0], case[1].double() + case[2].double())
    output.sum().backward()
    expected.sum().backward()
    one = torch.ones(())
    assert_close(case[0].grad, exact[0].grad, torch.float32, n, case[1].double() + case[2].double())
    assert_close(case[2].grad, exact[2].grad, torch.float32, rows, case[0], one)
    assert_close(case[3].grad, exact[3].grad, torch.float32, rows, case[0], case[2], outer=n * k)


@pytest.mark.parametrize("gate", [True, False])
def test_closed_and_open_forward_bits(gate) -> None:
    """Closed is the stock op to the bit, NaN in Delta included; open is the stock op on round(W + Delta).

    The latter where gradients may be asked for, or with more rows than are fused.
    """
    torch.manual_seed(2)
    x, w, d, s, b = (t.detach() for t in linear_case(torch.float32, (40,)))
    if not gate:
        d[0, 0], d[1, 1] = float("nan"), float("inf")
    want = F.linear(x, w + d if gate else w, b)
    assert torch.equal(gated_linear(x, w, d, s, b, gate=gate), want)
    w.requires_grad_()
    assert torch.equal(gated_linear(x, w, d.requires_grad_(), s.requires_grad_(), b, gate=gate), want)
    few = F.linear(x[:5], w + d if gate else w, b)
    assert torch.equal(gated_linear(x[:5], w, d, s, b, gate=gate), few)
    with torch.no_grad():
        assert torch.equal(gated_linear(x[:5], w, d, s, b, gate=gate), few) or gate
    image, kernel = draw(2, 4, 8, 8, dtype=torch.float32), draw(6, 4, 3, 3, dtype=torch.float32)
    extra = torch.full_like(kernel, float("nan")) if not gate else draw(6, 4, 3, 3, dtype=torch.float32)
    want = F.conv2d(image, kernel + extra if gate else kernel, padding=1)
    assert torch.equal(gated_conv2d(image, kernel, extra, s.detach(), padding=1, gate=gate), want)


def test_device_gate_selects_without_reading_a_closed_delta() -> None:
    x, w, d, _, b = (t.detach() for t in linear_case(torch.float32))
    d.fill_(float("nan"))
    assert torch.equal(gated_linear(x, w, d, torch.tensor(0.05), b), F.linear(x, w, b))
    assert gated_linear(x, w, d, torch.tensor(0.15), b).isnan().all()


@pytest.mark.parametrize("score,is_open", [(0.1, True), (0.0999999, False), (0.1 + 1e-7, True), (-1.0, False)])
def test_the_threshold_itself_is_open(score, is_open) -> None:
    """score >= tau is compared in float32, as the authors' code does, on the host and on the device alike."""
    layer = ops.gated_linear(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.tensor(score))
    assert bool(layer.item()) is is_open
    assert reference.is_open(torch.tensor(score), None, 0.1) is is_open


def test_a_nonfinite_closed_delta_raises_in_training() -> None:
    case = linear_case(torch.float32)
    with torch.no_grad():
        case[2][0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="delta: expected finite"):
        gated_linear(*case, gate=False).sum().backward()


@pytest.mark.parametrize("op", ["linear", "conv2d"])
@pytest.mark.parametrize("gate", [True, False])
def test_gradcheck_at_fixed_gate(op, gate) -> None:
    torch.manual_seed(3)
    if op == "linear":
        x, w, d, _, b = linear_case(torch.float64, (3,), 5, 4)
        delta = d if gate else d.detach()
        assert torch.autograd.gradcheck(lambda x, w, b: gated_linear(x, w, delta, None, b, gate=gate), (x, w, b))
        if gate:
            assert torch.autograd.gradcheck(lambda d: gated_linear(x, w, d, None, b, gate=True), (d,))
    else:
        x, w, d = draw(2, 4, 5, 6), draw(6, 2, 3, 3), draw(6, 2, 3, 3)
        for t in (x, w, d):
            t.requires_grad_()
        delta = d if gate else d.detach()

        def run(x, w, d):
            return gated_conv2d(x, w, d, None, None, (2, 1), 1, (1, 2), 2, gate=gate)

        assert torch.autograd.gradcheck(lambda x, w: run(x, w, delta), (x, w))
        if gate:
            assert torch.autograd.gradcheck(lambda d: run(x, w, d), (d,))


@pytest.mark.parametrize("gate", [True, False, None])
def test_score_gradient_is_the_inner_product(gate) -> None:
    """dL/ds = <dL/dW_t, Delta>, open or closed (straight-through)."""
    torch.manual_seed(4)
    x, w, d, s, b = linear_case(torch.float64)
    gated_linear(x, w, d, s, b, gate=gate).square().sum().backward()
    wt = (w + d if gate is not False else w).detach().requires_grad_()
    F.linear(x, wt, b).square().sum().backward()
    assert torch.allclose(s.grad, (wt.grad * d).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [3, 56], ids=["weights", "pixels"])  # 64 times as many pixels decide how it is made
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, [2, 0]], ids=["all", "sampled"])
def test_score_gradient_of_a_closed_convolution_alone(size, dtype, rows) -> None:
    """<dL/dW, Delta> without a gradient of W or Delta, beside the input's and without it."""
    torch.manual_seed(9)
    delta_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, w, d = draw(3, 8, size, size, dtype=dtype), draw(8, 8, 3, 3, dtype=dtype), draw(8, 8, 3, 3, dtype=delta_dtype)
    grad, score, picked = draw(3, 8, size, size, dtype=dtype), torch.tensor(0.0, dtype=delta_dtype), rows or [0, 1, 2]
    exact = torch.nn.grad.conv2d_weight(x[picked].double(), w.shape, grad[picked].double(), padding=1)
    terms = len(picked) * size * size
    for wanted in (True, False):
        _, _, got, _, _ = torch.ops.taps_ext.gated_conv2d_backward(
            grad,
            x[picked],
            [size, size],
            w,
            d,
            score,
            False,
            0.1,
            *([1, 1], [1, 1], [1, 1], 1),
            [wanted, False, True, False, False],
            None if rows is None else torch.tensor(rows),
            2.0,
        )
        factors = (x, grad, 2.0 * d)
        assert_close(got, 2.0 * (exact * d.double()).sum(), dtype, terms, *factors, outer=d.numel())


def test_score_gradient_of_a_closed_convolution_in_fp16_stays_in_range() -> None:
    """The weight's own gradient, a sum over all pixels, does not: with a Delta of zeros it would make a NaN."""
    x, w = torch.ones(8, 4, 96, 96, dtype=torch.float16), torch.ones(4, 4, 1, 1, dtype=torch.float16)
    for value in (0.0, 2.0**-10):
        d, s = torch.full((4, 4, 1, 1), value), torch.tensor(0.0, requires_grad=True)
        gated_conv2d(x.requires_grad_(), w, d, s, gate=False).sum().backward()
        assert s.grad == pytest.approx(value * 4 * x.numel(), rel=1e-3)


def test_layouts_agree() -> None:
    """Non-contiguous inputs, weights and Deltas give what contiguous ones give."""
    torch.manual_seed(6)
    x, w, d, s, b = (t.detach() for t in linear_case(torch.float64, (4, 3), 6, 5))
    want = gated_linear(x, w, d, s, b, gate=True)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), w.t().contiguous().t(), d.t().contiguous().t()]
    assert torch.allclose(gated_linear(views[0], w, d, s, b, gate=True), want, rtol=1e-14, atol=1e-14)
    assert torch.allclose(gated_linear(x, views[1], d, s, b, gate=True), want, rtol=1e-14, atol=1e-14)
    assert torch.allclose(gated_linear(x, w, views[2], s, b, gate=True), want, rtol=1e-14, atol=1e-14)
    assert torch.allclose(gated_linear(x[:, ::2], w, d, s, b, gate=True), want[:, ::2], rtol=1e-14, atol=1e-14)
    padded = torch.full((5, 9), float("nan"), dtype=torch.float64)
    padded[:, :6] = w
    assert torch.allclose(gated_linear(x, padded[:, :6], d, s, b, gate=True), want, rtol=1e-14, atol=1e-14)
    assert torch.allclose(gated_linear(x[0, 0], w, d, s, b, gate=True), want[0, 0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gate", [True, None])
def test_twice_the_same_bits(gate) -> None:
    torch.manual_seed(7)
    runs = []
    for _ in range(2):
        torch.manual_seed(8)
        case = linear_case(torch.float32, (130,), 257, 129)
        gated_linear(*case, gate=gate).square().sum().backward()
        runs.append([t.grad for t in case])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_score_gradient_does_not_depend_on_threads(threads) -> None:
    before = torch.get_num_threads()
    try:
        torch.manual_seed(9)
        w, d = draw(300, 400, dtype=torch.float32), draw(300, 400, dtype=torch.float32)
        torch.set_num_threads(threads)
        zero = torch.zeros(1, 400)
        zero[0] = d[0]
        grad = torch.zeros(1, 300)
        grad[0, 0] = 1
        s = torch.tensor(0.15)
        out = torch.ops.taps_ext.gated_linear_backward(
            grad, zero, w, d, s, True, 0.1, [False, False, True, False, False], None, 1.0
        )[2]
        assert out.item() == pytest.approx(d[0].double().square().sum().item(), rel=1e-6)
        test_score_gradient_does_not_depend_on_threads.seen.add(out.item())  # type: ignore[attr-defined]
        assert len(test_score_gradient_does_not_depend_on_threads.seen) == 1  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(before)


test_score_gradient_does_not_depend_on_threads.seen = set()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"delta": torch.zeros(3, 3)}, "delta: expected shape"),
        ({"score": None}, "score: expected"),
        ({"score": torch.zeros(2)}, "score: expected one element"),
        ({"input": torch.zeros(2, 33, dtype=torch.float64)}, "input: expected dtype"),
        ({"input": torch.zeros(2, 5)}, "input"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"weight": torch.zeros(3, 3, 3), "delta": torch.zeros(3, 3, 3)}, "weight"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    names = ("input", "weight", "delta", "score", "bias")
    arguments = dict(zip(names, (t.detach() for t in linear_case(torch.float32)), strict=True))
    arguments.update(change)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        gated_linear(**arguments)


def test_missing_extension_warns_once_and_falls_back() -> None:
    """In a process where `_C` cannot be imported there is one warning, and the results are the reference's."""
    import subprocess
    import sys

    code = (
        "import sys, warnings\n"
        "sys.modules['taps_ext._C'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import taps_ext, torch\n"
        "    x, w, d = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3)\n"
        "    y = taps_ext.gated_linear(x, w, d, torch.tensor(0.2)); taps_ext.gated_linear(x, w, d, torch.tensor(0.2))\n"
        "print(len([s for s in seen if 'compiled extension' in str(s.message)]), y.sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "48.0"]


def test_unbatched_convolution() -> None:
    x, w, d = draw(4, 8, 8), draw(6, 4, 3, 3), draw(6, 4, 3, 3)
    got = gated_conv2d(x, w, d, torch.tensor(0.15), padding=1)
    assert torch.allclose(got, F.conv2d(x, w + d, padding=1), rtol=1e-12, atol=1e-12)


def test_warnings_are_not_raised_by_normal_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case = linear_case(torch.float32)
        gated_linear(*case, gate=None).sum().backward()
