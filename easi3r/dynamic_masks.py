"""From the dynamic map to masks: clusters of encoder tokens and a threshold (Easi3R, section 3.1)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from easi3r.config import MotionSettings
from easi3r.guided_filter import guided_filter
from easi3r.mask_cleaning import clean_masks
from easi3r.normalise import min_max_per_frame
from easi3r.structures import Array, DynamicMasks
from easi3r.thresholds import ThresholdRule

AS_PUBLISHED = ThresholdRule()  # multi-Otsu, one threshold for the clip
AT_THE_LIMIT = 0.5  # of flow's score, where its excess is 1
CLOSE_CALL = 0.1  # of the score; more of a weak network's attention lowers J on some clips as it raises it on others


def masks_of(
    attention: Array, labels: Array, images: Array, excess: Array | None, settings: MotionSettings
) -> DynamicMasks:
    """What moves, by the evidence that the settings ask for.

    attention: [n, h, w] dynamic map.  labels: [n, h, w] clusters.  images: [n, H, W, 3] uint8 RGB.
    excess: [n, H, W] of ``epipolar_excess``; None: attention alone, as published.
    """
    score = attention_score(attention, labels, images.shape[1] // labels.shape[1])
    if excess is not None:
        moves = motion_score(excess, images)
        score = in_close_calls(moves, score) if settings.evidence == "both" else moves
    if settings.threshold != "auto":
        rule = ThresholdRule(settings.threshold, settings.threshold_per, settings.percentile)
    else:
        rule = ThresholdRule("multi-otsu" if excess is None else AT_THE_LIMIT, settings.threshold_per)
    masks = DynamicMasks(score, *rule.apply(score))
    return clean_masks(masks, smoothing=settings.smoothing, min_area=settings.min_area, fill_holes=settings.fill_holes)


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


def attention_score(dynamic_map: Array, labels: Array, patch_size: int) -> Array:
    """[n, h * patch_size, w * patch_size] float32 in [0, 1] of a map [n, h, w], averaged over clusters, as published.

    labels: [n, h, w] or [n, N] cluster of each token.
    """
    smoothed = torch.from_numpy(smooth_by_cluster(dynamic_map, labels))
    score = F.interpolate(smoothed[:, None], scale_factor=patch_size, mode="bilinear", align_corners=False)
    return score[:, 0].numpy().clip(0, 1)


def make_masks(dynamic_map: Array, labels: Array, patch_size: int) -> DynamicMasks:
    """The rule as published.  Arguments as for ``attention_score``; a map without any variation gives empty masks."""
    score = attention_score(dynamic_map, labels, patch_size)
    return DynamicMasks(score, *AS_PUBLISHED.apply(score))


def in_close_calls(moves: Array, attention: Array) -> Array:
    """[n, H, W] in [0, 1] what flow says of motion, and in close calls attention: CLOSE_CALL / 2 either way at most."""
    return np.asarray((moves + np.float32(CLOSE_CALL) * (attention - np.float32(0.5))).clip(0, 1))


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


def refute(masks: DynamicMasks, labels: Array, residual_px: Array, min_motion_px: float) -> DynamicMasks:
    """Clear the clusters that the camera's own motion explains.

    labels: [n, h, w] cluster of each token.  residual_px: [n, H, W] distance of each pixel's flow from its epipolar
    line, NaN = unknown.  A cluster stays where the median of what is known of it, over all frames, exceeds
    ``min_motion_px``, and where nothing is known.
    """
    n, height, width = residual_px.shape
    patch = height // labels.shape[1]
    pixels = (
        residual_px.reshape(n, height // patch, patch, width // patch, patch).swapaxes(2, 3).reshape(labels.size, -1)
    )
    keep = np.ones(int(labels.max()) + 1, dtype=bool)
    for cluster in range(len(keep)):
        known = pixels[labels.reshape(-1) == cluster]
        known = known[~np.isnan(known)]
        keep[cluster] = not len(known) or np.median(known) > min_motion_px
    kept = keep[labels].repeat(patch, axis=1).repeat(patch, axis=2)
    return DynamicMasks(np.where(kept, masks.score, 0).astype(np.float32), masks.mask & kept, masks.threshold)
