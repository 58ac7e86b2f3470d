"""What the paper (arXiv 2007.12540) and its code say of reparameterised convolutions."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_cases import adapted, equal, images, make_base, output, state_of, train
from models import TinyNet, settle
from tolerance import bound
from torch import Tensor, nn

from taps_ext import ConfigError, RcmConfig, TapsError, TaskModel, store
from taps_ext.methods import rcm

torchvision = pytest.importorskip("torchvision")


def _warned(model: TaskModel, **settings: object) -> str:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.add_task("t", num_classes=10, config=RcmConfig(**settings))
    return " ".join(str(warning.message) for warning in found)


@pytest.mark.parametrize(
    ("name", "kernel_sizes", "values", "gains", "private", "norms", "percent"),
    [
        ("resnet18", "k>1", 1_396_736, 3_904, 172_032, 9_600, 0),
        ("resnet34", "k>1", 2_519_040, 7_616, 172_032, 17_024, 0),
        ("resnet50", "k>1", 1_261_568, 3_840, 2_768_896, 53_120, 0),
        ("resnet50", "all", 22_638_592, 22_720, 2_768_896, 53_120, 110),
    ],
)
def test_counts(
    name: str, kernel_sizes: str, values: int, gains: int, private: int, norms: int, percent: int, tmp_path: Path
) -> None:
    """From the report and from the bytes of a saved file."""
    model = TaskModel(getattr(torchvision.models, name)())
    told = _warned(model, kernel_sizes=kernel_sizes)
    assert [int(n) for n in re.findall(r"(\d+) %", told)] == ([percent] if percent else [])
    report = model.report("t")
    own = {kind: sum(row.own for row in report.rows if row.change == kind) for kind in ("modulator", "dense")}
    assert own == {"modulator": values + gains, "dense": private}
    assert report.norms == norms and report.others == 0
    model.save_task("t", tmp_path / "t.taps")
    sizes = {"matrix": 0, "gain": 0, "delta": 0}
    for tensor, info in store.read_header(tmp_path / "t.taps").tensors.items():
        if (kind := tensor.rpartition(":")[2]) in sizes:
            sizes[kind] += info.nbytes
    assert sizes == {"matrix": 4 * values, "gain": 4 * gains, "delta": 4 * private}


def _convolved(host: nn.Conv2d, x: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """A layer's output under a random modulator, and the modulator's blocks in float64."""
    base = nn.Sequential(host, nn.Flatten(), nn.LazyLinear(2))
    found: list[Tensor] = []
    host.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        base(x)
        model = TaskModel(base, RcmConfig(normalise=normalise)).eval()
        model.add_task("t")
        change = model.state("t").table["0"].change
        for parameter in change.parameters():
            parameter.normal_()
        model(x, task="t")
        return found[-1], change.whole(torch.float64)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("settings", [{"bias": False}, {"stride": 2, "padding": 1}, {"groups": 2}, {"groups": 4}])
def test_a_fold_is_two_convolutions(settings: dict, normalise: bool) -> None:
    """Both within their roundings of the exact result: K products with W_t, whose elements are n products each; and K
    products with W, then n with M. A normalised row is a quotient more, of three roundings."""
    torch.manual_seed(0)
    host = nn.Conv2d(4, 8, 3, **settings).requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    got, blocks = _convolved(host, x, normalise)
    groups, size, _ = blocks.shape
    matrix = blocks.reshape(8, size, 1, 1)
    geometry = (host.stride, host.padding, host.dilation, host.groups)
    plain = F.conv2d(x.double(), host.weight.double(), None, *geometry)
    exact = F.conv2d(plain, matrix, None if host.bias is None else host.bias.double(), groups=groups)
    terms, few = host.weight[0].numel(), size + 3 * normalise
    limit = bound(torch.float32, terms, x, blocks @ host.weight.double().view(groups, size, -1))
    limit += bound(torch.float32, few, x, matrix, host.weight, outer=terms)
    assert float((got.double() - exact).abs().max()) <= limit
    two = F.conv2d(F.conv2d(x, host.weight, None, *geometry), matrix.float(), host.bias, groups=groups)
    limit = bound(torch.float32, few, plain, matrix) + bound(torch.float32, terms, x, host.weight, matrix, outer=size)
    assert float((two.double() - exact).abs().max()) <= limit


def test_rows_are_normalised() -> None:
    """`gain` is the length of each row, whatever the length of v."""
    host = nn.Conv2d(4, 8, 3, groups=2).requires_grad_(False)
    model = TaskModel(nn.Sequential(host, nn.Flatten(), nn.Linear(8 * 4, 2)), RcmConfig())
    model.add_task("t")
    change = model.state("t").table["0"].change
    with torch.no_grad():
        change.gain.uniform_(0.5, 2.0)
        for factor in (1.0, 3.0):  # as exact as four squares, a root, a quotient and a product in float64
            change.matrix.copy_(factor * torch.eye(4).repeat(2, 1) + 0.25)
            rows = change.whole(torch.float64).reshape(8, 4).norm(dim=1)
            assert torch.allclose(rows, change.gain.double(), rtol=8 * torch.finfo(torch.float64).eps, atol=0.0)


def test_normalised_or_not_starts_the_same() -> None:
    model, x = TaskModel(make_base("conv")).eval(), images("conv")
    for name, normalise in (("with", True), ("without", False)):
        model.add_task(name, config=RcmConfig(normalise=normalise))
    assert torch.equal(output(model, x, "with"), output(model, x, "without"))


def test_another_task_changes_no_byte(tmp_path: Path) -> None:
    model, x = adapted("conv", "rcm", tasks=("t",)), images("conv")
    train(model, x, "t")
    model.save_task("t", tmp_path / "before.taps")
    model.add_task("more", num_classes=3)
    train(model, x, "more")
    model.save_task("t", tmp_path / "after.taps")
    assert (tmp_path / "after.taps").read_bytes() == (tmp_path / "before.taps").read_bytes()


# ------------------------------------------------------------------------------------ what is modulated


def test_which_layers() -> None:
    base = torchvision.models.resnet50()
    model = TaskModel(base)
    for name, settings in {"default": {}, "all": {"kernel_sizes": "all"}, "open": {"private_shortcuts": False}}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_task(name, num_classes=2, config=RcmConfig(**settings))
    kinds = {task: {row.layer: row.change for row in model.report(task).rows} for task in model.tasks}
    convs = {name: m.kernel_size for name, m in base.named_modules() if isinstance(m, nn.Conv2d)}
    large = {name: "modulator" for name, size in convs.items() if size != (1, 1)}
    shortcuts = {name: "dense" for name in convs if "downsample" in name}
    assert kinds["open"] == large and kinds["default"] == large | shortcuts
    assert kinds["all"] == dict.fromkeys(convs, "modulator") | shortcuts


def test_nothing_to_modulate() -> None:
    model = TaskModel(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(ConfigError, match="no layer to modulate with kernel_sizes='k>1'"):
        model.add_task("t", config=RcmConfig())


@pytest.mark.parametrize(
    "settings", [{"kernel_sizes": "3"}, {"normalise": 1}, {"private_shortcuts": "yes"}, {"start": "random"}]
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}: expected"):
        RcmConfig(**settings)


# ------------------------------------------------------------------------------------ initialised by responses


def _batches(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 6, 3, 8, 8, generator=torch.Generator().manual_seed(9)))


def _initialised(*, normalise: bool = True) -> tuple[TaskModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = TaskModel(make_base("conv"), RcmConfig(start="response", normalise=normalise)).eval()
    for task in ("a", "b"):
        model.add_task(task)
    basis = rcm.response_basis(model, _batches())
    rcm.initialise(model, basis)
    return model, basis


def test_the_basis_is_that_of_stored_responses() -> None:
    """Of each group: U^T C U is diagonal, the largest variance first, C being the covariance of all responses at once.

    The entries beside the diagonal, and the sums that C is made of, err by a modest multiple of O * eps of its norm."""
    base = make_base("conv")
    layers, found = ["stem", "grouped", "depthwise", "hidden"], {}
    hooks = [
        base.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: found.update({name: y.double()}))
        for name in layers
    ]
    with torch.no_grad():
        base(torch.cat(_batches()))
    for hook in hooks:
        hook.remove()
    basis = rcm.response_basis(base, _batches(), layers)
    assert list(basis) == layers
    for name, axes in basis.items():
        groups = getattr(base.get_submodule(name), "groups", 1)
        size = axes.shape[1]
        assert axes.dtype == torch.float64 and axes.shape == (groups * size, size)
        for block, rows in zip(axes.view(groups, size, size), found[name].movedim(1, 0).chunk(groups), strict=True):
            covariance = torch.cov(rows.reshape(size, -1), correction=0).view(size, size)
            # responses are float32 sums, which other batch sizes may round otherwise
            limit = 10 * size * torch.finfo(torch.float32).eps * float(covariance.norm())
            turned = block.T @ covariance @ block
            assert float((turned - turned.diag().diag()).abs().max()) <= limit
            assert bool((turned.diag().diff() <= limit).all())
            straight = 10 * size * torch.finfo(torch.float64).eps
            assert float((block.T @ block - torch.eye(size, dtype=torch.float64)).abs().max()) <= straight


def test_a_basis_leaves_the_base_and_its_modes_alone() -> None:
    torch.manual_seed(0)
    base = settle(TinyNet(dropout=0.5)).train()
    base.gn.eval()
    before, modes = state_of(base), [m.training for m in base.modules()]
    again = [rcm.response_basis(base, [(batch, "label") for batch in _batches()], ["conv2"])["conv2"] for _ in range(2)]
    assert torch.equal(*again)  # no dropout
    assert equal(state_of(base), before) and [m.training for m in base.modules()] == modes
    assert not any(module._forward_hooks for module in base.modules())
    model = TaskModel(base, RcmConfig()).train()
    assert torch.equal(rcm.response_basis(model, _batches(), ["conv2"])["conv2"], again[0])


def test_a_rotation_is_undone_in_double_precision() -> None:
    """U (U^T W) is W but for |U U^T - I| <= O * eps, as LAPACK's eigenvectors are orthogonal, and two sums."""
    base = make_base("conv")
    for name, axes in rcm.response_basis(base, _batches(), ["stem", "hidden"]).items():
        rows = base.get_submodule(name).weight.detach().double().flatten(1)
        error = (axes @ (axes.T @ rows) - rows).abs().max()
        assert float(error) <= 3 * len(rows) * torch.finfo(torch.float64).eps * float(rows.norm(dim=0).max())
        assert float(error) <= 6e-15


