"""Between checkpoints and task files a layer at a time: what comes out is what the tasks in memory give, to the bit."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from test_convert import Small, fine_tuned, small_resnet
from torch import Tensor, nn

from taps_ext import ConfigError, FullConfig, JointTapsConfig, LoraConfig, TapsConfig, TapsError, TaskModel, store
from taps_ext.base import known
from taps_ext.store import shards as sharding
from taps_ext.store.errors import (
    BadPathError,
    HeaderError,
    KindError,
    MissingFileError,
    NotRegularFileError,
    ParentMismatchError,
)


def shards(folder: Path, state: dict[str, Tensor], count: int = 3) -> Path:
    """A checkpoint in several files, by its index."""
    folder.mkdir()
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        store.write_safetensors(folder / file, {n: t for n, t in state.items() if places[n] == file})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def model_of(base: nn.Module, config: TapsConfig | None = None) -> TaskModel:
    return TaskModel(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "same"), [(Small, "attention.in_proj_weight"), (small_resnet, "stem.weight")])
@pytest.mark.parametrize("fraction", [None, 0.1])
def test_an_extracted_file_is_that_of_the_task_in_memory(make, same, dtype, fraction, tmp_path) -> None:
    """Byte for byte, whatever the checkpoint lies in."""
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    tuned = fine_tuned(base, classes=3, same=(same,)).state_dict()
    if fraction is None:
        tuned = {name: tensor * 1e-6 if name.endswith("conv.weight") else tensor for name, tensor in tuned.items()}
    made = model_of(base)
    packing = made.extract_task("t", tuned, top_fraction=fraction)
    made.save_task("t", tmp_path / "memory.taps")
    wanted = (tmp_path / "memory.taps").read_bytes()
    store.write_safetensors(tmp_path / "tuned.safetensors", tuned)
    index = shards(tmp_path / "shards", tuned)
    for given in (tuned, tmp_path / "tuned.safetensors", index, str(index.parent)):
        done = model_of(base).extract_file("t", given, tmp_path / "streamed.taps", top_fraction=fraction)
        assert (tmp_path / "streamed.taps").read_bytes() == wanted and done.bytes == len(wanted)
        assert done.packing == packing
        again = model_of(base)
        again.extract_task("t", given, top_fraction=fraction)
        again.save_task("t", tmp_path / "again.taps")
        assert (tmp_path / "again.taps").read_bytes() == wanted
    report = made.report("t")
    assert done.layers == len(report.rows) and done.layers_open == report.layers_open == done.layers - 1
    assert done.as_weights == sum(row.open and row.change == "whole" for row in report.rows)
    if fraction is None and make is Small and dtype == torch.float32:
        assert done.as_weights == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "memory.taps", "tuned.safetensors", "shards", "streamed.taps", "again.taps"
    }  # fmt: skip


def test_what_the_fraction_keeps(tmp_path) -> None:
    """The largest elements of W_t - W, exactly; the error is what they leave out, and is what packing finds."""
    torch.manual_seed(0)
    base = small_resnet().eval()
    tuned = fine_tuned(base, classes=3).state_dict()
    done = model_of(base).extract_file("t", tuned, tmp_path / "t.taps", top_fraction=0.2)
    packed = model_of(base)
    packed.extract_task("t", tuned)
    assert packed.pack_task("t", codec="bitmask:0.2") == done.packing
    packed.save_task("t", tmp_path / "packed.taps")
    assert (tmp_path / "t.taps").read_bytes() == (tmp_path / "packed.taps").read_bytes()
    loaded = model_of(base)
    loaded.load_task(tmp_path / "t.taps")
    plain, before = loaded.task_state_dict("t"), base.state_dict()
    assert done.packing is not None and len(done.packing.rows) == done.layers
    for row in done.packing.rows:
        name = f"{row.layer}.weight"
        delta = tuned[name] - before[name]
        kept = round(0.2 * delta.numel())
        chosen = delta.abs().flatten().topk(kept).indices
        left = delta.flatten().clone()
        thinned = torch.zeros_like(left)
        thinned[chosen], left[chosen] = left[chosen], 0
        assert torch.equal(plain[name], before[name] + thinned.view_as(delta))
        assert row.codec == "bitmask" and row.error == pytest.approx(
            float(left.double().norm() / delta.double().norm()), rel=1e-12
        )
        facts = store.read_header(tmp_path / "t.taps").metadata.parts[row.layer].facts
        assert facts["packed"]["error"] == row.error and facts["change"] == {"kind": "bitmask", "kept": kept}


@pytest.mark.parametrize("fraction", [0, 1.5, -0.1, True, "0.1", float("nan")])
def test_a_fraction_is_one(fraction, tmp_path) -> None:
    made = model_of(small_resnet().eval())
    for act in (
        lambda: made.extract_file("t", {}, tmp_path / "t.taps", top_fraction=fraction),
        lambda: made.extract_task("t", {}, top_fraction=fraction),
    ):
        with pytest.raises(ConfigError, match=r"top_fraction: expected a number in \(0, 1\], got"):
            act()
    assert not list(tmp_path.iterdir())


class Twice(nn.Module):
    """One module under two names, and one tensor in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.norm = nn.BatchNorm1d(4)
        self.norm.register_buffer("scratch", torch.ones(2), persistent=False)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.again(self.first(x))))


