"""By which rules a number came about: protocols by name, and the scores of one sequence under one of them.

Figures of different protocols are not comparable, however alike they look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.spatial import cKDTree

from easi3r.errors import InputError
from easi3r.geometry import transform, unproject
from easi3r.metrics import (
    BOUNDARY_TOLERANCE,
    Alignment,
    absolute_trajectory_error,
    boundary_f,
    depth_errors,
    jaccard,
    point_cloud_errors,
    relative_pose_errors,
    umeyama,
)
from easi3r.structures import Array, Crop
from evaluation.datasets.sequence import Sequence
from evaluation.methods import Estimate

CLOUD_POINTS = 1_000_000  # of a sequence, at most, drawn at random

CLOUD_NUMBERS = "accuracy", "accuracy median", "completeness", "completeness median", "distance", "distance median"
NUMBERS = "ATE", "RTE", "RRE deg", "AbsRel", "delta 1.25", *CLOUD_NUMBERS  # of a sequence, beside J and F


@dataclass(frozen=True)
class Protocol:
    """What is compared, how it is aligned, and over what the mean is taken."""

    name: str
    source: str  # who scores like this
    mask_size: Literal["network", "native"]  # in which pixels: the truth is brought there, or the prediction back
    pooling: Literal["frames", "sequences"]  # of J and F: all frames alike, or the mean of each sequence's statistics
    skip_ends: bool  # J and F leave out each sequence's first and last frame
    frames: Mapping[str, slice] = field(default_factory=dict)  # data set -> which frames; all of those not named
    depth_alignment: Alignment = "scale"  # one for all pixels of a sequence
    boundary_tolerance: float = BOUNDARY_TOLERANCE  # of F, as a part of the image diagonal, rounded up to pixels
    point_clouds: bool = False  # compared too, where depth, poses and intrinsics are known

    def frames_of(self, dataset: str) -> slice:
        """Which frames of a sequence of that data set."""
        return self.frames.get(dataset, slice(None))

    def describe(self, dataset: str) -> dict[str, str]:
        """In words, for the head of a table."""
        chosen = self.frames_of(dataset)
        ends = f"{chosen.start or 0} to {'the last' if chosen.stop is None else chosen.stop - 1}"
        pixels = {
            "network": "in the network's crop, the truth brought there by nearest neighbour",
            "native": "in the pixels of the files, the prediction brought back by nearest neighbour (static outside "
            "its crop)",
        }[self.mask_size]
        counted = "the first and last frame left out" if self.skip_ends else "every frame counts"
        pooled = {
            "frames": "J and F over the frames of all sequences together",
            "sequences": "mean over sequences of each one's J and F",
        }[self.pooling]
        depth = {"none": "as it is", "scale": "median scale", "scale+shift": "least-squares scale and shift"}
        clouds = f"; point clouds after Sim(3) of matched points, {CLOUD_POINTS:,} of them at most"
        return {
            "protocol": f"{self.name} ({self.source}): masks merged and {pixels}, {counted}; {pooled}; F within "
            f"{self.boundary_tolerance:g} of the diagonal; recall above 0.5",
            "frames": f"{ends} of each sequence",
            "stride": str(chosen.step or 1),
            "alignment": "ATE after Sim(3) of the positions, RTE and RRE by its scale with delta 1 over all pairs; "
            f"depth in the network's crop, {depth[self.depth_alignment]} per sequence"
            + (clouds if self.point_clouds else ""),
        }


@dataclass(frozen=True)
class Scores:
    """Of one sequence: J and F of each frame that counts, and what NUMBERS lists, as far as truth and estimate go."""

    frames: Array | None  # [k] int64: which of the sequence's frames count for J and F
    jaccard: Array | None  # [k] float64
    boundary_f: Array | None  # [k] float64
    numbers: dict[str, float]


# Monst3r takes 90 frames of a TUM sequence, every third of its first 270.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="easi3r",
            source="Easi3R, arXiv 2503.24391, after DAS3R",
            mask_size="network",
            pooling="frames",
            skip_ends=False,
            frames={
                "tum": slice(0, None, 30),
                "dycheck": slice(0, None, 10),
                "adt": slice(0, None, 5),
                "bonn": slice(30, 140),
            },
            point_clouds=True,
        ),
        Protocol(
            name="davis",
            source="the toolkit of DAVIS 2016",
            mask_size="native",
            pooling="sequences",
            skip_ends=True,
        ),
        Protocol(  # the paper says no more than the mean over sequences; crop and frames are those it compares with
            name="vggt4d",
            source="VGGT4D, arXiv 2511.19971; crop and frames as in easi3r, which the paper leaves open",
            mask_size="network",
            pooling="sequences",
            skip_ends=False,
        ),
        Protocol(
            name="monst3r",
            source="MonST3R, arXiv 2410.03825",
            mask_size="network",
            pooling="sequences",
            skip_ends=False,
            frames={"tum": slice(0, 270, 3), "bonn": slice(30, 140)},
            depth_alignment="scale+shift",
        ),
    )
}


def score(sequence: Sequence, estimate: Estimate, protocol: Protocol) -> Scores:
    """Everything that both the truth and the estimate know.

    The sequence holds the frames the protocol chose.  Poses count where the truth has them, with two at least, and RPE
    takes those that follow each other among them.  Depth counts where the truth is finite and above 0.

    Raises InputError for an estimate that is not of this sequence, ValueError for one that holds nan or infinity.
    """
    _check(sequence, estimate)
    frames, j, f = _mask_scores(sequence, estimate, protocol)
    numbers = _pose_numbers(sequence, estimate) | _depth_numbers(sequence, estimate, protocol.depth_alignment)
    if protocol.point_clouds:
        numbers |= _cloud_numbers(sequence, estimate)
    return Scores(frames, j, f, {name: numbers[name] for name in NUMBERS if name in numbers})


def to_network(values: Array, crop: Crop) -> Array:
    """[H, W, ...] in the pixels of the file -> [h, w, ...] in network pixels, by nearest neighbour."""
    (x0, y0), (width, height) = crop.offset, crop.size
    columns = _nearest(x0 + np.arange(width), crop.resized[0], crop.original[0])
    rows = _nearest(y0 + np.arange(height), crop.resized[1], crop.original[1])
    return np.asarray(values[rows[:, None], columns])


def to_original(mask: Array, crop: Crop) -> Array:
    """[h, w] bool in network pixels -> [H, W] bool in those of the file, by nearest neighbour; outside it is False."""
    (x0, y0), (width, height) = crop.offset, crop.size
    columns = _nearest(np.arange(crop.original[0]), crop.original[0], crop.resized[0]) - x0
    rows = _nearest(np.arange(crop.original[1]), crop.original[1], crop.resized[1]) - y0
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return np.asarray(mask[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)] & inside)


def _nearest(pixels: Array, count: int, other_count: int) -> Array:
    """Which of other_count pixels along the same side the centre of each of these falls in; whole numbers are exact."""
    return np.asarray((2 * pixels + 1) * other_count // (2 * count))


def _check(sequence: Sequence, estimate: Estimate) -> None:
    """Raise InputError where an estimate cannot be of this sequence."""
    n, crops = len(sequence.images), estimate.crops
    if len(crops) != n or len({crop.size for crop in crops}) != 1:
        sizes = sorted({crop.size for crop in crops})
        raise InputError(
            f"The method returned {len(crops)} crops of sizes {sizes} for the {n} frames of {sequence.name}; expected "
            "one of each frame, all of one size."
        )
    (width, height), original = crops[0].size, (crops[0].original[1], crops[0].original[0])
    images, cameras = (n, height, width), (n, 4, 4)
    shapes = {"masks": images, "depth": images, "camera_to_world": cameras, "intrinsics": (n, 3, 3)}
    for name, expected in shapes.items():
        found = getattr(estimate, name)
        if found is not None and found.shape != expected:
            raise InputError(
                f"The method's {name} of {sequence.name} has shape {list(found.shape)}; expected {list(expected)}, as "
                "its crops say."
            )
    for name in ("masks", "depth"):
        truth = getattr(sequence, name)
        if truth is not None and truth.shape != (n, *original):
            raise InputError(
                f"The true {name} of {sequence.name} has shape {list(truth.shape)}, but the method saw {n} images of "
                f"{original[1]} x {original[0]} px; expected one size."
            )


def _mask_scores(
    sequence: Sequence, estimate: Estimate, protocol: Protocol
) -> tuple[Array, Array, Array] | tuple[None, None, None]:
    """Indices, J and F of the frames that count."""
    if sequence.masks is None or estimate.masks is None:
        return None, None, None
    n = len(sequence.images)
    counts = np.ones(n, dtype=bool) if sequence.has_mask is None else sequence.has_mask.astype(bool)
    if not counts.any():
        return None, None, None
    if protocol.skip_ends:
        counts = counts & (np.arange(n) > 0) & (np.arange(n) < n - 1)
    frames = np.flatnonzero(counts)
    if not len(frames):
        raise InputError(
            f"No mask of {sequence.name} is left to score, since it has {n} frames and the protocol {protocol.name} "
            "leaves out the first and the last; choose another protocol."
        )
    crops, truth, found = estimate.crops, sequence.masks, estimate.masks
    if protocol.mask_size == "network":
        truth = np.stack([to_network(truth[i], crops[i]) for i in frames])
        found = found[frames]
    else:
        truth = truth[frames]
        found = np.stack([to_original(found[i], crops[i]) for i in frames])
    return frames, jaccard(found, truth), boundary_f(found, truth, protocol.boundary_tolerance)


def _pose_numbers(sequence: Sequence, estimate: Estimate) -> dict[str, float]:
    posed = _posed(sequence)
    if estimate.camera_to_world is None or posed.sum() < 2:
        return {}
    assert sequence.camera_to_world is not None
    found, truth = estimate.camera_to_world[posed], sequence.camera_to_world[posed]
    relative = relative_pose_errors(found, truth)
    ate = absolute_trajectory_error(found, truth)
    return {"ATE": ate, "RTE": relative.translation, "RRE deg": relative.rotation_deg}


def _depth_numbers(sequence: Sequence, estimate: Estimate, alignment: Alignment) -> dict[str, float]:
    if sequence.depth is None or estimate.depth is None:
        return {}
    truth = np.stack([to_network(depth, crop) for depth, crop in zip(sequence.depth, estimate.crops, strict=True)])
    valid = np.isfinite(truth) & (truth > 0)
    if not valid.any():
        return {}
    _check_depth(sequence, estimate.depth, valid)
    errors = depth_errors(estimate.depth, truth, valid, alignment)
    return {"AbsRel": errors.abs_rel, "delta 1.25": errors.delta_1_25}


def _cloud_numbers(sequence: Sequence, estimate: Estimate) -> dict[str, float]:
    """World points of the same pixels, the estimate's brought onto the truth's by one Sim(3)."""
    if sequence.depth is None or sequence.intrinsics is None or sequence.camera_to_world is None:
        return {}
    if estimate.depth is None or estimate.intrinsics is None or estimate.camera_to_world is None:
        return {}
    true_parts, found_parts = [], []
    known = _posed(sequence) & np.isfinite(sequence.intrinsics).all(axis=(1, 2))
    for i in np.flatnonzero(known):  # frame by frame: the files may be large
        world = _world_points(sequence.depth[i], sequence.intrinsics[i], sequence.camera_to_world[i])
        depth, world = (to_network(values, estimate.crops[i]) for values in (sequence.depth[i], world))
        valid = np.isfinite(depth) & (depth > 0)
        _check_depth(sequence, estimate.depth[i], valid)
        found = _world_points(estimate.depth[i], estimate.intrinsics[i], estimate.camera_to_world[i])
        true_parts.append(world[valid])
        found_parts.append(found[valid])
    count = sum(map(len, true_parts))
    if not count:
        return {}
    chosen = np.random.default_rng(0).permutation(count)[:CLOUD_POINTS]
    truth, points = np.concatenate(true_parts)[chosen], np.concatenate(found_parts)[chosen]
    errors = point_cloud_errors(umeyama(points, truth).apply(points), truth, _nearest_distances)
    return dict(zip(CLOUD_NUMBERS, dataclasses.astuple(errors), strict=True))


def _nearest_distances(points: Array, others: Array) -> Array:
    """[m] float64: from each of the points [m, 3] to the nearest of the others [k, 3]."""
    return np.asarray(cKDTree(others).query(points)[0])


def _world_points(depth: Array, intrinsics: Array, camera_to_world: Array) -> Array:
    """[H, W, 3] float64."""
    return transform(unproject(depth.astype(np.float64), intrinsics.astype(np.float64)), camera_to_world)


def _posed(sequence: Sequence) -> Array:
    """[n] bool: the true pose of the frame is known."""
    if sequence.camera_to_world is None:
        return np.zeros(len(sequence.images), dtype=bool)
    return np.asarray(np.isfinite(sequence.camera_to_world).all(axis=(1, 2)))


def _check_depth(sequence: Sequence, found: Array, valid: Array) -> None:
    """Raise InputError where the estimate has no depth, but the truth has."""
    bad = int((valid & ~(np.isfinite(found) & (found > 0))).sum())
    if bad:
        raise InputError(
            f"The method's depth of {sequence.name} is no finite number above 0 in {bad} pixels whose true depth is "
            "known; expected one for each of them."
        )
