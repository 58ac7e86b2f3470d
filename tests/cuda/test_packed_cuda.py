"""Packed tasks on a GPU: decoded by the kernels, to the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from method_cases import images, make_base, output, rounding, save, trained
from packed import SHAPES, deltas, same_bits
from torch import Tensor

from taps_ext import TaskModel
from taps_ext.ops import unpack
from taps_ext.ops.codec import CODECS

CODEC_NAMES = ["bitmask:0.2", "int8", "int4", "sign", "lowrank:2"]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def packed(kind: str, delta: Tensor) -> dict[str, Tensor]:
    return CODECS[kind].encode(delta.reshape(len(delta), delta.shape[1:].numel()))  # type: ignore[attr-defined]


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def equal(got: Tensor, want: Tensor) -> bool:
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    return got.dtype == want.dtype and torch.equal(got.cpu().contiguous().view(size), want.contiguous().view(size))


@pytest.mark.parametrize("kind", list(CODECS))
def test_encoded_and_decoded_alike(kind: str) -> None:
    delta = torch.randn(33, 40) * 1e-3 * (torch.rand(33, 40) < 0.5)
    here = CODECS[kind].encode(delta)  # type: ignore[attr-defined]
    there = moved(here)
    assert CODECS[kind].problem(there, 33, 40) is None
    weight = torch.randn(33, 40)
    for score in (0.15, 0.05):
        gate = torch.tensor(score)
        want = unpack.packed_weight(weight, kind, here, gate, gate=None)
        got = unpack.packed_weight(weight.cuda(), kind, there, gate.cuda(), gate=None)
        assert torch.equal(got.cpu(), want)
    again = CODECS[kind].encode(delta.cuda())  # type: ignore[attr-defined]
    if kind != "sign":  # whose means are summed in another order
        assert all(torch.equal(again[name].cpu(), tensor) for name, tensor in here.items())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", list(CODECS))
def test_bit_equal_to_the_cpu(kind: str, dtype: torch.dtype) -> None:
    """Every shape, sort of Delta and layout of the weight; vectors, tails, rows that end in a vector."""
    for shape in (*SHAPES, (3, 1000), (64, 64), (2500, 1)):
        for delta in deltas(shape).values():
            tensors = packed(kind, delta)
            weight = (delta * 3 + 1e-3).to(dtype)
            wide = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)
            wide[..., 1:-2] = weight
            turned = weight.t().contiguous().t() if weight.dim() == 2 else weight.to(memory_format=torch.channels_last)
            odd = torch.cat([weight.flatten(), weight.new_zeros(1)]).cuda()[1:]  # row-major off its vectors
            odd.copy_(weight.flatten())
            for laid in (weight, turned, wide[..., 1:-2]):
                want = unpack.packed_weight(laid, kind, tensors)
                assert equal(unpack.packed_weight(laid.cuda(), kind, moved(tensors)), want)
            assert equal(unpack.packed_weight(odd.view(shape), kind, moved(tensors)), want)
            want = unpack.unpacked(kind, tensors, shape)
            assert same_bits(unpack.unpacked(kind, moved(tensors), shape).cpu(), want)


@pytest.mark.parametrize("kind", list(CODECS))
def test_many_weights(kind: str) -> None:
    """A grid that goes round, and a bitmask's chunks of several tiles."""
    delta = torch.randn(2049, 2051) * 1e-3 * (torch.rand(2049, 2051) < 0.3)
    tensors, weight = packed(kind, delta), torch.randn(2049, 2051).bfloat16()
    got = unpack.packed_weight(weight.cuda(), kind, moved(tensors))
    assert equal(got, unpack.packed_weight(weight, kind, tensors))


@pytest.mark.parametrize("kind", list(CODECS))
def test_codes_from_an_odd_byte(kind: str) -> None:
    tensors, weight = packed(kind, deltas((40, 130))["plain"]), torch.randn(40, 130)
    there = moved(tensors)
    name = unpack.ORDER[kind][0]
    there[name] = torch.cat([there[name][:1], there[name]])[1:]
    assert there[name].data_ptr() % 8 == 1
    assert equal(unpack.packed_weight(weight.cuda(), kind, there), unpack.packed_weight(weight, kind, tensors))


