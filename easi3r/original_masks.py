"""Masks and scores at the size of the source frames, along the edges of these frames.

A guided filter (He, Sun and Tang 2013, with a colour guide) in its fast form (He and Sun 2015, arXiv 1505.00996):
within small windows of the network's image, mask and score are written as linear functions of the colours; these
functions are enlarged, and applied to the colours of the source frame.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import cv2
import numpy as np

from easi3r.errors import InputError
from easi3r.export.views import source_crops, source_images
from easi3r.structures import Array, Crop

if TYPE_CHECKING:
    from easi3r.scene import Motion

logger = logging.getLogger("easi3r")

# Chosen on twelve rendered frames, enlarged four times (IoU with the true masks): masks that are right in the network's
# pixels 0.992, against 0.975 for linear interpolation and 0.972 for repeated pixels; masks that are as coarse as
# patches 0.848 against 0.809; with noise of 20 grey levels 0.985 and 0.843.  Wider windows bend coarse masks yet more
# to the image's edges, and lose what is thin.
RADIUS = 4  # of the windows, in the network's pixels
EPSILON = 1e-3  # variances of colours (0 to 1) that are well below it count as no edge


class OriginalMask(NamedTuple):
    """One frame of h x w pixels, as the source has it."""

    mask: Array  # [h, w] bool, True = moves
    score: Array  # [h, w] float32 in [0, 1]
    origin: Literal["given", "found", "guided", "interpolated"]  # as it was given; as it was found, pixel by pixel;
    # enlarged along the edges of the source frame; enlarged without it


def original_masks(motion: Motion, images: Iterable[Array] | None = None) -> Iterator[OriginalMask]:
    """Frame after frame, no more than one in memory; what the network did not see (``meta["crops"]``) is static, 0.

    Masks that were given at the source's size come out as they were given, beyond the crop too; masks that were given
    at the network's are repeated pixel by pixel.
    images: the source frames, each [h, w, 3] uint8 RGB; None: they are read from where they came from, and if they are
        no longer there, a warning says so and masks are interpolated.
    Raises InputError where the sizes of the source frames are unknown or ``images`` has other ones.
    """
    crops = source_crops(motion)
    if motion.given_masks is not None:
        for mask in motion.given_masks:
            yield OriginalMask(mask, mask.astype(np.float32), "given")
        return
    settings = motion.meta.get("settings", {}).get("motion", {})
    if settings.get("masks") is not None:
        for mask, crop in zip(motion.dynamic_mask, crops, strict=True):
            repeated = _to_source(mask.astype(np.uint8), crop, cv2.INTER_NEAREST) > 0
            yield OriginalMask(repeated, repeated.astype(np.float32), "given")
        return
    enlarged = any(max(crop.scale) < 1 for crop in crops)
    guides = _guides(motion, crops, images) if enlarged else iter([None] * len(crops))
    for i, (crop, guide) in enumerate(zip(crops, guides, strict=True)):
        yield _original_mask(motion.dynamic_mask[i], motion.dynamic_score[i], motion.images[i], crop, guide)


def _original_mask(mask: Array, score: Array, image: Array, crop: Crop, guide: Array | None) -> OriginalMask:
    """Of one frame: mask, score [H, W] and image [H, W, 3] of the network; guide: [h, w, 3] of the source, or None."""
    if crop.resized == crop.original:
        found = _to_source(mask.astype(np.uint8), crop, cv2.INTER_NEAREST) > 0
        return OriginalMask(found, _to_source(score, crop, cv2.INTER_NEAREST), "found")
    values: Array = np.dstack([mask, score]).astype(np.float32)
    if guide is None:
        if max(crop.scale) > 1:  # the network saw the frame enlarged
            values = np.asarray(cv2.blur(values, (max(1, round(crop.scale[0])), max(1, round(crop.scale[1])))))
        enlarged = _to_source(values, crop, cv2.INTER_LINEAR)
        return OriginalMask(enlarged[..., 0] > 0.5, enlarged[..., 1].clip(0, 1), "interpolated")
    enlarged = guided(values, image, guide, crop)
    return OriginalMask(_without_specks(enlarged[..., 0] > 0.5, crop), enlarged[..., 1].clip(0, 1), "guided")


def guided(values: Array, image: Array, guide: Array, crop: Crop, radius: int = RADIUS, eps: float = EPSILON) -> Array:
    """values: [H, W, C] float32 on ``image`` [H, W, 3] uint8 -> [h, w, C] float32 on ``guide`` [h, w, 3] uint8."""
    colors = _unit(image)

    def mean(pixels: Array) -> Array:
        flat = cv2.boxFilter(pixels.reshape(*pixels.shape[:2], -1), -1, (2 * radius + 1, 2 * radius + 1))
        return np.asarray(flat).reshape(pixels.shape)

    mean_colors, mean_values = mean(colors), mean(values)
    covariance = (
        mean(colors[..., :, None] * colors[..., None, :]) - mean_colors[..., :, None] * mean_colors[..., None, :]
    )
    shared = mean(colors[..., :, None] * values[..., None, :]) - mean_colors[..., :, None] * mean_values[..., None, :]
    slope = np.linalg.solve(covariance + eps * np.eye(3, dtype=np.float32), shared)  # [H, W, 3, C]
    offset = mean_values - np.einsum("hwk,hwkc->hwc", mean_colors, slope)
    source = _unit(guide)
    enlarged = []
    for slope_c, offset_c in zip(np.moveaxis(mean(slope), 3, 0), np.moveaxis(mean(offset), 2, 0), strict=True):
        linear = _to_source(np.dstack([slope_c, offset_c]), crop, cv2.INTER_LINEAR)
        enlarged.append(np.einsum("hwk,hwk->hw", linear[..., :3], source) + linear[..., 3])
    return np.stack(enlarged, axis=-1)


def _unit(image: Array) -> Array:
    """uint8 -> float32 from 0 to 1."""
    return image.astype(np.float32) / np.float32(255)


def _to_source(pixels: Array, crop: Crop, interpolation: int) -> Array:
    """[H, W] or [H, W, up to 4 channels] -> the same on the source's pixels [h, w(, channels)], 0 beyond the crop."""
    flags = interpolation | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(pixels, crop.matrix()[:2], crop.original, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    seen, beyond_cut = _seen(crop), np.zeros_like(moved)
    beyond_cut[seen] = moved[seen]
    return np.asarray(beyond_cut)


def _seen(crop: Crop) -> tuple[slice, slice]:
    """The rows and the columns of the source that the network saw."""
    spans = []
    for axis in (1, 0):
        at = (np.arange(crop.original[axis]) + 0.5) * crop.scale[axis] - crop.offset[axis]  # from the crop's border
        inside = np.flatnonzero((at >= 0) & (at < crop.size[axis]))
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0))
    return spans[0], spans[1]


