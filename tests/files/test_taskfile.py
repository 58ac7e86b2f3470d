"""Files against a model: whatever does not fit is refused with a message of its own, and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import TinyNet, images, settle
from torch import nn

from taps_ext import ConfigError, TapsConfig, TapsError, TaskFileError, TaskModel, store


@pytest.fixture
def saved(tmp_path):
    """(model, path): a trained-looking task with one closed layer, in a file."""
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0)).eval()
    model.add_task("t", num_classes=5)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
        model.state("t").table["conv2"].gate.score.fill_(0.02)
    model.save_task("t", tmp_path / "t.taps")
    return model, tmp_path / "t.taps"


def edit(change: Callable[[store.TaskFile], object]) -> Callable:
    def apply(path) -> None:
        record = store.load(path)
        change(record)
        store.save(path, record)

    return apply


def other_gate(record: store.TaskFile) -> None:
    record.parts["conv1"].facts["gate"]["threshold"] = 0.5


BAD = {
    "missing statistics": (
        edit(lambda r: r.parts["bn1"].tensors.pop("running_mean")),
        r"'bn1.running_mean': expected .* got none",
    ),
    "missing affine": (edit(lambda r: r.parts["ln"].tensors.pop("weight")), "'ln.weight': expected"),
    "extra tensor": (
        edit(lambda r: r.parts["bn1"].tensors.update({"gain": torch.zeros(8)})),
        "'bn1.gain': the model has no place",
    ),
    "norm shape": (
        edit(lambda r: r.parts["gn"].tensors.update({"bias": torch.zeros(5)})),
        r"'gn.bias': expected shape \[16\], got \[5\]",
    ),
    "norm dtype": (
        edit(lambda r: r.parts["gn"].tensors.update({"bias": torch.zeros(16).double()})),
        "'gn.bias': expected torch.float32",
    ),
    "delta shape": (
        edit(lambda r: r.parts["conv1"].tensors.update({"delta": torch.zeros(8, 3, 3, 1)})),
        r"'conv1.delta': expected shape \[8, 3, 3, 3\]",
    ),
    "delta dtype": (
        edit(lambda r: r.parts["conv1"].tensors.update({"delta": torch.zeros(8, 3, 3, 3).half()})),
        "'conv1.delta': expected torch.float32",
    ),
    "missing layer": (edit(lambda r: r.parts.pop("hidden")), "part 'hidden': expected one by its method 'taps'"),
    "missing norm": (edit(lambda r: r.parts.pop("ln")), "part 'ln': expected one by its method 'taps'"),
    "extra layer": (
        edit(lambda r: r.parts.update({"conv7": r.parts["conv2"]})),
        "part 'conv7': the base has no module of that name",
    ),
    "extra norm": (
        edit(lambda r: r.parts.update({"drop": store.Record({"kind": "own", "role": "other"})})),
        "part 'drop': expected none by its method 'taps'",
    ),
    "norm role": (
        edit(lambda r: r.parts["ln"].facts.update({"role": "other"})),
        "part 'ln': role: expected 'norm', got 'other', by its method",
    ),
    "part kind": (
        edit(lambda r: r.parts["ln"].facts.update({"kind": "owned"})),
        r"part 'ln': kind: expected one of \[.*'own'.*\], got 'owned'",
    ),
    "change kind": (
        edit(lambda r: r.parts["conv1"].facts["change"].update({"kind": "wide"})),
        "part 'conv1': change: expected one of .*dense.*, got 'wide'",
    ),
    "another change": (
        edit(lambda r: r.parts["conv2"].facts.update({"change": {"kind": "rows"}})),
        "part 'conv2': change: expected {'kind': 'dense'}, got {'kind': 'rows'}, by its method",
    ),
    "open against its score": (
        edit(lambda r: r.parts["hidden"].tensors.update({"score": torch.tensor(0.01)})),
        "part 'hidden': score 0.01 makes it closed",
    ),
    "threshold against scores": (edit(other_gate), "part 'conv1': score 0.15 makes it closed, but the file says"),
    "threshold against the method": (
        edit(lambda r: r.method.update({"threshold": 0.125})),
        "part 'conv1': threshold: expected 0.125, got 0.1, by its method",
    ),
    "extra value": (
        edit(lambda r: r.parts["conv1"].tensors.update({"token": torch.zeros(2)})),
        "'conv1.token': the model has no place",
    ),
    "head shape": (
        edit(lambda r: r.parts["fc"].tensors.update({"weight": torch.zeros(4, 12)})),
        r"'fc\.weight': expected shape \[5, 12\], got \[4, 12\]",
    ),
    "head missing": (edit(lambda r: r.parts["fc"].tensors.pop("bias")), r"'fc\.bias': expected"),
    "head module": (
        edit(lambda r: r.parts.update({"fc9": r.parts.pop("fc")})),
        "belongs to another base: it replaces the head",
    ),
    "head kind": (
        edit(lambda r: r.parts["fc"].facts["module"].update({"type": "mlp"})),
        "part 'fc': head: expected a linear or custom head",
    ),
    "method key": (edit(lambda r: r.method.update({"lamb": 1})), "taps.method: taps: unknown key 'lamb'"),
    "method value": (edit(lambda r: r.method.update({"lam": -1})), "taps.method: lam: expected a number"),
    "pattern": (edit(lambda r: r.method.update({"target_modules": ["x*"]})), "target_modules: pattern"),
    "parent": (edit(lambda r: setattr(r, "parent", "sha256:" + "0" * 64)), "belongs to another base"),
    "shared file": (edit(lambda r: setattr(r, "kind", "shared")), "expected a task file, got a shared file"),
    "state": (
        edit(lambda r: (setattr(r, "kind", "state"), r.method.clear(), r.parts.clear())),
        "expected a task file, got a state file, which says where an unfinished training run stands: train on",
    ),
    "flipped bit": (lambda path: flip(path), "digest|sha256"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes"),
}


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


MESSAGES: dict[str, str] = {}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused(kind, saved) -> None:
    model, path = saved
    change, message = BAD[kind]
    change(path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(TaskFileError, match=message) as caught:
        model.load_task(path, "u")
    text = str(caught.value).split(":", 1)[1]
    assert str(path) in str(caught.value) and "\n" not in text
    assert text not in MESSAGES.values() or MESSAGES.get(kind) == text
    MESSAGES[kind] = text
    assert model.tasks == ["t"]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    with pytest.raises(TaskFileError):
        model.reload_task("t", path)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_another_base_is_refused_but_another_head_is_not(saved) -> None:
    model, path = saved
    base = copy.deepcopy(model).unload()
    x = images()
    want = model(x, task="t")
    base.fc = nn.Linear(12, 99)  # the head is no part of the parent's identity
    other = TaskModel(base)
    other.load_task(path)
    assert torch.equal(other.eval()(x, task="t"), want)
    base = other.unload()
    with torch.no_grad():
        base.bn1.running_var[0] += 1e-3
    with pytest.raises(TaskFileError, match="belongs to another base"):
        TaskModel(base).load_task(path)


def test_custom_heads_need_a_module(tmp_path) -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0)).eval()
    model.add_task("t", head=nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)))
    x = images()
    want = model(x, task="t")
    model.save_task("t", tmp_path / "t.taps")
    with pytest.raises(ConfigError, match="holds a Sequential; pass a module"):
        model.load_task(tmp_path / "t.taps", "u")
    with pytest.raises(TaskFileError, match=r"'fc\.0\.(weight|bias)': expected shape \[5\b"):
        model.load_task(tmp_path / "t.taps", "u", head=nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)))
    assert model.tasks == ["t"]
    model.load_task(tmp_path / "t.taps", "u", head=nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert torch.equal(model(x, task="u"), want)
    model.reload_task("t", tmp_path / "t.taps")
    assert torch.equal(model(x, task="t"), want)


def test_a_task_whose_method_is_not_registered_is_served(saved, tmp_path) -> None:
    """It runs, reports, merges and is saved as it was read; what only its method can do names it."""
    model, path = saved
    edit(lambda r: r.method.update({"method": "tapas"}))(path)
    model.load_task(path, "u")
    x = images()
    want = model(x, task="t")
    assert torch.equal(model(x, task="u"), want)
    assert model.report("u").method == "tapas" and model.report("u").rows == model.report("t").rows
    model.merge_task("u")
    assert torch.equal(model(x, task="u"), want)
    model.unmerge_task()
    model.rename_task("t", "v")
    model.rename_task("u", "t")
    model.save_task("t", tmp_path / "again.taps")
    assert (tmp_path / "again.taps").read_bytes() == path.read_bytes()
    for act in (lambda: model.sparsity_loss("t"), lambda: model.train()(x, task="t")):
        with pytest.raises(TapsError, match="method 'tapas' is not registered; import the package"):
            act()


def test_fixed_gates_are_stored_as_such(saved, tmp_path) -> None:
    model, _ = saved
    model.set_gates("t", open=["conv*"])
    x = images()
    want = model(x, task="t")
    model.save_task("t", tmp_path / "fixed.taps")
    parts = store.load(tmp_path / "fixed.taps").parts
    layers = [parts[layer] for layer, _, _ in model.state("t").gated()]
    assert all("score" not in record.tensors and not record.facts["gate"]["learn"] for record in layers)
    model.load_task(tmp_path / "fixed.taps", "u")
    assert torch.equal(model(x, task="u"), want)
    assert [r.layer for r in model.report("u").rows if r.open] == ["conv1", "conv2"]


def test_a_closed_delta_is_not_stored(saved) -> None:
    _, path = saved
    parts = store.load(path).parts
    assert parts["conv2"].tensors.keys() == {"score"} and not parts["conv2"].facts["gate"]["open"]
    assert parts["conv1"].tensors.keys() == {"delta", "score"}


def test_an_open_delta_with_nan_is_not_saved(saved, tmp_path) -> None:
    from taps_ext import GateError

    model, _ = saved
    with torch.no_grad():
        model.state("t").table["conv1"].change.delta[0, 0, 0, 0] = float("nan")
    with pytest.raises(GateError, match="conv1: delta: expected finite"):
        model.save_task("t", tmp_path / "bad.taps")
    assert not (tmp_path / "bad.taps").exists()


def test_a_taken_name_is_refused_before_anything_happens(saved) -> None:
    model, path = saved
    with pytest.raises(ConfigError, match="'t' exists already"):
        model.load_task(path)


def test_reloading_keeps_the_parameters_that_an_optimizer_holds(tmp_path):
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=3)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(std=0.1)
    model.save_task("t", tmp_path / "t.taps")
    x = images()
    model.eval()
    saved = model(x, task="t").detach()
    optimizer = torch.optim.SGD(model.parameter_groups("t", lr=0.1), momentum=0.9)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    model(x, task="t").sum().backward()
    optimizer.step()
    frozen = next(p for n, p in model.state("t").named_parameters() if "bn" in n or "norm" in n)
    frozen.requires_grad_(False)
    model.reload_task("t", tmp_path / "t.taps")
    assert torch.equal(model(x, task="t"), saved)
    assert all(p.grad is None for p in model.parameters()) and not frozen.requires_grad
    frozen.requires_grad_(True)
    assert held == {id(p) for g in model.parameter_groups("t", lr=0.1) for p in g["params"]}


def test_reloading_another_build_replaces_the_parts(tmp_path):
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=3)
    model.set_gates("t", open=["*"], learn=False)
    model.save_task("t", tmp_path / "t.taps")
    other = TaskModel(model.unload(), TapsConfig(lam=0.5))
    other.add_task("t", num_classes=3)
    other.reload_task("t", tmp_path / "t.taps")
    assert all(not part.gate.learn and part.gate.known for _, part, _ in other.state("t").gated())
