"""Parts of any kind come back under any names, and contradictions are refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_facts import golden_facts
from store_files import (
    PARENT,
    THRESHOLD,
    VERSIONS,
    Draft,
    blob_of,
    canonical,
    example,
    layer,
    older,
    older_example,
    own,
    parts,
    state,
    stranger,
)
from torch import Tensor

from taps_ext import store
from taps_ext.store import PartEntry, Record, TaskFile, check_parent, check_tensors, errors

GOLDEN = Path(__file__).parents[1] / "files/golden"


def assert_same_tensors(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in expected.items())


def assert_same(got: TaskFile, expected: TaskFile) -> None:
    for key in ("kind", "method", "parent", "name", "labels", "metrics", "versions", "extra"):
        assert getattr(got, key) == getattr(expected, key), key
    assert got.parts.keys() == expected.parts.keys()
    for module, record in expected.parts.items():
        assert canonical(got.parts[module].facts) == canonical(record.facts), "types too"
        assert_same_tensors(got.parts[module].tensors, record.tensors)
    assert_same_tensors(got.values, expected.values)


def loaded(draft: Draft, folder: Path) -> TaskFile:
    """The forged file, read."""
    (folder / "forged.taps").write_bytes(draft.build())
    return store.load(folder / "forged.taps")


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    task = example(extra={"note": "by hand"})
    store.save(path, task)
    back = store.load(path, kind="task")
    assert_same(back, task)
    assert back.path == str(path) and back.digest == store.read_header(path).digest and back.complete
    assert all(record.module == module and record.path == path for module, record in back.parts.items())


def test_names_in_the_file(tmp_path: Path) -> None:
    store.save(tmp_path / "a.taps", example())
    assert sorted(store.read(tmp_path / "a.taps").tensors) == [
        ":cls_token",
        "blocks.0:a.b:c",
        "blocks.0:score",
        "blocks.0:weight~",
        "bn1:num_batches_tracked",
        "bn1:running_mean",
        "bn1:weight",
        "conv1:delta",
        "conv1:score",
        "conv2:score",
        "conv3:delta",
        "fc:bias",
        "fc:weight",
    ]
    entries = store.read_safetensors(tmp_path / "a.taps")[1]
    assert entries["taps.format"] == "1.2"
    assert entries.keys().isdisjoint({"taps.layers", "taps.codecs", "taps.contents", "taps.head"})
    assert json.loads(entries["taps.parts"])["blocks.0"] == {
        "facts": stranger().facts,
        "tensors": ["a.b:c", "score", "weight~"],
    }


def test_nothing_at_all(tmp_path: Path) -> None:
    empty = TaskFile(method={"method": "probe"}, parent=PARENT)
    store.save(tmp_path / "a.taps", empty)
    assert_same(store.load(tmp_path / "a.taps"), empty)
    assert set(empty.versions) == {"taps_ext", "torch"}


def test_a_part_without_tensors_is_listed(tmp_path: Path) -> None:
    """A norm without parameters is the task's own too: its mode is."""
    store.save(tmp_path / "a.taps", example(parts={"norm": own("norm"), "": layer(learn=False, open=False)}))
    header = store.read_header(tmp_path / "a.taps")
    assert header.metadata.complete and not header.tensors
    assert header.metadata.parts["norm"] == PartEntry({"kind": "own", "role": "norm"}, ())


def test_a_closed_layer_costs_its_score(tmp_path: Path) -> None:
    store.save(tmp_path / "a.taps", example(parts={"l": layer(learn=True, open=False, score=torch.tensor(0.0))}))
    stored = store.read_header(tmp_path / "a.taps").tensors.values()
    assert [(t.name, t.nbytes) for t in stored] == [("l:score", 4)]


def test_a_score_is_one_where_there_is_a_gate(tmp_path: Path) -> None:
    """The stranger's "score" is two numbers, and may be what it likes."""
    task = example()
    task.parts["blocks.0"].tensors = {**stranger().tensors, "score": torch.tensor([float("nan"), 1.0])}
    store.save(tmp_path / "a.taps", task)
    claims = store.read_header(tmp_path / "a.taps").claims
    assert {stored for stored, claim in claims.items() if claim.score} == {"conv1:score", "conv2:score"}
    assert store.load(tmp_path / "a.taps").parts["blocks.0"].tensors["score"].isnan().any()


