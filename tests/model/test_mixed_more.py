"""Batches of several tasks through models that keep, pick, draw or return what is easily taken for another's."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taps_ext.model.mixing as mixing
from taps_ext import ConfigError, FullConfig, TapsConfig, TaskModel, UnsupportedModuleError
from taps_ext.train.together import together

# As in test_mixed.py: 50 times the largest sum of rounding errors of float64 here.
EXACT = 1e-10
NAMES = ["a", "b", "a", None, "b"]


@pytest.fixture(autouse=True)
def _as_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "forced", "layers")
    monkeypatch.setattr(mixing, "piece_bytes", mixing.piece_bytes)


def two(base: nn.Module, config=None, classes=(None, None), **settings) -> TaskModel:
    torch.manual_seed(1)
    model = TaskModel(base, config or TapsConfig(lam=0.5), **settings)
    for name, count in zip("ab", classes, strict=True):
        model.add_task(name, **({} if count is None else {"num_classes": count}))
        with torch.no_grad():
            for parameter in model.state(name).parameters():
                if parameter.numel() > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def separate(model: TaskModel, x: Tensor, names: list[str | None], **others: Tensor) -> list[Tensor]:
    found: list[Tensor] = [torch.empty(0)] * len(names)
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        given = {key: value[rows] if len(value) == len(names) else value for key, value in others.items()}
        for row, output in zip(rows, model(x[rows], task=name, **given), strict=True):
            found[row] = output
    return found


def equal(got: object, want: list[Tensor]) -> bool:
    return all((a - b).abs().max() < EXACT for a, b in zip(got, want, strict=True))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.fc = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> object:
        return self.fc(self.lin(x))


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.fc = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        return self.fc((self.word(ids) * self.position(position)).mean(1))


@pytest.mark.parametrize("first", ["each", "all"])
def test_what_is_for_all_samples_is_no_other_call_s_of_each(first: str) -> None:
    model, ids = two(Ids(), FullConfig()), torch.arange(20).view(4, 5) % 7
    each = torch.arange(20).view(4, 5) % 9
    names = ["a", "b", "b", "b"]
    with torch.no_grad():
        for position in (each, each[:1]) if first == "each" else (each[:1], each):
            out = model(ids, position=position, tasks=names)
            assert equal(out, separate(model, ids, names, position=position))


class Keywords(Small):
    def forward(self, x: Tensor, turned: Tensor | None = None, straight: Tensor | None = None) -> Tensor:
        if straight is not None:
            return self.fc(self.lin(x + straight).mean(1))
        return self.fc(self.lin((x + turned).transpose(0, 1)).mean(0))


def test_another_keyword_is_another_signature() -> None:
    model, x = two(Keywords()), x_of(5, 5, 5)
    with torch.no_grad():
        for key in ("turned", "straight"):
            assert equal(model(x, **{key: x}, tasks=NAMES), separate(model, x, NAMES, **{key: x}))


@dataclass
class Answer:
    logits: Tensor


class Answers(Small):
    def forward(self, x: Tensor) -> object:
        return Answer(super().forward(x))


class Largest(Small):
    def forward(self, x: Tensor) -> object:
        hidden = self.lin(x)
        return Answer(self.fc(hidden)).logits, hidden.amax()


class Centred(Small):
    def forward(self, x: Tensor) -> object:
        return super().forward(x - x.mean(dim=0))


def of_task(output: object) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [getattr(output, "logits", output)]


@pytest.mark.parametrize("base", [Answers, Largest, Centred])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_outputs_that_cannot_be_dealt_out_take_the_other_road(base: type, in_pieces: bool) -> None:
    model = two(base())
    for scale in (1.0, -1.0):  # the largest is the first sample's or another's
        x = scale * x_of(5, 5)
        model._layouts = {}
        if in_pieces:
            mixing.piece_bytes = x[0].nbytes
        with torch.no_grad():
            out = model(x, tasks=NAMES)
            for name in ("a", "b", None):
                rows, output = out[name]
                assert equal(of_task(output), of_task(model(x[rows], task=name)))


class Chances(Small):
    def forward(self, x: Tensor) -> object:
        logits = super().forward(x)
        return {"logits": logits, "chances": logits.softmax(-1)}


def test_heads_of_several_sizes_that_are_returned_are_not_computed_on_beside() -> None:
    model = two(Chances(), classes=(2, 4))
    with pytest.raises(UnsupportedModuleError, match=r"heads of several sizes.*softmax.*row_invariant=True"):
        model(x_of(5, 5), tasks=NAMES)


def test_a_graph_of_heads_of_several_sizes_is_freed() -> None:
    model = two(Small(), classes=(2, 4)).train()
    lin = model.base.lin
    seen: list[weakref.ref[Tensor]] = []
    lin.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    out = model(x_of(5, 5), tasks=["a", "b", "a", "b", "b"])
    assert seen[-1]() is not None  # the head's product keeps its input
    del out
    gc.collect()
    assert all(ref() is None for ref in seen)


class Checkpointed(Small):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> object:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_heads_of_several_sizes_in_a_checkpointed_block(reentrant: bool) -> None:
    model, x = two(Checkpointed(reentrant), classes=(2, 4)).train(), x_of(5, 5).requires_grad_()
    found = []
    for run in (lambda: model(x, tasks=NAMES), lambda: separate(model, x, NAMES)):
        sum((row + 1) * one.square().sum() for row, one in enumerate(run())).backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
        x.grad = None
    assert len(found[0]) == len(found[1]) > 4 and equal(*found)


class Table(Small):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> object:
        return super().forward(x + self.table(torch.ones(4, 2, dtype=x.dtype)).mean(dim=0))


def test_a_layer_that_opened_unseen_is_found_before_the_road_is_taken() -> None:
    model, x = two(Table()), x_of(5, 5)
    scores = [model.state(name).table["table"].gate.score for name in ("a", "b")]
    with torch.no_grad():
        for value, road in ((0.0, "layers"), (0.5, "tasks")):
            for score in scores:
                score.data.fill_(value)
            out = model(x, tasks=NAMES)
            assert out.road == road and equal(out, separate(model, x, NAMES))


class Token(Small):
    """A tensor of the base itself, so that all of it acts."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> object:
        return super().forward(x * self.token)


