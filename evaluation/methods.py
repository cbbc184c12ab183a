"""What is compared: a method sees the frames of a clip and says what moves, where the cameras are and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from easi3r.config import FrameSettings, Settings
from easi3r.frames import read_frames
from easi3r.structures import Array, Crop

if TYPE_CHECKING:
    from easi3r.model import Easi3R


@dataclass(frozen=True)
class Estimate:
    """What a method makes of n frames, in H x W network pixels, the same for all frames; None for what it leaves out.

    World and unit are the method's own.
    """

    crops: tuple[Crop, ...]  # n: how each frame became a network image of W x H pixels
    masks: Array | None = None  # [n, H, W] bool, True = moves
    camera_to_world: Array | None = None  # [n, 4, 4] float, OpenCV axes
    depth: Array | None = None  # [n, H, W] float z-depth, > 0
    confidence: Array | None = None  # [n, H, W] float, higher is better
    intrinsics: Array | None = None  # [n, 3, 3] float, network pixels, (0, 0) is the centre of the top-left one


class Method(Protocol):
    """Anything that is called with the image files of a clip, in order, and knows nothing of the truth."""

    @property
    def name(self) -> str:
        """As typed on the command line and printed in tables."""
        ...

    def __call__(self, images: tuple[Path, ...]) -> Estimate:
        """Estimate, for all of the n images.  Whatever it raises makes the sequence a failed one, with that reason."""
        ...


@dataclass(frozen=True)
class Easi3RMethod:
    """This repository's method.  masks_only: no cameras and no depth, in a fraction of the time."""

    model: Easi3R
    settings: Settings
    masks_only: bool = False
    name: str = "easi3r"

    def __call__(self, images: tuple[Path, ...]) -> Estimate:
        """Of n images, as ``Easi3R.segment`` or ``reconstruct`` finds it; raises Easi3RError as they do."""
        import torch

        torch.manual_seed(self.settings.seed)  # so that no sequence depends on those before it
        act = self.model.segment if self.masks_only else self.model.reconstruct
        found = act(list(images), config=self.settings)
        crops = tuple(Crop(**{name: tuple(size) for name, size in crop.items()}) for crop in found.meta["crops"])
        names = () if self.masks_only else ("camera_to_world", "depth", "confidence", "intrinsics")
        return Estimate(crops, found.dynamic_mask, **{name: getattr(found, name) for name in names})


@dataclass(frozen=True)
class AllStatic:
    """The floor of every table: nothing moves, the camera included, and everything is one unit away, by no K.

    patch_size and trained_size are those of the network it is compared with.
    """

    frames: FrameSettings = field(default_factory=FrameSettings)
    patch_size: int = 16
    trained_size: int = 512
    name: str = "all-static"

    def __call__(self, images: tuple[Path, ...]) -> Estimate:
        """Of n images.  Raises InputError for frames that cannot be read."""
        read = read_frames(list(images), self.frames, patch_size=self.patch_size, trained_size=self.trained_size)
        n, height, width = read.images.shape[:3]
        return Estimate(
            crops=read.crops,
            masks=np.zeros((n, height, width), dtype=bool),
            camera_to_world=np.tile(np.eye(4), (n, 1, 1)),
            depth=np.ones((n, height, width), dtype=np.float32),
        )


# --- by name -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How the command makes a method that its user names."""

    make: Callable[[Settings, bool, Easi3R | None], Method]  # settings, masks only, the network and its weights
    needs_checkpoint: bool = False


def _easi3r(settings: Settings, masks_only: bool, model: Easi3R | None) -> Method:
    assert model is not None
    return Easi3RMethod(model, settings, masks_only)


def _all_static(settings: Settings, masks_only: bool, model: Easi3R | None) -> Method:
    return AllStatic(settings.frames)


def _baseline(name: str) -> Callable[[Settings, bool, Easi3R | None], Method]:
    """One of the other module's; it is imported when it is wanted, for it loads torch."""

    def make(settings: Settings, masks_only: bool, model: Easi3R | None) -> Method:
        from evaluation.baselines import BASELINES

        return BASELINES[name](frames=settings.frames) if model is None else BASELINES[name](model, settings)

    return make


METHODS: dict[str, Kind] = {  # by the name on the command line
    "easi3r": Kind(_easi3r, needs_checkpoint=True),
    "all-static": Kind(_all_static),
    "frame-difference": Kind(_baseline("frame-difference")),
    "flow-homography": Kind(_baseline("flow-homography")),
    "flow-ego-motion": Kind(_baseline("flow-ego-motion"), needs_checkpoint=True),
}
