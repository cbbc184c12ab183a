"""What the user hands in beside a clip: read and checked before any work."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from easi3r.canvas import Box
from easi3r.config import Settings
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.given_masks import doubt_polarity, read_masks
from easi3r.known import read_known
from easi3r.pose_direction import check_direction, pairs_to_check
from easi3r.progress import Progress
from easi3r.query_pixels import read_queries
from easi3r.scale import Distance, read_scale
from easi3r.structures import Array, DynamicMasks, Frames, Known

logger = logging.getLogger("easi3r")


@dataclass(frozen=True)
class Given:
    """What is known of the frames beside their pixels."""

    known: Known
    distance: Distance | None = None  # between two points, which makes the scene metric
    masks: DynamicMasks | None = None
    boxes: tuple[Box, ...] | None = None  # where the images of a collection lie on their canvas
    queries: Array | None = None  # [t, 2] pixels of the first frame to follow
    warnings: tuple[str, ...] = ()  # sentences about what was given

    def part(self, frames: range) -> Given:
        """Of some consecutive frames."""
        return replace(
            self,
            known=self.known.part(frames),
            masks=None if self.masks is None else self.masks.part(frames),
            boxes=None if self.boxes is None else self.boxes[frames.start : frames.stop],
        )

    @property
    def is_metric(self) -> bool:
        """Whether anything of it says how large the world is."""
        return self.distance is not None or self.known.poses_set_the_scale or self.known.depth_sets_the_scale


def read_given(
    frames: Frames, settings: Settings, device: torch.device, progress: Progress, *, masks_only: bool
) -> Given:
    """Raises InputError for masks, intrinsics, poses, depth, distances or query pixels that do not fit the frames."""
    masks, warnings = None, []
    if settings.motion.masks is not None:
        masks = read_masks(settings.motion.masks, frames, settings.motion.mask_polarity)
        if doubt := doubt_polarity(masks, settings.motion.mask_polarity):
            logger.warning("%s", doubt)
            warnings.append(doubt)
    known = what_is_known(frames, settings, device, progress)
    return Given(
        known=known,
        distance=read_scale(settings.known.scale_from, known, frames),
        masks=masks,
        boxes=frames.boxes,
        queries=None if settings.heads.tracks is None or masks_only else read_queries(settings.heads.tracks, frames),
        warnings=tuple(warnings),
    )


def what_is_known(frames: Frames, settings: Settings, device: torch.device, progress: Progress) -> Known:
    """InputError for a K of another size, and for poses that fit the optical flow only when they are inverted."""
    said, focal = settings.known, settings.alignment.focal
    if not isinstance(focal, str) and said.intrinsics is not None:
        raise InputError(f"focal is {focal:g} and intrinsics are given too; leave one out.")
    known = read_known(
        frames,
        intrinsics=said.intrinsics if isinstance(focal, str) else focal,
        camera_to_world=said.camera_to_world,
        world_to_camera=said.world_to_camera,
        depth=said.depth,
    )
    if len(pairs := pairs_to_check(known)):
        keyword = "camera_to_world" if said.world_to_camera is None else "world_to_camera"
        check_direction(known, estimate_flow(frames.images, pairs, settings.flow, progress, device), keyword)
    return known
