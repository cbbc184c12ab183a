"""The passes of a network that sees all frames at once (VGGT4D, arXiv 2511.19971, on VGGT, arXiv 2503.11651).

The first pass says how far everything is, what the lens is, and, by its global attention, what moves; the second, from
which movers are hidden, where the cameras are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from easi3r.attention_maps import STILL
from easi3r.backbones.interface import Gives
from easi3r.backbones.vggt import FRAMES_AT_ONCE, LAYERS_READ, ReadOuts, Vggt, VggtConfig
from easi3r.backbones.vggt_poses import decode_poses
from easi3r.backbones.vggt_sites import drop_patches
from easi3r.clock import Clock
from easi3r.config import Settings
from easi3r.dynamic_masks import cluster_tokens, masks_of, prove
from easi3r.errors import InputError
from easi3r.geometry import invert_rigid
from easi3r.gram_maps import capture_grams
from easi3r.normalise import EPS
from easi3r.passes import Found, Load, Piece
from easi3r.precision import computing
from easi3r.progress import Progress
from easi3r.reprojection import refine_masks
from easi3r.structures import AlignedCameras, Array, DynamicMasks, GramMaps, PairPredictions, PointTracks

HEAD_BYTES = 1800  # per pixel of the frames that go through a head at once; counted
LEAST_DEPTH = 1e-6  # of the median, where a point of the point head lies behind its camera


@dataclass(frozen=True)
class ClipPasses:
    """Every frame of a piece in one forward pass; attention as products of patches, folded in layer by layer."""

    network: Vggt
    progress: Progress
    clock: Clock

    def settled(self, settings: Settings, *, masks_only: bool) -> Settings:
        """``auto`` alignment is none, since the heads give cameras, but fast where something is known beforehand.

        Raises InputError where a head is asked for that the weights lack.
        """
        if settings.frames.collection:
            raise InputError(
                "collection was asked for, but this network sees all images at once, at one size; bring them to one "
                "size, or give weights of DUSt3R or MonST3R."
            )
        if masks_only:
            return settings
        check_heads(self.network.gives, settings)
        known, alignment = settings.known, settings.alignment
        asks = [
            name
            for name in ("intrinsics", "camera_to_world", "world_to_camera", "depth")
            if getattr(known, name) is not None
        ]
        asks += ["focal"] * (not isinstance(alignment.focal, str)) + ["camera=static"] * (alignment.camera == "static")
        if asks and alignment.method == "none":
            raise InputError(
                f"{asks[0]} was given with align=none, which leaves cameras and depth as the network's heads say; "
                "choose align=fast."
            )
        method = alignment.method if alignment.method != "auto" else "fast" if asks else "none"
        return replace(settings, alignment=replace(alignment, method=method))

    def load(
        self, size: tuple[int, int, int], num_pairs: int, batch_size: int, settings: Settings, *, masks_only: bool
    ) -> Load:
        """For a piece of this size (frames, height, width)."""
        config, (length, height, width) = self.network.config, size
        patches = height * width // config.patch_size**2
        tokens = patches + self.network.num_special
        element = self.network.aggregator.camera_token.new_empty(0, dtype=self.network.dtype).element_size()
        heads = 0 if masks_only else min(length, FRAMES_AT_ONCE) * height * width * HEAD_BYTES
        second = not masks_only and settings.motion.passes == 2
        layers = LAYERS_READ[-1] + 1
        return Load(
            activation_bytes=max(length * tokens * config.embed_dim * (16 + 12 * element), heads),
            kept_bytes=0 if masks_only else length * tokens * config.embed_dim * 8 * len(LAYERS_READ),
            token_bytes=length * patches * element * config.embed_dim,
            frame_flops=encoder_flops(config, patches),
            pass_flops=clip_flops(config, length, tokens, layers) * (2 if second else 1),
            at_once="all frames of a piece",
        )

    @torch.no_grad()
    def look(self, piece: Piece, settings: Settings, *, masks_only: bool) -> Found:
        """Maps and masks of the first pass; depth and lenses of the first, poses of the second."""
        network, clock = self.network, self.clock
        n, height, width = piece.images.shape[:3]
        grid = network.grid_of(height, width)
        with clock("encoder"):
            labels = cluster_tokens(piece.tokens, settings.motion.clusters, settings.seed).reshape(n, *grid)
        with clock("pass 1"), computing(network):
            with capture_grams(network, n, grid) as statistics:
                if masks_only:
                    network.attend(piece.tokens, grid, max(statistics.layers), progress=self.progress)
                    read_outs = None
                else:
                    read_outs = network.aggregate(piece.tokens, grid, progress=self.progress)
            attention = statistics.maps(nothing_varies=frames_are_the_same(piece.tokens))
        masks = piece.masks
        if masks is None:
            masks = masks_of(attention.dynamic_map, labels, piece.images, piece.excess, settings.motion)
        if read_outs is None:
            return Found(masks, attention)
        return self.with_cameras(piece, settings, read_outs, masks, attention)

    def with_cameras(
        self, piece: Piece, settings: Settings, read_outs: ReadOuts, masks: DynamicMasks, attention: GramMaps
    ) -> Found:
        """What the heads say of the first pass, the second pass, and masks held against both."""
        network, clock = self.network, self.clock
        size = piece.images.shape[1:3]
        with clock("heads"):
            first = network.predict_poses(read_outs)[-1].cpu().numpy()
            depth, confidence = self.depth_of(read_outs, settings, first)
            tracks = None if piece.queries is None else tracks_of(network, read_outs, piece.queries)
        grid, dynamic = read_outs.grid, torch.from_numpy(masks.tokens(network.patch_size)).flatten(1)
        del read_outs  # its memory is the second pass's
        poses = first
        if settings.motion.passes == 2 and dynamic.any():
            with clock("pass 2"), computing(network), drop_patches(network, dynamic):
                last = network.aggregate(piece.tokens, grid, layers=LAYERS_READ[-1:], progress=self.progress)
                poses = network.predict_poses(last)[-1].cpu().numpy()
        camera_to_world, _ = decode_poses(poses, *size)
        _, intrinsics = decode_poses(first, *size)
        camera_to_world = from_first(camera_to_world)
        if piece.masks is None and settings.motion.reprojection and settings.motion.evidence != "flow":
            with clock("reprojection"):
                seen = refine_masks(
                    piece.images,
                    depth,
                    masks.mask,
                    camera_to_world,
                    intrinsics,
                    seed=settings.seed,
                    progress=self.progress,
                )
                masks = cleared(masks, seen, piece.excess)
        cameras = AlignedCameras(camera_to_world.astype(np.float32), intrinsics.astype(np.float32), depth, confidence)
        return Found(masks, attention, cameras=cameras, tracks=tracks)

    def look_at_movers(self, piece: Piece, masks: DynamicMasks, predictions: PairPredictions) -> None:
        """Nothing: of pairs nothing is predicted, and the depth of a pixel is its own frame's."""

    def depth_of(self, read_outs: ReadOuts, settings: Settings, poses: Array) -> tuple[Array, Array]:
        """z-depth [n, H, W] > 0 and confidence [n, H, W] >= 1, float32, of the head that the settings name.

        poses: [n, 9] encodings of the pass that ``read_outs`` are of, in whose world the point head's points are.
        """
        if settings.heads.points == "depth":
            depth, confidence = self.network.predict_depth(read_outs)
            return depth.cpu().numpy(), confidence.cpu().numpy()
        points, confidence = self.network.predict_points(read_outs)
        to_camera = invert_rigid(decode_poses(poses, *points.shape[1:3])[0]).astype(np.float32)
        z = np.einsum("nhwi,ni->nhw", points.cpu().numpy(), to_camera[:, 2, :3]) + to_camera[:, 2, 3, None, None]
        ahead = z > 0
        least = LEAST_DEPTH * (float(np.median(z[ahead])) if ahead.any() else 1.0)
        return np.maximum(z, np.float32(least)), np.where(ahead, confidence.cpu().numpy(), np.float32(1))


