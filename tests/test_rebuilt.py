"""Open layers rebuilt without an operator's call: the bits are the operator's, and everything else is left to it."""

import itertools
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from taps_ext import gated_conv2d, gated_linear, ops, rebuilt, set_workspace_limit, workspace_bytes

C = ops._C
if C is None:
    pytest.skip("the extension is missing, and with it the rebuild", allow_module_level=True)

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Whether each call of a function of `rebuilt` did the work."""
    made: list[bool] = []
    function = getattr(rebuilt, name)

    def watched(*args):
        result = function(*args)
        made.append(result is not None)
        return result

    monkeypatch.setattr(rebuilt, name, watched)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product was made here."""
    return watch(monkeypatch, "product")


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
    assert calls == [path == "rebuild"]


def test_what_is_left_to_the_operator(calls) -> None:
    """Other layouts, an unknown gate, a bias of another type, a limit, and whoever watches operators."""
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
        assert not calls
        traced = torch.jit.trace(lambda own: gated_linear(own, w, d, gate=True), x)
        gated_linear(x, torch.zeros(8, 12), torch.zeros(8, 12), gate=True)  # into the same workspace
        assert torch.equal(traced(x), expected) and "taps_ext::gated_linear" in str(traced.graph)
        minus = torch._neg_view(w)
        torch.testing.assert_close(gated_linear(x, minus, d, gate=True), F.linear(x, d - w))
        calls.clear()
        with Watch():
            gated_linear(x, w, d, gate=True)
        assert "taps_ext.gated_linear.default" in seen and calls == [False]
        set_workspace_limit(200)
        try:
            gated_linear(x, w, d, gate=True)
        finally:
            set_workspace_limit(None)
        assert calls == [False, False]
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
    set_workspace_limit(None)
    assert workspace_bytes() == 0 and not rebuilt._views  # every lease has come back, and no view of the memory is left


def test_an_error_gives_the_workspace_back() -> None:
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    w = torch.ones(8, 12)
    with pytest.raises(Stop):
        rebuilt.product(C, stop, torch.ones(3, 12), w, w, True, -1)
    set_workspace_limit(None)
    assert workspace_bytes() == 0


def test_few_views_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilt, "_MOST", 3)
    rebuilt._views.clear()
    with torch.inference_mode():  # and a view that is made here serves outside
        for n in range(1, 9):
            gated_linear(torch.ones(2, 4), torch.ones(n, 4), torch.ones(n, 4), gate=True)
            assert len(rebuilt._views) <= 3
    x = torch.ones(2, 4, requires_grad=True)
    gated_linear(x, torch.ones(8, 4), torch.ones(8, 4), gate=True).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 4), 16.0))


