"""Floaters: points in front of a surface that another frame saw, and saw better."""

from __future__ import annotations

import numpy as np

from easi3r.geometry import invert_rigid, unproject
from easi3r.structures import Array

LEAST = 1.0  # the confidence of a point that nothing speaks for
_CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)[..., None]  # (y, x) from the top left one


def clean_confidence(
    depth: Array,
    confidence: Array,
    intrinsics: Array,
    camera_to_world: Array,
    dynamic_mask: Array,
    pairs: Array,
    *,
    tolerance: float = 0.05,
) -> Array:
    """[n, H, W]: the confidence, but 1 (the least there is) at points through which a more confident frame looks.

    depth: [n, H, W] z-depth.  confidence: [n, H, W], 1 or more.  intrinsics: [n, 3, 3] in pixels.
    camera_to_world: [n, 4, 4], OpenCV axes.  dynamic_mask: [n, H, W] bool, True = moves.
    pairs: [P, 2], directed: points of the first frame are held against the second one; their order does not matter.
    tolerance: how much nearer than the surface behind it a point may be, as a fraction of the surface's z-depth.

    A frame looks through a point that is nearer than all four pixels about its projection, if the nearest of them is
    more confident than the point (beyond an outline the nearest pixel alone often shows the background).  Moving
    pixels neither lose nor take: what moves was rightly in front of what is seen behind it at another time.
    """
    cleaned = confidence.copy()
    world_to_camera = invert_rigid(camera_to_world)
    last = np.array(depth.shape[1:], dtype=np.float32) - 1
    for i in np.unique(pairs[:, 0]):
        asked = ~dynamic_mask[i] & (confidence[i] > LEAST)
        points, own = unproject(depth[i], intrinsics[i].astype(np.float32))[asked], confidence[i][asked]
        lost = np.zeros(len(points), dtype=bool)
        for j in pairs[pairs[:, 0] == i, 1]:
            camera = (intrinsics[j] @ (world_to_camera[j] @ camera_to_world[i])[:3]).astype(np.float32)
            x, y, z = camera[:, :3] @ points.T + camera[:, 3:]  # x and y times z
            margin = z / 2
            seen = (z > 0) & (x > -margin) & (x < last[1] * z + margin) & (y > -margin) & (y < last[0] * z + margin)
            z, projection = z[seen], np.stack([y[seen], x[seen]]) / z[seen]
            corner, nearest = np.floor(projection), _inside(np.rint(projection), last)
            about = [depth[j][_inside(corner + step, last)] for step in _CORNERS]
            through = z < (1 - tolerance) * np.minimum.reduce(about)
            lost[seen] |= through & (own[seen] < confidence[j][nearest]) & ~dynamic_mask[j][nearest]
        cleaned[i][asked] = np.where(lost, LEAST, own)
    return cleaned


def _inside(pixels: Array, last: Array) -> tuple[Array, Array]:
    """Whole (y, x) [2, m] as an index; what is beyond the image, whose ``last`` pixel is given, moves to its border."""
    rows, columns = np.clip(pixels, 0, last[:, None]).astype(np.intp)
    return rows, columns
