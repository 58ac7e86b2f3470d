"""The CPU's fused linear layer: W_t in registers and L1, in fp32 and bf16, with every instruction set there is."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from fused import BF16, F32, TYPES, C, draw, fused, instructions, taken
from tolerance import assert_close

from taps_ext import gated_linear, ops

if C is None:
    pytest.skip("the extension is missing, and with it the kernel", allow_module_level=True)

OPERATOR = torch.ops.taps_ext.gated_linear
ROWS = (1, 2, 3, 4, 7, 16, 24, 25, 33, 70, 513)
SIZES = ((1, 1), (5, 3), (7, 64), (8, 257), (66, 513), (37, 1003))  # outputs, inputs


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_every_size(isa, types) -> None:
    kind, weight_kind, delta_kind = types
    torch.manual_seed(0)
    for rows, (n, k), with_bias in itertools.product(ROWS, SIZES, (True, False)):
        x, w, d = draw(rows, k, dtype=kind), draw(n, k, dtype=weight_kind), draw(n, k, dtype=delta_kind)
        bias = draw(n, dtype=kind) if with_bias else None
        output = fused(OPERATOR, x, w, d, None, bias, True, 0.1)
        assert output.dtype == kind and output.shape == (rows, n)
        terms, wt = x.double(), w.double() + d.double()
        if bias is not None:  # one term more
            terms, wt = F.pad(terms, (0, 1), value=1.0), torch.cat((wt, bias.double()[:, None]), 1)
        assert_close(output, terms @ wt.t(), kind, wt.shape[1], terms, wt)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_the_weight_is_rounded_once(isa, types) -> None:
    """Rows of the identity pick columns of W_t: bit for bit those that reconstruct gives."""
    kind, weight_kind, delta_kind = types
    torch.manual_seed(1)
    n, k = 9, 300
    w, d = draw(n, k, dtype=weight_kind), (0.01 * draw(n, k, dtype=F32)).to(delta_kind)
    expected = ops.reconstruct_(torch.empty(n, k, dtype=kind), w, d, gate=True)
    for first in range(0, k, 32):
        x = torch.eye(k, dtype=kind)[first : first + 32]
        output = fused(OPERATOR, x, w, d, None, None, True, 0.1)
        assert torch.equal(output.t(), expected[:, first : first + 32])


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_layouts(isa, kind) -> None:
    """Rows further apart than they are long, at odd elements; x with dimensions in front, or transposed."""
    torch.manual_seed(2)
    w, d = draw(20, 90, dtype=kind)[:, 1:80], draw(20, 101, dtype=F32)[:, 3:82]
    x, bias = draw(3, 5, 99, dtype=kind)[..., 7:86], draw(40, dtype=kind)[::2]
    wt = w.double() + d.double()
    many = draw(70, 93, dtype=kind)[:, 2:81]  # more than few rows
    most = draw(600, 93, dtype=kind)[:, 2:81]  # more than one block of them
    for own in (x, x.transpose(0, 1), x[:, :1], x[0, 0], many, most, x[0, :1].expand(70, 79)):
        output = fused(OPERATOR, own, w, d, None, bias, True, 0.1)
        assert output.shape == (*own.shape[:-1], 20)
        assert_close(output, own.double() @ wt.t() + bias.double(), kind, 80, own, wt)


def test_columns_next_to_each_other_are_rebuilt() -> None:
    x, w, d = draw(5, 512, dtype=F32), draw(768, 512, dtype=F32), draw(768, 512, dtype=F32)
    assert taken(OPERATOR, x, w, d, None, None, True, 0.1)[1] == "fused"
    output, path = taken(OPERATOR, x, w.t().contiguous().t(), d, None, None, True, 0.1)
    assert path == "rebuild"
    wt = w.double() + d.double()
    assert_close(output, x.double() @ wt.t(), F32, 512, x, wt)


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_what_is_not_finite_stays_so(isa, kind) -> None:
    for value in (math.inf, -math.inf, math.nan):
        x, w, d = torch.ones(2, 40, dtype=kind), torch.ones(3, 40, dtype=kind), torch.zeros(3, 40)
        d[1, 38] = value
        output = fused(OPERATOR, x, w, d, None, None, True, 0.1)
        assert torch.isfinite(output[:, [0, 2]]).all()
        wanted = torch.full((2,), value, dtype=kind)
        assert torch.equal(output[:, 1], wanted) or (math.isnan(value) and output[:, 1].isnan().all())
    largest = torch.finfo(kind).max
    output = fused(
        OPERATOR, torch.ones(1, 1), torch.full((1, 1), largest), torch.full((1, 1), largest), None, None, True, 0.1
    )
    assert output.item() == math.inf


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_rows_are_read_where_they_lie(isa, kind) -> None:
    """Whole words side by side, an odd number of elements apart, from an odd element on, meeting in the same sets."""
    torch.manual_seed(7)
    wide = {"even": draw(5, 66, dtype=kind)[:, :64], "odd": draw(5, 65, dtype=kind)[:, :64]}
    wide |= {"odd start": draw(5, 68, dtype=kind)[:, 1:65], "one": draw(1, 65, dtype=kind)[:, :64]}
    wide |= {"meeting": draw(6, 2048, dtype=kind), "blocks": draw(3, 1056, dtype=kind)}
    for x in wide.values():
        w, d = draw(9, x.shape[1], dtype=kind), draw(9, x.shape[1], dtype=F32)
        wt = w.double() + d.double()
        output = fused(OPERATOR, x, w, d, None, None, True, 0.1)
        assert_close(output, x.double() @ wt.t(), kind, x.shape[1], x, wt)


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [5, 24, 50])
def test_the_same_bits_whatever_the_threads(isa, rows, kind) -> None:
    torch.manual_seed(3)
    x, w, d = draw(rows, 700, dtype=kind), draw(403, 700, dtype=kind), draw(403, 700, dtype=F32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(fused(OPERATOR, x, w, d, None, None, True, 0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
    alone = fused(OPERATOR, x, w[:7], d[:7], None, None, True, 0.1)  # nor on which outputs share a panel
    assert torch.equal(alone, found[0][:, :7])
    for some in (1, 2, 4) if rows <= 24 else (25, 37):  # nor on the other rows
        assert torch.equal(fused(OPERATOR, x[:some], w, d, None, None, True, 0.1), found[0][:some])


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_the_same_bits_where_panels_take_turns(isa, kind) -> None:
    """More of x than a panel keeps near (1.3 million words): several go through the depth together, their sums kept."""
    torch.manual_seed(4)
    inputs = 5200 if kind == BF16 else 2600  # bf16 may be two to a word
    x, w, d = draw(512, inputs, dtype=kind), draw(403, inputs, dtype=kind), draw(403, inputs, dtype=F32)
    bias, before, found = draw(403, dtype=kind), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fused(OPERATOR, x, w, d, None, bias, True, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for rows in (slice(25), slice(480, 512)):
        assert torch.equal(fused(OPERATOR, x[rows], w, d, None, bias, True, 0.1), found[0][rows])


@pytest.mark.parametrize(
    ("rows", "outputs", "kind", "gate", "path"),
    [
        (256, 768, F32, True, "fused"),
        (257, 768, F32, True, "rebuild"),
        (64, 767, F32, True, "rebuild"),
        (8, 768, torch.float64, True, "rebuild"),
        (8, 768, torch.float16, True, "rebuild"),
        (8, 768, F32, False, "stock"),
        (0, 768, F32, True, "rebuild"),
    ],
)
def test_who_takes_it(rows, outputs, kind, gate, path) -> None:
    """The operator and the function in front of it, which rebuilds without calling it, agree."""
    x, w, d = draw(rows, 512, dtype=kind), draw(outputs, 512, dtype=kind), draw(outputs, 512, dtype=kind)
    with instructions("baseline"), torch.no_grad():
        output, found = taken(OPERATOR, x, w, d, None, None, gate, 0.1)
        again = gated_linear(x, w, d, gate=gate)
    assert found == path
    assert C.taken_path() == (None if path == "stock" else path) and torch.equal(output, again)


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_they_ask_for_their_own_machine(isa, kind) -> None:
    for rows, outputs, inputs in ((1, 64, 64), (30, 64, 64), (2, 384, 1024), (100, 512, 256), (300, 768, 512)):
        x, w, d = draw(rows, inputs, dtype=kind), draw(outputs, inputs, dtype=kind), draw(outputs, inputs, dtype=kind)
        sizes = {"rows": rows, "outputs": outputs, "inputs": inputs}
        path = C.choose(open=True, fusable=True, narrow=kind == BF16, **sizes)
        assert taken(OPERATOR, x, w, d, None, None, True, 0.1)[1] == path
        assert taken(gated_linear, x, w, d, gate=True)[1] == path


@pytest.mark.parametrize("score", [0.05, 0.15])
def test_the_score_decides(score) -> None:
    x, w, d = draw(4, 512, dtype=F32), draw(768, 512, dtype=F32), draw(768, 512, dtype=F32)
    output, path = taken(OPERATOR, x, w, d, torch.tensor(score), None, None, 0.1)
    assert path == ("fused" if score >= 0.1 else "stock")
    wt = w.double() + (d.double() if score >= 0.1 else 0)
    assert_close(output, x.double() @ wt.t(), F32, 512, x, wt)


def test_training_is_what_it_is_on_whole_weights() -> None:
    """To the bit, forward and backward; under no_grad the same layer is fused."""
    torch.manual_seed(4)
    x, w, d = draw(6, 512, dtype=F32), draw(800, 512, dtype=F32), draw(800, 512, dtype=F32)
    C.taken_path()
    own, delta = x.clone().requires_grad_(), d.clone().requires_grad_()
    output = gated_linear(own, w, delta, gate=True)
    assert C.taken_path() == "rebuild"
    whole_x, whole = x.clone().requires_grad_(), (w + d).requires_grad_()
    expected = F.linear(whole_x, whole)
    assert torch.equal(output, expected)
    grad = draw(6, 800, dtype=F32)
    output.backward(grad)
    expected.backward(grad)
    assert torch.equal(own.grad, whole_x.grad) and torch.equal(delta.grad, whole.grad)
    with torch.no_grad():
        again = gated_linear(own, w, delta, gate=True)
    assert C.taken_path() == "fused"
    assert_close(again, expected.detach(), F32, 512, x, whole.detach())


@pytest.mark.parametrize("rows", [3, 30])
def test_a_closed_gate_is_never_forced_to_be_fused(rows) -> None:
    x, w = draw(rows, 512, dtype=F32), draw(768, 512, dtype=F32)
    C.force_path("fused")
    try:
        for delta in (w, None):
            with pytest.raises(RuntimeError, match="path: fused is forced, but this layer cannot be"):
                torch.ops.taps_ext.gated_linear(x, w, delta, None, None, False, 0.1)
    finally:
        C.force_path(None)


def test_a_forced_path_that_does_not_know_the_layer_is_refused() -> None:
    C.force_path("fused")
    try:
        x, w, d = (draw(n, 16, dtype=torch.float64) for n in (3, 8, 8))
        with pytest.raises(RuntimeError, match="path: fused is forced, but this layer cannot be"):
            torch.ops.taps_ext.gated_linear(x, w, d, None, None, True, 0.1)
    finally:
        C.force_path(None)
