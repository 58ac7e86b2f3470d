"""Layers, norms, values and heads come back under any names, and contradictions are refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from store_files import PARENT, VERSIONS, Draft, blob_of, canonical, example
from torch import Tensor

from taps_ext import store
from taps_ext.store import LayerRecord, TaskFile, check_parent, check_tensors, codecs, errors


def assert_same(got: TaskFile, expected: TaskFile) -> None:
    for key in ("kind", "method", "parent", "name", "head_spec", "labels", "metrics", "versions", "extra"):
        assert getattr(got, key) == getattr(expected, key), key
    assert got.layers.keys() == expected.layers.keys()
    for name, record in expected.layers.items():
        back = got.layers[name]
        assert (back.learn, back.open, back.parts) == (record.learn, record.open, None)
        for one, other in ((back.score, record.score), (back.delta, record.delta)):
            assert (one is None) == (other is None)
            assert one is None or other is None or (torch.equal(one, other) and one.dtype == other.dtype)
    for group in ("norms", "values", "head"):
        mine, theirs = getattr(got, group), getattr(expected, group)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], t) and mine[n].dtype == t.dtype for n, t in theirs.items())


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    task = example(extra={"note": "by hand"})
    store.save(path, task)
    loaded = store.load(path, kind="task")
    assert_same(loaded, task)
    assert loaded.path == str(path) and loaded.digest == store.read_header(path).digest


def test_names_in_the_file(tmp_path: Path) -> None:
    store.save(tmp_path / "a.taps", example())
    assert sorted(store.read(tmp_path / "a.taps").tensors) == [
        "cls_token.value",
        "conv1.delta",
        "conv1.score",
        "conv2.score",
        "conv3.delta",
        "head.bias",
        "head.weight",
        "norm.bn1.num_batches_tracked",
        "norm.bn1.running_mean",
        "norm.bn1.weight",
    ]


def test_nothing_at_all(tmp_path: Path) -> None:
    empty = TaskFile(method={"method": "probe"}, parent=PARENT)
    store.save(tmp_path / "a.taps", empty)
    assert_same(store.load(tmp_path / "a.taps"), empty)
    assert set(empty.versions) == {"taps_ext", "torch"}


def test_a_state_needs_no_method(tmp_path: Path) -> None:
    """What it holds is stored as a task's is; files of the other kinds keep the format that 0.1 reads."""
    state = TaskFile(kind="state", parent=PARENT, name="birds", values={"part:a": torch.ones(2)})
    store.save(tmp_path / "a.state", state)
    assert_same(store.load(tmp_path / "a.state", kind="state"), state)
    entries = store.read_safetensors(tmp_path / "a.state")[1]
    assert entries["taps.format"] == "1.1" and "taps.method" not in entries
    for kind in ("task", "shared"):
        store.save(tmp_path / "a.taps", example(kind=kind))
        assert store.read_safetensors(tmp_path / "a.taps")[1]["taps.format"] == "1.0"
        with pytest.raises(errors.KindError, match=f"expected a state file, got a {kind} file$"):
            store.read_header(tmp_path / "a.taps", kind="state")
        with pytest.raises(errors.KindError, match=f"expected a {kind} file, got a state file, which says where"):
            store.load(tmp_path / "a.state", kind=kind)


def test_a_state_of_0_1_is_a_state(tmp_path: Path) -> None:
    """It was written as a task of a method called trainer-state, with which no task is written any more."""
    draft = Draft.of(blob_of(example(), tmp_path))
    draft.metadata["taps.method"] = canonical({"method": "trainer-state"})
    (tmp_path / "a.state").write_bytes(draft.build())
    state = store.load(tmp_path / "a.state", kind="state")
    assert (state.kind, state.method) == ("state", {})
    store.save(tmp_path / "again.state", state)
    assert_same(store.load(tmp_path / "again.state"), state)


def test_a_closed_layer_costs_its_score(tmp_path: Path) -> None:
    store.save(
        tmp_path / "a.taps",
        example(layers={"l": LayerRecord(learn=True, open=False, score=torch.tensor(0.0))}),
    )
    stored = [t for t in store.read_header(tmp_path / "a.taps").tensors.values() if t.name.startswith("l.")]
    assert [(t.name, t.nbytes) for t in stored] == [("l.score", 4)]


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
    """Every place wants `head.delta`, `norm.x.delta` or the like; the tables tell them apart."""
    number = iter(range(100))

    def t() -> Tensor:
        return torch.tensor([float(next(number))])

    def layer() -> LayerRecord:
        return LayerRecord(learn=True, open=True, score=t()[0], delta=t())

    names = [
        "",
        "head",
        "head.delta",
        "norm.x",
        "x.delta",
        "x.score",
        "x",
        "norm",
        "taps",
        "a b",
        "鳥",
        "x.delta~",
    ]
    task = example(
        layers={name: layer() for name in names},
        values={
            "head": t(),
            "x": t(),
            "norm.x": t(),
            "head.delta": t(),
            "x.value": t(),
            "x.value.value": t(),
        },
        norms={"x.delta": t(), "delta": t(), "x.value": t(), "score": t(), "x.value.value": t()},
        head={
            "delta": t(),
            "score": t(),
            "value": t(),
            "delta.delta": t(),
            "delta.value": t(),
            "delta~": t(),
        },
    )
    store.save(tmp_path / "a.taps", task)
    assert_same(store.load(tmp_path / "a.taps"), task)
    assert store.verify(tmp_path / "a.taps").ok


