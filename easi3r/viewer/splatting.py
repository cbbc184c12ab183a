"""Pictures of point clouds without a graphics library: square splats through a z-buffer, in numpy."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import cv2
import numpy as np

from easi3r.geometry import invert_rigid
from easi3r.structures import Array
from easi3r.viewer.cameras import View

MAX_RADIUS = 12  # pixels; what is nearer than this allows for looks like dots
_EMPTY = np.iinfo(np.uint64).max


class Picture(NamedTuple):
    """What a camera sees of a cloud."""

    image: Array  # [H, W, 3] uint8 RGB
    depth: Array  # [H, W] float32 z-depth, inf where nothing is


def splat(
    points: Array, colors: Array, size: Array | float, view: View, *, background: tuple[int, int, int] = (0, 0, 0)
) -> Picture:
    """Draw points as squares; the nearest one wins each pixel.

    points: [m, 3] float32, world frame.  colors: [m, 3] uint8.
    size: [m] or one for all: edge of a point's square in the scene's unit; in the picture its edge is an odd number of
    pixels, no less than perspective asks for, up to ``MAX_RADIUS`` to each side.
    """
    height, width = view.height, view.width
    to_camera = (view.intrinsics @ invert_rigid(np.asarray(view.camera_to_world, dtype=np.float64))[:3]).astype(
        np.float32
    )
    x, y, z = to_camera[:, :3] @ points.T + to_camera[:, 3:]  # x and y times z
    rows = np.flatnonzero(z > 0)
    x, y, z = x[rows], y[rows], z[rows]
    sizes = np.broadcast_to(np.asarray(size, dtype=np.float32), len(points))[rows]
    with np.errstate(over="ignore"):  # next to the camera's plane pixels are beyond every number: out of sight
        x, y = np.floor(x / z + 0.5), np.floor(y / z + 0.5)
        focal = np.float32(view.intrinsics[0, 0])
        radius = np.clip(np.ceil((sizes * focal / z - 1) / 2), 0, MAX_RADIUS)
    seen = (x >= -radius) & (x < width + radius) & (y >= -radius) & (y < height + radius)
    rows, x, y, z, radius = (values[seen] for values in (rows, x, y, z, radius))
    x, y, radius = (values.astype(np.int64) for values in (x, y, radius))
    # the bits of positive floats grow with their value: one integer orders by depth and remembers the point
    packed = z.view(np.uint32).astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)

    nearest = np.full((height, width), _EMPTY)
    for r in np.flatnonzero(np.bincount(radius)).tolist():
        chosen = radius == r
        padded = np.full((height + 2 * r, width + 2 * r), _EMPTY)
        np.minimum.at(padded.reshape(-1), (y[chosen] + r) * (width + 2 * r) + x[chosen] + r, packed[chosen])
        nearest = np.minimum(nearest, _window_minimum(padded, 2 * r + 1))

    empty = nearest == _EMPTY
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:] = background
    image[~empty] = colors[(nearest[~empty] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
    depth = (nearest >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return Picture(image, np.where(empty, np.float32(np.inf), depth))


def fill_holes(picture: Picture, *, rounds: int = 3) -> Array:
    """[H, W, 3] uint8: the image, with gaps of up to about ``2 * rounds`` pixels filled from what surrounds them.

    A pixel where nothing is takes the mean colour of its neighbours if at least five of the eight show something.
    """
    image, known = picture.image.astype(np.float32), np.isfinite(picture.depth)
    for _ in range(rounds):
        weight = known.astype(np.float32)
        count = cv2.boxFilter(weight, -1, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
        hole = ~known & (count > 4.5)
        if not hole.any():
            break
        total = cv2.boxFilter(image * weight[..., None], -1, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
        image[hole] = total[hole] / count[hole, None]
        known |= hole
    return np.rint(image).astype(np.uint8)


def _window_minimum(values: Array, length: int) -> Array:
    """[H + length - 1, W + length - 1] -> [H, W]: the least of each window of ``length`` x ``length``."""
    height, width = (edge - length + 1 for edge in values.shape)
    along = reduce(np.minimum, (values[:, k : k + width] for k in range(length)))
    return np.asarray(reduce(np.minimum, (along[k : k + height] for k in range(length))))
