"""A packed task is a task like any other: it runs, reports, merges, is saved, loaded and served, and trains no further.

What is compared is compared bit for bit: a packed layer's W_t is one tensor, and one product is run.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from method_cases import (
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
from torch import Tensor, nn

import taps_ext
from taps_ext import ConfigError, FullConfig, TapsError, TaskModel
from taps_ext.methods import base as methods
from taps_ext.parts import packing

CODECS = ["bitmask", "bitmask:0.2", "int8", "int4", "sign", "lowrank:2"]
every_base = pytest.mark.parametrize("base", ["conv", "vit"])
every_codec = pytest.mark.parametrize("codec", CODECS)
every_method = pytest.mark.parametrize("case", ["taps", "taps-all", "full", "joint-taps", "separate-bottom"])


@pytest.fixture(autouse=True)
def _one_road():
    with without_fast_path():
        yield


@torch.no_grad()
def thinned(model: TaskModel) -> TaskModel:
    """With Deltas of which two thirds are zero, so that a bitmask of all pays."""
    for _, part, gate in model.state("t").gated():
        for delta in part.changes() if gate.open else ():
            delta.mul_(torch.arange(delta.numel()).view(delta.shape) % 3 == 0)
    return model


def packed(base: str, case: str = "taps", codec: str = "int8") -> TaskModel:
    model = thinned(trained(base, case))
    made = model.pack_task("t", codec=codec)
    assert made.bytes < made.before
    return model


def added(model: TaskModel) -> dict[str, Tensor]:
    """What each open layer of the task adds to its weight."""
    open_now = model.state("t").open_layers()
    table = model.state("t").table
    found = {
        n: table[n].added(model.base.get_submodule(n)._parameters.get("weight"))
        for n in open_now
        if n != "block.attention"
    }
    return {n: delta.clone() for n, delta in found.items()}


@every_base
@every_method
@every_codec
def test_it_is_saved_loaded_merged_and_served(
    base: str, case: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = packed(base, case, codec), images(base)
    want, path, known = output(model, x, "t"), save(model, tmp_path), model.report("t")
    loaded = TaskModel(make_base(base)).eval()
    loaded.load_task(path)
    assert torch.equal(output(loaded, x, "t"), want)
    assert loaded.report("t").to_dict() == known.to_dict()
    loaded.save_task("t", tmp_path / "again.taps")
    assert (tmp_path / "again.taps").read_bytes() == path.read_bytes()
    near = rounding(model, x, "t", torch.float32) if codec.startswith("lowrank") else torch.zeros(())
    for each in (model, loaded):
        each.merge_task("t")
        assert ((output(each, x, "t") - want).abs() <= near).all()
        each.unmerge_task()
        assert torch.equal(output(each, x, "t"), want)
    loaded.reload_task("t", path)
    assert torch.equal(output(loaded, x, "t"), want)
    monkeypatch.delitem(methods._METHODS, model.state("t").config.method)
    stranger = TaskModel(make_base(base)).eval()
    stranger.load_task(path)
    assert torch.equal(output(stranger, x, "t"), want)
    plain = stranger.merge_and_unload("t").requires_grad_(False)
    assert ((output(plain, x) - want).abs() <= near).all()


@every_base
@every_codec
def test_in_other_types_and_layouts(base: str, codec: str) -> None:
    """W_t is rounded once in every type, as the merged weight is; codes and scales keep their types."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model, x = packed(base, codec=codec).to(dtype), images(base).to(dtype)
        types = [t.dtype for _, part, _ in model.state("t").gated() for t in part.changes()]
        assert types == [t.dtype for _, part, _ in packed(base, codec=codec).state("t").gated() for t in part.changes()]
        want = output(model, x, "t")
        near = rounding(model, x, "t", dtype) if codec.startswith("lowrank") else torch.zeros(())
        model.merge_task("t")
        assert ((output(model, x, "t") - want).abs() <= near).all()
    if base == "conv":
        model = packed(base, codec=codec)
        before = model.task_state_dict("t")
        model.unload()
        other = thinned(trained(base, "taps"))
        other.base.to(memory_format=torch.channels_last)
        other.pack_task("t", codec=codec)
        assert equal(other.task_state_dict("t"), before)


