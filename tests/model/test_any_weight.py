"""Any weight can be gated: what has no kernel of ours is multiplied by torch, with W_t in the place of W."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model.test_laws import weight_sized_allocations
from torch import Tensor, nn

import taps_ext
from taps_ext import FullConfig, ProbeConfig, TapsConfig, TaskModel, UnsupportedModuleError


class Gained(nn.Conv2d):
    """A weight-standardised convolution with a gain."""

    def __init__(self) -> None:
        super().__init__(3, 6, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(input, weight * self.gain, self.bias, padding=1)


class Experts(nn.Module):
    """Experts in one tensor each, as transformers writes mixtures: every sample goes through one of them."""

    def __init__(self, count: int = 3, size: int = 6) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(count, 2 * size, size) / 3)
        self.down_proj = nn.Parameter(torch.randn(count, size, 2 * size) / 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for index, row in enumerate(x):
            expert = index % len(self.up_proj)
            rows.append(F.linear(torch.tanh(F.linear(row, self.up_proj[expert])), self.down_proj[expert]))
        return torch.stack(rows)


class Transposed(nn.Module):
    """A weight the other way round, as transformers' Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, 6), self.weight).view(*x.shape[:-1], 4)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.flip(-1))


class Attends(nn.Module):
    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.attention.kdim == 6 else x[..., : self.attention.kdim]
        return self.attention(x, wide, wide)[0]


ROWS, IMAGE = (4, 6), (2, 3, 5, 5)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    "conv1d groups": (lambda: nn.Conv1d(4, 4, 3, groups=4, padding_mode="circular", padding=1), (2, 4, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (2, 3, 4, 5, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), IMAGE),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 4, 5, 3)),
    "gained": (Gained, IMAGE),
    "by hand": (Transposed, ROWS),
    "experts": (Experts, ROWS),
    "bilinear": (Twice, ROWS),
    "lstm": (lambda: Recurrent(nn.LSTM(6, 5, 2, batch_first=True)), (2, 3, 6)),
    "lstm both ways": (lambda: Recurrent(nn.LSTM(6, 5, bidirectional=True, proj_size=3)), (2, 3, 6)),
    "gru": (lambda: Recurrent(nn.GRU(6, 5, batch_first=True)), (2, 3, 6)),
    "rnn": (lambda: Recurrent(nn.RNN(6, 5, bias=False)), (2, 3, 6)),
    "cells": (Cells, (2, 3, 6)),
    "attention of two widths": (lambda: Attends(kdim=4, vdim=4), (2, 3, 6)),
    "attention with a bias of keys": (lambda: Attends(add_bias_kv=True), (2, 3, 6)),
}


def type_of(kind: str) -> torch.dtype:
    """In which a plain model's gradients are what ours are: float32 where a layer runs several times, whose gradients
    are then summed in it."""
    return torch.float32 if kind == "cells" else torch.float64


