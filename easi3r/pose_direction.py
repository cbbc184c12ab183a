"""Given poses that fit the images only when inverted, found from the optical flow of a few pairs.

A pose sends what a pixel shows to a ray in the other image, one place per depth: from where it would be if infinitely
far, towards the epipole.  Flow that ends beside that ray, or behind its beginning, contradicts the pose; where the
camera only turns, the ray is a point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from easi3r.errors import InputError
from easi3r.geometry import invert_rigid, pixel_grid
from easi3r.structures import Array, Known, PairFlow

GAPS, MAX_GAP = (2, 6), 9  # frames between those of a pair: near for optical flow, and far to see some motion
PAIRS_PER_GAP = 3
MIN_VALID = 0.5  # of a pair's pixels, below which its optical flow is not trusted
MIN_FLOW_PX = 1.0  # median of a pair, below which nothing is said about it
SAMPLED_PIXELS = 2000
MAX_MISFIT = 0.005  # of the image's width, at least 1 px: poses that fit better are not doubted
FOCAL_GUESSES = np.geomspace(0.4, 2.5, 10)  # of the image's width, for frames whose K is not known


class _Matches(NamedTuple):
    """Where the pixels of one frame are in another; m of them."""

    first: int
    second: int
    here: Array  # [m, 2] pixels
    there: Array  # [m, 2]


def pairs_to_check(known: Known) -> Array:
    """[P, 2] int64: up to 6 pairs of frames with known poses, a few frames apart, spread over the clip."""
    poses = known.camera_to_world
    frames = [] if poses is None else np.flatnonzero(_posed(poses)).tolist()
    chosen: set[tuple[int, int]] = set()
    for gap in GAPS:
        later = {a: [b for b in frames if a < b <= a + MAX_GAP] for a in frames}
        pairs = [(a, min(later[a], key=lambda b: abs(b - a - gap))) for a in frames if later[a]]
        widest = max((b - a for a, b in pairs), default=0)
        pairs = [(a, b) for a, b in pairs if b - a > widest / 2]  # the last frames have but near neighbours
        chosen |= {pairs[k] for k in np.linspace(0, len(pairs) - 1, PAIRS_PER_GAP).round().astype(int) if pairs}
    return np.array(sorted(chosen), dtype=np.int64).reshape(-1, 2)


def check_direction(known: Known, flow: PairFlow, keyword: str = "camera_to_world") -> None:
    """Raise InputError when the poses fit the flow only if all of them are inverted.

    ``flow`` is that of `pairs_to_check`, in pixels of the network's images; ``keyword`` is the one that the poses were
    given by.  Up to half of the pixels of a pair may move on their own, and up to half of the pairs go wrong.  Says
    nothing where nothing moves, nor where neither direction fits.
    """
    poses = known.camera_to_world
    matches = [] if poses is None else _find_matches(poses, flow)
    if poses is None or not matches:
        return
    height, width = flow.valid.shape[1:]
    given = _misfit(poses, known.intrinsics, matches, width, height)
    inverted = _misfit(invert_rigid(poses), known.intrinsics, matches, width, height)
    fits = max(1.0, MAX_MISFIT * width)
    if given > fits and inverted < fits and inverted < given / 2:
        other = "world_to_camera" if keyword == "camera_to_world" else "camera_to_world"
        raise InputError(
            f"{keyword} fits the images only when inverted: the median distance of the optical flow from the epipolar "
            f"lines is {inverted:.1f} px inverted against {given:.1f} px as given; say {other}=... instead."
        )


def _posed(poses: Array) -> Array:
    """[n, 4, 4] -> [n] bool"""
    return np.asarray(np.isfinite(poses).all(axis=(1, 2)))


def _find_matches(poses: Array, flow: PairFlow) -> list[_Matches]:
    """Of the pairs that have poses, valid flow and motion."""
    posed = _posed(poses)
    grid = pixel_grid(*flow.valid.shape[1:]).astype(np.float64)
    matches = []
    for (a, b), vectors, valid in zip(flow.pairs.tolist(), flow.flow, flow.valid, strict=True):
        if a == b or not (posed[a] and posed[b]) or valid.mean() < MIN_VALID:
            continue
        step = 1 + int(valid.sum()) // SAMPLED_PIXELS
        here, moved = grid[valid][::step], vectors[valid][::step]
        if np.median(np.linalg.norm(moved, axis=1)) >= MIN_FLOW_PX:
            matches.append(_Matches(a, b, here, here + moved))
    return matches


def _misfit(poses: Array, intrinsics: Array | None, matches: list[_Matches], width: int, height: int) -> float:
    """Median over the pairs of the median distance in pixels, at the focal length that fits best where K is unknown."""
    misfits = []
    for guess in FOCAL_GUESSES:
        focal = guess * width
        guessed = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        matrices = np.tile(guessed, (len(poses), 1, 1))
        if intrinsics is not None:
            matrices = np.where(np.isnan(intrinsics), guessed, intrinsics)
        of_pairs = []
        for a, b, here, there in matches:
            b_from_a = invert_rigid(poses[b]) @ poses[a]
            of_pairs.append(np.median(_distance(here, there, b_from_a, matrices[a], matrices[b])))
        misfits.append(float(np.median(of_pairs)))
    return min(misfits)


def _distance(here: Array, there: Array, b_from_a: Array, k_a: Array, k_b: Array) -> Array:
    """[m] pixels from ``there`` [m, 2] to the nearest place where a point of any depth at ``here`` [m, 2] may be."""
    rays = np.column_stack([here, np.ones(len(here))]) @ np.linalg.inv(k_a).T
    turned, epipole = rays @ (k_b @ b_from_a[:3, :3]).T, k_b @ b_from_a[:3, 3]
    ahead = turned[:, 2] > 1e-6
    far = turned[:, :2] / np.where(ahead, turned[:, 2], 1.0)[:, None]
    towards = epipole[:2] - far * epipole[2]
    towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-12)
    offset = there - far
    along = np.maximum((offset * towards).sum(axis=1, keepdims=True), 0.0)
    distance: Array = np.where(ahead, np.linalg.norm(offset - along * towards, axis=1), np.inf)
    return distance
