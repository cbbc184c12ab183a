"""Pixels of the first frame that the user wants followed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from easi3r.errors import InputError
from easi3r.given_arrays import check_path, load_array, read_table, to_array
from easi3r.structures import Array, Frames

EXPECTED = "[t, 2] (x, y) pixels of the first source frame, 'x,y;x,y', 'grid:16', or a text, .npy or .npz (tracks) file"
GRID = "grid:"
LEAST_SIDE = 128  # pixels: the tracker looks at seven levels of half the image, each half of the one before


def read_queries(given: Any, frames: Frames) -> Array:
    """[t, 2] float64 (x, y) in pixels of the network's images.

    given: an array [t, 2] in pixels of the first source frame; 'x,y;x,y'; 'grid:16', so many points along the long side
        of what the network sees; or a file of rows.
    Raises InputError for anything else, and for pixels outside the part that the network sees.
    """
    height, width = frames.images.shape[1:3]
    if min(height, width) < LEAST_SIDE:
        raise InputError(
            f"Points cannot be tracked in images of {width} x {height} px; expected sides of at least {LEAST_SIDE} px, "
            "so choose a larger image_size."
        )
    if isinstance(given, str) and given.startswith(GRID):
        count = given.removeprefix(GRID)
        if not count.isdecimal() or not 0 < int(count) <= max(height, width):
            raise InputError(f"tracks is {given!r}; expected 'grid:' and how many points along the long side.")
        step = max(height, width) / int(count)
        x, y = (np.arange(step / 2, side, step) - 0.5 for side in (width, height))
        return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    source = _source_pixels(given)
    if source.ndim != 2 or source.shape[1] != 2 or not len(source):
        raise InputError(f"tracks is of shape {list(source.shape)}; expected {EXPECTED}.")
    pixels = source @ frames.crops[0].matrix()[:2, :2].T + frames.crops[0].matrix()[:2, 2]
    inside = ((pixels > -0.5) & (pixels < (width - 0.5, height - 0.5))).all(axis=1)
    if not inside.all():
        x, y = source[~inside][0]
        raise InputError(
            f"tracks names the pixel ({x:g}, {y:g}), which lies outside the part of the first frame that the network "
            "saw; choose others."
        )
    return np.asarray(pixels)


def _source_pixels(given: Any) -> Array:
    if (isinstance(given, str) and ";" in given) or (isinstance(given, str) and _numbers(given)):
        rows = [_numbers(row) for row in given.split(";") if row.strip()]
        if any(len(row) != 2 for row in rows):
            raise InputError(f"tracks is {given[:60]!r}; expected {EXPECTED}.")
        return np.array(rows, dtype=np.float64)
    if isinstance(given, (str, os.PathLike)):
        path = check_path(Path(given), "tracks", EXPECTED)
        return load_array(path, ("tracks",))[1] if path.suffix in (".npy", ".npz") else read_table(path)
    return to_array(given, "tracks", EXPECTED)


def _numbers(text: str) -> list[float]:
    """Those between commas; none where a word is among them."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        return []
