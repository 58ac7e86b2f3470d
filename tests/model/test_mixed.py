"""Batches of several tasks: each sample's output and every gradient are those of separate runs.

In float64 separate runs and mixed ones differ by the rounding of their sums alone. Outputs here are of order one, sums
have fewer than 1,000 terms and pass through fewer than 10 layers: 1e-10 is 50 times the sum of those errors at their
largest (10 * 1000 * 2**-53 * the growth of up to 2 a layer), and gradients are compared relative to their largest.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from checkpointed import plain_and_checkpointed
from method_cases import RUNS, adapted, close_some, images, without_fast_path
from models import TinyNet, settle
from stages import THOROUGH
from torch import Tensor, nn

import taps_ext.model.mixing as mixing
from taps_ext import ConfigError, LoraConfig, MixedOutput, TapsConfig, TaskModel, UnsupportedModuleError

EXACT = 1e-10
ROADS = ["layers", "tasks"]
FEW = [(base, case) for base, case in RUNS if case in ("taps-all", "lora", "family")]
QUICK = [(base, case) for base, case in RUNS if THOROUGH or not base.startswith("random")]
few = pytest.mark.parametrize(("base", "case"), RUNS if THOROUGH else FEW)


@pytest.fixture(autouse=True)
def _one_road():
    with without_fast_path():
        yield
    mixing.forced = None


def several(base: str, case: str) -> TaskModel:
    """Two tasks of a method with heads of 3 and 4 outputs, no part as it starts, in float64."""
    model = adapted(base, case, tasks=("a",))
    model.add_task("b", num_classes=4 if model.default_config.own_head else None)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in model.tasks:
            for part in model.state(name).table.values():
                for role, parameters in part.roles().items():
                    for parameter in parameters:
                        if role != "score":
                            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for family in model.families.values():
            for parameter in family.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    close_some(model, "a")
    for index, (_, _, gate) in enumerate(model.state("b").learned()):
        gate.score.data.fill_(0.05 if index % 2 else 0.15)
    return model.double().eval()


def names_of(model: TaskModel) -> list[str | None]:
    return ["b", None, "a", "b", "a", "b"] if len(model.tasks) > 1 else ["a", None, "a", None, None, "a"]


def separate(model: TaskModel, x: Tensor, names: list[str | None]) -> list[Tensor]:
    """Each sample's output by the run of its own task's samples."""
    found: list[Tensor] = [torch.empty(0)] * len(names)
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        for row, output in zip(rows, model(x[rows], task=name), strict=True):
            found[row] = output
    return found


def gradients(model: TaskModel) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(row + 1) * output.square().sum() for row, output in enumerate(outputs)]).sum()


@pytest.mark.parametrize(
    ("base", "case", "road"), [(*run, "layers") for run in QUICK] + [(*run, "tasks") for run in FEW]
)
def test_samples_and_gradients_are_those_of_separate_runs(base: str, case: str, road: str) -> None:
    model = several(base, case)
    x, names = images(base).double(), names_of(model)
    mixing.forced = road
    with torch.no_grad():
        out = model(x, tasks=names)
        want = separate(model, x, names)
    assert isinstance(out, MixedOutput) and len(out) == len(names)
    for got, one in zip(out, want, strict=True):
        assert got.shape == one.shape and (got - one).abs().max() < EXACT * max(1.0, one.abs().max())

    model.train()
    mixed, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    sampled = model.default_config.samples
    torch.manual_seed(0)
    loss_of(list(model(mixed, tasks=names))).backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss_of(separate(model, alone, names)).backward()
    scale = max(1.0, float(alone.grad.abs().max()))
    assert (mixed.grad - alone.grad).abs().max() < EXACT * scale
    for name, gradient in gradients(model).items():
        if sampled and name.endswith("score") and road == "layers":
            continue  # an estimate, of other draws
        assert (gradient is None) is (found[name] is None), name
        if gradient is not None:
            largest = max(1.0, float(gradient.abs().max()))
            assert (gradient - found[name]).abs().max() < EXACT * largest, name


@few
def test_row_invariant_is_equal_to_the_bit(base: str, case: str) -> None:
    model = several(base, case).float()
    x, names = images(base), names_of(model)
    mixing.forced, model.row_invariant = "layers", True
    with torch.no_grad():
        out, want = model(x, tasks=names), separate(model, x, names)
    assert out.road == "tasks"
    assert all(torch.equal(got, one) for got, one in zip(out, want, strict=True))


class Windows(nn.Module):
    """Cuts images into windows, tokens into a sequence that comes first, and both into one dimension, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.window, self.sequence = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.flat, self.fc = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(-1, 16, 8)
        x = self.window(windows).reshape(len(x), -1, 8)
        x = self.sequence(x.transpose(0, 1)).relu()  # [L, B, C], with as many tokens as there may be samples
        x = self.flat(x.flatten(0, 1)).view(x.shape)
        return self.fc(x.mean(dim=0))


