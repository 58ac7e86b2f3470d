"""What is loaded is what was trained: bit-equal outputs in every type, layout and mode, here and in another process."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import settle
from torch import nn

import taps_ext
from taps_ext import TapsConfig, TaskModel
from taps_ext.files.checkpoint import same_bits
from taps_ext.store.errors import ParentMismatchError
from taps_ext.zoo import SmallResNet


def resnet() -> nn.Module:
    return SmallResNet(widths=(8, 16), blocks=1, channels=3)


def transformer() -> nn.Module:
    """Layer norms, functional attention, a class token and a position table."""
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=10, class_token=True
    )


MAKERS = {"resnet": resnet, "transformer": transformer}
x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
y = torch.tensor([0, 1, 2, 0, 1, 2])


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return MAKERS[kind]().eval().to(dtype)


def trained(kind: str, path: Path, *, dtype=torch.float32, layout=torch.contiguous_format, amp=False, gates="host"):
    """A model after three steps on all of its layers but some, which end closed, and its file."""
    base = base_of(kind, dtype).to(memory_format=layout)
    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=1.0, others="task"), gates=gates)
    torch.manual_seed(7)
    model.add_task("t", num_classes=3)
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.05), momentum=0.9)
    for step in range(3):
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(model(x.to(dtype), task="t").float(), y)
        optimizer.zero_grad()
        (loss + model.sparsity_loss("t")).backward()
        optimizer.step()
        if step == 1:
            with torch.no_grad():
                for _, part, _ in list(model.state("t").gated())[::3]:
                    part.gate.score.fill_(0.05)
    model.save_task("t", path)
    report = model.report("t")
    assert 0 < report.layers_open < len(report.rows)
    return model.eval()


def logits(model: nn.Module, *, dtype=torch.float32, layout=torch.contiguous_format, amp=False) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return model(x.to(dtype, memory_format=layout), task="t")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"amp": True},
        {"layout": torch.channels_last},
        {"layout": torch.channels_last, "amp": True},
    ],
    ids=["float32", "bfloat16", "float64", "autocast", "channels_last", "channels_last-autocast"],
)
def test_reloaded_is_trained(kind, options, tmp_path) -> None:
    model = trained(kind, tmp_path / "t.taps", **options)
    dtype, layout = options.get("dtype", torch.float32), options.get("layout", torch.contiguous_format)
    fresh = taps_ext.TaskModel(base_of(kind, dtype).to(memory_format=layout)).eval()
    fresh.load_task(tmp_path / "t.taps")
    assert same_bits(logits(fresh, **options), logits(model, **options))
    torch.manual_seed(11)
    model.train(), fresh.train()
    assert same_bits(logits(fresh, **options), logits(model, **options))  # batch statistics
    fresh.save_task("t", tmp_path / "again.taps")
    model.load_task(tmp_path / "again.taps", "again")
    for (name, one), (_, two) in zip(
        model.state("again").state_dict().items(), fresh.state("t").state_dict().items(), strict=True
    ):
        assert same_bits(one, two), name


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_after_training(kind, dtype, tmp_path) -> None:
    """Loading and casting commute: load then `.to(dtype)`, or load into a cast base."""
    model = trained(kind, tmp_path / "t.taps").to(dtype)
    after = taps_ext.TaskModel(base_of(kind)).eval()
    after.load_task(tmp_path / "t.taps")
    after.to(dtype)
    before = taps_ext.TaskModel(base_of(kind, dtype)).eval()
    with pytest.raises(ParentMismatchError):
        before.load_task(tmp_path / "t.taps")
    before.load_task(tmp_path / "t.taps", allow_dtype_cast=True)
    wanted = logits(model, dtype=dtype)
    assert wanted.dtype == dtype
    assert same_bits(logits(after, dtype=dtype), wanted) and same_bits(logits(before, dtype=dtype), wanted)
    model.save_task("t", tmp_path / "cast.taps")  # the file of a cast model belongs to the cast base
    own = taps_ext.TaskModel(base_of(kind, dtype)).eval()
    own.load_task(tmp_path / "cast.taps")
    assert same_bits(logits(own, dtype=dtype), wanted)
    with pytest.raises(ParentMismatchError):
        taps_ext.TaskModel(base_of(kind)).load_task(tmp_path / "cast.taps")


def test_a_cast_excuses_no_other_base(tmp_path) -> None:
    """With the file's own type nothing was cast, so another base is another base."""
    trained("resnet", tmp_path / "t.taps")
    other = base_of("resnet")
    with torch.no_grad():
        other.stem.weight.mul_(2)
    model = taps_ext.TaskModel(other)
    with pytest.raises(ParentMismatchError):
        model.load_task(tmp_path / "t.taps", allow_dtype_cast=True)
    wide = taps_ext.TaskModel(SmallResNet(widths=(16, 16), blocks=1, channels=3).half())
    with pytest.raises(taps_ext.TaskFileError, match="expected shape"):
        wide.load_task(tmp_path / "t.taps", allow_dtype_cast=True)
    assert model.tasks == wide.tasks == []


def test_a_converted_task_is_cast_too(tmp_path) -> None:
    """Whole weights follow the base's type as its own weights would."""
    base = base_of("resnet")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.stem.weight.mul_(1e-3)
    model = taps_ext.TaskModel(base)
    model.extract_task("t", tuned.state_dict())
    assert model.state("t").table["stem"].change.weight is not None
    model.save_task("t", tmp_path / "t.taps")
    half = taps_ext.TaskModel(base_of("resnet", torch.float16)).eval()
    half.load_task(tmp_path / "t.taps", allow_dtype_cast=True)
    with torch.no_grad():
        assert same_bits(logits(half, dtype=torch.float16), tuned.half()(x.half()))


