"""Printed characters, rendered from text fonts that matplotlib carries (DejaVu, STIX, BaKoMa).

The splits share no font and no family: networks train on DejaVu Sans, DejaVu Serif and STIX General (a
Times), validate on DejaVu Sans Mono and are tested on Computer Modern. Symbol fonts (cmex10, cmsy10,
STIXSiz*, STIXNonUni*, the DejaVu display cuts, LastResort) lack letters and are left out, as is the
mathematical italic cmmi10, a twin of cmti10 with old-style digits.
"""

from __future__ import annotations

import math
import string
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SourceError
from .source import (
    ArrayDataset,
    Options,
    Source,
    affine,
    finish,
    require,
    resize,
    split_generator,
    uniform,
)

TASKS = {
    "letters": (string.ascii_uppercase, "printed capital letters A-Z"),
    "lowercase": (string.ascii_lowercase, "printed small letters a-z"),
    "digits": (string.digits, "printed digits 0-9"),
}
FONTS: dict[str, tuple[str, ...]] = {
    "train": (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
        "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
        "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    ),
    "val": (
        "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf",
        "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    ),
    "test": ("cmr10.ttf", "cmb10.ttf", "cmti10.ttf", "cmss10.ttf", "cmtt10.ttf"),
}  # fmt: skip
DRAWS = {"letters": {"train": 10, "val": 5, "test": 8}, "lowercase": {"train": 10, "val": 5, "test": 8},
         "digits": {"train": 16, "val": 10, "test": 16}}  # fmt: skip
"""Images per font and character; each has its own size, place and slant."""

CANVAS, POINTS = 96, 64
"""Side of the master drawing and size of the font in it, pixels."""

LICENCE = "free fonts: DejaVu (Bitstream Vera licence), STIX, BaKoMa Computer Modern, from matplotlib"


def master(path: Path, characters: str) -> Tensor:
    """Each character drawn once, white on black, ink centred: float32 [len(characters), 1, CANVAS, CANVAS].

    Raises:
        SourceError: the font file is missing, or a character has no ink in it.
    """
    image, draw, fonts = (require(f"PIL.{name}", "pillow") for name in ("Image", "ImageDraw", "ImageFont"))
    try:
        font = fonts.truetype(str(path), POINTS)
    except OSError as error:
        raise SourceError(f"font {path.name} is missing from matplotlib's fonts or cannot be read") from error
    pages = []
    for character in characters:
        left, top, right, bottom = font.getbbox(character)
        if right <= left or bottom <= top:
            raise SourceError(f"font {path.name} has no glyph for {character!r}")
        page = image.new("L", (CANVAS, CANVAS), 0)
        corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
        draw.Draw(page).text(corner, character, fill=255, font=font)
        pages.append(torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(1, CANVAS, CANVAS))
    return torch.stack(pages).float().div_(255)


def open_glyphs(task: str, options: Options) -> Source:
    """One of `TASKS` at [channels, size, size]; defaults 1 and 16.

    Each image is a glyph at 85-130 % of the nominal size (capitals about half the side high), moved by up to
    1/10 of the side and turned by up to 12 degrees.

    Raises:
        SourceError: matplotlib or pillow is not installed, or a font is missing.
    """
    folder = Path(require("matplotlib", "matplotlib").get_data_path()) / "fonts" / "ttf"
    characters, text = TASKS[task]
    splits: dict[str, ArrayDataset] = {}
    for split, fonts in FONTS.items():
        draws = DRAWS[task][split]
        drawn = torch.cat([master(folder / name, characters) for name in fonts]).repeat(draws, 1, 1, 1)
        y = torch.arange(len(characters)).repeat(len(fonts) * draws)
        generator, count = split_generator(options.seed, split), len(y)
        angle = uniform(generator, count, -math.pi / 15, math.pi / 15)
        scale = uniform(generator, count, 0.85, 1.3)
        shift = torch.stack([uniform(generator, count, -0.1, 0.1) for _ in range(2)], 1)
        x = resize(affine(drawn, angle, scale, shift), options.size or 16)
        splits[split] = ArrayDataset(finish(x, options.channels, options.normalize), y)
    description = f"{text}; train, val and test use different font families (test: Computer Modern)"
    return Source(
        f"glyphs:{task}",
        **splits,
        classes=tuple(characters),
        description=description,
        licence=LICENCE,
        normalize=options.normalize,
    )
