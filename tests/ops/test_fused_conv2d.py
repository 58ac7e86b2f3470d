"""The CPU's fused convolution: W_t packed on its way to the product, with every instruction set of this machine."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from fused import BF16, F32, LAST, PLAIN, TYPES, C, draw, fused, instructions, taken
from tolerance import assert_close

from taps_ext import gated_conv2d, ops

if C is None:
    pytest.skip("the extension is missing, and with it the kernel", allow_module_level=True)

OPERATOR = torch.ops.taps_ext.gated_conv2d
# Batch, channels, outputs, kernel, image, stride, padding, dilation.
SHAPES = (
    (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 3, 5, (3, 3), (6, 7), (1, 1), (1, 1), (1, 1)),
    (3, 17, 33, (1, 1), (7, 7), (1, 1), (0, 0), (1, 1)),
    (1, 40, 16, (1, 1), (9, 8), (2, 3), (0, 0), (1, 1)),
    (2, 29, 20, (3, 3), (7, 7), (2, 1), (1, 2), (1, 2)),
    (1, 6, 37, (2, 5), (11, 9), (1, 2), (3, 0), (2, 1)),
    (9, 31, 18, (3, 3), (8, 8), (1, 1), (1, 1), (1, 1)),  # more than one block of pixels and of the depth
    (2, 4, 7, (8, 8), (9, 9), (1, 1), (7, 7), (1, 1)),
)


def convolved(
    x: torch.Tensor, w: torch.Tensor, d: torch.Tensor, bias: torch.Tensor | None, *geometry
) -> tuple[torch.Tensor, int, tuple[torch.Tensor, torch.Tensor]]:
    """The result in float64, how many products it sums, and their factors."""
    wt = w.double() + d.double()
    return F.conv2d(x.double(), wt, None if bias is None else bias.double(), *geometry), wt[0].numel() + 1, (x, wt)


@pytest.mark.parametrize("layout", [PLAIN, LAST], ids=["plain", "channels_last"])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_every_geometry(isa, types, layout) -> None:
    kind, weight_kind, delta_kind = types
    torch.manual_seed(0)
    for batch, channels, outputs, kernel, image, *geometry in SHAPES:
        x = draw(batch, channels, *image, dtype=kind, layout=layout)
        w, d = (draw(outputs, channels, *kernel, dtype=own, layout=layout) for own in (weight_kind, delta_kind))
        for bias in (None, draw(outputs, dtype=kind)):
            output = fused(OPERATOR, x, w, d, None, bias, *geometry, 1, True, 0.1)
            wanted, terms, factors = convolved(x, w, d, bias, *geometry)
            assert output.dtype == kind
            assert_close(output, wanted, kind, terms, *factors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_layout", [PLAIN, LAST], ids=["x plain", "x last"])
@pytest.mark.parametrize("w_layout", [PLAIN, LAST], ids=["w plain", "w last"])
def test_the_layout_is_torchs(shape, x_layout, w_layout) -> None:
    batch, channels, outputs, kernel, image, *geometry = shape
    x = draw(batch, channels, *image, dtype=F32, layout=x_layout)
    w, d = (draw(outputs, channels, *kernel, dtype=F32, layout=w_layout) for _ in range(2))
    with torch.no_grad():
        wanted = F.conv2d(x, w + d, None, *geometry)
    output = fused(OPERATOR, x, w, d, None, None, *geometry, 1, True, 0.1)
    assert output.stride() == wanted.stride()
    alone = fused(OPERATOR, x[0], w, d, None, None, *geometry, 1, True, 0.1)
    assert torch.equal(alone, output[0]) and alone.stride() == F.conv2d(x[0], w + d, None, *geometry).stride()


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_the_weight_is_rounded_once(isa, types) -> None:
    """An image with a single one picks a column of W_t: bit for bit what reconstruct gives."""
    kind, weight_kind, delta_kind = types
    torch.manual_seed(1)
    outputs, channels = 21, 35
    w = draw(outputs, channels, 3, 3, dtype=weight_kind)
    d = (0.01 * draw(outputs, channels, 3, 3, dtype=F32)).to(delta_kind)
    x = torch.zeros(channels, channels, 3, 3, dtype=kind)
    x[range(channels), range(channels), 1, 1] = 1
    output = fused(OPERATOR, x, w, d, None, None, (1, 1), (1, 1), (1, 1), 1, True, 0.1)
    expected = ops.reconstruct_(torch.empty(w.shape, dtype=kind), w, d, gate=True)
    assert torch.equal(output, expected.transpose(0, 1).flip(2, 3))


def test_images_and_weights_of_any_strides(isa) -> None:
    """Views into larger tensors, one image for the whole batch, a bias with gaps."""
    torch.manual_seed(2)
    geometry = ((1, 1), (1, 1), (1, 1))
    x = draw(3, 12, 9, 10, dtype=F32)[:, 1:9, 1:8, ::2]
    w, d = draw(11, 10, 3, 3, dtype=F32)[:, 1:9], draw(13, 8, 3, 3, dtype=F32)[2:]
    bias = draw(22, dtype=F32)[::2]
    for own in (x, x[:1].expand(4, 8, 7, 5), x.flip(3)):
        output = fused(OPERATOR, own, w, d, None, bias, *geometry, 1, True, 0.1)
        wanted, terms, factors = convolved(own, w, d, bias, *geometry)
        assert_close(output, wanted, F32, terms, *factors)


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_what_is_not_finite_stays_so(isa, kind) -> None:
    for value in (math.inf, -math.inf, math.nan):
        x, w, d = torch.ones(1, 5, 3, 3, dtype=kind), torch.ones(4, 5, 1, 1, dtype=kind), torch.zeros(4, 5, 1, 1)
        d[1, 4] = value
        output = fused(OPERATOR, x, w, d, None, None, (1, 1), (0, 0), (1, 1), 1, True, 0.1)
        assert torch.isfinite(output[:, [0, 2, 3]]).all()
        assert output[:, 1].isnan().all() if math.isnan(value) else (output[:, 1] == value).all()


def test_the_same_bits_whatever_the_threads_and_the_batch(isa) -> None:
    torch.manual_seed(3)
    x, w, d = draw(6, 70, 7, 7, dtype=F32), draw(100, 70, 3, 3, dtype=F32), draw(100, 70, 3, 3, dtype=F32)
    settings = (None, None, (1, 1), (1, 1), (1, 1), 1, True, 0.1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(fused(OPERATOR, x, w, d, *settings))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(fused(OPERATOR, x[4:5], w[:9], d[:9], *settings), found[0][4:5, :9])


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({}, "fused"),
        ({"batch": 6}, "rebuild"),  # 294 pixels
        ({"batch": 5}, "fused"),
        ({"outputs": 767}, "rebuild"),
        ({"groups": 2}, "rebuild"),
        ({"outputs": 15, "kind": BF16, "batch": 6}, "rebuild"),
        ({"kind": torch.float64}, "rebuild"),
        ({"kind": torch.float16}, "rebuild"),
        ({"gate": False}, "stock"),
        ({"batch": 0}, "rebuild"),
        ({"mixed": True}, "rebuild"),
    ],
    ids=str,
)
def test_who_takes_it(change, path) -> None:
    """The operator and the function in front of it, which rebuilds without calling it, agree."""
    torch.manual_seed(4)
    setting = {"batch": 1, "outputs": 768, "groups": 1, "kind": F32, "gate": True, "mixed": False, **change}
    kind, groups = setting["kind"], setting["groups"]
    x = draw(setting["batch"], 512 * groups, 7, 7, dtype=kind)
    layout = LAST if setting["mixed"] else PLAIN
    kernel = 3 if setting["mixed"] else 1
    w = draw(setting["outputs"] // groups * groups, 512, kernel, kernel, dtype=kind)
    d = draw(*w.shape, dtype=kind, layout=layout)
    geometry = ((1, 1), (0, 0), (1, 1), groups)
    with instructions("baseline"), torch.no_grad():
        output, found = taken(OPERATOR, x, w, d, None, None, *geometry, setting["gate"], 0.1)
        again = gated_conv2d(x, w, d, None, None, *geometry, gate=setting["gate"])
    assert found == path
    assert C.taken_path() == (None if path == "stock" else path) and torch.equal(output, again)
    if path != "stock":
        assert taken(OPERATOR, x, w, d, None, None, *geometry, True, 0.1, training=True)[1] == "rebuild"


@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_they_ask_for_their_own_machine(isa, kind) -> None:
    for batch, outputs, channels in ((1, 64, 64), (1, 512, 512), (3, 300, 1024), (9, 512, 256)):
        x = draw(batch, channels, 7, 7, dtype=kind)
        w, d = (draw(outputs, channels, 1, 1, dtype=kind) for _ in range(2))
        sizes = {"rows": 49 * batch, "outputs": outputs, "inputs": channels}
        path = C.choose(open=True, fusable=True, narrow=kind == BF16, places=1, **sizes)
        assert taken(OPERATOR, x, w, d, None, None, (1, 1), (0, 0), (1, 1), 1, True, 0.1)[1] == path
        assert taken(gated_conv2d, x, w, d, gate=True)[1] == path


def test_training_is_what_it_is_on_whole_weights() -> None:
    """To the bit, forward and backward; under no_grad the same layer is fused."""
    torch.manual_seed(5)
    x, w, d = draw(1, 64, 7, 7, dtype=F32), draw(700, 64, 3, 3, dtype=F32), draw(700, 64, 3, 3, dtype=F32)
    C.taken_path()
    own, delta = x.clone().requires_grad_(), d.clone().requires_grad_()
    output = gated_conv2d(own, w, delta, gate=True, padding=1)
    assert C.taken_path() == "rebuild"
    whole_x, whole = x.clone().requires_grad_(), (w + d).requires_grad_()
    expected = F.conv2d(whole_x, whole, padding=1)
    assert torch.equal(output, expected)
    grad = torch.randn_like(expected)
    output.backward(grad)
    expected.backward(grad)
    assert torch.equal(own.grad, whole_x.grad) and torch.equal(delta.grad, whole.grad)
    with torch.no_grad():
        again = gated_conv2d(own, w, delta, gate=True, padding=1)
    assert C.taken_path() == "fused"
    assert_close(again, expected.detach(), F32, 576, x, whole.detach())


def test_what_the_operator_refuses_is_refused_by_it() -> None:
    x, w = torch.zeros(1, 512, 7, 7), torch.zeros(768, 512, 1, 1)
    with torch.no_grad():
        for wrong in ({"stride": ()}, {"padding": []}):
            with pytest.raises(RuntimeError, match=next(iter(wrong))):
                gated_conv2d(x, w, w, gate=True, **wrong)
        with pytest.raises((TypeError, RuntimeError), match="stride"):
            gated_conv2d(x, w, w, gate=True, stride=1.0)
        for wrong in ({"stride": 0}, {"stride": (1, -1)}, {"padding": -1}, {"dilation": 0}, {"stride": (1, 2, 3)}):
            with pytest.raises(RuntimeError, match=f"{next(iter(wrong))}: expected two integers"):
                gated_conv2d(x, w, w, gate=True, **wrong)
        with pytest.raises(RuntimeError, match="input: expected a padded image no smaller than the kernel"):
            gated_conv2d(x, torch.zeros(8, 512, 9, 9), torch.zeros(8, 512, 9, 9), gate=True)


@pytest.mark.parametrize("layout", [PLAIN, LAST], ids=["plain", "channels_last"])
def test_the_operator_is_what_its_fake_says(layout) -> None:
    torch.manual_seed(6)
    x = draw(1, 512, 7, 7, dtype=F32, layout=layout)
    w, d = (draw(768, 512, 1, 1, dtype=F32, layout=layout) for _ in range(2))
    arguments = (x, w, d, None, None, (1, 1), (0, 0), (1, 1), 1, True, 0.1)
    assert taken(OPERATOR, *arguments)[1] == "fused"
    torch.library.opcheck(torch.ops.taps_ext.gated_conv2d.default, arguments)


@pytest.mark.parametrize(("side", "path"), [(8, "fused"), (9, "rebuild")])
def test_kernels_of_more_than_64_places_are_rebuilt(side, path) -> None:
    torch.manual_seed(7)
    x = draw(1, 96, 12, 12, dtype=F32)
    w, d = (draw(200, 96, side, side, dtype=F32) for _ in range(2))
    output, found = taken(OPERATOR, x, w, d, None, None, (1, 1), (1, 1), (1, 1), 1, True, 0.1)
    wanted, terms, factors = convolved(x, w, d, None, (1, 1), (1, 1), (1, 1))
    assert found == path
    assert_close(output, wanted, F32, terms, *factors)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(
    "single, kept", [(False, "input"), (False, "no input"), (False, "rows"), (True, "input"), (True, "no input")]
)
def test_the_backward_lays_out_what_its_fake_says(groups, single, kept) -> None:
    """Compilers go by a fake's strides: of every mixture of layouts of images, results and weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    backward = torch.ops.taps_ext.gated_conv2d_backward.default
    for of_x, of_w, of_dy in itertools.product((PLAIN, LAST), repeat=3):
        torch.manual_seed(8)
        x, dy = draw(2, 8, 6, 6, dtype=F32, layout=of_x), draw(2, 8, 6, 6, dtype=F32, layout=of_dy)
        w, d = (draw(8, 8 // groups, 3, 3, dtype=F32, layout=of_w) for _ in range(2))
        rows = torch.tensor([1]) if kept == "rows" else None
        if single:
            x, dy = x[0], dy[0]
        elif rows is not None:
            x = x[1:]
        score = torch.tensor(0.2)
        given = None if kept == "no input" else x
        mask = [True, False, kept != "no input", kept != "no input", False]

        def run(given=given, dy=dy, w=w, d=d, score=score, rows=rows, mask=mask):
            geometry = [1, 1], [1, 1], [1, 1], groups
            return backward(dy, given, [6, 6], w, d, score, True, 0.1, *geometry, mask, rows, 1.0)

        real = run()
        with FakeTensorMode() as mode:
            fakes = [None if t is None else mode.from_tensor(t) for t in (given, dy, w, d, score, rows)]
            fake = run(*fakes)
        for one, other in zip(real, fake, strict=True):
            assert (one.shape, one.stride()) == (other.shape, other.stride()), (of_x, of_w, of_dy)


def test_a_backward_inside_autocast_computes_in_its_own_type() -> None:
    """As torch's own backward of a convolution does: autocast is for forwards."""
    torch.manual_seed(9)
    x, w = draw(2, 8, 6, 6, dtype=F32).requires_grad_(), draw(8, 8, 3, 3, dtype=F32)
    d, gradient = draw(8, 8, 3, 3, dtype=F32), draw(2, 8, 6, 6, dtype=F32)
    for rows in (None, torch.tensor([1])):
        found = []
        for amp in (False, True):
            score = torch.tensor(0.01, requires_grad=True)
            out = gated_conv2d(x, w, d, score, None, 1, 1, gate=False, rows=rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                found.append(torch.autograd.grad(out, (x, score), gradient))
        for plain, inside in zip(*found, strict=True):
            assert torch.equal(plain, inside)
