"""Open layers rebuilt without an operator's call: the bits are the operator's, and everything else is left to it."""

import itertools
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from taps_ext import gated_conv2d, gated_linear, ops, workspace_bytes

C = ops._C
if C is None:
    pytest.skip("the extension is missing, and with it the rebuild", allow_module_level=True)

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def watch(monkeypatch: pytest.MonkeyPatch, owner, *names: str) -> list[bool]:
    """Whether each call of some functions did the work."""
    made: list[bool] = []

    def watched(function):
        def call(*args):
            result = function(*args)
            made.append(result is not None)
            return result

        return call

    for name in names:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product was made here."""
    return watch(monkeypatch, C, "linear", "conv2d")


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("delta_kind", [torch.float32, None], ids=["float32", "alike"])
def test_linear_is_the_operator(calls, kind, delta_kind) -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(3, 40, 20).to(kind), torch.randn(9, 20).to(kind), torch.randn(9, 20).to(delta_kind or kind)
    for bias in (None, torch.randn(9).to(kind)):
        with torch.no_grad():
            expected = torch.ops.taps_ext.gated_linear(x, w, d, None, bias, True, 0.1)
            assert torch.equal(gated_linear(x, w, d, None, bias, gate=True), expected)
    assert calls == [True, True]


@pytest.mark.parametrize("kind", TYPES[:3], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grouped", [1, 2])
def test_conv2d_is_the_operator(calls, kind, layout, grouped) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 8, 9, 9).to(kind)
    w, d = (torch.randn(6, 8 // grouped, 3, 3).to(k).contiguous(memory_format=layout) for k in (kind, torch.float32))
    geometry = ((2, 1), (1, 0), (1, 2), grouped)
    with torch.no_grad():
        expected = torch.ops.taps_ext.gated_conv2d(x, w, d, None, None, *geometry, True, 0.1)
        output = gated_conv2d(x, w, d, None, None, *geometry, gate=True)
    assert torch.equal(output, expected) and output.stride() == expected.stride() and calls == [True]


def test_training_takes_it_and_gives_the_same_gradients(calls) -> None:
    found = []
    for watch in (nullcontext, BaseTorchFunctionMode):  # under a mode the operator does the work
        torch.manual_seed(2)
        x, d = torch.randn(5, 12, requires_grad=True), torch.randn(7, 12, requires_grad=True)
        w, score = torch.randn(7, 12), torch.tensor(0.2, requires_grad=True)
        with watch():
            output = gated_linear(x, w, d, score, gate=True)
        output.square().sum().backward()
        found.append((output.detach(), x.grad, d.grad, score.grad))
    assert all(map(torch.equal, *found)) and calls == [True, False]


@pytest.mark.parametrize("path", ["rebuild", "stock"])
def test_a_forced_path_is_kept(calls, path) -> None:
    x, w, d = torch.randn(3, 12), torch.randn(8, 12), torch.randn(8, 12)
    C.force_path(path)
    try:
        with torch.no_grad():
            if path == "rebuild":
                assert torch.equal(gated_linear(x, w, d, gate=True), F.linear(x, w + d))
            else:
                with pytest.raises(RuntimeError, match="stock is forced"):
                    gated_linear(x, w, d, gate=True)
    finally:
        C.force_path(None)
    assert calls == ([True] if path == "rebuild" else [])


def test_what_is_left_to_the_operator(calls) -> None:
    """Other layouts, an unknown gate, a bias of another type, and whoever watches operators."""
    x, w, d = torch.randn(3, 12), torch.randn(8, 12), torch.randn(8, 12)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = gated_linear(x, w, d, gate=True)
        assert calls.pop()
        for own, delta in itertools.product((w, w.t().contiguous().t()), (d, d.t().contiguous().t())):
            torch.testing.assert_close(gated_linear(x, own, delta, gate=True), expected)
        assert calls == [True, False, False, False]
        calls.clear()
        gated_linear(x, w, d, torch.tensor(0.2))
        gated_linear(x, w, d, None, torch.zeros(8, dtype=torch.float64), gate=True)
        gated_linear(x, w, d, gate=True, rows=torch.tensor([0]))
        assert calls == [False]
        traced = torch.jit.trace(lambda own: gated_linear(own, w, d, gate=True), x)
        gated_linear(x, torch.zeros(8, 12), torch.zeros(8, 12), gate=True)  # into the same workspace
        assert torch.equal(traced(x), expected) and "taps_ext::gated_linear" in str(traced.graph)
        minus = torch._neg_view(w)
        torch.testing.assert_close(gated_linear(x, minus, d, gate=True), F.linear(x, d - w))
        calls.clear()
        with Watch():
            gated_linear(x, w, d, gate=True)
        assert "taps_ext.gated_linear.default" in seen and calls == [False]
        with pytest.raises(RuntimeError, match="input: expected"):
            gated_linear(torch.randn(3, 11), w, d, gate=True)
        for wrong in (torch.zeros(7), torch.zeros(1), torch.zeros(3, 8)):  # torch would broadcast the last two
            with pytest.raises(RuntimeError, match="bias: expected"):
                gated_linear(x, w, d, None, wrong, gate=True)
        with pytest.raises(RuntimeError, match="score: expected"):
            gated_linear(x, w, d, torch.tensor(0.2).half(), gate=True)


def test_views_of_memory_that_was_given_back_are_never_read() -> None:
    """The workspace is freed, grown and shared while cached views of it remain."""
    torch.manual_seed(3)
    cases = [
        (torch.randn(4, k), torch.randn(n, k), torch.randn(n, k)) for n, k in ((5, 7), (300, 200), (64, 65), (9, 3))
    ]
    wrong = []

    def work() -> None:
        with torch.no_grad():
            for index in range(300):
                x, w, d = cases[index % 4]
                if not torch.equal(gated_linear(x, w, d, gate=True), F.linear(x, w + d)):
                    wrong.append(index)
                if index % 7 == 0:
                    C.workspace_clear()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    C.workspace_clear()
    assert workspace_bytes() == 0  # every lease has come back


def test_an_error_gives_the_workspace_back() -> None:
    """Torch's own, for a result that no memory holds, after W_t was made."""
    x, w = torch.ones(1).expand(2**42, 12), torch.ones(8, 12)
    with torch.no_grad():
        assert C.linear(x, w, w, None, None, True, True, True) is None
        with pytest.raises(RuntimeError, match="alloc|on stderr"):
            gated_linear(x, w, w, gate=True)
    C.workspace_clear()
    assert workspace_bytes() == 0


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 1, 1), ([2, 1], (0, 2), [1]), ((1,), "same", 1), (2, "valid", (2, 1))]
)
def test_every_way_to_say_a_geometry(calls, stride, padding, dilation) -> None:
    torch.manual_seed(7)
    x, w, d = torch.randn(2, 8, 20, 20), torch.randn(6, 8, 3, 3), torch.randn(6, 8, 3, 3)
    with torch.no_grad():
        output = gated_conv2d(x, w, d, None, None, stride, padding, dilation, gate=True)
        assert torch.equal(output, F.conv2d(x, w + d, None, stride, padding, dilation))
    assert calls == [True]