def wrapped(kind: str, config: object = None, **kwargs: object) -> tuple[nn.Module, nn.Module, TaskModel, Tensor]:
    """A plain model, its base, a TaskModel over that with random Deltas behind open gates, and an input."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    base = nn.Sequential(make()).to(dtype := type_of(kind))
    plain = copy.deepcopy(base)
    model = TaskModel(base, config or TapsConfig(lam=1.0), **kwargs)
    model.add_task("t")
    model.set_task("t")
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
    return plain, base, model, torch.randn(shape, dtype=dtype)


def weights_of(model: TaskModel, plain: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Gated name -> its part, and the plain model's parameter in its place."""
    named = dict(plain.named_parameters())
    gated = {name: part for name, part, _ in model.state("t").gated()}
    names = {name: next(n for n in (name, f"{name}.weight", f"{name}.in_proj_weight") if n in named) for name in gated}
    return {name: (part, named[names[name]]) for name, part in gated.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_model_with_the_change_written_in(kind: str) -> None:
    """Outputs to the bit, gradients but for their rounding to float32, which a Delta is in."""
    plain, base, model, x = wrapped(kind)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = weights_of(model, plain)
    assert {id(p) for _, p in found.values()} >= {id(p) for n, p in plain.named_parameters() if "weight" in n}
    with torch.no_grad():
        for part, weight in found.values():
            weight += part.change.delta
    x.requires_grad_()
    ours, theirs = model(x), plain(x)
    assert torch.equal(ours, theirs)
    loss = torch.randn_like(ours)
    (ours * loss).sum().backward()
    dx, x.grad = x.grad, None
    (theirs * loss).sum().backward()
    assert torch.equal(dx, x.grad)
    for name, (part, weight) in found.items():
        assert weight.grad is not None and weight.grad.any()
        assert torch.equal(part.change.delta.grad, weight.grad.float()), name
        score = (weight.grad * part.change.delta.double()).sum()
        # Sums of so many terms, each in its own order, rounded to float32 at the end, and once for each run of a layer.
        terms = (weight.grad * part.change.delta.double()).abs().sum()
        bound = weight.numel() * torch.finfo(type_of(kind)).eps * terms + 3 * 2.0**-24 * terms
        assert abs(part.gate.score.grad.double() - score) <= bound
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_closed_it_is_the_base(kind: str) -> None:
    """Also with Inf in the Delta, in inference; and a closed gate learns."""
    plain, _, model, x = wrapped(kind)
    for part, _ in weights_of(model, plain).values():
        with torch.no_grad():
            part.gate.score.fill_(0.05)
    out = model(x)
    assert torch.equal(out, plain(x))
    out.square().sum().backward()
    for part, _ in weights_of(model, plain).values():
        assert part.change.delta.grad is None and part.gate.score.grad.abs() > 0
        with torch.no_grad():
            part.change.delta.fill_(torch.inf)
    model.eval()
    plain.eval().requires_grad_(False)  # torch picks some products by that flag
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_merged_and_given_back(kind: str, tmp_path) -> None:
    _, base, model, x = wrapped(kind)
    model.eval()
    with torch.no_grad():
        out = model(x)
        model.save_task("t", tmp_path / "t.taps")
        fresh = TaskModel(copy.deepcopy(base), TapsConfig(lam=1.0)).eval()
        fresh.load_task(tmp_path / "t.taps", "u")
        assert torch.equal(fresh(x, task="u"), out)
        model.merge_task("t")
        assert torch.equal(model(x), out)
        model.unmerge_task()
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), out)
        plain = model.merge_and_unload("t").requires_grad_(False)
        assert torch.equal(plain(x), out)
    assert not any(name.startswith("_taps") for module in plain.modules() for name in module.__dict__)


def test_fine_tuning_holds_everything_else_too(tmp_path) -> None:
    """A gain and biases beside weights are the task's own."""
    for kind in ("gained", "lstm", "attention with a bias of keys"):
        _, base, model, x = wrapped(kind, FullConfig())
        report = model.report("t")
        assert report.left == {}
        assert report.gated + report.others + report.norms == sum(p.numel() for p in base.parameters())
        model.train()
        model(x).square().sum().backward()
        missing = [n for n, p in model.state("t").named_parameters() if p.grad is None]
        assert missing == []
        with torch.no_grad():
            for parameter in model.state("t").parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.eval()
        with torch.no_grad():
            out = model(x)
            plain = copy.deepcopy(base)
            model.save_task("t", tmp_path / f"{kind}.taps")
            merged = model.merge_and_unload("t").requires_grad_(False)
            assert torch.equal(merged(x), out)
            fresh = TaskModel(plain, FullConfig()).eval()
            fresh.load_task(tmp_path / f"{kind}.taps", "u")
            assert torch.equal(fresh(x, task="u"), out)


