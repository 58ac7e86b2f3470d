"""MTLoRA's streams: what they are at the start, how they are run and kept, and where they are refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import test_mtlora as mtlora
import torch
import torch.nn.functional as F
from models import settle
from test_mtlora import IMAGES, Decoder, adapted, backbone, loss_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taps_ext import (
    ConfigError,
    MTLoraConfig,
    ProbeConfig,
    TapsConfig,
    TaskFileError,
    TaskModel,
    UnsupportedModuleError,
)
from taps_ext.dense import DenseBase
from taps_ext.model import mixing
from taps_ext.ops import mixed_lowrank
from taps_ext.parts import DropoutLowRank, Gate, Layer, StreamLowRank
from taps_ext.parts import streams as parts
from taps_ext.parts.host import base_weight
from taps_ext.parts.part import Below

timm = pytest.importorskip("timm")

EPS = torch.finfo(torch.float32).eps


def fresh(config: MTLoraConfig = mtlora.CONFIG) -> TaskModel:
    """Tasks as they start, each with a copy of the base's decoder."""
    base = DenseBase(backbone(), mtlora.TAPS)
    torch.manual_seed(1)
    base.decoder = Decoder(base.channels, 3)
    model = TaskModel(base.requires_grad_(False).eval(), config)
    for name in "abc":
        model.add_task(name)
    return model


def gradients(model: TaskModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# ------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("plus", [False, True], ids=["", "plus"])
def test_starts_as_the_base(plus: bool) -> None:
    """To the bit, in one pass and one by one; the bare base stays what it is when tasks have been trained."""
    model = fresh(MTLoraConfig(rank=3, task_rank=2, plus=plus)).eval()
    with torch.no_grad():
        want = model(IMAGES, task=None)
        for task, found in model.forward_tasks(IMAGES, tasks=model.tasks).items():
            assert torch.equal(found, want) and torch.equal(model(IMAGES, task=task), want)
        mtlora.randomise(model)
        assert torch.equal(model(IMAGES, task=None), want)
        assert not torch.equal(model(IMAGES, task="a"), want)


@pytest.mark.parametrize("together", [True, False], ids=["one-pass", "one-by-one"])
def test_first_step(together: bool) -> None:
    """B is zero, so that A gets exactly no gradient, and B some; but not that of fc1, whose results enter by the B of
    fc2 alone."""
    model = fresh().train()
    outputs = model.forward_tasks(IMAGES, tasks=["a", "b"]) if together else {t: model(IMAGES, task=t) for t in "ab"}
    loss_of(outputs).backward()
    for task in "ab":
        gated = list(model.state(task).gated())
        assert len(gated) == 6
        for name, part, _ in gated:
            assert not part.change.down.grad.any(), name
            assert bool(part.change.up.grad.any()) is not name.endswith("fc1"), name
    assert all(p.grad is None for p in model.state("c").parameters())


def test_equal_streams_are_equal() -> None:
    model = adapted(tasks=("a", "b", "c")).eval()
    torch.manual_seed(2)
    same = TaskModel(DenseBase(backbone(), mtlora.TAPS), mtlora.CONFIG)
    for name in "abc":
        same.add_task(name, head=Decoder(same.base.channels, 2))
    mtlora.randomise(same)
    same.state("b").load_state_dict(same.state("a").state_dict())
    with torch.no_grad():
        found = same.eval().forward_tasks(IMAGES, tasks=["a", "b", "c"])
    assert torch.equal(found["a"], found["b"]) and not torch.equal(found["a"], found["c"])
    assert model.tasks == ["a", "b", "c"]


# ------------------------------------------------------------------------------------ one layer


@pytest.mark.parametrize("first", [True, False], ids=["first", "behind"])
def test_a_task_layer_with_dropout(first: bool) -> None:
    """y = p + s B A x' and y_t = p + s_t B_t A_t x_t, where x_t = x' = dropout(x) as long as there are no streams; in
    float64, with the same draw. Two sums of up to 8 terms: within 64 of float64's EPS."""
    torch.manual_seed(0)
    host = nn.Linear(8, 6).double().requires_grad_(False)
    settings: dict[str, Any] = {"rank": 3, "scale": 4.0, "dropout": 0.5}
    below = Layer(Gate(learn=False), DropoutLowRank(host, **settings)).train()
    own = [Layer(Gate(learn=False), StreamLowRank(host, first=first, **{**settings, "rank": 2})) for _ in range(3)]
    with torch.no_grad():
        for layer in (below, *own):
            for parameter in layer.parameters():
                parameter.normal_()
    rows = 5
    x = torch.randn(rows if first else 4 * rows, 2, 8, dtype=torch.float64)
    changes = [(layer.change, layer.gate) for layer in own]
    torch.manual_seed(3)
    got = parts.products(changes, Below(host, (below,)), x, host.bias)
    torch.manual_seed(3)
    dropped = F.dropout(x[:rows], 0.5, training=True)
    p = x[:rows] @ host.weight.T + host.bias
    want = [p + 4.0 * (dropped @ below.change.down.double().T @ below.change.up.double().T)]
    for place, layer in enumerate(own, 1):
        mine = dropped if first else x[place * rows : (place + 1) * rows]
        want.append(p + 4.0 * (mine @ layer.change.down.double().T @ layer.change.up.double().T))
    limit = 64 * torch.finfo(torch.float64).eps * torch.cat(want).abs().max()
    assert (got - torch.cat(want)).abs().max() <= limit
    assert not torch.equal(dropped, x[:rows])


def test_evaluation_drops_nothing() -> None:
    model = adapted(MTLoraConfig(rank=3, task_rank=2, dropout=0.5)).eval()
    plain = adapted(MTLoraConfig(rank=3, task_rank=2, dropout=0.0)).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES, task="a"), plain(IMAGES, task="a"))
        model.train()
        torch.manual_seed(0)
        first = model(IMAGES, task="a")
        assert not torch.equal(first, model(IMAGES, task="a"))
        torch.manual_seed(0)
        assert torch.equal(first, model(IMAGES, task="a"))


