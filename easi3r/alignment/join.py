"""Pieces of a long clip, each in its own world, become one: a robust similarity on the frames that two pieces share."""

from __future__ import annotations

import numpy as np
import torch

from easi3r.alignment.initialise import procrustes
from easi3r.geometry import transform, unproject
from easi3r.structures import AlignedCameras, Array

SEAM_POINTS = 20_000  # per seam, of the pixels that both pieces see
REWEIGHTINGS = 10


def join_piece(
    whole: AlignedCameras,
    piece: AlignedCameras,
    frames: range,
    shared: int,
    static: Array,
    *,
    keeps_poses: bool = False,
    keeps_scale: bool = False,
) -> float:
    """Write ``piece`` into its ``frames`` of ``whole``, in place, brought into the world of what is there already.

    shared: how many of the first of ``frames`` are there already; the later half of them is overwritten.
    static: [shared, H, W] bool, pixels that rest in both.
    keeps_poses: the piece's poses are in the whole's world already; keeps_scale: its depth is in the whole's unit.
    Returns the seam's residual: the median distance between the two pieces' points of the same pixels, over their
    median depth (0 where nothing is shared).
    """
    poses, depth, residual = piece.camera_to_world.astype(np.float64), piece.depth, 0.0
    if shared:
        there = slice(frames[0], frames[0] + shared)
        ours, theirs, weight = _points_of_both(whole, piece, there, shared, static)
        turn, shift, scale, residual = robust_similarity(theirs, ours, weight, with_scale=not keeps_scale)
        if keeps_poses:
            turn, shift = np.eye(3), np.zeros(3)
            scale = 1.0 if keeps_scale else float(np.median(whole.depth[there] / piece.depth[:shared]))
            origin = whole.camera_to_world[frames[0], :3, 3]
            residual = float(np.median(np.linalg.norm(scale * (theirs - origin) + origin - ours, axis=1)))
        residual /= float(np.median(whole.depth[there]))
        if not keeps_poses:
            poses[:, :3, 3] = scale * poses[:, :3, 3] @ turn.T + shift
            poses[:, :3, :3] = turn @ poses[:, :3, :3]
        depth = (scale * depth).astype(np.float32)
    target, fresh = later_half(frames, shared)
    whole.camera_to_world[target] = poses[fresh]
    whole.depth[target] = depth[fresh]
    whole.intrinsics[target] = piece.intrinsics[fresh]
    whole.confidence[target] = piece.confidence[fresh]
    return residual


def later_half(frames: range, shared: int) -> tuple[slice, slice]:
    """Where in the clip a piece's frames are written, and which of them: of those it shares, the later half."""
    kept = (shared + 1) // 2
    return slice(frames.start + kept, frames.stop), slice(kept, None)


def _points_of_both(
    whole: AlignedCameras, piece: AlignedCameras, there: slice, shared: int, static: Array
) -> tuple[Array, Array, Array]:
    """World points [N, 3] of the same pixels in either world, and weights [N]: the near and the certain say most."""
    chosen = np.flatnonzero(static.reshape(-1))
    if not len(chosen):
        chosen = np.arange(static.size)
    chosen = chosen[:: max(1, len(chosen) // SEAM_POINTS)]
    sides = [
        transform(unproject(cameras.depth[part], cameras.intrinsics[part]), cameras.camera_to_world[part])
        for cameras, part in ((whole, there), (piece, slice(0, shared)))
    ]
    ours, theirs = (side.reshape(-1, 3)[chosen].astype(np.float64) for side in sides)
    confidence = np.minimum(whole.confidence[there], piece.confidence[:shared]).reshape(-1)[chosen]
    return ours, theirs, np.log(np.maximum(confidence, 1.001)) / whole.depth[there].reshape(-1)[chosen]


def robust_similarity(
    source: Array, target: Array, weight: Array, *, with_scale: bool = True
) -> tuple[Array, Array, float, float]:
    """Rotation, translation, scale (1 without) of [N, 3] onto [N, 3], and the median residual.

    Minimises the weighted sum of distances (not of their squares), by reweighting: up to half may be wrong.
    """
    a, b, w = (torch.from_numpy(np.ascontiguousarray(x.T)).double() for x in (source, target, weight))
    reweighted = w
    for _ in range(REWEIGHTINGS):
        rotation, translation, scale = (x.double() for x in procrustes(a, b, reweighted, with_scale=with_scale))
        residual = (b - scale * rotation @ a - translation[:, None]).square().sum(0).sqrt()
        reweighted = w / residual.clamp(min=1e-3 * float(residual.median()) + 1e-12)
    return rotation.numpy(), translation.numpy(), float(scale), float(residual.median())
