"""The operators with `rows`: the score gradient of a closed layer from a part of its input, against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from taps_ext import gated_conv2d, gated_linear, ops, reference

pytestmark = pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
@pytest.mark.parametrize("gate", [True, False, None])
def test_row_subset_estimates_the_gate_gradient(op, gate) -> None:
    """All rows with scale 1 is the exact gradient; the mean over all single rows, scaled by B, is too (unbiased)."""
    torch.manual_seed(5)
    batch = 6
    if op == "linear":
        x, w = draw(2, 3, 5), draw(3, 5)  # a matrix of six rows
        grad, name, geometry = draw(2, 3, 3), "gated_linear_backward", ()
    else:
        x, w = draw(batch, 5, 6, 6), draw(3, 5, 3, 3)
        grad, name, geometry = draw(batch, 3, 6, 6), "gated_conv2d_backward", ([1, 1], [1, 1], [1, 1], 1)
    d, s = torch.randn_like(w), torch.tensor(0.05 if gate is None else 0.15, dtype=torch.float64)
    mask = [True, gate is not False, True, True, True]

    def backward(input, rows, scale):
        size = ([6, 6],) if op == "conv2d" else ()
        function = getattr(torch.ops.taps_ext, name)
        return function(grad, input, *size, w, d, s, gate, 0.1, *geometry, mask, rows, scale)

    exact = backward(x, None, 1.0)
    taken = x.reshape(batch, *x.shape[-1:]) if op == "linear" else x
    every = backward(taken, torch.arange(batch), 1.0)
    singles = [backward(taken[i : i + 1], torch.tensor([i]), float(batch)) for i in range(batch)]
    for i in (0, 3):  # dinput and dbias always use all rows
        for other in (every, *singles):
            assert torch.allclose(other[i], exact[i], rtol=1e-12, atol=1e-12)
    for i in (1, 2, 4):
        assert torch.allclose(every[i], exact[i], rtol=1e-12, atol=1e-12)
        mean = torch.stack([single[i] for single in singles]).mean(0)
        assert torch.allclose(mean, exact[i], rtol=1e-11, atol=1e-11)


def cases():
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    yield "linear", x, torch.randn(4, 6, dtype=torch.float64), gated_linear, reference.gated_linear
    x = torch.randn(5, 6, 7, 7, dtype=torch.float64)
    yield "conv2d", x, torch.randn(4, 6, 3, 3, dtype=torch.float64), gated_conv2d, reference.gated_conv2d


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("gate", [False, True, None])
@pytest.mark.parametrize("weight_learns", [False, True])
def test_operators_agree_with_the_reference(kind, gate, weight_learns) -> None:
    torch.manual_seed(0)
    _, x, weight, fast, plain = next(case for case in cases() if case[0] == kind)
    delta, rows = torch.randn_like(weight), torch.tensor([4, 1])
    found = []
    for run, sample in ((fast, rows), (plain, rows), (plain, None)):
        score = torch.tensor(0.0 if gate is None else 0.05, dtype=torch.float64, requires_grad=True)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(weight_learns), delta.clone(), score]
        leaves[2].requires_grad_()
        bias = torch.randn(len(weight), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        out = run(*leaves, bias.requires_grad_(), gate=gate, rows=sample, row_scale=2.5)
        out.square().sum().backward()
        found.append([out, *[t.grad for t in (*leaves, bias)]])
    sampled = gate is False and not weight_learns
    for i, (mine, oracle, exact) in enumerate(zip(*found, strict=True)):
        if oracle is None or mine is None:
            assert mine is None or not mine.any()
            assert oracle is None or not oracle.any()
            continue
        torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-10)
        assert torch.allclose(mine, exact) != (sampled and i == 4)  # the score's gradient alone is an estimate


@pytest.mark.parametrize("run", [gated_linear, reference.gated_linear])
def test_a_spoilt_delta_is_named(run) -> None:
    delta = torch.randn(4, 6)
    delta[1, 2] = math.nan
    score = torch.tensor(0.05, requires_grad=True)
    out = run(torch.randn(5, 6), torch.randn(4, 6), delta, score, gate=False, rows=torch.tensor([1]), row_scale=5.0)
    assert torch.isfinite(out).all()
    with pytest.raises((ValueError, RuntimeError), match="delta: expected finite values in a closed layer"):
        out.sum().backward()


def test_bad_rows_are_refused() -> None:
    score = torch.tensor(0.05, requires_grad=True)
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    for rows, message in (
        (torch.tensor([5]), r"rows: expected indices in \[0, 5\), got 5"),
        (torch.tensor([-1]), r"rows: expected indices in \[0, 5\), got -1"),
        (torch.tensor([[1]]), r"rows: expected int64 indices of shape \[R\]"),
        (torch.tensor([1.0]), r"rows: expected int64 indices"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gated_linear(x, weight, weight, score, gate=False, rows=rows)
    image, kernel = torch.randn(3, 5, 5), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="input: expected a batch for rows"):
        gated_conv2d(image, kernel, kernel, score, gate=False, rows=torch.tensor([0]))


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_rows_without_memory_are_refused(convolution, backward) -> None:
    """They were read before anything else looked at them, and to read what is expanded to 2^40 took hours."""
    freed, cut = torch.tensor([0, 1]), torch.tensor([0, 1])
    freed.untyped_storage().resize_(0)
    cut.untyped_storage().resize_(8)
    x, w = (torch.randn(5, 3, 4, 4), torch.randn(4, 3, 1, 1)) if convolution else (torch.randn(5, 6), torch.randn(4, 6))
    y, score = torch.randn(5, 4, *x.shape[2:]), torch.tensor(0.05)
    geometry = ([1, 1], [0, 0], [1, 1], 1) if convolution else ()
    operator = getattr(torch.ops.taps_ext, f"gated_{'conv2d' if convolution else 'linear'}{'_backward' * backward}")
    for rows, message in (
        (freed, r"rows: expected a tensor of shape \[2\] with memory, got one whose storage has been freed"),
        (cut, r"rows: expected .* with memory, got one whose storage was cut to 8 of 16 bytes"),
        (torch.tensor(0).expand(2**40), "rows: expected memory for each of the indices, got one .* 1099511627776"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "rows: expected a tensor on cpu like"),
    ):
        if rows.is_meta and not backward:  # what torch registers for it answers
            continue
        size = ([4, 4],) if convolution else ()
        with pytest.raises((RuntimeError, NotImplementedError), match=f"{message}|Meta|meta"):
            if backward:
                operator(y, x[:2], *size, w, w, score, False, 0.1, *geometry, [True] * 5, rows, 1.0)
            else:
                operator(x, w, w, score, None, *geometry, False, 0.1, rows, 1.0)


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (F.relu, True),
        (lambda x: F.relu(x).flatten(0, 1).unsqueeze(0).transpose(0, 1), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), True),
        (F.gelu, False),
        (lambda x: F.relu(x) + 1, False),
    ],
)
def test_what_the_graph_holds_anyway_is_not_copied(between, kept) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(4, 8, dtype=torch.float64)
    score = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    rows, found = torch.tensor([2, 7, 11]), []
    for run in (gated_linear, reference.gated_linear):
        sizes: list[int] = []
        middle = between(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            out = run(middle, weight, weight.cos(), score, gate=False, rows=rows, row_scale=10.0)
        if run is gated_linear:
            assert (x.numel() in sizes, 3 * 8 in sizes) == (kept, not kept)
        found.append(torch.autograd.grad(out.square().sum(), (x, score)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", [False, True])
def test_images_and_weights_of_other_shapes_are_named(gate) -> None:
    """Also where torch's own function would take them: a closed layer whose score asks for nothing."""
    x, w, rows = draw(2, 6, 7, 7), draw(4, 6, 3, 3), torch.tensor([0])
    with pytest.raises(ValueError, match="input: expected a batch for rows"):
        gated_conv2d(x[0], w, w, gate=gate, rows=rows)
    with pytest.raises(ValueError, match=r"input: expected \[B, C, H, W\]"):
        gated_conv2d(x[None], w, w, gate=gate)
    with pytest.raises(ValueError, match=r"weight: expected \[O, C / groups, kh, kw\]"):
        gated_conv2d(x, w[0], w[0], gate=gate, padding="same")
    assert gated_conv2d(x[0], w, w, gate=gate).shape == (4, 5, 5)


@pytest.mark.parametrize("gate", [True, False])
def test_a_scale_of_no_rows_scales_nothing(gate) -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5, 6)
    found = []
    for scale in (1.0, 3.0):
        delta, score = d.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
        gated_linear(x, w, delta, score, gate=gate, row_scale=scale).square().sum().backward()
        found.append((score.grad, delta.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is found[1][1] is None if not gate else torch.equal(found[0][1], found[1][1])