def test_second_derivatives() -> None:
    plain, _, model, x = wrapped("by hand")
    found = weights_of(model, plain)
    with torch.no_grad():
        for part, weight in found.values():
            weight += part.change.delta
    x.requires_grad_()
    for run in (model, plain):
        (dx,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        dx.square().sum().backward()
    ((part, weight),) = found.values()
    assert torch.equal(part.change.delta.grad, weight.grad.float())


def test_backward_after_a_step_is_refused_as_torch_does() -> None:
    _, _, model, x = wrapped("conv1d")
    out = model(x.requires_grad_())
    ((_, part, _),) = model.state("t").gated()
    with torch.no_grad():
        part.change.delta.add_(1)
    with pytest.raises(RuntimeError, match="was modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """Recomputed in backward, the gradients are those of a forward that is not."""
    from torch.utils.checkpoint import checkpoint

    _, _, model, x = wrapped("lstm")
    parts = [part for _, part, _ in model.state("t").gated()]
    x.requires_grad_()
    model.train()
    model(x).square().sum().backward()
    wanted = [part.change.delta.grad.clone() for part in parts]
    for part in parts:
        part.change.delta.grad = None
    checkpoint(lambda x: model(x, task="t"), x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(part.change.delta.grad, grad) for part, grad in zip(parts, wanted, strict=True))


def test_whoever_keeps_a_weight_keeps_its_values() -> None:
    """A module that gives its weight away: the memory it lies in is not lent again while somebody has it."""

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.weight, self.weight[2:]

    torch.manual_seed(0)
    model = TaskModel(Gives(), TapsConfig(lam=1.0))
    model.add_task("t")
    ((_, part, _),) = model.state("t").gated()
    x, kept = torch.randn(2, 8), []
    with torch.no_grad():
        for value in range(3):
            part.change.delta.fill_(value)
            kept.append(model(x, task="t")[1])
    for value, given in enumerate(kept):
        assert torch.equal(given, model.base.weight[2:] + value)


@pytest.mark.parametrize("kind", ["recurrent", "experts"])
def test_no_weight_sized_allocation(kind: str) -> None:
    """Law 2: ten inferences make no tensor of a weight's size, and ten steps no more of them than the plain model's."""
    torch.manual_seed(0)
    body = Experts(2, 256) if kind == "experts" else nn.RNNCell(256, 512)
    plain = nn.Sequential(body, nn.Linear(256 if kind == "experts" else 512, 2))
    model = TaskModel(copy.deepcopy(plain), TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    model.set_task("t")
    x = torch.randn(2, 256)
    sizes = [part.change.delta.nbytes for _, part, _ in model.state("t").gated()]

    def infer() -> None:
        with torch.no_grad():
            model(x)

    def step() -> None:
        model(x).square().sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    def plain_step() -> None:
        plain(x).square().sum().backward()
        plain.zero_grad()

    model.eval()
    infer()
    assert weight_sized_allocations(lambda: [infer() for _ in range(10)], min(sizes)) == []
    model.train()
    step()
    plain_step()
    found, wanted = (
        weight_sized_allocations(lambda run=run: [run() for _ in range(10)], min(sizes)) for run in (step, plain_step)
    )
    assert len(wanted) >= 10 * len(sizes), "the gradients are seen"
    assert sorted(found) == sorted(wanted)


def test_tables_are_gated_on_request() -> None:
    base = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    model = TaskModel(base, TapsConfig(lam=1.0, target_modules=["0"]))
    model.add_task("t", num_classes=2)
    assert [row.layer for row in model.report("t").rows] == ["0"]
    with torch.no_grad():
        ((_, part, _),) = model.state("t").gated()
        part.change.delta.fill_(1.0)
    x = torch.randint(0, 10, (2, 3))
    seen: list[Tensor] = []
    model.base[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x, task="t")
    assert torch.equal(seen[0], (base[0].weight + 1)[x].flatten(1))


def test_all_that_cannot_be_gated_is_named_at_once() -> None:
    base = nn.Sequential()
    for index in range(3):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        base.add_module(f"block{index}", nn.ModuleDict({"normed": layer, "plain": nn.Linear(4, 4)}))
    base.add_module("other", nn.utils.spectral_norm(nn.Conv1d(4, 4, 1)))
    base.add_module("fc", nn.Linear(4, 2))
    with pytest.raises(UnsupportedModuleError) as caught:
        TaskModel(base, TapsConfig(lam=1.0)).add_task("t", num_classes=2)
    for part in ("block0.normed, block1.normed, block2.normed: ", "other: ", "exclude_modules", "unsupported='freeze'"):
        assert part in str(caught.value)
    model = TaskModel(base, TapsConfig(lam=1.0), unsupported="freeze")
    model.add_task("t", num_classes=2)
    assert [row.layer for row in model.report("t").rows] == [f"block{i}.plain" for i in range(3)]
    with pytest.raises(taps_ext.ConfigError, match="unsupported: expected 'raise' or 'freeze', got 'freze'.*freeze"):
        TaskModel(nn.Linear(2, 2), unsupported="freze")


class TestFrozenByTheUser:
    @staticmethod
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        base.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        base.add_module("fc", nn.Linear(4, 2))
        return base

    def frozen(self) -> nn.Sequential:
        base = self.base()
        base[0].requires_grad_(False)
        base[1].requires_grad_(False)
        return base

    @pytest.mark.parametrize("config", [TapsConfig(lam=1.0), FullConfig()], ids=["taps", "full"])
    def test_it_stays_the_bases(self, config, tmp_path) -> None:
        base = self.frozen()
        model = TaskModel(base, config)
        model.add_task("t", num_classes=2)
        report = model.report("t")
        assert [row.layer for row in report.rows] == ["2"]
        assert report.frozen == sum(p.numel() for p in (*base[0].parameters(), *base[1].parameters()))
        assert "frozen by the user" in report.table()
        x = torch.randn(4, 3, 5, 5)
        model.train()
        model(x, task="t").sum().backward()
        model.eval()
        model.save_task("t", tmp_path / "t.taps")
        fresh = TaskModel(self.base(), config).eval()  # of a base that nobody froze
        fresh.load_task(tmp_path / "t.taps")
        fresh.save_task("t", tmp_path / "again.taps")
        with torch.no_grad():
            assert torch.equal(fresh(x, task="t"), model(x, task="t"))
        assert (tmp_path / "again.taps").read_bytes() == (tmp_path / "t.taps").read_bytes()

    def test_globs_win(self) -> None:
        model = TaskModel(self.frozen(), TapsConfig(lam=1.0, target_modules=["0"]))
        model.add_task("t", num_classes=2)
        assert [row.layer for row in model.report("t").rows] == ["0"]

    def test_a_base_that_is_frozen_as_a_whole_says_nothing(self) -> None:
        base = self.base()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.startswith("fc"))
        model = TaskModel(base, TapsConfig(lam=1.0))
        model.add_task("t", num_classes=2)
        assert [row.layer for row in model.report("t").rows] == ["0", "2"]

    def test_unloading_gives_the_flags_back(self) -> None:
        base = self.frozen()
        wanted = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        model = TaskModel(base, TapsConfig(lam=1.0))
        model.add_task("t", num_classes=2)
        model.unload()
        assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == wanted


def test_a_probe_reports_what_it_leaves() -> None:
    model = TaskModel(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 2)), ProbeConfig())
    model.add_task("t", num_classes=2)
    assert model.report("t").left == {"0.weight": 12, "0.bias": 4}


def test_a_bias_that_stays_the_bases_is_reported() -> None:
    """Of a gated layer, too; fine-tuning has one of its own."""
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    for config, left in ((TapsConfig(lam=1.0), {"0.bias": 6}), (FullConfig(), {})):
        model = TaskModel(copy.deepcopy(base), config)
        model.add_task("t", num_classes=2)
        assert model.report("t").left == left


class Shares(nn.Module):
    """One table under three names, of which its forward reads two, as T5 has it, and the head is the third."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder = nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Embedding(7, 4)
        self.encoder.weight = self.decoder.weight = self.shared.weight
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.encoder(ids) + self.decoder(ids.flip(1))))


