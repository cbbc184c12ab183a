"""Motion masks by simpler means, for ours to be measured against: frame difference and two residuals of flow.

Thresholds are shares of the long side, or of the grey range, and never fitted to a clip.  They were chosen once, on
clips of the family 'sharp' with the development seeds 3000 to 3007, where the mean J is best.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from easi3r.config import FrameSettings, PairSettings, Settings
from easi3r.dynamic_masks import prove
from easi3r.flow import estimate_flow
from easi3r.frames import read_frames
from easi3r.geometry import induced_flow, pixel_grid
from easi3r.model import Easi3R
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import Array, Crop, PairFlow
from evaluation.methods import AllStatic, Estimate, Method

# The one exception: with a moving camera J is best at 25 and hardly depends on it (0.165; 0.146 at 10), with a still
# one (family 'tripod') it falls from 4 on (0.69 at 10, 0.46 at 25); much less would be noise in a real film.
GREY_THRESHOLD = 10  # of 255
HOMOGRAPHY_THRESHOLD = 0.008  # of the long side; J is 0.474 at 0.006, 0.505 here, 0.496 at 0.01
EGO_MOTION_THRESHOLD = 0.01  # of the long side; J is 0.656 at 0.008, 0.659 here, 0.640 at 0.012
RANSAC_THRESHOLD = 0.004  # of the long side; J hardly depends on it
SAMPLED_POINTS = 1000  # pixels of a pair that its homography is found from
NEIGHBOURS = PairSettings(window=1)  # the frame before and the frame after; flow to farther ones scored no better


# --- masks of network images ---------------------------------------------------------------------------------------


def frame_difference_masks(images: Array, threshold: float = GREY_THRESHOLD) -> Array:
    """Pixels whose grey level differs from that of the frame before, or of the frame after, by more than a threshold.

    What a mover has left since, or will cover next, is marked too.  To ask for both differences (Collins et al. 2000)
    leaves that out, but also most of what is within a slow mover, and scores less.

    images: [n, H, W, 3] uint8 RGB -> [n, H, W] bool; one frame has nothing to differ from.
    """
    grey = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]).astype(np.int16)
    changed = np.abs(np.diff(grey, axis=0)) > threshold  # [n - 1, H, W]
    masks = np.zeros(grey.shape, dtype=bool)
    masks[:-1] |= changed
    masks[1:] |= changed
    return masks


def homography_masks(images: Array, threshold: float = HOMOGRAPHY_THRESHOLD) -> Array:
    """Pixels whose flow to the neighbouring frames is off that of one plane by more than a share of the long side.

    The plane is what a RANSAC homography finds in the flow, so a camera that only turns leaves nothing, and one that
    walks leaves its parallax.  images: [n, H, W, 3] uint8 RGB -> [n, H, W] bool.
    """
    flow = estimate_flow(images, make_pairs(len(images), NEIGHBOURS), Settings().flow, silent)
    return prove(homography_residual(flow, len(images)), threshold * max(images.shape[1:3])).mask


# --- residuals of flow ---------------------------------------------------------------------------------------------


def homography_residual(flow: PairFlow, num_frames: int) -> Array:
    """[n, H, W] float32 pixels: |flow - flow of the pair's homography|, see ``median_over_pairs``."""

    def residual(k: int) -> Array:
        return np.asarray(np.linalg.norm(flow.flow[k] - homography_flow(flow.flow[k], flow.valid[k]), axis=-1))

    return median_over_pairs(residual, flow, num_frames)


