"""Pictures of maps over the images that they were made of."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW, _MIDDLE, _HIGH = (0.15, 0.10, 0.45), (0.10, 0.65, 0.60), (0.98, 0.90, 0.15)  # of values, dark to bright


def palette(classes: int) -> Tensor:
    """Colours `[classes, 3]` in [0, 1] that differ clearly, the same for every number of classes (those of PASCAL VOC,
    from the second on)."""
    found = []
    for label in range(1, classes + 1):
        rest, colour = label, [0, 0, 0]
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
        found.append([value / 255 for value in colour])
    return torch.tensor(found).view(classes, 3)


def ramp(values: Tensor) -> Tensor:
    """Values `[H, W]` in [0, 1] as colours `[3, H, W]`, dark to bright."""
    low, middle, high = (torch.tensor(one).view(3, 1, 1) for one in (_LOW, _MIDDLE, _HIGH))
    place = values.clamp(0, 1) * 2
    return torch.where(place < 1, low + (middle - low) * place, middle + (high - middle) * (place - 1))


def overlay(image: Tensor, outputs: Tensor, kind: str) -> Tensor:
    """A picture uint8 `[H, W, 3]` of what a task makes of an image: classes in colours over it, boundaries in red,
    values dark to bright, normals as RGB.

    Args:
        image: `[C, H, W]` in [0, 1]. outputs: `[n, H, W]`, as the model gives them. kind: of the task's maps.
    """
    image = image.expand(3, -1, -1)
    if kind == "segmentation":
        colours = palette(len(outputs))[outputs.argmax(0)].permute(2, 0, 1)
        picture = 0.45 * image + 0.55 * colours
    elif kind in ("boundaries", "edges", "saliency"):
        chance = outputs[0].sigmoid()
        picture = image * (1 - chance) + torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1) * chance
    elif kind == "normals":
        picture = torch.nn.functional.normalize(outputs, dim=0) / 2 + 0.5
    else:
        values = outputs[0]
        low, high = float(values.min()), float(values.max())
        if kind == "distance":  # a share of its limit
            low, high = 0.0, 1.0
        picture = ramp((values - low) / (high - low or 1.0))
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
