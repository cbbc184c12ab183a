"""Which pixels move by more than a moving camera explains: optical flow against the epipolar geometry of its pair."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cv2
import numpy as np

from easi3r.geometry import pixel_grid
from easi3r.progress import Progress
from easi3r.structures import Array, PairFlow

MIN_POINTS = 64  # valid pixels of a pair, below which nothing is said about it
SAMPLED_POINTS = 400  # pixels that the fundamental matrix is found from
LEAST_SEEN = 1 / 3  # of a frame's pairs, in which a pixel's flow must be valid for its excess to be known
NOISE_LIMIT = 2.0  # deviations of a pair's flow from its epipolar lines, up to which they are noise
DEVIATION_OVER_MEDIAN = 1.4826  # of the distances of a normal distribution


def epipolar_residual(flow: PairFlow, num_frames: int, progress: Progress) -> Array:
    """[n, H, W] float32 pixels: median over a frame's pairs of the distance from its epipolar lines, NaN = unknown.

    Unknown is a pixel whose flow is nowhere valid.  What moves along its epipolar line is not seen.
    """
    return _median_over_pairs(flow, num_frames, progress, lambda distance: distance, 0.0)


def epipolar_excess(flow: PairFlow, num_frames: int, min_motion_px: float, progress: Progress) -> Array:
    """[n, H, W] float32: the same, each pair's distances divided by what counts as motion there: above 1, it moves.

    That is ``min_motion_px``, or NOISE_LIMIT times the noise of the pair's own flow where that is more: in a hand-held
    clip, and over long steps, flow is too noisy for one limit.  The noise is what the median distance says about it
    while most pixels stand still (Rousseeuw and Leroy 1987).  Unknown is a pixel whose flow is valid in less than
    LEAST_SEEN of the frame's pairs: where there and back rarely agree, they agree by chance.
    """

    def excess(distance: Array) -> Array:
        known = distance[~np.isnan(distance)]
        noise = DEVIATION_OVER_MEDIAN * float(np.median(known)) if len(known) else 0.0
        return distance / max(min_motion_px, NOISE_LIMIT * noise)

    return _median_over_pairs(flow, num_frames, progress, excess, LEAST_SEEN)


def _median_over_pairs(
    flow: PairFlow, num_frames: int, progress: Progress, measure: Callable[[Array], Array], least_seen: float
) -> Array:
    height, width = flow.flow.shape[1:3]
    medians = np.full((num_frames, height, width), np.nan, dtype=np.float32)
    first = flow.pairs[:, 0]
    for frame in progress(range(num_frames), "epipolar geometry"):
        of_pairs = [measure(sampson_distance(flow.flow[k], flow.valid[k])) for k in np.flatnonzero(first == frame)]
        if of_pairs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a pixel that is unknown in all pairs
                medians[frame] = np.nanmedian(np.stack(of_pairs), axis=0)
            seen = np.mean([~np.isnan(values) for values in of_pairs], axis=0)
            medians[frame][seen < least_seen - 1e-9] = np.nan
    return medians


def sampson_distance(flow: Array, valid: Array) -> Array:
    """[H, W] float32 distance in pixels of each match from the fundamental matrix of them all; NaN where not valid.

    flow: [H, W, 2].  valid: [H, W] bool.  The matrix is that of the least median of squares, so up to half of the
    pixels may move on their own; the distance is Sampson's (Hartley and Zisserman, eq. 11.9).
    """
    unknown = np.full(valid.shape, np.nan, dtype=np.float32)
    if valid.sum() < MIN_POINTS:
        return unknown
    here = pixel_grid(*valid.shape).astype(np.float64)
    there = here + flow
    step = max(1, int(valid.sum()) // SAMPLED_POINTS)
    cv2.setRNGSeed(0)
    matrix, _ = cv2.findFundamentalMat(here[valid][::step], there[valid][::step], cv2.FM_LMEDS)
    if matrix is None or matrix.shape != (3, 3):
        return unknown
    a, b = (np.concatenate([x, np.ones((*valid.shape, 1))], axis=-1) for x in (here, there))
    lines_there, lines_here = a @ matrix.T, b @ matrix
    size = np.hypot(
        np.hypot(*np.moveaxis(lines_there[..., :2], -1, 0)), np.hypot(*np.moveaxis(lines_here[..., :2], -1, 0))
    )
    distance = np.abs((b * lines_there).sum(-1)) / np.maximum(size, 1e-12)
    return np.where(valid, distance, np.nan).astype(np.float32)
