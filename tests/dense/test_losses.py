"""Losses and metrics of maps against formulas in float64, pixel by pixel."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from taps_ext.dense import (
    RMSE,
    BalancedLoss,
    BoundaryF,
    MeanAngle,
    MeanIoU,
    NormalsLoss,
    SegmentationLoss,
    ValueLoss,
    boundaries,
    delta_m,
    distance,
)
from taps_ext.errors import ConfigError
from taps_ext.train.metrics import weight_of

# float64: sums of some hundred terms near 1 err by less than 1e-13
close = functools.partial(pytest.approx, rel=1e-12, abs=1e-12)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int, *shape: int, ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(classes, shape, generator=generator)
    return found.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


def pixels(targets: Tensor) -> list[tuple[int, int, int]]:
    return [tuple(place) for place in (targets != 255).nonzero().tolist()]


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]], ids=["plain", "weighted"])
def test_segmentation(weights) -> None:
    x, y = random(2, 3, 4, 5), labels(3, 2, 4, 5)
    total = norm = 0.0
    for b, i, j in pixels(y):
        target = int(y[b, i, j])
        weight = 1.0 if weights is None else weights[target]
        total += weight * (math.log(sum(math.exp(float(v)) for v in x[b, :, i, j])) - float(x[b, target, i, j]))
        norm += weight
    loss = SegmentationLoss(weights=weights)
    assert float(loss(x, y)) == close(total / norm)
    assert weight_of(loss, y) == close(norm)


@pytest.mark.parametrize("weight", [None, 0.95])
def test_balanced(weight) -> None:
    x, y = random(2, 1, 4, 5), labels(2, 2, 4, 5)
    places = pixels(y)
    zeros = sum(int(y[place]) == 0 for place in places) / len(places)
    w = zeros if weight is None else weight
    total = 0.0
    for b, i, j in places:
        p = 1 / (1 + math.exp(-float(x[b, 0, i, j])))
        total -= w * math.log(p) if y[b, i, j] == 1 else (1 - w) * math.log(1 - p)
    loss = BalancedLoss(weight)
    assert float(loss(x, y)) == close(total / len(places))
    assert weight_of(loss, y) == len(places)


def test_values_and_normals() -> None:
    x, y = random(2, 1, 4, 5), random(2, 4, 5, seed=2)
    y[0, 1:3] = math.nan
    kept = [tuple(p) for p in y.isfinite().nonzero().tolist()]
    assert len(kept) == 30
    total = sum(abs(float(x[b, 0, i, j]) - float(y[b, i, j])) for b, i, j in kept)
    assert float(ValueLoss()(x, y)) == close(total / 30)
    assert weight_of(ValueLoss(), y) == 30

    n, m = random(2, 3, 4, 5), torch.nn.functional.normalize(random(2, 3, 4, 5, seed=3), dim=1)
    m[0, 1, 1:3] = math.nan  # one component says that the pixel has none
    total = angle = 0.0
    for b, i, j in kept:
        vector, true = n[b, :, i, j].tolist(), m[b, :, i, j].tolist()
        length = math.sqrt(sum(v * v for v in vector))
        total += sum(abs(v / length - t) for v, t in zip(vector, true, strict=True)) / 3
        angle += math.degrees(math.acos(sum(v * t for v, t in zip(vector, true, strict=True)) / length))
    assert float(NormalsLoss()(n, m)) == close(total / 30)
    metric = MeanAngle()
    metric.update(n[:1], m[:1])
    metric.update(n[1:], m[1:])
    assert metric.compute() == pytest.approx(angle / 30, rel=1e-9)  # acos loses digits here


@pytest.mark.parametrize(
    "loss, outputs, targets",
    [
        (SegmentationLoss(), 3, torch.full((1, 2, 2), 255)),
        (BalancedLoss(0.95), 1, torch.full((1, 2, 2), 255)),
        (ValueLoss(), 1, torch.full((1, 2, 2), math.nan)),
        (NormalsLoss(), 3, torch.full((1, 3, 2, 2), math.nan)),
    ],
    ids=["segmentation", "balanced", "values", "normals"],
)
def test_what_does_not_count_has_no_gradient(loss, outputs: int, targets: Tensor) -> None:
    assert weight_of(loss, targets) == 0  # so that a run passes the batch over
    valid = torch.zeros_like(targets)
    valid[..., 0, 0] = targets[..., 0, 0]
    x = random(1, outputs, 2, 2).to(torch.float32).requires_grad_()
    loss(x, valid).backward()
    assert x.grad[..., 0, 0].eq(0).all()
    assert x.grad.isfinite().all()
    assert x.grad[..., 1, 1].abs().sum() > 0


def test_shapes_are_told() -> None:
    with pytest.raises(ConfigError, match=r"expected outputs \[B, 1, H, W\].*got \[2, 1, 4, 4\] and \[2, 4, 5\]"):
        ValueLoss()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 5))
    with pytest.raises(ConfigError, match="weights: expected 3, one for each class, got 2"):
        SegmentationLoss(weights=[1, 2])(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(ConfigError, match="weight: expected a number from 0 to 1"):
        BalancedLoss(1.5)


def test_mean_iou_is_of_the_whole_set() -> None:
    x, y = random(5, 4, 4, 5), labels(3, 5, 4, 5)
    x[:, 3] = -100.0  # in no map: left out
    metric = MeanIoU(4)
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(x[part], y[part])
    predicted = x.argmax(1)
    found = []
    for c in range(3):
        a = {p for p in pixels(y) if int(predicted[p]) == c}
        b = {p for p in pixels(y) if int(y[p]) == c}
        found.append(len(a & b) / len(a | b))
    assert metric.compute() == close(sum(found) / 3)
    metric.reset()
    assert math.isnan(metric.compute())


def test_boundary_f_at_the_best_threshold() -> None:
    x, y = random(3, 1, 6, 7), labels(2, 3, 6, 7, ignored=0.1)
    y[y == 1] = (torch.arange(int((y == 1).sum())) % 4 == 0).long()
    metric = BoundaryF(tolerance=1, bins=20)
    metric.update(x[:1], y[:1])
    metric.update(x[1:], y[1:])
    chances, best = x[:, 0].sigmoid(), 0.0
    for threshold in [k / 20 for k in range(1, 20)]:
        predicted = {p for p in pixels(y) if float(chances[p]) >= threshold}
        true = {p for p in pixels(y) if y[p] == 1}

        def near(p, others) -> bool:
            return any(p[0] == q[0] and max(abs(p[1] - q[1]), abs(p[2] - q[2])) <= 1 for q in others)

        precision = sum(near(p, true) for p in predicted) / max(1, len(predicted))
        recall = sum(near(p, predicted) for p in true) / len(true)
        best = max(best, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    assert metric.compute() == close(best)
    exact = BoundaryF(tolerance=0)
    exact.update(torch.where(y == 1, 9.0, -9.0)[:, None], y)
    assert exact.compute() == 1.0


def test_rmse_is_of_the_whole_set() -> None:
    metric = RMSE()
    metric.update(torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[4.0, math.nan]]]))
    metric.update(torch.tensor([[[[2.0, 2.0]]]]), torch.tensor([[[2.0, 6.0]]]))
    assert metric.compute() == close(math.sqrt((9 + 0 + 16) / 3))


def test_delta_m() -> None:
    found, reference = {"seg": 66.0, "depth": 0.9}, {"seg": 60.0, "depth": 1.0}
    assert delta_m(found, reference, {"seg": True, "depth": False}) == close((10.0 + 10.0) / 2)
    assert delta_m(found, reference, {"seg": True, "depth": True}) == close(0.0)
    with pytest.raises(ConfigError, match="expected the same tasks"):
        delta_m(found, {"seg": 1.0}, {"seg": True})
    with pytest.raises(ConfigError, match="other than 0 of 'seg'"):
        delta_m({"seg": 1.0}, {"seg": 0.0}, {"seg": True})


def test_boundaries_and_distances() -> None:
    y = labels(3, 9, 11, ignored=0.05)
    y[:4] = 1
    edge = boundaries(y)
    for i in range(9):
        for j in range(11):
            around = [(i + a, j + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
            near = [int(y[p]) for p in around if 0 <= p[0] < 9 and 0 <= p[1] < 11]
            own = int(y[i, j])
            expected = 255 if own == 255 else int(any(one not in (own, 255) for one in near))
            assert int(edge[i, j]) == expected
    edge[5:] = 0
    far = distance(edge, 3.5)
    ones = (edge == 1).nonzero().double()
    for i in range(9):
        for j in range(11):
            nearest = float((ones - torch.tensor([i, j])).norm(dim=1).min())
            assert float(far[i, j]) == pytest.approx(min(nearest, 3.5) / 3.5, rel=1e-6)  # float32
    assert distance(torch.zeros(3, 4).long(), 5.0).eq(1).all()


LOSSES = {
    "segmentation": (SegmentationLoss(), 3, torch.full((2, 4, 5), 255)),
    "weighted": (SegmentationLoss(weights=[1.0, 2.0, 3.0]), 3, torch.full((2, 4, 5), 255)),
    "weights of zero": (SegmentationLoss(weights=[0.0, 1.0, 1.0]), 3, torch.zeros(2, 4, 5, dtype=torch.int64)),
    "balanced": (BalancedLoss(), 1, torch.full((2, 4, 5), 255)),
    "values": (ValueLoss(), 1, torch.full((2, 4, 5), math.nan)),
    "normals": (NormalsLoss(), 3, torch.full((2, 3, 4, 5), math.nan)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_where_nothing_counts_a_loss_is_zero_with_gradients_of_zero(kind: str) -> None:
    loss, channels, targets = LOSSES[kind]
    outputs = torch.randn(2, channels, 4, 5, requires_grad=True)
    found = loss(outputs, targets)
    found.backward()
    assert float(found.detach()) == 0.0
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))


@pytest.mark.parametrize("loss, channels", [(SegmentationLoss(), 2), (BalancedLoss(0.5), 1)], ids=["seg", "balanced"])
def test_means_over_many_pixels_of_float16(loss, channels: int) -> None:
    outputs = 4 * torch.randn(1, channels, 400, 400, generator=torch.Generator().manual_seed(0)).half()
    targets = torch.randint(2, (1, 400, 400), generator=torch.Generator().manual_seed(1))
    # the float64 formula on the same values: sums of 160,000 terms in float32 err by less than 1e-4 of their sum
    assert float(loss(outputs, targets)) == pytest.approx(float(loss(outputs.double(), targets)), rel=1e-4)
