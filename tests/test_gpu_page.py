"""docs/gpu.md: its examples run, as far as a CPU can run them, and its tables are what the tools say."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle

import taps_ext
from taps_ext import TapsConfig, TaskModel, ops
from taps_ext.cli.base import build_base
from taps_ext.model import gathering

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def example(title: str) -> str:
    """The lines of code under a title, for the CPU."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"^(?:    .*|)$", section, re.MULTILINE))
    return textwrap.dedent(code).replace('"cuda"', '"cpu"').replace(".cuda()", "")


def tool(name: str, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location(f"page_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_fp16_loop_trains() -> None:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0))
    model.add_task("birds", num_classes=5)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    loader = [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 3
    names = {"torch": torch, "F": F, "model": model.train(), "loader": loader}
    exec(example("fp16 in your own loop"), names)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and names["scaler"].get_scale() > 1
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n.endswith(("delta", "score")))


def test_a_half_base_ends_as_the_page_says() -> None:
    model = TaskModel(TinyNet().half(), TapsConfig(lam=1.0))
    model.add_task("birds", num_classes=5)
    loader = [(torch.randn(4, 3, 8, 8, dtype=torch.float16), torch.arange(4))]
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        exec(example("fp16 in your own loop"), {"torch": torch, "F": F, "model": model.train(), "loader": loader})


def test_the_step_that_is_captured_trains() -> None:
    torch.manual_seed(0)
    code = example("CUDA graphs").partition("side = ")[0] + "for _ in range(3):\n    loss = step()\n"
    loader = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    names = {"torch": torch, "F": F, "taps_ext": taps_ext, "base": settle(TinyNet()), "loader": loader}
    exec(code, names)
    model = names["model"]
    assert model.gates == "device" and names["loss"].isfinite()
    model.refresh_gates()
    part = model.state("birds").table["conv2"]
    with torch.no_grad():
        part.gate.score.fill_(0.0)
    resting = part.change.delta.clone()
    names["step"]()
    assert torch.equal(part.change.delta, resting)


def test_the_table_of_stages_is_that_of_the_job(monkeypatch, tmp_path) -> None:
    section = PAGE.partition("\n## `make gpu`\n")[2]
    found = [
        (name, row.split("|")[2].strip())
        for row in re.findall(r"^\| `.*$", section, re.MULTILINE)
        for name in re.findall(r"`([\w-]+)`", row.split("|")[1])
    ]
    stages = tool("gpu", monkeypatch).stages(tmp_path)
    assert found == [(stage.name, stage.half) for stage in stages]


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the extension is not built")
@pytest.mark.parametrize("row", re.findall(r"^\| (timm:.*) \|$", PAGE, re.MULTILINE), ids=lambda row: row.split()[0])
def test_the_table_of_fused_layers_is_that_of_the_rules(row, monkeypatch) -> None:
    pytest.importorskip("timm")
    name, count, training, one, many = row.split(" | ")
    fused_layers = tool("fused_layers", monkeypatch).fused_layers
    found = [fused_layers(name, batch) for batch in (1, 32)]
    assert [len(found[0].layers), len(found[0].fused), len(found[1].fused)] == [int(count), int(one), int(many)]
    model = TaskModel(build_base({"model": name, "weights": "random"}), TapsConfig(lam=1.0))
    model.add_task("task")
    monkeypatch.setattr(gathering, "forced", True)  # as on a GPU
    made = gathering.together(model.state("task").catch_up().gathering, sampled=False)
    assert len(found[0].layers) - len(made) == int(training)  # the others might be fused
