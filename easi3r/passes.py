"""The network's passes over a piece of a clip: what every kind of network is asked for, and what it answers.

Two kinds are known: :mod:`easi3r.pair_passes` for networks that see two frames at a time (DUSt3R, MonST3R, MASt3R) and
:mod:`easi3r.clip_passes` for networks that see all frames at once (VGGT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from easi3r.backbones.interface import Backbone
from easi3r.canvas import Box
from easi3r.config import Settings
from easi3r.structures import AlignedCameras, Array, DynamicMasks, Maps, PairPredictions, PointTracks


@dataclass(frozen=True)
class Piece:
    """What the passes see: some frames of a clip, and what is known of them before."""

    images: Array  # [n, H, W, 3] uint8
    tokens: Tensor  # [n, N, C] of the encoder, on any device
    pairs: Array  # [P, 2] int64, the frames that are compared
    masks: DynamicMasks | None  # given by the user, and returned as they are
    excess: Array | None  # [n, H, W] of ``epipolar_excess``, for masks that rest on flow too; None: attention alone
    batch_size: int  # pairs at once
    boxes: tuple[Box, ...] | None = None  # where each image lies, in pixels, if they are of unequal size
    queries: Array | None = None  # [t, 2] (x, y) pixels of the first frame to follow through all


@dataclass(frozen=True)
class Found:
    """What they find.  Of ``predictions`` and ``cameras`` one at most is given, and neither where masks are enough."""

    masks: DynamicMasks
    attention: Maps
    predictions: PairPredictions | None = None  # of pairs, each in a world of its own: to be aligned
    cameras: AlignedCameras | None = None  # in one world already
    tracks: PointTracks | None = None  # of the queries


@dataclass(frozen=True)
class Load:
    """What the network asks of its device for a piece, beside its weights."""

    activation_bytes: float  # at most, while it runs
    kept_bytes: float  # statistics and the like
    token_bytes: float  # of the encoder, which may be kept on the host
    frame_flops: float  # of a frame that is encoded
    pass_flops: float  # of all passes over the piece, without heads
    at_once: str  # in words, what goes through it together


class Passes(Protocol):
    """One kind of network at work."""

    @property
    def network(self) -> Backbone:
        """Which one."""
        ...

    def settled(self, settings: Settings, *, masks_only: bool) -> Settings:
        """``settings`` with the alignment named that is 'auto'; InputError for what this network cannot do."""
        ...

    def load(
        self, size: tuple[int, int, int], num_pairs: int, batch_size: int, settings: Settings, *, masks_only: bool
    ) -> Load:
        """For a piece of this size (frames, height, width)."""
        ...

    def look(self, piece: Piece, settings: Settings, *, masks_only: bool) -> Found:
        """Once, or twice: what the first pass finds to move is hidden from the second."""
        ...

    def look_at_movers(self, piece: Piece, masks: DynamicMasks, predictions: PairPredictions) -> None:
        """For keep=dynamic: predict what moves once more, from what moves alone; ``predictions`` change in place."""
        ...