@pytest.mark.parametrize("normalise", [True, False])
def test_initialised_it_starts_as_the_base(normalise: bool) -> None:
    """Within 1e-5 of the outputs' size, in float32."""
    model, basis = _initialised(normalise=normalise)
    x, (family,) = images("conv"), model.families.values()
    want = output(model, x)
    assert float((output(model, x, "a") - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert set(basis) == {"stem", "depthwise", "grouped"} == set(family.table)
    eps = torch.finfo(torch.float32).eps
    for name, axes in basis.items():
        size = axes.shape[1]
        rotation, own = family.table[name].change.matrix, model.state("a").table[name].change
        blocks = axes.view(-1, size, size)
        assert torch.equal(rotation, blocks.mT.reshape(-1, size).float())
        # the inverse of U^T as it was rounded, then rounded: 2-norms of size * eps / 2 and eps / 2
        assert float((own.matrix.detach() - axes).abs().max()) <= (size + 1) * eps
        if normalise:  # U's rows are of length one
            assert float((own.gain.detach() - 1).abs().max()) <= (size + 1) * eps


def test_equal_modulators_are_equal_tasks() -> None:
    """Bit for bit, also of one that is added when the family has been rotated."""
    model, x = _initialised()[0], images("conv")
    model.add_task("late")
    assert torch.equal(output(model, x, "a"), output(model, x, "b"))
    assert torch.equal(output(model, x, "a"), output(model, x, "late"))


def test_initialising_keeps_what_was_trained() -> None:
    model, x = TaskModel(make_base("conv"), RcmConfig(start="response")), images("conv")
    model.add_task("t", num_classes=3)
    train(model, x, "t")
    want = output(model.eval(), x, "t")
    rcm.initialise(model, rcm.response_basis(model, _batches()))
    assert float((output(model, x, "t") - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_nothing_trains_a_rotation() -> None:
    model, x = _initialised()[0], images("conv")
    (family,) = model.families.values()
    before = state_of(family)
    losses = train(model, x, "a")
    assert losses[-1] < losses[0] and equal(state_of(family), before)


def test_a_rotation_and_its_tasks_are_saved(tmp_path: Path) -> None:
    model, x = _initialised()[0], images("conv")
    train(model, x, "a")
    want = output(model.eval(), x, "a")
    model.save_shared("rcm", tmp_path / "rotation.taps")
    model.save_task("a", tmp_path / "a.taps")
    fresh = TaskModel(make_base("conv"), RcmConfig(start="response")).eval()
    fresh.load_task(tmp_path / "a.taps")
    assert torch.equal(output(fresh, x, "a"), want)
    fresh.add_task("late")
    assert torch.equal(output(fresh, x, "late"), output(model, x, "b"))
    with pytest.raises(TapsError, match="before save_shared"):
        rcm.initialise(model, {})


def test_what_cannot_be_initialised() -> None:
    model, basis = _initialised()
    with pytest.raises(ConfigError, match="basis: the family has no layer 'stam' .did you mean 'stem'"):
        rcm.initialise(model, {"stam": basis["stem"]})
    with pytest.raises(ConfigError, match=r"basis: grouped: expected shape \[12, 6\], got \[12, 12\]"):
        rcm.initialise(model, {"grouped": torch.eye(12)})
    model.merge_task("a")
    with pytest.raises(TapsError, match="call unmerge_task"):
        rcm.initialise(model, basis)
    with pytest.raises(ConfigError, match="got 0; add a task first"):
        rcm.initialise(TaskModel(make_base("conv"), RcmConfig(start="response")), basis)


def test_what_has_no_basis() -> None:
    base = make_base("conv")
    for layers, problem in ((["norm"], "'norm' is none, got a BatchNorm2d"), (["stam"], "did you mean 'stem'")):
        with pytest.raises(ConfigError, match=problem):
            rcm.response_basis(base, _batches(), layers)
    with pytest.raises(ConfigError, match="expected some that reach 'stem', got none"):
        rcm.response_basis(base, [], ["stem"])
    with pytest.raises(ConfigError, match="expected finite responses of 'stem'"):
        rcm.response_basis(base, [torch.full((1, 3, 8, 8), torch.inf)], ["stem"])
