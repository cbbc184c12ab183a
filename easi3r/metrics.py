"""How far masks, score maps, trajectories, depths and points are from the truth: pure functions, numpy only.

All raise ValueError, in one sentence, for shapes that do not fit, empty arrays, masks that are not bool and values that
are not finite.  Which frames, pixels and points take part is the caller's protocol, to be stated with the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from easi3r.geometry import invert_rigid
from easi3r.structures import Array

Alignment = Literal["none", "scale", "scale+shift"]

BOUNDARY_TOLERANCE = 0.008  # of the image diagonal, as in DAVIS
PAIRS_AT_A_TIME = 2**20  # in the nearest-neighbour search; the answer does not depend on it
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
    """J per frame, [n] float64: |predicted and truth| / |predicted or truth|, 1 if both are empty, as in DAVIS.

    predicted, truth: [n, H, W] bool, True = moves.
    """
    predicted, truth = _arrays(bool, MASKS, predicted=predicted, truth=truth)
    return np.where((predicted | truth).any(axis=(1, 2)), _share(predicted & truth, predicted | truth), 1.0)


def boundary_f(predicted: Array, truth: Array, tolerance: float = BOUNDARY_TOLERANCE) -> Array:
    """F per frame, [n] float64: 2 P R / (P + R) of the boundaries, as in DAVIS (Perazzi et al. 2016).

    P is the fraction of the predicted boundary no farther than ceil(tolerance * diagonal) pixels from the true one, R
    the reverse.  A mask that is all True has no boundary, like an empty one: F is 1 if neither has any, 0 if only one
    has.

    predicted, truth: [n, H, W] bool, True = moves.
    """
    predicted, truth = map(_boundary, _arrays(bool, MASKS, predicted=predicted, truth=truth))
    radius = math.ceil(tolerance * math.hypot(*truth.shape[1:]))
    precision = _share(predicted & _dilate(truth, radius), predicted)
    recall = _share(truth & _dilate(predicted, radius), truth)
    f = 2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1.0)
    return np.where((predicted | truth).any(axis=(1, 2)), f, 1.0)


def summarise_masks(values: Array) -> MaskSummary:
    """Mean, recall and decay of J or F, [n] float in time order, by the definitions of DAVIS.

    The quarters share their ends: with q_k = round(k (n - 1) / 4), halves up, quarter k holds q_k to q_(k+1) inclusive.
    Every value given counts: pass ``values[1:-1]`` to leave out the first and last frame, as the DAVIS toolkit does.
    """
    (values,) = _arrays(float, ("n",), values=values)
    q = [(k * (len(values) - 1) + 2) // 4 for k in range(5)]
    decay = values[: q[1] + 1].mean() - values[q[3] :].mean()
    return MaskSummary(float(values.mean()), float((values > 0.5).mean()), float(decay))


def auc(scores: Array, truth: Array) -> float:
    """Area under the ROC curve: how often a True outscores a False, over all pairs of both, ties counted half.

    scores: any shape, float, higher = more likely True.  truth: the same shape, bool, with at least one of each kind.
    """
    positives, negatives = _tallies(scores, truth)
    if not positives.any() or not negatives.any():
        raise ValueError(f"truth is {bool(positives.any())} everywhere; expected both True and False.")
    below = np.cumsum(negatives) - negatives
    return float(positives @ (below + negatives / 2) / (positives.sum() * negatives.sum()))


def average_precision(scores: Array, truth: Array) -> float:
    """Sum over the distinct scores, as thresholds from high to low, of precision times the gain in recall.

    scores: any shape, float, higher = more likely True.  truth: the same shape, bool, with at least one True.
    """
    positives, negatives = (tally[::-1] for tally in _tallies(scores, truth))
    if not positives.any():
        raise ValueError("truth is False everywhere; expected at least one True, which average_precision looks for.")
    precision = np.cumsum(positives) / np.cumsum(positives + negatives)
    return float(positives @ precision / positives.sum())


def umeyama(source_points: Array, target_points: Array, with_scale: bool = True) -> Similarity:
    """Least-squares similarity of the source onto the target (Umeyama 1991); without scale, the rigid motion.

    Two points, or points on a line, leave the turn about it open; any choice has the same residuals.  If the points of
    either side coincide (one point always does), scale is 1 and the rotation identity, mean onto mean: a target at rest
    would otherwise shrink any source to a perfect fit.

    source_points, target_points: [n, 3] float, matched row by row.
    """
    source, target = _arrays(float, POINTS, source_points=source_points, target_points=target_points)
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

    One frame gives 0.  If either camera stands still, the result is the other's spread (``umeyama``), in its own units.

    predicted, truth: [n, 4, 4] float camera-to-world, matched row by row.
    """
    predicted, truth = _arrays(float, POSES, predicted=predicted, truth=truth)
    residual = umeyama(predicted[:, :3, 3], truth[:, :3, 3]).apply(predicted[:, :3, 3]) - truth[:, :3, 3]
    return math.sqrt((residual**2).sum(axis=1).mean())


