"""The counts of the paper's authors, reproduced from `model.report` and the saved file (DESIGN section 9)."""

from __future__ import annotations

import pytest
import torch

from taps_ext import TapsConfig, TaskModel, store

models = pytest.importorskip("torchvision").models

# Convolutions that the authors' CUB run opens, in module order from 0; it prints 0.609517.
CUB = [25, 26, 27, 40, *range(43, 50), 51, 52]


@pytest.fixture(scope="module")
def cub() -> TaskModel:
    model = TaskModel(models.resnet50(), TapsConfig(lam=0.1))
    model.add_task("cub", num_classes=200)
    with torch.no_grad():
        for index, (_, part, _) in enumerate(model.state("cub").gated()):
            part.gate.score.fill_(0.15 if index in CUB else 0.05)
    return model


def test_cub_run_of_the_authors(cub: TaskModel) -> None:
    report = cub.report("cub")
    assert len(report.rows) == 53 and report.gated == 23_454_912
    assert [index for index, row in enumerate(report.rows) if row.open] == CUB
    norms = {
        name: sum(p.numel() for p in own.parameters())
        for name, own in cub.state("cub").table.items()
        if "norm" in own.roles()
    }
    assert sum(norms.values()) == report.norms
    counted = sum(size for name, size in norms.items() if "downsample" not in name)  # theirs leaves those out
    assert counted == 45_440
    total = report.base_parameters + len(report.rows)  # and counts the scores
    assert total == 25_557_085
    assert f"{(report.open + counted) / total:.6f}" == "0.609517"


def test_the_file_holds_what_the_report_counts(cub: TaskModel, tmp_path) -> None:
    report = cub.report("cub")
    path = tmp_path / "cub.taps"
    cub.save_task("cub", path)
    header = store.read_header(path)
    sizes = {name: info.nbytes for name, info in header.tensors.items()}
    assert sum(size for name, size in sizes.items() if name.endswith(":delta")) == report.bytes == 4 * report.open
    scores = sum(size for name, size in sizes.items() if name.endswith(":score"))
    assert scores == 4 * len(report.rows)
    norms = [own for own in cub.state("cub").table.values() if "norm" in own.roles()]
    statistics = sum(buffer.nbytes for own in norms for buffer in own.buffers())
    assert sum(sizes.values()) == report.bytes + scores + 4 * (report.norms + report.head) + statistics
    overhead = path.stat().st_size - sum(sizes.values())
    assert 0 < overhead < 100_000  # names, digests, settings


@pytest.mark.parametrize(
    ("name", "layers", "weights", "shares"),
    [
        ("resnet50", 53, 23_454_912, {"conv1": 0.04, "layer1": 0.91, "layer2": 5.17, "layer3": 30.18, "layer4": 63.71}),
        ("resnet34", 36, 21_267_648, None),
    ],
)
def test_published_counts(name: str, layers: int, weights: int, shares: dict[str, float] | None) -> None:
    model = TaskModel(getattr(models, name)(), TapsConfig(lam=0.1))
    model.add_task("t", num_classes=2)
    report = model.report("t")
    assert (len(report.rows), report.gated) == (layers, weights)
    for stage, percent in (shares or {}).items():
        own = sum(row.parameters for row in report.rows if row.layer.startswith(stage))
        assert f"{100 * own / report.gated:.2f}" == f"{percent:.2f}"
