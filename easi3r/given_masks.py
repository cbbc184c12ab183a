"""Masks that the user hands in: True (or 255 in a PNG) means that the pixel moves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from easi3r.decoding import image_size, natural_key, read_image
from easi3r.errors import InputError
from easi3r.given_arrays import to_network
from easi3r.structures import Array, Crop, DynamicMasks, Frames
from easi3r.untrusted import list_folder

NONE = "none"


def read_masks(given: Any, frames: Frames) -> DynamicMasks:
    """Bring given masks to the network's pixels; the score is the mask itself.

    given: 'none' (nothing moves); an array [n, H, W], bool or uint8 with 0 and 255, True / 255 = moves; or a folder
        of one PNG per frame, in the order of their names.  One mask per frame that was taken, at the size of the
        source frames or of the network's images.
    Raises InputError for another count, size or kind of values.
    """
    n, height, width = frames.images.shape[:3]
    if isinstance(given, str) and given.strip().lower() == NONE:
        mask = np.zeros((n, height, width), dtype=bool)
    else:
        layers = (
            _read_folder(Path(given), frames.crops) if isinstance(given, (str, os.PathLike)) else _check_array(given)
        )
        if len(layers) != n:
            raise InputError(f"{len(layers)} masks were given for {n} frames; expected one mask per frame.")
        mask = np.stack(
            [_fit(layer, crop, i) for i, (layer, crop) in enumerate(zip(layers, frames.crops, strict=True))]
        )
    return DynamicMasks(score=mask.astype(np.float32), mask=mask, threshold=None)


def _check_array(given: Any) -> Array:
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:  # a ragged list, a tensor on the GPU
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"masks is no array ({reason}); expected [n, H, W], bool or 0 and 255.") from error
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise InputError(
            f"masks is {array.dtype} of shape {list(array.shape)}; expected an array [n, H, W], bool or 0 and 255, "
            "a folder of PNG files, or 'none'."
        )
    return array


def _read_folder(folder: Path, crops: Sequence[Crop]) -> list[Array]:
    if not folder.is_dir():
        raise InputError(f"masks is {str(folder)!r}; expected an array, a folder of PNG files, or 'none'.")
    paths = list_folder(folder, {".png"})
    if not paths:
        raise InputError(f"The folder of masks {folder} holds no PNG file; expected one per frame, 255 = moves.")
    paths = sorted(paths, key=natural_key)
    sizes = {frozenset(size) for crop in crops for size in (crop.original, crop.size)}  # EXIF may turn an image
    for path in paths:  # asked of the headers first, lest small files that unpack to large images fill the memory
        width, height = image_size(path)
        if frozenset((width, height)) not in sizes:
            raise InputError(
                f"{path} is {width}x{height} pixels; expected the size of the source frames "
                f"({crops[0].original[0]}x{crops[0].original[1]}) or of the network's images."
            )
    return [read_image(path).max(axis=2) for path in paths]


def _fit(layer: Array, crop: Crop, index: int) -> Array:
    """[H, W] of the source's size or the network's -> bool at the network's."""
    if layer.dtype != bool and not np.isin(layer, (0, 255)).all():
        values = np.unique(layer)
        shown = ", ".join(f"{value:g}" for value in values[:4]) + ", ..." * (len(values) > 4)
        raise InputError(f"Mask {index} holds the values {shown}; expected bool, or 0 and 255, 255 = moves.")
    return to_network(layer.astype(bool), crop, f"Mask {index}") > 0
