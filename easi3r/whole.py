"""What is known of a clip, filled in piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from easi3r.alignment import join_piece, later_half
from easi3r.instances import continue_ids, largest_first
from easi3r.piece_result import PieceCameras, PieceResult
from easi3r.quality import Measurements
from easi3r.structures import AlignedCameras, Array, DynamicMasks, Instances, Maps, PointTracks


@dataclass
class Whole:
    """Arrays of all frames; of the frames that two pieces share, each gives the half that is nearer to its middle."""

    masks: DynamicMasks
    cameras: AlignedCameras | None
    attention: Maps | None = None  # of the first piece's kind and size
    tracks: PointTracks | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)  # for ``meta``, one per piece
    measured: list[Measurements] = field(default_factory=list)  # for the verdict, one per piece
    labels: Array | None = None  # [n, H, W] int32 ids of the instances, if they are wanted

    @classmethod
    def empty(cls, size: tuple[int, int, int], *, with_cameras: bool) -> Whole:
        n, cameras = size[0], None
        if with_cameras:
            cameras = AlignedCameras(
                camera_to_world=np.zeros((n, 4, 4), np.float32),
                intrinsics=np.zeros((n, 3, 3), np.float32),
                depth=np.zeros(size, np.float32),
                confidence=np.zeros(size, np.float32),
            )
        masks = DynamicMasks(np.zeros(size, np.float32), np.zeros(size, bool), None)
        return cls(masks, cameras)

    def write(self, result: PieceResult, piece: range, shared: int) -> None:
        """The next piece, whose first ``shared`` frames are in those before it."""
        self.write_motion(result.masks, result.attention, piece, shared)
        if result.things is not None:
            self.write_instances(result.things, piece, shared)
        if result.tracks is not None:
            self.write_tracks(result.tracks, piece)
        if result.placed is not None:
            self.write_cameras(result.placed, piece, shared)

    def write_motion(self, masks: DynamicMasks, attention: Maps, piece: range, shared: int) -> None:
        target, fresh = later_half(piece, shared)
        self.masks.score[target], self.masks.mask[target] = masks.score[fresh], masks.mask[fresh]
        if self.attention is None:
            n = len(self.masks.mask)
            self.attention = type(attention)(
                **{name: np.zeros((n, *values.shape[1:]), np.float32) for name, values in attention.arrays().items()}
            )
        for name, values in attention.arrays().items():
            getattr(self.attention, name)[target] = values[fresh]
        found = masks.threshold
        threshold = list(found) if isinstance(found, tuple) else found  # as JSON has it
        self.notes.append({"frames": [piece.start, piece.stop], "threshold": threshold})

    def write_instances(self, labels: Array, piece: range, shared: int) -> None:
        """Ids of a piece become those of the frames that it shares with the pieces before, where these show them."""
        if self.labels is None:
            self.labels = np.zeros(self.masks.mask.shape, np.int32)
        there = self.labels[piece.start : piece.start + shared]
        target, fresh = later_half(piece, shared)
        self.labels[target] = continue_ids(there, labels, int(self.labels.max(initial=0)))[fresh]

    def instances(self) -> Instances | None:
        """Of the whole clip, the thing with most pixels first."""
        return None if self.labels is None else Instances.measured(largest_first(self.labels), self.masks.score)

    def write_tracks(self, tracks: PointTracks, piece: range) -> None:
        """The tracks of a piece; where it begins, they are those of the piece before."""
        if self.tracks is None:
            n, t = len(self.masks.mask), tracks.visibility.shape[1]
            empty = (np.zeros((n, t, *more), np.float32) for more in ((2,), (), ()))
            self.tracks = PointTracks(*empty)
        for name, values in vars(tracks).items():
            getattr(self.tracks, name)[piece.start + (piece.start > 0) : piece.stop] = values[piece.start > 0 :]

    def write_cameras(self, placed: PieceCameras, piece: range, shared: int) -> None:
        assert self.cameras is not None
        self.measured.append(placed.measured)
        seam = join_piece(
            self.cameras,
            placed.cameras,
            piece,
            shared,
            ~placed.unseen[:shared],
            keeps_poses=placed.keeps_poses,
            keeps_scale=placed.keeps_scale,
        )
        if shared:
            self.notes[-1]["seam_residual"] = round(seam, 6)  # median, relative to the median depth
