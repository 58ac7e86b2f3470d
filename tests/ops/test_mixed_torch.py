"""Mixed batches under torch's own machinery: opcheck, compile, transforms, FLOP counter, a second derivative."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from taps_ext import mixed_conv2d, mixed_linear, mixed_lowrank, ops

pytestmark = pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
IDS = torch.tensor([1, -1, 0, 1, 2])
# By name: the package's own names are those of the functions.
linear_module, conv2d_module, lowrank_module = (
    importlib.import_module(f"taps_ext.ops.{name}") for name in ("mixed", "mixed_conv2d", "mixed_lowrank")
)


def tensors(*shape: int, count: int = 3, grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=grad) for _ in range(count)]


def scores(*values: float, grad: bool = True) -> list[Tensor]:
    return [torch.tensor(value, requires_grad=grad) for value in values]


def test_opcheck_linear() -> None:
    x, w, b = torch.randn(5, 2, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4, requires_grad=True)
    deltas, learned = tensors(4, 6), scores(0.5, 0.05, 0.5)
    for gates in ([1, 0, -1], [-1, -1, 1]):
        deltas[1].requires_grad_(gates[1] != 0)
        arguments = (x, w, deltas, learned, IDS, b, gates, 0.1, True)
        torch.library.opcheck(torch.ops.taps_ext.mixed_linear.default, arguments)
    plain, none = [d.detach() for d in deltas], [None] * 3
    given = (x.detach(), w, [plain[0], None, plain[2]], none, IDS, None, [1, 0, 1], 0.1)
    torch.library.opcheck(torch.ops.taps_ext.mixed_linear.default, given)
    masks = ([True, True, True], [True, False, True], [True, True, False])
    asked = [s.detach() for s in learned]
    backward = (torch.randn(5, 2, 4), x.detach(), w, plain, asked, IDS, [1, 0, -1], 0.1, *masks)
    torch.library.opcheck(torch.ops.taps_ext.mixed_linear_backward.default, backward)


def test_opcheck_conv2d() -> None:
    x, w = torch.randn(5, 4, 6, 6, requires_grad=True), torch.randn(6, 2, 3, 3)
    deltas, learned, geometry = tensors(6, 2, 3, 3), scores(0.5, 0.05, 0.5), ([2, 1], [1, 1], [1, 1], 2)
    deltas[1].requires_grad_(False)
    arguments = (x, w, deltas, learned, IDS, torch.randn(6), *geometry, [1, 0, -1], 0.1, True)
    torch.library.opcheck(torch.ops.taps_ext.mixed_conv2d.default, arguments)
    masks = ([True, True, True], [True, False, True], [True, True, False])
    plain = [[t.detach() for t in part] for part in (deltas, learned)]
    backward = (torch.randn(5, 6, 3, 6), x.detach(), [6, 6], w, *plain, IDS, *geometry, [1, 0, -1], 0.1, *masks)
    torch.library.opcheck(torch.ops.taps_ext.mixed_conv2d_backward.default, backward)


def test_opcheck_lowrank() -> None:
    x, a, b = torch.randn(5, 2, 6, requires_grad=True), tensors(2, 6), tensors(4, 2)
    torch.library.opcheck(torch.ops.taps_ext.mixed_lowrank.default, (x, a, b, IDS, [1.0, 2.0, 0.5]))
    plain = [[t.detach() for t in part] for part in (a, b)]
    masks = (True, [True, False, True], [False, True, True])
    backward = (torch.randn(5, 2, 4), x.detach(), *plain, IDS, [1.0, 2.0, 0.5], *masks)
    torch.library.opcheck(torch.ops.taps_ext.mixed_lowrank_backward.default, backward)


def _linear(x: Tensor, ids: Tensor, parts: list[Any]) -> Tensor:
    return mixed_linear(x, parts[0], parts[1], parts[2], ids, None, gates=[True, False, None])


def _conv2d(x: Tensor, ids: Tensor, parts: list[Any]) -> Tensor:
    return mixed_conv2d(x, parts[0], parts[1], parts[2], ids, None, padding=1, gates=[True, False, None])


def _lowrank(x: Tensor, ids: Tensor, parts: list[Any]) -> Tensor:
    return mixed_lowrank(x, parts[1], parts[2], ids, [1.0, 2.0, 0.5])


CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], Callable[[], list[Any]]]] = {
    "linear": (_linear, (5, 6), lambda: [torch.randn(4, 6), tensors(4, 6), scores(0.5, 0.05, 0.5)]),
    "conv2d": (_conv2d, (5, 2, 6, 6), lambda: [torch.randn(4, 2, 3, 3), tensors(4, 2, 3, 3), scores(0.5, 0.05, 0.5)]),
    "lowrank": (_lowrank, (5, 6), lambda: [None, tensors(2, 6), tensors(4, 2)]),
}


@pytest.mark.parametrize("kind", CASES)
def test_compiled_equals_eager_and_a_new_mix_does_not_compile_again(kind: str) -> None:
    run, shape, make = CASES[kind]
    parts, x = make(), torch.randn(shape)
    parts[1][2] = None  # the base
    if kind == "lowrank":
        parts[2][2] = None
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    leaves = [t for part in parts[1:] for t in part if t is not None]
    for ids in (IDS, IDS.flip(0), torch.zeros(5, dtype=torch.int64)):
        found = []
        for function in (run, compiled):
            own = x.clone().requires_grad_()
            for leaf in leaves:
                leaf.grad = None
            with torch._dynamo.config.patch(error_on_recompile=function is compiled and ids is not IDS):
                y = function(own, ids, parts)
            y.square().sum().backward()
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
            found.append([y.detach(), own.grad, *grads])
        for eager, other in zip(*found, strict=True):
            torch.testing.assert_close(eager, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, IDS, parts), run(x, IDS, parts))


@pytest.mark.parametrize("kind", CASES)
def test_without_the_extension_the_reference_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same values and gradients, and the same refusal of an unknown task."""
    run, shape, make = CASES[kind]
    parts, x = make(), torch.randn(shape)
    found = []
    for there in (True, False):
        if not there:
            for module in (linear_module, conv2d_module, lowrank_module):
                monkeypatch.setattr(module, "C", None)
        own = x.clone().requires_grad_()
        y = run(own, IDS, parts)
        leaves = [own, *parts[1], *parts[2]]
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        found.append(
            [y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]
        )
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)
    with pytest.raises(ValueError, match="task_ids: expected -1 for the base, or one of 3 tasks, got 7"):
        run(x, IDS + 5, parts)