ONE = torch.ones(1)
SCORE = torch.tensor(0.2)


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        (dict(learn=True, open=False), errors.GateRecordError, "a score is expected, got none"),
        (dict(learn=False, open=False, score=SCORE), errors.GateRecordError, "no score is expected"),
        (dict(learn=False, open=True), errors.GateRecordError, "got neither"),
        (dict(learn=False, open=True, delta=ONE, parts={"delta": ONE}), errors.GateRecordError, "got both"),
        (dict(learn=False, open=False, delta=ONE), errors.GateRecordError, "closed, so no delta"),
        (dict(learn=1, open=False), errors.GateRecordError, "booleans"),
        (dict(learn=True, open=False, score=torch.tensor(float("nan"))), errors.GateRecordError, "got nan"),
        (dict(learn=True, open=False, score=ONE), errors.ShapeMismatchError, r"got \[1\]"),
        (dict(learn=True, open=False, score=SCORE.double()), errors.DtypeMismatchError, "got F64"),
        (dict(learn=False, open=True, delta=ONE, codec="fractal"), errors.CodecError, "'fractal'"),
        (
            dict(learn=False, open=True, parts={"values": ONE}),
            errors.CodecError,
            r"\['delta'\], got \['values'\]",
        ),
        (dict(learn=False, open=True, delta=ONE.to_sparse()), errors.UnsupportedTensorError, "sparse"),
    ],
)
def test_contradictions_are_not_written(
    record: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=rf"'layer4\.1.*{words}"):
        store.save(tmp_path / "a.taps", example(layers={"layer4.1": LayerRecord(**record)}))
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
        (dict(method={"lam": 1}, kind="state"), errors.MetadataError),
        (dict(method={"method": "trainer-state"}), errors.MetadataError),
        (dict(labels=["a", 1]), errors.MetadataError),
        (dict(labels=("a",)), errors.MetadataError),
        (dict(extra={"taps.more": "x"}), errors.UnknownKeyError),
        (dict(extra={"n": 1}), errors.UnknownKeyError),
        (dict(versions={"torch": 2}), errors.MetadataError),
        (dict(name="two\nlines"), errors.TensorNameError),
        (dict(values={"two\nlines": ONE}), errors.TensorNameError),
        (dict(values={"": ONE}), errors.TensorNameError),
    ],
)
def test_bad_tables_are_not_written(change: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        store.save(tmp_path / "a.taps", example(**change))
    assert list(tmp_path.iterdir()) == []


class Halves:
    """A lossy codec with two parts, as a later one may be: float16 values and a scale."""

    name = "halves"
    parts: tuple[str, ...] = ("values", "scale")
    lossless = False

    def encode(self, name: str, delta: Tensor) -> dict[str, Tensor]:
        scale = delta.abs().amax()
        return {"values": (delta / scale).half(), "scale": scale}

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"].float() * parts["scale"].view([])


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(codecs, "_CODECS", dict(codecs._CODECS))
    codecs.register(Halves())
    yield


def test_another_codec(halves: None, tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    delta = torch.randn(5, 4)
    layers = {
        "packed": LayerRecord(learn=False, open=True, delta=delta, codec="halves"),
        "plain": LayerRecord(learn=False, open=True, delta=delta),
    }
    store.save(path, example(layers=layers))
    assert {"packed.values", "packed.scale", "plain.delta"} <= store.read_header(path).tensors.keys()
    loaded = store.load(path)
    back = loaded.layers["packed"].delta
    assert back is not None and loaded.layers["packed"].codec == "halves"
    torch.testing.assert_close(back, delta, rtol=2**-10, atol=2**-10 * float(delta.abs().max()))

    packed = store.load(path, decode=False)
    assert packed.layers["packed"].delta is None
    assert packed.layers["packed"].parts is not None and packed.layers["packed"].parts.keys() == {
        "values",
        "scale",
    }
    assert blob_of(packed, tmp_path) == path.read_bytes(), "packed parts are stored as they are"


def test_parts_that_do_not_decode(halves: None, tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    bad = {"values": torch.ones(2), "scale": torch.ones(3)}
    store.save(path, example(layers={"l": LayerRecord(learn=False, open=True, parts=bad, codec="halves")}))
    with pytest.raises(errors.CodecError, match="layer 'l': codec halves cannot decode"):
        store.load(path)


def test_a_file_of_an_absent_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "_CODECS", {**codecs._CODECS, "halves": Halves()})
        layers = {"l": LayerRecord(learn=False, open=True, delta=ONE, codec="halves")}
        store.save(tmp_path / "a.taps", example(layers=layers))
    with pytest.raises(errors.CodecError, match="unknown codec 'halves'; known are"):
        store.read_header(tmp_path / "a.taps")


def test_registering() -> None:
    assert "dense" in codecs.known() and codecs.get("dense", layer="l", path="p").lossless
    with pytest.raises(ValueError, match="'dense' is already registered"):
        codecs.register(codecs.Whole("dense", "other"))
    for parts in ((), ("a", "a"), ("score",)):
        bad = Halves()
        bad.name, bad.parts = "bad", parts
        with pytest.raises(ValueError, match="'bad'"):
            codecs.register(bad)


def test_a_newer_minor_is_read_if_all_of_it_is_known(tmp_path: Path) -> None:
    from store_files import Draft

    draft = Draft.of(blob_of(example(), tmp_path))
    draft.metadata["taps.format"] = "1.7"
    (tmp_path / "a.taps").write_bytes(draft.build())
    assert_same(store.load(tmp_path / "a.taps"), example())


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
