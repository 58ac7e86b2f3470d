"""The built-in data sources: geometry, determinism, and splits that share nothing."""

from __future__ import annotations

import pytest
import torch

from taps_ext.data import (
    ArrayDataset,
    NormalizedDataset,
    Source,
    SourceError,
    glyphs,
    known_sources,
    open_source,
    photos,
)
from taps_ext.data.digits import split_rows
from taps_ext.data.source import affine, apply_normalize, require, resize, to_channels
from taps_ext.demo.tasks import BASE, CHANNELS, SIZE, TASKS, open_demo

pytest.importorskip("sklearn", reason="the built-in sources need scikit-learn")
pytest.importorskip("matplotlib", reason="glyphs need matplotlib's fonts")
pytest.importorskip("PIL", reason="glyphs and photos need pillow")

SHAPES = {  # spec: (train, val, test, classes)
    "digits:plain": (1078, 269, 450, 10),
    "digits:rotated": (2156, 269, 450, 10),
    "digits:parity": (1078, 269, 450, 2),
    "digits:occluded": (3234, 269, 450, 10),
    "glyphs:letters": (3120, 520, 1040, 26),
    "glyphs:lowercase": (3120, 520, 1040, 26),
    "glyphs:digits": (1920, 400, 800, 10),
    "photos:patches": (3000, 400, 800, 2),
    "photos:distortion": (3000, 400, 800, 4),
}


@pytest.fixture(scope="module")
def opened() -> dict[str, Source]:
    return {spec: open_source(spec, size=16, channels=1) for spec in SHAPES}


def pictures(data: ArrayDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.x}


def test_every_built_in_source_is_tested() -> None:
    assert [spec for spec in known_sources() if spec == spec.lower()] == list(SHAPES)


@pytest.mark.parametrize("spec", SHAPES)
def test_counts_dtypes_and_range(opened: dict[str, Source], spec: str) -> None:
    source = opened[spec]
    assert tuple(len(data) for data in source.splits().values()) == SHAPES[spec][:3]
    assert source.num_classes == SHAPES[spec][3] == len(set(source.classes))
    assert source.shape == (1, 16, 16) and source.name == spec
    assert source.description and source.licence and source.normalize is None
    for data in source.splits().values():
        assert isinstance(data, ArrayDataset)
        assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64
        assert 0 <= data.x.min() < data.x.max() <= 1
        counts = torch.bincount(data.y, minlength=source.num_classes)
        assert counts.min() > 0.8 * len(data) / source.num_classes  # no class is rare
        x, y = data[3]
        assert x.shape == (1, 16, 16) and y.shape == ()


@pytest.mark.parametrize("spec", SHAPES)
def test_no_picture_is_in_two_splits(opened: dict[str, Source], spec: str) -> None:
    train, val, test = (pictures(data) for data in opened[spec].splits().values())  # type: ignore[arg-type]
    assert not train & test and not train & val and not val & test


@pytest.mark.parametrize("spec", ["digits:occluded", "glyphs:digits", "photos:distortion"])
def test_seed_changes_training_images_only(opened: dict[str, Source], spec: str) -> None:
    again, other = (open_source(spec, size=16, channels=1, seed=seed) for seed in (0, 1))
    for split, data in opened[spec].splits().items():
        assert torch.equal(data.x, again.splits()[split].x)  # type: ignore[attr-defined]
        assert torch.equal(data.y, other.splits()[split].y)  # type: ignore[attr-defined]
        assert torch.equal(data.x, other.splits()[split].x) == (split != "train")  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", ["digits:rotated", "glyphs:digits", "photos:patches"])
def test_geometry_is_as_asked(spec: str) -> None:
    assert open_source(spec, size=20, channels=3).shape == (3, 20, 20)
    assert open_source(spec).shape == (3 if spec.startswith("photos") else 1, 16, 16)


