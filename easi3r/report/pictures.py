"""Pictures of a result as data URIs: frames, colour-mapped values, masks over frames."""

from __future__ import annotations

import base64
from xml.etree.ElementTree import Element

import cv2
import numpy as np

from easi3r.report.markup import tag
from easi3r.structures import Array

LONG_SIDE = 320  # pixels of a picture at most: twice what a column of the film strip shows, for fine displays
JPEG_QUALITY = 80
NOTHING = (128, 128, 128)  # RGB of what is padding or unknown
MOVING = (255, 64, 32)  # RGB
VIRIDIS, CIVIDIS, MAGMA = cv2.COLORMAP_VIRIDIS, cv2.COLORMAP_CIVIDIS, cv2.COLORMAP_MAGMA


def sample(num_frames: int, at_most: int) -> list[int]:
    """Indices spread evenly over a clip, first and last among them.

    >>> sample(10, 4)
    [0, 3, 6, 9]
    """
    spread = np.linspace(0, num_frames - 1, min(num_frames, at_most))
    return [int(index) for index in spread.round()]


def picture(image: Array, text: str, *, exact: bool = False) -> Element:
    """An <img> of [H, W, 3] uint8 RGB, made smaller where it is larger than a page shows.

    exact: pixel for pixel (PNG), for what is no photograph; shown with hard edges.
    """
    factor = LONG_SIDE / max(image.shape[:2])
    if factor < 1:
        size = [max(1, round(factor * side)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    options = [] if exact else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(".png" if exact else ".jpg", np.ascontiguousarray(image[..., ::-1]), options)
    kind = "png" if exact else "jpeg"
    address = f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
    height, width = image.shape[:2]
    return tag("img", src=address, alt=text, title=text, width=width, height=height, class_="exact" if exact else "")


def colour(values: Array, low: float, high: float, colour_map: int) -> Array:
    """[H, W] values -> [H, W, 3] uint8 RGB, from ``low`` to ``high``; grey where not finite."""
    known = np.isfinite(values) & np.isfinite(high - low)
    unit = (np.where(known, values, 0) - np.nan_to_num(low)) / max(np.nan_to_num(high - low), 1e-12)
    mapped = cv2.applyColorMap((255 * unit.clip(0, 1)).round().astype(np.uint8), colour_map)[..., ::-1]
    return np.where(known[..., None], mapped, np.array(NOTHING, np.uint8))


def colour_bar(colour_map: int) -> Element:
    """The colours of a map from low to high, as an <img>."""
    return picture(colour(np.linspace(0, 1, 64)[None], 0, 1, colour_map), "from low to high", exact=True)


def overlay(image: Array, mask: Array) -> Array:
    """[H, W, 3] uint8: ``image`` [H, W, 3], paler and greyer where it rests, tinted and outlined where ``mask`` is."""
    grey = image.mean(axis=-1, keepdims=True)
    resting = 0.5 * image + 0.3 * grey + 40
    tinted = 0.55 * image + 0.45 * np.array(MOVING)
    picture = np.where(mask[..., None], tinted, resting).clip(0, 255).astype(np.uint8)
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).astype(bool)
    picture[mask & ~inside] = MOVING
    return picture
