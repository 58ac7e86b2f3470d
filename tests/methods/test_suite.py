"""One suite that every method passes, on convolutions, on attention and on random models.

What is compared bit for bit is said to be so: where a method adds no arithmetic of its own to a stock layer (W_t is
one tensor, and one product is run), and where the same arithmetic is run twice. LoRA runs products beside the one
below; adding its zero at the start is exact, and merged it stays within `method_cases.rounding`.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import method_cases
import pytest
import torch
from method_cases import (
    BESIDE,
    CASES,
    FAMILIES,
    IN_BLOCKS,
    RUNS,
    SETTINGS,
    UNFOLDABLE,
    adapted,
    base_of,
    close_some,
    equal,
    images,
    loss_of,
    make_base,
    output,
    rounding,
    save,
    state_of,
    train,
    trained,
    without_fast_path,
)
from stages import SEED, made_once
from torch import Tensor, nn

import taps_ext
from taps_ext import TapsError, TaskFileError, TaskModel, UnsupportedModuleError, store
from taps_ext.methods import base as methods
from taps_ext.parts import Below, Gate, Layer, change_kinds
from taps_ext.profiling import Machine
from taps_ext.store.errors import ParentMismatchError

every = pytest.mark.parametrize(("base", "case"), RUNS)
every_method = pytest.mark.parametrize("case", [next(iter(cases)) for cases in SETTINGS.values()])
every_family = pytest.mark.parametrize("case", FAMILIES)


@pytest.fixture(autouse=True)
def _one_road(request: pytest.FixtureRequest, record_property):
    if "random" in request.node.name:
        record_property("drawn", f"random models of {Path(__file__).name} (seed {SEED})")
    with without_fast_path():
        yield


def test_every_method_has_settings() -> None:
    ours = {n for n, m in methods.registered().items() if m.__module__.split(".")[0] in ("taps_ext", "method_cases")}
    missing = sorted(ours - SETTINGS.keys())
    assert not missing, f"add settings of {missing} to SETTINGS in tests/helpers/method_cases.py"
    for name, cases in SETTINGS.items():
        assert cases and all(config.method == name for config in cases.values())


@pytest.mark.parametrize("score", [0.15, 0.05])
@pytest.mark.parametrize("change", ["mix", "rows", "lowrank"])
def test_a_scores_gradient_has_derivatives_too(change: str, score: float) -> None:
    """Of <G, opened - closed>, for what a gate selects by plain torch code: the change's own among them."""
    torch.manual_seed(0)
    host, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(5, 4)
    kind = change_kinds()[change]
    layer = Layer(Gate(score_init=score), kind(host, **({"rank": 2} if change == "lowrank" else {})))
    with torch.no_grad():
        for parameter in layer.changes():
            parameter.normal_()

    def wanted(s: Tensor, *values: Tensor) -> Tensor:
        weight = torch.func.functional_call(layer.change, dict(zip(layer.change.names, values, strict=True)), (host,))
        mixed = host.weight + (float(score >= 0.1) + s - s.detach()) * (weight - host.weight)
        return nn.functional.linear(x, mixed, host.bias)

    layer.change.forward = lambda host: layer.change.fold(host.weight)  # what is called above
    found, want = (
        torch.autograd.grad(
            torch.autograd.grad(out.square().sum(), layer.gate.score, create_graph=True)[0],
            [*layer.changes(), layer.gate.score],
        )
        for out in (layer(Below(host), x), wanted(layer.gate.score, *layer.changes()))
    )
    for one, other in zip(found, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    layer(Below(host), x).square().sum().backward()
    assert all((p.grad is None) == (score < 0.1) for p in layer.changes())


@every
def test_starts_as_the_base(base: str, case: str) -> None:
    """Bit for bit, with a copy of the base's head: what is added is a zero."""
    model, x = adapted(base, case, classes=None).eval(), images(base)
    want = output(make_base(base), x)
    assert torch.equal(output(model, x, "t"), want)
    assert torch.equal(output(model, x), want)


@every
def test_trains(base: str, case: str) -> None:
    model, x = adapted(base, case), images(base)
    close_some(model, "t")
    before, state = state_of(model), model.state("t")
    family = () if state.family is None else (*state.family.parameters(), *state.family.buffers())
    losses = train(model, x, "t", steps=6)
    assert min(losses) < losses[0]
    mine = {id(t) for t in (*state.parameters(), *state.buffers(), *family)}
    changed = {n: t for n, t in model.state_dict(keep_vars=True).items() if not torch.equal(t, before[n])}
    assert all(id(tensor) in mine for tensor in changed.values())
    moved = {
        name for name, part in state.table.items() if any(id(p) in map(id, changed.values()) for p in part.parameters())
    }
    assert moved >= ({state.head_path} - {None}) and (len(moved) > 1 or case in ("probe", "scale-bias-no-head"))
    resting = {id(p) for _, part, gate in state.gated() if not gate.known for p in part.changes()}
    for parameter in (*state.parameters(), *family):
        wanted = parameter.requires_grad and id(parameter) not in resting
        assert (parameter.grad is not None) == wanted
    plain = make_base(base)
    assert equal(state_of(model.base), state_of(plain))
    assert torch.equal(output(model.eval(), x), output(plain, x))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What another process says of every run's file."""

    def make(folder: Path) -> None:
        with without_fast_path():
            method_cases.leave_for_another(folder)
        helpers, root = Path(method_cases.__file__).parent, Path(taps_ext.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(helpers), str(root)])}
        code = "import sys, pathlib, method_cases; method_cases.answer(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True, timeout=300)

    return json.loads((made_once(tmp_path_factory, "elsewhere", make) / "found.json").read_text())


