"""Heads other than one linear classifier: masks, two label sets on one base, numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taps_ext
from taps_ext import ConfigError, TapsConfig, Task, TaskModel, TrainConfig, Trainer
from taps_ext.files.checkpoint import same_bits
from taps_ext.train import accuracy


class Segmenter(nn.Module):
    """A backbone and a convolutional head; returns a dictionary, as torchvision's segmentation models do."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.classifier(self.backbone(x))}


def squares(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images with one bright and one dark square, and masks: 0 background, 1 bright, 2 dark."""
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.05 * torch.randn(count, 1, 12, 12, generator=generator)
    masks = torch.zeros(count, 12, 12, dtype=torch.int64)
    for i in range(count):
        top, left = torch.randint(0, 4, (2,), generator=generator).tolist()
        for corner, value, grey in (((top, left), 1, 1.0), ((top + 4, left + 4), 2, 0.0)):
            rows, columns = (slice(c, c + 4) for c in corner)
            images[i, 0, rows, columns], masks[i, rows, columns] = grey, value
    return images, masks


def cross_entropy(outputs: dict[str, torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs["out"], masks)


def pixels(outputs: dict[str, torch.Tensor], masks: torch.Tensor) -> float:
    return (outputs["out"].argmax(1) == masks).float().mean().item()


@pytest.mark.parametrize("head_module", ["classifier", "classifier.2"])
def test_two_sets_of_masks_on_one_base(head_module, tmp_path) -> None:
    """Three classes, and bright against the rest: each learns its masks, with a head named as a whole or in part."""

    def head(classes: int) -> nn.Module:
        last = nn.Conv2d(8, classes, 1)
        return last if head_module == "classifier.2" else nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), last)

    x, masks = squares()
    base = Segmenter(7).eval()
    before = copy.deepcopy(base)
    model = TaskModel(base, TapsConfig(lam=0.01), head_module=head_module)
    model.add_task("three", head=head(3))
    model.add_task("bright", head=head(2))
    tasks = {
        name: Task(train=(x, y), val=(x, y), loss=cross_entropy, metrics={"pixels": pixels})
        for name, y in (("three", masks), ("bright", (masks == 1).long()))
    }
    results = Trainer(model, tasks, TrainConfig(epochs=12, lr=0.2, batch_size=8), quiet=True).fit()
    outside = (masks == 0).float().mean().item()  # what answering "background" scores
    assert results["three"].val["pixels"] > outside + 0.5 * (1 - outside)
    assert results["bright"].val["pixels"] > 0.97
    model.eval()
    with torch.no_grad():
        wanted = {name: model(x, task=name)["out"] for name in model.tasks}
        assert same_bits(model(x, task=None)["out"], before(x)["out"])
    assert wanted["three"].shape[1] == 3 and wanted["bright"].shape[1] == 2
    fresh = TaskModel(copy.deepcopy(before), head_module=head_module).eval()
    for name, classes in (("three", 3), ("bright", 2)):
        model.save_task(name, tmp_path / f"{name}.taps")
        with pytest.raises(taps_ext.ConfigError, match="pass a module of that structure as head="):
            fresh.load_task(tmp_path / f"{name}.taps")
        fresh.load_task(tmp_path / f"{name}.taps", head=head(classes))
        with torch.no_grad():
            assert same_bits(fresh(x, task=name)["out"], wanted[name])
    with pytest.raises(taps_ext.TaskFileError, match=r"'classifier\.2\.(weight|bias)': expected shape \[2\b"):
        fresh.load_task(tmp_path / "three.taps", "wrong", head=head(2))
    with torch.no_grad():
        assert same_bits(model.merge_and_unload("three").eval()(x)["out"], wanted["three"])


def test_a_count_of_classes_needs_a_linear_head() -> None:
    model = TaskModel(Segmenter(7), TapsConfig(lam=0.1), head_module="classifier.2")
    with pytest.raises(taps_ext.ConfigError, match=r"head: expected a module, since 'classifier\.2' is a Conv2d"):
        model.add_task("three", num_classes=3)


def test_torchvisions_segmentation_models(tmp_path) -> None:
    """Backbone, ASPP and an auxiliary head; the task's classifier by name."""
    segmentation = pytest.importorskip("torchvision").models.segmentation
    base = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    twin = copy.deepcopy(base)
    model = TaskModel(base, TapsConfig(lam=0.1), head_module="classifier.4")
    model.add_task("roads", head=nn.Conv2d(256, 2, 1))
    x, y = torch.randn(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
    cross_entropy(model(x, task="roads"), y).backward()
    optimizer.step()
    moved = [name for name, part, _ in model.state("roads").gated() if part.change.delta.abs().max() > 0]
    assert len(moved) == len(list(model.state("roads").gated()))
    model.save_task("roads", tmp_path / "roads.taps")
    fresh = TaskModel(twin, head_module="classifier.4").eval()
    fresh.load_task(tmp_path / "roads.taps", head=nn.Conv2d(256, 2, 1))
    with torch.no_grad():
        assert same_bits(fresh(x, task="roads")["out"], model.eval()(x, task="roads")["out"])


def test_regression(tmp_path) -> None:
    """One output, a squared error, and the epoch with the least of it."""
    x = torch.randn(128, 6)
    y = x[:, :1] * x[:, 1:2]
    base = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    model = TaskModel(base, TapsConfig(lam=0.001), head_module="4")
    model.add_task("product", num_classes=1)
    error = {"error": lambda outputs, targets: (outputs - targets).square().mean().item()}
    task = Task(train=(x, y), val=(x, y), loss=F.mse_loss, metrics=error, maximize=False)
    config = TrainConfig(epochs=40, lr=0.05, batch_size=16)
    result = Trainer(model, {"product": task}, config, quiet=True).fit()["product"]
    errors = [epoch["val_error"] for epoch in result.history]
    assert result.val["error"] == min(errors) and result.val["error"] < 0.2 * y.var().item()


@pytest.mark.parametrize(
    ("loss", "metrics", "outputs", "message"),
    [
        (F.mse_loss, None, 1, "expected int64 labels, of which accuracy can be told"),
        (
            F.cross_entropy,
            {},
            1,
            "expected probabilities of several classes for cross-entropy, got a head of one output",
        ),
        (F.cross_entropy, {}, 3, "expected probabilities of several classes for cross-entropy, got values down to -"),
    ],
)
def test_targets_that_a_loss_or_accuracy_misreads_are_refused(loss, metrics, outputs, message) -> None:
    model = TaskModel(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), TapsConfig(lam=0.001))
    model.add_task("t", num_classes=outputs)
    kept = {} if metrics is None else {"metrics": metrics}
    task = Task(train=(torch.randn(64, 6), torch.randn(64, outputs)), loss=loss, **kept)
    with pytest.raises(ConfigError, match=rf"^tasks\['t'\]\.train: {message}"):
        Trainer(model, {"t": task}, TrainConfig(epochs=2, warmup_epochs=0), quiet=True).fit()


def test_accuracy_is_of_classes_where_cross_entropy_has_them() -> None:
    outputs, targets = torch.randn(8, 8, 8, 8), torch.randint(0, 8, (8, 8, 8))
    assert accuracy(outputs, targets) == (outputs.argmax(1) == targets).double().mean().item()
    assert accuracy(outputs[..., 0, 0], targets[..., 0, 0]) == (
        (outputs[..., 0, 0].argmax(1) == targets[..., 0, 0]).double().mean().item()
    )
    with pytest.raises(ConfigError, match=r"accuracy: expected targets \[8, 8, 8\] for outputs .*, got \[8\]"):
        accuracy(outputs, targets[:, 0, 0])


def test_a_penalty_of_no_task_is_refused() -> None:
    model = TaskModel(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), TapsConfig(lam=0.5))
    assert model.sparsity_loss() == 0.0
    model.add_task("t")
    assert model.sparsity_loss("t") > 0.0
    with pytest.raises(ConfigError, match="tasks: no task is active"):
        model.sparsity_loss()


def test_a_compiled_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="base: expected the bare model, got a compiled one; compile the TaskModel"):
        TaskModel(torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))), TapsConfig(lam=0.5))


def test_a_linear_head_takes_what_the_bases_takes() -> None:
    model = TaskModel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), TapsConfig(lam=0.5))
    with pytest.raises(ConfigError, match="head: expected 8 inputs as the base's has, got 9"):
        model.add_task("t", head=nn.Linear(9, 3))


@pytest.mark.parametrize("name", ["", 5])
def test_a_name_that_is_none(name) -> None:
    with pytest.raises(ConfigError, match=rf"head_module: expected a module's name such as 'fc', got {name!r}"):
        TaskModel(nn.Linear(3, 4), TapsConfig(lam=0.1), head_module=name)
