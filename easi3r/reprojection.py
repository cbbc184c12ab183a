"""Masks corrected by projection: what looks the same from everywhere else did not move (VGGT4D, arXiv 2511.19971).

Pixel centres are at half numbers here (u + 0.5), as in the published method; lengths are in the network's own unit.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from scipy.spatial import cKDTree
from torch.nn import functional as F

from easi3r.dynamic_masks import cluster_tokens
from easi3r.geometry import invert_rigid
from easi3r.progress import Progress, silent
from easi3r.structures import Array

NUM_CLUSTERS = 30
NEIGHBOURS = 20  # itself included
OUTLIER_DEVIATIONS = 2.5
OCCLUSION = 0.01  # how far behind the depth that is seen a point may lie and still be visible
MAX_LOSS = 0.1  # of a cluster that rests
LEAST_VIEWS = 20  # one projection in so many has to count, or else nothing is known about a cluster
UNKNOWN = 1e10  # the loss of such a cluster, which stays dynamic
OUTLIER, STATIC = -2, -1  # labels beside the clusters'


def refine_masks(
    images: Array,
    depth: Array,
    masks: Array,
    camera_to_world: Array,
    intrinsics: Array,
    *,
    seed: int = 42,
    progress: Progress = silent,
) -> Array:
    """Take clusters that the cameras explain out of the masks, and outliers of depth; then close small gaps.

    images: [n, H, W, 3] uint8.  depth: [n, H, W] z-depth.  masks: [n, H, W] bool, True = moves.
    camera_to_world: [n, 4, 4], intrinsics: [n, 3, 3] in pixels.  Returns [n, H, W] bool.
    """
    refined = np.zeros(masks.shape, dtype=bool)
    for frame in progress(range(len(masks)), "masks held against the cameras"):
        points = world_points(depth[frame], camera_to_world[frame], intrinsics[frame])
        labels = label_movers(points, masks[frame], seed)
        losses = cluster_losses(frame, points, labels, images, depth, masks, camera_to_world, intrinsics)
        refined[frame] = keep_clusters(labels, losses > MAX_LOSS)
    return refined


def world_points(depth: Array, camera_to_world: Array, intrinsics: Array) -> Array:
    """z-depth [H, W] -> points [H, W, 3] float64 in the world's frame."""
    rows, columns = np.indices(depth.shape) + 0.5
    rays = np.stack([columns, rows, np.ones(depth.shape)], axis=-1) @ np.linalg.inv(intrinsics.astype(np.float64)).T
    matrix = camera_to_world.astype(np.float64)
    return np.asarray((rays * depth[..., None]) @ matrix[:3, :3].T + matrix[:3, 3])


def label_movers(points: Array, mask: Array, seed: int) -> Array:
    """Points [H, W, 3] and mask [H, W] -> labels [H, W] int64: clusters of moving points, STATIC, OUTLIER."""
    labels = np.where(is_outlier(points.reshape(-1, 3)).reshape(mask.shape), OUTLIER, STATIC)
    chosen = mask & (labels == STATIC)
    if chosen.any():
        features = torch.from_numpy(points[chosen].astype(np.float32))[None]
        labels[chosen] = cluster_tokens(features, NUM_CLUSTERS, seed)[0]
    return labels


def is_outlier(points: Array) -> Array:
    """[m, 3] -> [m] bool: not finite, or farther from its nearest points than is usual, by 2.5 standard deviations."""
    outlier: Array = np.logical_not(np.isfinite(points).all(axis=1))
    known = points[~outlier]
    if len(known) > 1:
        neighbours = list(range(1, min(NEIGHBOURS, len(known)) + 1))
        mean = np.asarray(cKDTree(known).query(known, k=neighbours, workers=-1)[0]).mean(axis=1)
        outlier[~outlier] = mean > mean.mean() + OUTLIER_DEVIATIONS * mean.std(ddof=1)
    return outlier


def cluster_losses(
    frame: int,
    points: Array,
    labels: Array,
    images: Array,
    depth: Array,
    masks: Array,
    camera_to_world: Array,
    intrinsics: Array,
) -> Array:
    """How badly every cluster of ``frame`` fits what all other frames see at its place: [clusters] float64.

    Mean difference of depth plus mean difference of colour (in [0, 1]) over the projections that count: inside the
    image, visible and on a static pixel.  UNKNOWN for a cluster of which fewer than 5 % count.
    points: [H, W, 3] of this frame in the world.  labels: [H, W]; all else as in ``refine_masks``.
    """
    chosen = labels >= 0
    cluster, moving = labels[chosen], points[chosen]
    colour = images[frame][chosen] / 255
    height, width = labels.shape
    length = max(NUM_CLUSTERS, int(cluster.max(initial=-1)) + 1)
    counted, off = np.zeros(length), np.zeros(length)
    to_camera = invert_rigid(camera_to_world.astype(np.float64))
    for other in range(len(images)):
        if other == frame:
            continue
        projected = (moving @ to_camera[other, :3, :3].T + to_camera[other, :3, 3]) @ intrinsics[other].T
        z = projected[:, 2]
        x, y = (projected[:, axis] / np.where(z > 0, z, 1) for axis in (0, 1))
        places = np.stack([x / (width - 1), y / (height - 1)], axis=-1) * 2 - 1
        seen_depth = _sample(depth[other][..., None], places, "nearest")[:, 0]
        seen_mask = _sample(masks[other][..., None], places, "bilinear")[:, 0]
        seen_colour = _sample(images[other] / 255, places, "bilinear")
        counts = (x > 0) & (x < width) & (y > 0) & (y < height) & (z > 0)
        counts &= (z - OCCLUSION < seen_depth) & (seen_mask <= 0.5)
        error = np.abs(z - seen_depth) + np.abs(colour - seen_colour).sum(axis=1) / 3
        counted += np.bincount(cluster[counts], minlength=length)
        off += np.bincount(cluster[counts], weights=error[counts], minlength=length)
    views = (len(images) - 1) * np.bincount(cluster, minlength=length)
    known = (counted > 0) & (LEAST_VIEWS * counted >= views)
    return np.where(known, off / np.maximum(counted, 1), UNKNOWN)


def keep_clusters(labels: Array, dynamic: Array) -> Array:
    """The pixels [H, W] bool of the clusters that are ``dynamic`` [clusters] bool, gaps closed and a pixel wider."""
    kept = ((labels >= 0) & dynamic[np.maximum(labels, 0)]).astype(np.uint8)
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    closed = cv2.morphologyEx(kept, cv2.MORPH_CLOSE, ellipse)
    return np.asarray(cv2.dilate(closed, np.ones((3, 3), np.uint8)) > 0)


def _sample(values: Array, places: Array, mode: str) -> Array:
    """[H, W, C] at ``places`` [m, 2], -1 and 1 the centres of the outermost pixels, zero beyond -> [m, C] float64."""
    maps = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)[None]
    grid = torch.from_numpy(places)[None, None]
    return F.grid_sample(maps, grid, mode=mode, align_corners=True)[0, :, 0].T.numpy()