@every
def test_loads_in_another_process(base: str, case: str, elsewhere: list[str]) -> None:
    """Bit for bit."""
    assert not elsewhere[RUNS.index((base, case))]


@every
def test_loaded_it_trains_on(base: str, case: str, tmp_path: Path) -> None:
    """With its closed changes still to be made, and after `parameter_groups` made them."""
    path, x = save(trained(base, case), tmp_path), images(base)
    model = TaskModel(make_base(base)).train()
    model.load_task(path)
    loss_of(model, x, "t").backward()
    head = model.state("t").head
    assert head is None or all(parameter.grad is not None for parameter in head.parameters())
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "task 't': .* closed layers were loaded without")
        losses = train(model, x, "t", steps=6)
    assert min(losses) < losses[0]


@every
def test_merges(base: str, case: str) -> None:
    """Bit for bit but beside; unmerging is always exact."""
    model, x = trained(base, case), images(base)
    want = output(model, x, "t")
    if case in UNFOLDABLE:
        with pytest.raises(UnsupportedModuleError, match=UNFOLDABLE[case][base]):
            model.merge_task("t")
        assert torch.equal(output(model, x, "t"), want)
        return
    limit = rounding(model, x, "t", torch.float32) if case in BESIDE else torch.zeros(())
    model.merge_task("t")
    assert ((output(model, x, "t") - want).abs() <= limit).all()
    model.unmerge_task()
    assert torch.equal(output(model, x, "t"), want)


@pytest.mark.parametrize(("base", "case"), [(base, case) for base, case in RUNS if case not in UNFOLDABLE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merges_in_other_types(base: str, case: str, dtype: torch.dtype) -> None:
    """As in float32, after the whole model was cast: what is trained stays float32, and W_t is rounded once."""
    model, x = trained(base, case).to(dtype), images(base).to(dtype)
    want = output(model, x, "t")
    assert want.dtype == dtype
    limit = rounding(model, x, "t", dtype) if case in BESIDE else torch.zeros(())
    model.merge_task("t")
    assert ((output(model, x, "t") - want).abs() <= limit).all()


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNFOLDABLE])
def test_folds_alike_under_autocast(case: str) -> None:
    model = trained(base_of(case), case)
    want = model.task_state_dict("t")
    with torch.autocast("cpu", torch.bfloat16):
        found = model.task_state_dict("t")
    assert equal(found, want)


