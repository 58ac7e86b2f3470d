"""Tensors that wait on the disk, and tensors that are written when their turn comes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from store_files import blob_of, example

from taps_ext import store
from taps_ext.store import Later, Spool
from taps_ext.store.errors import MissingFileError, TruncatedFileError, UnsupportedTensorError

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.tensor([], dtype=torch.int8),
    "c": torch.randn(4, 3).bfloat16().t(),
    "d": torch.tensor(True),
    "e": torch.full((2,), torch.nan, dtype=torch.float64),
}


def test_what_is_put_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with Spool(tmp_path / "out.taps") as spool:
        first, second = spool.put(TENSORS), spool.put({"a": torch.ones(2)})
        assert not os.listdir(tmp_path), "it has no name"
        for name, tensor in TENSORS.items():
            back = first[name]
            assert back.dtype == tensor.dtype and back.shape == tensor.shape
            assert store.tensor_digest(back) == store.tensor_digest(tensor)
        assert torch.equal(second["a"], torch.ones(2)) and list(first) == list(TENSORS)
        assert torch.equal(first["a"], TENSORS["a"])
        third = spool.put({"a": torch.zeros(3)})  # behind the others, wherever the last one was read
        assert torch.equal(third["a"], torch.zeros(3)) and torch.equal(second["a"], torch.ones(2))
        os.truncate(spool._file.fileno(), 10)
        with pytest.raises(TruncatedFileError, match=r"out\.taps: tensor 'e': lost"):
            first["e"]
        with pytest.raises(UnsupportedTensorError, match="'x'.*complex64"):
            spool.put({"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(MissingFileError, match="no such folder"):
        Spool(tmp_path / "no" / "out.taps")


def test_a_file_of_later_tensors_is_the_same_file(tmp_path: Path) -> None:
    """One at a time, each read once."""
    wanted, task, read = blob_of(example(), tmp_path), example(), []
    with Spool(tmp_path / "x.taps") as spool:
        for record in task.parts.values():
            record.tensors = spool.put(record.tensors)
            record.tensors.read = lambda name, read_it=record.tensors.read: read.append(name) or read_it(name)
        store.save(tmp_path / "x.taps", task)
    assert (tmp_path / "x.taps").read_bytes() == wanted
    assert len(read) == len(store.read_header(tmp_path / "x.taps").tensors)


@pytest.mark.parametrize("made", [torch.zeros(3), torch.zeros(2).double(), torch.zeros(2).to_sparse()])
def test_a_tensor_that_is_not_what_it_was_to_be(made: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(UnsupportedTensorError, match="tensor 'a': expected"):
        store.write_safetensors(path, {"a": Later(torch.float32, (2,), lambda: made)})
    with pytest.raises(UnsupportedTensorError, match=r"tensor 'b': torch\.complex64, which the format does not hold"):
        store.write_safetensors(path, {"b": Later(torch.complex64, (2,), lambda: made)})
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]
