"""Nothing that is cached outlives what it was made from: host gates, casts, merged weights, version counters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import nn

from taps_ext import TapsConfig, TapsError, TaskModel, ops


def build(**arguments) -> TaskModel:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0), **arguments).eval()
    model.add_task("t", num_classes=2)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.2)
    return model


def close(model: TaskModel) -> None:
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.gate.score.zero_()


def gates(model: TaskModel) -> list[bool]:
    return [part.gate.known for _, part, _ in model.state("t").gated()]


def test_loading_a_state_dict_into_a_copy() -> None:
    model = build()
    closed = copy.deepcopy(model)
    close(closed)
    x = images()
    want = closed(x, task="t")
    model(x, task="t")
    for assign in (False, True):
        other = copy.deepcopy(model)
        other.load_state_dict(closed.state_dict(), assign=assign)
        assert torch.equal(other(x, task="t"), want) and not any(gates(other))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_0_1_still_loads(tmp_path, assign: bool) -> None:
    """Which had Deltas, weights and scores in one module: into a whole task, a converted one, and one without the
    Deltas of its closed layers."""
    model = build()
    tuned = settle(TinyNet(2))
    with torch.no_grad():
        model.state("t").table["conv2"].gate.score.zero_()
        tuned.hidden.weight.mul_(1e-6)  # which no Delta gives
    model.extract_task("whole", tuned.state_dict())
    model.save_task("t", tmp_path / "t.taps")
    model.load_task(tmp_path / "t.taps", "loaded")
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("base."):
                parameter.add_(0.01)
    model.parameter_groups("loaded", lr=0.1)  # makes the Delta that the file left out
    with torch.no_grad():
        model.state("loaded").table["conv2"].change.delta.add_(0.01)
    state = model.state_dict()
    old = {n.replace(".change.", ".").replace(".gate.", "."): tensor for n, tensor in state.items()}
    kinds = [name.rpartition(".")[2] for name in old.keys() - state.keys()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"delta": 8, "score": 8, "weight": 4}
    missing = fresh.load_state_dict(old, assign=assign)
    assert not missing.missing_keys and not missing.unexpected_keys and len(old) == len(state)
    now = fresh.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[name], tensor) for name, tensor in state.items())
    x = images()
    assert all(torch.equal(fresh(x, task=task), model(x, task=task)) for task in model.tasks)


def test_functional_call() -> None:
    model = build()
    x = images()
    opened = model(x, task="t")
    closed = copy.deepcopy(model)
    close(closed)
    want = closed(x, task="t")
    values = {n: t for n, t in closed.state_dict().items() if n.endswith("score")}
    assert torch.equal(torch.func.functional_call(model, values, (x,), {"task": "t"}), want)
    assert torch.equal(model(x, task="t"), opened)


def test_inference_mode_leaves_training_possible() -> None:
    """Casts kept and tasks made under inference mode are ordinary tensors."""
    model = build()
    close(model)
    x, y = images(), torch.tensor([0, 1, 0])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(x, task="t")
        model.add_task("u", num_classes=2)
        model(x, task="u")
    model.train()
    for name in ("t", "u"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x, task=name).float(), y)
        loss.backward()
        assert all(part.gate.score.grad is not None for _, part, _ in model.state(name).gated())


def test_a_base_made_under_inference_mode() -> None:
    with torch.inference_mode():
        base = settle(TinyNet())
    model = TaskModel(base, TapsConfig(lam=1.0)).eval()
    model.add_task("t", num_classes=2)
    close(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(images(), task="t").shape == (3, 2)


def test_merged_tasks_cannot_change() -> None:
    model = build()
    x = images()
    want = model(x, task="t")
    model.merge_task("t")
    for action in (
        lambda: model.set_gates("t", open=[]),
        lambda: model.freeze_gates("t"),
        lambda: model.freeze_gates(),
        lambda: model.reload_task("t", "nowhere.taps"),
        lambda: model.train()(x, task="t"),
    ):
        with pytest.raises(TapsError, match="is merged; call unmerge_task"):
            action()
    model.eval()
    out = model(x, task="t")
    assert torch.equal(out, want)
    with pytest.raises(TapsError, match="Deltas get no gradient"):
        out.sum().backward()
    model.rename_task("t", "v")
    model.unmerge_task()
    model(x, task="v").sum().backward()


def test_merged_weights_are_cast_once_under_autocast() -> None:
    model = build()
    model.merge_task("t")
    x = images()
    kept = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x, task="t")
            kept.append([part.__dict__["_taps_cast"][1] for part in model.state("t").installed.values()])
    assert len(kept[0]) == 4 and all(a is b and a.dtype == torch.bfloat16 for a, b in zip(*kept, strict=True))
    known = [weakref.ref(cast) for cast in kept[0]]
    del kept
    model.unmerge_task()
    gc.collect()
    assert [each() for each in known] == [None] * 4


def test_reconstruct_is_seen_by_autograd() -> None:
    """Writing a tensor that backward needs is an error, as with any in-place operation."""
    out = torch.ones(3)
    leaf = torch.ones(3, requires_grad=True)
    product = (leaf * out).sum()
    ops.reconstruct_(out, torch.zeros(3), torch.ones(3), gate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
def test_the_raw_op_refuses_double_backward() -> None:
    x, w, d = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = torch.ops.taps_ext.gated_linear(x, w, d, None, None, True, 0.1)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


def test_a_stale_gradient_does_not_move_a_closed_delta() -> None:
    """Gradients zeroed instead of dropped before the forward do not reach the optimizer once the gate closed."""
    model = build()
    part = model.state("t").table["conv2"]
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    x, y = images(), torch.tensor([0, 1, 0])
    for closing in (False, True, True):
        if closing:
            with torch.no_grad():
                part.gate.score.zero_()
            before = part.change.delta.detach().clone()
        model.train()
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x, task="t"), y).backward()
        optimizer.step()
    assert torch.equal(part.change.delta, before)


@pytest.mark.parametrize("late", [False, True])
def test_gradients_that_others_put_there_do_not_move_a_closed_delta(late: bool) -> None:
    """Zeros for every parameter before each forward; or the gradient of a forward before the gate closed."""
    model = build().train()
    part = model.state("t").table["conv2"]
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    part.gate.score.register_hook(torch.zeros_like)
    model(images(), task="t").sum().backward()
    optimizer.step()
    loss = model(images(), task="t").sum()
    part.gate.score.data.zero_()
    (loss + model(images(), task="t").sum()).backward()
    optimizer.step()
    before = part.change.delta.detach().clone()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        for parameter in () if late else model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model(images(), task="t").sum().backward()
        optimizer.step()
    assert part.gate.known is False and torch.equal(part.change.delta, before)


def test_gates_of_other_tensors_drop_no_gradient() -> None:
    """After `functional_call` with other scores, the model's own decide what an optimizer may act on."""
    model = build()
    x = images()
    model(x, task="t").square().sum().backward()
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.endswith("score")}
    torch.func.functional_call(model, scores, (x,), {"task": "t"})
    model.drop_closed_gradients("t")
    assert all(part.change.delta.grad is not None for _, part, _ in model.state("t").gated())


