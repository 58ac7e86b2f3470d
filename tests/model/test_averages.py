"""Averages of a whole TaskModel: those that leave equal values as they are can be saved, others are told of them."""

import pytest
import torch
from models import TinyNet, images, settle
from torch.optim import swa_utils

from taps_ext import TapsConfig, TapsError, TaskModel

EXACT = {
    "default": {},
    "with buffers": {"use_buffers": True},
    "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "exponential, with buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}
ROUNDING = {
    "a function": {"avg_fn": lambda average, new, count: 0.9 * average + 0.1 * new},
    "torch's function": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
}


def averaged(settings: dict) -> swa_utils.AveragedModel:
    """Of five states of a task."""
    model = TaskModel(settle(TinyNet()), TapsConfig())
    model.add_task("t", num_classes=3)
    average = swa_utils.AveragedModel(model, **settings)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.state("t").parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        average.update_parameters(model)
    return average


@pytest.mark.parametrize("kind", EXACT)
def test_an_average_that_leaves_the_base_alone_is_saved(kind: str, tmp_path) -> None:
    average, x = averaged(EXACT[kind]).eval(), images()
    average.module.save_task("t", tmp_path / "t.taps")
    torch.manual_seed(0)
    fresh = TaskModel(settle(TinyNet())).eval()
    fresh.load_task(tmp_path / "t.taps")
    with torch.no_grad():
        assert torch.equal(average(x, task="t"), fresh(x, task="t"))


@pytest.mark.parametrize("kind", ROUNDING)
def test_an_average_that_rounds_the_base_is_told_of_those_that_do_not(kind: str, tmp_path) -> None:
    average = averaged(ROUNDING[kind])
    message = (
        r"the base's parameter .* An average of the whole model .* AveragedModel without avg_fn, or with multi_avg"
    )
    with pytest.raises(TapsError, match=message):
        average.module.save_task("t", tmp_path / "t.taps")
    torch.manual_seed(0)
    average.module.base.load_state_dict(settle(TinyNet()).state_dict())  # the other way out that it names
    average.module.save_task("t", tmp_path / "t.taps")