def test_tied_tensors_are_named_at_once_with_a_remedy_that_works() -> None:
    model = TaskModel(Shares(), FullConfig())
    with pytest.raises(UnsupportedModuleError, match="encoder.weight, decoder.weight, head.weight: are one ") as caught:
        model.add_task("t")
    assert str(caught.value).endswith("exclude_modules (['shared', 'encoder', 'decoder'])"), "not the head's"
    model.add_task("t", config=FullConfig(exclude_modules=["shared", "encoder", "decoder"]))
    model.train()(torch.arange(6).view(2, 3), task="t").sum().backward()
    with pytest.raises(UnsupportedModuleError, match=r"decoder.weight: is one tensor with encoder.weight"):
        model.add_task("two", num_classes=2, config=FullConfig(exclude_modules=["shared"]))


@pytest.mark.parametrize("kind", ["conv1d", "transposed 2d", "by hand", "lstm"])
@pytest.mark.parametrize("phase", ["train", "infer"])
def test_it_is_profiled(kind: str, phase: str) -> None:
    """With multiplications that torch's own counter confirms, where a call is a layer's own; and estimated."""
    from torch.utils.flop_counter import FlopCounterMode

    plain, _, model, x = wrapped(kind)
    found = taps_ext.profile(model, (x,), task="t", phase=phase, steps=1)
    assert taps_ext.estimate(model, (x,), task="t", phase=phase).workspace > 0
    if kind != "lstm" and phase == "infer":
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(x)
        assert found.rows[0].operations == counter.get_total_flops()


