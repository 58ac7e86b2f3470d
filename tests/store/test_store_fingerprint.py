"""The fingerprint knows names, dtypes, shapes and values, and nothing of strides, devices and wrappers."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from taps_ext.store import Record, TaskFile, fingerprint, load, plain_name, save, tensor_digest
from taps_ext.store import tensors as store_tensors
from taps_ext.store.errors import DuplicateKeyError, UnsupportedTensorError

TASK: dict[str, Any] = {"method": {"method": "full"}, "parent": "sha256:" + "0" * 64}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_by_hand() -> None:
    """The definition, spelled out without the code."""
    raw = {"a": ("F32", [2], struct.pack("<2f", 1.0, -0.0)), "b.c": ("I64", [], struct.pack("<q", 7))}
    total = hashlib.sha256(b"taps fingerprint 1\n")
    for name, (dtype, shape, data) in raw.items():
        digest = hashlib.sha256(json.dumps([dtype, shape]).encode() + b"\n" + data).hexdigest()
        total.update(json.dumps([name, "sha256:" + digest]).encode() + b"\n")
    tensors = {"b.c": torch.tensor(7), "a": torch.tensor([1.0, -0.0])}
    assert fingerprint(tensors) == "sha256:" + total.hexdigest()


def test_strides_and_wrappers_do_not_matter() -> None:
    expected = fingerprint(state(model()))
    assert expected == fingerprint(state(model()))
    assert expected == fingerprint(state(model().to(memory_format=torch.channels_last)))
    assert expected == fingerprint(state(nn.DataParallel(model())))
    assert expected == fingerprint(state(torch.compile(model())))
    inner = model()
    inner[0] = torch.compile(inner[0])
    assert "0._orig_mod.weight" in state(inner)
    assert expected == fingerprint(state(inner))
    assert expected == fingerprint(dict(reversed(state(model()).items())))


def test_everything_else_does() -> None:
    prints = {fingerprint(state(model()))}

    def add(change: Any) -> None:
        changed = state(model())
        change(changed)
        prints.add(fingerprint(changed))

    with torch.no_grad():
        add(lambda s: s["0.weight"].view(-1)[5].add_(1e-3))
        add(lambda s: s["1.running_mean"][0].add_(1))
        add(lambda s: s["1.num_batches_tracked"].add_(1))
        add(lambda s: s.update({"3.weight": s["3.weight"].double()}))
        add(lambda s: s.update({"3.weight": s["3.weight"].reshape(4, 2)}))
        add(lambda s: s.update({"4.weight": s.pop("3.weight")}))
        add(lambda s: s.pop("1.running_var"))
        add(lambda s: s.update({"3.bias": s["3.bias"].flip(0)}))
    prints.add(fingerprint({}))
    assert len(prints) == 10


def test_names() -> None:
    assert plain_name("module._orig_mod.layer1.module.0._orig_mod.weight") == "layer1.0.weight"
    assert plain_name("module") == "module" and plain_name("a.module") == "a.module"
    assert plain_name("modules.my_orig_mod.w") == "modules.my_orig_mod.w"
    with pytest.raises(DuplicateKeyError, match=r"'a\.w' and 'module\.a\.w' are both 'a\.w'"):
        fingerprint({"a.w": torch.zeros(1), "module.a.w": torch.zeros(1)})


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    expected = tensor_digest(tensor)
    monkeypatch.setattr(store_tensors, "CHUNK_BYTES", 7)
    assert tensor_digest(tensor) == expected


@pytest.mark.parametrize(
    ("name", "tensor", "word"),
    [
        ("w", torch.zeros(2, device="meta"), "meta"),
        ("w", nn.UninitializedBuffer(), "uninitialised"),
        ("w", torch.zeros(2, dtype=torch.complex64), "complex64"),
        ("w", torch.eye(2).to_sparse(), "sparse"),
        ("_fsdp_wrapped_module.w", torch.zeros(2), "FSDP"),
        ("a._flat_param", torch.zeros(2), "FSDP"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_bytes_of_their_own_raise(name: str, tensor: torch.Tensor, word: str) -> None:
    with pytest.raises(UnsupportedTensorError, match=word) as caught:
        fingerprint({"fine": torch.zeros(1), name: tensor})
    assert repr(name) in str(caught.value)


def test_sharded_tensors_raise() -> None:
    dtensor = pytest.importorskip("torch.distributed.tensor")
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        shard = dtensor.distribute_tensor(torch.zeros(4), mesh, [dtensor.Shard(0)])
        with pytest.raises(UnsupportedTensorError, match=r"'layer\.weight'.*DTensor"):
            fingerprint({"layer.weight": nn.Parameter(shard)})
    finally:
        dist.destroy_process_group()


def test_fake_tensors_raise() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(UnsupportedTensorError, match="FakeTensor"):
        fingerprint({"w": fake})


def test_an_empty_tensor_has_a_shape() -> None:
    assert tensor_digest(torch.empty(0, 3)) != tensor_digest(torch.empty(3, 0))
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor([1.0]))
    assert tensor_digest(torch.tensor(1.0)) == tensor_digest(nn.Parameter(torch.tensor(1.0)))


@pytest.mark.cuda
def test_the_device_does_not_matter(tmp_path: Path) -> None:
    expected = fingerprint(state(model()))
    assert fingerprint(state(model().cuda().to(memory_format=torch.channels_last))) == expected
    on_cpu, on_gpu = (
        TaskFile(**TASK, parts={"": Record({"kind": "x"}, state(made))}) for made in (model(), model().cuda())
    )
    save(tmp_path / "cpu.taps", on_cpu)
    save(tmp_path / "gpu.taps", on_gpu)
    assert (tmp_path / "cpu.taps").read_bytes() == (tmp_path / "gpu.taps").read_bytes()
    back = load(tmp_path / "cpu.taps", device="cuda").parts[""].tensors
    assert all(tensor.is_cuda for tensor in back.values()) and fingerprint(back) == expected
