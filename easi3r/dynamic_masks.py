"""From the dynamic map to masks: clusters of encoder tokens, one threshold per clip (Easi3R, section 3.1)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from easi3r.guided_filter import guided_filter
from easi3r.normalise import min_max_per_frame
from easi3r.structures import Array, DynamicMasks

HISTOGRAM_BINS = 256
CLOSE_CALL = (
    0.1  # of the score; more of the bundled checkpoint's attention lowers J on some clips as it raises it on others
)


def cluster_tokens(tokens: Tensor, num_clusters: int, seed: int) -> Array:
    """k-means over the encoder tokens [n, N, C] of all frames -> labels [n, N] int64, in [0, num_clusters)."""
    features = tokens.float().flatten(0, 1).cpu().numpy()
    if num_clusters >= len(features):
        return np.arange(len(features)).reshape(tokens.shape[:2])
    cv2.setRNGSeed(seed % 2**31)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
    labels: Any = None
    _, labels, _ = cv2.kmeans(features, num_clusters, labels, criteria, 1, cv2.KMEANS_PP_CENTERS)
    return np.asarray(labels).reshape(tokens.shape[:2]).astype(np.int64)


def smooth_by_cluster(dynamic_map: Array, labels: Array) -> Array:
    """Give every token of [n, h, w] its cluster's mean, then min-max per frame; float32."""
    flat = labels.reshape(-1)
    sums = np.bincount(flat, weights=dynamic_map.reshape(-1).astype(np.float64))
    means = sums / np.maximum(np.bincount(flat), 1)
    smoothed = torch.from_numpy(means[flat].reshape(len(dynamic_map), -1))
    return min_max_per_frame(smoothed).float().numpy().reshape(dynamic_map.shape)


def make_masks(dynamic_map: Array, labels: Array, patch_size: int) -> DynamicMasks:
    """dynamic_map: [n, h, w] float32.  labels: [n, h, w] or [n, N] cluster of each token.

    Returns score and mask at [n, h * patch_size, w * patch_size].  A map without any variation gives empty masks.
    """
    smoothed = torch.from_numpy(smooth_by_cluster(dynamic_map, labels))
    score = F.interpolate(smoothed[:, None], scale_factor=patch_size, mode="bilinear", align_corners=False)[
        :, 0
    ].numpy()
    threshold = best_multi_otsu(score)
    mask = np.zeros(score.shape, dtype=bool) if threshold is None else score > threshold
    return DynamicMasks(score.clip(0, 1), mask, threshold)


def add_flow(masks: DynamicMasks, excess: Array, images: Array) -> DynamicMasks:
    """What flow says, and in close calls attention: its score shifts flow's by up to CLOSE_CALL / 2 either way.

    masks: by attention.  excess: [n, H, W] distance from the epipolar lines over what counts as motion, NaN = unknown.
    images: [n, H, W, 3] uint8 RGB.
    """
    score = motion_score(excess, images) + np.float32(CLOSE_CALL) * (masks.score - np.float32(0.5))
    return DynamicMasks(score.clip(0, 1), score > 0.5, 0.5)


def prove_by_flow(excess: Array, images: Array) -> DynamicMasks:
    """What flow alone says; arguments as for ``add_flow``."""
    score = motion_score(excess, images)
    return DynamicMasks(score, score > 0.5, 0.5)


def motion_score(excess: Array, images: Array) -> Array:
    """[n, H, W] float32 in [0, 1]: x / (1 + x) of the excess, 1/2 at the limit, smoothed within the images' edges.

    The flow of a mover bleeds into what is beside it; the guided filter draws it back.  What is unknown counts as 0.
    """
    score = prove(excess, 1.0).score
    return np.stack([guided_filter(*frame) for frame in zip(score, images, strict=True)]).clip(0, 1)


def prove(residual_px: Array, min_motion_px: float) -> DynamicMasks:
    """Pixels whose flow is off by more than ``min_motion_px``, after a 5 x 5 median.

    residual_px: [n, H, W], NaN = unknown, which proves nothing.  The score r / (r + min_motion_px) is 1/2 there.
    """
    smooth = np.stack([cv2.medianBlur(np.nan_to_num(frame).astype(np.float32), 5) for frame in residual_px])
    return DynamicMasks(smooth / (smooth + np.float32(min_motion_px)), smooth > min_motion_px, 0.5)


def best_multi_otsu(values: Array) -> float | None:
    """The highest threshold of the best of 2, 3 and 4 Otsu classes; None when all values are the same.

    Each number of classes is scored by the variance of its class means divided by the square root of their number.
    """
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
    if np.count_nonzero(counts) < 2 or float(np.ptp(values)) <= 1e-6:
        return None
    centres = (edges[:-1] + edges[1:]) / 2
    best: tuple[float, float] | None = None
    for classes in (2, 3, 4):
        if np.count_nonzero(counts) < classes:
            break
        thresholds = multi_otsu(counts, centres, classes)
        means = [values[region].mean() for region in _regions(values, thresholds) if region.any()]
        score = float(np.var(means) / np.sqrt(classes))
        if best is None or score > best[0]:
            best = (score, float(thresholds[-1]))
    return None if best is None else best[1]


def multi_otsu(counts: Array, centres: Array, classes: int) -> Array:
    """Thresholds [classes - 1] that maximise the variance between classes of a histogram (Otsu 1979; Liao 2001).

    A class holds the bins up to and including its threshold.
    """
    # Prefix sums of weight and first moment: S2/S0 of any interval is its share of the between-class variance.
    weight = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    moment = np.concatenate([[0.0], np.cumsum(counts * centres, dtype=np.float64)])
    interval_weight = weight[None, :] - weight[:, None]
    interval_moment = moment[None, :] - moment[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(interval_weight > 0, interval_moment**2 / interval_weight, 0.0)  # [from, to), to > from
    bins = len(counts)
    best = gain[0]  # best[t]: gain of one class over bins [0, t)
    choices = []
    for _ in range(classes - 1):
        total = best[:, None] + np.where(np.arange(bins + 1)[:, None] < np.arange(bins + 1)[None, :], gain, -np.inf)
        total[0] = -np.inf  # no empty first class
        choices.append(total.argmax(axis=0))
        best = total.max(axis=0)
    cut, thresholds = bins, []
    for choice in reversed(choices):
        cut = int(choice[cut])
        thresholds.append(centres[cut - 1])
    return np.array(thresholds[::-1])


def _regions(values: Array, thresholds: Array) -> list[Array]:
    classes = np.digitize(values, thresholds)
    return [classes == k for k in range(len(thresholds) + 1)]
