"""Gradients of linear layers without an operator's call: the bits are the operator's, the rest is left to it."""

import pytest
import torch
from test_direct import TYPES, C, watch

from taps_ext import eager, gated_linear, set_workspace_limit, workspace_bytes


def _gradients(x, w, d, score, bias, gate, dy, **more) -> list[torch.Tensor]:
    """Of the leaves among them, by a fresh graph."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, d, score, bias)]
    output = gated_linear(leaves[0], w, leaves[1], leaves[2], leaves[3], gate=gate, **more)
    output.backward(dy)
    return [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each linear layer's gradients were made here."""
    return watch(monkeypatch, eager, "direct_linear_gradients")


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
                patch.setattr(eager, "direct_linear_gradients", lambda *_: None)
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
        monkeypatch.setattr(eager, "direct_linear_gradients", lambda *_: None)
    assert all(map(torch.equal, *found)) and all(grad.dtype == torch.float32 for grad in found[0])


@pytest.mark.parametrize("name", ["delta", "weight", "input", "grad_output"])
@pytest.mark.parametrize("gate", [True, False])
def test_memory_freed_before_backward(gate, name) -> None:
    """Of tensors, too, that would be copied before torch looks at their memory."""
    tensors = {"weight": torch.randn(8, 6), "delta": torch.randn(8, 6).requires_grad_(gate)}
    tensors["input"] = torch.randn(3, 4, 6).transpose(0, 1).detach().requires_grad_()
    tensors["grad_output"] = torch.randn(3, 4, 8).transpose(0, 1)
    score = torch.tensor(0.15 if gate else 0.05, requires_grad=True)
    y = gated_linear(tensors["input"], tensors["weight"], tensors["delta"], score, gate=gate)
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor of shape .* whose storage has been freed"):
        y.backward(tensors["grad_output"])


@pytest.mark.parametrize("name", ["direct", "operator"])
def test_backward_says_which_path_it_took(monkeypatch, name) -> None:
    if name == "operator":
        monkeypatch.setattr(eager, "direct_linear_gradients", lambda *_: None)
    x, w, d = (torch.randn(*s, requires_grad=True) for s in ((3, 6), (8, 6), (8, 6)))
    y = gated_linear(x, w.detach(), d, torch.tensor(0.2, requires_grad=True), gate=True)
    C.taken_path()
    y.sum().backward()
    assert C.taken_path() == "rebuild"


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
