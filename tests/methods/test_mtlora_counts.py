"""The parameter counts of MTLoRA (arXiv 2403.20320) on timm's Swin-T, and those in the bytes of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from taps_ext import MTLoraConfig, TaskModel, store
from taps_ext.dense import ConcatDecoder, DenseBase

timm = pytest.importorskip("timm")

TAPS = ("layers.1.downsample", "layers.2.downsample", "layers.3.downsample", "layers.3")
OUTPUTS = {"semseg": 21, "parts": 7, "saliency": 1, "normals": 3}
REDUCTION, NORMS, TABLES, EMBEDDING = 1_548_288, 23_040, 23_322, 4_896


@pytest.fixture(scope="module")
def base() -> DenseBase:
    return DenseBase(timm.create_model("swin_tiny_patch4_window7_224"), TAPS)


def adapted(base: nn.Module, config: MTLoraConfig, outputs: dict[str, int]) -> TaskModel:
    model = TaskModel(base, config)
    for name, count in outputs.items():
        model.add_task(name, head=ConcatDecoder(base.channels, count))
    return model


def counted(model: TaskModel) -> tuple[int, int, int]:
    """What the tasks share, what they have of their own, and their decoders."""
    reports = [model.report(name) for name in model.tasks]
    own = sum(sum(row.own for row in report.rows) for report in reports)
    assert all(report.norms == report.others == 0 for report in reports)
    return reports[0].shared, own, sum(report.head for report in reports)


def test_the_base_is_the_papers(base: DenseBase) -> None:
    assert base.channels == (192, 384, 768, 768)


@pytest.mark.parametrize(
    ("rank", "own", "total"),
    [
        (16, 4, 4_953_146),
        pytest.param(32, 4, 6_083_642, marks=pytest.mark.thorough),
        (64, 4, 8_344_634),
        pytest.param(5, 3, None, marks=pytest.mark.thorough),
    ],
    ids=["16", "32", "64", "5"],
)
def test_mtlora(base: DenseBase, rank: int, own: int, total: int | None) -> None:
    model = adapted(base, MTLoraConfig(rank=rank, task_rank=own), OUTPUTS)
    shared, tasks, decoders = counted(model)
    model.unload()
    assert shared == 70_656 * rank + REDUCTION + NORMS + TABLES + EMBEDDING
    assert REDUCTION + NORMS + TABLES + EMBEDDING == 1_599_546
    assert tasks == 17_280 * own * len(OUTPUTS)
    assert decoders == 1_946_624
    assert total in (None, shared + tasks + decoders)


@pytest.mark.parametrize(
    ("rank", "total"),
    [
        (4, 2_573_114),
        pytest.param(8, 2_871_866, marks=pytest.mark.thorough),
        pytest.param(16, 3_469_370, marks=pytest.mark.thorough),
        pytest.param(32, 4_664_378, marks=pytest.mark.thorough),
        (64, 7_054_394),
    ],
    ids=["4", "8", "16", "32", "64"],
)
def test_mtlora_plus(base: DenseBase, rank: int, total: int) -> None:
    model = adapted(base, MTLoraConfig(rank=rank, plus=True), OUTPUTS)
    counts = counted(model)
    model.unload()
    assert counts[0] == (70_656 + 4_032) * rank + NORMS + TABLES + EMBEDDING
    assert sum(counts) == total


def test_other_numbers_of_tasks(base: DenseBase) -> None:
    """294,840 T + 1,081 sum n_t + 183,168 T of decoders."""
    outputs = {"one": 2, "two": 5}
    model = adapted(base, MTLoraConfig(rank=2, task_rank=1), outputs)
    counts = counted(model)
    model.unload()
    assert counts == (70_656 * 2 + 1_599_546, 17_280 * 2, 294_840 * 2 + 1_081 * 7 + 183_168 * 2)


def test_bytes_of_files(base: DenseBase, tmp_path: Path) -> None:
    model = adapted(base, MTLoraConfig(rank=3, task_rank=2), {"semseg": 21, "normals": 3})
    model.save_shared("mtlora", tmp_path / "mtlora.shared.taps")
    header = store.read_header(tmp_path / "mtlora.shared.taps")
    kinds = {"reduction": 0, "norms": 0, "tables": 0, "embedding": 0, "lowrank": 0}
    for name, info in header.tensors.items():
        module = name.rpartition(":")[0]
        facts = header.metadata.parts[module].facts
        kind = "lowrank" if (facts.get("change") or {}).get("kind") == "lowrank-dropout" else "reduction"
        kind = "tables" if facts["kind"] == "own" and facts["role"] == "other" else kind
        kind = "norms" if facts["kind"] == "own" and facts["role"] == "norm" else kind
        kind = "embedding" if "patch_embed" in module else kind
        kinds[kind] += info.nbytes
    assert kinds == {
        "reduction": 4 * REDUCTION,
        "norms": 4 * NORMS,
        "tables": 4 * TABLES,
        "embedding": 4 * EMBEDDING,
        "lowrank": 4 * 70_656 * 3,
    }
    for name in model.tasks:
        model.save_task(name, tmp_path / f"{name}.taps")
        header = store.read_header(tmp_path / f"{name}.taps")
        assert sum(i.nbytes for n, i in header.tensors.items() if not n.startswith("decoder")) == 4 * 17_280 * 2
    model.unload()


def test_no_last_norm(base: DenseBase) -> None:
    """timm's has one; of a base that keeps it no task trains it (1,536 in all)."""
    plain = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.warns(UserWarning, match="no features behind layers.0.blocks.1, layers.1.blocks.1, layers.2.blocks.5"):
        model = TaskModel(plain, MTLoraConfig(rank=16))
        model.add_task("t", num_classes=3)
    assert "norm" not in model.state("t").modules_used
    assert model.report("t").shared == 70_656 * 16 + 1_599_546
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224), task="t").shape == (1, 3)
