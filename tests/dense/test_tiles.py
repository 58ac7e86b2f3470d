"""Tiles of large images, and pictures of maps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from taps_ext.dense.tiles import starts, tiled
from taps_ext.errors import ConfigError
from taps_ext.plot.overlay import overlay, palette


@pytest.mark.parametrize("length, size, overlap", [(10, 10, 3), (37, 10, 3), (11, 10, 9), (100, 32, 0)])
def test_tiles_cover_a_side(length: int, size: int, overlap: int) -> None:
    found = starts(length, size, overlap)
    assert found[0] == 0
    assert found[-1] == length - size
    assert all(0 < b - a <= size - overlap for a, b in pairwise(found))


def test_a_model_of_single_pixels_gives_the_same_in_tiles() -> None:
    image = torch.randn(3, 37, 50)
    sizes = []

    def run(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(batch.shape))
        return torch.stack([batch.sum(1), batch[:, 0] * 2], 1)

    found = tiled(run, image, (16, 64), overlap=4, batch=2)
    expected = torch.stack([image.sum(0), image[0] * 2])
    assert torch.allclose(found, expected, atol=1e-5)  # a weighted mean of equal values in float32
    assert sizes == [(2, 3, 16, 50), (1, 3, 16, 50)]  # an image less wide than a tile is one tile wide


@pytest.mark.parametrize("shape", [(20, 20), (20, 200), (1, 1)], ids=["smaller", "lower", "pixel"])
def test_an_image_that_is_smaller_than_the_overlap_is_one_tile_there(shape: tuple[int, int]) -> None:
    image = torch.randn(3, *shape)
    assert torch.allclose(tiled(lambda batch: batch[:, :1], image, (64, 64), 32), image[:1], atol=1e-6)


def test_overlapping_tiles_are_weighed() -> None:
    calls = iter((1.0, 3.0))
    found = tiled(lambda batch: torch.full((1, 1, 4, 4), next(calls)), torch.zeros(1, 4, 6), (4, 4), 2, batch=1)
    # along the row tiles weigh 1 2 2 1 (each of 2): the second begins at 2
    expected = [1, 1, (2 * 1 + 1 * 3) / 3, (1 * 1 + 2 * 3) / 3, 3, 3]
    assert torch.allclose(found[0, 0], torch.tensor(expected))
    with pytest.raises(ConfigError, match=r"overlap: expected 0 to 3 pixels for tiles of \[4, 4\], got 4"):
        tiled(lambda batch: batch, torch.zeros(1, 8, 8), (4, 4), 4)


def test_pictures() -> None:
    assert (palette(20) * 255).round().int().tolist()[:3] == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert len({tuple(colour) for colour in palette(64).tolist()}) == 64
    image, outputs = torch.full((1, 2, 3), 0.5), torch.zeros(2, 2, 3)
    outputs[1, 0] = 9
    picture = overlay(image, outputs, "segmentation")
    assert picture.shape == (2, 3, 3)
    # 0.45 * 0.5 + 0.55 * colour, of 255
    assert picture[0, 0].tolist() == [round(255 * 0.225), round(255 * (0.225 + 0.55 * 128 / 255)), round(255 * 0.225)]
    edge = overlay(image, torch.tensor([[[99.0, -99.0, 0.0]] * 2]), "boundaries")
    assert edge[0, 0].tolist() == [255, 26, 26]
    assert edge[0, 1].tolist() == [128, 128, 128]
    far = overlay(image, torch.tensor([[[0.0, 0.5, 1.0]] * 2]), "distance")
    assert far[0, 2].tolist() == [250, 230, 38]
