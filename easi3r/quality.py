"""Does a reconstruction explain what the images show?  Numbers, without ground truth; :mod:`easi3r.verdict` judges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from easi3r.errors import InputError
from easi3r.geometry import invert_rigid, pixel_grid, transform, unproject
from easi3r.structures import AlignedCameras, Array, PairFlow

SAMPLES = 8192  # pixels of a frame that are looked at, about; all of a small one
LEAST_PIXELS = 32  # of a pair, below which nothing is said about it
FAR_OFF = 0.01  # of the long side: flow that passed its own forward-backward check is hardly ever so wrong


@dataclass(frozen=True)
class Measurements:
    """Of one piece of a clip: one number per pair of its frames, each [P] float64; NaN = could not be measured.

    Lengths are shares of the images' long side.  What is not said to be of other pixels is of the static ones.
    """

    frame: Array  # the first of the pair, counted in the clip
    valid: Array  # share of all pixels whose optical flow is valid
    flow: Array  # median of |flow that cameras and depth induce - optical flow|
    flow_amount: Array  # median of |optical flow| of the same pixels
    flow_far_off: Array  # share of them whose residual exceeds FAR_OFF
    flow_moving: Array  # median residual of the pixels that are said to move
    depth: Array  # median of |log(z of a point in the second frame / depth of the second frame there)|
    parallax_deg: Array  # median angle between the rays from both cameras to a point


def measure(
    cameras: AlignedCameras, dynamic_mask: Array, flow: PairFlow | None, pairs: Array, *, start: int = 0
) -> Measurements:
    """Hold the cameras and depths of a piece against its optical flow, and against each other.

    dynamic_mask: [n, H, W] bool, True = moves.  flow: of these pairs, in any order; None: that part stays NaN.
    pairs: [P, 2] of frames of the piece; a frame paired with itself is left out.  start: the piece's first frame in the
    clip.  Raises InputError for masks of other frames.
    """
    if dynamic_mask.shape != cameras.depth.shape:
        raise InputError(f"The masks are {dynamic_mask.shape}; expected {cameras.depth.shape}, one per depth map.")
    height, width = cameras.depth.shape[1:]
    step = max(1, int(np.sqrt(height * width / SAMPLES)))
    intrinsics, poses = cameras.intrinsics.astype(np.float64), cameras.camera_to_world.astype(np.float64)
    points = unproject(cameras.depth[:, ::step, ::step], np.diag([1 / step, 1 / step, 1]) @ intrinsics)
    here, static = pixel_grid(height, width)[::step, ::step], ~dynamic_mask
    index = {} if flow is None else {(int(i), int(j)): k for k, (i, j) in enumerate(flow.pairs)}
    rows = []
    for i, j in pairs.tolist():
        if i == j:
            continue
        j_from_i = invert_rigid(poses[j]) @ poses[i]
        from_j = transform(points[i], j_from_i)
        z = np.where(from_j[..., 2] > 0, from_j[..., 2], np.nan)  # nothing is known of what is behind the camera
        there = (from_j @ intrinsics[j].T)[..., :2] / z[..., None]
        still, of_flow = static[i, ::step, ::step], [np.nan] * 5
        if flow is not None and (i, j) in index:
            seen, valid = flow.flow[index[i, j], ::step, ::step], flow.valid[index[i, j], ::step, ::step]
            of_flow = flow_numbers(there - here, seen, valid, still, max(height, width))
        column, row = (np.clip(np.nan_to_num(np.rint(there[..., d])), 0, (width, height)[d] - 1) for d in (0, 1))
        nearest = row.astype(np.intp), column.astype(np.intp)
        other = cameras.depth[j][nearest]
        met = still & static[j][nearest] & (np.abs(there - np.stack([column, row], -1)) <= 0.5).all(-1)
        met &= other > 0
        one, two = points[i][met], points[i][met] - invert_rigid(j_from_i)[:3, 3]  # from the one camera, and the other
        angle = np.rad2deg(np.arctan2(np.linalg.norm(np.cross(one, two), axis=-1), (one * two).sum(-1)))
        rows.append((start + i, *of_flow, median(np.abs(np.log(z[met] / other[met]))), median(angle)))
    return Measurements(*np.array(rows, dtype=np.float64).reshape(-1, 8).T)


def flow_numbers(induced: Array, seen: Array, valid: Array, still: Array, long_side: int) -> list[float]:
    """Measurements from ``valid`` to ``flow_moving``, of a pair; points behind the camera, whose
    induced flow is NaN, are far off.

    induced, seen: [H, W, 2] pixels.  valid, still: [H, W] bool.
    """
    residual = np.nan_to_num(np.linalg.norm(induced - seen, axis=-1) / long_side, nan=1.0).clip(0, 1)
    static, moving = residual[valid & still], residual[valid & ~still]
    amount = np.linalg.norm(seen[valid & still], axis=-1) / long_side
    far_off = float((static > FAR_OFF).mean()) if len(static) >= LEAST_PIXELS else np.nan
    return [float(valid.mean()), median(static), median(amount), far_off, median(moving)]


def median(values: Array) -> float:
    """NaN for too few."""
    return quantile(values) if len(values) >= LEAST_PIXELS else float("nan")


def quantile(values: Array, level: float = 0.5) -> float:
    """Of those that are known; NaN for none."""
    known = values[np.isfinite(values)]
    return float(np.quantile(known, level)) if len(known) else float("nan")