def test_digits_tasks_share_one_split(opened: dict[str, Source]) -> None:
    from sklearn.datasets import load_digits

    labels = torch.from_numpy(load_digits().target).long()
    rows = split_rows(labels)
    assert torch.equal(torch.cat(list(rows.values())).sort().values, torch.arange(1797))
    for label in range(10):
        first, middle, last = (part[labels[part] == label] for part in rows.values())
        assert first.max() < middle.min() and middle.max() < last.min()  # in file order
    plain, parity, rotated = (opened[f"digits:{task}"] for task in ("plain", "parity", "rotated"))
    for split, data in plain.splits().items():
        assert torch.equal(data.y, labels[rows[split]])  # type: ignore[attr-defined]
        assert torch.equal(data.x, parity.splits()[split].x)  # type: ignore[attr-defined]
    assert torch.equal(rotated.test.y, plain.test.y)  # type: ignore[attr-defined]


def test_rotation_turns_counter_clockwise() -> None:
    x = torch.rand(2, 1, 8, 8)
    turned = affine(x, torch.full((2,), torch.pi / 2), torch.ones(2), torch.zeros(2, 2))
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    moved = affine(x, torch.zeros(2), torch.ones(2), torch.tensor([[0.25, 0.125]] * 2))
    torch.testing.assert_close(moved[:, :, 1:, 2:], x[:, :, :-1, :-2], rtol=0, atol=1e-5)
    assert moved[:, :, :, :2].abs().max() < 1e-5


def test_fonts_and_families_are_disjoint() -> None:
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    families: dict[str, set[str]] = {}
    for split, fonts in glyphs.FONTS.items():
        assert len(set(fonts)) == len(fonts)
        families[split] = set()
        for name in fonts:
            font = FT2Font(f"{get_data_path()}/fonts/ttf/{name}")
            charmap = font.get_charmap()
            assert all(ord(c) in charmap for characters, _ in glyphs.TASKS.values() for c in characters), name
            family = font.family_name
            families[split].add("Computer Modern" if family.startswith("cm") else family)
    assert families == {
        "train": {"DejaVu Sans", "DejaVu Serif", "STIXGeneral"},
        "val": {"DejaVu Sans Mono"},
        "test": {"Computer Modern"},
    }


def test_a_missing_font_or_glyph_is_named(tmp_path) -> None:
    with pytest.raises(SourceError, match=r"font nosuch\.ttf is missing"):
        glyphs.master(tmp_path / "nosuch.ttf", "A")
    from pathlib import Path

    from matplotlib import get_data_path

    font = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    with pytest.raises(SourceError, match="no glyph for ' '"):
        glyphs.master(font, " ")