def relative_pose_errors(predicted: Array, truth: Array) -> RelativePoseErrors:
    """RPE at delta 1, all pairs: length and angle of E_i = (Q_i^-1 Q_(i+1))^-1 (P_i^-1 P_(i+1)) (Sturm et al. 2012).

    P, the prediction, takes the scale of the Sim(3) that aligns it to Q, the truth; the rest of it cancels in E_i.  If
    either camera stands still, that scale is 1 (``umeyama``).

    predicted, truth: [n, 4, 4] float camera-to-world, matched row by row.
    """
    predicted, truth = _arrays(float, POSES, predicted=predicted, truth=truth)
    if len(truth) == 1:
        return RelativePoseErrors(math.nan, math.nan)
    scale = umeyama(predicted[:, :3, 3], truth[:, :3, 3]).scale
    steps, true_steps = (invert_rigid(poses[:-1]) @ poses[1:] for poses in (predicted, truth))
    lengths = np.linalg.norm(scale * steps[:, :3, 3] - true_steps[:, :3, 3], axis=1)
    angles_deg = rotation_angle_deg(steps[:, :3, :3], true_steps[:, :3, :3])
    return RelativePoseErrors(math.sqrt((lengths**2).mean()), math.sqrt((angles_deg**2).mean()))


def associate(times_a: Array, times_b: Array, max_difference_s: float) -> Array:
    """Pairs of time stamps that belong together, [k, 2] int64 indices (into a, into b) in the order of a.

    The smallest differences are taken first and each stamp at most once; of equal differences, the one that comes first
    in a, then in b.  What finds no partner within the difference, both ends included, is in no pair.

    times_a: [n] float seconds.  times_b: [m] float seconds.  Neither has to be in order.
    """
    (times_a,), (times_b,) = _arrays(float, ("n",), times_a=times_a), _arrays(float, ("m",), times_b=times_b)
    if not max_difference_s >= 0:
        raise ValueError(f"max_difference_s is {max_difference_s}; expected 0 or more seconds.")
    order = np.argsort(times_b, kind="stable")
    width = np.nextafter(max_difference_s, math.inf) + np.spacing(np.abs(times_a))  # sums round; asked exactly below
    first = np.searchsorted(times_b[order], times_a - width, "left")
    counts = np.searchsorted(times_b[order], times_a + width, "right") - first
    a = np.repeat(np.arange(len(times_a)), counts)
    b = order[np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)]
    differences = np.abs(times_a[a] - times_b[b])
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for k in np.lexsort((b, a, differences)).tolist():
        i, j = int(a[k]), int(b[k])
        if differences[k] <= max_difference_s and i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    return np.array(sorted(pairs.items()), dtype=np.int64).reshape(-1, 2)


