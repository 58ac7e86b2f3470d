"""The sampled score gradient of closed layers (`gate_fraction`): unbiased, of closed layers alone, smaller to keep."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TinyNet, settle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext import ConfigError, TapsConfig, TaskModel
from taps_ext.methods import taps
from taps_ext.methods.taps import draw
from taps_ext.parts.sampling import Sample, rows_of

# --- drawing, and finding the samples in a layer's input --------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "batch", "count"), [(0.125, 8, 1), (0.125, 9, 2), (1e-6, 5, 1), (0.1 + 0.2, 10, 3), (0.99, 3, 3)]
)
def test_draws_the_ceiling(fraction, batch, count) -> None:
    rows = draw(fraction, batch, torch.device("cpu")).rows
    assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == count and rows.dtype == torch.int64
    assert rows[0] >= 0 and rows[-1] < batch


def test_draws_are_seeded_and_uniform() -> None:
    torch.manual_seed(3)
    first = [draw(0.3, 5, torch.device("cpu")).rows for _ in range(3000)]
    torch.manual_seed(3)
    assert all(torch.equal(draw(0.3, 5, torch.device("cpu")).rows, rows) for rows in first)
    counts = torch.bincount(torch.cat(first), minlength=5)
    # Each index is in 2 of 5 draws: 1200 of 3000, deviation sqrt(3000 * 0.4 * 0.6) = 26.8; five of them.
    assert (counts - 1200).abs().max() < 5 * 26.8


@settings(deadline=None)
@given(
    batch=st.integers(1, 4),
    count=st.integers(1, 4),
    before=st.lists(st.integers(1, 3), max_size=2),
    after=st.lists(st.integers(1, 3), max_size=2),
    times=st.integers(1, 3),
)
def test_every_row_is_drawn_equally_often(batch, count, before, after, times) -> None:
    """Over all samples of a size, wherever the batch lies among the leading dimensions: what makes it unbiased."""
    count = min(count, batch)
    leading = [*before, batch, *after] if before else [batch * times, *after]
    subsets = list(itertools.combinations(range(batch), count))
    seen = torch.zeros(math.prod(leading), dtype=torch.int64)
    for subset in subsets:
        taken = rows_of(leading, Sample(batch, torch.tensor(subset), []))
        assert len(taken) * batch == count * math.prod(leading)
        seen += torch.bincount(taken, minlength=len(seen))
    assert len(set(seen.tolist())) == 1


def test_samples_are_taken_whole() -> None:
    rows = torch.tensor([0, 2])
    numbers = torch.arange(3 * 4 * 2).reshape(3, 4, 2)
    for sizes in ([3, 4, 2], [12, 2], [6, 2, 2]):  # batch first, windows of a sample
        assert torch.equal(numbers.flatten()[rows_of(sizes, Sample(3, rows, []))], numbers[rows].flatten())
    first = numbers.transpose(0, 1).contiguous()  # sequence first
    assert torch.equal(first.flatten()[rows_of([4, 3, 2], Sample(3, rows, []))], first[:, rows].flatten())
    for sizes in ([5, 2], [], [0, 2], [3, 0]):
        assert rows_of(sizes, Sample(3, rows, [])) is None


# --- gradients ---------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Linear layers that see the batch first, last of two, in windows, flattened, behind a reader, and not at all.

    What `nn.MultiheadAttention` does with its weights is its own affair: they have their exact gradients.
    """

    exact = ("table", "attention", "attention.out_proj")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.windows, self.flat = (nn.Linear(6, 6) for _ in range(4))
        self.read, self.table, self.head = nn.Linear(6, 6), nn.Linear(2, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.register_buffer("places", torch.randn(7, 2))

    def forward(self, x: Tensor) -> Tensor:  # [B, 6, 6]
        x = x + self.first(x).tanh()
        x = x + self.second(x.transpose(0, 1)).transpose(0, 1).tanh()
        x = x + self.windows(x.reshape(-1, 2, 6)).reshape(x.shape).tanh()
        x = x + self.flat(x.reshape(-1, 6)).reshape(x.shape).tanh() + self.table(self.places).mean(0)
        x = x + F.linear(x, self.read.weight, self.read.bias).tanh()
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Frames(nn.Module):
    """Convolutions over the batch and over frames of it, strided, grouped, padded by another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 3, 5, 5]
        frames = F.relu_(self.one(x.flatten(0, 1)))
        frames = frames.unflatten(0, x.shape[:2]).mean(1)
        return self.head(self.two(frames).mean((2, 3)))


BASES = {
    "tokens": (Tokens, lambda: torch.randn(4, 6, 6)),
    "frames": (Frames, lambda: torch.randn(4, 2, 3, 5, 5)),
    "net": (lambda: settle(TinyNet()), lambda: torch.randn(4, 3, 8, 8)),
    "channels_last": (
        lambda: settle(TinyNet()).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last),
    ),
}


def adapted(base: nn.Module, fraction: float = 0.5, opened: int = 1, **kwargs) -> TaskModel:
    """A float64 model in training mode whose layers are closed but for the first few."""
    model = TaskModel(base.double(), TapsConfig(lam=0.5, gate_fraction=fraction), **kwargs)
    model.add_task("t")
    with torch.no_grad():
        for i, (_, part, _) in enumerate(model.state("t").gated()):
            part.change.delta.normal_()
            part.gate.score.fill_(0.2 if i < opened else 0.05)
    model.state("t").double()
    for _, part, _ in model.state("t").gated():  # Delta and score stay float32 through .double(); here they need more
        part.change.delta.data, part.gate.score.data = part.change.delta.data.double(), part.gate.score.data.double()
    model.refresh_gates()
    model.set_task("t")
    return model.train()


def gradients(model: TaskModel, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x)
    (out * torch.arange(out.numel()).reshape(out.shape).cos()).sum().backward()
    grads = {n: p.grad for n, p in model.state("t").named_parameters() if p.grad is not None}
    return {**grads, "input": x.grad}


@pytest.mark.parametrize("name", BASES)
def test_expectation_is_the_exact_gradient(name, monkeypatch) -> None:
    """Over all six samples of two in four: the mean is the exact gradient, to float64 rounding."""
    make, data = BASES[name]
    torch.manual_seed(0)
    base, x = make(), data().double()
    model = adapted(base)
    closed = [n for n, part, _ in model.state("t").gated() if not part.gate.known]
    assert len(closed) >= 1
    samples = iter([torch.tensor(s) for s in itertools.combinations(range(4), 2)])
    monkeypatch.setattr("taps_ext.methods.taps.draw", lambda fraction, batch, device: Sample(batch, next(samples), []))
    found = [gradients(model, x) for _ in range(6)]
    model.state("t").config = TapsConfig(lam=0.5)
    exact = gradients(model, x)
    assert all(grads.keys() == exact.keys() for grads in found)
    for key, want in exact.items():
        values = torch.stack([grads[key] for grads in found])
        layer = key.removeprefix("parts./").removesuffix(".gate.score").replace("/", ".")
        if key.endswith("score") and layer in closed and layer not in getattr(base, "exact", ()):
            assert not torch.equal(values[0], values[1])
            # <= 2^20 terms of float64 a sum: 2^20 * 2^-53 of the sum of their sizes, which the spread bounds from below
            scale = values.abs().max().item()
            assert abs(values.mean().item() - want.item()) <= 2**-33 * scale, key
        else:  # open layers, norms, head, input, and what is not made of samples: bit for bit
            assert all(torch.equal(value, want) for value in values), key


def test_the_sum_of_samples_that_are_one_each(monkeypatch) -> None:
    """Samples of one: each estimates from its own row, so their mean is the exact gradient too."""
    torch.manual_seed(0)
    model, x = adapted(Tokens(), 0.2, opened=0), torch.randn(4, 6, 6).double()
    rows = iter(range(4))
    monkeypatch.setattr(
        "taps_ext.methods.taps.draw", lambda f, batch, device: Sample(batch, torch.tensor([next(rows)]), [])
    )
    mean = {}
    for _ in range(4):
        for key, value in gradients(model, x).items():
            mean[key] = mean.get(key, 0) + value / 4
    model.state("t").config = TapsConfig(lam=0.5)
    for key, want in gradients(model, x).items():
        torch.testing.assert_close(mean[key], want, rtol=1e-9, atol=1e-12)


def test_one_draw_serves_the_whole_forward_and_the_next_is_another() -> None:
    model, x = adapted(settle(TinyNet()), 0.25, opened=0), torch.randn(8, 3, 8, 8).double()
    torch.manual_seed(1)
    a, b = gradients(model, x), gradients(model, x)
    torch.manual_seed(1)
    again = gradients(model, x)
    assert all(torch.equal(a[key], again[key]) for key in a)
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_exact_draws_nothing(monkeypatch) -> None:
    """f = 1, evaluation, gates at rest, and open layers alone: no random number is used."""
    model, x = adapted(settle(TinyNet()), 1.0), torch.randn(4, 3, 8, 8).double()
    before = torch.get_rng_state()
    gradients(model, x)
    model.state("t").config = TapsConfig(lam=0.5, gate_fraction=0.5)
    model.eval()
    gradients(model, x)
    model.train()
    scores = [part.gate.score for _, part, _ in model.state("t").gated()]
    for score in scores:
        score.requires_grad_(False)
    gradients(model, x)
    for score in scores:
        score.requires_grad_(True)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.gate.score.fill_(0.2)
    gradients(model, x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fraction", [0.125, 0.5])
def test_a_closed_layer_keeps_its_sample_alone(fraction) -> None:
    base = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 2))
    kept = {1.0: [], fraction: []}
    for f, sizes in kept.items():
        model = adapted(base, f, opened=0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(8, 32, 16).double())
        base = model.unload()
    assert kept[1.0].count(8 * 32 * 16) - kept[fraction].count(8 * 32 * 16) == 1
    assert int(8 * fraction) * 32 * 16 in kept[fraction]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_draw(reentrant) -> None:
    class Checkpointed(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = checkpoint(lambda x: F.relu(self.gn(self.conv2(x))), x, use_reentrant=reentrant)
            x = (F.relu(self.depthwise(x)) + x).mean(dim=(2, 3))
            return self.fc(F.relu(self.ln(self.hidden(x))))

    torch.manual_seed(0)
    plain = settle(TinyNet())
    other = settle(Checkpointed())
    other.load_state_dict(plain.state_dict())
    x, found = torch.randn(8, 3, 8, 8).double(), []
    for base in (plain, other):
        torch.manual_seed(5)
        model = adapted(base, 0.25)
        found.append(gradients(model, x))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_whole_forward_is_repeated_with_its_dropout() -> None:
    found, x = [], torch.randn(8, 3, 8, 8).double()
    for wrapped in (False, True):
        torch.manual_seed(5)
        model = adapted(settle(TinyNet(dropout=0.5)), 0.25)
        own = x.clone().requires_grad_()
        torch.manual_seed(6)
        out = (
            checkpoint(lambda z, m=model: m(z, task="t"), own, use_reentrant=True) if wrapped else model(own, task="t")
        )
        out.square().sum().backward()
        found.append({n: p.grad for n, p in model.state("t").named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_compiled_models_sample_alike() -> None:
    torch.manual_seed(0)
    base, x = settle(TinyNet()), torch.randn(8, 3, 8, 8).double()
    model = adapted(base, 0.25)
    torch.manual_seed(7)
    eager = gradients(model, x)
    model.compile()
    for _ in range(2):
        torch.manual_seed(7)
        compiled = gradients(model, x)
        for key, want in eager.items():
            torch.testing.assert_close(compiled[key], want, rtol=1e-9, atol=1e-9)


def test_autocast() -> None:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5, gate_fraction=0.5))
    model.add_task("t")
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_()
            part.gate.score.fill_(0.05)
    x = torch.randn(8, 3, 8, 8)
    found = {}
    for amp, fraction in ((False, 0.25), (True, 0.25), (False, 1.0)):
        model.state("t").config = TapsConfig(lam=0.5, gate_fraction=fraction)
        torch.manual_seed(2)
        model.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(x, task="t").float().square().sum().backward()
        found[amp, fraction] = {n: p.gate.score.grad.item() for n, p, _ in model.state("t").gated()}
    for name, want in found[False, 0.25].items():  # rounding moves the estimate less than sampling does
        moved, sampled = abs(found[True, 0.25][name] - want), abs(found[False, 1.0][name] - want)
        assert moved < sampled / 2, (name, moved, sampled)


# --- what it cannot do -------------------------------------------------------------------------------


def test_device_gates_are_refused_in_training_alone() -> None:
    model = adapted(settle(TinyNet()), 0.5, gates="device")
    x = torch.randn(4, 3, 8, 8).double()
    with pytest.raises(ConfigError, match=r'gate_fraction: expected 1\.0 with gates="device".* got 0\.5 \(task .t.,'):
        model(x)
    model.eval()
    assert model(x).shape == (4, 4)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, rows: list[float]) -> Tensor:
        return self.fc(self.hidden(torch.tensor(rows, dtype=torch.float64)))


def test_a_forward_without_a_batch_is_refused() -> None:
    model = adapted(Flat(), 0.5, opened=0)
    with pytest.raises(
        ConfigError, match=r"gate_fraction: expected a tensor with a batch .*\(task 't', batch_dim = 0\)"
    ):
        model([1.0, 2.0, 3.0])


class Masked(nn.Module):
    """Whose first tensor is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x) * mask.sum())