MERGED = {
    "taps": (Small, TapsConfig(lam=0.1), None),
    "lora": (Small, LoraConfig(rank=2), None),
    "full": (Twice, FullConfig(), None),
    "packed": (small_resnet, TapsConfig(lam=0.1), "int8"),
    "family": (small_resnet, JointTapsConfig(lam=0.1), None),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_file_is_the_checkpoint_of_the_task_in_memory(name: str, tmp_path) -> None:
    make, config, codec = MERGED[name]
    torch.manual_seed(0)
    base = make().eval()
    made = model_of(base, config)
    made.add_task("t", num_classes=3)
    with torch.no_grad():
        for group in made.parameter_groups(lr=0.1):
            for index, parameter in enumerate(group["params"]):
                score = parameter.dim() == 0
                parameter.copy_(torch.tensor(0.05 if index % 2 else 0.2) if score else torch.randn_like(parameter))
    if codec is not None:
        made.pack_task("t", codec=codec)
    if made.families:
        (family,) = made.families
        made.save_shared(family, tmp_path / "family.taps")
    made.save_task("t", tmp_path / "t.taps")
    other = model_of(base, config)
    other.load_task(tmp_path / "t.taps")
    wanted = other.task_state_dict("t")
    store.write_safetensors(tmp_path / "memory.safetensors", wanted, {"format": "pt"})
    streaming = model_of(base)
    done = streaming.merge_file(tmp_path / "t.taps", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    assert (done.task, done.tensors) == ("t", len(wanted)) and not streaming.tasks
    assert any(not torch.equal(wanted[k], t) for k, t in base.state_dict().items() if wanted[k].shape == t.shape)
    if made.families:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "family.taps").rename(tmp_path / "elsewhere" / "f.taps")
        with pytest.raises(ParentMismatchError):
            streaming.merge_file(tmp_path / "t.taps", tmp_path / "no.safetensors")
        streaming.merge_file(
            tmp_path / "t.taps", tmp_path / "out.safetensors", shared=tmp_path / "elsewhere" / "f.taps"
        )
        assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
        assert not (tmp_path / "no.safetensors").exists()


class Tied(nn.Module):
    """An embedding and a layer of one tensor, which a task may move apart."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.decoder, self.fc = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(7, 2)
        self.decoder.weight = self.emb.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.fc(self.decoder(self.emb(i)))


def test_two_values_for_one_tensor_are_refused(tmp_path) -> None:
    base = Tied().eval()
    made = model_of(base, FullConfig(exclude_modules=["emb"]))
    made.add_task("t", num_classes=3)
    file, out = tmp_path / "t.taps", tmp_path / "out.safetensors"
    made.save_task("t", file)
    model_of(base).merge_file(file, out)  # one value still
    plain, _ = store.read_safetensors(out)
    assert torch.equal(plain["decoder.weight"], base.emb.weight) and torch.equal(plain["emb.weight"], base.emb.weight)
    out.unlink()
    with torch.no_grad():
        for parameter in made.state("t").table["decoder"].parameters():
            parameter.add_(1)
    made.save_task("t", file)
    for act in (lambda: made.task_state_dict("t"), lambda: model_of(base).merge_file(file, out)):
        with pytest.raises(TapsError, match=r"decoder\.weight: is one tensor with emb\.weight in the base"):
            act()
    assert not out.exists()


class Alive:
    """How many bytes of the tensors that a reader gave are alive, and were at most."""

    def __init__(self) -> None:
        self.now = self.most = self.largest = self.read = 0

    def watch(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        self.now, self.read, self.largest = self.now + size, self.read + size, max(self.largest, size)
        self.most = max(self.most, self.now)
        weakref.finalize(tensor.untyped_storage(), self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


def deep(layers: int = 12, width: int = 32) -> nn.Sequential:
    made: list[nn.Module] = [nn.Linear(width, width) for _ in range(layers)]
    return nn.Sequential(*made, nn.Linear(width, 3)).eval()


@pytest.mark.parametrize("fraction", [None, 0.1])
def test_of_a_checkpoint_one_tensor_is_in_memory(fraction, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    base = deep()
    tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
    index, alive, read = shards(tmp_path / "tuned", tuned), Alive(), sharding.Shard.read
    monkeypatch.setattr(sharding.Shard, "read", lambda self, info: alive.watch(read(self, info)))
    model_of(base).extract_file("t", index, tmp_path / "t.taps", top_fraction=fraction)
    total = sum(tensor.nbytes for tensor in tuned.values())
    assert alive.read == total and alive.largest == 32 * 32 * 4
    assert alive.most <= alive.largest + 3 * 32 * 4 and alive.now == 0  # the head's, or a layer's, bias beside


@pytest.mark.parametrize("codec", [None, "int8"])
def test_of_a_task_one_part_is_in_memory(codec, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    base = deep()
    made = model_of(base, FullConfig())
    made.add_task("t", num_classes=3)
    with torch.no_grad():
        for parameter in made.state("t").parameters():
            parameter.add_(torch.randn_like(parameter))
    if codec is not None:
        made.pack_task("t", codec=codec)
    made.save_task("t", tmp_path / "t.taps")
    alive, read, spooled = Alive(), store.io._read_tensor, store.Spool._read
    monkeypatch.setattr(store.io, "_read_tensor", lambda *a, **k: alive.watch(read(*a, **k)))
    monkeypatch.setattr(store.Spool, "_read", lambda *a: alive.watch(spooled(*a)))
    model_of(base).merge_file(tmp_path / "t.taps", tmp_path / "out.safetensors")
    one = 32 * 32 * 4 + 32 * 4  # a layer: weight and bias
    assert alive.read > 12 * 32 * 32 and alive.most <= one and alive.now == 0


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from taps_ext import TaskModel

def peak(act):
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    act()
    print(held("VmHWM") - before)

def held(key):
    words = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()
    return int(words[1]) * 1024

source, out, layers, fraction = sys.argv[1:]
torch.manual_seed(0)
base = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(int(layers))], nn.Linear(1024, 3)).eval()
small = TaskModel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)).eval())
small.extract_file("warm", {k: v + 1 for k, v in small.base.state_dict().items()}, out, top_fraction=0.1)
small.merge_file(out, out + ".safetensors")
model = TaskModel(base)
peak(lambda: model.extract_file("t", source, out, top_fraction=float(fraction) or None))
peak(lambda: model.merge_file(out, out + ".safetensors"))
"""


def peaks(*words: object) -> list[int]:
    """Bytes by which the two commands' memory grows beyond the base's, in a process of its own."""
    # Blocks of a layer's size go back to the system when they are freed, as those above 32 MiB do in any case: else the
    # C library keeps some, more or fewer from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    if "clear_refs" in run.stderr:
        pytest.skip("the peak of memory cannot be reset here")
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_memory_does_not_grow_with_layers(fraction: float, tmp_path) -> None:
    """Eight layers of 4 MiB, and thirty: the peak beyond the base is one layer's steps in both. The 22 layers between
    them are 88 MiB of a checkpoint, and as much of a task; the bound allows one, for headers and records of layers.
    A layer's steps hold at most the checkpoint's weight, a copy of it, W + Delta, Delta and what is kept of it in
    float32 (5), and the last two and their difference in float64 (6): 12 are more."""
    layer, found = 1024 * 1024 * 4, []
    for layers in (8, 30):
        torch.manual_seed(0)
        base = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(layers)], nn.Linear(1024, 3)).eval()
        tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
        out = tmp_path / f"{layers}.taps"
        found.append(peaks(shards(tmp_path / f"{layers} layers", tuned), out, layers, fraction))
        if not fraction:
            back, _ = store.read_safetensors(f"{out}.safetensors")
            assert all(torch.equal(back[name], tensor) for name, tensor in tuned.items())
    for few, many in zip(*found, strict=True):
        assert many - few < layer and few < 12 * layer


