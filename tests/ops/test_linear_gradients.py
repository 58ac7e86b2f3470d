"""Gradients of eager linear layers: torch's to the bit, of every layout, and refused where they would be wrong."""

import pytest
import torch
import torch.nn.functional as F
from test_direct import TYPES, C

from taps_ext import gated_linear, workspace_bytes


def _gradients(x, w, d, score, bias, gate, dy, **more) -> list[torch.Tensor]:
    """Of the leaves among them, by a fresh graph."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, d, score, bias)]
    output = gated_linear(leaves[0], w, leaves[1], leaves[2], leaves[3], gate=gate, **more)
    output.backward(dy)
    return [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("gate", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("leading", [(1,), (7,), (130,), (2, 3), (4, 1), (3, 2, 5), ()], ids=str)
def test_linear_gradients_are_torchs(kind, gate, leading) -> None:
    torch.manual_seed(4)
    w, d = torch.randn(9, 20).to(kind), torch.randn(9, 20).to(kind)
    layouts = {"dense": lambda t: t}
    if leading:
        layouts["turned"] = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
        layouts["spread"] = lambda t: torch.stack((t, t), -1)[..., 0]
    for bias, score in ((None, torch.tensor(0.2)), (torch.randn(9).to(kind), torch.tensor([0.2], dtype=torch.float64))):
        for laid in layouts.values():
            x, dy = laid(torch.randn(*leading, 20).to(kind)), laid(torch.randn(*leading, 9).to(kind))
            found = _gradients(x, w, d, score, bias, gate, dy)
            own, whole = x.detach().requires_grad_(), (w + d if gate else w).requires_grad_()
            F.linear(own, whole).backward(dy)
            expected = [own.grad, *([whole.grad] if gate else [])]
            for a, b in zip(found, expected, strict=False):
                assert a.dtype == b.dtype and a.shape == b.shape
                torch.testing.assert_close(a, b)
            assert len(found) == 2 + gate + (bias is not None)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_closed_delta_that_is_not_finite_is_refused_here_too(bad) -> None:
    x, w, d = torch.ones(2, 4), torch.ones(3, 4), torch.full((3, 4), bad)
    with pytest.raises(RuntimeError, match="delta: expected finite values in a closed layer"):
        _gradients(x, w, d, torch.tensor(0.0), None, False, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
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
def test_backward_inside_autocast(gate) -> None:
    """Of a layer that ran outside: gradients of its type, the same as outside."""
    torch.manual_seed(4)
    x, w, d = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8), torch.randn(5, 8).requires_grad_(gate)
    found = []
    for inside in (False, True):
        score = torch.tensor(0.15 if gate else 0.05, requires_grad=True)
        loss = gated_linear(x, w, d, score, gate=gate).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(loss, [x, score, d] if gate else [x, score]))
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


def test_backward_says_which_path_it_took() -> None:
    x, w, d = (torch.randn(*s, requires_grad=True) for s in ((3, 6), (8, 6), (8, 6)))
    y = gated_linear(x, w.detach(), d, torch.tensor(0.2, requires_grad=True), gate=True)
    C.taken_path()
    y.sum().backward()
    assert C.taken_path() == "rebuild"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("gate", [True, False])
def test_batched_gradients(gate) -> None:
    """`is_grads_batched`, whose tensors look like plain ones; no memory stays leased."""
    torch.manual_seed(5)
    x, w, d = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4, 6).requires_grad_(gate)
    score, vectors = torch.tensor(0.15 if gate else 0.05, requires_grad=True), torch.randn(2, 3, 4)
    y = gated_linear(x, w, d, score, gate=gate)
    learned = [x, score, d] if gate else [x, score]
    want = [torch.autograd.grad(y, learned, vector, retain_graph=True) for vector in vectors]
    got = torch.autograd.grad(y, learned, vectors, is_grads_batched=True)
    for index, grad in enumerate(got):
        torch.testing.assert_close(grad, torch.stack([one[index] for one in want]))
    C.workspace_clear()
    assert workspace_bytes() == 0
