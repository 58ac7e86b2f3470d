"""Small base models that the tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyNet(nn.Module):
    """Convolutions (plain, strided, depthwise, "same"), batch and group norm, dropout, linear layers, a head."""

    def __init__(self, num_classes: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.gn = nn.GroupNorm(4, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False, padding_mode="reflect")
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(16, 12)
        self.ln = nn.LayerNorm(12)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.gn(self.conv2(x)))
        x = self.drop(F.relu(self.depthwise(x)) + x).mean(dim=(2, 3))
        return self.fc(F.relu(self.ln(self.hidden(x))))


class WithToken(nn.Module):
    """A transformer-like base with tensors of its own: a token, a layer scale and a table as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("position", torch.randn(1, 5, 8))
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(x + self.proj(x))[:, 0])


class Bypass(nn.Module):
    """Reads a layer's weight behind its back: neither its forward nor its attribute is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.qkv = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.linear(self.used(x), *self.qkv.parameters()))


def images(batch: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=dtype)


def settle(base: nn.Module) -> nn.Module:
    """Give the norms affine parameters and statistics that are not the identity, where they have them."""
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    return base.eval()
