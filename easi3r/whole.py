"""What is known of a clip, filled in piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from easi3r.alignment import join_piece, later_half
from easi3r.structures import AlignedCameras, Array, AttentionMaps, DynamicMasks


@dataclass
class Whole:
    """Arrays of all frames; of the frames that two pieces share, each gives the half that is nearer to its middle."""

    masks: DynamicMasks
    attention: AttentionMaps
    cameras: AlignedCameras | None
    notes: list[dict[str, Any]]  # for ``meta``, one per piece

    @classmethod
    def empty(cls, size: tuple[int, int, int], patch_size: int, *, with_cameras: bool) -> Whole:
        n, height, width = size
        tokens = (n, height // patch_size, width // patch_size)
        cameras = None
        if with_cameras:
            cameras = AlignedCameras(
                camera_to_world=np.zeros((n, 4, 4), np.float32),
                intrinsics=np.zeros((n, 3, 3), np.float32),
                depth=np.zeros(size, np.float32),
                confidence=np.zeros(size, np.float32),
            )
        masks = DynamicMasks(np.zeros(size, np.float32), np.zeros(size, bool), None)
        return cls(masks, AttentionMaps(*(np.zeros(tokens, np.float32) for _ in range(5))), cameras, [])

    @property
    def focal_px(self) -> float | None:
        """Of the first piece, which the others share; None before it is known."""
        focal = 0.0 if self.cameras is None else float(self.cameras.intrinsics[0, 0, 0])
        return focal or None

    def write_motion(self, masks: DynamicMasks, attention: AttentionMaps, piece: range, shared: int) -> None:
        target, fresh = later_half(piece, shared)
        self.masks.score[target], self.masks.mask[target] = masks.score[fresh], masks.mask[fresh]
        for name, values in attention.arrays().items():
            getattr(self.attention, name)[target] = values[fresh]
        self.notes.append({"frames": [piece.start, piece.stop], "threshold": masks.threshold})

    def write_cameras(self, cameras: AlignedCameras, piece: range, shared: int, static: Array) -> None:
        assert self.cameras is not None
        seam = join_piece(self.cameras, cameras, piece, shared, static)
        if shared:
            self.notes[-1]["seam_residual"] = round(seam, 6)  # median, relative to the median depth