def path_length(camera_to_world: Array) -> float:
    """Sum of the distances between consecutive positions of [n, 4, 4] float poses, in their units; 0 for one frame."""
    (poses,) = _arrays(float, POSES, camera_to_world=camera_to_world)
    return float(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum())


def rotation_angle_deg(a: Array, b: Array) -> Array:
    """Angle in degrees, [...] float64 in [0, 180], of a^T b between rotations a and b, [..., 3, 3] float."""
    a, b = _arrays(float, (*np.shape(a)[:-2], 3, 3), a=a, b=b)
    between = np.swapaxes(a, -1, -2) @ b
    twice_sine = np.linalg.norm(between - np.swapaxes(between, -1, -2), axis=(-2, -1)) / math.sqrt(2)
    twice_cosine = np.trace(between, axis1=-2, axis2=-1) - 1
    if np.abs(np.hypot(twice_sine, twice_cosine) - 2).max() > 1e-2:
        raise ValueError("a^T b is no rotation somewhere; expected matrices [..., 3, 3] with orthonormal columns.")
    return np.asarray(np.rad2deg(np.arctan2(twice_sine, twice_cosine)))  # both: all digits at 0 and at 180 degrees


def direction_angle_deg(u: Array, v: Array) -> Array:
    """Angle in degrees, [...] float64 in [0, 180], between directions u and v, [..., 3] float of any length but 0."""
    u, v = _arrays(float, (*np.shape(u)[:-1], 3), u=u, v=v)
    if not (u.any(axis=-1) & v.any(axis=-1)).all():
        raise ValueError("u or v holds a vector of length 0; expected directions, and that has none.")
    return np.asarray(np.rad2deg(np.arctan2(np.linalg.norm(np.cross(u, v), axis=-1), (u * v).sum(axis=-1))))


def depth_errors(predicted: Array, truth: Array, valid: Array, alignment: Alignment = "none") -> DepthErrors:
    """Errors of z-depth, all valid pixels of the video pooled, after one alignment for the whole video.

    "scale" is median(truth / predicted), "scale+shift" least squares in depth; a constant prediction keeps scale 1.

    predicted, truth: [n, H, W] float, finite and > 0 where valid.  valid: [n, H, W] bool, True = counts, at least one.
    """
    if alignment not in get_args(Alignment):
        raise ValueError(f"alignment is {alignment!r}; expected {', '.join(map(repr, get_args(Alignment)))}.")
    (valid,) = _arrays(bool, MASKS, valid=valid)
    predicted, truth = (d[valid] for d in _arrays(float, valid.shape, valid, predicted=predicted, truth=truth))
    if not valid.any() or min(predicted.min(), truth.min()) <= 0:
        raise ValueError(f"A z-depth of {valid.sum()} valid pixels is <= 0; expected some valid pixels, all > 0.")
    scale, shift = float(np.median(truth / predicted)) if alignment == "scale" else 1.0, 0.0
    if alignment == "scale+shift":
        centred = predicted - predicted.mean()
        scale = float(centred @ truth / (centred @ centred)) if np.ptp(predicted) > 0 else 1.0
        shift = float(truth.mean() - scale * predicted.mean())
    ratio = (scale * predicted + shift) / truth
    return DepthErrors(float(np.abs(ratio - 1).mean()), float(((ratio > 0.8) & (ratio < 1.25)).mean()), scale, shift)


def point_cloud_errors(
    predicted: Array, truth: Array, nearest: Callable[[Array, Array], Array] | None = None
) -> PointCloudErrors:
    """Accuracy, completeness and distance of a cloud in the frame and scale of the truth: nothing is aligned.

    predicted, truth: [n, 3] float, matched row by row, as the same pixels unprojected with either depth are.
    nearest: another way to find ``nearest_distances``, which it stands for: a tree, where there are millions of points.
    """
    predicted, truth = _arrays(float, POINTS, predicted=predicted, truth=truth)
    nearest = nearest or nearest_distances
    distances = nearest(predicted, truth), nearest(truth, predicted), np.linalg.norm(predicted - truth, axis=1)
    return PointCloudErrors(*(float(average(d)) for d in distances for average in (np.mean, np.median)))


