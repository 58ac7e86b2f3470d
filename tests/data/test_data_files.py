"""Sources from the user's own files and functions: `imagefolder:`, `npz:` and `python:`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from taps_ext.data import ArrayDataset, Source, SourceError, open_source
from taps_ext.data.folder import FolderDataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def arrays(**changes):
    rng = np.random.default_rng(0)
    base = {
        "x_train": rng.integers(0, 256, (12, 10, 10, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 10, 10, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not None}


def write_npz(folder: Path, **changes) -> str:
    np.savez(folder / "a.npz", **arrays(**changes))
    return f"npz:{folder / 'a.npz'}"


# npz


def test_npz_keeps_values_and_geometry(tmp_path: Path) -> None:
    source = open_source(write_npz(tmp_path))
    given = arrays()
    assert source.val is None and source.classes == ("0", "1", "2") and source.shape == (3, 10, 10)
    expected = torch.from_numpy(given["x_train"]).permute(0, 3, 1, 2) / 255
    assert torch.equal(source.train.x, expected)  # type: ignore[attr-defined]
    assert source.train.y.tolist() == given["y_train"].tolist()  # type: ignore[attr-defined]
    assert open_source(write_npz(tmp_path), size=6, channels=1).shape == (1, 6, 6)


def test_npz_layouts_val_and_classes(tmp_path: Path) -> None:
    grey = np.linspace(0, 1, 6 * 100, dtype=np.float32).reshape(6, 10, 10)
    first = np.moveaxis(arrays()["x_train"], 3, 1)
    spec = write_npz(
        tmp_path,
        x_train=first,
        x_val=first[:3],
        y_val=np.array([0, 1, 2], dtype=np.uint8),
        classes=np.array(["cat", "dog", "fox"]),
    )
    source = open_source(spec)
    assert list(source.splits()) == ["train", "val", "test"] and source.classes == ("cat", "dog", "fox")
    assert torch.equal(source.train.x, open_source(write_npz(tmp_path)).train.x)  # type: ignore[attr-defined]
    source = open_source(write_npz(tmp_path, x_train=np.concatenate([grey, grey]), x_test=grey))
    assert source.shape == (1, 10, 10) and float(source.test.x.max()) == 1  # type: ignore[attr-defined]


def test_npz_limits(tmp_path: Path) -> None:
    spec = write_npz(tmp_path)
    small = open_source(spec + "?train=5&test=4")
    assert [len(data) for data in small.splits().values()] == [5, 4]
    again, other = open_source(spec + "?train=5&test=4"), open_source(spec + "?train=5&test=4", seed=1)
    assert torch.equal(small.train.x, again.train.x)  # type: ignore[attr-defined]
    assert not torch.equal(small.train.x, other.train.x)  # type: ignore[attr-defined]
    assert torch.equal(small.test.x, other.test.x)  # type: ignore[attr-defined]
    assert len(open_source(spec + "?train=500").train) == 12
    for query, message in [
        ("?trian=5", "bad option 'trian=5'"),
        ("?train=0", "bad option 'train=0'"),
        ("?train=2&train=3", "bad option 'train=3'"),
        ("?val=2", "has no x_val"),
    ]:
        with pytest.raises(SourceError, match=message):
            open_source(spec + query)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "missing y_test"),
        ({"x_val": np.zeros((2, 10, 10, 3), np.uint8)}, "missing y_val"),
        ({"extra": np.zeros(2)}, "unknown extra"),
        (
            {"x_train": np.zeros((12, 10, 10, 3), np.int32)},
            "x_train: expected uint8 or floating-point.*int32",
        ),
        ({"x_train": np.full((12, 10, 10), 255.0)}, r"expected floating-point values in \[0, 1\], got 255"),
        ({"x_train": np.full((12, 10, 10), np.nan)}, r"in \[0, 1\], got nan"),
        ({"x_train": np.zeros((12, 10, 10, 4), np.uint8)}, "expected 1 or 3 channels"),
        ({"x_train": np.zeros((12, 100), np.uint8)}, r"got \[12, 100\]"),
        ({"x_train": np.zeros((12, 9, 9, 3), np.uint8)}, "the splits differ in image shape"),
        ({"y_train": np.arange(11) % 3}, "y_train: 11 labels for 12 images"),
        ({"y_train": np.arange(12) - 1}, "labels start at 0, got -1"),
        ({"y_train": np.arange(12) / 3}, "expected integer labels"),
        ({"classes": np.array(["a", "b"])}, r"train labels span 0\.\.2, expected 0\.\.1"),
    ],
)
def test_npz_bad_arrays(tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(write_npz(tmp_path, **changes))


def test_npz_bad_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_source(f"npz:{tmp_path}/none.npz")
    objects = tmp_path / "objects.npz"
    np.savez(objects, **arrays(classes=np.array([{"a": 1}], dtype=object)))
    with pytest.raises(SourceError, match="without pickle"):
        open_source(f"npz:{objects}")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(objects.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"damaged\.npz: cannot be read"):
        open_source(f"npz:{damaged}")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(SourceError, match="got a single array"):
        open_source(f"npz:{tmp_path}/single.npy")


@pytest.mark.parametrize(("name", "shape", "classes"), [("signs", (3, 32, 32), 10), ("omniglot", (1, 32, 32), 242)])
def test_npz_real_files(name: str, shape: tuple[int, ...], classes: int) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{name}.npz is not here")
    source = open_source(f"npz:{path}?train=500")
    assert source.shape == shape and source.num_classes == classes and len(source.train) == 500
    assert open_source(f"npz:{path}?train=50&test=50", size=16, channels=1).shape == (1, 16, 16)


# imagefolder


def write_images(folder: Path, count: int, shade: int = 0) -> None:
    image = pytest.importorskip("PIL.Image", reason="imagefolder needs pillow")
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.full((20, 30, 3), (shade, i, 200), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{i:02}.png")


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, count in {"train": 4, "val": 2, "test": 3}.items():
        write_images(tmp_path / split / "cats", count, 50)
        write_images(tmp_path / split / "dogs", count, 100)
    (tmp_path / "train" / "cats" / "notes.txt").write_text("not an image")
    source = open_source(f"imagefolder:{tmp_path}", size=16)
    assert [len(data) for data in source.splits().values()] == [8, 4, 6]
    assert source.classes == ("cats", "dogs") and source.shape == (3, 16, 16)
    assert "1 other files left out" in source.description
    x, y = source.test[4]
    assert int(y) == 1 and x.dtype == torch.float32
    expected = torch.tensor([100.0, 1.0, 200.0]).view(3, 1, 1).expand(3, 16, 16) / 255
    torch.testing.assert_close(x, expected)
    batch, labels = next(iter(DataLoader(source.train, batch_size=8)))  # type: ignore[arg-type]
    assert batch.shape == (8, 3, 16, 16) and labels.dtype == torch.int64
    shifted = open_source(f"imagefolder:{tmp_path}", size=16, normalize=([0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(shifted.test[4][0], (expected - 0.5) / 0.5)
    assert open_source(f"imagefolder:{tmp_path}", channels=1).shape == (1, 224, 224)


def test_folder_without_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 20)
    write_images(tmp_path / "b" / "deeper", 3)
    source = open_source(f"imagefolder:{tmp_path}", size=8)
    assert [len(data) for data in source.splits().values()] == [14 + 1, 3 + 1, 3 + 1]
    seen = [set(data.paths) for data in source.splits().values()]  # type: ignore[attr-defined]
    assert len(set.union(*seen)) == 23  # disjoint
    again = open_source(f"imagefolder:{tmp_path}", size=8, seed=5)
    assert again.train.paths == source.train.paths  # type: ignore[attr-defined]


def test_folder_train_and_val_only(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "val" / "a", 1)
    source = open_source(f"imagefolder:{tmp_path}", size=8)
    assert source.val is None and len(source.test) == 1 and "val is the test set" in source.description


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        open_source(f"imagefolder:{tmp_path}/none")
    with pytest.raises(SourceError, match="no class folders"):
        open_source(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "train" / "a", 2)
    with pytest.raises(SourceError, match="has only train/; expected"):
        open_source(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "test" / "b", 2)
    with pytest.raises(SourceError, match="class 'b' does not exist in train"):
        open_source(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(SourceError, match=r"b: no images \(looked for \.jpg"):
        open_source(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "flat" / "few", 2)
    with pytest.raises(SourceError, match="'few' has 2 images, a split needs 3"):
        open_source(f"imagefolder:{tmp_path}/flat")


@pytest.mark.parametrize("kind", ["text", "truncated", "deep"])
def test_folder_bad_images_are_named_when_read(tmp_path: Path, kind: str) -> None:
    image = pytest.importorskip("PIL.Image", reason="imagefolder needs pillow")
    path = tmp_path / f"{kind}.png"
    if kind == "text":
        path.write_text("not an image")
    elif kind == "deep":
        image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(path)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError, match=rf"cannot read image .*{kind}\.png"):
        FolderDataset([(path, 0)], 8, 3)[0]


# python

MODULE = """
import numpy as np, torch
from taps_ext.data import ArrayDataset, Source
x = np.zeros((4, 6, 6, 3), dtype=np.uint8); y = np.array([0, 1, 0, 1])
def dataset(channels=3, size=6):
    return ArrayDataset(torch.zeros(4, channels or 3, size or 6, size or 6), torch.tensor(y))