def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    base = small_resnet().eval()
    tuned = fine_tuned(base, classes=3).state_dict()
    made, out = model_of(base), tmp_path / "t.taps"
    index = shards(tmp_path / "tuned", tuned)
    with pytest.raises(MissingFileError, match="no such folder"):
        made.extract_file("t", index, tmp_path / "no" / "t.taps")
    with pytest.raises(ConfigError, match="state_dict: has no 'bn.weight'"):
        made.extract_file("t", {k: v for k, v in tuned.items() if k != "bn.weight"}, out)
    with pytest.raises(ConfigError, match=r"bn\.weight: expected finite values"):
        made.extract_file("t", {**tuned, "bn.weight": tuned["bn.weight"] * torch.nan}, out)
    with pytest.raises(ConfigError, match="config: expected a FullConfig"):
        made.extract_file("t", tuned, out, config=TapsConfig(lam=1.0))  # type: ignore[arg-type]
    made.extract_file("t", index, out)
    with pytest.raises(KindError, match="expected a plain checkpoint, got a file of taps_ext's own"):
        made.extract_file("u", out, tmp_path / "u.taps")
    (index.parent / "bad.safetensors.index.json").write_text("{}")
    with pytest.raises(HeaderError, match="expected a weight_map"):
        made.extract_file("u", index.parent / "bad.safetensors.index.json", tmp_path / "u.taps")
    kept = out.read_bytes()
    content = bytearray(kept)
    content[-1] ^= 1
    (tmp_path / "damaged.taps").write_bytes(content)
    with pytest.raises(store.errors.DigestError):
        made.merge_file(tmp_path / "damaged.taps", tmp_path / "out.safetensors")
    with pytest.raises(ParentMismatchError):
        model_of(fine_tuned(base, classes=3)).merge_file(out, tmp_path / "out.safetensors")

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    for act, path in (
        (lambda path: made.extract_file("u", index, path), tmp_path / "u.taps"),
        (lambda path: made.merge_file(out, path), tmp_path / "out.safetensors"),
    ):
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))) as caught:
            act(path)
        assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"t.taps", "tuned", "damaged.taps"}
    assert out.read_bytes() == kept and not made.tasks