def test_a_chain_of_parents(tmp_path: Path) -> None:
    store.save(tmp_path / "shared.taps", example(kind="shared", name=""))
    shared = store.load(tmp_path / "shared.taps", kind="shared")
    store.save(tmp_path / "task.taps", example(parent=shared.digest))
    task = store.load(tmp_path / "task.taps")
    check_parent(shared.digest, task.parent, path=task.path)
    with pytest.raises(errors.ParentMismatchError, match=f"{shared.digest}.*{PARENT}"):
        check_parent(PARENT, task.parent, path=task.path)
    store.save(tmp_path / "shared.taps", example(kind="shared", name="other"))
    assert store.load(tmp_path / "shared.taps").digest != task.parent


def test_names_that_look_like_something_else(tmp_path: Path) -> None:
    """Many want `a:b:c` or the like; the table tells them apart."""
    number = iter(range(1000))
    modules = ["", "a", "a:b", ":", "::", "a:", ":a", "a:b:c", "a.b", "a b", "鳥", "a~", "a:b~", "__metadata__ "]
    names = ["a", "b", "b:c", "c", ":", "::", "a:b", "c~", "b:c~", "score", "delta", "0.weight", "a ", "~", "~~"]
    kinds = ["x", "y", "z"]
    task = example(
        parts={
            module: Record(
                {"kind": kinds[at % 3]}, {name: torch.tensor([float(next(number))]) for name in names[at % 4 :]}
            )
            for at, module in enumerate(modules)
        }
    )
    store.save(tmp_path / "a.taps", task)
    assert any(stored.endswith("~~~") for stored in store.read_header(tmp_path / "a.taps").tensors)
    assert_same(store.load(tmp_path / "a.taps"), task)
    assert store.verify(tmp_path / "a.taps").ok


