"""estimate and profile agree on the workspace where layers are fused on the CPU, and where they are not."""

import copy

import pytest
import torch
from fused import instructions
from models import settle
from torch import Tensor, nn

import taps_ext
from taps_ext import TapsConfig, TaskModel, estimate, ops, profile
from taps_ext.profiling import Machine

if not taps_ext.ops.HAS_EXTENSION:
    pytest.skip("the extension is missing, and with it the workspace", allow_module_level=True)

ROOFS = Machine(bandwidth=2e10, rate=1e11)


class Head(nn.Module):
    """Layers before a head that no task gates; `calls` inputs, one after the other."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(features, 10)

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = [self.body(x) for x in inputs]
        flat = [y.flatten(2).mean(2) if y.dim() == 4 else y for y in outputs]
        return sum(self.fc(y).sum(0, keepdim=True) for y in flat)


def conv(kernel: int, **settings) -> Head:
    return Head(nn.Conv2d(96, 512, kernel, **settings), 512)


@pytest.fixture(autouse=True)
def _the_same_everywhere():
    """One instruction set, and with it one choice of paths."""
    with instructions("baseline"):
        yield


CASES = {  # base, inputs, bytes of the workspace
    "fused convolution": (conv(3, padding=1), [(1, 96, 7, 7)], 49 * 864 * 4),
    "many pixels": (conv(3, padding=1), [(1, 96, 20, 20)], 512 * 864 * 4),
    "called twice": (conv(3, padding=1), [(1, 96, 20, 20), (1, 96, 7, 7)], 512 * 864 * 4),
    "64 places": (conv(8), [(1, 96, 12, 12)], 25 * 6144 * 4),
    "81 places": (conv(9), [(1, 96, 12, 12)], 512 * 7776 * 4),
    "groups": (conv(7, groups=2), [(1, 96, 12, 12)], 512 * 48 * 49 * 4),
    "few rows": (Head(nn.Linear(768, 768), 768), [(8, 768)], 0),
    "rows that meet": (Head(nn.Linear(1024, 512), 512), [(8, 1024)], 8 * 1040 * 4),
    "rows": (Head(nn.Linear(768, 768), 768), [(100, 768)], 100 * 768 * 4),
    "many rows": (Head(nn.Linear(768, 768), 768), [(300, 768)], 768 * 768 * 4),
}


def pages(nbytes: int) -> int:
    """Bytes in whole pages, as buffers are made."""
    return -(-nbytes // 4096) * 4096


def build(base: nn.Module) -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(copy.deepcopy(base)), TapsConfig(lam=0.5))  # which other tests have in another type
    model.add_task("t", num_classes=10)
    with torch.no_grad():
        for _, part, _ in model.state("t").learned():
            part.change.delta.normal_(0, 0.01)
            part.gate.score.fill_(0.15)
    model.refresh_gates()
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_workspace(name) -> None:
    base, shapes, wanted = CASES[name]
    model, inputs = build(base), tuple(torch.randn(*shape) for shape in shapes)
    expected = estimate(model, inputs, task="t", phase="infer")
    found = profile(model, inputs, task="t", phase="infer", machine=ROOFS, steps=1).memory
    assert expected.workspace == wanted and found.workspace == pages(wanted)


@pytest.mark.parametrize("name", ["fused convolution", "few rows", "rows", "odd depth"])
@pytest.mark.parametrize("instruction_set", ops._C.isas())
def test_the_workspace_in_bfloat16(name, instruction_set) -> None:
    """Whatever an instruction set packs, and whatever this machine chooses with it."""
    cases = {**CASES, "odd depth": (Head(nn.Linear(769, 1024), 1024), [(100, 769)], 0)}
    base, shapes, _ = cases[name]
    model = build(base).to(torch.bfloat16)
    inputs = tuple(torch.randn(*shape).to(torch.bfloat16) for shape in shapes)
    with instructions(instruction_set):
        expected = estimate(model, inputs, task="t", phase="infer")
        found = profile(model, inputs, task="t", phase="infer", machine=ROOFS, steps=1).memory
    assert found.workspace == pages(expected.workspace)