def homography_flow(flow: Array, valid: Array) -> Array:
    """[H, W, 2] float64: the flow of the homography that RANSAC finds in a flow [H, W, 2], NaN if there is none."""
    here = pixel_grid(*valid.shape).astype(np.float64)
    step = max(1, int(valid.sum()) // SAMPLED_POINTS)
    first, second = here[valid][::step], (here + flow)[valid][::step]
    unknown = np.full(here.shape, np.nan)
    if len(first) < 4:
        return unknown
    matrix, _ = cv2.findHomography(first, second, cv2.RANSAC, RANSAC_THRESHOLD * max(valid.shape))
    return unknown if matrix is None else cv2.perspectiveTransform(here, matrix) - here


def ego_motion_residual(flow: PairFlow, camera_to_world: Array, intrinsics: Array, depth: Array) -> Array:
    """[n, H, W] float32 pixels: L1 distance of the flow from what the camera's own motion explains, by depth and poses.

    MonST3R (Zhang et al. 2024, arXiv 2410.03825, section 3.2) calls pixels static below a threshold of it, for pairs of
    frames; here it is the median over a frame's pairs, see ``median_over_pairs``.

    camera_to_world: [n, 4, 4].  intrinsics: [n, 3, 3] pixels of the flow.  depth: [n, H, W] z-depth, in the unit of the
    poses.
    """

    def residual(k: int) -> Array:
        i, j = flow.pairs[k]
        explained = induced_flow(depth[i], intrinsics[i], intrinsics[j], camera_to_world[i], camera_to_world[j])
        return np.asarray(np.abs(flow.flow[k] - explained).sum(axis=-1))

    return median_over_pairs(residual, flow, len(depth))


def median_over_pairs(residual: Callable[[int], Array], flow: PairFlow, num_frames: int) -> Array:
    """[n, H, W] float32: median of ``residual(k)`` [H, W] over a frame's pairs k whose flow is valid; NaN = unknown."""
    medians = np.full((num_frames, *flow.valid.shape[1:]), np.nan, dtype=np.float32)
    for frame in range(num_frames):
        pairs = np.flatnonzero(flow.pairs[:, 0] == frame).tolist()
        of_pairs = [np.where(flow.valid[k], residual(k), np.nan) for k in pairs if flow.valid[k].any()]
        if of_pairs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a pixel that is unknown in all pairs
                medians[frame] = np.nanmedian(np.stack(of_pairs), axis=0)
    return medians


# --- as methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MasksOnly:
    """A function from images to masks, on frames that are read as the product reads them; it needs no weights.

    patch_size and trained_size are those of the network it is compared with.
    """

    find_masks: Callable[[Array], Array]  # [n, H, W, 3] uint8 RGB -> [n, H, W] bool
    name: str
    frames: FrameSettings = field(default_factory=FrameSettings)
    patch_size: int = 16
    trained_size: int = 512

    def __call__(self, images: tuple[Path, ...]) -> Estimate:
        """Of n images; raises InputError for frames that cannot be read."""
        read = read_frames(list(images), self.frames, patch_size=self.patch_size, trained_size=self.trained_size)
        return Estimate(crops=read.crops, masks=self.find_masks(read.images))


@dataclass(frozen=True)
class EgoMotion:
    """What DUSt3R and MonST3R call moving: reconstruct as if nothing moved, and see which flow that leaves unexplained.

    The network is used as it is and its attention not asked; flow is that to the neighbouring frames.
    """

    model: Easi3R
    settings: Settings
    name: str = "flow-ego-motion"

    def __call__(self, images: tuple[Path, ...]) -> Estimate:
        """Of n images, with the cameras and depths that the masks rest on; raises Easi3RError as ``reconstruct``."""
        scene = self.model.reconstruct(list(images), config=self.settings, masks="none")
        pairs, device = make_pairs(scene.num_frames, NEIGHBOURS), self.model.network.device
        flow = estimate_flow(scene.images, pairs, self.settings.flow, silent, device)
        residual = ego_motion_residual(flow, scene.camera_to_world, scene.intrinsics, scene.depth)
        return Estimate(
            crops=tuple(Crop(**{name: tuple(size) for name, size in crop.items()}) for crop in scene.meta["crops"]),
            masks=prove(residual, EGO_MOTION_THRESHOLD * max(scene.images.shape[1:3])).mask,
            camera_to_world=scene.camera_to_world,
            depth=scene.depth,
            confidence=scene.confidence,
            intrinsics=scene.intrinsics,
        )


BASELINES: dict[str, Callable[..., Method]] = {
    # without weights: frames, patch_size and trained_size, all optional
    "all-static": AllStatic,
    "frame-difference": partial(MasksOnly, frame_difference_masks, "frame-difference"),
    "flow-homography": partial(MasksOnly, homography_masks, "flow-homography"),
    # model and settings
    "flow-ego-motion": EgoMotion,
}
