"""What estimate takes torch's convolutions to allocate inside, against what torch's allocator does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import settle
from torch import Tensor, nn

from taps_ext import TapsConfig, TaskModel, estimate, profile
from taps_ext.profiling import Machine, convolutions
from taps_ext.profiling.timeline import traced

GEOMETRIES = {  # images [B, C, H, H]; output channels, kernel, stride, groups
    "stem": ((8, 3, 112, 112), 64, 7, 2, 1),
    "3x3": ((8, 64, 56, 56), 64, 3, 1, 1),
    "1x1": ((16, 24, 56, 56), 72, 1, 1, 1),
    "uneven channels": ((8, 20, 112, 112), 10, 5, 1, 1),
    "each channel": ((8, 72, 56, 56), 72, 3, 2, 72),
    "each channel, 5x5": ((8, 72, 56, 56), 72, 5, 1, 72),
    "groups": ((8, 64, 56, 56), 64, 3, 1, 4),
    "groups of 12": ((8, 48, 56, 56), 48, 3, 1, 4),
    "a large weight": ((2, 512, 7, 7), 512, 3, 1, 1),
}
pytestmark = pytest.mark.skipif(not convolutions.known(), reason="copies are known of AVX2 and AVX-512 alone")
ROOFS = Machine(bandwidth=2e10, rate=1e11)


def watched(run: Callable[[], object]) -> int:
    """Bytes that torch's allocator has at most while an operator runs, its results among them."""
    run()  # what is kept for the next call
    kept: list[object] = []
    events = traced(
        lambda: kept.append(run()), torch.device("cpu"), profile_memory=True
    ).profiler.kineto_results.events()
    total = most = 0
    for _, count in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        total += count
        most = max(most, total)
    return most


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_operators(name, last) -> None:
    """Within 5 % of what is allocated, or a third of the image for oneDNN's scratch memory: no copy goes unseen."""
    shape, outputs, kernel, stride, groups = GEOMETRIES[name]
    layout = torch.channels_last if last else torch.contiguous_format
    image = torch.randn(shape).to(memory_format=layout)
    weight = torch.randn(outputs, shape[1] // groups, kernel, kernel).to(memory_format=layout)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1])
    result = F.conv2d(image, weight, None, *geometry, groups)
    grad = torch.randn_like(result)

    def check(inside: convolutions.Inside, results: int, run: Callable[[], object]) -> None:
        predicted, found = max(inside.before, inside.beside + results), watched(run)
        assert predicted == pytest.approx(found, rel=0.05, abs=image.nbytes / 3)

    check(
        convolutions.forward(image, weight, *geometry, groups),
        result.nbytes,
        lambda: F.conv2d(image, weight, None, *geometry, groups),
    )
    for wanted in ((True, False), (False, True), (True, True)):
        if name == "stem" and wanted[0]:
            continue  # images have no gradient
        if name == "each channel, 5x5" and last and wanted[1]:
            continue  # scratch memory of 256 weights
        inside = convolutions.backward(grad, image, shape[2:], weight, *geometry, groups, wanted)
        check(
            inside,
            wanted[0] * image.nbytes + wanted[1] * weight.nbytes,
            lambda wanted=wanted: torch.ops.aten.convolution_backward(
                grad, image, weight, None, *geometry, False, [0, 0], groups, [*wanted, False]
            ),
        )


def test_a_part_of_the_samples() -> None:
    image, weight, grad = torch.empty(8, 64, 28, 28), torch.empty(64, 64, 3, 3), torch.empty(8, 64, 28, 28)
    settings = ([28, 28], weight, [1, 1], [1, 1], [1, 1], 1, (False, True))
    copies = convolutions.backward(grad, image, *settings).before - weight.nbytes
    assert convolutions.backward(grad, image[:2], *settings).before - weight.nbytes == copies // 4
    assert copies == 2 * image.nbytes


class Wide(nn.Module):
    """Many channels for a moment, as in an EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand = nn.Conv2d(16, 192, 3, padding=1)
        self.each = nn.Conv2d(192, 192, 3, stride=2, padding=1, groups=192)
        self.fc = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.each(self.expand(self.stem(x))).mean((2, 3)))


class Deep(nn.Module):
    """A weight that is much larger than what it is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(512, 512, 3, padding=1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("open", [False, True])
@pytest.mark.parametrize("phase", ["train", "infer"])
@pytest.mark.parametrize(("base", "shape"), [(Wide, (8, 3, 64, 64)), (Deep, (1, 512, 7, 7))])
def test_models(base, shape, phase, open) -> None:
    """Within 2 %, less than the largest copy: an image of Wide, the weight of Deep. Fused layers make none."""
    model = TaskModel(settle(base()), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=10)
    with torch.no_grad():
        for _, part in model.state("t").learned():
            part.score.fill_(0.15 if open else 0.05)
    model.refresh_gates()
    predicted = estimate(model, (torch.empty(shape, device="meta"),), task="t", phase=phase).peak
    counted = profile(model, (torch.randn(shape),), task="t", phase=phase, steps=1, machine=ROOFS).memory.peak
    assert predicted == pytest.approx(counted, rel=0.02)
