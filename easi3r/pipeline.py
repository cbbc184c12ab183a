"""A clip and a network in, what moves (and where everything is) out.

A long clip is worked on in overlapping pieces, each by itself, so that its length does not decide the memory; what is
done to each, in which order, is written in :mod:`easi3r.job`.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import cv2
import torch

from easi3r.backbones.dust3r import Dust3r
from easi3r.backbones.files import CheckpointInfo
from easi3r.backbones.interface import Backbone
from easi3r.backbones.vggt import Vggt
from easi3r.clip_passes import ClipPasses
from easi3r.clock import Clock
from easi3r.config import Settings
from easi3r.device import is_out_of_memory
from easi3r.errors import InputError
from easi3r.frames import plan_crop, read_frames
from easi3r.given import Given, read_given
from easi3r.job import Job
from easi3r.origin import describe
from easi3r.pair_passes import PairPasses
from easi3r.passes import Passes
from easi3r.plan import smaller
from easi3r.precision import choose_dtype, in_precision
from easi3r.progress import Progress
from easi3r.sam2_refinement import load_refiner
from easi3r.scale import with_distance
from easi3r.scene import Motion, Scene
from easi3r.structures import Crop, Frames
from easi3r.verdict import judge
from easi3r.whole import Whole

logger = logging.getLogger("easi3r")


@torch.inference_mode(False)  # somebody may call us from within it, and the alignment needs gradients
def run(
    network: Backbone,
    checkpoint: CheckpointInfo,
    source: Any,
    settings: Settings,
    progress: Progress,
    *,
    masks_only: bool,
) -> Motion:
    """Frames, a plan, and for each piece of the clip: optical flow, what moves (the network, twice), alignment.

    source: as for ``read_frames``, or Frames.
    Returns a Scene, or with ``masks_only`` a Motion.  Raises InputError where the memory does not suffice.
    """
    clip = prepare(network, checkpoint, source, settings, progress, masks_only=masks_only)
    return clip.finished(work_within_memory(clip.job, clip.frames, clip.given))


def prepare(
    network: Backbone,
    checkpoint: CheckpointInfo,
    source: Any,
    settings: Settings,
    progress: Progress,
    *,
    masks_only: bool,
) -> Prepared:
    """Everything that is read, or can be refused, before the work; arguments as for ``run``."""
    clock = Clock()
    refiner = load_refiner(settings, network.device)  # first, since its extra or its weights may be absent
    job = make_job(network, settings, progress, clock, masks_only=masks_only)
    with clock("frames"):
        frames = source if isinstance(source, Frames) else load_frames(network, source, job.settings, progress)
    given = read_given(frames, job.settings, network.device, progress, masks_only=masks_only)
    return Prepared(dataclasses.replace(job, refiner=refiner), frames, given, checkpoint, settings)


def make_job(network: Backbone, settings: Settings, progress: Progress, clock: Clock, *, masks_only: bool) -> Job:
    """The network in its precision, and what is settled for it; InputError for what it cannot do."""
    passes = passes_of(in_precision(network, choose_dtype(settings.dtype, network)), progress, clock)
    settled = passes.settled(settings.of_collection(), masks_only=masks_only)
    return Job(passes, settled, progress, clock, masks_only)


def result(frames: Frames, given: Given, whole: Whole, settings: Settings, origin: dict[str, Any]) -> Motion:
    """A Scene where there are cameras, else a Motion.  origin: the part of ``meta`` that says how it was made."""
    masks, instances, warnings = whole.masks, whole.instances(), list(given.warnings)
    meta = origin | {
        "pieces": whole.notes,
        "warnings": warnings,
        "moving_share": [round(float(share), 6) for share in masks.mask.mean(axis=(1, 2))],
    }
    if instances is not None:
        meta["instances"] = instances.summary()
    moved: dict[str, Any] = {
        "images": frames.images,
        "dynamic_score": masks.score,
        "dynamic_mask": masks.mask,
        "attention": whole.attention,
        "timestamps": frames.timestamps,
        "instances": instances,
        "given_masks": None if given.masks is None else given.masks.original,
    }
    if whole.cameras is None:
        return Motion(**moved, meta=meta)
    if settings.keep != "all" and not (masks.mask == (settings.keep == "dynamic")).any():
        everything = "nothing" if settings.keep == "dynamic" else "everything"
        warnings.append(f"keep is {settings.keep!r} and {everything} moves here: the scene has no point to show.")
        logger.warning("%s", warnings[-1])
    seams = [note["seam_residual"] for note in whole.notes if "seam_residual" in note]
    ordered = not settings.frames.collection
    meta["quality"] = judge(whole.measured, whole.cameras, masks.mask, seams=seams, ordered=ordered)
    meta |= {"scale": "metric" if given.is_metric else "up to scale", "alignment": settings.alignment.method}
    cameras = whole.cameras if given.distance is None else with_distance(whole.cameras, given.distance)
    return Scene(**moved, **vars(cameras), valid_mask=frames.valid_mask(), tracks=whole.tracks, meta=meta)


def load_frames(network: Backbone, source: Any, settings: Settings, progress: Progress) -> Frames:
    """A clip as ``network`` sees it, which ``run`` takes in place of its source."""
    return read_frames(
        source,
        settings.frames,
        patch_size=network.patch_size,
        trained_size=network.trained_size,
        preparation=network.preparation,
        progress=progress,
    )


def crop_of(network: Backbone, size: tuple[int, int], settings: Settings) -> Crop:
    """What becomes of a frame of ``size`` (width, height) by itself."""
    if network.preparation is not None:
        return network.preparation.plan(size, settings.frames.image_size)
    return plan_crop(size, settings.frames.image_size, patch_size=network.patch_size, trained_size=network.trained_size)


def passes_of(network: Backbone, progress: Progress, clock: Clock) -> Passes:
    """The kind of passes that ``network`` needs."""
    if isinstance(network, Vggt):
        return ClipPasses(network, progress, clock)
    assert isinstance(network, Dust3r)
    return PairPasses(network, progress, clock)


def work_within_memory(job: Job, frames: Frames, given: Given) -> Whole:
    """As planned; if the memory does not suffice all the same, once more in less.  Raises InputError after that."""
    for attempt in (1, 2):
        plan = job.plan(frames)
        logger.log(
            logging.INFO if attempt == 1 else logging.WARNING, "%s%s", "once more in less: " * (attempt - 1), plan
        )
        try:
            return job.work_through(frames, given, plan)
        except (MemoryError, RuntimeError, cv2.error) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "the memory of %s did not suffice: %s", job.passes.network.device, str(error).partition("\n")[0]
            )
        job = dataclasses.replace(job, settings=smaller(plan, job.settings))
    raise InputError(
        f"The memory of {job.passes.network.device} does not suffice for {frames.num_frames} frames (the least that "
        f"was tried {plan}); choose a smaller image_size, fewer pairs (window) or masks alone (segment)."
    )


@dataclass(frozen=True)
class Prepared:
    """A clip of which everything is read and nothing computed."""

    job: Job
    frames: Frames
    given: Given
    checkpoint: CheckpointInfo
    said: Settings  # as they were given

    def finished(self, whole: Whole) -> Motion:
        """The result, of what was found."""
        job = self.job
        meta = describe(self.frames, self.checkpoint, self.said, job.passes.network, job.clock)
        if job.refiner is not None:
            meta["sam2"] = job.refiner.checkpoint.describe()
        return result(self.frames, self.given, whole, job.settings, meta)