@pytest.mark.parametrize("kind, gates", [("gained", "host"), ("experts", "device"), ("lstm", "host")])
def test_it_compiles_and_has_functional_derivatives(kind: str, gates: str) -> None:
    """And a pickled copy is the same model."""
    torch._dynamo.reset()
    _, _, model, x = wrapped(kind, gates=gates)
    parts = {name: part for name, part, _ in model.state("t").gated()}
    out = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)
    out.square().sum().backward()
    wanted = {name: part.change.delta.grad for name, part in parts.items()}
    for part in parts.values():
        part.change.delta.grad = None
    compiled = torch.compile(model, backend="aot_eager")(x)
    assert torch.equal(compiled, out)
    compiled.square().sum().backward()
    # Here a weight that is read several times (at most four) is made as often, and the gradient of each is rounded to
    # float32: of no part of a sum that is four times as large as the largest element.
    bounds = {name: 16 * 2.0**-24 * gradient.abs().max() for name, gradient in wanted.items()}
    for name, part in parts.items():
        assert (part.change.delta.grad - wanted[name]).abs().max() <= bounds[name]
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    grads = torch.func.grad(lambda v: torch.func.functional_call(model, v, (x,)).square().sum())(values)
    found = {id(parameter): grads[name] for name, parameter in model.named_parameters()}
    for name, part in parts.items():
        assert (found[id(part.change.delta)] - wanted[name]).abs().max() <= bounds[name]


