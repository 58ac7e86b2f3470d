"""Tasks on the same images: one run of the backbone where their decoders are all that they differ by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import taps_ext.train.joint as joint
from taps_ext import FullConfig, MTLoraConfig, ProbeConfig, TapsConfig, TaskModel
from taps_ext.dense import RMSE, BalancedLoss, DenseBase, LightDecoder, MeanIoU, SegmentationLoss, ValueLoss
from taps_ext.train import MultiTask, Task, TrainConfig, Trainer
from taps_ext.train.one_body import outputs_over_one_body
from taps_ext.zoo import SmallResNet

LOSSES = {"seg": SegmentationLoss(), "edge": BalancedLoss(0.95), "far": ValueLoss()}


class Items(torch.utils.data.Dataset):
    def __init__(self, missing: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(12, 3, 16, 16, generator=generator)
        self.missing = missing

    def __len__(self) -> int:
        return len(self.x)

    def identity(self) -> list:
        return [self.missing]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.x[index]
        labels = (x[0] > 0).long() + (x[1] > 0.5).long()
        labels[:2] = 255
        found = {"seg": labels, "edge": (x[2] > 1).long(), "far": x[0].abs().masked_fill(x[1] > 1, math.nan)}
        if self.missing and index % 3 == 0:
            del found["edge"]
        if self.missing and index % 4 == 1:
            found["far"] = None
        return x, found


def model_of(config) -> TaskModel:
    torch.manual_seed(0)
    backbone = SmallResNet(channels=3, widths=(4, 6), blocks=1, stem_stride=2).eval()
    model = TaskModel(DenseBase(backbone, image=(3, 16, 16)), config)
    for name, outputs in (("seg", 3), ("edge", 1), ("far", 1)):
        model.add_task(name, head=LightDecoder(model.base.channels, outputs, width=5))
    return model


def fit(model: TaskModel, missing: bool):
    train, val = MultiTask(Items(missing)), MultiTask(Items(missing, seed=1))
    metrics = {"seg": {"miou": MeanIoU(3)}, "edge": {}, "far": {"rmse": RMSE()}}
    tasks = {
        name: Task(
            train=train.task(name),
            val=val.task(name),
            loss=loss,
            metrics=metrics[name],
            maximize=name == "seg",
        )
        for name, loss in LOSSES.items()
    }
    config = TrainConfig(epochs=2, batch_size=4, lr=0.05, select="last")
    return Trainer(model, tasks, config, quiet=True).fit("joint")


def swin(config) -> TaskModel:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    backbone = timm.models.swin_transformer.SwinTransformer(**sizes).eval()
    model = TaskModel(DenseBase(backbone, ["layers.1.downsample", "layers.1"], image=(3, 16, 16)), config)
    for name, outputs in (("seg", 3), ("edge", 1), ("far", 1)):
        model.add_task(name, head=LightDecoder(model.base.channels, outputs, width=5))
    return model


def runs(model: TaskModel, missing: bool) -> tuple[int, dict]:
    """How often the backbone ran in training, and what came out."""
    count = 0

    def hook(module, args, output) -> None:
        nonlocal count
        count += model.training

    first = next(m for m in model.base.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    handle = first.register_forward_hook(hook)
    results = fit(model, missing)
    handle.remove()
    return count, results


@pytest.mark.parametrize("missing", [False, True], ids=["all", "missing"])
def test_the_backbone_runs_once_for_all(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    once = model_of(ProbeConfig())
    count, results = runs(once, missing)
    assert count == 2 * 3  # steps of two epochs
    each = model_of(ProbeConfig())
    monkeypatch.setattr(joint, "outputs_of_all", lambda *args: None)
    count, expected = runs(each, missing)
    assert count == 3 * 2 * 3
    for name in LOSSES:
        assert results[name].val["loss"] == pytest.approx(expected[name].val["loss"], rel=1e-4)
        before = model_of(ProbeConfig()).state(name).head.state_dict()
        others = each.state(name).head.state_dict()
        for key, value in once.state(name).head.state_dict().items():
            # A batch cut before or behind the backbone: fp32 products of other sizes round otherwise, and six steps of
            # 0.05 carry that on; where nothing is missing they are the same to the bit.
            assert torch.allclose(value, others[key], rtol=0, atol=1e-4 if missing else 0.0), (name, key)
            assert value.dim() < 2 or not torch.equal(value, before[key])


def test_mtlora_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MTLoraConfig(rank=2, task_rank=1, dropout=0.0)
    count, results = runs(swin(config), False)
    assert count == 2 * 3
    assert runs(swin(config), True)[0] > 2 * 3  # a decoder's statistics are of its own samples alone
    monkeypatch.setattr(joint, "outputs_of_all", lambda *args: None)
    count, expected = runs(swin(config), False)
    assert count == 3 * 2 * 3
    for name in LOSSES:  # fp32 sums in another order, carried on by six steps of 0.05
        assert results[name].val["loss"] == pytest.approx(expected[name].val["loss"], rel=1e-3)


@pytest.mark.parametrize("config", [TapsConfig(lam=0.0), FullConfig()], ids=["taps", "full"])
def test_tasks_with_bodies_of_their_own_run_by_themselves(config) -> None:
    count, _ = runs(model_of(config), False)
    assert count == 3 * 2 * 3


def test_gradients_are_those_of_the_sum_of_the_losses() -> None:
    model, items = model_of(ProbeConfig()).double().train(), Items(True)
    x = torch.stack([items[i][0] for i in range(6)]).double()
    targets = {name: [items[i][1].get(name) for i in range(6)] for name in LOSSES}
    wholes = {name: (x, [i for i, one in enumerate(found) if one is not None]) for name, found in targets.items()}
    assert [len(rows) for _, rows in wholes.values()] == [6, 4, 4]
    outputs = outputs_over_one_body(model, wholes, torch.device("cpu"))
    losses = {
        name: loss(outputs[name], torch.stack([targets[name][i] for i in wholes[name][1]]))
        for name, loss in LOSSES.items()
    }
    sum(losses.values()).backward()
    for name, loss in LOSSES.items():
        head, rows = model.state(name).head, wholes[name][1]
        got = [parameter.grad.clone() for parameter in head.parameters()]
        alone = loss(model(x[rows], task=name), torch.stack([targets[name][i] for i in rows]))
        wanted = torch.autograd.grad(alone, list(head.parameters()))
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)  # float64: sums of a few hundred terms below 1
