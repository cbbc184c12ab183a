"""Depth as OpenEXR, written after its documentation of the file layout: OpenCV's wheels no longer hold a writer."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.options import ExportOptions
from easi3r.export.views import frame_name

if TYPE_CHECKING:
    from easi3r.scene import Scene
    from easi3r.structures import Array

FILES = {"depth": "32-bit z-depth in the scene's unit, the one channel Z; 0 = there is none"}
MAGIC, VERSION = 20000630, 2
FLOAT = 2  # pixel type


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``."""
    (folder / "depth").mkdir()
    for i in options.progress(range(scene.num_frames), "depth"):
        depth = np.where(scene.valid_mask[i], scene.depth[i], 0).astype("<f4")
        (folder / "depth" / f"{frame_name(i)}.exr").write_bytes(_exr(depth))


def _exr(values: Array) -> bytes:
    """[h, w] float32 -> a file of scan lines, not compressed."""
    height, width = values.shape
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    attributes = {
        ("channels", "chlist"): b"Z\0" + struct.pack("<iB3xii", FLOAT, 0, 1, 1) + b"\0",
        ("compression", "compression"): b"\0",
        ("dataWindow", "box2i"): window,
        ("displayWindow", "box2i"): window,
        ("lineOrder", "lineOrder"): b"\0",
        ("pixelAspectRatio", "float"): struct.pack("<f", 1),
        ("screenWindowCenter", "v2f"): struct.pack("<2f", 0, 0),
        ("screenWindowWidth", "float"): struct.pack("<f", 1),
    }
    header = struct.pack("<ii", MAGIC, VERSION)
    for (name, kind), value in attributes.items():
        header += f"{name}\0{kind}\0".encode("ascii") + struct.pack("<i", len(value)) + value
    header += b"\0"
    lines = np.empty(height, dtype=[("y", "<i4"), ("size", "<i4"), ("values", "<f4", (width,))])
    lines["y"], lines["size"], lines["values"] = np.arange(height), 4 * width, values
    offsets: Array = len(header) + 8 * height + lines.itemsize * np.arange(height)
    return header + offsets.astype("<u8").tobytes() + lines.tobytes()