def nearest_distances(points: Array, others: Array) -> Array:
    """Distance from each of the points [m, 3] to the nearest of the others [k, 3], [m] float64 in their units.

    All pairs are compared, 60,000 x 60,000 in some ten seconds; exact to about 1e-8 of the clouds' extent.
    """
    (points,), (others,) = _arrays(float, POINTS, points=points), _arrays(float, POINTS, others=others)
    points, others = points - others.mean(axis=0), others - others.mean(axis=0)
    half_squares = (others**2).sum(axis=1) / 2
    pieces = np.array_split(points, math.ceil(len(points) * len(others) / PAIRS_AT_A_TIME))
    nearest = np.concatenate([(half_squares - piece @ others.T).argmin(axis=1) for piece in pieces])
    return np.asarray(np.linalg.norm(points - others[nearest], axis=1))


def _share(part: Array, whole: Array) -> Array:
    """How much of each whole [n, H, W] bool its part is, [n] float64; 0 of nothing."""
    return np.asarray(part.sum(axis=(1, 2)) / np.maximum(whole.sum(axis=(1, 2)), 1))


def _boundary(mask: Array) -> Array:
    """[n, H, W] bool: the pixel differs from its right, lower or lower right neighbour; outside the image none does."""
    next_to = np.pad(mask, ((0, 0), (0, 1), (0, 1)), mode="edge")
    return np.asarray((mask != next_to[:, :-1, 1:]) | (mask != next_to[:, 1:, :-1]) | (mask != next_to[:, 1:, 1:]))


def _dilate(mask: Array, radius: int) -> Array:
    """Dilation of [n, H, W] bool by the disk x^2 + y^2 <= radius^2: the union of its shifts."""
    (_, height, width), span = mask.shape, range(2 * radius + 1)
    padded, dilated = np.pad(mask, ((0, 0), (radius, radius), (radius, radius))), np.zeros_like(mask)
    for y, x in ((y, x) for y in span for x in span if (y - radius) ** 2 + (x - radius) ** 2 <= radius**2):
        dilated |= padded[:, y : y + height, x : x + width]
    return dilated


def _tallies(scores: Array, truth: Array) -> tuple[Array, Array]:
    """How many True and how many False hold each distinct score, in ascending order of the scores, float64."""
    (truth,), (scores,) = _arrays(bool, np.shape(truth), truth=truth), _arrays(float, np.shape(truth), scores=scores)
    distinct, index = np.unique(scores.ravel(), return_inverse=True)
    positives = np.bincount(index, weights=truth.ravel(), minlength=len(distinct))
    return positives, np.bincount(index, minlength=len(distinct)) - positives


def _arrays(dtype: type, shape: tuple[int | str, ...], where: Array | bool = True, **given: Any) -> tuple[Array, ...]:
    """The given as bool, or float64 that is finite ``where``, all of one shape, in which a name is any size but 0."""
    arrays = {name: np.asarray(value) for name, value in given.items()}
    for name, array in arrays.items():
        wanted = [size if isinstance(size, int) else own for size, own in zip(shape, array.shape, strict=False)]
        if array.ndim != len(shape) or list(array.shape) != wanted or array.size == 0:
            raise ValueError(f"{name} has shape {array.shape}; expected ({', '.join(map(str, shape))}), not empty.")
        if dtype is bool and array.dtype != bool:
            raise ValueError(f"{name} is {array.dtype}; expected bool.")
        arrays[name] = array.astype(dtype, copy=False)
        if not (np.isfinite(arrays[name]) | ~np.asarray(where)).all():
            raise ValueError(f"{name} holds nan or infinity; expected finite numbers.")
        shape = array.shape  # of the first, for the others
    return tuple(arrays.values())