# ------------------------------------------------------------------------------------ what it costs


class Products(TorchFunctionMode):
    """The rows of each product with a weight of the base's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.names = {id(base_weight(m)): name for name, m in base.named_modules() if isinstance(m, nn.Linear)}
        self.rows: dict[str, list[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and (name := self.names.get(id(args[1]))) is not None:
            self.rows.setdefault(name, []).append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def test_one_base_product_whatever_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every layer in a block, on the shared rows alone; and one call for what all tasks add behind another."""
    calls: list[int] = []

    def counting(x: Tensor, a: Any, *rest: Any) -> Tensor:
        calls.append(len(a))
        return mixed_lowrank(x, a, *rest)

    monkeypatch.setattr(parts, "mixed_lowrank", counting)
    names = [f"t{place}" for place in range(8)]
    model = adapted(tasks=names)
    found = {}
    for count in (1, 2, 4, 8):
        calls.clear()
        watch = Products(model.base)
        with watch:
            made = model.forward_tasks(IMAGES, tasks=names[:count])
        assert list(made) == names[:count]
        found[count] = {name: rows for name, rows in watch.rows.items() if ".blocks." in name}
        assert calls == [1 + count] * 4  # fc1 and fc2 of two stages
    assert len(found[1]) == 16 and all(len(rows) == 1 for rows in found[1].values())
    assert found[2] == found[1] and found[4] == found[1] and found[8] == found[1]
    tokens = {"0": 2 * 64, "1": 2 * 16}
    assert all(rows == [tokens[name.split(".")[2]]] for name, rows in found[1].items())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_pass_is_as_separate_runs(training: bool) -> None:
    """The products of the base's are the same, and so are those of tasks to the bit on one thread: rows of one sample
    are summed in one order. In training so are drawn numbers, there being none."""
    model = adapted().train(training)
    with torch.set_grad_enabled(training):
        found = model.forward_tasks(IMAGES, tasks=["c", "a"])
        assert list(found) == ["c", "a"]
        for task, out in found.items():
            # Sums of up to 64 terms, in another order where the batch is larger, through some ten layers.
            assert (out - model(IMAGES, task=task)).abs().max() <= 64 * 10 * EPS * out.abs().max()