class Writes(nn.Module):
    """Holds its weight within bounds in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(6, 6))
        self.w_out = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.w_in.clamp_(-0.1, 0.1)
        return x @ self.w_in @ self.w_out


@pytest.mark.parametrize("score", [0.15, 0.05], ids=["open", "closed"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_that_writes_to_its_weight_is_refused(score: float, gradients: bool) -> None:
    model = TaskModel(nn.Sequential(Writes()), TapsConfig(lam=1.0))
    model.add_task("t")
    for _, part, _ in model.state("t").gated():
        with torch.no_grad():
            part.gate.score.fill_(score)
    # Of a closed one torch itself says so first, in training: it is a view of W.
    words = "modified inplace" if gradients and score < 0.1 else "Writes: its w_in is written"
    with torch.set_grad_enabled(gradients), pytest.raises((UnsupportedModuleError, RuntimeError), match=words):
        model(torch.randn(2, 6), task="t")


def test_a_weight_that_nobody_reads_is_named() -> None:
    """One that is cached, or left out: its task tensors have no effect."""

    class Caches(Writes):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "cache"):
                self.cache = self.w_out.detach().clone()
            return x @ self.w_in @ self.cache

    base = nn.Sequential(Caches())
    base(torch.randn(2, 6))
    model = TaskModel(base, TapsConfig(lam=1.0))
    model.add_task("t")
    with pytest.raises(taps_ext.BypassedLayerError, match=r"0\.w_out"):
        model(torch.randn(2, 6), task="t")


def test_a_weight_that_is_read_when_the_mode_changes_is_named() -> None:
    class Fuses(Writes):
        def train(self, mode: bool = True) -> Fuses:
            self.fused = None if mode else (self.w_in @ self.w_out).detach()
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w_in @ self.w_out if self.fused is None else self.fused)

    model = TaskModel(nn.Sequential(Fuses()).train(), TapsConfig(lam=1.0))
    model.add_task("t")
    with pytest.raises(UnsupportedModuleError, match=r"0\.w_in: its weight is read when the model's mode changes"):
        model.eval()


def test_another_forward_inside_has_weights_of_its_own() -> None:
    """A hook in a module runs the base, as a teacher."""

    class Holds(Writes):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x @ self.w_in) @ self.w_out

    base = nn.Sequential(Holds())
    model, x = TaskModel(base, TapsConfig(lam=1.0)).eval(), torch.randn(2, 6)
    model.add_task("t")
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.fill_(1.0)
        want, inner, seen = model(x, task=None), [True], []

        def teach(module: nn.Module, args: object, output: Tensor) -> None:
            if inner and inner.pop():
                seen.append(model(x, task=None))

        base[0].act.register_forward_hook(teach)
        model(x, task="t")
    assert torch.equal(seen[0], want)


def test_a_weight_that_is_excluded_by_itself_stays_the_bases(tmp_path) -> None:
    for config in (FullConfig(exclude_modules=["0.cell.weight_hh*"]), FullConfig(exclude_modules=["0.cell.weight*"])):
        base = nn.Sequential(Recurrent(nn.GRU(6, 5, batch_first=True)))
        model, x = TaskModel(base, config), torch.randn(2, 3, 6)
        model.add_task("t")
        assert not any("weight_hh" in name for name, _ in model.state("t").named_parameters())
        model.eval()
        model.save_task("t", tmp_path / "t.taps")
        model.load_task(tmp_path / "t.taps", "u")
        with torch.no_grad():
            assert torch.equal(model(x, task="u"), model(x, task="t"))
        (tmp_path / "t.taps").unlink()


def test_a_bias_that_was_frozen_stays_the_bases() -> None:
    for config in (FullConfig(), taps_ext.BitFitConfig(), TapsConfig(lam=1.0, others="task")):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        base[0].bias.requires_grad_(False)
        model = TaskModel(base, config)
        model.add_task("t", num_classes=2)
        names = [name for name, _ in model.state("t").named_parameters()]
        assert "parts./1.bias" in names and "parts./0.bias" not in names


def test_who_freezes_is_judged_by_the_head_that_the_task_has() -> None:
    base = nn.Sequential()
    base.add_module("body", nn.Linear(4, 4))
    base.add_module("score", nn.Sequential(nn.Linear(4, 2)))
    base.add_module("end", nn.Identity())
    base.requires_grad_(False)
    base.score.requires_grad_(True)
    model = TaskModel(base, FullConfig())
    model.add_task("t", num_classes=3, head_module="score.0")
    assert [row.layer for row in model.report("t").rows] == ["body"]


def test_methods_of_other_layers_say_so() -> None:
    for config in (taps_ext.LoraConfig(rank=2), taps_ext.SingularConfig()):
        model = TaskModel(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 2)), config)
        with pytest.raises(taps_ext.ConfigError, match="expected linear layers or 2-d convolutions.* 0 is a Conv1d"):
            model.add_task("t", num_classes=2)
    recurrent = TaskModel(nn.Sequential(nn.GRUCell(4, 4), nn.Linear(4, 2)), taps_ext.BitFitConfig())
    recurrent.add_task("t", num_classes=2)
    assert {"parts./0.bias_ih", "parts./0.bias_hh"} <= {n for n, _ in recurrent.state("t").named_parameters()}


def test_a_familys_tasks_are_given_what_the_family_was(tmp_path) -> None:
    """Of a base with a frozen layer: a task that is added where nobody froze it builds on the same shared parts."""

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(5, 5), nn.Flatten(), nn.Linear(20, 2))

    frozen = base()
    frozen[0].requires_grad_(False)
    model = TaskModel(frozen, taps_ext.JointTapsConfig(lam=0.5))
    model.add_task("t", num_classes=2)
    (family,) = model.families
    model.save_shared(family, tmp_path / "shared.taps")
    fresh = TaskModel(base(), taps_ext.JointTapsConfig(lam=0.5))
    fresh.load_shared(tmp_path / "shared.taps")
    fresh.add_task("u", num_classes=2)
    assert [row.layer for row in fresh.report("u").rows] == ["1"]
