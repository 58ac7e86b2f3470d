"""Few rows times W + a packed Delta without W_t: the bits of the fused layer with the same Delta, where it is taken."""

from __future__ import annotations

import pytest
import torch
from fused import BF16, F32, fused, instructions
from tolerance import assert_close
from torch import Tensor, nn

from taps_ext import TapsConfig, TaskModel, gated_linear, ops
from taps_ext.ops import unpack
from taps_ext.ops.codec import CODECS

C = ops._C
if C is None:
    pytest.skip("the extension is missing, and with it the kernels", allow_module_level=True)

KINDS = list(CODECS)
ISAS = C.build_info()["isas"]


def packed(kind: str, delta: Tensor) -> dict[str, Tensor]:
    return CODECS[kind].encode(delta)  # type: ignore[attr-defined]


def sparse(*shape: int) -> Tensor:
    return torch.randn(shape) * 1e-2 * (torch.rand(shape) < 0.3)


def run(x: Tensor, weight: Tensor, kind: str, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
    first, second = (tensors[name] for name in unpack.ORDER[kind])
    return torch.ops.taps_ext.packed_linear(x, weight, first, second, kind, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equal_to_the_fused_layer_with_the_same_delta(kind: str, isa: str, dtype: torch.dtype) -> None:
    if isa not in C.isas():
        pytest.skip(f"this machine does not run {isa}")
    torch.manual_seed(0)
    with instructions(isa), torch.no_grad():
        for n, k in ((1, 64), (3, 128), (7, 192), (33, 1088), (130, 64)):
            tensors = packed(kind, sparse(n, k))
            delta, weight = unpack.unpacked(kind, tensors, (n, k)), torch.randn(n, k).to(dtype)
            for rows in (1, 2, 5, 16):
                x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
                for laid, given in ((x, bias), (torch.randn(rows, k + 3).to(dtype)[:, 1:-2], None)):
                    got = run(laid, weight, kind, tensors, given)
                    want = fused(lambda *a: gated_linear(*a, gate=True), laid, weight, delta, None, given)
                    assert torch.equal(got, want), (n, k, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_near_the_exact_product_by_threads_and_leading_dimensions(kind: str) -> None:
    torch.manual_seed(0)
    weight, tensors = torch.randn(500, 320), packed(kind, sparse(500, 320))
    delta, x = unpack.unpacked(kind, tensors, (500, 320)), torch.randn(2, 3, 320)
    before = torch.get_num_threads()
    with torch.no_grad():
        alone = run(x, weight, kind, tensors, None)
        try:
            torch.set_num_threads(4)
            assert torch.equal(run(x, weight, kind, tensors, None), alone)
        finally:
            torch.set_num_threads(before)
        assert run(torch.randn(320), weight, kind, tensors, None).shape == (500,)
    whole = weight + delta
    assert_close(alone, x.double() @ whole.double().T, F32, 320, x, whole)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tensors, x = torch.randn(8, 64), packed("int8", sparse(8, 64)), torch.randn(2, 64)
    large = torch.randn(8192, 64)
    with torch.no_grad():
        assert unpack.packed_linear(x, weight, "int8", tensors, None) is None
        assert unpack.packed_linear(x, large, "int8", packed("int8", sparse(8192, 64)), None) is not None
    monkeypatch.setattr(unpack, "LEAST_WEIGHTS", 0)

    def taken(input: Tensor = x, weight: Tensor = weight, bias: Tensor | None = None) -> bool:
        return unpack.packed_linear(input, weight, "int8", tensors, bias) is not None

    assert not taken()  # gradients may be asked for
    with torch.no_grad():
        assert taken() and taken(torch.randn(16, 64)) and taken(bias=torch.randn(8))
        assert not taken(torch.randn(17, 64)) and not taken(torch.randn(0, 64))
        assert not taken(x.bfloat16()) and not taken(x.double(), weight.double())
        assert not taken(x.half(), weight.half()) and not taken(x.bfloat16(), weight.bfloat16())
        assert not taken(bias=torch.randn(8).bfloat16()) and not taken(torch.randn(2, 63))
        assert not taken(weight=weight.t().contiguous().t())
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken()


@pytest.mark.parametrize("kind", ["bitmask", "int8", "int4", "sign"])
def test_a_layer_of_a_packed_task_takes_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "LEAST_WEIGHTS", 0)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).requires_grad_(False)
    model = TaskModel(base, TapsConfig(lam=0.1), head_module="2").eval()
    model.add_task("t", num_classes=3)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            for delta in part.changes():
                delta.copy_(sparse(*delta.shape))
    model.pack_task("t", codec=kind)
    calls, real = [], unpack.packed_weight
    monkeypatch.setattr("taps_ext.parts.packed.packed_weight", lambda *a, **k: calls.append(1) or real(*a, **k))
    x = torch.randn(4, 64)
    with torch.no_grad():
        got = model(x, task="t")
        assert not calls
        model(torch.randn(17, 64), task="t")
        assert len(calls) == 1
        layer = torch.nn.functional.linear(x, model.state("t").table["0"].fold(base[0].weight), base[0].bias)
        own = model.state("t").head
        want = nn.functional.linear(layer.relu().double(), own.weight.double(), own.bias.double())
    # The hidden layer's sums are in another order: its rounding reaches the output by the head's 32 products.
    assert_close(got, want, F32, 64 + 32, x, base[0].weight, own.weight, outer=32)


def test_opcheck() -> None:
    weight, tensors, x = torch.randn(5, 64), packed("int4", sparse(5, 64)), torch.randn(2, 64)
    arguments = (x, weight, tensors["codes"], tensors["scale"], "int4", torch.randn(5))
    torch.library.opcheck(torch.ops.taps_ext.packed_linear.default, arguments)


def test_what_does_not_fit_is_refused() -> None:
    weight, tensors, x = torch.randn(5, 64), packed("bitmask", sparse(5, 64)), torch.randn(2, 64)
    good = [x, weight, tensors["bitmap"], tensors["values"], "bitmask", None]
    torch.ops.taps_ext.packed_linear(*good)
    cases = {
        "input: expected 1 to 24 rows": (0, torch.randn(25, 64)),
        "input: expected shape": (0, torch.randn(2, 63)),
        "one for each value": (3, tensors["values"][:-1].clone()),
        "codes: expected .* elements": (2, tensors["bitmap"][:-1].clone()),
        "codec: expected": (4, "int2"),
        "bias": (5, torch.randn(4)),
    }
    for message, (index, value) in cases.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.taps_ext.packed_linear(*[value if i == index else given for i, given in enumerate(good)])
