"""The true pointmaps of a rendered clip's pairs, spoilt in a known way: a network's stand-in (test support)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from easi3r.demo.rendering import Clip
from easi3r.structures import PairPredictions

Array = NDArray[Any]


def synthetic_predictions(clip: Clip, pairs: Array, *, hard: bool, seed: int, noise: float = 1.0) -> PairPredictions:
    """The true points of every pair [P, 2] in the first view's camera frame, times noise, as float32 predictions.

    Easy: one scale per pair (20 %), one factor per pixel (2 %), and 30 % of the moving pixels off by 40 %. Hard adds
    smooth distortions (5 %) and a wrong relative pose (2 degrees, 3 % of the median depth of the first frame).
    ``noise`` multiplies every deviation: 0 gives the truth. Each pair draws its own numbers, so that its easy noise
    is the same in the hard case.
    """
    points_first, points_second = [], []
    for index, (a, b) in enumerate(np.asarray(pairs)):
        rng = np.random.default_rng([seed, index])
        a_from_b = np.linalg.inv(clip.camera_to_world[a]) @ clip.camera_to_world[b]
        pair_factor = np.exp(0.2 * noise * rng.standard_normal())
        first = pair_factor * _pixel_factor(clip.dynamic_mask[a], noise, rng)
        second = pair_factor * _pixel_factor(clip.dynamic_mask[b], noise, rng)
        if hard:
            first *= _smooth_factor(first.shape, noise, rng)
            second *= _smooth_factor(second.shape, noise, rng)
            a_from_b = a_from_b @ _pose_error(float(np.median(clip.depth[a])), noise, rng)
        points_first.append(clip.points(a) * first[..., None])
        second_points = clip.points(b) @ a_from_b[:3, :3].T + a_from_b[:3, 3]
        points_second.append(second_points * second[..., None])
    size = (len(points_first), *clip.depth.shape[1:])
    return PairPredictions(
        pairs=np.asarray(pairs, dtype=np.int64),
        points_first=torch.from_numpy(np.stack(points_first)).float(),
        points_second=torch.from_numpy(np.stack(points_second)).float(),
        confidence_first=torch.full(size, 8.0),
        confidence_second=torch.full(size, 6.0),
    )


def _pixel_factor(dynamic_mask: Array, noise: float, rng: np.random.Generator) -> Array:
    factor = 1 + 0.02 * noise * rng.standard_normal(dynamic_mask.shape)
    spoilt = dynamic_mask & (rng.random(dynamic_mask.shape) < 0.3)
    return np.where(spoilt, np.exp(0.4 * noise * rng.standard_normal(dynamic_mask.shape)), 1.0) * factor


def _smooth_factor(shape: tuple[int, ...], noise: float, rng: np.random.Generator) -> Array:
    grid = torch.from_numpy(0.05 * noise * rng.standard_normal((1, 1, 3, 4)))
    smooth = torch.nn.functional.interpolate(grid, size=list(shape), mode="bicubic", align_corners=True)
    return np.asarray(smooth[0, 0].exp().numpy())


def _pose_error(median_depth: float, noise: float, rng: np.random.Generator) -> Array:
    error = np.eye(4)
    error[:3, :3] = Rotation.from_rotvec(np.deg2rad(2.0) / 1.7 * noise * rng.standard_normal(3)).as_matrix()
    error[:3, 3] = 0.03 * median_depth * noise * rng.standard_normal(3)
    return error