def test_heads_of_several_sizes_under_a_base_with_tensors_of_its_own() -> None:
    model, x = two(Token(), FullConfig(), classes=(2, 4)), x_of(5, 5)
    with torch.no_grad():
        out = model(x, tasks=NAMES)
        assert out.road == "layers" and equal(out, separate(model, x, NAMES))


class Pair(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.own = nn.Linear(5, count)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.own(x), self.own(x).sum(-1)


def test_a_head_that_returns_more_than_the_bases() -> None:
    model = TaskModel(Small(), TapsConfig(lam=0.5))
    for name in ("a", "b"):
        model.add_task(name, head=Pair(2))
    model.double().eval()
    x, names = x_of(5, 5), ["a", "b", "a", "b", "b"]
    with torch.no_grad():
        with pytest.raises(UnsupportedModuleError, match="fc: expected 1 tensors .* got 2 from tasks"):
            model(x, tasks=names)
        mixing.forced, mixing.piece_bytes = "tasks", x[0].nbytes
        rows, output = model(x, tasks=names)["b"]
        assert all(torch.equal(a, b) for a, b in zip(output, model(x[rows], task="b"), strict=True))


class Dropping(Small):
    def forward(self, x: Tensor) -> object:
        return self.fc(torch.dropout(self.lin(x), 0.5, self.training))


@pytest.mark.parametrize("names", [["a", None, "b", "a", None], [None, "a", "a", None, "a"]])
def test_the_base_evaluates_also_in_a_batch_that_trains(names: list[str | None]) -> None:
    model, x = two(Dropping()).train(), x_of(5, 5)
    out = model(x, tasks=names)
    rows, logits = out[None]
    assert torch.equal(logits, model(x[rows], task=None)) and out.tasks == list(dict.fromkeys(names))


class Unpadded(Small):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[mask] = self.lin(x[mask])
        return self.fc(out.sum(1))


@pytest.mark.parametrize("lengths", [[4, 3, 5, 4], [4, 2, 5, 4]], ids=["as-many-in-all", "fewer"])
def test_rows_without_padding_are_not_counted_by_samples(lengths: list[int]) -> None:
    """The probe's two samples, the first and the last, have as many rows each."""
    model, x, names = two(Unpadded()), x_of(4, 5, 5), ["a", "b", "a", "b"]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        assert equal(model(x, mask=mask, tasks=names), separate(model, x, names, mask=mask))


class SequenceFirst(Small):
    def forward(self, x: Tensor) -> object:
        return self.fc(self.lin(x).mean(0))


@pytest.mark.parametrize("road", ["layers", "tasks"])
@pytest.mark.parametrize("names", [NAMES, ["a", "b", "a", "b", "a"], ["a"] * 5], ids=["mixed", "as-classes", "one"])
def test_iterating_finds_samples_where_the_outputs_have_them(road: str, names: list[str | None]) -> None:
    """Of `[L, B, C]` to `[B, classes]`; three classes, and three samples of a task."""
    model, x = two(SequenceFirst(), batch_dim=1), x_of(6, 5, 5)
    mixing.forced = road
    with torch.no_grad():
        out = list(model(x, tasks=names))
        want = [model(x[:, row : row + 1], task=name)[0] for row, name in enumerate(names)]
    assert [one.shape for one in out] == [one.shape for one in want] and equal(out, want)


def test_batches_of_training_are_joined_where_the_samples_are() -> None:
    joined = together({"a": torch.zeros(6, 2, 4), "b": torch.ones(6, 3, 4)}, dim=1)
    assert joined is not None and joined[0].shape == (6, 5, 4) and joined[1] == ["a", "a", "b", "b", "b"]
    assert together({"a": torch.zeros(6, 2, 4), "b": torch.ones(5, 3, 4)}, dim=1) is None


class Counting(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> object:
        if self.training:
            self.written.add_(1)
            self.replaced = self.replaced + 1
        return super().forward(x)


def test_looking_for_samples_writes_nothing_to_the_base() -> None:
    base = Counting()
    model = two(base, FullConfig()).train()
    assert model(x_of(5, 5), tasks=NAMES).road == "layers"
    assert base._buffers["written"] == 0 and base._buffers["replaced"] == 0
    for name in ("a", "b"):
        assert [float(buffer) for buffer in model.state(name).buffers()] == [1.0, 1.0]


class Windows(nn.Module):
    """Drops the block of whole samples, and cuts what it has into one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blk, self.lin, self.fc = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        if self.training:
            h = h + torch.empty(len(x), 1, 1, dtype=x.dtype).bernoulli_(0.5) * self.blk(h)
        return self.fc(self.lin(h.flatten(0, 1)).view(h.shape).mean(1))


def test_what_is_dropped_at_random_hides_no_sample() -> None:
    model = two(Windows()).train()
    for seed in range(8):  # half of which drop one of the two equal samples
        torch.manual_seed(seed)
        model._layouts = {}
        x = torch.randn(6, 1, 4).expand(6, 16, 4).double() + 0.01 * x_of(6, 16, 4)  # windows that are nearly alike
        model(x, tasks=["a", "b", "a", "a", "b", "b"])
        (known,) = model._layouts.values()
        layout = known.modules["lin", (2,)]
        assert layout is not None and layout.inputs == layout.outputs == ((0, 1, 16),)


class Cache:
    def __init__(self) -> None:
        self.rows: list[int] = []


class Caching(Small):
    def forward(self, x: Tensor, cache: Cache) -> object:
        cache.rows.append(len(x))
        return super().forward(x)


def test_an_object_that_the_base_writes_to_is_not_shared_between_tasks() -> None:
    model, cache = two(Caching()), Cache()
    mixing.piece_bytes = 40
    for call in (lambda: model(x_of(5, 5), cache=cache, tasks=NAMES), lambda: model(x_of(5, 5), [cache], tasks=NAMES)):
        with torch.no_grad(), pytest.raises(ConfigError, match=r"got a Cache \((cache|argument 1)\): each task's run"):
            call()
    assert cache.rows == []
    with torch.no_grad():
        model(x_of(5, 5), cache=cache, tasks=["a"] * 5)
    assert cache.rows == [5]  # one task's, and no trial run's


class Attending(nn.Module):
    """An acting module with others inside, in a checkpointed block."""

    def __init__(self, inner: bool | None, outer: bool | None) -> None:
        super().__init__()
        self.stem, self.att, self.fc = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.scale = Scaled(inner)
        self.outer = outer

    def block(self, h: Tensor) -> Tensor:
        return self.scale(h + self.att(h, h, h)[0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.block(h) if self.outer is None else checkpoint(self.block, h, use_reentrant=self.outer)
        return self.fc(h.mean(1))


class Scaled(nn.Module):
    def __init__(self, inner: bool | None) -> None:
        super().__init__()
        self.gain, self.lin, self.inner = nn.Parameter(torch.ones(8)), nn.Linear(8, 8), inner

    def own(self, x: Tensor) -> Tensor:
        return self.lin(x).relu() * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.own(x) if self.inner is None else checkpoint(self.own, x, use_reentrant=self.inner))


# What is checkpointed inside of a reentrantly checkpointed block is known of no single task either.
@pytest.mark.parametrize("inner", [None, False, True])
@pytest.mark.parametrize("outer", [None, False])
def test_a_checkpointed_block_around_a_module_whose_rows_are_dealt_out(inner: bool | None, outer: bool | None) -> None:
    model, x = two(Attending(inner, outer), FullConfig()).train(), x_of(6, 4, 5)
    names = ["b", "a", "b", None, "a", "b"]
    found = []
    for run in (lambda: list(model(x, tasks=names)), lambda: separate(model, x, names)):
        outputs = run()
        torch.stack([(row + 1) * one.square().sum() for row, one in enumerate(outputs)]).sum().backward()
        found.append((outputs, {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (mixed, got), (alone, want) = found
    assert equal(mixed, alone)
    for name, gradient in want.items():
        assert (gradient is None) is (got[name] is None), name
        assert gradient is None or (gradient - got[name]).abs().max() < EXACT * max(1.0, gradient.abs().max()), name
