"""What is known of a clip, filled in piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from easi3r.alignment import join_piece, later_half
from easi3r.config import KnownSettings, Settings
from easi3r.instances import continue_ids, largest_first
from easi3r.quality import Measurements
from easi3r.structures import AlignedCameras, Array, DynamicMasks, Instances, Known, Maps, PointTracks


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

    def known_for(self, known: Known, piece: range, shared: int, settings: Settings) -> tuple[Known, KnownSettings]:
        """What a piece may rely on: what the user knows of it, and what the pieces before it have found.

        All pieces share the lens of the first (unless each frame has its own); where poses are known or the camera
        rests, the poses of the frames that a piece shares stay as they are.
        """
        uses = settings.known
        if self.cameras is None or not shared:
            return known, uses
        if settings.alignment.shared_focal:
            lens = np.tile(self.cameras.intrinsics[:1].astype(np.float64), (len(piece), 1, 1))
            known, uses = replace(known, intrinsics=lens), replace(uses, intrinsics_use="fixed")
        rests = settings.alignment.camera == "static"
        if rests or (known.camera_to_world is not None and uses.poses_use == "fixed"):
            poses = (
                np.full((len(piece), 4, 4), np.nan) if known.camera_to_world is None else known.camera_to_world.copy()
            )
            poses[:shared] = self.cameras.camera_to_world[piece.start : piece.start + shared]
            known, uses = replace(known, camera_to_world=poses), replace(uses, poses_use="fixed")
        return known, uses

    def write_cameras(
        self, cameras: AlignedCameras, piece: range, shared: int, static: Array, known: Known, uses: KnownSettings
    ) -> None:
        """``known`` and ``uses`` are those that the piece was aligned with."""
        assert self.cameras is not None
        keeps_poses = len(known.posed()) > 0 and uses.poses_use == "fixed"
        keeps_scale = (keeps_poses and known.poses_set_the_scale) or known.depth_sets_the_scale
        seam = join_piece(
            self.cameras, cameras, piece, shared, static, keeps_poses=keeps_poses, keeps_scale=keeps_scale
        )
        if shared:
            self.notes[-1]["seam_residual"] = round(seam, 6)  # median, relative to the median depth
