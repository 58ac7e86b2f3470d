"""Whole models on a GPU: CPU agreement, one copy for all gates, files, allocations, compilation."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle

from taps_ext import FullConfig, ProbeConfig, TapsConfig, TaskModel
from taps_ext.model import gathering
from taps_ext.train.gradients import add_gradients

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


def test_no_other_weight_sized_allocation() -> None:
    """A training step's peak holds nothing as large as a weight but its gradient and W_t."""
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


def stepped(model: TaskModel, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x, task="t"), y).backward()
    add_gradients(model.sparsity_loss("t"), [p for group in optimizer.param_groups for p in group["params"]])
    with model.resting(optimizer):
        optimizer.step()


def test_a_step_has_three_launches_for_its_weights() -> None:
    """And none of a layer alone: no rebuild, dot, finish or scale."""
    from torch.profiler import ProfilerActivity, profile

    model = build(TapsConfig(lam=1.0), dtype=torch.float32).cuda().train()
    with torch.no_grad():
        for _, _, gate in model.state("t").gated():
            gate.score.fill_(0.15)
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.01), fused=True)
    x, y = images(4).cuda(), torch.arange(4).cuda()
    for _ in range(2):
        stepped(model, optimizer, x, y)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        stepped(model, optimizer, x, y)
        torch.cuda.synchronize()
    ours = Counter(name for e in record.events() for name in re.findall(r"\b(\w+)<", e.name)[:1] if "taps::" in e.name)
    assert ours == {"foreach_chunks": 1, "settle_chunks": 1, "settle_scores": 1}, ours


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathered_gradients_are_those_of_single_layers(layout, monkeypatch) -> None:
    """A contiguous weight under an input with channels last too, whose gradient cuDNN lays out as the input."""
    torch.use_deterministic_algorithms(True)
    try:
        model = build(TapsConfig(lam=1.0), dtype=torch.float32).cuda().train()
        with torch.no_grad():
            for _, _, gate in model.state("t").gated():
                gate.score.fill_(0.15)
        x, y = images(4).cuda().contiguous(memory_format=layout), torch.arange(4).cuda()
        found = []
        for forced in (False, True):
            monkeypatch.setattr(gathering, "forced", forced)
            model.zero_grad()
            F.cross_entropy(model(x, task="t"), y).backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        # Of sums in another order where a dot walks another layout; Deltas are the same G.
        close = dict(rtol=1e-6, atol=1e-7) if name.endswith(("score", "bias")) else dict(rtol=0, atol=0)
        torch.testing.assert_close(found[1][name], gradient, msg=name, **close)


def test_a_captured_step_equals_the_eager_one() -> None:
    """Device gates, momentum, decay, the penalty and the optimizer in one graph; nothing in it waits for the host, and
    a closed Delta rests."""
    torch.use_deterministic_algorithms(True)
    try:
        eager, captured = (build(TapsConfig(lam=1.0), "device", torch.float32).cuda().train() for _ in range(2))
        closed = [next(m.state("t").gated())[1] for m in (eager, captured)]
        with torch.no_grad():
            for part in closed:
                part.gate.score.fill_(-10.0)
                part.change.delta.fill_(0.01)
        x, y = images(4).cuda(), torch.arange(4).cuda()
        groups = [m.parameter_groups(lr=0.05, weight_decay=0.1) for m in (eager, captured)]
        optimizers = [torch.optim.SGD(g, momentum=0.9, fused=True) for g in groups]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                stepped(captured, optimizers[1], x, y)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stepped(captured, optimizers[1], x, y)
        for _ in range(3):
            stepped(eager, optimizers[0], x, y)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                graph.replay()
                stepped(eager, optimizers[0], x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, one), (_, other) in zip(eager.named_parameters(), captured.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all(torch.equal(part.change.delta, torch.full_like(part.change.delta, 0.01)) for part in closed)


def peak_of(step: Callable[[], None]) -> int:
    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def wide() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (torch.nn.Linear(1024, 1024), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(1024, 10)).cuda()


def peak_of_fine_tuning(x: torch.Tensor, y: torch.Tensor) -> int:
    base = wide()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.01, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(base(x), y)
        loss.backward()
        optimizer.step()

    return peak_of(step)


def test_memory_of_a_step_is_fine_tunings_and_the_base() -> None:
    """In bf16 W_t takes the place of fine-tuning's casts, where activations are what a step's memory is: the peak is
    where backward begins. A twentieth of the base more for what allocators round."""
    x, y = torch.randn(16384, 1024, device="cuda"), torch.zeros(16384, dtype=torch.int64, device="cuda")
    before = peak_of_fine_tuning(x, y)
    base = wide()
    weights = sum(p.nbytes for p in base.parameters())
    model = TaskModel(base, TapsConfig(lam=1.0))
    model.add_task("t", num_classes=10)
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.01), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x, task="t"), y)
        loss.backward()
        optimizer.step()

    assert peak_of(step) <= before + 1.05 * weights


def test_a_scaled_step_in_half_precision() -> None:
    """GradScaler: the gathered gradients are unscaled and looked at as any other."""
    model = build(TapsConfig(lam=1.0), dtype=torch.float32).cuda().train()
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.01))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(images(4).cuda(), task="t"), torch.arange(4).cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert scaler.get_scale() == 1024.0 and any("delta" in name for name in moved)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
