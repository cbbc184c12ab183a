"""Pinhole cameras and rigid motions in numpy (saved scenes open without torch).

Axes are OpenCV's: x right, y down, z forward.  The centre of the top-left pixel is (0, 0), so ``u = fx X / Z + cx``.
"""

from __future__ import annotations

import numpy as np

from easi3r.structures import Array


def pixel_grid(height: int, width: int) -> Array:
    """[H, W, 2] float32 of (x, y)."""
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.stack([columns, rows], axis=-1)


def unproject(depth: Array, intrinsics: Array) -> Array:
    """z-depth [..., H, W] and K [..., 3, 3] -> points [..., H, W, 3] in the camera's frame."""
    grid = pixel_grid(*depth.shape[-2:])
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    x = (grid[..., 0] - cx) / fx * depth
    y = (grid[..., 1] - cy) / fy * depth
    return np.stack([x, y, depth], axis=-1)


def transform(points: Array, matrix: Array) -> Array:
    """Apply [..., 4, 4] to points [..., H, W, 3]."""
    rotation, translation = matrix[..., :3, :3], matrix[..., None, None, :3, 3]
    return np.asarray(np.einsum("...ij,...hwj->...hwi", rotation, points)) + translation


def invert_rigid(matrix: Array) -> Array:
    """Inverse of rigid [..., 4, 4], without a general solve."""
    inverse = np.zeros_like(matrix)
    rotation = np.swapaxes(matrix[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, matrix[..., :3, 3])
    inverse[..., 3, 3] = 1
    return inverse


def induced_flow(depth: Array, intrinsics: Array, other_intrinsics: Array, pose: Array, other_pose: Array) -> Array:
    """[H, W, 2] float64: the flow of a frame with z-depth [H, W] to another, if nothing moves but the camera.

    intrinsics: [3, 3].  poses: [4, 4] camera-to-world.  NaN where a point lies behind the other camera.
    """
    other_from_this = invert_rigid(other_pose.astype(np.float64)) @ pose.astype(np.float64)
    points = transform(unproject(depth.astype(np.float64), intrinsics.astype(np.float64)), other_from_this)
    z = np.where(points[..., 2:] > 0, points[..., 2:], np.nan)
    there = (points @ other_intrinsics.T.astype(np.float64))[..., :2] / z
    return np.asarray(there - pixel_grid(*depth.shape))


def depth_edges(depth: Array, tolerance: float = 0.05) -> Array:
    """z-depth [..., H, W] -> [..., H, W] bool: pixels on either side of a discontinuity, and those hanging between.

    Inverse depth is linear in the pixels of a plane.  So two neighbours are torn apart where inverse depth jumps
    between them, and bends beside the jump, both by more than ``tolerance`` of its value at the nearer one: a floor
    seen at a grazing angle jumps and does not bend, a fold bends and does not jump.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # depth that is 0 or not finite makes no edge
        inverse = 1 / depth
        edges = np.zeros(depth.shape, dtype=bool)
        for along, marked in ((inverse, edges), (inverse.swapaxes(-1, -2), edges.swapaxes(-1, -2))):
            jump = np.diff(along)
            bend = np.zeros_like(along)  # none is known at the image's border
            bend[..., 1:-1] = np.abs(np.diff(jump))
            least = tolerance * np.maximum(along[..., :-1], along[..., 1:])
            torn = (np.abs(jump) > least) & (np.maximum(bend[..., :-1], bend[..., 1:]) > least)
            marked[..., :-1] |= torn
            marked[..., 1:] |= torn
    return edges