@pytest.mark.parametrize("kind", CASES)
def test_vmap_and_jvp_take_the_reference(kind: str) -> None:
    run, shape, make = CASES[kind]
    parts, xs = make(), torch.randn(3, *shape)
    want = torch.stack([run(x, IDS, parts) for x in xs]).detach()
    torch.testing.assert_close(torch.func.vmap(lambda x: run(x, IDS, parts))(xs).detach(), want)
    _, moved = torch.func.jvp(lambda x: run(x, IDS, parts), (xs[0],), (xs[1],))
    torch.testing.assert_close(moved.detach(), want[1])  # linear in x, without a bias


@pytest.mark.parametrize("kind", CASES)
def test_a_second_derivative_is_refused(kind: str) -> None:
    run, shape, make = CASES[kind]
    x = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(run(x, IDS, make()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_the_operator_refuses_lists_whose_gradients_torch_would_lose() -> None:
    x, w, deltas = torch.randn(5, 6), torch.randn(4, 6), [*tensors(4, 6, count=2), None]
    with pytest.raises(RuntimeError, match="torch's autograd loses; call taps_ext.mixed_linear"):
        torch.ops.taps_ext.mixed_linear(x.requires_grad_(), w, deltas, [None] * 3, IDS, None, [1, 1, 0], 0.1, True)


def test_flops_are_those_of_stock_layers_on_the_same_rows() -> None:
    """Forward as one stock layer on all rows; backward: the input's once, the weights' of the rows that ask."""
    x, w = torch.randn(10, 6, requires_grad=True), torch.randn(4, 6)
    deltas, learned = tensors(4, 6), scores(0.5, 0.05, 0.5)
    with FlopCounterMode(display=False) as counter:
        y = mixed_linear(x, w, deltas, learned, IDS, gates=[True, False, None])
    assert counter.get_total_flops() == 2 * 10 * 4 * 6
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 10 * 4 * 6 + 2 * 8 * 4 * 6  # two rows are the base's
    images, kernel = torch.randn(5, 2, 6, 6), torch.randn(4, 2, 3, 3)
    extra = tensors(4, 2, 3, 3)
    with FlopCounterMode(display=False) as mine, torch.no_grad():
        mixed_conv2d(images, kernel, extra, None, IDS, gates=[True] * 3)
    with FlopCounterMode(display=False) as stock:
        F.conv2d(images, kernel)
    assert mine.get_total_flops() == stock.get_total_flops()


def test_flops_of_low_rank() -> None:
    x, a, b = torch.randn(10, 6, requires_grad=True), tensors(2, 6), tensors(4, 2)
    a[2], b[2] = torch.randn(3, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = mixed_lowrank(x, a, b, IDS, [1.0] * 3)
    forward = 2 * (6 * 2 + 2 * 3) * (6 + 4)  # six rows of rank 2, two of rank 3
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # x A^T again, dL/d(x A^T), and dL/dx, dL/dA, dL/dB: three products with A's size, two with B's.
    assert counter.get_total_flops() == 2 * (6 * 2 + 2 * 3) * (3 * 6 + 2 * 4)
