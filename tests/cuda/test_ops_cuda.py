"""The operators on a GPU against float64 on the CPU: values, gradients, gates, streams, graphs, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from taps_ext import gated_conv2d, gated_linear, ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GATES = [pytest.param(True, id="open"), pytest.param(False, id="closed"), pytest.param(None, id="device")]
CONVS = {
    "1x1": dict(shape=(24, 16, 1, 1)),
    "3x3": dict(shape=(24, 16, 3, 3), padding=1),
    "stride": dict(shape=(24, 16, 3, 3), padding=1, stride=2),
    "same": dict(shape=(24, 16, 2, 4), padding="same"),
    "groups": dict(shape=(24, 8, 3, 3), groups=2, padding=1),
    "depthwise": dict(shape=(16, 1, 3, 3), groups=16, padding=1),
    "depthwise, 5x5": dict(shape=(16, 1, 5, 5), groups=16, padding=2, stride=2),
    "depthwise, 7x7": dict(shape=(16, 1, 7, 7), groups=16, padding=3),
    "odd": dict(shape=(7, 16, 3, 1)),
}


def draw(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def on_device(tensors, frozen=()):
    return [t.detach().cuda().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]


def exact(tensors, frozen=()):
    return [t.detach().cpu().double().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]


def compare_gradients(got, want, dtype, gate, bounds) -> None:
    for a, b, (terms, factors, outer) in zip(got, want, bounds, strict=True):
        if b.grad is None:
            assert a.grad is None or (gate is None and not a.grad.any())
        else:
            assert a.grad.dtype == a.dtype
            assert_close(a.grad.cpu(), b.grad, dtype, terms, *factors, outer=outer)


@pytest.fixture
def path():
    """Force a path for a test."""
    yield lambda name: ops._C.force_path(name)
    ops._C.force_path(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("forced", ["rebuild", "fused", None])
@pytest.mark.parametrize(
    "rows,k,n", [(1, 64, 64), (7, 33, 17), (7, 34, 18), (257, 129, 65), (64, 768, 256), (130, 258, 66)]
)
def test_linear(dtype, gate, forced, rows, k, n, path) -> None:
    if forced == "fused" and (dtype not in (torch.bfloat16, torch.float16) or k % 2 or n % 2):
        pytest.skip("not a case of the fused kernels: 16-bit types with rows of whole words")
    path(forced)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    score = 0.05 if gate is None else 0.15
    host = [draw(rows, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, k, dtype=wide)]
    host += [torch.tensor(score, dtype=wide), draw(n, dtype=dtype)]
    frozen = (1,) if forced == "fused" else ()  # the fused kernels give no gradient of W itself
    got, want = on_device(host, frozen), exact(host, frozen)
    is_open = bool(gate)
    output = gated_linear(*got, gate=gate)
    expected = reference.gated_linear(*want, gate=is_open)
    wt = host[1].double() + (host[2].double() if is_open else 0)
    assert_close(output.cpu(), expected, dtype, k + 1, host[0], wt)
    grad = draw(rows, n, dtype=dtype)
    output.backward(grad.cuda())
    expected.backward(grad.double())
    weight_side = (rows, (grad, host[0]), 1)
    bounds = [
        (n, (grad, wt), 1),
        weight_side,
        weight_side,
        (rows, (grad, host[0], host[2]), n * k),
        (rows, (grad,), 1),
    ]
    compare_gradients(got, want, dtype, gate, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forced", ["rebuild", "fused", None])
def test_sampled_score_gradient(dtype, forced, path) -> None:
    """A closed layer learns from the rows that were picked, which alone are kept."""
    if forced == "fused" and dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("not a case of the fused kernels: 16-bit types")
    path(forced)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    host = [draw(6, 5, 64, dtype=dtype), draw(48, 64, dtype=dtype), draw(48, 64, dtype=wide)]
    host.append(torch.tensor(0.05, dtype=wide))
    got, want = on_device(host, (1,)), exact(host, (1,))
    rows = torch.tensor([3, 4, 17, 29])
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        output = gated_linear(*got, gate=False, rows=rows.cuda(), row_scale=7.5)
    assert 4 * 64 in sizes and 30 * 64 not in sizes
    expected = reference.gated_linear(*want, gate=False, rows=rows, row_scale=7.5)
    grad = draw(6, 5, 48, dtype=dtype)
    output.backward(grad.cuda())
    expected.backward(grad.double())
    taken = [t.flatten(0, 1)[rows] for t in (grad, host[0])]
    assert_close(got[0].grad.cpu(), want[0].grad, dtype, 48, grad, host[1])
    assert_close(got[3].grad.cpu(), want[3].grad, dtype, 4, 7.5 * taken[0], taken[1], host[2], outer=48 * 64)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_conv2d(name, dtype, gate, layout) -> None:
    arguments = dict(CONVS[name])
    shape = arguments.pop("shape")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    host = [draw(3, 16, 14, 13, dtype=dtype), draw(*shape, dtype=dtype), draw(*shape, dtype=wide)]
    host = [t.to(memory_format=layout) for t in host]
    host += [torch.tensor(0.05 if gate is None else 0.15, dtype=wide), draw(shape[0], dtype=dtype)]
    got, want = on_device(host), exact(host)
    is_open = bool(gate)
    output = gated_conv2d(*got, **arguments, gate=gate)
    expected = reference.gated_conv2d(*want, **arguments, gate=is_open)
    wt = host[1].double() + (host[2].double() if is_open else 0)
    assert_close(output.cpu(), expected, dtype, wt[0].numel() + 1, host[0], wt)
    grad = draw(*output.shape, dtype=dtype)
    output.backward(grad.to(memory_format=layout).cuda())
    expected.backward(grad.double())
    places = grad[:, 0].numel()
    weight_side = (places, (grad, host[0]), 1)
    bounds = [
        (wt.numel() // 16, (grad, wt), 1),
        weight_side,
        weight_side,
        (places, (grad, host[0], host[2]), wt.numel()),
        (places, (grad,), 1),
    ]
    compare_gradients(got, want, dtype, gate, bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", [g for g in GATES if g.id != "closed"])
@pytest.mark.parametrize("name", ["1x1", "3x3", "stride", "odd"])
@pytest.mark.parametrize("images", [1, 3])
def test_fused_conv2d(images, name, gate, dtype, path) -> None:
    """The forward, laid out as torch would; Delta in the compute type and in fp32."""
    arguments = dict(CONVS[name])
    shape = arguments.pop("shape")
    for wide in (dtype, torch.float32):
        host = [draw(images, 16, 4, 5, dtype=dtype), draw(*shape, dtype=dtype), draw(*shape, dtype=wide)]
        host = [t.to(memory_format=torch.channels_last) for t in host]
        score, bias = torch.tensor(0.15), draw(shape[0], dtype=dtype)
        path("fused")
        output = gated_conv2d(*[t.cuda() for t in (*host, score, bias)], **arguments, gate=gate)
        assert ops._C.taken_path() == "fused"
        path(None)
        wt = host[1].double() + host[2].double()
        want = F.conv2d(host[0].double(), wt, bias.double(), **arguments)
        assert_close(output.cpu(), want, dtype, wt[0].numel() + 1, host[0], wt)
        assert output.stride() == F.conv2d(host[0].cuda(), host[1].cuda(), **arguments).stride()


def test_closed_is_the_stock_op_to_the_bit() -> None:
    x, w, b = (draw(*s, dtype=torch.bfloat16).cuda() for s in ((64, 256), (128, 256), (128,)))
    delta = torch.full((128, 256), float("nan"), device="cuda")
    score = torch.tensor(0.05, device="cuda")
    assert torch.equal(gated_linear(x, w, delta, score, b, gate=False), F.linear(x, w, b))
    image, kernel = (
        draw(2, 16, 9, 9, dtype=torch.float32).cuda(),
        draw(8, 16, 3, 3, dtype=torch.float32).cuda(),
    )
    extra = torch.full_like(kernel, float("inf"))
    assert torch.equal(
        gated_conv2d(image, kernel, extra, score, padding=1, gate=False), F.conv2d(image, kernel, padding=1)
    )


@pytest.mark.parametrize("forced,dtype,k", [("rebuild", torch.float32, 257), ("fused", torch.bfloat16, 4096)])
@pytest.mark.parametrize("gate", GATES)
def test_twice_the_same_bits(gate, forced, dtype, k, path) -> None:
    path(forced)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        case = [draw(130, k, dtype=dtype), draw(130, k, dtype=dtype), draw(130, k, dtype=torch.float32)]
        case = on_device([*case, torch.tensor(0.15), draw(130, dtype=dtype)], frozen=(1,))
        gated_linear(*case, gate=gate).square().sum().backward()
        runs.append([t.grad for t in case if t.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_synchronisation(dtype) -> None:
    """Neither gate mode waits for the device, forward or backward."""
    case = [draw(8, 4096, dtype=dtype), draw(64, 4096, dtype=dtype), draw(64, 4096, dtype=torch.float32)]
    case = on_device(case, frozen=(1,))
    score = torch.tensor(0.15, device="cuda", requires_grad=True)
    gated_linear(*case, score).square().sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gate in (None, True, False):
            gated_linear(*case, score, gate=gate).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows,dtype", [(256, torch.float32), (16, torch.bfloat16)])
def test_streams_have_workspaces_of_their_own(rows, dtype) -> None:
    """Interleaved work of two streams equals what each gives alone: W_t's buffer, and the sums of a split depth."""
    torch.manual_seed(4)
    shapes = ((rows, 4096), (512, 4096), (512, 4096))
    cases = [[t.detach() for t in on_device([draw(*s, dtype=dtype) for s in shapes])] for _ in range(2)]
    want = [gated_linear(*case, gate=True) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(gated_linear(*cases[i], gate=True))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want[i]) for i in range(2) for out in outputs[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_graph_follows_the_score(dtype) -> None:
    """A replayed graph reads the score where it lives: opening and closing need no new capture."""
    x, w, d = (draw(*s, dtype=dtype).cuda() for s in ((16, 4096), (32, 4096), (32, 4096)))
    score = torch.tensor(0.15, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gated_linear(x, w, d, score)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gated_linear(x, w, d, score)
    for value, wt in ((0.15, w + d), (0.05, w), (0.2, w + d)):
        score.fill_(value)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out.cpu(), x.double().cpu() @ wt.double().cpu().t(), dtype, 4096, x.cpu(), wt.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", [True, False, None])
def test_opcheck(gate, dtype) -> None:
    tensors = [draw(*s, dtype=dtype).cuda() for s in ((3, 6), (4, 6))]
    tensors.append(draw(4, 6, dtype=torch.float32).cuda())
    score, bias = torch.tensor(0.15, device="cuda"), draw(4, dtype=dtype).cuda()
    torch.library.opcheck(torch.ops.taps_ext.gated_linear.default, (*tensors, score, bias, gate, 0.1))
    grad = draw(3, 4, dtype=dtype).cuda()
    for weight in (True, False):  # with and without the one gradient that the fused kernels do not give
        mask = [True, gate is not False, True, True, weight]
        arguments = (grad, *tensors, score, gate, 0.1, mask, None, 1.0)
        torch.library.opcheck(torch.ops.taps_ext.gated_linear_backward.default, arguments)


@pytest.mark.parametrize("inputs", [96, 95, 89])
@pytest.mark.parametrize("offset,padding", [(0, 8), (2, 2), (8, 8), (2, 8)])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_fused_layouts(offset, padding, wide_weight, inputs, path) -> None:
    """Rows at 4 and at 16 bytes that end off them, a strided bias, samples picked; W in fp32 as in autocast."""
    path("fused")
    kind = torch.float32 if wide_weight else torch.bfloat16
    part = slice(offset, offset + inputs)
    wide = [draw(6, 5, 96 + padding, dtype=torch.bfloat16)]
    wide += [draw(40, 96 + offset + padding, dtype=dtype) for dtype in (kind, torch.float32)]
    wide += [torch.tensor(0.2), draw(80, dtype=torch.bfloat16)]

    def narrow(tensors):
        x, w, d, score, bias = tensors
        return x[..., :inputs], w[:, part], d[:, part], score, bias[::2]

    x, w, d, _, bias = narrow(wide)
    on = narrow([t.cuda() for t in wide])  # cut on the device: a copy would be dense
    assert on[1].stride() == w.stride() and on[4].stride() == (2,)
    y = torch.ops.taps_ext.gated_linear(*on, None, 0.1)
    wt = w.double() + d.double()
    assert_close(y.cpu(), x.double() @ wt.t() + bias.double(), torch.bfloat16, inputs + 1, x, wt)
    grad, picked = draw(6, 5, 40, dtype=torch.bfloat16), torch.tensor([4, 1, 2])
    mask = [True, True, True, True, False]
    rows = (5 * picked[:, None] + torch.arange(5)).flatten()  # of x as a matrix
    taken = torch.empty_strided((15, inputs), (96 + padding, 1), dtype=x.dtype, device="cuda")
    taken.copy_(x[picked].flatten(0, 1))
    arguments = (grad.cuda(), taken, *on[1:4], None, 0.1, mask, rows.cuda(), 2.0)
    dx, dd, ds, db, _ = (t.cpu() for t in torch.ops.taps_ext.gated_linear_backward(*arguments))
    g = grad[picked].double().flatten(0, 1).t() @ x[picked].double().flatten(0, 1)
    assert_close(dx, grad.double() @ wt, torch.bfloat16, 40, grad, wt)
    assert_close(dd, 2 * g, torch.float32, 15, 2 * grad, x)
    assert_close(ds, 2 * (g * d.double()).sum(), torch.float32, 15, 2 * grad, x, d, outer=40 * inputs)
    assert_close(db, grad.double().sum((0, 1)), torch.bfloat16, 30, grad)


def test_a_captured_backward_follows_the_score(path) -> None:
    """The fused backward in a graph, with scratch memory for split sums and for <G, Delta>."""
    path("fused")
    x, w, d, grad = (draw(*s, dtype=torch.bfloat16).cuda() for s in ((16, 64), (4096, 64), (4096, 64), (16, 4096)))
    score = torch.tensor(0.15, device="cuda")
    mask = [True, True, True, False, False]

    def run():
        return torch.ops.taps_ext.gated_linear_backward(grad, x, w, d, score, None, 0.1, mask, None, 1.0)[:3]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for value in (0.15, 0.05, 0.2):
        score.fill_(value)
        want = run()
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
        assert bool(results[1].any()) == (value >= 0.1)


def test_fused_takes_no_weight_sized_memory(path) -> None:
    """Law 2: forward and input gradient of an open layer allocate their results alone; the workspace stays small."""
    path("fused")
    ops._C.workspace_clear()
    x, w, d = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((8, 4096), (4096, 4096), (4096, 4096)))
    grad, score = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16), torch.tensor(0.2, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gated_linear(x, w, d, gate=True)
    mask = [True, False, True, False, False]
    torch.ops.taps_ext.gated_linear_backward(grad, x, w, d, score, None, 0.1, mask, None, 1.0)
    assert torch.cuda.max_memory_allocated() - before < w.nbytes / 8


@pytest.mark.parametrize("forced", ["fused", "rebuild"])
def test_more_than_two_to_the_31_elements(forced, path) -> None:
    """Offsets into W, Delta and its gradient beyond 32 bits: the last rows are right."""
    outputs, inputs, rows = 2**25 + 40, 64, 8
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    path(forced)
    w = torch.zeros(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    d = torch.zeros_like(w)
    last = slice(outputs - 70, None)
    w[last], d[last] = torch.randn(2, 70, inputs, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    grad = torch.zeros(rows, outputs, device="cuda", dtype=torch.bfloat16)
    grad[:, last] = torch.randn(rows, 70, device="cuda", dtype=torch.bfloat16)
    host = [t.double().cpu() for t in (x, w[last], d[last], grad[:, last])]
    wt = host[1] + host[2]
    y = gated_linear(x, w, d, gate=True)
    assert not y[:, : outputs - 70].any()
    assert_close(y[:, last].cpu(), host[0] @ wt.t(), torch.bfloat16, inputs, host[0], wt)
    del y
    score = torch.tensor(0.2, device="cuda")
    mask = [True, True, True, False, False]
    dx, dd, ds, _, _ = torch.ops.taps_ext.gated_linear_backward(grad, x, w, d, score, True, 0.1, mask, None, 1.0)
    g = host[3].t() @ host[0]
    assert_close(dx.cpu(), host[3] @ wt, torch.bfloat16, 70, host[3], wt)
    assert not dd[: outputs - 70].any()
    assert_close(dd[last].cpu(), g, torch.bfloat16, rows, host[3], host[0])
    assert_close(ds.cpu(), (g * host[2]).sum(), torch.bfloat16, rows, host[3], host[0], host[2], outer=70 * inputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    x, w, d = (draw(*s, dtype=torch.bfloat16).to("cuda:1") for s in ((8, 64), (64, 64), (64, 64)))
    score = torch.tensor(0.2, device="cuda:1", requires_grad=True)
    delta = d.requires_grad_()
    y = gated_linear(x, w, delta, score)
    y.sum().backward()
    assert y.device == delta.grad.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    wt = (w.double() + delta.double()).detach().cpu()
    assert_close(y.cpu(), x.double().cpu() @ wt.t(), torch.bfloat16, 64, x.cpu(), wt)


def test_gradcheck() -> None:
    x, w, d = (draw(*s).cuda().requires_grad_() for s in ((3, 5), (4, 5), (4, 5)))
    assert torch.autograd.gradcheck(lambda x, w, d: gated_linear(x, w, d, gate=True), (x, w, d))
    x, w, d = (draw(*s).cuda().requires_grad_() for s in ((2, 4, 5, 6), (6, 2, 3, 3), (6, 2, 3, 3)))

    def convolution(x, w, d):
        return gated_conv2d(x, w, d, padding=1, groups=2, gate=True)

    # cuDNN may add up its weight gradient with atomics: fp64 sums of 60 terms of order 1, in another order.
    assert torch.autograd.gradcheck(convolution, (x, w, d), nondet_tol=1e-12)


def test_tensors_on_different_devices_are_refused() -> None:
    with pytest.raises((RuntimeError, ValueError), match="delta|weight|device"):
        gated_linear(torch.ones(2, 3).cuda(), torch.ones(4, 3).cuda(), torch.ones(4, 3), torch.tensor(0.2).cuda())


def test_empty() -> None:
    out = gated_linear(torch.ones(0, 3).cuda(), torch.ones(4, 3).cuda(), torch.ones(4, 3).cuda(), gate=True)
    assert out.shape == (0, 4)
    ops.reconstruct_(torch.empty(0).cuda(), torch.empty(0).cuda(), torch.empty(0).cuda(), gate=True)