@pytest.mark.parametrize("batch", [2, 4, 16, 64])
def test_samples_that_are_reshaped_keep_their_task(batch: int) -> None:
    torch.manual_seed(0)
    base = Windows()
    del base.table
    model = TaskModel(base, TapsConfig(lam=0.5)).eval()
    for name in ("a", "b"):
        model.add_task(name, num_classes=5)
        for _, part, _ in model.state(name).gated():
            nn.init.normal_(part.change.delta)
    model.double()
    x, names = torch.randn(batch, 3, 8, 8, dtype=torch.double), [("a", "b")[k * k % 3 % 2] for k in range(batch)]
    mixing.forced = "layers"
    with torch.no_grad():
        out = model(x, tasks=names)
        want = separate(model, x, names)
    assert out.road == "layers"
    assert all((got - one).abs().max() < EXACT * one.abs().max() for got, one in zip(out, want, strict=True))


class Table(nn.Module):
    """A layer over a table of positions, which no sample has a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Linear(2, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.table(torch.ones(4, 2, dtype=x.dtype)).mean(dim=0))


def test_a_layer_without_samples_takes_the_other_road() -> None:
    torch.manual_seed(0)
    model = TaskModel(Table(), TapsConfig(lam=0.5)).eval()
    for name in ("a", "b"):
        model.add_task(name, num_classes=2)
        nn.init.normal_(model.state(name).table["table"].change.delta)
    x, names = torch.randn(4, 3), ["a", "b", "a", None]
    mixing.forced = "layers"
    with torch.no_grad():
        out = model(x, tasks=names)
        assert out.road == "tasks"
        assert all(torch.equal(got, one) for got, one in zip(out, separate(model, x, names), strict=True))
        for name in ("a", "b"):
            model.set_gates(name, open=["fc"] if name == "never" else [])
        assert model(x, tasks=names).road == "layers"  # closed for all it is the base's


@pytest.mark.parametrize("road", ROADS)
def test_permuting_the_batch_permutes_the_output(road: str) -> None:
    model, generator = several("conv", "taps"), torch.Generator().manual_seed(0)
    mixing.forced = road
    for _ in range(200 if THOROUGH else 10):
        size = int(torch.randint(1, 9, (), generator=generator))
        x = torch.randn(size, 3, 8, 8, dtype=torch.double, generator=generator)
        names = [(None, "a", "b")[k] for k in torch.randint(3, (size,), generator=generator).tolist()]
        order = torch.randperm(size, generator=generator).tolist()
        with torch.no_grad():
            straight, turned = list(model(x, tasks=names)), list(model(x[order], tasks=[names[k] for k in order]))
        assert all((straight[row] - turned[place]).abs().max() < EXACT for place, row in enumerate(order))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_checkpointed_blocks_know_whose_rows_they_have(road: str, reentrant: bool) -> None:
    plain, checkpointed = plain_and_checkpointed(reentrant)
    names = ["a", "b", None, "b", "a"]
    mixing.forced = road
    found = []
    for model in (plain, checkpointed):
        x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = model(x, tasks=names)
        assert out.road == road
        sum(output["logits"].square().sum() for _, (_, output) in out.items()).backward()
        found.append({**gradients(model), "x": x.grad})
    for name, gradient in found[0].items():
        assert (gradient is None) is (found[1][name] is None), name
        assert gradient is None or torch.equal(gradient, found[1][name]), name


def test_closed_for_all_is_one_call_and_counted() -> None:
    model = several("conv", "taps")
    mixing.forced = "layers"
    x, names = images("conv").double(), ["a", "b", None, "a", "b", "a"]
    for name in model.tasks:
        model.set_gates(name, open=["hidden"])
    with torch.no_grad():
        model(x, tasks=names)
        with torch.profiler.profile() as seen:
            model(x, tasks=names)
    calls = [event.name for event in seen.events()]
    assert calls.count("aten::conv2d") == 3  # the base's, once for all


@pytest.mark.parametrize(
    ("base", "case", "op", "layers"),
    [("vit", "full", "mixed_linear", 2), ("conv", "full", "mixed_conv2d", 3), ("vit", "lora", "mixed_lowrank", 2)],
    ids=["linear", "convolution", "lowrank"],
)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_layers_product_is_one_call_for_all_tasks(base: str, case: str, op: str, layers: int, training: bool) -> None:
    """Of ViT those that attention does not read, of the convolutions all three (what the linear ones add beside)."""
    model = several(base, case).float().train(training)
    mixing.forced = "layers"
    x, names = images(base), ["a", "b", None, "a", "b", "a"]
    with torch.set_grad_enabled(training):
        model(x, tasks=names)
        with torch.profiler.profile() as seen:
            model(x, tasks=names)
    assert [event.name for event in seen.events()].count(f"taps_ext::{op}") == layers


def test_dropout_and_statistics_are_the_tasks_own() -> None:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5)).train()
    for name in ("a", "b"):
        model.add_task(name, num_classes=3)
    twin = copy.deepcopy(model)
    x, names = torch.randn(6, 3, 8, 8), ["a", "b", "a", None, "b", "a"]
    mixing.forced = "layers"
    assert model(x, tasks=names).road == "layers"
    for name in ("a", "b"):
        twin(x[[row for row, other in enumerate(names) if other == name]], task=name)
        for (key, got), (_, want) in zip(
            model.state(name).named_buffers(), twin.state(name).named_buffers(), strict=True
        ):
            assert torch.allclose(got.double(), want.double(), rtol=1e-5), key  # of 192 float32 terms: 192 * 2**-24


def test_what_a_mixed_batch_gave_reads_like_a_dictionary() -> None:
    model, x = several("small", "taps").float(), torch.randn(3, 3, 8, 8)
    out = model(x, tasks=["b", None, "b"])
    assert out.keys() == ["b", None] and out.get("a") is None and out.get("a", 1) == 1
    made = dict(out)
    assert made["b"][0].tolist() == [0, 2] and torch.equal(made["b"][1], out.get("b")[1])


def test_a_model_without_tasks_says_so() -> None:
    model = TaskModel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), TapsConfig(lam=0.5))
    with pytest.raises(ConfigError, match=r"^task: the model has no task yet \(add_task .*got 'a'"):
        model(torch.randn(2, 4), task="a")


@pytest.mark.parametrize("road", ROADS)
def test_too_few_samples_for_statistics_are_the_tasks(road: str) -> None:
    """On both roads the message names the task; the base, which has statistics, may have one sample."""
    base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model = TaskModel(base, TapsConfig(lam=0.5)).train()
    model.add_task("a", num_classes=2), model.add_task("b", num_classes=2)
    mixing.forced = road
    where = "1: " if road == "layers" else ""
    with pytest.raises(ConfigError, match=rf"^{where}task 'b' has 1 samples in this batch, too few for statistics"):
        model(torch.randn(4, 4), tasks=["a", "b", "a", None])


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.fc(self.body(x)), dim=-1)


def test_heads_of_several_sizes_are_not_computed_on_with_zeros() -> None:
    model = TaskModel(Softmax(), TapsConfig(lam=0.5)).eval()
    model.add_task("a", num_classes=2), model.add_task("b", num_classes=3)
    x = torch.randn(3, 4)
    mixing.forced = "layers"
    with pytest.raises(UnsupportedModuleError, match="heads of several sizes.*row_invariant=True"):
        model(x, tasks=["a", "b", "a"])
    model.row_invariant = True
    assert [len(one) for one in model(x, tasks=["a", "b", None])] == [2, 3, 5]


def test_the_output_by_task_and_by_sample() -> None:
    model, x = several("conv", "taps"), images("conv").double()
    out = model(x, tasks=["b", None, "a", "b", "a", "b"])
    assert out.tasks == ["b", None, "a"] and "a" in out and None in out and "c" not in out
    indices, logits = out["b"]
    assert indices.tolist() == [0, 3, 5] and indices.dtype == torch.int64 and logits.shape == (3, 4)
    assert [one.shape[0] for one in out] == [4, 5, 3, 4, 3, 4]
    assert {name: rows.tolist() for name, (rows, _) in out.items()} == {"b": [0, 3, 5], None: [1], "a": [2, 4]}
    assert repr(out) == "MixedOutput(6 samples: 'b': 3, None: 1, 'a': 2)"
    with pytest.raises(KeyError, match=r"'c' has no sample in this batch; its tasks are \['b', None, 'a'\]"):
        out["c"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("a", r"tasks: expected a list with a task's name or None for each sample, got 'a'"),
        (3, r"tasks: expected a list"),
        ([], r"tasks: expected .* an empty list"),
        (
            ["a", "b", "aa", "a", "a", "a"],
            r"tasks\[2\]: expected one of \['a', 'b'\] or None, got 'aa' \(did you mean 'a'",
        ),
        (["a", 3, "a", "a", "a", "a"], r"tasks\[1\]: expected one of .*, got 3"),
        (["a", "b"], r"got 2 names and 6 samples in dimension 0 \(batch_dim\)"),
    ],
    ids=["string", "number", "empty", "unknown", "no-name", "too-few"],
)
def test_bad_tasks(tasks: object, message: str) -> None:
    model = several("conv", "taps")
    with pytest.raises(ConfigError, match=message):
        model(images("conv").double(), tasks=tasks)


def test_task_and_tasks_together() -> None:
    model = several("conv", "taps")
    with pytest.raises(ConfigError, match="expected one of task and tasks, got both, task='a'"):
        model(images("conv").double(), tasks=["a"] * 6, task="a")
    with pytest.raises(ConfigError, match="row_invariant: expected a bool, got 1"):
        TaskModel(nn.Linear(2, 2), row_invariant=1)


@pytest.mark.parametrize("images_at_a_time", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("road", ROADS)
def test_a_large_batch_goes_in_pieces(road: str, images_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = plain_and_checkpointed(False)
    model.double().eval()
    x = torch.randn(11, 3, 8, 8, dtype=torch.double)
    names = ["a", "b", "a", None, "a", "b", "a", "a", None, "a", "a"]
    monkeypatch.setattr(mixing, "piece_bytes", images_at_a_time * x[0].nbytes)
    mixing.forced = road
    seen: list[int] = []
    model.base.norm.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        out = model(x, tasks=names)
        assert images_at_a_time > 11 or max(seen[:-1]) <= max(3, images_at_a_time)  # three where samples are looked for
        for row, name in enumerate(names):
            want = model(x[row : row + 1], task=name)["logits"]
            assert (list(out)[row]["logits"] - want[0]).abs().max() < EXACT
    indices, output = out["a"]
    assert indices.tolist() == [0, 2, 4, 6, 7, 9, 10] and len(output["logits"]) == 7
    seen.clear()
    model(x, tasks=names)  # with gradients: whole
    assert max(seen) == (11 if road == "layers" else 7)


@pytest.mark.parametrize("road", ROADS)
def test_another_mix_compiles_nothing_anew(road: str) -> None:
    torch._dynamo.reset()
    model, x = several("small", "taps").float(), torch.randn(6, 3, 8, 8)
    mixing.forced = road
    graphs: list[object] = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    counts = []
    for names in (["a", "b", None, "a", "b", "a"], ["b", "b", None, "a", "a", "a"], ["a", "a", "b", None, "a", "b"]):
        with torch.no_grad():
            got, want = compiled(x, tasks=names), model(x, tasks=names)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        counts.append(len(graphs))
    assert counts[1] == counts[2]


def test_packed_merged_and_loaded_tasks_are_in_a_batch(tmp_path) -> None:
    model, x = several("conv", "full").float(), images("conv")
    model.pack_task("a", codec="int8")
    model.merge_task("b")
    names = ["b", "a", None, "b", "a", "b"]
    for road in ROADS:
        mixing.forced = road
        with torch.no_grad():
            out, want = model(x, tasks=names), separate(model, x, names)
        # float32: eight layers of sums of at most 72 terms of order one.
        assert all((got - one).abs().max() < 8 * 72 * 2**-24 for got, one in zip(out, want, strict=True))


@pytest.mark.timeout(7200)
def test_threads_do_not_meet() -> None:
    model, x = several("small", "taps").float(), torch.randn(4, 3, 8, 8)
    batches = [["a", "b", None, "a"], ["b", "b", "a", None], [None, "a", "b", "b"], ["a", "a", "b", "b"]]
    wrong: list[str] = []
    mixing.forced = "layers"
    with torch.no_grad():
        want = [list(model(x, tasks=names)) for names in batches]

        def serve(index: int) -> None:
            with torch.no_grad():
                for turn in range(10_000 if THOROUGH else 25):
                    which = (index + turn) % len(batches)
                    out = list(model(x, tasks=batches[which]))
                    if not all(torch.equal(got, one) for got, one in zip(out, want[which], strict=True)):
                        wrong.append(f"thread {index}, turn {turn}")

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(16 if THOROUGH else 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_lora_and_taps_in_one_batch() -> None:
    model = adapted("vit", "taps", tasks=("a",))
    model.add_task("b", num_classes=4, config=LoraConfig(rank=2))
    for part in model.state("b").table.values():
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    model.double().eval()
    x, names = images("vit").double(), ["b", None, "a", "b", "a", "b"]
    mixing.forced = "layers"
    with torch.no_grad():
        out, want = model(x, tasks=names), separate(model, x, names)
    assert out.road == "layers"
    assert all((got - one).abs().max() < EXACT * one.abs().max() for got, one in zip(out, want, strict=True))
