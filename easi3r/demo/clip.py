"""The demo's clip: one generated world with two movers, seen from seeds that training never uses, and its truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import make_world
from easi3r.metrics import absolute_trajectory_error, depth_errors, path_length

if TYPE_CHECKING:
    from easi3r.scene import Scene
    from easi3r.structures import AlignedCameras, Array

SEED = 0
FPS = 4.0  # so that the walk takes three seconds


@dataclass(frozen=True)
class GeometryErrors:
    """Cameras and depth of a clip against its truth."""

    ate_percent: float  # RMSE of the camera's positions after Sim(3), over the length of the path
    depth_abs_rel_percent: float  # static pixels, one scale for the clip
    depth_abs_rel_percent_moving: float  # the pixels that move, at the same scale
    focal_percent: float  # error of the focal length


def demo_clip() -> Clip:
    """12 frames of 128 x 96 pixels, the same every time; takes a second or two."""
    return render(make_world(SEED))


def geometry_errors(found: Scene | AlignedCameras, clip: Clip) -> GeometryErrors:
    """Measure what was found from the images of ``clip`` against its truth."""
    static = depth_errors(found.depth, clip.depth, ~clip.dynamic_mask, "scale")
    moving = float("nan")
    if clip.dynamic_mask.any():
        moving = 100 * depth_errors(static.scale * found.depth, clip.depth, clip.dynamic_mask).abs_rel
    length = path_length(clip.camera_to_world)
    error = absolute_trajectory_error(found.camera_to_world, clip.camera_to_world)
    return GeometryErrors(
        ate_percent=100 * error / length if length > 0 else float("nan"),
        depth_abs_rel_percent=100 * static.abs_rel,
        depth_abs_rel_percent_moving=moving,
        focal_percent=100 * abs(float(found.intrinsics[0, 0, 0] / clip.intrinsics[0, 0, 0]) - 1),
    )


def overview(scene: Scene, clip: Clip, frames: int = 4) -> Array:
    """[H, W, 3] uint8 picture: a few frames side by side; below each its mask and depth, found and true."""
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
    return np.concatenate(columns, axis=1).repeat(2, axis=0).repeat(2, axis=1)
