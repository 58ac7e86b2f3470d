"""Packed tasks on a GPU: plain torch decodes there, to the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from method_cases import images, make_base, output, rounding, save, trained

from taps_ext import TaskModel
from taps_ext.ops import unpack
from taps_ext.ops.codec import CODECS

CODEC_NAMES = ["bitmask:0.2", "int8", "int4", "sign", "lowrank:2"]


@pytest.mark.parametrize("kind", list(CODECS))
def test_encoded_and_decoded_alike(kind: str) -> None:
    delta = torch.randn(33, 40) * 1e-3 * (torch.rand(33, 40) < 0.5)
    here = CODECS[kind].encode(delta)  # type: ignore[attr-defined]
    there = {name: tensor.cuda() for name, tensor in here.items()}
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
