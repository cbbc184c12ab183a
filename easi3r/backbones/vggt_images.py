"""How images are brought to the size that VGGT was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from easi3r.errors import InputError
from easi3r.structures import Array, Crop

LONG_SIDE = 518
PATCH = 14
WHITE = 255

Fit = Literal["crop", "pad"]


def plan_fit(size: tuple[int, int], fit: Fit = "crop") -> Crop:
    """Decide how an image of ``size`` (width, height) becomes VGGT's input.

    "crop": width 518, height in proportion and in whole patches, of which at most the central 518 rows stay.
    "pad": long side 518, the other in proportion and in whole patches, white to 518 x 518 (the offset is negative).

    >>> plan_fit((1280, 720)).size
    (518, 294)
    """
    width, height = size
    if fit == "pad" and height > width:
        resized = _in_patches(width * LONG_SIDE / height), LONG_SIDE
    else:
        resized = LONG_SIDE, _in_patches(height * LONG_SIDE / width)
    if min(resized) == 0:
        raise InputError(f"An image of {width} x {height} px is too narrow; expected sides within 1 : 74, so crop it.")
    if fit == "pad":
        offset = -((LONG_SIDE - resized[0]) // 2), -((LONG_SIDE - resized[1]) // 2)
        return Crop(size, resized, offset, (LONG_SIDE, LONG_SIDE))
    rows = min(resized[1], LONG_SIDE)
    return Crop(size, resized, (0, (resized[1] - rows) // 2), (LONG_SIDE, rows))


def plan_image(size: tuple[int, int], image_size: int | Literal["native"] | None) -> Crop:
    """Decide how a frame of ``size`` (width, height) becomes VGGT's input.

    image_size: None is the published way ("crop" of ``plan_fit``); a number is the long side, of which nothing is cut
    off; "native" keeps the scale and cuts to whole patches.

    >>> plan_image((720, 1280), None).size, plan_image((720, 1280), 518).size
    ((518, 518), (294, 518))
    """
    if image_size is None:
        return plan_fit(size)
    if image_size == "native":
        width, height = ((side // 2 * 2) // PATCH * PATCH for side in size)
        resized = size
    else:
        resized = width, height = (
            _in_patches(size[0] * image_size / max(size)),
            _in_patches(size[1] * image_size / max(size)),
        )
    if not (width and height):
        raise InputError(
            f"A frame of {size[0]} x {size[1]} px holds no whole patch of {PATCH} x {PATCH} px at image_size "
            f"{image_size}; choose a larger image_size or other frames."
        )
    return Crop(size, resized, (resized[0] // 2 - width // 2, resized[1] // 2 - height // 2), (width, height))


def prepare_images(images: Sequence[Array], fit: Fit = "crop") -> tuple[Array, tuple[Crop, ...]]:
    """Images [H, W, 3] RGB or [H, W, 4] RGBA uint8, of any sizes -> [n, H', W', 3] uint8 and how they got there.

    Transparency is blended on white.  Images that come out unequal are padded with white to the largest.
    """
    if not images:
        raise InputError("No image was given; expected at least one.")
    crops = [plan_fit((image.shape[1], image.shape[0]), fit) for image in images]
    width, height = (max(crop.size[axis] for crop in crops) for axis in (0, 1))
    crops = [_padded(crop, width, height) for crop in crops]
    return np.stack([apply_crop(image, crop) for image, crop in zip(images, crops, strict=True)]), tuple(crops)


def _in_patches(length: float) -> int:
    return round(length / PATCH) * PATCH


def _padded(crop: Crop, width: int, height: int) -> Crop:
    """The smaller half of the padding goes before the image."""
    x, y = crop.offset[0] - (width - crop.size[0]) // 2, crop.offset[1] - (height - crop.size[1]) // 2
    return Crop(crop.original, crop.resized, (x, y), (width, height))


def apply_crop(pixels: Array, crop: Crop) -> Array:
    """Resize, then cut out the crop's window, white where it leaves the image."""
    image = Image.fromarray(pixels)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image).convert("RGB")
    resized = np.asarray(image.resize(crop.resized, Image.Resampling.BICUBIC))
    (x, y), (width, height) = crop.offset, crop.size
    window = np.full((height, width, 3), WHITE, dtype=np.uint8)
    part = resized[max(y, 0) : max(y, 0) + height, max(x, 0) : max(x, 0) + width]
    window[max(-y, 0) :, max(-x, 0) :][: len(part), : part.shape[1]] = part[: height - max(-y, 0), : width - max(-x, 0)]
    return window
