"""Whole models on a GPU: CPU agreement, one copy for all gates, files, allocations, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle

from taps_ext import FullConfig, ProbeConfig, TapsConfig, TaskModel

METHODS = [TapsConfig(lam=1.0), FullConfig(), ProbeConfig()]


def build(config, gates="host", dtype=torch.float64) -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()).to(dtype), config, gates=gates)
    model.add_task("t", num_classes=5)
    with torch.no_grad():
        for index, (_, part, _) in enumerate(model.state("t").gated()):
            if part.change is not None:
                part.change.delta.normal_(0, 0.05)
            if part.gate.score is not None and index % 2:
                part.gate.score.fill_(0.05)
    return model.eval()


@pytest.mark.parametrize("config", METHODS, ids=lambda c: c.method)
@pytest.mark.parametrize("gates", ["host", "device"])
def test_a_training_step_equals_the_cpu(config, gates) -> None:
    """Float64 base: outputs agree to float64 rounding, float32 gradients of Delta to float32 rounding."""
    results = []
    x, y = images(6, dtype=torch.float64), torch.arange(6) % 5
    for device in ("cpu", "cuda"):
        model = build(config, gates).to(device)
        optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
        model.train()
        out = model(x.to(device), task="t")
        (F.cross_entropy(out, y.to(device)) + model.sparsity_loss("t")).backward()
        model.drop_closed_gradients()
        optimizer.step()
        results.append((out.detach().cpu(), {n: p.detach().cpu() for n, p in model.state("t").state_dict().items()}))
    (out, after), (other, other_after) = results
    assert torch.allclose(out, other, rtol=1e-10, atol=1e-10)
    for name, tensor in after.items():
        assert torch.allclose(tensor, other_after[name], rtol=1e-5, atol=1e-7), name


def test_gates_cost_one_copy_and_only_after_a_change() -> None:
    model = build(TapsConfig(lam=1.0), dtype=torch.float32).cuda()
    x = images().cuda()
    with torch.no_grad():
        model(x, task="t")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x, task="t")  # nothing changed: not a single synchronisation
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for _, part, _ in model.state("t").gated():
            part.gate.score.fill_(0.0)
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            model(x, task="t")
        copies = [e for e in record.events() if "Memcpy DtoH" in e.name]
        assert len(copies) == 1
    assert model.report("t").layers_open == 0


def test_files_move_between_devices(tmp_path) -> None:
    model = build(TapsConfig(lam=1.0), dtype=torch.float32)
    model.save_task("t", tmp_path / "cpu.taps")
    model.cuda()
    x = images().cuda()
    out = model(x, task="t")
    model.save_task("t", tmp_path / "cuda.taps")
    assert (tmp_path / "cpu.taps").read_bytes() == (tmp_path / "cuda.taps").read_bytes()
    model.load_task(tmp_path / "cpu.taps", "u")
    assert torch.equal(model(x, task="u"), out)
    model.merge_task("t")
    assert torch.equal(model(x, task="t"), out)
    model.unmerge_task()
    plain = copy.deepcopy(model).merge_and_unload("t")
    assert torch.equal(plain.eval()(x), out)


def test_one_workspace_and_no_other_weight_sized_allocation() -> None:
    """A training step's peak holds nothing as large as a weight but the gradients and one workspace (fp32: rebuilt)."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 10))
    model = TaskModel(base, TapsConfig(lam=1.0)).cuda()
    model.add_task("t", num_classes=10)
    x, y = torch.randn(4, 2048, device="cuda"), torch.arange(4, device="cuda")
    weight = base[0].weight.nbytes
    part = model.state("t").table["0"]

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x, task="t"), y).backward()

    for is_open in (True, False):
        with torch.no_grad():
            part.gate.score.fill_(0.15 if is_open else 0.05)
        step()
        step()
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra < (2 * weight if is_open else weight) + weight // 4


@pytest.mark.parametrize("gates", ["host", "device"])
def test_compiled_into_graphs_equals_eager(gates) -> None:
    """CUDA graph trees: warmed up in a pool of their own, in which nothing of ours may stay."""
    model = build(TapsConfig(lam=1.0), gates, torch.float32).cuda()
    x = images().cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        want = model(x, task="t").clone()
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.allclose(compiled(x, task="t").clone(), want, rtol=1e-4, atol=1e-4)
            model(x, task="t")  # eager calls in between


@pytest.mark.parametrize("gates", ["host", "device"])
def test_compiled_equals_eager(gates) -> None:
    model = build(TapsConfig(lam=1.0), gates, torch.float32).cuda()
    x = images().cuda()
    want = model(x, task="t")
    got = torch.compile(model)(x, task="t")
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(amp) -> None:
    model = build(TapsConfig(lam=1.0), dtype=torch.float32).cuda()
    model.train()
    with torch.autocast("cuda", amp):
        loss = F.cross_entropy(model(images().cuda(), task="t"), torch.arange(3).cuda())
    loss.backward()
    for _, part, _ in model.state("t").gated():
        assert part.gate.score.grad.dtype == torch.float32 and torch.isfinite(part.gate.score.grad)
        assert part.gate.known is not True or part.change.delta.grad.dtype == torch.float32
