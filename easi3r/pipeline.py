"""The order of the stages, written once: a clip and a network in, what moves (and where everything is) out.

A long clip is worked on in overlapping pieces, each by itself, so that its length does not decide the memory.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from easi3r._version import __version__
from easi3r.alignment import align
from easi3r.backbones.dust3r import Dust3r
from easi3r.backbones.files import CheckpointInfo
from easi3r.backbones.interface import Backbone
from easi3r.backbones.vggt import Vggt
from easi3r.canvas import Box, valid_pixels
from easi3r.clean import clean_confidence
from easi3r.clip_passes import ClipPasses
from easi3r.clock import Clock
from easi3r.config import KnownSettings, Settings
from easi3r.device import is_out_of_memory
from easi3r.epipolar import epipolar_excess
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.frames import plan_crop, read_frames
from easi3r.given_masks import doubt_polarity, read_masks
from easi3r.inference import encode_frames
from easi3r.instances import DIFFERENT, find_instances
from easi3r.known import check_first_piece, read_known
from easi3r.pair_passes import PairPasses
from easi3r.pair_views import pair_views, starting_at
from easi3r.pairs import make_pairs
from easi3r.passes import Found, Passes, Piece
from easi3r.plan import Plan, make_plan, smaller
from easi3r.pose_direction import check_direction, pairs_to_check
from easi3r.precision import choose_dtype, in_precision
from easi3r.progress import Progress
from easi3r.quality import measure
from easi3r.query_pixels import read_queries
from easi3r.sam2_refinement import Sam2Refiner, load_refiner
from easi3r.scale import Distance, read_scale, with_distance
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

    Returns a Scene, or with ``masks_only`` a Motion.  Raises InputError where the memory does not suffice.
    """
    clock = Clock()
    refiner = load_refiner(settings, network.device)  # first, since its extra or its weights may be absent
    network = in_precision(network, choose_dtype(settings.dtype, network))
    passes = passes_of(network, progress, clock)
    said, settings = (
        settings,
        passes.settled(settings.of_collection() if settings.frames.collection else settings, masks_only=masks_only),
    )
    with clock("frames"):
        frames = source if isinstance(source, Frames) else load_frames(network, source, settings, progress)
    polarity, warned = settings.motion.mask_polarity, []
    given = None if settings.motion.masks is None else read_masks(settings.motion.masks, frames, polarity)
    if given is not None and (doubt := doubt_polarity(given, polarity)):
        logger.warning("%s", doubt)
        warned.append(doubt)
    known, distance = what_is_known(frames, settings, network.device, progress)
    queries = None if settings.heads.tracks is None or masks_only else read_queries(settings.heads.tracks, frames)
    job = Job(passes, settings, progress, clock, masks_only, refiner, queries)
    whole = work_within_memory(job, frames, Given(given, known, frames.boxes))
    moved: dict[str, Any] = {
        "images": frames.images,
        "dynamic_score": whole.masks.score,
        "dynamic_mask": whole.masks.mask,
        "attention": whole.attention,
        "timestamps": frames.timestamps,
        "instances": (instances := whole.instances()),
        "given_masks": None if given is None else given.original,
    }
    meta = describe(frames, checkpoint, said, network, clock) | {"pieces": whole.notes, "warnings": warned}
    meta["moving_share"] = [round(float(share), 6) for share in whole.masks.mask.mean(axis=(1, 2))]
    if refiner is not None:
        meta["sam2"] = refiner.checkpoint.describe()
    if instances is not None:
        meta["instances"] = instances.summary()
    if whole.cameras is None:
        return Motion(**moved, meta=meta)
    if settings.keep != "all" and not (whole.masks.mask == (settings.keep == "dynamic")).any():
        everything = "nothing" if settings.keep == "dynamic" else "everything"
        warned.append(f"keep is {settings.keep!r} and {everything} moves here: the scene has no point to show.")
        logger.warning("%s", warned[-1])
    seams = [note["seam_residual"] for note in whole.notes if "seam_residual" in note]
    meta["quality"] = judge(
        whole.measured, whole.cameras, whole.masks.mask, seams=seams, ordered=not settings.frames.collection
    )
    metric = distance is not None or known.poses_set_the_scale or known.depth_sets_the_scale
    cameras = whole.cameras if distance is None else with_distance(whole.cameras, distance)
    return Scene(
        **moved,
        **vars(cameras),
        valid_mask=frames.valid_mask(),
        tracks=whole.tracks,
        meta=meta | {"scale": "metric" if metric else "up to scale", "alignment": settings.alignment.method},
    )


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


@dataclass(frozen=True)
class Given:
    """What is known of the frames beside their pixels."""

    masks: DynamicMasks | None
    known: Known
    boxes: tuple[Box, ...] | None  # where the images of a collection lie on their canvas

    def part(self, frames: range) -> Given:
        """Of some consecutive frames."""
        return Given(
            None if self.masks is None else self.masks.part(frames),
            self.known.part(frames),
            None if self.boxes is None else self.boxes[frames.start : frames.stop],
        )


