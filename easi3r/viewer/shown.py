"""Which points of a scene are shown: the static ones of all frames together, the moving ones frame by frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from easi3r.errors import InputError
from easi3r.geometry import depth_edges, pixel_grid
from easi3r.progress import Progress, silent

if TYPE_CHECKING:
    from easi3r.scene import Keep, Scene
    from easi3r.structures import Array

LEAST_CONFIDENCE = 1.0  # what the alignment leaves to points that a better frame looks through
FRUSTUM_DEPTH = 0.1  # length of the drawn cameras, in median depths of the scene


@dataclass(frozen=True)
class ShownPoints:
    """m points of a scene of n frames: first the static ones, then the moving ones, each frame after frame."""

    points: Array  # [m, 3] float32, world frame
    colors: Array  # [m, 3] uint8 RGB
    frame_index: Array  # [m] int32
    score: Array  # [m] float32 in [0, 1], higher moves more
    confidence_rank: Array  # [m] uint8, 0 to 255: the share of these points that are no more confident
    starts: Array  # [n + 1] int64: static points are rows [0, starts[0]), frame i's moving ones from starts[i] on
    available: int  # points that there were before some were left out
    size: Array  # [m] float32: distance to a point's neighbours, about, in the scene's unit
    depth: float  # median depth of the points, in the scene's unit

    @property
    def static(self) -> slice:
        """The rows that are there at all times."""
        return slice(0, int(self.starts[0]))

    def moving(self, frame: int) -> slice:
        """The rows that are there in one frame only."""
        return slice(int(self.starts[frame]), int(self.starts[frame + 1]))

    @property
    def summary(self) -> str:
        """How many are shown of how many there are."""
        return f"{len(self.points):,} of {self.available:,} points"

    def colored_by(self, what: str, rows: slice = slice(None)) -> Array:
        """[k, 3] uint8 RGB of some rows.  what: 'image', 'time' (blue to red) or 'dynamic score' (bright: moves)."""
        if what == "image":
            return self.colors[rows]
        if what == "time":
            last = max(len(self.starts) - 2, 1)
            return palette(self.frame_index[rows] / last, cv2.COLORMAP_TURBO)
        if what == "dynamic score":
            return palette(self.score[rows], cv2.COLORMAP_INFERNO)
        raise InputError(f"Points cannot be coloured by {what!r}; expected 'image', 'time' or 'dynamic score'.")


def palette(values: Array, colormap: int) -> Array:
    """[m] in [0, 1] -> [m, 3] uint8 RGB by one of OpenCV's colour maps."""
    levels = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], colormap)[:, 0, ::-1]
    return np.asarray(table[levels])


def shown_points(
    scene: Scene, max_points: int, *, keep: Keep | None = None, progress: Progress = silent
) -> ShownPoints:
    """Choose at most ``max_points`` points; depth edges and padding are left out, as in exports.

    Static and moving points have half of the budget each, unless one leaves the other more.  What is left out is
    of all frames alike, drawn at random and the same every time.  Points of no confidence (1) are left out too, unless
    that would be most of them.  keep: all points, or the static or moving ones; None: as the scene was made for.

    Raises InputError for a budget below 1 or another ``keep``.
    """
    if max_points < 1:
        raise InputError(f"max_points is {max_points}; expected a whole number from 1 on.")
    if (keep := scene.keep if keep is None else keep) not in ("all", "static", "dynamic"):
        raise InputError(f"keep is {keep!r}; expected 'all', 'static' or 'dynamic'.")
    known = _known_pixels(scene, progress)
    moves = known & scene.dynamic_mask & (keep != "static")
    known &= ~scene.dynamic_mask & (keep != "dynamic")
    counts = [int(np.count_nonzero(mask)) for mask in (known, moves)]
    moving_budget = min(counts[1], max(max_points // 2, max_points - counts[0]))
    budgets = [min(counts[0], max_points - moving_budget), moving_budget]
    frames = [_spread(mask, budget) for mask, budget in zip((known, moves), budgets, strict=True)]
    ends = np.cumsum([len(pixels) for pixels in frames[0] + frames[1]])
    columns = [_points_at(scene, i % scene.num_frames, pixels) for i, pixels in enumerate(frames[0] + frames[1])]
    points, colors, frame_index, score, confidence, depth, footprint = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    n, height, width = scene.images.shape[:3]
    # a frame's worth of points covers what is seen; beyond that, more points mean more overlap, not finer ones
    thinned = np.float32(max(1.0, height * width / max(1, budgets[0])) ** 0.5)
    return ShownPoints(
        points=points,
        colors=colors,
        frame_index=frame_index,
        score=score,
        confidence_rank=_rank(confidence),
        starts=ends[n - 1 :].astype(np.int64),
        available=sum(counts),
        size=thinned * footprint,
        depth=float(np.median(depth)) if len(depth) else 1.0,
    )


def _known_pixels(scene: Scene, progress: Progress) -> Array:
    """[n, H, W] bool: pixels whose points can be shown."""
    known = scene.valid_mask & (scene.depth > 0)
    confident = scene.confidence > LEAST_CONFIDENCE
    if np.count_nonzero(confident) > known.size / 2:
        known &= confident
    for i in progress(range(scene.num_frames), "points"):
        known[i] &= ~depth_edges(scene.depth[i]) & np.isfinite(scene.depth[i])
    return known


def _spread(mask: Array, budget: int) -> list[Array]:
    """Per frame, the flat indices of its share of ``budget`` True pixels in all, drawn at random, always the same."""
    rng = np.random.default_rng(0)
    counts = np.count_nonzero(mask, axis=(1, 2))
    total = max(int(counts.sum()), 1)
    shares = np.diff(np.concatenate([[0], np.cumsum(counts) * budget // total]))
    chosen = []
    for frame, count, share in zip(mask, counts, shares, strict=True):
        pixels = np.flatnonzero(frame)
        if share < count:
            pixels = np.sort(rng.choice(pixels, share, replace=False, shuffle=False))
        chosen.append(pixels)
    return chosen


def _points_at(scene: Scene, frame: int, pixels: Array) -> tuple[Array, ...]:
    """Of some pixels (flat indices): world points, colours, frame index, score, confidence, depth, a pixel's width."""
    fields = (scene.images, scene.dynamic_score, scene.confidence, scene.depth)
    colors, score, confidence, depth = (field[frame].reshape(-1, *field.shape[3:])[pixels] for field in fields)
    intrinsics, pose = (matrices[frame].astype(np.float64) for matrices in (scene.intrinsics, scene.camera_to_world))
    grid = pixel_grid(*scene.depth.shape[1:]).reshape(-1, 2)[pixels]
    rays = (grid - intrinsics[:2, 2]) / intrinsics[[0, 1], [0, 1]]
    z = depth.astype(np.float64)[:, None]
    points = np.hstack([rays * z, z]) @ pose[:3, :3].T + pose[:3, 3]
    index = np.full(len(pixels), frame, dtype=np.int32)
    return points.astype(np.float32), colors, index, score, confidence, depth, depth / np.float32(intrinsics[0, 0])


def _rank(values: Array) -> Array:
    """[m] -> [m] uint8: 255 times the share of the values that are no greater, so that equal ones stay together."""
    if not len(values):
        return np.zeros(0, dtype=np.uint8)
    steps = np.sort(values)[-(-np.arange(1, 256) * len(values) // 255) - 1]  # from which value on a rank is reached
    return np.searchsorted(steps, values, side="right").astype(np.uint8)
