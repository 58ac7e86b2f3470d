"""Settings that are refused when they are given: misspelt keywords, rates that are no rates, gates that could never
open."""

import copy
import dataclasses
import pickle

import pytest
import torch
from models import TinyNet, settle

import taps_ext
from taps_ext import ConfigError, JointTapsConfig, LoraConfig, MethodConfig, TapsConfig, Task, TaskModel, TrainConfig
from taps_ext.methods import base as methods

NAN = float("nan")


@pytest.mark.parametrize("config", [*methods.registered().values(), TrainConfig, Task], ids=lambda c: c.__name__)
def test_a_misspelt_keyword_is_named_with_a_suggestion(config) -> None:
    fields = [f.name for f in dataclasses.fields(config)]
    right = fields[0]
    with pytest.raises(
        ConfigError, match=rf"{config.__name__}: unknown keyword '{right}s' \(did you mean '{right}'\?\)"
    ):
        config(**{f"{right}s": None})


def test_a_misspelt_keyword_of_a_change() -> None:
    with pytest.raises(ConfigError, match=r"TapsConfig: unknown keyword 'treshold' \(did you mean 'threshold'\?\)"):
        dataclasses.replace(TapsConfig(), treshold=0.2)


def test_a_file_or_a_configuration_without_a_value_that_a_method_needs(monkeypatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needing(MethodConfig):
        amount: int

    monkeypatch.setitem(methods._METHODS, "needing", Needing)
    with pytest.raises(ConfigError, match="needing: expected a value for 'amount', got none"):
        MethodConfig.from_dict({"method": "needing"})
    assert MethodConfig.from_dict({"method": "needing", "amount": 2}) == Needing(amount=2)


def test_settings_come_by_keyword() -> None:
    with pytest.raises(ConfigError, match=r"TapsConfig: expected settings by keyword, such as .*, got 0\.7"):
        TapsConfig(0.7)


def test_settings_are_copied_and_pickled() -> None:
    config = TapsConfig(lam=0.25, overrides={"conv1": {"threshold": 0.1}})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, lam=0.5).lam == TapsConfig().lam == JointTapsConfig().lam == 0.5


def test_a_star_import_leaves_torchs_names_alone() -> None:
    rooms = (torch, torch.nn, torch.nn.functional, torch.optim, torch.utils.data, torch.profiler, torch.func)
    assert [name for name in taps_ext.__all__ if any(hasattr(room, name) for room in rooms)] == []
    assert callable(taps_ext.profile) and taps_ext.nn.TapsLinear and taps_ext.__version__


@pytest.mark.parametrize("value", [-1.0, NAN, float("inf"), "0.1", True], ids=str)
@pytest.mark.parametrize("argument", ["lr", "score_lr", "weight_decay"])
def test_rates_that_are_none(argument: str, value) -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig())
    model.add_task("t", num_classes=2)
    with pytest.raises(ConfigError, match=rf"^{argument}: expected a number in \[0\.0, inf\], got {value!r}"):
        model.parameter_groups("t", **{"lr": 0.1, argument: value})
    with pytest.raises(ConfigError, match=rf"^{argument}: expected a number"):
        TrainConfig(**{argument: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: TapsConfig(threshold=NAN),
        lambda: TapsConfig(overrides={"conv1": {"threshold": NAN}}),
        lambda: LoraConfig(selective=True, threshold=NAN),
        lambda: taps_ext.nn.TapsLinear(2, 2, threshold=NAN),
    ],
)
def test_a_threshold_that_is_none(make) -> None:
    with pytest.raises(ConfigError, match=r"threshold: expected a number in \(0\.0, inf\], got nan"):
        make()


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (TapsConfig(score_init=0.05), "for conv1 and 3 other layers"),
        (JointTapsConfig(threshold=0.3), "got 0.15 with threshold 0.3 for conv1 and 3 other layers"),
        (LoraConfig(selective=True, score_init=0.05), "for conv1 and 2 other layers"),
        (TapsConfig(overrides={"conv2": {"score_init": 0.05}}), "got 0.05 with threshold 0.1 for conv2;"),
        (TapsConfig(overrides={"hidden": {"threshold": 0.2}}), "got 0.15 with threshold 0.2 for hidden;"),
    ],
)
def test_a_gate_that_begins_closed_could_never_open(config, layers: str) -> None:
    model = TaskModel(settle(TinyNet()), config)
    with pytest.raises(ConfigError, match=f"score_init: expected the threshold or more, .*{layers}"):
        model.add_task("t", num_classes=2)
    assert model.tasks == [] and model.families == {}


def test_a_gate_that_begins_at_its_threshold_is_open() -> None:
    overrides = {"*": {"score_init": 0.2}, "hidden": {"learn": False, "open": False, "score_init": 0.01}}
    model = TaskModel(settle(TinyNet()), TapsConfig(threshold=0.2, overrides=overrides))
    model.add_task("t", num_classes=2)
    assert [row.layer for row in model.report("t").rows if not row.open] == ["hidden"]
