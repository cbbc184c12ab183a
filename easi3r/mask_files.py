"""PNG files that say what they hold: masks carry their polarity in themselves, in PNG's text chunk 'Description'."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
from PIL import PngImagePlugin

from easi3r.structures import Array
from easi3r.untrusted import open_image

KEYWORD = "Description"  # one of the keywords that PNG's specification has for text
MEANINGS = {  # of 255 in a mask, by polarity
    "moving": "255 = moves (dynamic), 0 = static",
    "static": "255 = static, 0 = moves (dynamic) or is no part of the scene",
}


def write_png(path: Path, pixels: Array, meaning: str | None = None) -> None:
    """[h, w] or [h, w, channels], uint8 or uint16; in one piece, so that a full disk is one clean OSError.

    meaning: what the values mean, for whoever opens the file.
    """
    text = PngImagePlugin.PngInfo()
    if meaning is not None:
        text.add_text(KEYWORD, meaning)
    path.write_bytes(iio.imwrite("<bytes>", pixels, extension=".png", pnginfo=text))


def read_meaning(path: Path) -> str | None:
    """What a PNG file says that its values mean; None where it says nothing."""
    with open_image(path) as image:
        meaning = image.info.get(KEYWORD)
    return meaning if isinstance(meaning, str) else None
