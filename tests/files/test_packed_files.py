"""Files of packed tasks: they load for ever, hostile ones are refused by name, and files are packed as models pack."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_facts import digest
from method_cases import images, make_base, output, rounding, save, trained
from packed import by_the_page
from torch import Tensor

from taps_ext import ConfigError, TaskFileError, TaskModel, store
from taps_ext.files import pack
from taps_ext.parts.packing import Rule
from taps_ext.store.errors import PackedTensorError

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from bases import base_of  # noqa: E402
from bases import images as golden_images  # noqa: E402

FACTS = json.loads((GOLDEN / "packed/facts.json").read_text())
every_file = pytest.mark.parametrize("name", FACTS)
CODECS = ["bitmask", "bitmask:0.2", "int8", "int4", "sign", "lowrank:2"]


def golden(name: str) -> Path:
    return GOLDEN / f"packed/{name}.taps"


def test_all_are_there() -> None:
    assert {*FACTS} == {file.stem for file in (GOLDEN / "packed").glob("*.taps")}
    kinds = {
        part["facts"]["change"]["kind"]
        for file in FACTS.values()
        for part in file.values()
        if "change" in part["facts"]
    }
    assert kinds >= {"bitmask", "int8", "int4", "sign", "lowrank"}


@every_file
def test_every_tensor_and_fact_of_a_golden_file(name: str) -> None:
    assert store.verify(golden(name)).ok
    parts = store.load(golden(name)).parts
    now = {
        module: {"facts": record.facts, "tensors": {n: digest(t) for n, t in sorted(record.tensors.items())}}
        for module, record in parts.items()
    }
    assert json.loads(json.dumps(now)) == FACTS[name]


@every_file
def test_a_golden_task_is_that_of_the_page(name: str, tmp_path: Path) -> None:
    """W + Delta by a reader that is not ours; products with it are torch's own, to the bit. A low rank is rounded in
    float32, so that its product is near."""
    model = TaskModel(base_of("conv")).eval()
    model.load_task(golden(name), "t")
    again = copy.deepcopy(model).merge_and_unload("t").state_dict()
    for module, record in store.load(golden(name)).parts.items():
        packed = record.facts.get("packed")
        if packed is None:
            continue
        shape = packed["shape"]
        columns = math.prod(shape[1:])
        delta = by_the_page(record.facts["change"]["kind"], record.tensors, shape[0], columns).reshape(shape)
        weight = base_of("conv").state_dict()[f"{module}.weight"]
        if name == "lowrank":
            want = (weight.double() + torch.from_numpy(delta)).float()
            # Two products and their sum in float32, then the rounding of W_t.
            size = record.tensors["up"].double().abs() @ record.tensors["down"].double().abs()
            limit = 3 * 2.0**-24 * size.view(shape) + 2.0**-23 * want.abs()
            assert ((again[f"{module}.weight"] - want).abs() <= limit).all()
        else:
            assert torch.equal(again[f"{module}.weight"], weight + torch.from_numpy(delta).float())
    plain = copy.deepcopy(model).merge_and_unload("t")
    x = golden_images()
    with torch.no_grad():
        found, want = model(x, task="t"), plain(x)
    near = rounding(model, x, "t", torch.float32) if name == "lowrank" else torch.zeros(())
    assert ((found - want).abs() <= near).all()
    model.save_task("t", tmp_path / "again.taps")
    saved = {m: (r.facts, r.tensors) for m, r in store.load(tmp_path / "again.taps").parts.items()}
    for module, record in store.load(golden(name)).parts.items():
        facts, tensors = saved[module]
        assert facts == record.facts and all(torch.equal(tensors[n], t) for n, t in record.tensors.items())


# ------------------------------------------------------------------------------------ without a base


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "plain").mkdir()
    return save(trained("conv", "taps"), tmp_path / "plain")


@pytest.mark.parametrize(
    "settings", [*({"codec": codec} for codec in CODECS), {}, {"max_error": 0.2}, {"budget": 600}], ids=str
)
def test_a_file_is_packed_as_a_model_packs_it(settings: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    model = TaskModel(make_base("conv")).eval()
    model.load_task(plain)
    made = model.pack_task("t", **settings)
    model.save_task("t", tmp_path / "model.taps")
    rule = Rule.of(**{"codec": None, "max_error": None, "budget": None, **settings})
    found, written = pack.pack_file(plain, tmp_path / "file.taps", rule)
    assert (tmp_path / "file.taps").read_bytes() == (tmp_path / "model.taps").read_bytes()
    assert found.task == made.task  # the file's parts are by name, the model's by place
    assert found.rows == sorted(made.rows, key=lambda row: row.layer)
    assert written == (tmp_path / "file.taps").stat().st_size
    packed = [row.layer for row in found.rows if row.codec != "dense"]
    if not packed:
        with pytest.raises(ConfigError, match="expected a packed task, got one without packed layers"):
            pack.unpack_file(tmp_path / "file.taps", tmp_path / "back.taps")
        return
    assert sorted(model.unpack_task("t")) == packed
    layers, written = pack.unpack_file(tmp_path / "file.taps", tmp_path / "back.taps")
    assert layers == packed and written == (tmp_path / "back.taps").stat().st_size
    model.save_task("t", tmp_path / "model.taps")
    assert (tmp_path / "back.taps").read_bytes() == (tmp_path / "model.taps").read_bytes()
    with pytest.raises(ConfigError, match=f"{packed[0]} is packed already; `taps unpack` first"):
        pack.pack_file(tmp_path / "file.taps", tmp_path / "twice.taps", rule)


def test_one_layer_at_a_time(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two Deltas are there at once, whatever decides."""
    alive: list[Any] = []
    import weakref

    read = store.io._read_tensor

    def watched(fd: int, info: Any, claim: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensor = read(fd, info, claim, *args, **kwargs)
        if claim.tensor == "delta":
            assert not [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(store.io, "_read_tensor", watched)
    for settings in ((None, None, 500), ("int8", None, None), (None, 0.1, None)):
        pack.pack_file(plain, tmp_path / "out.taps", Rule.of(*settings))
    assert len(alive) >= 9


def test_differences_of_two_files(plain: Path, tmp_path: Path) -> None:
    pack.pack_file(plain, tmp_path / "int8.taps", Rule.of("int8", None, None))
    assert {part.what for part in pack.diff_files(plain, plain)} == {"same"}
    model = TaskModel(make_base("conv")).eval()
    model.load_task(plain)
    rows = {row.layer: row for row in model.pack_task("t", codec="int8").rows}
    for part in pack.diff_files(plain, tmp_path / "int8.taps"):
        if part.part in rows:
            assert (part.what, part.kinds) == ("changed", ("dense", "int8"))
            assert part.distance == pytest.approx(rows[part.part].error, rel=1e-9)
        else:
            assert (part.what, part.distance) == ("same", 0.0)
    closed = next(iter(rows))
    model.set_gates("t", open=[name for name in rows if name != closed])
    model.save_task("t", tmp_path / "closed.taps")
    found = {part.part: part for part in pack.diff_files(tmp_path / "int8.taps", tmp_path / "closed.taps")}
    assert found[closed].what == "only in the first" and found[closed].distance is None
    other = save(trained("vit", "lora"), tmp_path)
    words = {part.what for part in pack.diff_files(plain, other)}
    assert words == {"only in the first", "only in the second", "same", "other shapes"}


# ------------------------------------------------------------------------------------ hostile files


def hostile(name: str, tmp_path: Path, change: Any) -> Path:
    """A golden file with one part changed: digests are right again, what they vouch for is not."""
    file = store.load(golden(name))
    record = next(r for r in file.parts.values() if "packed" in r.facts)
    record.facts, record.tensors = copy.deepcopy(record.facts), {n: t.clone() for n, t in record.tensors.items()}
    change(record)
    store.save(tmp_path / "bad.taps", file)
    return tmp_path / "bad.taps"


def put(name: str, index: int, value: float) -> Any:
    def change(record: store.Record) -> None:
        record.tensors[name][index] = value

    return change


def cut(name: str) -> Any:
    def change(record: store.Record) -> None:
        record.tensors[name] = record.tensors[name][:-1].clone()

    return change


def fact(**facts: Any) -> Any:
    def change(record: store.Record) -> None:
        for key, value in facts.items():
            record.facts[key] = value(record.facts[key]) if callable(value) else value

    return change


def typed(name: str, dtype: torch.dtype) -> Any:
    def change(record: store.Record) -> None:
        record.tensors[name] = record.tensors[name].to(dtype)

    return change


TENSORS = [
    ("bitmask", put("bitmap", 0, 255), "conv1.bitmap.*bits, one for each value"),
    ("bitmask", cut("values"), "conv1.values"),
    ("bitmask", put("values", 0, math.inf), "conv1.values.*finite"),
    ("bitmask", fact(change=lambda c: {**c, "kept": c["kept"] + 1}), "conv1.values"),
    ("bitmask", fact(change=lambda c: {**c, "kept": -1}), "kept|packed"),
    ("bitmask", fact(change=lambda c: {**c, "kept": 10**15}), "kept|conv1.values"),
    ("bitmask", fact(change=lambda c: {**c, "kept": True}), "kept|packed"),
    ("int8", put("codes", 0, -128), "conv1.codes.*got -128"),
    ("int8", put("scale", 0, math.nan), "conv1.scale.*scales from 0"),
    ("int8", put("scale", 0, -1.0), "conv1.scale.*scales from 0"),
    ("int8", cut("codes"), "conv1.codes"),
    ("int8", cut("scale"), "conv1.scale"),
    ("int8", typed("codes", torch.uint8), "conv1.codes"),
    ("int8", typed("scale", torch.float32), "conv1.scale"),
    ("int4", put("codes", 0, 0x08), "conv1.codes.*got -8"),
    ("sign", put("scale", 0, math.inf), "conv1.scale.*scales from 0"),
    ("sign", put("scale", 0, -1.0), "conv1.scale.*scales from 0"),
]
FACTS_OF_PACKING = [
    ("int8", fact(packed=None), "packed: expected a dict"),
    ("int8", fact(packed={"error": 0.1}), "packed: expected a measured error"),
    ("int8", fact(packed=lambda p: {**p, "error": -0.5}), "packed: expected a measured error"),
    ("int8", fact(packed=lambda p: {**p, "error": 1}), "packed: expected a measured error"),
    ("int8", fact(packed=lambda p: {**p, "more": 1.0}), "packed: expected a measured error"),
    ("int8", fact(packed=lambda p: {**p, "shape": [8, -3, 3, 3]}), "packed: expected a measured error"),
    ("int8", fact(packed=lambda p: {**p, "shape": [1 << 50, 3]}), "packed: expected a measured error"),
    ("int8", fact(packed=lambda p: {**p, "shape": "8"}), "packed: expected a measured error"),
    ("int8", fact(change={"kind": "dense"}), "packed|tensors of its change"),
    ("int8", fact(change={"kind": "int8", "group": 32}), "change 'int8'|packed"),
    ("lowrank", fact(change=lambda c: {**c, "rank": 0}), "rank|down"),
    ("lowrank", fact(packed=lambda p: {**p, "shape": [1 << 39, 1 << 39]}), "packed"),
]


@pytest.mark.parametrize(("name", "change", "message"), [*TENSORS, *FACTS_OF_PACKING])
def test_hostile_files_are_refused_by_name(name: str, change: Any, message: str, tmp_path: Path) -> None:
    """By models and without one; nothing is added, nothing written."""
    path = hostile(name, tmp_path, change)
    model = TaskModel(base_of("conv"))
    with pytest.raises(TaskFileError, match=message):
        model.load_task(path, "t")
    assert not model.tasks
    for action in (lambda: pack.unpack_file(path, tmp_path / "out.taps"), lambda: pack.diff_files(path, golden(name))):
        with pytest.raises(TaskFileError, match=message):
            action()
    assert not (tmp_path / "out.taps").exists()


def test_values_that_no_packing_gives_have_an_error_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(PackedTensorError, match="conv1.scale"):
        TaskModel(base_of("conv")).load_task(hostile("int8", tmp_path, put("scale", 0, math.nan)), "t")


def test_only_models_know_their_weights(tmp_path: Path) -> None:
    """A packed layer without `packed`, or of another weight's shape."""
    path = hostile("int8", tmp_path, lambda record: record.facts.pop("packed"))
    with pytest.raises(TaskFileError, match="packed: expected with a change that packing makes and nowhere else"):
        TaskModel(base_of("conv")).load_task(path, "t")
    path = hostile("int8", tmp_path, fact(packed=lambda p: {**p, "shape": [8, 3, 9, 1]}))
    with pytest.raises(TaskFileError, match=r"packed: expected the shape \[8, 3, 3, 3\] of the weight"):
        TaskModel(base_of("conv")).load_task(path, "t")


def test_it_belongs_to_methods_that_have_a_delta_there(tmp_path: Path) -> None:
    file = store.load(save(trained("conv", "lora"), tmp_path))
    packed = store.load(golden("int8")).parts["hidden"]
    record = file.parts["hidden"]
    record.facts = {**record.facts, "change": {"kind": "sign"}, "packed": {"error": 0.5, "shape": [12, 12]}}
    record.tensors = {"signs": torch.zeros(18, dtype=torch.uint8), "scale": torch.zeros(12)}
    assert packed.facts["packed"]["shape"] == [12, 16]
    store.save(tmp_path / "bad.taps", file)
    with pytest.raises(TaskFileError, match="part 'hidden': change: expected .*lowrank.*, got .*dense"):
        TaskModel(make_base("conv")).load_task(tmp_path / "bad.taps")
    assert output(trained("conv", "lora"), images("conv"), "t").isfinite().all()


def test_whole_weights_stay_and_are_named(tmp_path: Path) -> None:
    """Their Delta needs the base: a codec leaves them and says so, a budget for all layers is refused."""
    source = tmp_path / "extracted.taps"
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    tuned = {name: tensor * 1e-9 for name, tensor in base.state_dict().items()}  # no Delta gives these to the bit
    model = TaskModel(base)
    model.extract_task("t", tuned)
    model.save_task("t", source)
    whole = [n for n, r in store.load(source).parts.items() if r.facts.get("change") == {"kind": "whole"}]
    assert whole
    made, _ = pack.pack_file(source, tmp_path / "int8.taps", Rule.of("int8", None, None))
    rows = {row.layer: row for row in made.rows}
    assert all(rows[name].codec == "whole" and rows[name].bytes == rows[name].before > 0 for name in whole)
    before, after = store.load(source).parts, store.load(tmp_path / "int8.taps").parts
    assert all(torch.equal(before[n].tensors[t], after[n].tensors[t]) for n in whole for t in before[n].tensors)
    with pytest.raises(ConfigError, match=r"budget: .*extracted\.taps: .* is a whole weight, .*pack_task"):
        pack.pack_file(source, tmp_path / "budget.taps", Rule.of(None, None, 10**6))
    assert not (tmp_path / "budget.taps").exists()


def test_a_file_that_does_not_list_its_parts_is_named(tmp_path: Path) -> None:
    """The file that is read, and not the one that would be written."""
    source = GOLDEN / "taps-conv.taps"
    for act in (
        lambda: pack.pack_file(source, tmp_path / "a.taps", Rule()),
        lambda: pack.unpack_file(source, tmp_path / "a.taps"),
    ):
        with pytest.raises(TaskFileError, match=r"taps-conv\.taps: a file of format 1\.0 does not list parts"):
            act()