@pytest.mark.parametrize("side", [3, 7, 14, 28])
@pytest.mark.parametrize("step", [1, 2])
def test_a_convolution_takes_the_operators_path(side, step) -> None:
    x, w, d = torch.randn(1, 512, side, side), torch.randn(512, 512, 3, 3), torch.randn(512, 512, 3, 3)
    paths = []
    with torch.no_grad():
        for run in (
            lambda: gated_conv2d(x, w, d, None, None, step, 1, gate=True),
            lambda: torch.ops.taps_ext.gated_conv2d(x, w, d, None, None, (step,) * 2, (1, 1), (1, 1), 1, True, 0.1),
        ):
            C.taken_path()
            run()
            paths.append(C.taken_path())
    assert paths[0] == paths[1] is not None


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", ["input", "weight", "delta", "bias", "score"])
@pytest.mark.parametrize("offset", [0, 20, 2**20])
@pytest.mark.parametrize("gate", [True, None])
def test_memory_freed_before_the_call(name, offset, gate) -> None:
    """Of a view, too, whose address is not null then, and of one that torch would copy before it looks."""
    shapes = {"input": (2, 4, 12), "weight": (8, 6), "delta": (8, 6), "bias": (8,), "score": (1,)}
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    whole = torch.ones(offset + tensors[name].numel())
    tensors[name] = whole[offset:].view(shapes[name])
    tensors["input"] = tensors["input"][:, :, ::2]
    freed(whole)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{name}: expected a tensor of shape .* has been freed"):
        gated_linear(**tensors, gate=gate)


@pytest.mark.parametrize("name", ["input", "weight", "delta", "bias"])
def test_memory_of_a_convolution_freed_before_the_call(name) -> None:
    last = torch.channels_last
    tensors = {"input": torch.ones(1, 64, 7, 7), "weight": torch.ones(64, 64, 3, 3).contiguous(memory_format=last)}
    tensors |= {"delta": tensors["weight"].clone(), "bias": torch.ones(64)}
    freed(tensors[name])
    for gradients in (False, True):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(RuntimeError, match=f"{name}: expected .* has been freed"),
        ):
            gated_conv2d(**tensors, score=torch.ones(1, requires_grad=True), padding=1, gate=True)


@pytest.mark.parametrize("channels", [16, 512])
def test_bools_are_ints_whatever_the_path(channels) -> None:
    x, w = torch.ones(1, channels, 7, 7), torch.ones(channels, channels, 3, 3)
    with torch.no_grad():
        for geometry in ((True, True, 1, 1), (1, (False, True), 1, 1), ((True, 2), 1, [True], 1), (1, 1, 1, True)):
            numbers = [tuple(map(int, g)) if isinstance(g, (tuple, list)) else int(g) for g in geometry]
            expected = gated_conv2d(x, w, w, None, None, *numbers, gate=True)
            assert torch.equal(gated_conv2d(x, w, w, None, None, *geometry, gate=True), expected)


