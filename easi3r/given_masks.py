"""Masks that the user hands in; what True (or 255 in a PNG) means is said, never guessed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from easi3r.decoding import image_size, natural_key, read_image
from easi3r.errors import InputError
from easi3r.given_arrays import to_network
from easi3r.mask_files import MEANINGS, read_meaning
from easi3r.structures import Array, Crop, DynamicMasks, Frames, PackedMasks
from easi3r.untrusted import list_folder

NONE = "none"
Polarity = Literal["moving", "static"]
TOO_MUCH = 0.8  # of a clip that moves: more is seen where masks are inverted


def read_masks(given: Any, frames: Frames, polarity: Polarity = "moving") -> DynamicMasks:
    """Bring given masks to the network's pixels, unchanged but for that; the score is the mask itself.

    given: 'none' (nothing moves, whatever the polarity); an array [n, H, W], bool or uint8 with 0 and 255; or a folder
        of one PNG per frame, in the order of their names.  One mask per frame that was taken, at the size of the
        source frames (these are kept too, as ``original``) or of the network's images.
    polarity: what True and 255 mean.
    Raises InputError for another count, size or kind of values, and for PNGs of ours that say the opposite of
    ``polarity`` themselves.
    """
    n, height, width = frames.images.shape[:3]
    if isinstance(given, str) and given.strip().lower() == NONE:
        mask = np.zeros((n, height, width), dtype=bool)
        return DynamicMasks(score=mask.astype(np.float32), mask=mask, threshold=None)
    from_folder = isinstance(given, (str, os.PathLike))
    layers = _list_folder(Path(given), frames.crops) if from_folder else _check_array(given)
    if len(layers) != n:
        raise InputError(f"{len(layers)} masks were given for {n} frames; expected one mask per frame.")
    packed = PackedMasks.pack(  # one bit per pixel from the start: a clip at its full size is large
        _as_bool(_read_file(layer, polarity) if from_folder else layer, i) == (polarity == "moving")
        for i, layer in enumerate(layers)
    )
    fitted = enumerate(zip(packed, frames.crops, strict=True))
    mask = np.stack([to_network(layer, crop, f"Mask {i}") > 0 for i, (layer, crop) in fitted])
    mask &= frames.valid_mask()
    of_source = all(
        size == crop.original and size != crop.size for size, crop in zip(packed.sizes, frames.crops, strict=True)
    )
    return DynamicMasks(mask.astype(np.float32), mask, threshold=None, original=packed if of_source else None)


def doubt_polarity(masks: DynamicMasks, polarity: Polarity) -> str | None:
    """A warning in one sentence where more than ``TOO_MUCH`` of the clip's pixels move by given masks, else None."""
    share = float(masks.mask.mean())
    if share <= TOO_MUCH:
        return None
    other = "static" if polarity == "moving" else "moving"
    return (
        f"The given masks say that {share:.0%} of the clip's pixels move, so their polarity may be inverted: True "
        f"(255) was taken for {polarity}; if it means {other}, say mask_polarity={other} (--mask-polarity {other})."
    )


def _check_array(given: Any) -> Array:
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, a tensor on the GPU or with a gradient
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"masks is no array ({reason}); expected [n, H, W], bool or 0 and 255.") from error
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise InputError(
            f"masks is {array.dtype} of shape {list(array.shape)}; expected an array [n, H, W], bool or 0 and 255, "
            "a folder of PNG files, or 'none'."
        )
    return array


def _list_folder(folder: Path, crops: Sequence[Crop]) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"masks is {str(folder)!r}; expected an array, a folder of PNG files, or 'none'.")
    paths = list_folder(folder, {".png"})
    if not paths:
        raise InputError(f"The folder of masks {folder} holds no PNG file; expected one per frame.")
    paths = sorted(paths, key=natural_key)
    sizes = {frozenset(size) for crop in crops for size in (crop.original, crop.size)}  # EXIF may turn an image
    for path in paths:  # asked of the headers first, lest small files that unpack to large images fill the memory
        width, height = image_size(path)
        if frozenset((width, height)) not in sizes:
            raise InputError(
                f"{path} is {width}x{height} pixels; expected the size of the source frames "
                f"({crops[0].original[0]}x{crops[0].original[1]}) or of the network's images."
            )
    return paths


def _read_file(path: Path, polarity: Polarity) -> Array:
    layer = np.asarray(read_image(path).max(axis=2))
    said = read_meaning(path)
    if said in MEANINGS.values() and said != MEANINGS[polarity]:
        other = "static" if polarity == "moving" else "moving"
        raise InputError(
            f"{path} says of itself that {said!r}, but mask_polarity is {polarity!r}; say mask_polarity={other!r}."
        )
    return layer


def _as_bool(layer: Array, index: int) -> Array:
    """[H, W] of True and False; InputError for other values than bool, or 0 and 255."""
    if layer.dtype != bool and not np.isin(layer, (0, 255)).all():
        values = np.unique(layer)
        shown = ", ".join(f"{value:g}" for value in values[:4]) + ", ..." * (len(values) > 4)
        raise InputError(f"Mask {index} holds the values {shown}; expected bool, or 0 and 255.")
    return layer.astype(bool)
