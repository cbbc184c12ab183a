"""Masks that the user hands in: True (or 255 in a PNG) means that the pixel moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image

from easi3r.errors import InputError
from easi3r.structures import Array, Crop, DynamicMasks, Frames

NONE = "none"


def read_masks(given: Any, frames: Frames) -> DynamicMasks:
    """Bring given masks to the network's pixels; the score is the mask itself.

    given: 'none' (nothing moves); an array [n, H, W], bool or uint8 with 0 and 255, True / 255 = moves; or a folder
        of one PNG per frame, in the order of their names.  One mask per frame that was taken, at the size of the
        source frames or of the network's images.
    Raises InputError for another count, size or kind of values.
    """
    n, height, width = frames.images.shape[:3]
    if isinstance(given, str) and given == NONE:
        mask = np.zeros((n, height, width), dtype=bool)
    else:
        layers = _read_folder(Path(given)) if isinstance(given, (str, Path)) else list(np.asarray(given))
        if len(layers) != n:
            raise InputError(f"{len(layers)} masks were given for {n} frames; expected one mask per frame.")
        mask = np.stack(
            [_fit(layer, crop, i) for i, (layer, crop) in enumerate(zip(layers, frames.crops, strict=True))]
        )
    return DynamicMasks(score=mask.astype(np.float32), mask=mask, threshold=None)


def _read_folder(folder: Path) -> list[Array]:
    if not folder.is_dir():
        raise InputError(f"masks is {str(folder)!r}; expected an array, a folder of PNG files, or 'none'.")
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise InputError(f"The folder of masks {folder} holds no PNG file; expected one per frame, 255 = moves.")
    try:
        layers = [np.asarray(iio.imread(path)) for path in paths]
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"A mask in {folder} cannot be read as PNG: {error}.") from error
    return [layer[..., 0] if layer.ndim == 3 else layer for layer in layers]


def _fit(layer: Array, crop: Crop, index: int) -> Array:
    if layer.ndim != 2 or (layer.dtype != bool and not np.isin(layer, (0, 255)).all()):
        raise InputError(
            f"Mask {index} is {layer.dtype} of shape {layer.shape}; expected [H, W], bool or 0 and 255, 255 = moves."
        )
    moves = layer.astype(bool)
    size = (moves.shape[1], moves.shape[0])
    if size == crop.size:
        return moves
    if size != crop.original:
        raise InputError(
            f"Mask {index} is {size[0]}x{size[1]} pixels; expected the size of the source frames "
            f"({crop.original[0]}x{crop.original[1]}) or of the network's images ({crop.size[0]}x{crop.size[1]})."
        )
    x0, y0 = crop.offset
    resized = Image.fromarray(moves.astype(np.uint8) * 255).resize(crop.resized, Image.Resampling.NEAREST)
    return np.asarray(resized)[y0 : y0 + crop.size[1], x0 : x0 + crop.size[0]] > 0
