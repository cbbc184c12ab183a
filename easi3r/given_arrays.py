"""Numbers that users hand in: arrays, tables in text files, .npy and .npz files, and which frames they belong to."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from easi3r.array_files import MAX_BYTES, npz_keys, read_npy, read_npz
from easi3r.errors import InputError
from easi3r.structures import Array, Crop
from easi3r.untrusted import read_bytes

MAX_TABLE = 1 << 28  # bytes of a text file: a few million rows
FRAMES = "frames"  # the key of an .npz file that says which frames its rows belong to


def summary(error: Exception) -> str:
    """The first sentence of another library's message, to stand within one of ours."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:80] or type(error).__name__


def to_array(given: Any, name: str, expected: str) -> Array:
    """float64 array of any shape; InputError, which says what was ``expected``, for what holds no numbers."""
    try:
        array = np.asarray(given)
        reason = f"of the type {type(given).__name__}"
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, a tensor on the GPU or with a gradient
        array, reason = np.array(""), f"no array ({summary(error)})"
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} is {reason}; expected {expected}.")
    return array.astype(np.float64)


def check_path(path: Path, name: str, expected: str) -> Path:
    """The path itself; InputError where nothing can be read there."""
    if not os.access(path, os.R_OK):
        raise InputError(f"{name} is {str(path)!r}, which does not exist or may not be read; expected {expected}.")
    return path


def read_table(path: Path) -> Array:
    """[rows, columns] float64 of a text file; columns end at spaces or commas, comments begin with '#'."""
    try:
        text = read_bytes(path, MAX_TABLE).decode("utf-8-sig")
        lines = [line.split("#")[0].replace(",", " ").split() for line in text.splitlines()]
        table = np.array([[float(word) for word in line] for line in lines if line], dtype=np.float64)
    except (OSError, ValueError) as error:  # words, columns that differ, no text at all
        raise InputError(
            f"{path} is no table of numbers ({summary(error)}); expected as many numbers in every row."
        ) from error
    if not table.size:
        raise InputError(f"{path} holds no numbers; expected at least one row.")
    return table


def load_array(path: Path, keys: Sequence[str], most_bytes: int = MAX_BYTES) -> tuple[str, Array, Array | None]:
    """(key, array, frames): the first of ``keys`` that an .npz file has and its 'frames', if any; or an .npy file's.

    An .npy file has no names: its array counts as that of the first key.  InputError for what holds no plain numbers,
    and for an .npz file with more than ``most_bytes`` of them.
    """
    try:
        if not zipfile.is_zipfile(path):
            return keys[0], read_npy(path), None
        present = npz_keys(path)
        key = next((key for key in keys if key in present), None)
        if key is not None:
            stored = read_npz(path, (key, FRAMES), most_bytes=most_bytes)
            return key, stored[key], stored.get(FRAMES)
    except Exception as error:  # damaged files make zipfile and NumPy raise errors of half a dozen types
        raise InputError(
            f"{path} cannot be read by numpy ({summary(error)}); write it anew with np.save or np.savez."
        ) from error
    raise InputError(f"{path} holds {', '.join(present)[:80] or 'nothing'}; expected the key {' or '.join(keys)}.")


def check_frames(given: Iterable[Any], num_frames: int, name: str) -> list[int]:
    """Frame indices as they were given; InputError unless there are some, in [0, num_frames), none of them twice."""
    index = list(given)
    whole = all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in index)
    if not whole or not index or not set(index) <= set(range(num_frames)) or len(set(index)) < len(index):
        shown = ", ".join(str(i)[:20] for i in index[:6]) + ", ..." * (len(index) > 6)
        raise InputError(
            f"{name} is for the frames [{shown}]; expected whole numbers from 0 to {num_frames - 1}, at least one and "
            f"none twice, since {num_frames} frames were taken."
        )
    return [int(i) for i in index]


def spread(rows: Array, index: Sequence[int], num_frames: int) -> Array:
    """[k, ...] rows of the frames ``index`` [k] -> [num_frames, ...] float64, NaN where there is none."""
    everywhere = np.full((num_frames, *rows.shape[1:]), np.nan)
    everywhere[list(index)] = rows
    return everywhere


def to_network(layer: Array, crop: Crop, name: str) -> Array:
    """[H, W] at the source's size or the network's -> at the network's, each pixel that of the nearest centre.

    What the crop shows beyond the source, the padding of a canvas, is 0.
    """
    width, height = layer.shape[1], layer.shape[0]
    if (width, height) == crop.size:
        return layer
    if (width, height) != crop.original:
        raise InputError(
            f"{name} is {width}x{height} pixels; expected the size of the source frames "
            f"({crop.original[0]}x{crop.original[1]}) or of the network's images ({crop.size[0]}x{crop.size[1]})."
        )
    (x0, y0), (width, height) = crop.offset, crop.size
    resized = Image.fromarray(layer.astype(np.float32)).resize(crop.resized, Image.Resampling.NEAREST)
    return np.asarray(resized.crop((x0, y0, x0 + width, y0 + height)))
