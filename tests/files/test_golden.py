"""Files that version 0.1 wrote load for ever, bit for bit, and their outputs are those of torch on the same tensors."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from golden_facts import digest, golden_facts
from torch import nn

from taps_ext import TaskModel, store
from taps_ext.train import Trainer
from taps_ext.train.run import Run

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from bases import STATE, TASKS, base_of, images, values  # noqa: E402
from make import CONFIGS, NOTES, golden_config, golden_task, run_facts  # noqa: E402

FACTS = json.loads((GOLDEN / "facts.json").read_text())


def test_they_are_small_and_all_there() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if "__pycache__" not in file.parts) < 300_000
    assert {*FACTS} == {*TASKS, "run"} and {file.stem for file in GOLDEN.glob("*.taps")} == {*TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_every_tensor_and_fact_of_the_file(name: str) -> None:
    record = store.load(GOLDEN / f"{name}.taps")
    assert json.loads(json.dumps(golden_facts(record))) == FACTS[name]
    assert store.verify(GOLDEN / f"{name}.taps")


def plain(name: str) -> nn.Module:
    """The task by torch alone, from the file's tensors."""
    record = store.load(GOLDEN / f"{name}.taps")
    model = copy.deepcopy(base_of(TASKS[name]))
    for name, part in record.parts.items():
        host, facts = model.get_submodule(name), part.facts
        if facts["kind"] == "instead":
            head = nn.Linear(facts["module"]["in"], facts["module"]["out"])
            head.load_state_dict(part.tensors)
            model.set_submodule(name, head)
            continue
        held = {**host._parameters, **host._buffers}
        prefix = "in_proj_" if isinstance(host, nn.MultiheadAttention) else ""
        with torch.no_grad():
            for key, value in part.tensors.items():
                if facts["kind"] == "own":
                    held[key].copy_(value)
                elif key == "delta":
                    held[prefix + "weight"].add_(value)
                elif key != "score":
                    held[prefix + key].copy_(value)
    return model.eval().requires_grad_(False)  # torch picks some products by that flag


@pytest.fixture
def _slow_attention():
    """torch's fused attention takes other products than the layers that it stands for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("_slow_attention")
def test_the_task_is_the_one_that_was_saved(name: str) -> None:
    """Every tensor and gate of the loaded task, and its outputs: those of W_t in plain torch, to the bit, which layers
    as small as these are multiplied with."""
    model = TaskModel(base_of(TASKS[name])).eval()
    assert model.load_task(GOLDEN / f"{name}.taps") == FACTS[name]["name"]
    known = FACTS[name]
    report = {row.layer: row for row in model.report(name).rows}
    assert {layer: row.open for layer, row in report.items()} == {n: e["open"] for n, e in known["layers"].items()}
    again = copy.deepcopy(model)
    if name in CONFIGS:
        assert again.state(name).config == CONFIGS[name]
    expected = plain(name)
    x = images()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(x, task=name), expected(x))
    merged = again.merge_and_unload(name)
    assert torch.equal(merged(x), expected(x))
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in merged.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_saved_again_it_holds_the_same(name: str, tmp_path) -> None:
    model = TaskModel(base_of(TASKS[name]))
    model.load_task(GOLDEN / f"{name}.taps")
    notes = NOTES if name == "taps-conv" else {}
    model.save_task(name, tmp_path / "again.taps", **notes)
    now = json.loads(json.dumps(golden_facts(store.load(tmp_path / "again.taps"))))
    assert now == FACTS[name]


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch) -> None:
    """Its state is read to the bit, and the run ends as its settings say."""
    file = tmp_path / f"{STATE['task']}.state"
    shutil.copy(GOLDEN / "run" / file.name, file)
    shutil.copy(GOLDEN / "run" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    assert run_facts(store.load(file, kind="state")) == FACTS["run"]
    model = TaskModel(base_of("conv"), CONFIGS["taps-conv"].__class__(lam=0.5))
    model.add_task(STATE["task"], num_classes=4)
    head = model.state(STATE["task"]).head
    with torch.no_grad():  # of another start, which the state replaces
        head.weight.copy_(values((4, 12), 90))
    trainer = Trainer(model, {STATE["task"]: golden_task()}, golden_config(tmp_path), quiet=True)
    seen = []

    def watch(run) -> None:
        seen.append({n: digest(t) for n, t in run.state.state_dict().items()})

    load = Run.load

    def loaded(self, *args) -> None:
        load(self, *args)
        watch(self)

    Run.load = loaded
    try:
        result = trainer.fit()[STATE["task"]]
    finally:
        Run.load = load
    stored = {n[len("part:") :]: d for n, d in FACTS["run"]["values"].items() if n.startswith("part:")}
    now = model.state(STATE["task"]).renamed(stored)  # what 0.1 called otherwise
    assert len(now.keys() - stored.keys()) == 8 and seen == [now]
    before = FACTS["run"]["progress"]["history"]
    assert len(result.history) == STATE["epochs"] and result.history[: len(before)] == before
    assert not file.exists() and Path(result.file).exists()