HEADS = {
    "0-d": lambda: nn.Sequential(nn.Linear(4, 3), Scaled()),
    "none": nn.Identity,
    "no parameter": lambda: nn.BatchNorm1d(4, affine=False),
    "one for all": lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()),
}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_any_parameters(kind: str, tmp_path) -> None:
    """Only labels need a number of outputs, and a head that says it."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("body", nn.Linear(4, 4))
    base.add_module("fc", HEADS[kind]())
    tuned, asked = {name: tensor + 1 for name, tensor in base.state_dict().items()}, []
    made = model_of(base)
    made.extract_task("t", tuned, head_module="fc")
    made.save_task("t", tmp_path / "memory.taps")
    model_of(base).extract_file("t", tuned, tmp_path / "t.taps", head_module="fc")
    assert (tmp_path / "t.taps").read_bytes() == (tmp_path / "memory.taps").read_bytes()
    with pytest.raises(ConfigError, match="labels: expected a head that has out_features, got a "):
        model_of(base).extract_file(
            "t", tuned, tmp_path / "u.taps", head_module="fc", labels=lambda n: asked.append(n) or ["a"]
        )
    assert not asked and not (tmp_path / "u.taps").exists()


def test_labels_are_as_many_as_outputs(tmp_path) -> None:
    """As in save_task: what load_task would refuse is not written."""
    torch.manual_seed(0)
    base = small_resnet().eval()
    tuned = fine_tuned(base, classes=3).state_dict()
    made, out = model_of(base), tmp_path / "t.taps"
    for labels, problem in (
        (["a"], r"expected 3 names \(the head of 't'\), got 1"),
        ("abc", "expected a list of strings"),
    ):
        with pytest.raises(ConfigError, match=f"labels: {problem}"):
            made.extract_file("t", tuned, out, labels=lambda n, given=labels: given)
        assert not out.exists()
    made.extract_file("t", tuned, out, labels=lambda n: [str(i) for i in range(n)])
    made.load_task(out)
    assert store.read_header(out).metadata.labels == ["0", "1", "2"]


def test_a_bad_out_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    base = small_resnet().eval()
    made, file = model_of(base), tmp_path / "t.taps"
    index = shards(tmp_path / "tuned", fine_tuned(base, classes=3).state_dict())
    made.extract_file("t", index, file)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    def read(*args: object, **words: object) -> Tensor:
        raise AssertionError("nothing is read")

    monkeypatch.setattr(sharding.Shard, "read", read)
    monkeypatch.setattr(store.io, "_read_tensor", read)
    monkeypatch.setattr(known, "base_fingerprint", read)
    for out, error, problem in (
        (str(tmp_path), NotRegularFileError, "expected a file to replace, got a folder"),
        ("a\0b", BadPathError, "expected a path, got one with embedded null"),
        (str(tmp_path / "loop"), BadPathError, "expected a path, got one with too many"),
        (str(tmp_path / ("x" * 300)), BadPathError, "expected a path, got one with file name too long"),
    ):
        for act in (lambda out=out: made.extract_file("u", index, out), lambda out=out: made.merge_file(file, out)):
            with pytest.raises(error, match=problem):
                act()
