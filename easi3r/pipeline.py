"""The order of the stages, written once: a clip and a network in, what moves (and where everything is) out.

A long clip is worked on in overlapping pieces, each by itself, so that its length does not decide the memory.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from easi3r._version import __version__
from easi3r.alignment import align
from easi3r.attention_maps import AttentionStatistics
from easi3r.backbones.checkpoint import CheckpointInfo
from easi3r.backbones.dust3r import Dust3r
from easi3r.clean import clean_confidence
from easi3r.config import Settings
from easi3r.dynamic_masks import add_flow, cluster_tokens, make_masks, prove
from easi3r.epipolar import epipolar_residual
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.frames import read_frames
from easi3r.given_masks import read_masks
from easi3r.inference import changed_by_cut, empty_predictions, encode_frames, observe_pairs
from easi3r.known import read_known
from easi3r.pairs import make_pairs
from easi3r.plan import Plan, make_plan, smaller
from easi3r.pose_direction import check_direction, pairs_to_check
from easi3r.precision import choose_dtype, in_precision
from easi3r.progress import Progress
from easi3r.quality import measure
from easi3r.scale import Distance, read_scale, with_distance
from easi3r.scene import Motion, Scene
from easi3r.structures import Array, AttentionMaps, DynamicMasks, Frames, Known, PairPredictions
from easi3r.verdict import judge
from easi3r.whole import Whole

logger = logging.getLogger("easi3r")


@torch.inference_mode(False)  # somebody may call us from within it, and the alignment needs gradients
def run(
    network: Dust3r,
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
    network = in_precision(network, choose_dtype(settings.dtype, network))
    with clock("frames"):
        frames = source if isinstance(source, Frames) else load_frames(network, source, settings, progress)
    given = None if settings.motion.masks is None else read_masks(settings.motion.masks, frames)
    known, distance = what_is_known(frames, settings, network.device, progress)
    whole = work_within_memory(Job(network, settings, progress, clock, masks_only), frames, Given(given, known))
    moved: dict[str, Any] = {
        "images": frames.images,
        "dynamic_score": whole.masks.score,
        "dynamic_mask": whole.masks.mask,
        "attention": whole.attention,
        "timestamps": frames.timestamps,
    }
    meta = describe(frames, checkpoint, settings, network, clock) | {"pieces": whole.notes}
    if whole.cameras is None:
        return Motion(**moved, meta=meta)
    seams = [note["seam_residual"] for note in whole.notes if "seam_residual" in note]
    meta["quality"] = judge(whole.measured, whole.cameras, whole.masks.mask, seams=seams)
    metric = distance is not None or known.poses_set_the_scale or known.depth_sets_the_scale
    cameras = whole.cameras if distance is None else with_distance(whole.cameras, distance)
    return Scene(
        **moved,
        **vars(cameras),
        valid_mask=np.ones(cameras.depth.shape, dtype=bool),
        meta=meta | {"scale": "metric" if metric else "up to scale"},
    )


def load_frames(network: Dust3r, source: Any, settings: Settings, progress: Progress) -> Frames:
    """A clip as ``network`` sees it, which ``run`` takes in place of its source."""
    return read_frames(
        source,
        settings.frames,
        patch_size=network.config.patch_size,
        trained_size=max(network.config.img_size),
        progress=progress,
    )


@dataclass(frozen=True)
class Given:
    """What the user hands in beside the clip."""

    masks: DynamicMasks | None
    known: Known

    def part(self, frames: range) -> Given:
        """Of some consecutive frames."""
        return Given(None if self.masks is None else self.masks.part(frames), self.known.part(frames))


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
            logger.warning("the memory of %s did not suffice: %s", job.network.device, str(error).partition("\n")[0])
        job = dataclasses.replace(job, settings=smaller(plan, job.settings))
    raise InputError(
        f"The memory of {job.network.device} does not suffice for {frames.num_frames} frames (the least that was tried "
        f"{plan}); choose a smaller image_size, fewer pairs (window) or masks alone (segment)."
    )


@dataclass(frozen=True)
class Job:
    """What all pieces of a clip have in common."""

    network: Dust3r
    settings: Settings
    progress: Progress
    clock: Clock
    masks_only: bool

    def plan(self, frames: Frames) -> Plan:
        return make_plan(self.network, frames.images.shape[:3], self.settings, masks_only=self.masks_only)

    def work_through(self, frames: Frames, given: Given, plan: Plan) -> Whole:
        """Piece after piece; each frame is encoded once, and what a piece needs is gone before the next begins."""
        whole = Whole.empty(frames.images.shape[:3], self.network.config.patch_size, with_cameras=not self.masks_only)
        tokens, end = None, 0
        check_first_piece(given.known, plan.pieces[0])
        for piece in plan.pieces:
            shared, (start, end) = max(0, end - piece.start), (piece.start, piece.stop)
            with self.clock("encoder"):
                fresh = frames.images[start + shared : end]
                keep_on = torch.device("cpu") if self.settings.offload else None
                encoded = encode_frames(self.network, fresh, plan.batch_size, self.progress, keep_on)
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
            aligns = not self.masks_only and settings.alignment.method != "none" and settings.alignment.flow_weight > 0
            asks = settings.motion.evidence != "attention" and given.masks is None
            wanted = (aligns or asks) and n > 1
            flow = estimate_flow(images, pairs, settings.flow, progress, self.network.device) if wanted else None
            residual = epipolar_residual(flow, n, progress) if asks and flow is not None else None
        masks, attention, predictions = self.find_motion(images, tokens, pairs, given.masks, residual, batch_size)
        whole.write_motion(masks, attention, piece, shared)
        if predictions is None:
            return
        with self.clock("alignment"):
            known, uses = whole.known_for(given.known, piece, shared, settings)
            cameras = align(
                predictions,
                n,
                settings.alignment,
                progress,
                flow=flow if aligns else None,
                dynamic_mask=masks.mask,
                known=known,
                uses=uses,
                device=self.network.device,
            )
            whole.measured.append(measure(cameras, masks.mask, flow, pairs, start=piece.start))
            confidence = clean_confidence(**vars(cameras), dynamic_mask=masks.mask, pairs=pairs)
            cameras = dataclasses.replace(cameras, confidence=confidence)
            whole.write_cameras(cameras, piece, shared, ~masks.mask[:shared], known, uses)

    def find_motion(
        self,
        images: Array,
        tokens: Tensor,
        pairs: Array,
        given: DynamicMasks | None,
        residual: Array | None,
        batch_size: int,
    ) -> tuple[DynamicMasks, AttentionMaps, PairPredictions | None]:
        """Decoders once or twice: masks of one pass cut the attention of the next.

        Masks, maps and points are those of the last pass; given masks need a single one, and are returned as they are.
        residual: [n, H, W] epipolar residuals, for masks that rest on flow too; None: masks as published.
        """
        network, settings, clock = self.network, self.settings, self.clock
        n, height, width = images.shape[:3]
        grid, patch_size = network.grid_of(height, width), network.config.patch_size
        with clock("encoder"):
            labels = cluster_tokens(tokens, settings.motion.clusters, settings.seed).reshape(n, *grid)
        masks, passes = given, 1 if given is not None else settings.motion.passes
        statistics = AttentionStatistics(n, grid)
        for number in range(1, passes + 1):
            with clock(f"pass {number}"):
                dynamic_tokens = None if masks is None else masks.tokens(patch_size)
                points_wanted = not self.masks_only and number == passes
                predictions = empty_predictions(pairs, height, width) if points_wanted else None
                seen = np.ones(len(pairs), dtype=bool)
                if number > 1:  # where no points are wanted, most pairs without a moving token need no second look
                    assert dynamic_tokens is not None
                    statistics, again = statistics.reopened(pairs, changed_by_cut(pairs, dynamic_tokens))
                    seen = seen if points_wanted else again
                if seen.any():
                    observe_pairs(
                        network,
                        tokens,
                        pairs[seen],
                        grid,
                        statistics.update,
                        self.progress,
                        batch_size=batch_size,
                        dynamic_tokens=dynamic_tokens,
                        predictions=predictions,
                    )
                attention = statistics.maps()
                if given is None:
                    masks = make_masks(attention.dynamic_map, labels, patch_size)
                    if residual is not None:
                        least = settings.motion.min_motion * max(height, width)
                        both = settings.motion.evidence == "both"
                        masks = add_flow(masks, labels, residual, least) if both else prove(residual, least)
        assert masks is not None
        return masks, attention, predictions


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - begin, 3)


def check_first_piece(known: Known, piece: range) -> None:
    """Raise InputError where a long clip's world would be placed only after its first piece."""
    first = known.part(piece)
    for name, anywhere, at_once in (
        ("two poses apart", known.poses_set_the_scale, first.poses_set_the_scale),
        ("a pose", len(known.posed()) > 0, len(first.posed()) > 0),
        ("a depth", known.depth_sets_the_scale, first.depth_sets_the_scale),
    ):
        if anywhere and not at_once:
            raise InputError(
                f"The clip is worked on in pieces, and of the frames 0 to {piece.stop - 1} of the first one, which "
                f"place the world, {name} must be known if any is; give some of these too, or use larger pieces."
            )


def describe(
    frames: Frames, checkpoint: CheckpointInfo, settings: Settings, network: Dust3r, clock: Clock
) -> dict[str, Any]:
    """``meta`` of a result: everything somebody needs to repeat it, as plain JSON values."""
    return {
        "source": frames.source,
        "names": list(frames.names),
        "crops": [dataclasses.asdict(crop) for crop in frames.crops],
        "settings": settings.as_dict(),
        "seed": settings.seed,
        "checkpoint": {"name": checkpoint.name, "sha256": checkpoint.sha256(), "licence": checkpoint.licence},
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


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one; raises InputError for a device that torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was built without
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"The device {name!r} cannot be used ({reason}); expected auto, cpu, cuda or cuda:1."
        ) from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (on either device), NumPy or OpenCV ran out of memory."""
    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        sign in words for sign in ("not enough memory", "can't allocate memory", "out of memory", "insufficient memory")
    )
