"""The order of the stages, written once: a clip and a network in, what moves (and where everything is) out.

A long clip is worked on in overlapping pieces, each by itself, so that its length does not decide the memory.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import cv2
import torch
from torch import Tensor

from easi3r.alignment import align
from easi3r.backbones.dust3r import Dust3r
from easi3r.backbones.files import CheckpointInfo
from easi3r.backbones.interface import Backbone
from easi3r.backbones.vggt import Vggt
from easi3r.canvas import valid_pixels
from easi3r.clean import clean_confidence
from easi3r.clip_passes import ClipPasses
from easi3r.clock import Clock
from easi3r.config import KnownSettings, Settings
from easi3r.cut import Cut
from easi3r.device import is_out_of_memory
from easi3r.epipolar import epipolar_excess
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.frames import plan_crop, read_frames
from easi3r.given import Given, read_given
from easi3r.inference import encode_frames
from easi3r.instances import DIFFERENT, find_instances
from easi3r.known import check_first_piece
from easi3r.origin import describe
from easi3r.pair_passes import PairPasses
from easi3r.pair_views import pair_views, starting_at
from easi3r.pairs import make_pairs
from easi3r.passes import Found, Passes, Piece
from easi3r.piece_result import Earlier, PieceCameras, PieceResult, keeps_poses
from easi3r.plan import Plan, make_plan, smaller
from easi3r.precision import choose_dtype, in_precision
from easi3r.progress import Progress
from easi3r.quality import measure
from easi3r.sam2_refinement import Sam2Refiner, load_refiner
from easi3r.scale import with_distance
from easi3r.scene import Motion, Scene
from easi3r.structures import AlignedCameras, Array, Crop, DynamicMasks, Frames, Known, PairFlow
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
class Job:
    """What all pieces of a clip have in common."""

    passes: Passes
    settings: Settings
    progress: Progress
    clock: Clock
    masks_only: bool
    refiner: Sam2Refiner | None = None

    def plan(self, frames: Frames) -> Plan:
        return make_plan(self.passes, frames.images.shape[:3], self.settings, masks_only=self.masks_only)

    def work_through(self, frames: Frames, given: Given, plan: Cut) -> Whole:
        """Piece after piece; each frame is encoded once, and what a piece needs is gone before the next begins."""
        whole, earlier = self.nothing_of(frames), Earlier()
        tokens: Tensor | None = None
        check_first_piece(given.known, plan.pieces[0])
        for number, piece in enumerate(plan.pieces):
            shared = plan.shared(number)
            encoded = self.encoded(frames, given, plan, number)
            tokens = encoded if tokens is None else torch.cat([tokens[len(tokens) - shared :], encoded])
            found = self.work_on(frames, tokens, given, plan, number, earlier)
            earlier = earlier.after(found, piece, shared)
            whole.write(found, piece, shared)
        return whole

    def work_on_window(
        self, frames: Frames, given: Given, cut: Cut, number: int, earlier: Earlier
    ) -> tuple[PieceResult, Earlier]:
        """One piece by itself, as ``work_through`` finds it, and what it hands on.

        earlier: from the piece that ``rests_on`` names.  The frames that it shares with others are encoded once more,
        in the batches in which ``work_through`` encodes them, so that not a bit differs.
        """
        piece = cut.pieces[number]
        if number == 0:
            check_first_piece(given.known, piece)
        runs = [k for k in range(number + 1) if len(common(cut.fresh(k), piece))]
        tokens = torch.cat([self.encoded(frames, given, cut, k, common(cut.fresh(k), piece)) for k in runs])
        found = self.work_on(frames, tokens, given, cut, number, earlier)
        return found, earlier.after(found, piece, cut.shared(number))

    def rests_on(self, number: int) -> int | None:
        """Which piece hands on what that piece needs: the one before it, the first for its lens, or none."""
        settings = self.settings
        follows = settings.heads.tracks is not None and not self.masks_only
        posed = any(way is not None for way in (settings.known.camera_to_world, settings.known.world_to_camera))
        if number == 0 or not (self.aligns or follows):
            return None
        if follows or keeps_poses(settings, posed=posed):
            return number - 1
        return 0 if settings.alignment.shared_focal else None

    def nothing_of(self, frames: Frames) -> Whole:
        """Room for all that is found of a clip."""
        return Whole.empty(frames.images.shape[:3], with_cameras=not self.masks_only)

    def encoded(self, frames: Frames, given: Given, cut: Cut, number: int, wanted: range | None = None) -> Tensor:
        """[n, N, C] tokens of the frames that piece has and those before it have not, or of those ``wanted``."""
        fresh = cut.fresh(number)
        with self.clock("encoder"):
            return encode_frames(
                self.passes.network,
                frames.images[fresh.start : fresh.stop],
                cut.batch_size,
                self.progress,
                torch.device("cpu") if self.settings.offload else None,
                given.part(fresh).boxes,
                None if wanted is None else range(wanted.start - fresh.start, wanted.stop - fresh.start),
            )

    def work_on(
        self, frames: Frames, tokens: Tensor, given: Given, cut: Cut, number: int, earlier: Earlier
    ) -> PieceResult:
        """The stages, in their order, for one piece.

        tokens: [n, N, C] of the piece.  given: for the whole clip.  earlier: from the pieces before this one.
        """
        settings, piece, shared = self.settings, cut.pieces[number], cut.shared(number)
        images, given = frames.images[piece.start : piece.stop], given.part(piece)
        pairs = make_pairs(len(images), settings.pairs)
        with self.clock("flow"):
            flow, excess = self.flow_of(images, pairs, given.masks)
        queries = earlier.queries(piece.start, given.queries)
        seen = Piece(images, tokens, pairs, given.masks, excess, cut.batch_size, given.boxes, queries)
        found = self.passes.look(seen, settings, masks_only=self.masks_only)
        masks, things = self.told_apart(seen, found, flow)
        result = PieceResult(masks, found.attention, things if settings.motion.instances else None)
        if self.masks_only:
            return result
        if settings.keep == "dynamic" and found.predictions is not None:
            with self.clock("pass for what moves"):
                self.passes.look_at_movers(seen, masks, found.predictions)
        valid = valid_pixels(images.shape[:3], given.boxes)
        unseen = masks.mask | ~valid  # nothing there is static
        with self.clock("alignment"):
            known, uses = Known(), settings.known
            cameras = found.cameras
            if self.aligns:
                known, uses = earlier.known_for(given.known, piece, shared, settings)
                cameras = self.aligned(found, unseen, pairs, flow if self.aligns_by_flow else None, known, uses)
            assert cameras is not None
            cameras.depth[~valid] = 0
            measured = measure(cameras, unseen, flow, pairs, start=piece.start)
            confidence = clean_confidence(**vars(cameras), dynamic_mask=unseen, pairs=pairs)
            cameras = dataclasses.replace(cameras, confidence=confidence)
        placed = PieceCameras.held(cameras, measured, unseen, known, uses)
        return dataclasses.replace(result, tracks=found.tracks, placed=placed)

    @property
    def aligns(self) -> bool:
        """Whether cameras are solved for; else there are none, or the network's heads say where they are."""
        heads_say = isinstance(self.passes, ClipPasses) and self.settings.alignment.method == "none"
        return not self.masks_only and not heads_say

    @property
    def aligns_by_flow(self) -> bool:
        """Whether optical flow has a say in where the cameras are."""
        alignment = self.settings.alignment
        return not self.masks_only and alignment.method != "none" and alignment.flow_weight > 0

    def flow_of(self, images: Array, pairs: Array, masks: DynamicMasks | None) -> tuple[PairFlow | None, Array | None]:
        """Optical flow, if anything needs it, and [n, H, W] what of it is more than noise, if masks rest on it."""
        motion, n = self.settings.motion, len(images)
        asks = motion.evidence != "attention" and masks is None
        follows = motion.instances and (masks is None or bool(masks.mask.any()))
        if n < 2 or not (self.aligns_by_flow or asks or follows):
            return None, None
        flow = estimate_flow(images, pairs, self.settings.flow, self.progress, self.passes.network.device)
        least = motion.min_motion * max(images.shape[1:3])
        return flow, epipolar_excess(flow, n, least, self.progress) if asks else None

    def told_apart(self, seen: Piece, found: Found, flow: PairFlow | None) -> tuple[DynamicMasks, Array]:
        """Masks, and [n, H, W] ids of the things that move (bool where they are not wanted); by SAM 2 if it is."""
        masks, things = found.masks, found.masks.mask
        if self.settings.motion.instances:
            with self.clock("instances"):
                tokens = seen.tokens.float().cpu().numpy().reshape(*found.attention.dynamic_map.shape, -1)
                things = find_instances(masks.mask, flow, tokens, DIFFERENT, self.progress)
        if self.refiner is not None:
            with self.clock("sam2"):
                things = self.refiner(seen.images, things, self.progress)
                masks = dataclasses.replace(masks, mask=things != 0)
        return masks, things

    def aligned(
        self, found: Found, unseen: Array, pairs: Array, flow: PairFlow | None, known: Known, uses: KnownSettings
    ) -> AlignedCameras:
        """One world of what the passes found; cameras that are there already are where the fast solver starts.

        unseen: [n, H, W] bool, True = the pixel is not static.
        """
        predictions = found.predictions
        if found.cameras is not None:
            predictions = pair_views(found.cameras, pairs)
            if self.settings.alignment.method == "fast":
                shared = self.settings.alignment.shared_focal
                known, uses = starting_at(found.cameras, known, uses, shared_focal=shared)
        assert predictions is not None
        return align(
            predictions,
            len(unseen),
            self.settings.alignment,
            self.progress,
            flow=flow,
            dynamic_mask=unseen,
            known=known,
            uses=uses,
            device=self.passes.network.device,
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


def common(one: range, other: range) -> range:
    """The numbers of both."""
    return range(max(one.start, other.start), min(one.stop, other.stop))
