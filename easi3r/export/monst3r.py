"""The folder that MonST3R's demo leaves behind, which its viser viewer and those of its successors read.

Meant for ``viser/visualizer_monst3r.py --data FOLDER`` of MonST3R and Easi3R.  Names and layout are from what is
publicly known of these folders; the viewers themselves have not been tried with it.  In this layout poses have the
quaternion's w first (unlike TUM's own files), and a frame's number in place of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from easi3r.export.options import ExportOptions
from easi3r.geometry import depth_edges
from easi3r.mask_files import MEANINGS, write_png

if TYPE_CHECKING:
    from easi3r.scene import Scene

FILES = {
    "pred_traj.txt": "frame number, tx ty tz qw qx qy qz, camera-to-world, OpenCV axes",
    "pred_intrinsics.txt": "the 9 numbers of K, row by row, centre of the top-left pixel at (0, 0)",
    "frame_0000.png": "the frames, RGB",
    "frame_0000.npy": "z-depth, float32 [H, W]",
    "conf_0.npy": "confidence, float32 [H, W], 1 or more; 0 on padding and depth edges",
    "init_conf_0.npy": "the same again: some viewers ask for both",
    "dynamic_mask_0.png": "255 = moves",
    "enlarged_dynamic_mask_0.png": "the same, grown by 5 pixels",
}
GROWTH_PX = 5


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``."""
    path = scene.trajectory()
    numbers = np.arange(scene.num_frames)
    np.savetxt(folder / "pred_traj.txt", np.column_stack([numbers, path[:, 1:4], path[:, 7], path[:, 4:7]]), fmt="%.9f")
    np.savetxt(folder / "pred_intrinsics.txt", scene.intrinsics.reshape(-1, 9), fmt="%.9g")
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * GROWTH_PX + 1, 2 * GROWTH_PX + 1))
    for i in options.progress(numbers.tolist(), "frames"):
        usable = scene.valid_mask[i] & ~depth_edges(scene.depth[i])
        confidence = np.where(usable, scene.confidence[i], 0).astype(np.float32)
        mask = scene.dynamic_mask[i].astype(np.uint8) * 255
        write_png(folder / f"frame_{i:04d}.png", scene.images[i])
        np.save(folder / f"frame_{i:04d}.npy", scene.depth[i])
        np.save(folder / f"conf_{i}.npy", confidence)
        np.save(folder / f"init_conf_{i}.npy", confidence)
        write_png(folder / f"dynamic_mask_{i}.png", mask, MEANINGS["moving"])
        write_png(folder / f"enlarged_dynamic_mask_{i}.png", np.asarray(cv2.dilate(mask, disc)), MEANINGS["moving"])
