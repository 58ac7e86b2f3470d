"""A base module whose parameter is registered anew after the base was adapted: pruning, norms of weights and other
parametrisations. Its tasks refuse to run, by name, and the base comes back whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from taps_ext import FullConfig, TapsConfig, TapsError, TaskModel


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


HOW: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "weight norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "parametrisation": (
        lambda m: parametrize.register_parametrization(m, "weight", Twice()),
        lambda m: parametrize.remove_parametrizations(m, "weight", leave_parametrized=False),
    ),
    "old weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}
every_way = pytest.mark.parametrize("how", list(HOW))
of_old_ways = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")


def changed(base: nn.Module, layer: str, how: str) -> nn.Module:
    torch.manual_seed(1)
    HOW[how][0](base.get_submodule(layer))
    return base


@every_way
@pytest.mark.parametrize("layer", ["conv2", "hidden", "ln"])
@of_old_ways
def test_a_task_over_it_says_so_and_the_base_comes_back_whole(layer: str, how: str) -> None:
    base, x = settle(TinyNet()), images()
    plain = changed(copy.deepcopy(base), layer, how).eval()
    model = TaskModel(base, TapsConfig(lam=1.0)).eval()
    model.add_task("t", num_classes=2)
    model.add_task("merged", num_classes=2)
    model(x, task="t")
    changed(model.base, layer, how)
    for run in (
        lambda: model(x, task="t"),
        lambda: torch.no_grad()(model)(x, task="t"),
        lambda: model.train()(x, task="t"),
        lambda: model.merge_task("t"),
        lambda: model.task_state_dict("t"),
    ):
        with pytest.raises(TapsError, match=f"^{layer}: its weight stopped being a parameter since .*prune.remove"):
            run()
    model.eval()
    with torch.no_grad():
        want = plain(x)
        assert torch.equal(model(x, task=None), want)
        assert torch.equal(model.train()(x, task=None), want)
        back = model.unload().eval()
        assert torch.equal(back(x), want)
    assert back is base and back.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), plain.state_dict().values(), strict=True))
    assert [type(m).__name__ for m in back.modules()] == [type(m).__name__ for m in plain.modules()]
    assert [type(m).__mro__[1:] for m in back.modules()] == [type(m).__mro__[1:] for m in plain.modules()]
    HOW[how][1](back.get_submodule(layer))
    assert type(back.get_submodule(layer)) is type(TinyNet().get_submodule(layer))
    with torch.no_grad():
        assert back(x).isfinite().all()


@every_way
@of_old_ways
def test_undone_it_runs_again(how: str) -> None:
    """With values that changed no file is written: tasks would belong to no base that exists."""
    model = TaskModel(settle(TinyNet()), FullConfig()).eval()
    model.add_task("t", num_classes=2)
    x = images()
    want = model(x, task="t")
    changed(model.base, "hidden", how)
    with pytest.raises(TapsError, match=r"parameter hidden\..* has appeared .* undo what put it there"):
        model.save_task("t", "never.taps")
    HOW[how][1](model.base.hidden)
    if how == "weight norm":  # of what was frozen torch makes a buffer
        with pytest.raises(TapsError, match="hidden: its weight stopped being a parameter"):
            model(x, task="t")
        return
    got = model(x, task="t")
    assert how in ("prune", "spectral norm", "old spectral norm") or torch.allclose(got, want, atol=1e-5)


def test_of_a_module_that_no_task_is_over_it_goes() -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0, exclude_modules=["hidden"])).eval()
    model.add_task("t", num_classes=2)
    x = images()
    before = model(x, task="t")
    parametrize.register_parametrization(model.base.hidden, "weight", Twice())
    assert not torch.equal(model(x, task="t"), before)
    with torch.no_grad():
        model.base.hidden.parametrizations.weight.original.div_(2)
    assert torch.equal(model(x, task="t"), before)


def test_a_norm_that_was_parametrised_gets_no_task() -> None:
    """Tasks have a copy of the norm itself, which would lack its weight."""
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0)).eval()
    parametrize.register_parametrization(model.base.ln, "weight", Twice())
    with pytest.raises(TapsError, match=r"^ln: it was parametrised since the model was adapted"):
        model.add_task("t", num_classes=2)
    assert model.tasks == [] and model(images()).shape == (3, 4)
