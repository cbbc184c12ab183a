"""From "up to scale" to the user's unit: one factor for depth and poses together, so that they stay one world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from easi3r.errors import InputError
from easi3r.geometry import unproject
from easi3r.structures import AlignedCameras, Array, Frames, Known

EXPECTED = (
    "'poses' (with camera_to_world or world_to_camera), 'depth' (with depth), or the distance between two pixels as "
    "frame,x1,y1,x2,y2,distance in pixels of the source frames"
)


@dataclass(frozen=True)
class Distance:
    """Between the points that two pixels of one frame show."""

    frame: int
    pixels: Array  # [2, 2] (x, y) of the network's image
    distance: float  # in the user's unit


def read_scale(given: Any, known: Known, frames: Frames) -> Distance | None:
    """Check ``scale_from`` before any work; a distance comes back with its pixels in the network's image.

    Raises InputError for what is neither, lies outside the image, or asks for what is not given.
    """
    if given is None:
        return None
    if isinstance(given, str) and given.strip() in ("poses", "depth"):
        asked = given.strip()
        if asked == "poses" and not known.poses_set_the_scale:
            raise InputError(
                "scale_from is 'poses', but no two given poses lie apart; expected camera_to_world of two."
            )
        if asked == "depth" and not known.depth_sets_the_scale:
            raise InputError("scale_from is 'depth', but no depth is given; expected depth=... in the unit you want.")
        return None
    numbers = _numbers(given)
    frame, (x1, y1, x2, y2), distance = int(numbers[0]), numbers[1:5], numbers[5]
    if known.poses_set_the_scale or known.depth_sets_the_scale:
        raise InputError("scale_from is a distance, but given poses or depths set the scale already; leave one out.")
    if frame != numbers[0] or not 0 <= frame < frames.num_frames or not (np.isfinite(distance) and distance > 0):
        raise InputError(
            f"scale_from names frame {numbers[0]:g} and distance {distance:g}; expected a frame from 0 to "
            f"{frames.num_frames - 1} and a distance above 0."
        )
    source = np.array([[x1, y1, 1], [x2, y2, 1]]) @ frames.crops[frame].matrix().T
    pixels, (height, width) = source[:, :2], frames.images.shape[1:3]
    if not ((pixels > -0.5).all() and (pixels < (width - 0.5, height - 0.5)).all()):
        raise InputError(
            f"scale_from names the pixels ({x1:g}, {y1:g}) and ({x2:g}, {y2:g}), of which one lies outside the part "
            f"of the {'x'.join(map(str, frames.crops[frame].original))} frame that the network saw; choose others."
        )
    if np.array_equal(pixels.round(), pixels[::-1].round()):
        raise InputError("scale_from names one pixel twice; expected two that show points apart.")
    return Distance(frame, pixels, float(distance))


def _numbers(given: Any) -> list[float]:
    parts = given.split(",") if isinstance(given, str) else given
    try:
        numbers = [float(part) for part in parts] if isinstance(parts, (Sequence, np.ndarray)) else []
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 6:
        raise InputError(f"scale_from is {str(given)[:60]!r}; expected {EXPECTED}.")
    return numbers


def with_distance(cameras: AlignedCameras, known_distance: Distance) -> AlignedCameras:
    """Depth and poses times the factor that makes the two points so far apart."""
    frame, pixels = known_distance.frame, known_distance.pixels.round().astype(int)
    points = unproject(cameras.depth[frame].astype(np.float64), cameras.intrinsics[frame].astype(np.float64))
    first, second = points[pixels[:, 1], pixels[:, 0]]
    factor = known_distance.distance / max(float(np.linalg.norm(first - second)), 1e-12)
    poses = cameras.camera_to_world.copy()
    poses[:, :3, 3] *= factor
    return replace(cameras, camera_to_world=poses, depth=(factor * cameras.depth).astype(np.float32))