def _gradients(x, w, d, score, bias, gate, dy, **more) -> list[torch.Tensor]:
    """Of the leaves among them, by a fresh graph."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, d, score, bias)]
    output = gated_linear(leaves[0], w, leaves[1], leaves[2], leaves[3], gate=gate, **more)
    output.backward(dy)
    return [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each linear layer's gradients were made here."""
    return watch(monkeypatch, "linear_gradients")


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("gate", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("leading", [(1,), (7,), (130,), (2, 3), (4, 1), (3, 2, 5), ()], ids=str)
def test_linear_gradients_are_the_operators(monkeypatch, backward_calls, kind, gate, leading) -> None:
    torch.manual_seed(4)
    w, d = torch.randn(9, 20).to(kind), torch.randn(9, 20).to(kind)
    layouts = {"dense": lambda t: t}
    if leading:
        layouts["turned"] = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
        layouts["spread"] = lambda t: torch.stack((t, t), -1)[..., 0]
    for bias, score in ((None, torch.tensor(0.2)), (torch.randn(9).to(kind), torch.tensor([0.2], dtype=torch.float64))):
        for laid in layouts.values():
            x, dy = laid(torch.randn(*leading, 20).to(kind)), laid(torch.randn(*leading, 9).to(kind))
            here = _gradients(x, w, d, score, bias, gate, dy)
            with monkeypatch.context() as patch:
                patch.setattr(rebuilt, "linear_gradients", lambda *_: None)
                operators = _gradients(x, w, d, score, bias, gate, dy)
            assert len(here) == 2 + gate + (bias is not None)
            for a, b in zip(here, operators, strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape
    assert backward_calls and all(backward_calls)


def test_gradients_that_are_left_to_the_operator(backward_calls) -> None:
    torch.manual_seed(5)
    x, w, d, dy, score = *(torch.randn(*s) for s in ((5, 12), (8, 12), (8, 12), (5, 8))), torch.tensor(0.2)
    usual = {gate: _gradients(x, w, d, score, None, gate, dy) for gate in (True, False)}
    assert backward_calls == [True, True]
    backward_calls.clear()
    for gate, expected in usual.items():
        for limit in (200, None):
            set_workspace_limit(limit)
            try:
                for a, b in zip(_gradients(x, w, d, score, None, gate, dy), expected, strict=True):
                    torch.testing.assert_close(a, b)
            finally:
                set_workspace_limit(None)
        C.force_path("rebuild")
        try:
            for a, b in zip(_gradients(x, w, d, score, None, gate, dy), expected, strict=True):
                assert torch.equal(a, b)
        finally:
            C.force_path(None)
    assert backward_calls == [False, True, True, False, True, False]
    backward_calls.clear()
    _gradients(x, w, d, score, None, False, dy, rows=torch.tensor([0, 3]), row_scale=2.5)  # a sample of them
    _gradients(x, w, d, score, None, None, dy)  # a gate that only the device knows
    gated_linear(x, w, d.clone().requires_grad_(), gate=True).backward(dy)  # no score, no gradient of x
    gated_linear(x.clone().requires_grad_(), w, d, score.clone().requires_grad_(), gate=True).backward(dy)
    whole = w.clone().requires_grad_()
    gated_linear(x, whole, d, score.clone().requires_grad_(), gate=True).backward(dy)
    assert not backward_calls and whole.grad is not None
    narrow = [t.bfloat16() for t in (x, w, dy)]
    _gradients(narrow[0], narrow[1], d, score, None, True, narrow[2])  # Delta in another type
    assert backward_calls == [False]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_closed_delta_that_is_not_finite_is_refused_here_too(backward_calls, bad) -> None:
    x, w, d = torch.ones(2, 4), torch.ones(3, 4), torch.full((3, 4), bad)
    with pytest.raises(RuntimeError, match="delta: expected finite values in a closed layer"):
        _gradients(x, w, d, torch.tensor(0.0), None, False, torch.ones(2, 3))
    assert backward_calls == [False]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        leaf = x.requires_grad_()
        output = gated_linear(
            leaf, w, torch.ones(3, 4, requires_grad=True), torch.tensor(0.2, requires_grad=True), gate=True
        )
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 0), (0, 4)])
@pytest.mark.parametrize("gate", [True, False])
def test_gradients_of_layers_without_weights(outputs, inputs, gate) -> None:
    w, d, score = torch.randn(outputs, inputs), torch.zeros(outputs, inputs), torch.tensor(0.2)
    x_grad, *_ = _gradients(torch.randn(2, 3, inputs), w, d, score, None, gate, torch.ones(2, 3, outputs))
    assert x_grad.shape == (2, 3, inputs)


@pytest.mark.parametrize("gate", [True, False])
def test_backward_inside_autocast(gate, monkeypatch) -> None:
    """Of a layer that ran outside: the operator's gradients, of its type, whatever autocast makes of products."""
    torch.manual_seed(4)
    x, w, d = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8), torch.randn(5, 8).requires_grad_(gate)
    found = []
    for _ in range(2):
        score = torch.tensor(0.15 if gate else 0.05, requires_grad=True)
        loss = gated_linear(x, w, d, score, gate=gate).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(loss, [x, score, d] if gate else [x, score]))
        monkeypatch.setattr(rebuilt, "linear_gradients", lambda *_: None)
    assert all(map(torch.equal, *found)) and all(grad.dtype == torch.float32 for grad in found[0])


@pytest.mark.parametrize("name", ["delta", "weight", "input"])
@pytest.mark.parametrize("gate", [True, False])
def test_memory_freed_before_backward(gate, name) -> None:
    tensors = {"input": torch.randn(4, 6), "weight": torch.randn(8, 6), "delta": torch.randn(8, 6).requires_grad_(gate)}
    score = torch.tensor(0.15 if gate else 0.05, requires_grad=True)
    x = tensors["input"].requires_grad_()
    y = gated_linear(x, tensors["weight"], tensors["delta"], score, gate=gate)
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor of shape .* whose storage has been freed"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("gate", [True, False])
def test_batched_gradients(gate) -> None:
    """`is_grads_batched`, whose tensors look like plain ones: the operator's, and no memory stays leased."""
    torch.manual_seed(5)
    x, w, d = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4, 6).requires_grad_(gate)
    score, vectors = torch.tensor(0.15 if gate else 0.05, requires_grad=True), torch.randn(2, 3, 4)
    y = gated_linear(x, w, d, score, gate=gate)
    learned = [x, score, d] if gate else [x, score]
    want = [torch.autograd.grad(y, learned, vector, retain_graph=True) for vector in vectors]
    got = torch.autograd.grad(y, learned, vectors, is_grads_batched=True)
    for index, grad in enumerate(got):
        torch.testing.assert_close(grad, torch.stack([one[index] for one in want]))
    set_workspace_limit(None)
    assert workspace_bytes() == 0


def test_a_delta_that_is_a_negative_view() -> None:
    x, w, d = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(gated_linear(x, w, torch._neg_view(d), gate=True), F.linear(x, w - d))
