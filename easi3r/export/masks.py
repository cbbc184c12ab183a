"""Masks and scores at the size of the source frames, for compositing, inpainting and training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.views import frame_name
from easi3r.mask_files import MEANINGS, write_png

if TYPE_CHECKING:
    from pathlib import Path

    from easi3r.export.options import ExportOptions
    from easi3r.scene import Motion

FILES = {
    "mask": "PNG, one per frame: 255 = moves, 0 = static and what the network did not see (meta.crops)",
    "score": "16-bit PNG: 65535 = a score of 1, higher moves more",
    "masks.json": "of each frame: its name in the source; origin: given (as it was handed in), found (no resizing was "
    "needed), guided (enlarged along the edges of the source frame), interpolated (enlarged without it)",
}
SCORE_MEANING = "65535 = a score of 1, moves; 0 = static; linear between them"


def write(motion: Motion, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``, frame after frame; see ``FILES``."""
    for name in ("mask", "score"):
        (folder / name).mkdir()
    names = motion.meta.get("names", [None] * motion.num_frames)
    table = []
    frames = options.progress(range(motion.num_frames), "masks")
    for i, frame in zip(frames, motion.original_masks(), strict=True):
        file = f"{frame_name(i)}.png"
        write_png(folder / "mask" / file, frame.mask.astype(np.uint8) * 255, MEANINGS["moving"])
        write_png(folder / "score" / file, np.rint(frame.score * 65535).astype(np.uint16), SCORE_MEANING)
        table.append({"file": file, "source": names[i], "origin": frame.origin})
    (folder / "masks.json").write_text(json.dumps({"frames": table}, indent=1), encoding="utf-8")
