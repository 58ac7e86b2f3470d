"""estimate against profile: the same without convolutions, and never more with them."""

import pytest
import torch
from models import TinyNet, settle
from torch import Tensor, nn

from taps_ext import TapsConfig, TaskModel, estimate, profile
from taps_ext.profiling import Machine

ROOFS = Machine(bandwidth=2e10, rate=1e11)


class Blocks(nn.Module):
    """Layers that are products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(256, 1024)
        self.norm = nn.LayerNorm(1024)
        self.deep = nn.Linear(1024, 512, bias=False)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.deep(self.norm(torch.relu(self.hidden(x)))).mean(1))


class Many(nn.Module):
    """Many channels for a moment, as in an EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand = nn.Conv2d(16, 192, 3, padding=1)
        self.each = nn.Conv2d(192, 192, 3, stride=2, padding=1, groups=192)
        self.fc = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.each(self.expand(self.stem(x))).mean((2, 3)))


class Heavy(nn.Module):
    """A weight that is much larger than what it is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(512, 512, 3, padding=1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def peaks(base: nn.Module, shape: tuple[int, ...], opened: bool, **settings) -> tuple[int, int]:
    """What is predicted of a step and what is counted, in bytes."""
    torch.manual_seed(0)
    fraction = settings.pop("fraction", 1.0)
    model = TaskModel(settle(base), TapsConfig(lam=0.5, gate_fraction=fraction))
    model.add_task("t", num_classes=10)
    with torch.no_grad():
        for _, part, _ in model.state("t").learned():
            part.gate.score.fill_(0.15 if opened else 0.05)
    model.refresh_gates()
    predicted = estimate(model, (torch.empty(shape, device="meta"),), task="t", **settings)
    counted = profile(model, (torch.randn(shape),), task="t", steps=1, machine=ROOFS, **settings).memory
    return predicted.peak, counted.peak


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw"},
        {"phase": "infer"},
        {"fraction": 0.25},
    ],
    ids=["train", "adamw", "infer", "sampled"],
)
def test_without_convolutions_it_is_what_is_counted(settings, opened) -> None:
    """To a tenth of a MiB, of a peak of twenty and more, and never above it."""
    predicted, counted = peaks(Blocks(), (8, 64, 256), opened, **settings)
    assert 0 <= counted - predicted <= 2**20 / 10 < counted / 100


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("phase", ["train", "infer"])
@pytest.mark.parametrize(
    ("base", "shape"), [(Many, (8, 3, 64, 64)), (Heavy, (1, 512, 7, 7)), (TinyNet, (16, 3, 32, 32))]
)
def test_with_convolutions_it_is_a_lower_bound(base, shape, phase, opened) -> None:
    predicted, counted = peaks(base(), shape, opened, phase=phase)
    assert counted / 4 < predicted <= counted
