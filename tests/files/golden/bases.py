"""The base models of the golden files, and data for them.

Every value is made by integer arithmetic, so that any machine makes the same bits. What is here must never change:
files of 0.1 belong to these bases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def values(shape: tuple[int, ...], salt: int, span: float = 1.0) -> Tensor:
    """Numbers in [-span / 2, span / 2) that look random, on a grid of 2^-16 times `span` (a power of two)."""
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.int64) + salt * 1_000_003
    mixed = (index * 2_654_435_761) % 4_294_967_291
    mixed = (mixed * mixed + 12_345 * mixed) % 4_294_967_291
    return ((mixed % 65_536).to(torch.float32) / 65_536 - 0.5).mul(span).reshape(shape)


def fill(model: nn.Module, salt: int) -> nn.Module:
    """Give every parameter and buffer its values."""
    with torch.no_grad():
        for at, (name, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if not tensor.is_floating_point():
                continue
            tensor.copy_(values(tuple(tensor.shape), salt + at))
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.add_(1.0)
    return model.eval()


class ConvNet(nn.Module):
    """Convolutions (plain, strided, depthwise), batch and group norm, a linear layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.gn = nn.GroupNorm(4, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.hidden = nn.Linear(16, 12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.gn(self.conv2(x)))
        x = (F.relu(self.depthwise(x)) + x).mean(dim=(2, 3))
        return self.fc(F.relu(self.hidden(x)))


class Transformer(nn.Module):
    """A token, a table as a buffer, attention by `nn.MultiheadAttention`, a feed-forward block, layer norms, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.register_buffer("position", torch.zeros(1, 5, 16))
        self.norm1 = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


def base_of(kind: str) -> nn.Module:
    return fill(ConvNet(), 1) if kind == "conv" else fill(Transformer(), 100)


def images(samples: int = 6) -> Tensor:
    return values((samples, 3, 8, 8), 7, 2.0)


def data(samples: int, salt: int) -> tuple[Tensor, Tensor]:
    """Four classes that differ in which quadrant is bright."""
    x, y = values((samples, 3, 8, 8), salt), torch.arange(samples) % 4
    for i, k in enumerate(y.tolist()):
        x[i, :, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    return x, y


# name -> (base, method of the task)
TASKS = {
    "taps-conv": "conv",
    "taps-transformer": "transformer",
    "full-conv": "conv",
    "full-transformer": "transformer",
    "probe-conv": "conv",
    "probe-transformer": "transformer",
    "extracted": "conv",
}
STATE = {"task": "quadrants", "epochs": 4, "stopped_after": 2}
