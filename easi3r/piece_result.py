"""What is found of one piece of a long clip, and the little of it that other pieces rest on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from easi3r.alignment import later_half
from easi3r.config import KnownSettings, Settings
from easi3r.quality import Measurements
from easi3r.structures import AlignedCameras, Array, DynamicMasks, Known, Maps, PointTracks


@dataclass(frozen=True)
class PieceCameras:
    """Cameras of a piece, in its own world unless something held them."""

    cameras: AlignedCameras
    measured: Measurements
    unseen: Array  # [n, H, W] bool, True = not static
    keeps_poses: bool  # the poses are in the world of the clip already
    keeps_scale: bool  # the depth is in its unit

    @classmethod
    def held(
        cls, cameras: AlignedCameras, measured: Measurements, unseen: Array, known: Known, uses: KnownSettings
    ) -> PieceCameras:
        """``known`` and ``uses`` are those that the piece was aligned with."""
        poses = len(known.posed()) > 0 and uses.poses_use == "fixed"
        scale = (poses and known.poses_set_the_scale) or known.depth_sets_the_scale
        return cls(cameras, measured, unseen, keeps_poses=poses, keeps_scale=scale)


@dataclass(frozen=True)
class PieceResult:
    """All that is found of a piece of n frames; it can be pickled."""

    masks: DynamicMasks
    attention: Maps
    things: Array | None = None  # [n, H, W] ids of what moves, if they are wanted
    tracks: PointTracks | None = None
    placed: PieceCameras | None = None  # None: masks alone


@dataclass(frozen=True)
class Earlier:
    """What pieces take over from those before them: all that ties them to each other before they are joined."""

    lens: Array | None = None  # [3, 3] float32, of the clip's first frame
    # [k, 4, 4] float32 of the clip's first k frames; in one world only where pieces keep poses, and only then used
    camera_to_world: Array | None = None
    tracked: Array | None = None  # [k, t, 2] float32, where the queries are in the first k frames

    def after(self, result: PieceResult, piece: range, shared: int) -> Earlier:
        """With what that piece adds."""
        placed, tracks, after = result.placed, result.tracks, self
        if placed is not None:
            (target, fresh), poses = later_half(piece, shared), placed.cameras.camera_to_world
            before = poses[:0] if self.camera_to_world is None else self.camera_to_world[: target.start]
            lens = placed.cameras.intrinsics[0] if self.lens is None else self.lens
            after = replace(after, lens=lens, camera_to_world=np.concatenate([before, poses[fresh]]))
        if tracks is not None:
            before = tracks.coordinates[:0] if self.tracked is None else self.tracked
            kept = int(piece.start > 0)  # the first frame is where the piece before says
            after = replace(after, tracked=np.concatenate([before[: piece.start + kept], tracks.coordinates[kept:]]))
        return after

    def queries(self, frame: int, given: Array | None) -> Array | None:
        """[t, 2] pixels to follow from ``frame``: where the pieces before saw them last, at first those ``given``."""
        return given if self.tracked is None else self.tracked[frame].copy()

    def known_for(self, known: Known, piece: range, shared: int, settings: Settings) -> tuple[Known, KnownSettings]:
        """What a piece may rely on: what the user knows of it, and what the pieces before it have found.

        All pieces share the lens of the first (unless each frame has its own); where poses are known or the camera
        rests, the poses of the frames that a piece shares stay as they are.
        """
        uses = settings.known
        if not shared:
            return known, uses
        if settings.alignment.shared_focal:
            assert self.lens is not None
            lens = np.tile(self.lens.astype(np.float64), (len(piece), 1, 1))
            known, uses = replace(known, intrinsics=lens), replace(uses, intrinsics_use="fixed")
        if keeps_poses(settings, posed=known.camera_to_world is not None):
            assert self.camera_to_world is not None
            poses = (
                np.full((len(piece), 4, 4), np.nan) if known.camera_to_world is None else known.camera_to_world.copy()
            )
            poses[:shared] = self.camera_to_world[piece.start : piece.start + shared]
            known, uses = replace(known, camera_to_world=poses), replace(uses, poses_use="fixed")
        return known, uses


def keeps_poses(settings: Settings, *, posed: bool) -> bool:
    """Whether pieces leave the poses of the frames that they share with others as those found them.

    posed: poses of some frames are known.
    """
    return settings.alignment.camera == "static" or (posed and settings.known.poses_use == "fixed")