@every_base
@every_codec
def test_copied_compiled_and_under_autocast(base: str, codec: str) -> None:
    model, x = packed(base, codec=codec), images(base)
    want = output(model, x, "t")
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, x, "t"), want)
    limit = rounding(model, x, "t", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output(model, x, "t")
    assert ((cast.float() - want).abs() <= limit).all()
    if base == "conv":
        torch._dynamo.reset()
        with torch.no_grad():
            assert torch.equal(torch.compile(model, backend="eager")(x, task="t"), want)


@pytest.mark.parametrize("codec", ["int4", "bitmask"])
def test_with_gates_that_the_device_knows(codec: str, tmp_path: Path) -> None:
    model, x = packed("conv", codec=codec), images("conv")
    want, path = output(model, x, "t"), save(model, tmp_path)
    other = TaskModel(make_base("conv"), gates="device").eval()
    other.load_task(path)
    assert torch.equal(output(other, x, "t"), want)
    with torch.no_grad():
        for each in (model, other):
            each.state("t").table["stem"].gate.score.fill_(0.0)
    assert torch.equal(output(other, x, "t"), output(model, x, "t")) and not torch.equal(output(other, x, "t"), want)


def test_its_gates_close_and_open_again(tmp_path: Path) -> None:
    """Also where its file was saved with a closed layer, which stores nothing."""
    for codec in CODECS:
        model, x = packed("conv", codec=codec), images("conv")
        want = output(model, x, "t")
        opened = model.state("t").open_layers()
        model.set_gates("t", open=opened[1:])
        closed = output(model, x, "t")
        assert not torch.equal(closed, want)
        path = save(model, tmp_path)
        model.set_gates("t", open=opened)
        assert torch.equal(output(model, x, "t"), want)
        other = TaskModel(make_base("conv")).eval()
        other.load_task(path)
        assert torch.equal(output(other, x, "t"), closed)
        other.set_gates("t", open=opened)  # with a Delta of zeros
        assert torch.equal(output(other, x, "t"), closed)
        path = save(other, tmp_path)
        third = TaskModel(make_base("conv")).eval()
        third.load_task(path)
        assert torch.equal(output(third, x, "t"), closed)


# ------------------------------------------------------------------------------------ training


@every_codec
def test_it_trains_no_further_until_it_is_unpacked(codec: str, tmp_path: Path) -> None:
    model, x = packed("conv", codec=codec), images("conv")
    want, first = output(model, x, "t"), model.state("t").open_layers()[0]
    for refused in (lambda: model.parameter_groups(lr=0.1), lambda: model.parameter_groups("t", lr=0.1)):
        with pytest.raises(TapsError, match=rf"'t': {first} is packed \(\w+\) .* call unpack_task\('t'\) first"):
            refused()
    assert model.parameter_groups("other", lr=0.1)
    with pytest.raises(ConfigError, match=f"'t': {first} is packed already; unpack_task"):
        model.pack_task("t", codec="int8")
    state = model.state("t")
    assert not any(p.requires_grad for _, part, _ in state.gated() if part.packed for p in part.changes())
    kept, names = added(model), [name for name, part, _ in state.gated() if part.packed]
    assert model.unpack_task("t") == names
    assert equal(added(model), kept)
    near = rounding(model, x, "t", torch.float32) if codec.startswith("lowrank") else torch.zeros(())
    assert ((output(model, x, "t") - want).abs() <= near).all()
    losses = train(model, x, "t", steps=6)
    assert min(losses) < losses[0]
    with pytest.raises(ConfigError, match="expected a packed task, got 't'"):
        model.unpack_task("t")


def test_the_inputs_gradient_is_that_of_the_unpacked_task() -> None:
    model, x = packed("conv", codec="int4"), images("conv")
    found = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        loss_of(model, given, "t").backward()
        found.append(given.grad)
        if model.state("t").table["stem"].packed:
            model.unpack_task("t")
    assert torch.equal(*found)


def test_a_packed_task_beside_one_that_trains() -> None:
    model, x = packed("conv", codec="int8"), images("conv")
    want, before = output(model, x, "t"), state_of(model.state("t"))
    train(model, x, "other")
    assert torch.equal(output(model.eval(), x, "t"), want) and equal(state_of(model.state("t")), before)


# ------------------------------------------------------------------------------------ choices


@every_base
def test_by_default_nothing_is_lost(base: str) -> None:
    model, x = thinned(trained(base, "taps")), images(base)
    want, deltas = output(model, x, "t"), added(model)
    made = model.pack_task("t")
    assert made.bytes < made.before and all(row.codec == "bitmask" and row.error == 0.0 for row in made.rows)
    assert torch.equal(output(model, x, "t"), want) and equal(added(model), deltas)


def test_what_takes_no_fewer_bytes_stays_as_it_is() -> None:
    model = trained("conv", "taps")
    made = model.pack_task("t")
    assert made.before == made.bytes and {row.codec for row in made.rows} == {"dense"}
    assert model.parameter_groups("t", lr=0.1)


def test_what_is_no_delta_stays_as_it_is() -> None:
    for case in ("lora", "singular", "mix", "probe"):
        model, x = trained("conv", case), images("conv")
        want = output(model, x, "t")
        assert model.pack_task("t", codec="sign").rows == []
        assert torch.equal(output(model, x, "t"), want) and model.parameter_groups("t", lr=0.1)


def test_whole_weights_of_a_checkpoint() -> None:
    """By a codec that loses, as the nearest Delta; by none where nothing may be lost."""
    base = make_base("conv").double()
    tuned = {n: t.clone() for n, t in base.state_dict().items()}
    tuned["hidden.weight"] += 1e-3 * torch.randn(12, 12, dtype=torch.float64)
    model = TaskModel(base).eval()
    model.extract_task("t", tuned, config=FullConfig())
    (row,) = model.pack_task("t").rows
    assert (row.layer, row.codec) == ("hidden", "whole")
    (row,) = model.pack_task("t", codec="int8").rows
    assert row.codec == "int8" and row.before == 8 * 144 and row.bytes == 144 + 2 * 5 and 0 < row.error < 0.01
    found = model.task_state_dict("t")["hidden.weight"]
    delta = tuned["hidden.weight"] - model.base.hidden.weight
    # Half a step of the largest scale, and the roundings of Delta to float32.
    limit = delta.abs().max() / 127 * (1 + 2.0**-8) / 2 + 2.0**-23 * tuned["hidden.weight"].abs().max()
    assert (found - tuned["hidden.weight"]).abs().max() <= limit


@every_base
@pytest.mark.parametrize("bound", [0.0, 0.02, 0.2, 0.7])
def test_a_bound_for_the_error_is_kept_by_the_smallest_that_keeps_it(base: str, bound: float) -> None:
    model = thinned(trained(base, "taps"))
    deltas = added(model)
    made = model.pack_task("t", max_error=bound)
    assert all(row.error <= bound for row in made.rows)
    for layer, kept in added(model).items():
        wide = deltas[layer].double()
        error = float((wide - kept.double()).norm() / wide.norm())
        (row,) = [row for row in made.rows if row.layer == layer]
        assert error == pytest.approx(row.error, rel=1e-6, abs=1e-12)
        for codec in CODECS:
            other = packing.encode(packing.parse(codec), deltas[layer], layer)
            assert other.error > bound or other.nbytes >= row.bytes
    smaller = thinned(trained(base, "taps"))
    assert smaller.pack_task("t", max_error=bound / 2).bytes >= made.bytes


@every_base
def test_a_budget_is_kept_and_more_of_it_loses_less(base: str) -> None:
    whole = thinned(trained(base, "taps"))
    deltas, full = added(whole), whole.pack_task("t").bytes
    lost = []
    for share in (0.12, 0.2, 0.4, 0.7, 1.0):
        model = thinned(trained(base, "taps"))
        made = model.pack_task("t", budget=int(share * full))
        assert made.bytes <= share * full
        lost.append(sum(float((deltas[n].double() - kept.double()).square().sum()) for n, kept in added(model).items()))
    assert lost == sorted(lost, reverse=True) and lost[0] > lost[1] and lost[-1] == 0.0
    model = thinned(trained(base, "taps"))
    with pytest.raises(ConfigError, match="budget: expected at least [0-9,]+ bytes"):
        model.pack_task("t", budget=10)
    assert model.parameter_groups("t", lr=0.1)  # nothing has changed


def test_where_a_multiplier_spends_all_of_a_budget_no_other_choice_loses_less() -> None:
    """Each layer's minimum of error + lambda * bytes is the best of all combinations in as many bytes (Everett)."""
    torch.manual_seed(0)
    deltas = {"a": torch.randn(16, 24), "b": 0.3 * torch.randn(8, 40)}
    every = {n: packing._choices(d, n, None, None) for n, d in deltas.items()}
    weights = {n: float(d.double().square().sum()) for n, d in deltas.items()}
    budgets = set()
    for multiplier in torch.logspace(-4, 1, 60).tolist():
        least = [
            min(found, key=lambda c, n=n: weights[n] * c.lost**2 + multiplier * c.nbytes) for n, found in every.items()
        ]
        budgets.add(sum(choice.nbytes for choice in least))
    assert len(budgets) >= 5
    for budget in budgets:
        rule = packing.Rule.of(None, None, budget)
        found = dict(packing.choose(rule, {n: lambda d=d: d for n, d in deltas.items()}))
        assert sum(choice.nbytes for choice in found.values()) == budget
        pairs = [dict(zip(every, pair, strict=True)) for pair in itertools.product(*every.values())]
        losses = [
            sum(weights[n] * c.lost**2 for n, c in pair.items())
            for pair in (*pairs, found)
            if sum(c.nbytes for c in pair.values()) <= budget
        ]
        assert losses[-1] == min(losses)


def test_errors_of_a_layers_own_outputs() -> None:
    """|x (Delta - packed)| / |x Delta| on what the layer is given in the task's own forwards."""
    model, x = trained("conv", "taps"), images("conv")
    seen, deltas = {}, added(model)
    for name in deltas:
        module = model.base.get_submodule(name)
        hook = lambda m, args, name=name: seen.setdefault(name, args[0])  # noqa: E731
        module.register_forward_pre_hook(hook)
    output(model, x, "t")
    made = model.pack_task("t", codec="int4", data=[x[:4], x[4:]])
    for row in made.rows:
        host = model.base.get_submodule(row.layer)
        given, delta = seen[row.layer].double(), deltas[row.layer].double()
        lost = delta - added(model)[row.layer].double()
        if isinstance(host, nn.Linear):
            outputs = [given @ d.T for d in (lost, delta)]
        else:
            outputs = [
                nn.functional.conv2d(given, d, None, host.stride, host.padding, host.dilation, host.groups)
                for d in (lost, delta)
            ]
        assert row.output_error == pytest.approx(float(outputs[0].norm() / outputs[1].norm()), rel=1e-4)
    assert "of outputs" in made.table()


@every_base
def test_a_bound_for_errors_of_outputs(base: str, tmp_path: Path) -> None:
    model, x = trained(base, "taps"), images(base)
    made = model.pack_task("t", max_error=0.15, data=(x,))
    assert all((row.error if row.output_error is None else row.output_error) <= 0.15 for row in made.rows)
    unseen = {"block.attention"} if base == "vit" else set()  # its weight is read, its forward is another
    assert {row.layer for row in made.rows if row.output_error is None} == unseen
    facts = taps_ext.store.load(save(model, tmp_path)).parts
    for row in made.rows:
        known = facts[row.layer].facts.get("packed")
        if known is not None:
            assert (known["error"], known.get("output_error")) == (row.error, row.output_error)
    assert model.pack_task("other", budget=10**6, data=[(x,), [x]]).rows is not None


def test_arguments_that_make_no_sense() -> None:
    model, x = trained("conv", "taps"), images("conv")
    before = state_of(model)
    cases = {
        "codec: expected one of bitmask, .*'int9' .did you mean 'int": {"codec": "int9"},
        "codec: lowrank: expected a rank": {"codec": "lowrank"},
        "codec: lowrank: expected a rank of": {"codec": "lowrank:0"},
        "codec: bitmask: expected a share": {"codec": "bitmask:1.5"},
        "codec: bitmask: expected a share in": {"codec": "bitmask:nan"},
        "codec: int8: expected no argument": {"codec": "int8:4"},
        "expected one of them at most": {"codec": "int8", "budget": 3},
        "max_error: expected a number": {"max_error": -1.0},
        "max_error: expected a number from": {"max_error": float("nan")},
        "budget: expected a number of bytes": {"budget": 1.5},
        "data: expected a batch of inputs": {"data": 3},
        "data: expected a tensor, a tuple": {"data": ["x"]},
    }
    for message, arguments in cases.items():
        with pytest.raises(ConfigError, match=message):
            model.pack_task("t", **arguments)
    with pytest.raises(ConfigError, match="data: expected batches of inputs alone, without labels"):
        model.pack_task("t", max_error=0.1, data=[(x, torch.zeros(len(x)))])
    with pytest.raises(ConfigError, match="data: expected a model in evaluation mode"):
        model.train().pack_task("t", codec="int8", data=x)
    model.eval().merge_task("t")
    with pytest.raises(TapsError, match="pack_task: task 't' is merged"):
        model.pack_task("t")
    model.unmerge_task()
    with torch.no_grad():
        model.state("t").table["hidden"].change.delta[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="hidden: expected finite values"):
        model.pack_task("t", codec="int8")
    with torch.no_grad():
        model.state("t").table["hidden"].change.delta[0, 0] = 1e38
    with pytest.raises(ConfigError, match="hidden: codec int4: expected values up to"):
        model.pack_task("t", codec="int4")
    after = state_of(model)
    assert all(torch.equal(after[n], before[n]) for n in before if "hidden" not in n)


def test_what_is_said_of_it() -> None:
    model = trained("conv", "taps")
    made = model.pack_task("t", codec="int8")
    assert made.to_dict()["bytes"] == made.bytes == sum(row["bytes"] for row in made.to_dict()["rows"])
    for row in model.report("t").rows:
        if row.open:
            (same,) = [r for r in made.rows if r.layer == row.layer]
            assert (row.change, row.bytes) == ("int8", same.bytes)
    assert f"({made.bytes / made.before:.3f}x)" in str(made) and "int8" in made.table()
    memory = taps_ext.estimate(model, (images("conv"),), task="t", phase="infer")
    closed = sum(4 * row.parameters for row in model.report("t").rows if not row.open)
    assert memory.deltas == made.bytes + closed