def test_ranks_of_tasks_may_differ() -> None:
    """One call serves them all, and a task whose layers are closed, which has p there: in float64."""
    base = DenseBase(backbone(), mtlora.TAPS)
    model = TaskModel(base, mtlora.CONFIG)
    for place, name in enumerate("abc", 1):
        config = dataclasses.replace(mtlora.CONFIG, task_rank=place, task_scale=float(place))
        model.add_task(name, head=Decoder(base.channels, 2), config=config)
    mtlora.randomise(model)
    model.set_gates("b", open=["*.layers.1.*"])
    model.double().eval()
    x = IMAGES.double()
    with torch.no_grad():
        found = model.forward_tasks(x, tasks=["a", "b", "c"])
        for task, out in found.items():
            assert (out - model(x, task=task)).abs().max() <= 1e-12 * out.abs().max()
        for name, part, _ in model.state("b").gated():
            if ".layers.0." in name:
                part.change.up.zero_()
        model.set_gates("b", open=["*"])
        assert (found["b"] - model(x, task="b")).abs().max() <= 1e-12 * found["b"].abs().max()


@pytest.mark.parametrize("together", [True, False], ids=["one-pass", "one-by-one"])
def test_nothing_outlives_a_pass(together: bool) -> None:
    """Without the collector of cycles."""
    model = adapted().train()
    held: list[weakref.ref[Any]] = []

    def mark(module: nn.Module, args: Any, output: Tensor) -> None:
        marker = Marker()
        output.grad_fn.metadata["marker"] = marker  # which lives as long as the graph
        held.append(weakref.ref(marker))

    for name in ("layers.0", "layers.1.downsample", "layers.1"):
        model.base.backbone.get_submodule(name).register_forward_hook(mark)

    def run() -> dict[str, Tensor]:
        return model.forward_tasks(IMAGES, tasks=["a", "b"]) if together else {"a": model(IMAGES, task="a")}

    loss_of(run()).backward()
    gc.collect()
    held.clear()
    gc.disable()
    try:
        out = run()
        assert len(held) == 3 and all(one() is not None for one in held)
        loss_of(out).backward()
        del out
        assert all(one() is None for one in held)
    finally:
        gc.enable()


class Marker:
    """An object that can be watched."""


# ------------------------------------------------------------------------------------ the house


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted().eval()
    with torch.no_grad():
        want = model.forward_tasks(IMAGES, tasks=model.tasks)
    model.save_shared("mtlora", tmp_path / "family.taps")
    assert not any(p.requires_grad for p in model.families["mtlora"].parameters())
    for name in model.tasks:
        model.save_task(name, tmp_path / f"{name}.taps")
    again = TaskModel(DenseBase(backbone(), mtlora.TAPS)).eval()
    for name in model.tasks:
        again.load_task(tmp_path / f"{name}.taps", head=Decoder(again.base.channels, len(want[name][0, 0, 0])))
    with torch.no_grad():
        found = again.forward_tasks(IMAGES, tasks=again.tasks)
    assert equal(found, want)
    again.save_shared("mtlora", tmp_path / "again.taps")
    assert (tmp_path / "again.taps").read_bytes() == (tmp_path / "family.taps").read_bytes()
    again.save_task("b", tmp_path / "again.taps")
    assert (tmp_path / "again.taps").read_bytes() == (tmp_path / "b.taps").read_bytes()
    untapped = TaskModel(DenseBase(backbone(), ("layers.0", "layers.1"), layouts={"layers.0": "nhwc"}))
    with pytest.raises(TaskFileError, match="belongs to another base"):
        untapped.load_task(tmp_path / "a.taps", head=Decoder((8, 16), 2))


