"""The CIFAR-10 ResNet-20 (He et al. 2016, section 4.2): 3 stages of 16, 32 and 64 channels, option-A shortcuts."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import store

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut is subsampled and zero-padded in channels."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.grow = (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """Input `[B, 3, 32, 32]`, output `[B, num_classes]`."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [Block(widths[stage], widths[stage], 1) for _ in range(2)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def pretrained(path: Path) -> ResNet20:
    """The network with the weights of a safetensors file, loaded strictly, in evaluation mode."""
    model = ResNet20()
    tensors, _ = store.read_safetensors(path)
    missing = model.load_state_dict(tensors, strict=False)
    lost = [k for k in missing.missing_keys if not k.endswith("num_batches_tracked")]
    if lost or missing.unexpected_keys:
        raise ValueError(f"{path}: missing {lost}, unexpected {missing.unexpected_keys}")
    return model.eval()


def normalise(images: torch.Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` or `[N, H, W]` to float32 `[N, 3, H, W]` as the base expects it."""
    x = images.float().div(255)
    x = x[..., None].expand(*x.shape, 3) if x.dim() == 3 else x
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()
