"""The camera path as TUM's RGB-D benchmark writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.options import ExportOptions

if TYPE_CHECKING:
    from easi3r.scene import Scene

FILES = {"trajectory.txt": "timestamp tx ty tz qx qy qz qw, camera-to-world, seconds"}


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``."""
    np.savetxt(folder / "trajectory.txt", scene.trajectory(), fmt="%.9f")
