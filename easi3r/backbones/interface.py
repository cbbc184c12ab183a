"""What the rest of the house asks of a network, whichever it is.

``docs/backbones.md`` says how another one is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from easi3r.structures import Preparation

Grid = tuple[int, int]  # tokens along y and x


@dataclass(frozen=True)
class Gives:
    """What a network gives with the weights it has."""

    sees: Literal["pairs", "clip"]  # two frames at a time, or all frames of a clip at once
    cameras: bool = False  # in one world, for all frames
    depth: bool = False  # z-depth of every frame
    points: bool = False  # in the world (clip), or in the first view's camera (pairs)
    tracks: bool = False  # of pixels of the first frame


class Backbone(nn.Module, ABC):
    """A network as loading, precision, encoding and planning see it; its passes over a clip are ``easi3r.passes``'s.

    A subclass is built from ``config`` alone, a frozen dataclass of sizes, and has the tensor names of its public
    checkpoints.
    """

    config: Any
    kind: str  # as people call it
    input_range: tuple[float, float]  # what black and white are in the images that ``encode`` takes
    preparation: Preparation | None = None  # of its images; None: as in DUSt3R

    @property
    @abstractmethod
    def gives(self) -> Gives:
        """What it is good for."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its weights are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of its matrices; norms, residual streams and the heads' ends may be finer."""

    @property
    @abstractmethod
    def trained_size(self) -> int:
        """The long side in pixels of the images it was trained for."""

    @property
    @abstractmethod
    def narrowest(self) -> int:
        """Channels of its narrowest transformer."""

    @abstractmethod
    def stays_float32(self, module: str) -> bool:
        """Whether the matrices of this module (a dotted name) stay in float32 where others are low in precision."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in ``input_range`` -> tokens [B, h * w, C], row-major, every frame by itself."""

    @property
    def patch_size(self) -> int:
        """Pixels along the side of a token."""
        return int(self.config.patch_size)

    def grid_of(self, height: int, width: int) -> Grid:
        """Tokens along y and x of an image of this size; ValueError if it is not a whole number of patches."""
        patch = self.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"An image of {width}x{height} pixels was given; expected multiples of {patch}, so crop or resize it."
            )
        return height // patch, width // patch
