"""The points of a scene, frame by frame, within a budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.options import ExportOptions
from easi3r.scene import PointCloud

if TYPE_CHECKING:
    from easi3r.scene import Keep, Scene
    from easi3r.structures import Array

logger = logging.getLogger("easi3r")


def frame_clouds(scene: Scene, options: ExportOptions, *, keep: Keep | None = None) -> list[PointCloud]:
    """One cloud per frame, which may be empty: ``scene.points`` without depth edges."""
    return [
        scene.points([i], keep or options.keep, options.min_confidence, edges=False)
        for i in options.progress(range(scene.num_frames), "points")
    ]


def budgeted_clouds(scene: Scene, options: ExportOptions, default: int | None = None) -> list[PointCloud]:
    """``frame_clouds``, thinned to ``options.max_points``, or to ``default`` if that is None."""
    clouds = frame_clouds(scene, options)
    budget, count = options.max_points or default, sum(len(cloud.points) for cloud in clouds)
    if budget is None or count <= budget:
        return clouds
    logger.info("%d of %d points are exported; max_points sets how many", budget, count)
    return thin(clouds, budget)


def thin(clouds: Sequence[PointCloud], budget: int) -> list[PointCloud]:
    """Leave points out at random, the same ones every time, until ``budget`` in all are left.

    Static and moving points have half of the budget each, unless one leaves the other more.
    """
    dynamic = np.concatenate([cloud.dynamic for cloud in clouds])
    moving, still = np.flatnonzero(dynamic), np.flatnonzero(~dynamic)
    share = min(len(moving), max(budget // 2, budget - len(still)))
    chosen = np.zeros(len(dynamic), dtype=bool)
    chosen[moving[pick(len(moving), share)]] = True
    chosen[still[pick(len(still), budget - share)]] = True
    ends = np.cumsum([len(cloud.dynamic) for cloud in clouds])
    return [select(cloud, rows) for cloud, rows in zip(clouds, np.split(chosen, ends[:-1]), strict=True)]


def merge(clouds: Sequence[PointCloud]) -> PointCloud:
    """All of them in one."""
    return PointCloud(*(np.concatenate(columns) for columns in zip(*clouds, strict=True)))


def select(cloud: PointCloud, rows: Array) -> PointCloud:
    """Some rows of a cloud: a bool mask, or indices."""
    return PointCloud(*(column[rows] for column in cloud))


def pick(count: int, budget: int) -> Array:
    """[min(count, budget)] int64 ascending: so many of ``count`` rows, at random, the same every time."""
    if count <= budget:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, budget, replace=False))