@every
def test_folds_into_a_plain_model(base: str, case: str) -> None:
    """What a merged task runs is what plain models get: bit for bit."""
    model, x = trained(base, case), images(base)
    if case in UNFOLDABLE:
        for make in (model.task_state_dict, model.merge_and_unload):
            with pytest.raises(UnsupportedModuleError, match=UNFOLDABLE[case][base]):
                make("t")
        return
    tensors = model.task_state_dict("t")
    model.merge_task("t")
    want = output(model, x, "t")
    model.unmerge_task()
    loaded, head = make_base(base), model.state("t").head_path
    if head is not None:
        loaded.set_submodule(head, nn.Linear(loaded.get_submodule(head).in_features, 3))
    loaded.load_state_dict(tensors)
    plain = model.merge_and_unload("t").requires_grad_(False)
    assert equal(state_of(plain), tensors)
    assert torch.equal(output(plain, x), want)
    assert torch.equal(output(loaded.requires_grad_(False), x), want)


@every
def test_packs(base: str, case: str, tmp_path: Path) -> None:
    """Every Delta of an open layer and nothing else; what is packed is saved, loaded and merged like any other task,
    and trains no further. tests/model/test_packing.py has all codecs."""
    model, x = trained(base, case), images(base)
    opened = model.state("t").open_layers()
    deltas = [row.layer for row in model.report("t").rows if row.layer in opened and row.change == "dense"]
    made = model.pack_task("t", codec="int8")
    assert [row.layer for row in made.rows if row.codec == "int8"] == deltas
    want, path = output(model, x, "t"), save(model, tmp_path)
    fresh = TaskModel(make_base(base)).eval()
    fresh.load_task(path)
    assert torch.equal(output(fresh, x, "t"), want)
    if case not in UNFOLDABLE:
        limit = rounding(model, x, "t", torch.float32) if case in BESIDE else torch.zeros(())
        fresh.merge_task("t")
        assert ((output(fresh, x, "t") - want).abs() <= limit).all()
        fresh.unmerge_task()
    if deltas:
        with pytest.raises(TapsError, match=f"{deltas[0]} is packed"):
            fresh.parameter_groups("t", lr=0.1)
        assert fresh.unpack_task("t") == deltas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "task 't': .* closed layers were loaded without")
        losses = train(fresh, x, "t", steps=6)
    assert min(losses) < losses[0]


@every
def test_copies(base: str, case: str) -> None:
    model, x = trained(base, case), images(base)
    want, before = output(model, x, "t"), state_of(model)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, x, "t"), want)
    train(copied, x, "t")
    assert equal(state_of(model), before) and torch.equal(output(model, x, "t"), want)
    assert not torch.equal(output(copied.eval(), x, "t"), want)


