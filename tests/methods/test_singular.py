"""Scaled singular values: what they are, that no file holds their axes, and that those are found again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from method_cases import adapted, images, make_base, output, train
from tolerance import bound
from torch import nn

from taps_ext import ConfigError, SingularConfig, TaskModel, store
from taps_ext.parts import Singular, singular

torchvision = pytest.importorskip("torchvision")


def _hosts(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(0)
    hosts = [
        nn.Linear(7, 5),
        nn.Linear(5, 7),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
    ]
    return [host.to(dtype).requires_grad_(False) for host in hosts]


def _moved(host: nn.Module) -> Singular:
    change = Singular(host).requires_grad_(False)
    change.log_factor.normal_()
    return change


def test_the_values_are_scaled_and_the_axes_stay() -> None:
    """In float64 U^T W_t V is diag(s exp(a)): W_t errs by the rounding of its sums, and a product with orthogonal U
    and V by as much of its norm again."""
    for host in _hosts(torch.float64):
        change = _moved(host)
        rows = host.weight.flatten(1)
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        want = values * change.log_factor.double().exp()
        got = left.T @ change.fold(host.weight).flatten(1) @ right.T
        limit = 10 * max(rows.shape) * torch.finfo(torch.float64).eps * float(want.max())
        assert float((got - want.diag()).abs().max()) <= limit


def test_a_fold_is_the_formula_in_float32() -> None:
    """`U diag(s exp(a)) V^T` in float64 from the same factors: a product of the sum has five roundings, which twice as
    many terms of three cover, and W is added once."""
    for host in _hosts(torch.float32):
        change = _moved(host)
        left, values, right = torch.linalg.svd(host.weight.double().flatten(1), full_matrices=False)
        factor = change.log_factor.double()
        want = (left * (values * factor.exp())) @ right
        limit = bound(torch.float32, 2 * len(values), left * values * factor.expm1(), right)
        limit += bound(torch.float32, 1, want)
        got = change.fold(host.weight)
        assert got.dtype == torch.float32 and got.shape == host.weight.shape
        assert float((got.flatten(1).double() - want).abs().max()) <= limit


def test_no_value_changes_its_sign_and_zeros_stay() -> None:
    """A weight of rank 2 keeps it, whatever the factors of the values that are zero, which are eps of the largest."""
    host = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    torch.manual_seed(0)
    host.weight.copy_(torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64))
    change = Singular(host).requires_grad_(False)
    change.log_factor.copy_(torch.tensor([0.5, -3.0, 2.0, 2.0, 2.0]))
    values = torch.linalg.svdvals(host.weight)
    got = torch.linalg.svdvals(change.fold(host.weight))
    want = (values[:2] * change.log_factor[:2].double().exp()).sort(descending=True).values
    limit = 10 * 6 * torch.finfo(torch.float64).eps * float(values[0]) * 2.0**3
    assert float((got[:2] - want).abs().max()) <= limit and float(got[2:].max()) <= limit


@pytest.mark.parametrize(("name", "values"), [("resnet18", 4_352), ("resnet50", 13_248)])
def test_counts(name: str, values: int, tmp_path: Path) -> None:
    """The smaller side of every weight, from `report` and from the bytes of a file, which holds no axes."""
    base = getattr(torchvision.models, name)()
    sides = [min(m.weight.flatten(1).shape) for n, m in base.named_modules() if isinstance(m, nn.Conv2d)]
    model = TaskModel(base, SingularConfig(norm="frozen"))
    model.add_task("t", num_classes=10)
    report = model.report("t")
    assert sum(row.own for row in report.rows) == sum(sides) == values
    assert report.parameters == values + report.head and report.bytes == 4 * values
    model.save_task("t", tmp_path / "t.taps")
    sizes = {n: info.nbytes for n, info in store.read_header(tmp_path / "t.taps").tensors.items()}
    own = {n: size for n, size in sizes.items() if not n.startswith("fc:")}
    assert sum(own.values()) == 4 * values and {n.rpartition(":")[2] for n in own} == {"log_factor"}


def test_axes_are_found_once_and_are_in_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a weight, again for a copy's, one that was loaded, or one of another type; always the same."""
    found = []
    decompose = singular._decomposed
    monkeypatch.setattr(singular, "_decomposed", lambda weight: found.append(weight) or decompose(weight))
    model, x = adapted("conv", "singular", tasks=("t",)), images("conv")
    names = set(model.state_dict())
    train(model, x, "t")
    want = output(model.eval(), x, "t")
    layers = len(model.report("t").rows)
    assert len(found) == layers and set(model.state_dict()) == names
    model.merge_task("t")
    assert torch.equal(output(model, x, "t"), want)
    model.unmerge_task()
    assert len(found) == layers
    assert torch.equal(output(copy.deepcopy(model), x, "t"), want) and len(found) == 2 * layers
    model.load_state_dict(model.state_dict())
    assert torch.equal(output(model, x, "t"), want) and len(found) == 3 * layers
    model.to(torch.bfloat16)
    output(model, x.bfloat16(), "t")
    assert len(found) == 4 * layers


def test_nothing_is_found_for_a_task_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it runs."""
    model = adapted("conv", "singular", tasks=("t",))
    model.save_task("t", tmp_path / "t.taps")
    monkeypatch.setattr(singular, "_decomposed", None)
    TaskModel(make_base("conv")).load_task(tmp_path / "t.taps")


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="norm: expected"):
        SingularConfig(norm="own")