def test_what_the_kernels_could_not_read_is_refused() -> None:
    """Of fused layers, which no function of torch's looks at after the decision."""
    x, w, d = torch.randn(2, 768), torch.randn(768, 768), torch.randn(768, 768)
    images, kernels = torch.randn(1, 512, 7, 7), torch.randn(512, 512, 3, 3)

    def linear(x, w, d, bias=None, gate=True, training=False, outermost=True):
        return C.linear(x, w, d, None, bias, gate, training, outermost)

    def conv2d(x, padding=1, groups=1):
        return C.conv2d(x, kernels, kernels, None, None, 1, padding, 1, groups, True, False, True)

    with torch.no_grad():
        assert linear(x, w, d) is not None and conv2d(images) is not None
        assert linear(x, w, d[:5]) is linear(x, w, d.view(-1)) is linear(x[:, :5], w, d) is None
        for bias in (torch.ones(768).bfloat16(), torch.ones(767), torch.ones(1), torch.ones(1, 768)):
            assert linear(x, w, d, bias) is None
        assert linear(x, w, d, torch.ones(2 * 768)[::2]) is linear(torch._neg_view(x), w, d) is None
        assert linear(x, w, d, torch._neg_view(torch.ones(768))) is None
        assert linear(x, w.bfloat16(), d) is linear(x.bfloat16(), w, d, None, False, True, False) is None
        assert linear(torch.randn(2, 3, 1000)[:, :, :768], w, d) is None  # the operator reads it where it is
        assert conv2d(images[:, :511]) is conv2d(images, 1, 2) is conv2d(images[:, :, :2, :2], 0) is None
        assert conv2d(images, 0) is not None
        C.force_path("rebuild")
        try:
            assert linear(x, w, d, None, False, True, False) is None
        finally:
            C.force_path(None)


@pytest.mark.parametrize("turn", [torch._neg_view, lambda t: torch.stack((t, t), -1)[..., 0]], ids=["minus", "spread"])
def test_odd_views_give_what_the_operator_gives(turn) -> None:
    torch.manual_seed(8)
    x, w, d, bias = torch.randn(2, 768), torch.randn(768, 768), torch.randn(768, 768), torch.randn(768)
    with torch.no_grad():
        for operands in ((turn(x), w, d, bias), (x, w, d, turn(bias)), (x, turn(w), d, bias), (x, w, turn(d), bias)):
            expected = torch.ops.taps_ext.gated_linear(*operands[:3], None, operands[3], True, 0.1)
            assert torch.equal(gated_linear(*operands[:3], None, operands[3], gate=True), expected)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no default tensor type but the CPU's")
def test_results_are_on_the_cpu_whatever_the_default() -> None:
    """Of the kernels' own, for whose memory torch is asked."""
    code = """
import torch
from taps_ext import gated_linear
x, w = torch.ones(2, 768), torch.ones(768, 768)
torch.set_default_tensor_type("torch.cuda.FloatTensor")
with torch.no_grad():
    assert gated_linear(x, w, w, gate=True).device.type == "cpu"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_profiler_sees_operators() -> None:
    x, w = torch.ones(2, 768), torch.ones(768, 768)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        gated_linear(x, w, w, gate=True)
    assert "taps_ext::gated_linear" in {event.key for event in seen.key_averages()}


def test_what_is_no_plain_tensor_is_not_touched(calls) -> None:
    class Own(torch.Tensor):
        pass

    x, w, d = torch.randn(4, 6), torch.randn(8, 6), torch.randn(8, 6)
    with torch.no_grad():
        for odd in (d.as_subclass(Own), d.to_sparse(), d.to("meta"), d.int(), d[:, :4], d.expand(2, 8, 6), None, 3.0):
            assert C.linear(x, w, odd, None, None, True, False, True) is None
            assert odd is None or C.linear(x, odd, d, None, None, True, False, True) is None
        for score in (torch.tensor([0.1, 0.2]), torch.tensor(1), torch.tensor(0.2).half(), 0.2):
            assert C.linear(x, w, d, score, None, True, False, True) is None
        assert C.linear(x, w, d, torch.tensor(0.2), torch.zeros(8), True, False, True) is not None
        assert torch.equal(gated_linear(x, w, d.as_subclass(Own), gate=True), F.linear(x, w + d))
        with torch.autocast("cpu", torch.bfloat16):
            assert C.linear(x, w, d, None, None, True, False, True) is None
            assert gated_linear(x, w, d, gate=True).dtype == torch.bfloat16
    for geometry in (("same", 1, 1), (1, 2**40, 1), (1, -1, 1), (1, (1, 1, 1), 1), (0, 1, 1), (1, 0, 9), (1.5, 1, 1)):
        images, kernels = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
        assert C.conv2d(images, kernels, kernels, None, None, *geometry, 1, True, False, True) is None


def test_a_delta_that_is_a_negative_view() -> None:
    x, w, d = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(gated_linear(x, w, torch._neg_view(d), gate=True), F.linear(x, w - d))