def _gradients(base: str, case: str, reentrant: bool | None) -> dict[str, Tensor]:
    model, x = adapted(base, case), images(base).requires_grad_()
    close_some(model, "t")
    train(model, x, "t", steps=1)
    model.zero_grad()
    x.grad = None
    model.base.reentrant = reentrant
    loss_of(model, x, "t").backward()
    return {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@every
def test_checkpointing_gives_the_same_gradients(base: str, case: str) -> None:
    """Bit for bit. The reentrant kind runs its forward without gradients, where torch multiplies some inputs otherwise
    (attention without biases), so that it is compared on the bases alone that have none."""
    want = _gradients(base, case, None)
    assert equal(_gradients(base, case, False), want)
    assert base.startswith("random") or equal(_gradients(base, case, True), want)


@every_method
def test_compiles(case: str) -> None:
    """Bit for bit: the graph is run as it was traced."""
    base = base_of(case, "small")
    model, x = trained(base, case), images(base)
    want = output(model, x, "t")
    torch._dynamo.reset()
    assert torch.equal(output_of_compiled(model, x), want)


@torch.no_grad()
def output_of_compiled(model: TaskModel, x: Tensor) -> Tensor:
    return torch.compile(model, backend="eager")(x, task="t")


@every
def test_autocast_stays_near(base: str, case: str) -> None:
    model, x = trained(base, case), images(base)
    limit = rounding(model, x, "t", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = output(model, x, "t")
        model.train()
        loss_of(model, x, "t").backward()
    assert got.dtype == torch.bfloat16
    assert ((got.float() - output(model.eval(), x, "t")).abs() <= limit).all()


@every
def test_unloads(base: str, case: str) -> None:
    given, before = make_base(base), state_of(make_base(base))
    kinds, x = [type(m) for m in given.modules()], images(base)
    model = TaskModel(given, CASES[case])
    model.add_task("t", num_classes=3 if CASES[case].own_head else None)
    train(model, x, "t", steps=1)
    assert model.unload() is given and equal(state_of(given), before)
    assert [type(m) for m in given.modules()] == kinds and not any(p.requires_grad for p in given.parameters())
    assert torch.equal(output(given, x), output(make_base(base), x))


@every
def test_serves_without_its_method(base: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained(base, case), images(base)
    want, path, known = output(model, x, "t"), save(model, tmp_path), model.report("t")
    merges = case not in UNFOLDABLE
    if merges:
        model.merge_task("t")
        merged = output(model, x, "t")
    monkeypatch.delitem(methods._METHODS, CASES[case].method)
    other = TaskModel(make_base(base)).eval()
    other.load_task(path)
    assert torch.equal(output(other, x, "t"), want)
    assert other.report("t").to_dict() == known.to_dict()
    if merges:
        other.merge_task("t")
        assert torch.equal(output(other, x, "t"), merged)
        other.unmerge_task()
    other.save_task("t", tmp_path / "again.taps")
    assert (tmp_path / "again.taps").read_bytes() == path.read_bytes()
    assert store.read_header(path).metadata.method == CASES[case].to_dict()
    for action in (lambda: other.sparsity_loss("t"), lambda: other.train()(x, task="t")):
        with pytest.raises(TapsError, match=repr(CASES[case].method)):
            action()


@every
def test_tasks_are_independent(base: str, case: str) -> None:
    model, x = adapted(base, case), images(base)
    if CASES[case].own_head:  # a step of "other" moves what a family shares, on which "t" stands
        own = [{t.data_ptr() for t in model.state(n).state_dict().values() if t.numel()} for n in ("t", "other")]
        assert not own[0] & own[1]
    before, want = state_of(model.state("t")), output(model.eval(), x, "t")
    train(model, x, "other")
    assert equal(state_of(model.state("t")), before)
    assert case in FAMILIES or torch.equal(output(model.eval(), x, "t"), want)


# ------------------------------------------------------------------------------------ families


def _jointly(case: str) -> TaskModel:
    """Two tasks and what they share, trained together."""
    base = base_of(case)
    model, x = adapted(base, case).train(), images(base)
    close_some(model, "t")
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.05))
    for _ in range(3):
        optimizer.zero_grad()
        sum(loss_of(model, x, task) + model.sparsity_loss(task) for task in model.tasks).backward()
        optimizer.step()
    return model.eval()


@every_family
def test_a_family_trains_jointly(case: str) -> None:
    model, x = adapted(base_of(case), case), images(base_of(case))
    (family,) = model.families.values()
    parameters = dict(family.named_parameters())
    assert parameters and len({p for g in model.parameter_groups(lr=1.0) for p in g["params"]} & {*parameters.values()})
    alone = []
    for task in model.tasks:
        model.zero_grad()
        loss_of(model.train(), x, task).backward()
        alone.append({name: p.grad.clone() for name, p in parameters.items()})
    model.zero_grad()
    for task in model.tasks:
        loss_of(model, x, task).backward()
    for name, parameter in parameters.items():  # one addition, which commutes
        assert torch.equal(parameter.grad, alone[0][name] + alone[1][name]), name
        # As long as B is zero A has none, and neither has what adds to a shared stream that ends (MTLoRA).
        silent = case in IN_BLOCKS and not alone[0][name].any()
        assert silent or not torch.equal(alone[0][name], alone[1][name]), name
    assert sum(bool(gradient.any()) for gradient in alone[0].values()) > len(parameters) // 3


@every_family
@pytest.mark.parametrize("found", ["beside", "shared", "loaded"])
def test_a_family_is_saved_and_found_again(case: str, found: str, tmp_path: Path) -> None:
    model, x = _jointly(case), images(base_of(case))
    (name,) = model.families
    (tmp_path / "elsewhere").mkdir()
    parent = tmp_path / ("family.taps" if found == "beside" else "elsewhere/family.taps")
    model.save_shared(name, parent)
    for task in model.tasks:
        model.save_task(task, tmp_path / f"{task}.taps")
    fresh = TaskModel(make_base(base_of(case))).eval()
    if found == "loaded":
        assert fresh.load_shared(parent) == name
    for task in model.tasks:
        fresh.load_task(tmp_path / f"{task}.taps", shared=parent if found == "shared" and not fresh.tasks else None)
        assert torch.equal(output(fresh, x, task), output(model, x, task))
        assert fresh.report(task).to_dict() == model.report(task).to_dict()
    assert list(fresh.families) == [name]
    if case not in UNFOLDABLE:
        for each in (model, fresh):
            each.merge_task("t")
        assert torch.equal(output(fresh, x, "t"), output(model, x, "t"))
    orphan = TaskModel(make_base(base_of(case))).eval()
    parent.unlink()
    with pytest.raises(ParentMismatchError):
        orphan.load_task(tmp_path / "t.taps")
    assert not orphan.tasks and not orphan.families


@every_family
def test_a_family_is_saved_before_its_tasks_and_then_stays(case: str, tmp_path: Path) -> None:
    model = _jointly(case)
    (family,) = model.families.values()
    with pytest.raises(TapsError, match="save_shared"):
        model.save_task("t", tmp_path / "t.taps")
    model.save_shared(family.name, tmp_path / "family.taps")
    assert not any(p.requires_grad for p in family.parameters())
    model.save_task("t", tmp_path / "t.taps")
    with torch.no_grad():
        next(family.parameters()).add_(1.0)
    with pytest.raises(TapsError, match="has changed, or was cast, since"):
        model.save_task("t", tmp_path / "t.taps")


# ------------------------------------------------------------------------------------ kinds that are not ours


@pytest.mark.parametrize(("case", "kind", "own"), [("mix", "mix", 12 * 12), ("curve", "curve", 2 * 12 + 12 * 2)])
def test_a_foreign_change_is_reported_and_profiled(case: str, kind: str, own: int, tmp_path: Path) -> None:
    model, x = trained("conv", case), images("conv")
    (row,) = [row for row in model.report("t").rows if row.layer == "hidden"]
    assert (row.change, row.own, row.bytes, row.parameters) == (kind, own, 4 * own, 12 * 12)
    machine = Machine(1e10, 1e10)
    for phase in ("train", "infer"):
        measured = taps_ext.profile(model, (x,), task="t", phase=phase, steps=1, machine=machine)
        assert {layer.layer for layer in measured.rows} == {row.layer for row in model.report("t").rows}
        assert all(layer.operations > 0 for layer in measured.rows)
        memory = taps_ext.estimate(model, (x,), task="t", phase=phase)
        assert memory.deltas == sum(row.bytes for row in model.report("t").rows)
    path = save(model, tmp_path)
    assert store.load(path).parts["hidden"].facts["change"] == {"kind": kind}


def test_an_unknown_kind_of_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(trained("conv", "mix"), tmp_path)
    monkeypatch.delitem(change_kinds(), "mix")
    model = TaskModel(make_base("conv"))
    with pytest.raises(TaskFileError, match="'mix'; import the package that registers it"):
        model.load_task(path)
    assert not model.tasks
