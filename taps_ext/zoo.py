"""A small convolutional network for the demo and for trying things out; real bases come from elsewhere."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; `stride` shrinks the image."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images: `[B, channels, H, W]` to logits `[B, num_classes]`.

    Args:
        num_classes: outputs of the head `fc`.
        channels: of the images.
        widths: channels of each stage; every stage but the first halves the side.
        blocks: residual blocks in each stage.
        stem_stride: of the first convolution.
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 1,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 2,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        cin = widths[0]
        stages = []
        for stage, cout in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(Block(cin, cout, 2 if stage and not block else 1))
                cin = cout
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(cin, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(self.stages(x).mean(dim=(2, 3)))


def small_resnet(num_classes: int = 10, channels: int = 1, **kwargs: Any) -> SmallResNet:
    """:class:`SmallResNet` as a factory: `model = "python:taps_ext.zoo.small_resnet"` in a configuration."""
    return SmallResNet(num_classes, channels, **kwargs)