def source(size, channels, seed):
    data = dataset(channels, size)
    return Source("mine", data, None, data, classes=("a", f"seed{seed}"))
def mapping(): return {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": ["a", "b"]}
def fields(): return {"train": dataset(), "test": dataset(), "classes": ["a", "b"]}
def pairs(): return (x, y), None, (torch.zeros(2, 3, 6, 6), [0, 1])
def named():
    train = dataset(); train.classes = ["a", "b"]
    return train, dataset(), dataset()
def nameless(): return dataset(), None, dataset()
def mixed(): return (x, y), None, dataset()
def nothing(): return None
def incomplete(): return {"train": dataset(), "classes": ["a"]}
def surplus(): return {"train": dataset(), "test": dataset(), "classes": ["a", "b"], "tset": 1}
def lists(): return {"train": 3, "test": dataset(), "classes": ["a", "b"]}
class Bytes:
    classes = ["a", "b"]
    def __len__(self): return 4
    def __getitem__(self, index): return torch.zeros(3, 6, 6, dtype=torch.uint8), int(y[index])
def bytes_(): return Bytes(), None, Bytes()
constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_sources.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_sources"
    sys.modules.pop("my_sources", None)


@pytest.mark.parametrize("name", ["source", "mapping", "fields", "pairs", "named"])
def test_python_results(module: str, name: str) -> None:
    source = open_source(f"python:{module}.{name}")
    assert isinstance(source, Source) and source.name == f"python:{module}.{name}"
    assert source.shape == (3, 6, 6) and source.num_classes == 2
    assert (source.val is not None) == (name == "named")
    scaled = open_source(f"python:{module}.{name}", normalize=([0.5], [0.5]))
    assert float(scaled.train[0][0].min()) == -1 and scaled.normalize == ([0.5], [0.5])


def test_python_gets_the_arguments_it_names(module: str) -> None:
    source = open_source(f"python:{module}.source", size=9, channels=1, seed=7)
    assert source.shape == (1, 9, 9) and source.classes == ("a", "seed7")
    assert open_source(f"python:{module}.mapping", size=9, channels=1).shape == (1, 9, 9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nameless", "class names are unknown"),
        ("mixed", "got a mixture"),
        ("nothing", "expected a Source, a dict or a tuple .* got NoneType"),
        ("incomplete", "missing test"),
        ("surplus", "unknown tset"),
        ("lists", "train is a int, expected a dataset"),
        ("bytes_", r"train images are torch\.uint8, expected float32 in \[0, 1\]; x\.float\(\) / 255"),
        ("constant", "has no function 'constant'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_python_bad_results(module: str, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(f"python:{module}.{name}")


def test_python_errors(module: str) -> None:
    with pytest.raises(SourceError, match="cannot import no_such_module_here"):
        open_source("python:no_such_module_here.f")
    with pytest.raises(SourceError, match=r"expected python:MODULE\.FUNCTION"):
        open_source("python:function")
    with pytest.raises(SourceError, match=r"train images are \[3, 6, 6\], expected \[1, 9, 9\]"):
        open_source(f"python:{module}.fields", size=9, channels=1)
    assert isinstance(open_source(f"python:{module}.fields").train, ArrayDataset)