@pytest.mark.parametrize("together", [True, False], ids=["one-pass", "one-by-one"])
def test_checkpointing(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients to the bit; the reentrant kind loses what tasks have, and is refused."""
    model = adapted(MTLoraConfig(rank=3, task_rank=2, dropout=0.3)).train()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        x = IMAGES.clone().requires_grad_()
        out = model.forward_tasks(x, tasks=["a", "b"]) if together else {t: model(x, task=t) for t in "ab"}
        loss_of(out).backward()
        return {"x": x.grad, **gradients(model)}

    want = run()
    model.base.backbone.set_grad_checkpointing(True)
    assert equal(run(), want)
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", True)
    with pytest.raises(UnsupportedModuleError, match="use_reentrant=False"):
        run()


@pytest.mark.thorough  # the suite compiles a small one
def test_compiles() -> None:
    model = adapted().train()
    loss_of({"b": model(IMAGES, task="b")}).backward()
    want = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    loss_of({"b": torch.compile(model, backend="aot_eager")(IMAGES, task="b")}).backward()
    assert equal(gradients(model), want)
    together = torch.compile(model.forward_tasks, backend="eager")(IMAGES, tasks=["a", "c"])
    assert equal(together, model.forward_tasks(IMAGES, tasks=["a", "c"]))


def test_autocast_stays_near() -> None:
    """bf16 rounds each of some forty products and sums on a path by 2^-8 at most; they err independently, and the norms
    between keep errors as large as they are: within 2^-8 * sqrt(40) * 4 of the largest output."""
    model = adapted().eval()
    with torch.no_grad():
        want = model.forward_tasks(IMAGES, tasks=["a", "b"])
        with torch.autocast("cpu", torch.bfloat16):
            found = model.forward_tasks(IMAGES, tasks=["a", "b"])
    for task, out in found.items():
        assert out.dtype == torch.bfloat16
        assert (out.float() - want[task]).abs().max() <= 2**-8 * 40**0.5 * 4 * want[task].abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model.train().forward_tasks(IMAGES, tasks=["a", "b"])).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_mixed_batches_go_task_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted().eval()
    monkeypatch.setattr(mixing, "forced", "layers")
    with torch.no_grad():
        found = model(IMAGES, tasks=["b", "a"])
        assert found.road == "tasks"
        for place, task in enumerate("ba"):
            assert torch.equal(found[task][1], model(IMAGES[place : place + 1], task=task))


# ------------------------------------------------------------------------------------ merging


def test_folds_where_the_input_is_the_shared_stream() -> None:
    """Task layers on the last projection alone, whose streams go on to the end: W + s_t B_t A_t there, W + s B A
    elsewhere. Sums of at most 64 terms through some ten layers, in another order."""
    config = MTLoraConfig(rank=3, task_rank=2, stages=("*.layers.1.blocks.1",), task_modules=("*.proj",))
    model = adapted(config).eval()
    with torch.no_grad():
        want = model(IMAGES, task="a")
        limit = 64 * 10 * EPS * want.abs().max()
        model.merge_task("a")
        assert (model(IMAGES, task="a") - want).abs().max() <= limit
        model.unmerge_task()
        assert torch.equal(model(IMAGES, task="a"), want)
        assert equal(model.forward_tasks(IMAGES, tasks=["a"]), {"a": want})
        plain = model.merge_and_unload("a")
        assert (plain(IMAGES) - want).abs().max() <= limit


def test_the_shared_stream_folds() -> None:
    """Of tasks that have decoders alone it is all there is."""
    model = adapted(MTLoraConfig(rank=3, task_modules=())).eval()
    assert list(model.state("a").table) == ["decoder"]
    with torch.no_grad():
        want = model(IMAGES, task="a")
        assert equal(model.forward_tasks(IMAGES, tasks=["a", "b"]), {t: model(IMAGES, task=t) for t in "ab"})
        plain = model.merge_and_unload("a")
    assert (plain(IMAGES) - want).abs().max() <= 64 * 10 * EPS * want.abs().max()


@pytest.mark.parametrize(
    ("modules", "closed", "named"),
    [
        (None, False, "layers.0.blocks.1.mlp.fc1"),
        (None, True, "layers.0.blocks.1.mlp.fc1"),
        (("*.proj",), False, "layers.0.blocks.1: .* the shared stream goes on without it"),
    ],
    ids=["all", "closed", "first"],
)
def test_refuses_to_fold(modules: tuple[str, ...] | None, closed: bool, named: str) -> None:
    model = adapted(MTLoraConfig(rank=3, task_modules=modules)).eval()
    if closed:
        model.set_gates("a", open=[])
    with torch.no_grad():
        want = model(IMAGES, task="a")
        for make in (model.merge_task, model.task_state_dict, model.merge_and_unload):
            with pytest.raises(UnsupportedModuleError, match=named):
                make("a")
        assert torch.equal(model(IMAGES, task="a"), want)


# ------------------------------------------------------------------------------------ where it goes


def roles(model: TaskModel) -> dict[str, str]:
    table = model.state(model.tasks[0]).table
    return {name.removeprefix("backbone."): part.role for name, part in table.items() if part.kind == "streams"}


def layers(model: TaskModel) -> list[str]:
    return [name.removeprefix("backbone.") for name, _, _ in model.state(model.tasks[0]).gated()]


OTHERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], int, dict[str, str]]] = {
    "swin-v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "patch_size": 2, "depths": (1, 2), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4},
        ("layers.1.downsample", "layers.1"),
        32,
        {
            "layers.0.blocks.0": "block",
            "layers.0.blocks.0.attn": "shared",
            "layers.1.downsample": "merging",
            "layers.1.blocks.1": "last",
            "layers.1.blocks.1.attn": "shared",
        },
    ),
    "pvt": (
        "pvt_v2_b0",
        {"depths": (2, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)},
        ("stages.0", "stages.3"),
        32,
        {
            "stages.0": "block",
            "stages.0.blocks.0": "same",
            "stages.0.blocks.1.norm1": "shared",
            "stages.1": "block",
            "stages.1.downsample": "same",
            "stages.1.blocks.0.norm1": "shared",
            "stages.2": "block",
            "stages.2.downsample": "same",
            "stages.2.blocks.0.norm1": "shared",
            "stages.3": "last",
            "stages.3.downsample": "same",
            "stages.3.blocks.0.norm1": "shared",
        },
    ),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 6, "embed_dim": 16, "num_heads": 2},
        ("blocks.1", "blocks.3", "norm"),
        32,
        {
            "blocks.1": "block",
            "blocks.1.norm1": "shared",
            "blocks.3": "block",
            "blocks.3.norm1": "shared",
            "blocks.5": "last",
            "blocks.5.norm1": "shared",
        },
    ),
}


class Resized(Decoder):
    """Of maps of several sizes, all at that of the first."""

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        return super().forward([F.interpolate(found, maps[0].shape[2:]) for found in maps], size)


def by_hooks(model: TaskModel, base: DenseBase, task: str, x: Tensor, stages: list[tuple[int, list[str]]]) -> Tensor:
    """What a task gives by plain runs of a plain copy of the base that holds what tasks share: one to see the shared
    stream's products with W at task layers, then one for each tap, whose task layers return them and `B_t A_t x_t`.

    Args:
        base: as it was before it was adapted, in float64. stages: for each tap its place and the task layers before it.
    """
    own = TaskModel(copy.deepcopy(base), dataclasses.replace(model.state(task).config, task_modules=()))
    own.add_task("t", head=Resized(base.channels, 2))
    own.families["mtlora"].load_state_dict(model.families["mtlora"].state_dict())
    plain = own.merge_and_unload("t").eval()
    seen: dict[str, Tensor] = {}
    active: set[str] = set()

    def hook(module: nn.Module, args: Any, output: Tensor, name: str) -> Tensor:
        host = base.get_submodule(name)
        if name not in active:
            seen[name] = F.linear(args[0], host.weight, host.bias)
            return output
        change = model.state(task).table[name].change
        return seen[name] + 4.0 * (args[0] @ change.down.double().T @ change.up.double().T)

    for _, names in stages:
        for name in names:
            plain.get_submodule(name).register_forward_hook(functools.partial(hook, name=name))
    plain.features(x)
    shared, maps = dict(seen), []
    for place, names in stages:
        seen.update(shared)
        active = set(names)
        maps.append(plain.features(x)[place])
    return model.state(task).head(maps, x.shape[2:])


@pytest.mark.parametrize("name", OTHERS)
def test_other_transformers(name: str) -> None:
    """Beside plain runs, in float64, so that only what is wrong shows."""
    made, settings, taps, size, want = OTHERS[name]
    torch.manual_seed(0)
    layouts = dict.fromkeys(taps, "nchw") if name == "pvt" else None  # 8 x 8 x 8 says nothing
    backbone = settle(timm.create_model(made, **settings)).requires_grad_(False)
    base = DenseBase(backbone, taps, layouts=layouts, image=(3, size, size))
    before = copy.deepcopy(base).double().eval()
    config = MTLoraConfig(rank=3, task_rank=2, dropout=0.0, stages=3 if name == "vit" else None)
    model = TaskModel(base, config)
    with contextlib.ExitStack() as stack:
        if name == "pvt":
            unread = "backbone.stages.1.blocks.0, backbone.stages.2.blocks.0"
            stack.enter_context(pytest.warns(UserWarning, match=f"no features behind {unread}, "))
        for outputs, task in enumerate("ab", 2):
            model.add_task(task, head=Resized(base.channels, outputs))
    mtlora.randomise(model)
    model.double().eval()
    assert roles(model) == want
    ends = [
        block.rpartition(".norm1")[0] or block.rpartition(".attn")[0]
        for block, role in want.items()
        if role == "shared"
    ]
    tapped = [ends[0], ends[-1]] if len(taps) == 2 else ends
    stages = [
        (place, [f"backbone.{end}.{layer}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")])
        for place, end in enumerate(tapped)
    ]
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        found = model.forward_tasks(x, tasks=["a", "b"])
        for task, out in found.items():
            hooked = by_hooks(model, before, task, x, stages)
            assert (out - hooked).abs().max() <= 1e-11 * hooked.abs().max()
            assert (model(x, task=task) - hooked).abs().max() <= 1e-11 * hooked.abs().max()
    model.train()
    loss_of(model.forward_tasks(x, tasks=["a", "b"])).backward()
    for task in "ab":
        for layer, part, _ in model.state(task).gated():
            read = any(layer in names for _, names in stages)
            assert bool(part.change.up.grad is not None and part.change.up.grad.any()) is read, layer


def test_weights_that_are_read_know_no_dropout() -> None:
    """Swin v2's attention multiplies with the weight of its qkv by itself."""
    made, settings, taps, size, _ = OTHERS["swin-v2"]
    base = DenseBase(timm.create_model(made, **settings), taps, image=(3, size, size))
    model = TaskModel(base, MTLoraConfig(rank=2))
    model.add_task("t", head=Resized(base.channels, 2))
    x = torch.randn(2, 3, size, size)
    model.eval()(x, task="t")
    with pytest.raises(UnsupportedModuleError, match="set dropout=0.0"):
        model.train()(x, task="t")


def test_placement_is_told() -> None:
    proj = adapted(MTLoraConfig(task_modules=("*.proj", "*.fc2")))
    assert layers(proj) == [f"layers.{i}.blocks.1.{name}" for i in (0, 1) for name in ("attn.proj", "mlp.fc2")]
    last = adapted(MTLoraConfig(stages=("*.layers.1.blocks.0",), shared_modules=("*.qkv",)))
    assert layers(last) == [f"layers.1.blocks.0.{name}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2")]
    assert roles(last) == {"layers.1.blocks.0": "last", "layers.1.blocks.0.norm1": "shared"}
    shared = [name for name, _, _ in last.families["mtlora"].gated()]
    assert len(shared) == 4 + 2 and all(name.endswith(("qkv", "patch_embed.proj", "reduction")) for name in shared)
    hidden = adapted(MTLoraConfig(task_modules=("*.mlp.fc2",), dropout=0.0)).double().eval()
    assert roles(hidden)["layers.0.blocks.1.attn"] == "widen"
    x = IMAGES.double()
    with torch.no_grad():
        for task, out in hidden.forward_tasks(x, tasks=["a", "b"]).items():
            names = [[f"backbone.layers.{i}.blocks.1.mlp.fc2"] for i in (0, 1)]
            plain = DenseBase(backbone(), mtlora.TAPS).double().eval()
            hooked = by_hooks(hidden, plain, task, x, list(enumerate(names)))
            assert (out - hooked).abs().max() <= 1e-11 * hooked.abs().max()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank: expected an int >= 1, got 0"),
    ({"task_rank": 1.5}, "task_rank: expected an int >= 1, got 1.5"),
    ({"scale": 0.0}, "scale: expected a number in"),
    ({"dropout": 1.0}, "dropout: expected a number in"),
    ({"plus": 1}, "plus: expected True or False, got 1"),
    ({"merging": "no"}, "merging: expected True, False or None, got 'no'"),
    ({"stages": 0}, "stages: expected an int >= 1, globs of blocks, or None, got 0"),
    ({"stages": "blocks"}, "stages: expected a list of patterns"),
    ({"task_modules": "proj"}, "task_modules: expected a list of patterns"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(place) for place in range(len(REFUSED))])
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MTLoraConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 3}, "stages: the base has 2 stages of its own, got 3"),
        ({"stages": ("*.blocks.7",)}, "stages: pattern '*.blocks.7' matches no layer"),
        ({"task_modules": ("*.blocks.0.attn.proj",)}, "matches no layer"),
        ({"shared_modules": ("*.conv",)}, "shared_modules: pattern '*.conv' matches no layer"),
    ],
    ids=["stages", "blocks", "task-modules", "shared-modules"],
)
def test_refuses_places(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        adapted(MTLoraConfig(**settings))


def test_refuses_other_networks() -> None:
    torchvision = pytest.importorskip("torchvision")
    for base in (torchvision.models.swin_t(), torchvision.models.resnet18()):
        with pytest.raises(
            ConfigError, match=r"whose blocks hold attn.qkv, .* found no such block; torchvision's Swin"
        ):
            TaskModel(base, MTLoraConfig()).add_task("t", num_classes=2)


# ------------------------------------------------------------------------------------ several tasks, any method


def test_tasks_of_other_methods_run_one_by_one() -> None:
    """Decoders alone share a pass; all others need their own."""
    base = DenseBase(backbone(), mtlora.TAPS)
    model = TaskModel(base, ProbeConfig())
    configs = {"p": None, "t": TapsConfig(), "q": None, "m": mtlora.CONFIG, "n": mtlora.CONFIG}
    for outputs, (name, config) in enumerate(configs.items(), 2):
        model.add_task(name, head=Decoder(base.channels, outputs), config=config)
    calls: list[int] = []
    base.backbone.patch_embed.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        found = model.eval().forward_tasks(IMAGES, tasks=["t", "p", "m", "q", "n"])
        assert list(found) == ["t", "p", "m", "q", "n"] and len(calls) == 3
        for task, out in found.items():
            assert (out - model(IMAGES, task=task)).abs().max() <= 64 * 10 * EPS * out.abs().max()


def test_tasks_are_named() -> None:
    model = adapted(tasks=("a", "b"))
    for tasks, message in (
        ([], "tasks: expected a list of names of tasks, got []"),
        ("a", "tasks: expected a list of names of tasks, got 'a'"),
        (["a", "z"], "tasks[1]: expected one of ['a', 'b'], got 'z'"),
        (["a", None], "tasks[1]: expected one of ['a', 'b'], got None"),
        (["a", "a"], "tasks: expected each task once, got 'a' again"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            model.forward_tasks(IMAGES, tasks=tasks)
    with pytest.raises(TypeError, match="tasks"):
        model.forward_tasks(IMAGES)


def test_a_base_that_computes_on_is_refused() -> None:
    class Scaled(DenseBase):
        def forward(self, image: Tensor) -> Tensor:
            return 2.0 * super().forward(image)

    model = adapted(tasks=("a", "b"), base=Scaled(backbone(), mtlora.TAPS))
    with pytest.raises(UnsupportedModuleError, match="returns what that gives"):
        model.forward_tasks(IMAGES, tasks=["a", "b"])
    assert model(IMAGES, task="a").shape == model.forward_tasks(IMAGES, tasks=["a"])["a"].shape


def test_a_classifier_runs_on_the_last_stream() -> None:
    base = backbone()
    model = TaskModel(base, MTLoraConfig(rank=3, task_rank=2, dropout=0.0, stages=("layers.1.blocks.1",)))
    for outputs, name in enumerate("ab", 3):
        model.add_task(name, num_classes=outputs)
    mtlora.randomise(model)
    model.double().eval()
    x = IMAGES.double()
    with torch.no_grad():
        found = model.forward_tasks(x, tasks=["a", "b"])
        assert {name: out.shape for name, out in found.items()} == {"a": (2, 3), "b": (2, 4)}
        for name, out in found.items():
            assert (out - model(x, task=name)).abs().max() <= 1e-12 * out.abs().max()