def what_is_known(
    frames: Frames, settings: Settings, device: torch.device, progress: Progress
) -> tuple[Known, Distance | None]:
    """Read and check it before any work: InputError for a K of another size, for poses that are the wrong way round."""
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
    return known, read_scale(said.scale_from, known, frames)


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
    refiner: Sam2Refiner | None
    queries: Array | None = None  # [t, 2] pixels of the first frame to follow

    def plan(self, frames: Frames) -> Plan:
        return make_plan(self.passes, frames.images.shape[:3], self.settings, masks_only=self.masks_only)

    def work_through(self, frames: Frames, given: Given, plan: Plan) -> Whole:
        """Piece after piece; each frame is encoded once, and what a piece needs is gone before the next begins."""
        whole = Whole.empty(frames.images.shape[:3], with_cameras=not self.masks_only)
        tokens, end = None, 0
        check_first_piece(given.known, plan.pieces[0])
        for piece in plan.pieces:
            shared, (start, end) = max(0, end - piece.start), (piece.start, piece.stop)
            with self.clock("encoder"):
                fresh = frames.images[start + shared : end]
                keep_on = torch.device("cpu") if self.settings.offload else None
                boxes = given.part(range(start + shared, end)).boxes
                encoded = encode_frames(self.passes.network, fresh, plan.batch_size, self.progress, keep_on, boxes)
                tokens = encoded if tokens is None else torch.cat([tokens[len(tokens) - shared :], encoded])
            self.work_on(whole, frames.images[start:end], tokens, given.part(piece), piece, shared, plan.batch_size)
        return whole

    def work_on(
        self,
        whole: Whole,
        images: Array,
        tokens: Tensor,
        given: Given,
        piece: range,
        shared: int,
        batch_size: int,
    ) -> None:
        """The stages, in their order.

        images: [n, H, W, 3] of the piece.  tokens: [n, N, C].  shared: how many of its first frames are in ``whole``.
        """
        settings, progress, n = self.settings, self.progress, len(images)
        pairs = make_pairs(n, settings.pairs)
        with self.clock("flow"):
            method, weight = settings.alignment.method, settings.alignment.flow_weight
            wants_flow = not self.masks_only and method != "none" and weight > 0
            asks = settings.motion.evidence != "attention" and given.masks is None
            follows = settings.motion.instances and (given.masks is None or bool(given.masks.mask.any()))
            wanted = (wants_flow or asks or follows) and n > 1
            flow = estimate_flow(images, pairs, settings.flow, progress, self.passes.network.device) if wanted else None
            least = settings.motion.min_motion * max(images.shape[1:3])
            excess = epipolar_excess(flow, n, least, progress) if asks and flow is not None else None
        queries = self.queries if whole.tracks is None else whole.tracks.coordinates[piece.start]
        seen = Piece(images, tokens, pairs, given.masks, excess, batch_size, given.boxes, queries)
        found = self.passes.look(seen, settings, masks_only=self.masks_only)
        masks = found.masks
        things = masks.mask  # or ids of what moves apart
        if settings.motion.instances:
            with self.clock("instances"):
                spread = tokens.float().cpu().numpy().reshape(*found.attention.dynamic_map.shape, -1)
                things = find_instances(masks.mask, flow, spread, DIFFERENT, progress)
        if self.refiner is not None:
            with self.clock("sam2"):
                things = self.refiner(images, things, progress)
                masks = dataclasses.replace(masks, mask=things != 0)
        whole.write_motion(masks, found.attention, piece, shared)
        if settings.motion.instances:
            whole.write_instances(things, piece, shared)
        if self.masks_only:
            return
        if found.tracks is not None:
            whole.write_tracks(found.tracks, piece)
        if settings.keep == "dynamic" and found.predictions is not None:
            with self.clock("pass for what moves"):
                self.passes.look_at_movers(seen, masks, found.predictions)
        valid = valid_pixels(images.shape[:3], given.boxes)
        unseen = masks.mask | ~valid  # nothing there is static
        aligns = found.cameras is None or settings.alignment.method != "none"
        with self.clock("alignment"):
            known, uses = whole.known_for(given.known, piece, shared, settings) if aligns else (Known(), settings.known)
            cameras = found.cameras
            if aligns:
                cameras = self.aligned(found, unseen, pairs, flow if wants_flow else None, known, uses)
            assert cameras is not None
            cameras.depth[~valid] = 0
            whole.measured.append(measure(cameras, unseen, flow, pairs, start=piece.start))
            confidence = clean_confidence(**vars(cameras), dynamic_mask=unseen, pairs=pairs)
            cameras = dataclasses.replace(cameras, confidence=confidence)
            whole.write_cameras(cameras, piece, shared, ~unseen[:shared], known, uses)

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


def describe(
    frames: Frames, checkpoint: CheckpointInfo, settings: Settings, network: Backbone, clock: Clock
) -> dict[str, Any]:
    """``meta`` of a result: everything somebody needs to repeat it, as plain JSON values."""
    return {
        "source": frames.source,
        "names": list(frames.names),
        "crops": [dataclasses.asdict(crop) for crop in frames.crops],
        "settings": settings.as_dict(),
        "seed": settings.seed,
        "checkpoint": checkpoint.describe() | {"network": network.kind},
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "versions": {
            "easi3r": __version__,
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "timings_s": dict(clock.seconds),
    }
