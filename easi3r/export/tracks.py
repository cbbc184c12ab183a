"""Static points with the pixels at which several frames see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.clouds import frame_clouds, merge, pick, select, thin
from easi3r.export.options import ExportOptions
from easi3r.geometry import depth_edges, invert_rigid
from easi3r.scene import PointCloud

if TYPE_CHECKING:
    from easi3r.scene import Scene
    from easi3r.structures import Array

SPLAT_POINTS = 100_000  # the default budget: what Gaussian splatting usually starts from
DEPTH_TOLERANCE = 0.02  # a frame sees a point if its depth there is the point's to this part
CANDIDATES = 4  # points that are tried for each one of the budget


@dataclass(frozen=True)
class Tracks:
    """m points and k observations of them, by point and then by frame."""

    cloud: PointCloud  # m rows, static
    point_index: Array  # [k] int64, ascending
    frame_index: Array  # [k] int64
    camera_points: Array  # [k, 3] float64, the point in the camera frame of the frame that sees it


def find_tracks(scene: Scene, options: ExportOptions) -> Tracks:
    """Sample static points and look for each in the frames 1, 2, 4, 8, ... before and after its own.

    Near frames tie the cameras together, far ones see the point from aside.  A frame sees a point that falls into its
    image, on a pixel that is static, confident, no depth edge and of the point's depth.  Points that one frame alone
    sees are left out, unless there is but one frame.  The observations are where the point falls by depth and cameras:
    a bundle adjustment reproduces them, and improves them once other measurements are added.
    """
    budget = options.max_points or SPLAT_POINTS
    candidates = merge(thin(frame_clouds(scene, options, keep="static"), CANDIDATES * budget))
    own = candidates.frame_index
    rows, frames, camera_points = [], [], []
    for i in options.progress(range(scene.num_frames), "tracks"):
        distance = np.abs(own - i)
        near = np.flatnonzero((distance & (distance - 1)) == 0)  # 0, or a power of two
        seen, positions = _see(scene, i, candidates.points[near], options.min_confidence)
        rows.append(near[seen])
        frames.append(np.full(len(positions), i))
        camera_points.append(positions)
    row, frame, position = np.concatenate(rows), np.concatenate(frames), np.concatenate(camera_points)
    views = np.bincount(row, minlength=len(own))
    good = np.flatnonzero(views >= min(2, scene.num_frames))
    good = good[pick(len(good), budget)]
    number = np.full(len(own), -1)
    number[good] = np.arange(len(good))
    kept = np.flatnonzero(number[row] >= 0)
    kept = kept[np.argsort(number[row[kept]], kind="stable")]
    return Tracks(select(candidates, good), number[row[kept]], frame[kept], position[kept])


def _see(scene: Scene, frame: int, points: Array, min_confidence: float) -> tuple[Array, Array]:
    """Which of ``points`` [p, 3] a frame sees: [p] bool, and [q, 3] float64 those in its camera frame."""
    depth, (height, width) = scene.depth[frame], scene.depth.shape[1:]
    usable = scene.valid_mask[frame] & ~scene.dynamic_mask[frame] & (scene.confidence[frame] >= min_confidence)
    usable &= ~depth_edges(depth)
    to_camera = invert_rigid(scene.camera_to_world[frame].astype(np.float64))
    positions = points.astype(np.float64) @ to_camera[:3, :3].T + to_camera[:3, 3]
    z = positions[:, 2]
    front = z > 0
    pixels = project(positions, scene.intrinsics[frame].astype(np.float64), front)
    x, y = np.rint(pixels).T
    inside = front & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column, row = np.where(inside, x, 0).astype(int), np.where(inside, y, 0).astype(int)
    seen = inside & usable[row, column] & (np.abs(depth[row, column] - z) <= DEPTH_TOLERANCE * z)
    return seen, positions[seen]


def project(camera_points: Array, intrinsics: Array, front: Array | bool = True) -> Array:
    """[p, 3] in the camera frame, K [3, 3] or [p, 3, 3] -> [p, 2] pixels; NaN where ``front`` is False."""
    z = np.where(front, camera_points[:, 2], np.nan)
    focal = np.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], axis=-1)
    return np.asarray(camera_points[:, :2] / z[:, None] * focal + intrinsics[..., :2, 2])