def check_heads(gives: Gives, settings: Settings) -> None:
    """Raise InputError for what the weights cannot give."""
    wanted = {
        "camera head": gives.cameras,
        "depth head": gives.depth or settings.heads.points != "depth",
        "point head": gives.points or settings.heads.points != "head",
        "track head": gives.tracks or settings.heads.tracks is None,
    }
    if lacking := [head for head, there in wanted.items() if not there]:
        raise InputError(
            f"These weights hold no {' and no '.join(lacking)}; expected weights with it, so give others, or choose "
            "other outputs (points, tracks), or masks alone (segment)."
        )


def frames_are_the_same(tokens: Tensor) -> bool:
    """Whether all frames [n, P, C] show one picture: nothing varies."""
    apart = float((tokens - tokens[:1]).abs().mean(dtype=torch.float32))
    return apart <= STILL * float(tokens.float().std(dim=1).mean() + EPS)


def from_first(camera_to_world: Array) -> Array:
    """[n, 4, 4]: the world moved so that the first camera is its origin, which training makes it nearly."""
    moved = invert_rigid(camera_to_world[0]) @ camera_to_world
    moved[0] = np.eye(4)
    return np.asarray(moved)


def cleared(masks: DynamicMasks, seen: Array, excess: Array | None) -> DynamicMasks:
    """``masks`` without what the cameras explain, ``seen`` [n, H, W] being what is left; what flow alone proves stays.

    The score of what is cleared is zero.
    """
    mask = seen if excess is None else seen | (masks.mask & prove(excess, 1.0).mask)
    return DynamicMasks(np.where(masks.mask & ~mask, np.float32(0), masks.score), mask, masks.threshold)


def tracks_of(network: Vggt, read_outs: ReadOuts, queries: Array) -> PointTracks:
    """queries: [t, 2] (x, y) pixels of the piece's first frame."""
    tracks = network.track(read_outs, torch.from_numpy(queries).float())
    found = tracks.coordinates[-1], tracks.visibility, tracks.confidence
    return PointTracks(*(values.cpu().numpy() for values in found))


def encoder_flops(config: VggtConfig, patches: int) -> float:
    """Of the patch embedding of one frame."""
    width, tokens = config.embed_dim, patches + 1 + config.encoder_registers
    return config.encoder_depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)


def clip_flops(config: VggtConfig, num_frames: int, tokens: int, layers: int) -> float:
    """Of ``layers`` frame and global blocks over all frames of ``tokens`` each; no heads."""
    width, every = config.embed_dim, num_frames * tokens
    return layers * (48.0 * every * width**2 + 4.0 * every * tokens * width + 4.0 * float(every) ** 2 * width)
