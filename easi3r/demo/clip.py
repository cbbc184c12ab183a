"""The demo's clip: one generated world with two movers, seen from seeds that training never uses, and its truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import imageio.v3 as iio
import numpy as np

from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import make_world
from easi3r.metrics import absolute_trajectory_error, depth_errors, jaccard, path_length

if TYPE_CHECKING:
    from easi3r.scene import Scene

SEED = 0
FPS = 4.0  # so that the walk takes three seconds


@dataclass(frozen=True)
class Comparison:
    """A reconstruction of a clip against its truth."""

    mask_j: float  # mean J (intersection over union) of the frames' masks
    ate_percent: float  # RMSE of the camera's positions after Sim(3), over the length of the path
    depth_abs_rel_percent: float  # static pixels, one scale for the clip
    depth_abs_rel_percent_moving: float  # the pixels that move, at the same scale
    focal_percent: float  # error of the focal length


def demo_clip() -> Clip:
    """12 frames of 128 x 96 pixels, the same every time; takes a second or two."""
    return render(make_world(SEED))


def compare(scene: Scene, clip: Clip) -> Comparison:
    """Measure ``scene`` against the truth of ``clip``, from whose images it was made."""
    static = depth_errors(scene.depth, clip.depth, ~clip.dynamic_mask, "scale")
    moving = float("nan")
    if clip.dynamic_mask.any():
        moving = 100 * depth_errors(static.scale * scene.depth, clip.depth, clip.dynamic_mask).abs_rel
    length = path_length(clip.camera_to_world)
    error = absolute_trajectory_error(scene.camera_to_world, clip.camera_to_world)
    return Comparison(
        mask_j=float(jaccard(scene.dynamic_mask, clip.dynamic_mask).mean()),
        ate_percent=100 * error / length if length > 0 else float("nan"),
        depth_abs_rel_percent=100 * static.abs_rel,
        depth_abs_rel_percent_moving=moving,
        focal_percent=100 * abs(float(scene.intrinsics[0, 0, 0] / clip.intrinsics[0, 0, 0]) - 1),
    )


def write_overview(path: Path, scene: Scene, clip: Clip, frames: int = 4) -> None:
    """A PNG: a few frames side by side; below each its mask and depth, found and true."""
    scale = depth_errors(scene.depth, clip.depth, ~clip.dynamic_mask, "scale").scale
    columns = []
    for index in np.linspace(0, scene.num_frames - 1, frames).round().astype(int):
        image = scene.images[index]
        tiles = [image]
        for mask in (scene.dynamic_mask[index], clip.dynamic_mask[index]):
            tiles.append(np.where(mask[..., None], (0.4 * image + [153, 0, 0]).astype(np.uint8), image))
        for depth in (scale * scene.depth[index], clip.depth[index]):
            near = np.clip(clip.depth.min() / np.maximum(depth, 1e-6), 0, 1)
            tiles.append(cv2.applyColorMap((255 * near).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1])
        columns.append(np.concatenate(tiles, axis=0))
    iio.imwrite(path, np.concatenate(columns, axis=1).repeat(2, axis=0).repeat(2, axis=1))