ONE = torch.ones(1)
SCORE = torch.tensor(0.2)


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        (layer(learn=True, open=False), errors.GateRecordError, "a score is expected, got none"),
        (layer(learn=False, open=False, score=SCORE), errors.GateRecordError, "no score is expected"),
        (layer(learn=1, open=False, score=SCORE), errors.MetadataError, "booleans"),  # type: ignore[arg-type]
        (layer(learn=True, open=False, score=torch.tensor(float("nan"))), errors.GateRecordError, "got nan"),
        (layer(learn=True, open=False, score=ONE), errors.ShapeMismatchError, r"got \[1\]"),
        (layer(learn=True, open=False, score=SCORE.double()), errors.DtypeMismatchError, "got F64"),
        (layer(learn=False, open=True, delta=ONE.to_sparse()), errors.UnsupportedTensorError, "sparse"),
        (Record({"kind": "x", "gate": True}), errors.MetadataError, "gate: expected booleans"),
        (Record({}), errors.MetadataError, "the part's kind, got None"),
        (Record({"kind": ""}), errors.MetadataError, "the part's kind, got ''"),
        (Record([]), errors.MetadataError, r"a JSON object, got \[\]"),  # type: ignore[arg-type]
        (Record({"kind": "x", "y": (1, 2)}), errors.HeaderError, "facts.y: expected dict, list"),
        (Record({"kind": "x", "y": [float("inf")]}), errors.HeaderError, "a finite number, got inf"),
        (Record({"kind": "x", "y": {1: 2}}), errors.HeaderError, "string keys"),
        ({"facts": {}, "tensors": {}}, errors.MetadataError, "expected a Record, got a dict"),
    ],
)
def test_contradictions_are_not_written(record: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=rf"layer4\.1.*{words}"):
        store.save(tmp_path / "a.taps", example(parts={"layer4.1": record}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(kind="recipe"), errors.KindError),
        (dict(parent="base"), errors.MetadataError),
        (dict(method={"lam": 1}), errors.MetadataError),
        (dict(method=[]), errors.MetadataError),
        (dict(method={}), errors.MetadataError),
        (dict(method={}, kind="shared"), errors.MetadataError),
        (dict(method={"lam": 1}, kind="state", parts={}), errors.MetadataError),
        (dict(method={"method": "trainer-state"}), errors.MetadataError),
        (dict(kind="state"), errors.MetadataError),
        (dict(values={"a": ONE}), errors.MetadataError),
        (dict(complete=False), errors.MetadataError),
        (dict(labels=["a", 1]), errors.MetadataError),
        (dict(labels=("a",)), errors.MetadataError),
        (dict(extra={"taps.more": "x"}), errors.UnknownKeyError),
        (dict(extra={"n": 1}), errors.UnknownKeyError),
        (dict(versions={"torch": 2}), errors.MetadataError),
        (dict(name="two\nlines"), errors.TensorNameError),
        (dict(parts={"two\nlines": stranger()}), errors.TensorNameError),
        (dict(parts={"a": Record({"kind": "x"}, {"two\nlines": ONE})}), errors.TensorNameError),
        (dict(parts={"a": Record({"kind": "x"}, {"": ONE})}), errors.TensorNameError),
        (dict(parts={"a" * 300: Record({"kind": "x"}, {"b" * 300: ONE})}), errors.LimitError),
    ],
)
def test_bad_tables_are_not_written(change: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        store.save(tmp_path / "a.taps", example(**change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("minor", ["1.0", "1.7"])
def test_another_minor_is_read_if_all_of_it_is_known(minor: str, tmp_path: Path) -> None:
    draft = Draft.of(blob_of(example(), tmp_path))
    draft.metadata["taps.format"] = minor
    assert_same(loaded(draft, tmp_path), example())


# ---------------------------------------------------------------------------------------------- states


def test_a_state_is_written_as_ever(tmp_path: Path) -> None:
    """To the byte as before there were parts, 1.1 being all that it needs."""
    task = state(method={"method": "full", "x": 1}, labels=["é"], metrics={"m": 0.5}, extra={"train.counters": "{}"})
    task.values = {**task.values, "a": torch.tensor(2)}
    found = hashlib.sha256(blob_of(task, tmp_path)).hexdigest()
    assert found == "b3f5773579d6ec906cfdadbdf0d6ba92461a31ac46c4a4c30e722a5071846c60"
    golden = store.load(GOLDEN / "run/quadrants.state")
    golden.versions = dict(VERSIONS)
    found = hashlib.sha256(blob_of(golden, tmp_path)).hexdigest()
    assert found == "ff45592eac8c82f1b68caf7d394de466ce767ca17f2cd2d917423f0ae265fb0f"


def test_a_state_needs_no_method(tmp_path: Path) -> None:
    store.save(tmp_path / "a.state", state())
    assert_same(store.load(tmp_path / "a.state", kind="state"), state())
    entries = store.read_safetensors(tmp_path / "a.state")[1]
    assert entries["taps.format"] == "1.1" and entries.keys().isdisjoint({"taps.method", "taps.parts"})
    for kind in ("task", "shared"):
        store.save(tmp_path / "a.taps", example(kind=kind))
        assert store.read_safetensors(tmp_path / "a.taps")[1]["taps.format"] == "1.2"
        with pytest.raises(errors.KindError, match=f"expected a state file, got a {kind} file$"):
            store.read_header(tmp_path / "a.taps", kind="state")
        with pytest.raises(errors.KindError, match=f"expected a {kind} file, got a state file, which says where"):
            store.load(tmp_path / "a.state", kind=kind)


def test_a_state_of_0_1_is_a_state(tmp_path: Path) -> None:
    """It was written as a task of a method called trainer-state, with which no task is written any more."""
    trainer = canonical({"method": "trainer-state"})
    draft = older({"part:a.value": ONE}, contents={"values": ["part:a"]}, method=trainer)
    found = loaded(draft, tmp_path)
    assert (found.kind, found.method, found.complete) == ("state", {}, True)
    store.save(tmp_path / "again.state", found)
    assert_same(store.load(tmp_path / "again.state", kind="state"), found)


# ------------------------------------------------------------------------------------------ 1.0 and 1.1


def test_the_older_example_is_what_0_1_wrote() -> None:
    """The digest is of the file that the code before 1.2 wrote for the same task."""
    found = hashlib.sha256(older_example().build()).hexdigest()
    assert found == "107cc47ef6fe2aab43a9c2863fe8aa2d4a096e590ba8f6c35904ec1ea1e5f1e8"


def test_an_older_file_is_the_same_parts(tmp_path: Path) -> None:
    found = loaded(older_example(), tmp_path)
    assert not found.complete
    assert_same(found, example(parts=parts()))
    found.complete = True  # as who knows the model may say
    assert blob_of(found, tmp_path) == blob_of(example(parts=parts()), tmp_path)


def test_an_older_file_is_not_written_as_if_it_listed_all_parts(tmp_path: Path) -> None:
    (tmp_path / "a.taps").write_bytes(older_example().build())
    with pytest.raises(errors.MetadataError, match="does not list parts without tensors"):
        store.save(tmp_path / "b.taps", store.load(tmp_path / "a.taps"))
    read = store.read(tmp_path / "a.taps")
    with pytest.raises(errors.MetadataError, match="does not list parts without tensors"):
        store.write(tmp_path / "b.taps", read.tensors, read.header.metadata)
    assert [file.name for file in tmp_path.iterdir()] == ["a.taps"]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.taps")), ids=lambda file: file.stem)
def test_golden_files_hold_what_they_held(file: Path, tmp_path: Path) -> None:
    known = json.loads((GOLDEN / "facts.json").read_text())[file.stem]
    task = store.load(file, kind="task")
    assert golden_facts(task) == known and store.verify(file).ok
    task.complete = True
    store.save(tmp_path / "again.taps", task)
    assert golden_facts(store.load(tmp_path / "again.taps")) == known
    assert Draft.of(file.read_bytes()).build() == file.read_bytes(), "the forger writes as 0.1 did"


def test_a_bias_is_the_layers_own(tmp_path: Path) -> None:
    """Of a value `<layer>.bias`, and of no other value."""
    gates = {name: {"learn": False, "open": False} for name in ("", "a", "a.b")}
    names = ["a.b.bias", "a.bias", "a.c.bias", "bias", "c.weight"]
    found = loaded(
        older({f"{n}.value": torch.ones(2) for n in names}, layers=gates, contents={"values": names}), tmp_path
    )
    assert {m: (r.facts["kind"], sorted(r.tensors)) for m, r in found.parts.items()} == {
        "": ("layer", ["bias"]),
        "a": ("layer", ["bias"]),
        "a.b": ("layer", ["bias"]),
        "a.c": ("own", ["bias"]),
        "c": ("own", ["weight"]),
    }


@pytest.mark.parametrize("method", ["taps", "probe", "acme"])
def test_changes_of_older_layers(method: str, tmp_path: Path) -> None:
    gates = {"open": (False, True), "whole": (False, True), "shut": (False, False), "learned": (True, False)}
    draft = older(
        {"open.delta": ONE, "whole.weight": ONE, "learned.score": torch.tensor(0.01)},
        layers={name: {"learn": learn, "open": is_open} for name, (learn, is_open) in gates.items()},
        codecs={"open": "dense", "whole": "weight"},
        method=canonical({"method": method}),
    )
    found = {m: (r.facts["change"], sorted(r.tensors)) for m, r in loaded(draft, tmp_path).parts.items()}
    closed = None if method == "probe" else {"kind": "dense"}
    assert found == {
        "open": ({"kind": "dense"}, ["delta"]),
        "whole": ({"kind": "whole"}, ["weight"]),
        "shut": (closed, []),
        "learned": (closed, ["score"]),
    }


def test_thresholds_of_older_layers(tmp_path: Path) -> None:
    gates = {name: {"learn": False, "open": False} for name in ("a.x", "a.y", "b", "c")}

    def found(**settings: Any) -> dict[str, float]:
        draft = older(layers=gates, method=canonical({"method": "taps", **settings}))
        return {m: r.facts["gate"]["threshold"] for m, r in loaded(draft, tmp_path).parts.items()}

    assert found() == dict.fromkeys(gates, THRESHOLD)
    assert found(threshold=1) == dict.fromkeys(gates, 1.0)
    assert type(found(threshold=1)["b"]) is float
    overrides = {"*": {"threshold": 0.5}, "a.*": {"threshold": 2, "learn": True}, "a.[y-z]": {"learn": False}}
    assert found(overrides=overrides) == {"a.x": 2.0, "a.y": 2.0, "b": 0.5, "c": 0.5}
    overrides = {"a.*": {"threshold": 0.25}, "a.y": {"threshold": 4}, "nowhere": {"threshold": 8}}
    assert found(threshold=0.5, overrides=overrides) == {"a.x": 0.25, "a.y": 4.0, "b": 0.5, "c": 0.5}


def test_a_method_without_layers_has_no_threshold(tmp_path: Path) -> None:
    """What its settings call so is its own affair."""
    settings = canonical({"method": "acme", "threshold": "none", "overrides": 7})
    assert loaded(older(method=settings), tmp_path).method["threshold"] == "none"


def test_older_names_that_look_like_something_else(tmp_path: Path) -> None:
    """Every place wants `head.delta`, `norm.x.delta` or the like; the tables tell them apart."""
    layers = ["", "head", "head.delta", "norm.x", "x.delta", "x.score", "x", "norm", "a b", "鳥", "x.delta~"]
    values = ["v.value", "v.value.value", "w.head.delta"]
    norms = ["n.delta", "n.value", "y.delta", "y.x.delta"]
    head = ["delta", "delta.delta", "delta.score", "delta.value", "delta~", "score", "value"]
    wanted: list[tuple[str, str, str]] = []  # the name that is wanted in the file, and what for
    for name in sorted(layers):
        wanted += [(f"{name}.score", name, "score"), (f"{name}.delta", name, "delta")]
    wanted += [(f"{name}.value", *split(name)) for name in values]
    wanted += [(f"norm.{name}", *split(name)) for name in norms]
    wanted += [(f"head.{name}", "fc", name) for name in head]
    stored: dict[str, Tensor] = {}
    expected: dict[tuple[str, str], float] = {}
    for at, (name, module, tensor) in enumerate(wanted):
        while name in stored:
            name += "~"
        stored[name] = torch.tensor(float(at))
        expected[module, tensor] = float(at)
    draft = older(
        stored,
        layers={name: {"learn": True, "open": True} for name in layers},
        codecs=dict.fromkeys(layers, "dense"),
        contents={"values": values, "norms": norms, "head": head},
        head={"type": "custom", "module": "fc", "class": "Head"},
    )
    found = loaded(draft, tmp_path)
    assert any(name.endswith("~") for name in stored)
    assert {(m, n): t.item() for m, r in found.parts.items() for n, t in r.tensors.items()} == expected
    assert store.verify(found.path).ok


def split(name: str) -> tuple[str, str]:
    module, _, tensor = name.rpartition(".")
    return module, tensor


# -------------------------------------------------------------------------------------------- the rest


def test_a_record_gives_what_is_asked_for() -> None:
    tensors = {"weight": torch.ones(2), "bias": torch.ones(1)}
    record = Record({"kind": "x", "n": 3}, tensors, module="a.b", path="f")
    assert record.fact("n", int) == 3
    for wrong in (bool, float, str):
        with pytest.raises(errors.MetadataError, match=r"f: part 'a\.b': n: expected a .*, got 3"):
            record.fact("n", wrong)
    with pytest.raises(errors.ShapeMismatchError, match=r"'a\.b\.weight': expected shape \[3\]"):
        record.take({"weight": ((3,), torch.float32)})
    with pytest.raises(errors.MissingTensorError, match=r"'a\.b\.scale'"):
        record.take({"scale": ((1,), torch.float32)})
    with pytest.raises(errors.DtypeMismatchError, match="expected torch.float64, got torch.float32"):
        record.take({"weight": ((2,), torch.float64)})
    assert record.take({"weight": ((2,), torch.float32)})["weight"] is tensors["weight"]
    with pytest.raises(errors.UnexpectedTensorError, match=r"'a\.b\.bias'"):
        record.check_taken()
    record.cast = True
    assert record.take({"bias": ((1,), torch.float16)})["bias"].dtype == torch.float16
    record.check_taken()
    assert Record({}, module="").full("token") == "token"


def test_check_tensors() -> None:
    expected = {"w": ((2, 3), torch.float32), "b": ((2,), torch.float32)}
    good = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    check_tensors(expected, good, path="f")
    cases: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        (
            {"w": good["w"]},
            errors.MissingTensorError,
            r"f: tensor 'b': expected torch.float32 of shape \[2\]",
        ),
        ({}, errors.MissingTensorError, r"'b'.*\(and 1 more\)"),
        ({**good, "z": good["b"]}, errors.UnexpectedTensorError, "'z'"),
        ({**good, "b": torch.zeros(3)}, errors.ShapeMismatchError, r"'b': expected shape \[2\], got \[3\]"),
        ({**good, "b": torch.zeros(2, 1)}, errors.ShapeMismatchError, r"'b'.*got \[2, 1\]"),
        (
            {**good, "b": torch.zeros(2).half()},
            errors.DtypeMismatchError,
            "'b': expected torch.float32, got torch.float16",
        ),
    ]
    for got, error, words in cases:
        with pytest.raises(error, match=words):
            check_tensors(expected, got, path="f")


def test_errors_travel_between_processes() -> None:
    for error in (errors.MissingFileError("f", "gone"), errors.GateRecordError(Path("f"), "bad")):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error) and str(back) == str(error) and back.problem == error.problem
        assert isinstance(back, ValueError)


def test_versions_default_to_ours() -> None:
    assert TaskFile(method={}, parent="").versions["torch"] == torch.__version__
    assert example().versions == VERSIONS