def _without_specks(mask: Array, crop: Crop) -> Array:
    """[h, w] bool, each pixel the majority of about one of the network's pixels around it: smaller is texture."""
    seen, cleaned = _seen(crop), np.zeros_like(mask)
    window = 2 * round(0.5 / min(crop.scale)) + 1
    cleaned[seen] = cv2.medianBlur(mask[seen].astype(np.uint8), min(window, 255)) > 0
    return cleaned


def _guides(motion: Motion, crops: list[Crop], images: Iterable[Array] | None) -> Iterator[Array | None]:
    """The source frames; None for those that are gone, of which a warning is given once."""
    if images is not None:
        yield from _checked(images, crops)
        return
    count = 0
    try:
        for image in source_images(motion):
            yield image
            count += 1
    except InputError as error:
        reason = str(error).rpartition(";")[0] or str(error).rstrip(".")
        logger.warning("%s; from frame %d on masks are enlarged without the edges of the source frames", reason, count)
    yield from [None] * (len(crops) - count)


def _checked(images: Iterable[Array], crops: list[Crop]) -> Iterator[Array]:
    count = 0
    for count, (image, crop) in enumerate(zip(images, crops, strict=False), start=1):
        expected = (crop.original[1], crop.original[0], 3)
        if image.shape != expected or image.dtype != np.uint8:
            raise InputError(
                f"Image {count - 1} is {image.dtype} of shape {list(image.shape)}; expected a source frame, uint8 "
                f"{list(expected)}."
            )
        yield image
    if count < len(crops):
        raise InputError(f"{count} images were given for {len(crops)} frames; expected every source frame.")