@pytest.mark.parametrize("missing", [1, 2, 900, 5200, -7])
def test_bitmaps_that_lie(missing: int) -> None:
    """Where there are more bits than values they stand for zeros, and nothing is read behind the last; values that no
    bit asks for are left."""
    delta = deltas((40, 130))["plain"]
    tensors, weight = moved(packed("bitmask", delta)), torch.randn(40, 130)
    kept = delta.numel() - missing
    values = torch.full([kept], 7.0, device="cuda")
    values[: delta.numel()] = tensors["values"][:kept]
    got = unpack.packed_weight(weight.cuda(), "bitmask", {**tensors, "values": values})
    left = torch.where(torch.arange(delta.numel()).view_as(delta) < kept, delta, torch.zeros(()))
    assert equal(got, weight + left)


@pytest.mark.parametrize("kind", list(CODECS))
def test_a_captured_graph_reads_the_gate_anew(kind: str) -> None:
    """Nothing waits for the device, which a capture would refuse; NaN is closed."""
    tensors, weight = moved(packed(kind, deltas((40, 130))["plain"])), torch.randn(40, 130, device="cuda")
    score = torch.tensor(0.15, device="cuda")
    opened = unpack.packed_weight(weight, kind, tensors)
    unpack.packed_weight(weight, kind, tensors, score, gate=None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = unpack.packed_weight(weight, kind, tensors, score, gate=None)
    for value, want in ((0.05, weight), (0.15, opened), (0.1, opened), (float("nan"), weight)):
        score.fill_(value)
        graph.replay()
        assert torch.equal(got, want)


def test_a_closed_delta_is_not_read() -> None:
    weight = torch.randn(9, 31, device="cuda")
    tensors = {"codes": torch.ones(279, dtype=torch.int8), "scale": torch.full([9], float("nan")).bfloat16()}
    score = torch.tensor(0.05, device="cuda")
    assert torch.equal(unpack.packed_weight(weight, "int8", moved(tensors), score, gate=None), weight)
    assert torch.equal(unpack.packed_weight(weight, "int8", moved(tensors), gate=False), weight)


@pytest.mark.parametrize("kind", list(CODECS))
def test_what_does_not_fit_is_refused(kind: str) -> None:
    tensors, weight = packed(kind, deltas((40, 130))["plain"]), torch.randn(40, 130, device="cuda")
    codes, scale = unpack.ORDER[kind]
    there = moved(tensors)
    cases = {
        "codes: expected a tensor on cuda:0 like weight": {**there, codes: tensors[codes]},
        "values: expected a tensor on cuda:0 like weight": {**there, scale: tensors[scale]},
        "codes: expected .* elements for this weight": {**there, codes: there[codes][:-1]},
        "values: expected .* next to each other": {**there, scale: there[scale].double()},
    }
    for message, given in cases.items():
        with pytest.raises(RuntimeError, match=message):
            unpack.packed_weight(weight, kind, given)


@pytest.mark.parametrize("gate", [True, None])
@pytest.mark.parametrize("kind", list(CODECS))
def test_opcheck(kind: str, gate: bool | None) -> None:
    weight, there = torch.randn(5, 40, device="cuda"), moved(packed(kind, deltas((5, 40))["plain"]))
    first, second = (there[name] for name in unpack.ORDER[kind])
    score = torch.tensor(0.15, device="cuda")
    arguments = (torch.empty_like(weight), weight, first, second, kind, score, gate, 0.1)
    torch.library.opcheck(torch.ops.taps_ext.unpack.default, arguments)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_packed_task_runs_and_merges(codec: str, tmp_path) -> None:
    model = trained("conv", "taps")
    model.pack_task("t", codec=codec)
    path, x = save(model, tmp_path), images("conv")
    want, limit = output(model, x, "t"), rounding(model, x, "t", torch.float32)
    there = TaskModel(make_base("conv").cuda()).eval()
    there.load_task(path)
    got = output(there, x.cuda(), "t")
    assert ((got.cpu() - want).abs() <= limit).all()
    there.merge_task("t")
    assert ((output(there, x.cuda(), "t") - got).abs().cpu() <= limit).all()
