"""transforms.json as nerfstudio's documentation of its data conventions says, with images, masks and depth.

The world is the scene's own (y down in the first frame); cameras are OpenGL's: x right, y up, z backward, so that
``transform_matrix = camera_to_world diag(1, -1, -1, 1)``.  The centre of the top-left pixel is (0.5, 0.5) there.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from easi3r.export.options import ExportOptions
from easi3r.export.ply import write_ply
from easi3r.export.tracks import find_tracks
from easi3r.export.views import frame_name, view_intrinsics, view_sizes, views
from easi3r.mask_files import MEANINGS, write_png

if TYPE_CHECKING:
    from easi3r.scene import Scene
    from easi3r.structures import Array

logger = logging.getLogger("easi3r")
FILES = {
    "transforms.json": "cameras; time is 0 at the first frame and 1 at the last, timestamp is in seconds",
    "images": "the frames",
    "masks": "0 = moves or is no part of the scene, takes no part in training; 255 = is used",
    "depths": "16-bit z-depth in thousandths of the scene's unit, nerfstudio's millimetres; 0 = not known",
    "sparse_pc.ply": "static points, for Gaussian splatting to start from (absent if there are none)",
}
OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
DEPTH_UNIT = 0.001  # nerfstudio's default depth_unit_scale_factor: scene units per step of the PNG


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``."""
    for name in ("images", "masks", "depths"):
        (folder / name).mkdir()
    lenses = _lenses(scene, options)
    shared = all(lens == lenses[0] for lens in lenses)
    header: dict[str, Any] = {"camera_model": "OPENCV"} | (lenses[0] if shared else {})
    header |= dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0)
    matrices = scene.camera_to_world.astype(np.float64) @ OPENGL_FROM_OPENCV
    seconds = scene.timestamps - scene.timestamps[0]
    frames = []
    lost = 0
    for i, view in enumerate(options.progress(views(scene, original=options.original_images), "images")):
        name = f"{frame_name(i)}.png"
        steps, beyond = _depth_steps(view.depth)
        lost += beyond
        write_png(folder / "images" / name, view.image)
        write_png(folder / "masks" / name, view.static.astype(np.uint8) * 255, MEANINGS["static"])
        write_png(folder / "depths" / name, steps)
        frames.append(
            {
                "file_path": f"images/{name}",
                "mask_path": f"masks/{name}",
                "depth_file_path": f"depths/{name}",
                "transform_matrix": matrices[i].tolist(),
                "time": float(seconds[i] / seconds[-1]) if seconds[-1] > 0 else 0.0,
                "timestamp": float(scene.timestamps[i]),
            }
            | ({} if shared else lenses[i])
        )
    if lost:
        logger.warning(
            "nerfstudio: the depth of %d pixels does not fit 16 bits of %g, and is left out", lost, DEPTH_UNIT
        )
    cloud = find_tracks(scene, options).cloud
    if len(cloud.points):
        write_ply(folder / "sparse_pc.ply", [cloud], len(cloud.points))
        header["ply_file_path"] = "sparse_pc.ply"
    text = json.dumps(header | {"frames": frames}, indent=1, allow_nan=False)
    (folder / "transforms.json").write_text(text, encoding="utf-8")


def _lenses(scene: Scene, options: ExportOptions) -> list[dict[str, float]]:
    intrinsics = view_intrinsics(scene, original=options.original_images)
    sizes = view_sizes(scene, original=options.original_images)
    return [
        {
            "fl_x": float(k[0, 0]),
            "fl_y": float(k[1, 1]),
            "cx": float(k[0, 2]) + 0.5,
            "cy": float(k[1, 2]) + 0.5,
            "w": width,
            "h": height,
        }
        for k, (width, height) in zip(intrinsics, sizes, strict=True)
    ]


def _depth_steps(depth: Array) -> tuple[Array, int]:
    """[h, w] uint16, and how many pixels do not fit."""
    steps = np.rint(depth / DEPTH_UNIT)
    beyond = steps > np.iinfo(np.uint16).max
    return np.where(beyond, 0, steps).astype(np.uint16), int(beyond.sum())