def test_borrowed_tensors_are_not_kept_alive() -> None:
    model = build().train()
    given = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("delta", "score"))}
    for name, tensor in given.items():
        tensor.fill_(0.05 if name.endswith("score") else 0.0)
    seen = [weakref.ref(tensor) for tensor in given.values()]
    torch.func.functional_call(model, given, (images(),), {"task": "t"})
    del given, tensor
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_casts_are_not_pickled() -> None:
    model = build()
    model.set_gates("t", open=[])
    before = len(pickle.dumps(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images(), task="t")
    assert any("_taps_cast" in module.__dict__ for module in model.modules())
    assert abs(len(pickle.dumps(model)) - before) < 200


def test_a_head_that_cannot_be_copied_loses_no_task() -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0))
    model.add_task("t", head=nn.utils.weight_norm(nn.Linear(12, 3)))
    model(images(), task="t").sum().backward()  # leaves a computed weight in the head
    with pytest.raises(RuntimeError, match="deepcopy"):
        model.merge_and_unload("t")
    assert model.tasks == ["t"] and model(images(), task="t").shape[1] == 3


def test_use_task_survives_deletion() -> None:
    model = build()
    model.set_task("t")
    with model.use_task(None):
        model.delete_task("t")
    assert model.active_task is None and model(images()).shape == (3, 4)


def test_a_weight_written_past_its_version_is_read_again() -> None:
    model = TaskModel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)), TapsConfig(lam=0.0))
    model.add_task("t")
    model.eval()
    x = torch.randn(5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.set_gates("t", open=[])
        before = model(x, task="t")
        model.base[0].weight.data.mul_(2.0)
        model.refresh_gates()
        assert not torch.equal(model(x, task="t"), before)


def test_merged_weights_are_of_the_type_that_the_model_was_cast_to() -> None:
    model = TaskModel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)), TapsConfig(lam=0.0)).eval()
    model.add_task("t")
    with torch.no_grad():
        for parameter in model.state("t").parameters():
            parameter.add_(torch.rand_like(parameter))
        model.refresh_gates()
        model.merge_task("t")
        model.bfloat16()
        x = torch.randn(5, 64, dtype=torch.bfloat16)
        merged = model(x, task="t")
        model.unmerge_task()
        assert torch.equal(model(x, task="t"), merged)
