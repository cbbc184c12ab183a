"""The stages in their order, for each piece of a clip."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from easi3r.alignment import align
from easi3r.canvas import valid_pixels
from easi3r.clean import clean_confidence
from easi3r.clip_passes import ClipPasses
from easi3r.clock import Clock
from easi3r.config import KnownSettings, Settings
from easi3r.cut import Cut
from easi3r.epipolar import epipolar_excess
from easi3r.flow import estimate_flow
from easi3r.given import Given
from easi3r.inference import encode_frames
from easi3r.instances import DIFFERENT, find_instances
from easi3r.known import check_first_piece
from easi3r.pair_views import pair_views, starting_at
from easi3r.pairs import make_pairs
from easi3r.passes import Found, Passes, Piece
from easi3r.piece_result import Earlier, PieceCameras, PieceResult, keeps_poses
from easi3r.plan import Plan, make_plan
from easi3r.progress import Progress
from easi3r.quality import measure
from easi3r.sam2_refinement import Sam2Refiner
from easi3r.structures import AlignedCameras, Array, DynamicMasks, Frames, Known, PairFlow
from easi3r.whole import Whole


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


def common(one: range, other: range) -> range:
    """The numbers of both."""
    return range(max(one.start, other.start), min(one.stop, other.stop))
