"""Depth as 16-bit PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.options import ExportOptions
from easi3r.export.views import frame_name
from easi3r.mask_files import write_png

if TYPE_CHECKING:
    from easi3r.scene import Scene

FILES = {
    "depth": "16-bit z-depth in steps of depth.json's scale; 0 = there is none",
    "depth.json": "scale: depth = scale * value, one for the whole scene",
}


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``.  The farthest depth of the scene is 65535."""
    known = scene.valid_mask & np.isfinite(scene.depth) & (scene.depth > 0)
    scale = float(scene.depth.max(where=known, initial=0)) / np.iinfo(np.uint16).max or 1.0
    (folder / "depth").mkdir()
    for i in options.progress(range(scene.num_frames), "depth"):
        steps = np.maximum(np.rint(np.where(known[i], scene.depth[i], 0) / scale), known[i])  # a depth is never 0
        write_png(folder / "depth" / f"{frame_name(i)}.png", steps.astype(np.uint16))
    text = json.dumps({"scale": scale, "rule": "z-depth = scale * value; value 0: no depth"}, indent=1)
    (folder / "depth.json").write_text(text, encoding="utf-8")