def test_a_sample_that_no_layer_can_use_is_said() -> None:
    model, x = adapted(Masked(), 0.25, opened=0), torch.randn(16, 3).double()
    with pytest.warns(UserWarning, match="no closed layer of task 't' has an input made of the 5 samples"):
        model(torch.ones(5, 5).double(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(4, 4).double(), x)  # four rows of x to each "sample"


class Listed(nn.Module):
    """Takes images as detectors do, and stacks what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Tensor:
        return self.fc(self.hidden(torch.stack([image.mean((1, 2)) for image in x])))


def scales(model: TaskModel, monkeypatch, *args: object) -> list[tuple[int, int]]:
    """Samples and those drawn of them, in the forwards of one call."""
    found = []

    def noted(fraction: float, batch: int, device: torch.device) -> Sample:
        sample = draw(fraction, batch, device)
        found.append((batch, len(sample.rows)))
        return sample

    monkeypatch.setattr(taps, "draw", noted)
    model(*args)
    return found


def test_a_tensor_that_is_broadcast_over_the_batch_counts_no_samples(monkeypatch) -> None:
    model, x = adapted(Masked(), 0.25, opened=0), torch.randn(16, 3).double()
    assert scales(model, monkeypatch, torch.ones(1, 3).double(), x) == [(16, 4)]


def test_a_list_of_images_is_a_batch_and_not_its_colours(monkeypatch) -> None:
    model = adapted(Listed(), 0.25, opened=0)
    x = [torch.randn(3, 8 + size, 9).double() for size in range(8)]
    assert scales(model, monkeypatch, x, [{"boxes": torch.ones(5, 4)} for _ in x]) == [(8, 2)]


@pytest.mark.parametrize("base", [Masked, Listed])
def test_a_batch_of_one_is_said(base) -> None:
    """Of which nothing can be left out: what was asked for has no effect."""
    model, one = adapted(base(), 0.25, opened=0), torch.randn(1, 3).double()
    args = (one, one) if base is Masked else ([torch.randn(3, 8, 8).double()],)
    with pytest.warns(
        UserWarning, match=r"gate_fraction: expected several samples to draw from, got one in dimension 0"
    ):
        model(*args)


def test_batch_dim(monkeypatch) -> None:
    """A model fed sequence first says so; the same samples are drawn as if it were fed batch first."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 3, 6).double()
    found = []
    for dim, data in ((0, x), (1, x.transpose(0, 1))):
        model = adapted(base, 0.4, opened=0, batch_dim=dim)
        with torch.no_grad():
            for _, part, _ in model.state("t").gated():
                part.change.delta.copy_(torch.arange(part.change.delta.numel()).reshape(part.change.delta.shape).sin())
        torch.manual_seed(9)
        model.zero_grad()
        model(data).square().sum().backward()
        found.append([p.gate.score.grad for _, p, _ in model.state("t").gated()])
        base = model.unload()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    for bad in (-1, True, 1.0):
        with pytest.raises(ConfigError, match="batch_dim: expected an int >= 0"):
            TaskModel(base, TapsConfig(lam=0.5), batch_dim=bad)
