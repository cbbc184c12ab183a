"""Everything in one NumPy file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from easi3r.export.clouds import budgeted_clouds, merge
from easi3r.export.options import ExportOptions

if TYPE_CHECKING:
    from easi3r.scene import Scene

KEYS = {
    "images": "[n, H, W, 3] uint8 RGB",
    "timestamps": "[n] float64 seconds",
    "camera_to_world": "[n, 4, 4] float32, OpenCV axes",
    "intrinsics": "[n, 3, 3] float32, pixels of images, centre of the top-left one at (0, 0)",
    "depth": "[n, H, W] float32 z-depth",
    "confidence": "[n, H, W] float32, 1 or more",
    "dynamic_score": "[n, H, W] float32, 0 to 1",
    "dynamic_mask": "[n, H, W] bool, True = moves",
    "valid_mask": "[n, H, W] bool, False = padding",
    "points": "[m, 3] float32, world; depth edges and padding left out",
    "colors": "[m, 3] uint8 RGB of points",
    "frame_index": "[m] int32 of points",
    "dynamic": "[m] bool of points",
}
FILES = {"scene.npz": "; ".join(f"{key} {words}" for key, words in KEYS.items())}


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``KEYS``."""
    cloud = merge(budgeted_clouds(scene, options))._asdict()
    arrays: dict[str, Any] = {key: cloud[key] if key in cloud else getattr(scene, key) for key in KEYS}
    np.savez(folder / "scene.npz", **arrays)