@pytest.mark.parametrize("gates", ["host", "device"])
def test_compiled(gates, tmp_path) -> None:
    """The compiled reloaded model gives the bits of the compiled trained one."""
    model = trained("resnet", tmp_path / "t.taps", gates=gates)
    fresh = taps_ext.TaskModel(base_of("resnet"), gates=gates).eval()
    fresh.load_task(tmp_path / "t.taps")
    assert same_bits(logits(torch.compile(fresh)), logits(torch.compile(model)))


@pytest.mark.parametrize("kind", MAKERS)
def test_another_process(kind, tmp_path) -> None:
    model = trained(kind, tmp_path / "t.taps")
    code = (
        "import sys, torch, taps_ext\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[1] + '/../helpers']\n"
        "import test_reload as t\n"
        "torch.set_num_threads(1)\n"
        "model = taps_ext.TaskModel(t.base_of(sys.argv[3])).eval()\n"
        "model.load_task(sys.argv[2] + '/t.taps')\n"
        "torch.save(t.logits(model), sys.argv[2] + '/out.pt')\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), kind]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert same_bits(torch.load(tmp_path / "out.pt", weights_only=True), logits(model))


def test_moving_between_devices_keeps_the_bits(tmp_path) -> None:
    """`.to()` that changes nothing or comes back, and a state dict loaded into the reloaded model."""
    model = trained("resnet", tmp_path / "t.taps")
    wanted = logits(model)
    assert same_bits(logits(copy.deepcopy(model).to("cpu")), wanted)
    assert same_bits(logits(copy.deepcopy(model).to(torch.float64).to(torch.float32)), wanted)  # exact both ways
    fresh = taps_ext.TaskModel(base_of("resnet")).eval()
    fresh.load_task(tmp_path / "t.taps")
    fresh.load_state_dict(model.state_dict())
    assert same_bits(logits(fresh), wanted)


def test_a_loaded_task_takes_what_its_file_does(tmp_path) -> None:
    """A closed layer's Delta is in no file, and takes no memory until somebody trains: then it is as it was, zero."""
    base = settle(SmallResNet(channels=3, widths=(16, 32, 64), blocks=2))
    model = TaskModel(base, TapsConfig(lam=0.5, penalty="size")).eval()
    model.add_task("t", num_classes=4)
    parts = {name: part for name, part, _ in model.state("t").gated()}
    with torch.no_grad():
        for name, part in parts.items():
            part.change.delta.normal_(0, 0.1)
            part.gate.score.fill_(0.2 if name == "stem" else 0.02)
    x = torch.randn(2, 3, 16, 16)
    want, penalty = model(x, task="t"), model.sparsity_loss("t")
    size = model.save_task("t", tmp_path / "t.taps")
    trained = {name: tensor.clone() for name, tensor in model.state("t").state_dict().items()}
    other = TaskModel(model.unload(), TapsConfig(lam=0.5)).eval()
    other.load_task(tmp_path / "t.taps")
    state = other.state("t")
    held = sum(tensor.nbytes for tensor in (*state.parameters(), *state.buffers()))
    assert held <= 1.2 * size and [n for n, p, _ in state.gated() if p.change.delta is not None] == ["stem"]
    assert torch.equal(other(x, task="t"), want) and torch.equal(other.sparsity_loss("t"), penalty)
    assert (other.report("t").open, other.report("t").gated) == (
        parts["stem"].gate.size,
        sum(p.gate.size for p in parts.values()),
    )
    assert other.save_task("t", tmp_path / "again.taps") == size
    assert (tmp_path / "again.taps").read_bytes() == (tmp_path / "t.taps").read_bytes()
    copied = copy.deepcopy(other)
    copied.set_gates("t", open=["stages.0.0.*"])  # opened by hand: of zeros
    assert [n for n, p, _ in copied.state("t").gated() if p.gate.known] == ["stages.0.0.conv1", "stages.0.0.conv2"]
    assert not any(copied.state("t").table[f"stages.0.0.conv{n}"].change.delta.any() for n in (1, 2))
    scored = copy.deepcopy(other)
    with torch.no_grad():
        scored.state("t").table["stages.1.0.conv1"].gate.score.fill_(0.5)
        assert torch.equal(scored(x, task="t"), want)
    scored.save_task("t", tmp_path / "scored.taps")
    restored = copy.deepcopy(other)
    restored.state("t").load_state_dict(trained)
    assert all(torch.equal(t, trained[n]) for n, t in restored.state("t").state_dict().items())
    with pytest.warns(UserWarning, match=r"task 't': 14 closed layers were loaded without a Delta"):
        groups = other.parameter_groups("t", lr=0.1)
    assert sum(len(g["params"]) for g in groups if g["name"] == "delta") == 15
    assert not any(part.change.delta.any() for name, part, _ in state.gated() if name != "stem")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        other.parameter_groups("t", lr=0.1)
    other.train()
    other(x, task="t").square().sum().backward()
    assert all(
        part.change.delta.grad is None and part.gate.score.grad == 0
        for name, part, _ in state.gated()
        if name != "stem"
    )