def test_photo_regions_are_disjoint() -> None:
    owner = torch.zeros(427, 640, dtype=torch.int64)
    for split, count in {"train": 60, "val": 12, "test": 24}.items():
        own = photos.cells(split)
        assert len(own) == count
        for top, left in own:
            cell = owner[top : top + photos.CELL, left : left + photos.CELL]
            assert cell.shape == (photos.CELL, photos.CELL) and not cell.any()
            cell += 1
    noise = [torch.rand(3, 427, 640, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for split in ("train", "val", "test"):
        own = photos.cells(split)
        for _, (photograph, top, left, turns) in zip(range(200), photos.places(split, 0, noise), strict=False):
            corner = (top // photos.CELL * photos.CELL, left // photos.CELL * photos.CELL)
            last = ((top + photos.PATCH - 1) // photos.CELL, (left + photos.PATCH - 1) // photos.CELL)
            assert corner in own and last == (corner[0] // photos.CELL, corner[1] // photos.CELL)
            assert photograph in (0, 1) and turns in range(4)


def test_distortions_differ_and_keep_the_mean() -> None:
    x = torch.rand(4, 3, 32, 32)
    shown = [photos.distort(x, label) for label in range(4)]
    assert torch.equal(shown[0], x)
    for image in shown[1:]:
        assert image.shape == x.shape and not torch.allclose(image, x)
        assert abs(float(image.mean() - x.mean())) < 0.02
    assert torch.equal(shown[2][:, :, ::4, ::4], shown[2][:, :, 3::4, 3::4])
    assert len(shown[3][0].unique()) == 4 and shown[3][0].max() == x[0].max()


def test_normalize_is_applied_and_recorded(opened: dict[str, Source]) -> None:
    source = open_source("digits:plain", size=16, channels=3, normalize=([0.5, 0.4, 0.3], [0.2, 0.2, 0.5]))
    plain = to_channels(opened["digits:plain"].test.x, 3)  # type: ignore[attr-defined]
    torch.testing.assert_close(source.test.x[:, 2], (plain[:, 2] - 0.3) / 0.5)  # type: ignore[attr-defined]
    assert source.normalize == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.5])
    wrapped = NormalizedDataset(opened["digits:plain"].test, ([0.5], [0.25]))
    torch.testing.assert_close(wrapped[0][0], (opened["digits:plain"].test[0][0] - 0.5) / 0.25)
    assert apply_normalize(plain, None) is plain


def test_resize_and_channels() -> None:
    x = torch.rand(2, 3, 12, 8)
    assert resize(x, None) is x and resize(x, 5).shape == (2, 3, 5, 5)
    constant = torch.full((1, 1, 9, 9), 0.25)
    torch.testing.assert_close(resize(constant, 4), torch.full((1, 1, 4, 4), 0.25))
    grey = to_channels(x, 1)
    torch.testing.assert_close(to_channels(to_channels(grey, 3), 1), grey)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit:plain", "unknown source 'digit:plain'; did you mean 'digits:plain'"),
        ("digits:rotatd", "did you mean 'digits:rotated'"),
        ("glyphs", "unknown source 'glyphs'"),
        ("imagefoldr:/some/where", "did you mean 'imagefolder:/some/where'"),
        ("nothing at all", "known: digits:plain, .*npz:FILE, python:MODULE.FUNCTION"),
        ("npz:", "unknown source 'npz:'"),
        (3, "expected a string"),
    ],
)
def test_unknown_specs_get_a_suggestion(spec, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: expected a positive number of pixels, got 0"),
        ({"size": 16.0}, "size: expected"),
        ({"channels": 2}, "channels: expected 1"),
        ({"seed": -1}, "seed: expected"),
        ({"normalize": ([0.5], [0.0])}, "std > 0"),
        ({"normalize": ([float("nan")], [1.0])}, "finite"),
        ({"normalize": 3}, "two sequences"),
        ({"normalize": ([0.5] * 3, [0.5] * 3)}, "expected 1 or 1 values in mean and std, got 3 and 3"),
    ],
)
def test_bad_arguments(arguments, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source("digits:plain", **arguments)


def test_a_missing_dependency_names_the_extra() -> None:
    with pytest.raises(SourceError, match=r"needs scikit-learn.*pip install taps_ext\[demo\]"):
        require("taps_ext_no_such_module", "scikit-learn")


def test_array_dataset_and_source_check_their_input() -> None:
    x, y = torch.zeros(4, 1, 2, 2), torch.arange(4)
    data = ArrayDataset(x, y)
    assert len(data) == 4 and data[torch.tensor([1, 3])][1].tolist() == [1, 3]
    for bad_x, bad_y, message in [
        (x.double(), y, "x: expected float32"),
        (x[0], y, "x: expected"),
        (x, y.int(), "y: expected int64"),
        (x, y[:3], "4 images but y has 3"),
    ]:
        with pytest.raises(SourceError, match=message):
            ArrayDataset(bad_x, bad_y)
    with pytest.raises(SourceError, match=r"train labels span 0\.\.3, expected 0\.\.1 for 2 classes"):
        Source("s", data, None, data, classes=("a", "b"))
    with pytest.raises(SourceError, match="the test split is empty"):
        Source("s", data, None, ArrayDataset(x[:0], y[:0]), classes=tuple("abcd"))


def test_demo_sources_have_one_geometry() -> None:
    base, tasks = open_demo()
    assert base.name == BASE.spec == "digits:plain"
    assert list(tasks) == [task.name for task in TASKS] and len(tasks) >= 5
    assert {source.shape for source in (base, *tasks.values())} == {(CHANNELS, SIZE, SIZE)}
    assert len({source.name.split(":")[0] for source in tasks.values()}) == 3
    assert "450 test, 10 classes, 1x16x16" in base.summary()
