"""How far masks, score maps, trajectories, depths and points are from the truth: pure functions, numpy only.

The prediction comes first, the truth second.  Every function raises ValueError, in one sentence, for shapes that do
not fit, nothing at all, masks that are not bool and values that are not finite.  Nothing is left out silently: which
frames, pixels and points take part, and at which size, is the caller's protocol, to be stated with the number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from easi3r.structures import Array

Alignment = Literal["none", "scale", "scale+shift"]

BOUNDARY_TOLERANCE = 0.008  # of the image diagonal, as in DAVIS
LEAF_SIZE = 64  # points compared at a time in the nearest-neighbour search; the answer does not depend on it
MASKS, POINTS, POSES = ("n", "H", "W"), ("n", 3), ("n", 4, 4)


@dataclass(frozen=True)
class MaskSummary:
    """J or F over frames, as DAVIS reports it."""

    mean: float
    recall: float  # fraction of the frames above 0.5
    decay: float  # mean of the first quarter minus mean of the last: positive when masks get worse


@dataclass(frozen=True)
class Similarity:
    """target = scale * rotation @ source + translation."""

    scale: float
    rotation: Array  # [3, 3] float64, determinant 1
    translation: Array  # [3] float64, in units of the target

    def apply(self, points: Array) -> Array:
        """[..., 3] in the source's frame -> [..., 3] float64 in the target's."""
        return np.asarray(self.scale * np.asarray(points, dtype=np.float64) @ self.rotation.T + self.translation)


@dataclass(frozen=True)
class RelativePoseErrors:
    """RMSE over all pairs of consecutive frames; nan for a single frame, which has no pair."""

    translation: float  # in units of the truth
    rotation_deg: float


@dataclass(frozen=True)
class DepthErrors:
    """Errors of scale * predicted + shift over the valid pixels."""

    abs_rel: float  # mean of |aligned - truth| / truth
    delta_1_25: float  # fraction with max(aligned / truth, truth / aligned) < 1.25; an aligned depth <= 0 fails
    scale: float
    shift: float


@dataclass(frozen=True)
class PointCloudErrors:
    """Mean and median distances, in units of the points."""

    accuracy_mean: float  # from each predicted point to the nearest true one
    accuracy_median: float
    completeness_mean: float  # from each true point to the nearest predicted one
    completeness_median: float
    distance_mean: float  # from each predicted point to the true one of the same row
    distance_median: float


def jaccard(predicted: Array, truth: Array) -> Array:
    """J per frame, [n] float64: |predicted and truth| / |predicted or truth| (Perazzi et al. 2016), 1 if both are empty.

    predicted, truth: [n, H, W] bool, True = moves.
    """
    predicted, truth = _pair(bool, MASKS, predicted=predicted, truth=truth)
    both, either = ((mask.sum(axis=(1, 2))) for mask in (predicted & truth, predicted | truth))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def boundary_f(predicted: Array, truth: Array) -> Array:
    """F per frame, [n] float64: 2 P R / (P + R) of the boundaries (Perazzi et al. 2016).

    P is the fraction of the predicted boundary within a disk of radius ceil(0.008 * diagonal) pixels around the true
    one, R the reverse.  A pixel is on the boundary if it differs from its right, lower or lower right neighbour.
    Where only one of both has a boundary F is 0, where neither has one 1: an all True mask has none, as an empty one.

    predicted, truth: [n, H, W] bool, True = moves.
    """
    predicted, truth = _pair(bool, MASKS, predicted=predicted, truth=truth)
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*truth.shape[1:]))
    return np.array([_boundary_f(_boundary(p), _boundary(t), radius) for p, t in zip(predicted, truth, strict=True)])


def summarise_masks(values: Array) -> MaskSummary:
    """Mean, recall and decay of J or F by the definitions of DAVIS, which leaves the end frames to the caller here.

    The quarters share their ends: with q_k = round(k (n - 1) / 4), halves up, quarter k holds q_k to q_(k+1) inclusive.
    DAVIS scores no first and no last frame of a sequence; here every value given counts: pass ``values[1:-1]`` for that.

    values: [n] float per frame, in time order.
    """
    values = _array("values", values, float, ("n",))
    q = [(k * (len(values) - 1) + 2) // 4 for k in range(5)]
    decay = values[: q[1] + 1].mean() - values[q[3] :].mean()
    return MaskSummary(float(values.mean()), float((values > 0.5).mean()), float(decay))


def auc(scores: Array, truth: Array) -> float:
    """Area under the ROC curve: how often a True outscores a False, over all pairs of both, ties counted half.

    scores: any shape, float, higher = more likely True.  truth: the same shape, bool, with at least one of each kind.
    """
    positives, negatives = _tallies(scores, truth)
    if not positives.any() or not negatives.any():
        raise ValueError(f"truth is {bool(positives.any())} everywhere; expected True and False, which auc compares.")
    below = np.cumsum(negatives) - negatives
    return float(positives @ (below + negatives / 2) / (positives.sum() * negatives.sum()))


def average_precision(scores: Array, truth: Array) -> float:
    """Sum over the distinct scores, as thresholds from high to low, of precision times the gain in recall.

    Nothing is interpolated, and equal scores enter together, so a constant map gets the fraction of True.

    scores: any shape, float, higher = more likely True.  truth: the same shape, bool, with at least one True.
    """
    positives, negatives = (tally[::-1] for tally in _tallies(scores, truth))
    if not positives.any():
        raise ValueError("truth is False everywhere; expected at least one True, which average_precision looks for.")
    precision = np.cumsum(positives) / np.cumsum(positives + negatives)
    return float(positives @ precision / positives.sum())


def umeyama(source_points: Array, target_points: Array, with_scale: bool = True) -> Similarity:
    """Least-squares similarity of the source onto the target (Umeyama 1991); without scale, the rigid motion.

    Two points, or points on a line, leave the turn about it open: one of the equally good rotations is returned, and
    the residuals do not depend on which.  If the points of either side coincide (one point always does), scale is 1
    and the rotation identity, mean onto mean: a target at rest would otherwise shrink any source to a perfect fit.

    source_points, target_points: [n, 3] float, matched row by row.
    """
    source, target = _pair(float, POINTS, source_points=source_points, target_points=target_points)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    if any(np.ptp(points, axis=0).max() <= 1e-12 * np.abs(points).max() for points in (source, target)):
        return Similarity(1.0, np.eye(3), target_mean - source_mean)
    u, singular, vt = np.linalg.svd((target - target_mean).T @ (source - source_mean))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])  # a rotation, never a reflection
    rotation = (u * signs) @ vt
    scale = float(singular @ signs / ((source - source_mean) ** 2).sum()) if with_scale else 1.0
    return Similarity(scale, rotation, target_mean - scale * rotation @ source_mean)


def absolute_trajectory_error(predicted: Array, truth: Array) -> float:
    """ATE: RMSE of the camera positions after Sim(3) alignment, in units of the truth (metres where it is metric).

    One frame gives 0.  If either camera stands still only means are aligned (see ``umeyama``), so the result is the
    RMS distance of the other's positions from their mean; a drift against a truth at rest is in the drift's own units.

    predicted, truth: [n, 4, 4] float camera-to-world, matched row by row.
    """
    predicted, truth = _trajectories(predicted, truth)
    residual = umeyama(predicted[:, :3, 3], truth[:, :3, 3]).apply(predicted[:, :3, 3]) - truth[:, :3, 3]
    return _root_mean_square(np.linalg.norm(residual, axis=1))


def relative_pose_errors(predicted: Array, truth: Array) -> RelativePoseErrors:
    """RPE at delta 1: length and angle of E_i = (Q_i^-1 Q_(i+1))^-1 (P_i^-1 P_(i+1)) over all i (Sturm et al. 2012).

    The prediction P takes the scale of the Sim(3) that aligns all its positions to the truth Q (see ``umeyama`` for a
    camera at rest); the alignment's rotation and translation cancel in E_i.

    predicted, truth: [n, 4, 4] float camera-to-world, matched row by row.
    """
    predicted, truth = _trajectories(predicted, truth)
    if len(truth) == 1:
        return RelativePoseErrors(math.nan, math.nan)
    scale = umeyama(predicted[:, :3, 3], truth[:, :3, 3]).scale
    (rotations, steps), (true_rotations, true_steps) = _relative_poses(predicted), _relative_poses(truth)
    return RelativePoseErrors(
        translation=_root_mean_square(np.linalg.norm(scale * steps - true_steps, axis=1)),
        rotation_deg=_root_mean_square(rotation_angle_deg(rotations, true_rotations)),
    )


def path_length(camera_to_world: Array) -> float:
    """Sum of the distances between consecutive positions of [n, 4, 4] float poses, in their units; 0 for one frame."""
    positions = _array("camera_to_world", camera_to_world, float, POSES)[:, :3, 3]
    return float(np.linalg.norm(np.diff(positions, axis=0), axis=1).sum())


def rotation_angle_deg(a: Array, b: Array) -> Array:
    """Angle in degrees, [...] float64 in [0, 180], of a^T b between rotations a and b, [..., 3, 3] float.

    Sine (antisymmetric part) and cosine (trace) together keep all digits at 0 and at 180 degrees.
    """
    a, b = _pair(float, ("...", 3, 3), a=a, b=b)
    _check_rotations(a=a, b=b)
    between = np.swapaxes(a, -1, -2) @ b
    twice_sine = np.linalg.norm(between - np.swapaxes(between, -1, -2), axis=(-2, -1)) / math.sqrt(2)
    return np.asarray(np.rad2deg(np.arctan2(twice_sine, np.trace(between, axis1=-2, axis2=-1) - 1)))


def direction_angle_deg(u: Array, v: Array) -> Array:
    """Angle in degrees, [...] float64 in [0, 180], between directions u and v, [..., 3] float of any length but 0."""
    u, v = _pair(float, ("...", 3), u=u, v=v)
    if not (u.any(axis=-1) & v.any(axis=-1)).all():
        raise ValueError("u or v holds a vector of length 0; expected directions, and that has none.")
    return np.asarray(np.rad2deg(np.arctan2(np.linalg.norm(np.cross(u, v), axis=-1), (u * v).sum(axis=-1))))


def depth_errors(predicted: Array, truth: Array, valid: Array, alignment: Alignment = "none") -> DepthErrors:
    """Errors of z-depth, all valid pixels of the video pooled, after one alignment for the whole video.

    "scale" is median(truth / predicted); "scale+shift" the least squares of scale * predicted + shift - truth, where
    a constant prediction keeps scale 1.  Limits of range (Sintel's far sky, say) belong into ``valid``.

    predicted, truth: [n, H, W] float, finite and > 0 where valid.  valid: [n, H, W] bool, True = counts, at least one.
    """
    if alignment not in get_args(Alignment):
        raise ValueError(f"alignment is {alignment!r}; expected {', '.join(map(repr, get_args(Alignment)))}.")
    valid = _array("valid", valid, bool, MASKS)
    predicted, truth = _valid_depths("predicted", predicted, valid), _valid_depths("truth", truth, valid)
    scale, shift = 1.0, 0.0
    if alignment == "scale":
        scale = float(np.median(truth / predicted))
    elif alignment == "scale+shift":
        centred = predicted - predicted.mean()
        scale = float(centred @ truth / (centred @ centred)) if np.ptp(predicted) > 0 else 1.0
        shift = float(truth.mean() - scale * predicted.mean())
    aligned = scale * predicted + shift
    within = (aligned < 1.25 * truth) & (truth < 1.25 * aligned)
    return DepthErrors(float((np.abs(aligned - truth) / truth).mean()), float(within.mean()), scale, shift)


def point_cloud_errors(predicted: Array, truth: Array) -> PointCloudErrors:
    """Accuracy, completeness and distance of a cloud in the frame and scale of the truth: nothing is aligned.

    predicted, truth: [n, 3] float, matched row by row, as the same pixels unprojected with either depth are.
    """
    predicted, truth = _pair(float, POINTS, predicted=predicted, truth=truth)
    matched = np.linalg.norm(predicted - truth, axis=1)
    distances = nearest_distances(predicted, truth), nearest_distances(truth, predicted), matched
    return PointCloudErrors(*(float(average(d)) for d in distances for average in (np.mean, np.median)))


def nearest_distances(points: Array, others: Array) -> Array:
    """Distance from each of the points [m, 3] to the nearest of the others [k, 3], [m] float64 in their units; exact.

    Both clouds are cut into boxes; a box of points meets those of the others in the order of the gaps between them,
    until the next gap is wider than its worst answer.
    """
    points, others = _array("points", points, float, POINTS), _array("others", others, float, POINTS)
    boxes = [others[rows] for rows in _leaves(others, np.arange(len(others)))]
    low, high = np.array([box.min(axis=0) for box in boxes]), np.array([box.max(axis=0) for box in boxes])
    squared = np.full(len(points), np.inf)
    for rows in _leaves(points, np.arange(len(points))):
        here = points[rows]
        gaps = (np.maximum(0, np.maximum(low - here.max(axis=0), here.min(axis=0) - high)) ** 2).sum(axis=1)
        for k in np.argsort(gaps):
            if gaps[k] >= squared[rows].max():
                break
            squared[rows] = np.minimum(squared[rows], ((here[:, None] - boxes[k]) ** 2).sum(axis=2).min(axis=1))
    return np.asarray(np.sqrt(squared))


def _boundary_f(predicted: Array, truth: Array, radius: int) -> float:
    if not predicted.any() or not truth.any():
        return float(predicted.any() == truth.any())
    precision, recall = _dilate(truth, radius)[predicted].mean(), _dilate(predicted, radius)[truth].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def _boundary(mask: Array) -> Array:
    """[H, W] bool: the pixel differs from its right, lower or lower right neighbour; outside the image none does."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return np.asarray((mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:]))


def _dilate(mask: Array, radius: int) -> Array:
    """Dilation of [H, W] bool by the disk x^2 + y^2 <= radius^2, one row of the disk at a time, by running counts."""
    height, width = mask.shape
    counts = np.pad(np.pad(mask, radius).cumsum(axis=1), ((0, 0), (1, 0)))
    dilated = np.zeros_like(mask)
    for y in range(2 * radius + 1):
        half = math.isqrt(radius**2 - (y - radius) ** 2)
        left, right = radius - half, radius + half + 1
        rows = counts[y : y + height]
        dilated |= rows[:, right : right + width] > rows[:, left : left + width]
    return dilated


def _tallies(scores: Array, truth: Array) -> tuple[Array, Array]:
    """How many True and how many False hold each distinct score, in ascending order of the scores, float64."""
    scores, truth = _array("scores", scores, float, ("...",)), _array("truth", truth, bool, np.shape(scores))
    distinct, index = np.unique(scores.ravel(), return_inverse=True)
    positives = np.bincount(index, weights=truth.ravel(), minlength=len(distinct))
    return positives, np.bincount(index, minlength=len(distinct)) - positives


def _relative_poses(poses: Array) -> tuple[Array, Array]:
    """Rotations [n - 1, 3, 3] and translations [n - 1, 3] of the next camera in each camera's frame."""
    to_camera = np.swapaxes(poses[:-1, :3, :3], 1, 2)
    return to_camera @ poses[1:, :3, :3], np.einsum("nij,nj->ni", to_camera, np.diff(poses[:, :3, 3], axis=0))


def _root_mean_square(values: Array) -> float:
    return math.sqrt((values**2).mean())


def _leaves(points: Array, rows: Array) -> list[Array]:
    """Cut these rows of [m, 3] points at the median of their widest axis, again and again, into small pieces."""
    if len(rows) <= LEAF_SIZE:
        return [rows]
    along = points[rows, np.ptp(points[rows], axis=0).argmax()]
    halves = np.array_split(rows[np.argpartition(along, len(rows) // 2)], 2)
    return [leaf for half in halves for leaf in _leaves(points, half)]


def _array(name: str, given: Any, dtype: type, shape: tuple[int | str, ...]) -> Array:
    """The given as bool or finite float64 of that shape: names are free sizes, '...' in front any number of them."""
    array = np.asarray(given)
    if dtype is bool and array.dtype != bool:
        raise ValueError(f"{name} is {array.dtype}; expected bool.")
    array = array.astype(dtype, copy=False)
    sizes = [size for size in shape if size != "..."]
    found = array.shape[max(0, array.ndim - len(sizes)) :] if "..." in shape else array.shape
    fits = len(found) == len(sizes) and all(s in (f, "n", "H", "W") for f, s in zip(found, sizes, strict=True))
    if not fits or array.size == 0:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(array.shape)}; expected [{expected}], nothing empty.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {(~np.isfinite(array)).sum()} values that are nan or infinite; expected none.")
    return array


def _pair(dtype: type, shape: tuple[int | str, ...], **given: Any) -> tuple[Array, Array]:
    """Two arrays of one shape."""
    (name, first), (other, second) = ((name, _array(name, value, dtype, shape)) for name, value in given.items())
    if first.shape != second.shape:
        raise ValueError(f"{name} has shape {list(first.shape)}, {other} {list(second.shape)}; expected the same.")
    return first, second


def _trajectories(predicted: Array, truth: Array) -> tuple[Array, Array]:
    predicted, truth = _pair(float, POSES, predicted=predicted, truth=truth)
    _check_rotations(predicted=predicted[:, :3, :3], truth=truth[:, :3, :3])
    return predicted, truth


def _check_rotations(**given: Array) -> None:
    for name, rotations in given.items():
        error = np.abs(np.swapaxes(rotations, -1, -2) @ rotations - np.eye(3)).max()
        if error > 1e-3 or (np.linalg.det(rotations) < 0).any():
            raise ValueError(f"{name} is off a rotation by {error:.2g}; expected orthonormal axes, not mirrored.")


def _valid_depths(name: str, given: Any, valid: Array) -> Array:
    depth = np.asarray(given, dtype=np.float64)
    if depth.shape != valid.shape or not valid.any():
        shapes = f"{list(depth.shape)}, valid {list(valid.shape)} with {valid.sum()} True"
        raise ValueError(f"{name} has shape {shapes}; expected the same shape and at least one True.")
    depth = depth[valid]
    if not (np.isfinite(depth) & (depth > 0)).all():
        raise ValueError(f"{name} goes from {depth.min():g} to {depth.max():g} where valid; expected finite and > 0.")
    return depth
