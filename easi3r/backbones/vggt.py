"""The VGGT network (arXiv 2503.11651), written from the paper and the layout of its public checkpoints.

All frames at once: each is encoded by itself, then blocks alternate between attention inside a frame and attention
among all tokens of all frames, and heads read four of these blocks.  Split so that each part runs as often as needed
and no oftener: ``encode`` once per frame; ``attend`` where attention alone is read, ``aggregate`` where heads follow;
a head only for what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easi3r.backbones.heads import unrounded
from easi3r.backbones.interface import Backbone, Gives, Grid
from easi3r.backbones.layers import LAYER_NORM_EPS
from easi3r.backbones.vggt_heads import (
    CameraHead,
    DptConfig,
    DptHead,
    depth_and_confidence,
    points_and_confidence,
)
from easi3r.backbones.vggt_images import apply_crop, plan_image
from easi3r.backbones.vggt_layers import Block, FrameRotary
from easi3r.backbones.vggt_tracker import TrackerConfig, TrackHead, Tracks
from easi3r.errors import InputError
from easi3r.progress import Progress, silent
from easi3r.structures import Preparation

LAYERS_READ = (4, 11, 17, 23)  # by the heads, counted from 0
ROPE_BASE = 100.0
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
FRAMES_AT_ONCE = 8  # through the patch embedding and the heads, where frames are independent


@dataclass(frozen=True)
class VggtConfig:
    """Sizes of a network, all read from tensors; defaults are the public model's.  A head that is None is absent."""

    embed_dim: int = 1024
    num_heads: int = 16
    depth: int = 24  # frame blocks, and as many global blocks
    patch_size: int = 14
    position_side: int = 37  # of the square grid of learned positions
    num_registers: int = 4
    encoder_depth: int = 24
    encoder_registers: int = 4
    camera_depth: int | None = 4
    depth_head: DptConfig | None = field(default_factory=partial(DptConfig, outputs=2))
    point_head: DptConfig | None = field(default_factory=partial(DptConfig, outputs=4))
    track_head: TrackerConfig | None = field(default_factory=TrackerConfig)


@dataclass(frozen=True)
class ReadOuts:
    """What the heads read of S frames: a frame block's and a global block's output side by side, at some layers."""

    layers: tuple[Tensor, ...]  # each [S, T, 2C], T = special tokens, the camera's first, then patches row-major
    grid: Grid

    def patches(self, frames: slice) -> list[Tensor]:
        """Patch tokens [B, h * w, 2C] of some frames, one tensor per layer."""
        return [tokens[frames, -self.grid[0] * self.grid[1] :].float() for tokens in self.layers]


class PatchProjection(nn.Module):
    """Images [B, 3, H, W] -> patches [B, P, C], row-major."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """A vision transformer with registers (DINOv2, arXiv 2304.07193, 2309.16588) that looks at each frame alone."""

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        dim, side = config.embed_dim, config.position_side
        self.patch_embed = PatchProjection(dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.encoder_registers, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, eps=LAYER_NORM_EPS) for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, images: Tensor, grid: Grid) -> Tensor:
        """Normalised images [B, 3, H, W] -> patch tokens [B, P, C]."""
        patches = self.patch_embed(images)
        at_class, at_patches = self._positions(grid)
        special = torch.cat([self.cls_token + at_class, self.register_tokens], dim=1).expand(len(images), -1, -1)
        x = torch.cat([special, patches + at_patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x[:, special.shape[1] :]))

    def _positions(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """[1, 1, C] of the class token and [1, h * w, C] of the patches."""
        at_class, square = self.pos_embed[:, :1].float(), self.pos_embed[:, 1:].float()
        side = round(square.shape[1] ** 0.5)
        if grid == (side, side):
            return at_class, square
        square = square.transpose(1, 2).unflatten(2, (side, side))
        resampled = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return at_class, resampled.flatten(2).transpose(1, 2)


class Aggregator(nn.Module):
    """The patch embedding and the alternating blocks."""

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.patch_embed = PatchEmbedding(config)
        # index 0 of the second axis is the first frame's, index 1 all others'
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_registers, dim))
        self.frame_blocks = nn.ModuleList(Block(dim, heads, normalised=True) for _ in range(config.depth))
        self.global_blocks = nn.ModuleList(Block(dim, heads, normalised=True) for _ in range(config.depth))

    def with_special_tokens(self, patches: Tensor) -> Tensor:
        """[S, P, C] -> [S, T, C]: the camera's token and the registers before each frame's patches."""
        first, others = torch.cat([self.camera_token, self.register_token], dim=2)[0]
        special = torch.stack([first] + [others] * (len(patches) - 1))
        return torch.cat([special, patches.to(special.dtype)], dim=1)


class Vggt(Backbone):
    """See the module's text; tensor names are those of the public checkpoints."""

    config: VggtConfig
    kind = "VGGT"
    input_range = 0.0, 1.0
    preparation = Preparation(plan_image, apply_crop)

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        self.config = config
        dim = 2 * config.embed_dim
        self.aggregator = Aggregator(config)
        if config.camera_depth is not None:
            self.camera_head = CameraHead(dim, config.num_heads, config.camera_depth)
        if config.depth_head is not None:
            self.depth_head = DptHead(dim, config.depth_head)
        if config.point_head is not None:
            self.point_head = DptHead(dim, config.point_head)
        if config.track_head is not None:
            self.track_head = TrackHead(dim, config.track_head)

    @property
    def gives(self) -> Gives:
        """What there are heads for."""
        config = self.config
        return Gives(
            sees="clip",
            cameras=config.camera_depth is not None,
            depth=config.depth_head is not None,
            points=config.point_head is not None,
            tracks=config.track_head is not None,
        )

    @property
    def device(self) -> torch.device:
        return self.aggregator.camera_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the aggregator's matrices; norms, residual streams and all heads may be finer."""
        return cast(Block, self.aggregator.frame_blocks[0]).mlp.fc1.weight.dtype

    @property
    def trained_size(self) -> int:
        return self.config.position_side * self.config.patch_size

    @property
    def narrowest(self) -> int:
        return self.config.embed_dim

    def stays_float32(self, module: str) -> bool:
        """Everything but the aggregator."""
        return not module.startswith("aggregator.")

    @property
    def num_special(self) -> int:
        """Tokens of a frame that are no patches: the camera's and the registers."""
        return 1 + self.config.num_registers

    def encode(self, images: Tensor) -> Tensor:
        """[S, 3, H, W] RGB in [0, 1] -> patch tokens [S, h * w, C]; frames are independent."""
        grid = self.grid_of(*images.shape[-2:])
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        dtype = self.aggregator.patch_embed.patch_embed.proj.weight.dtype
        return torch.cat(
            [
                self.aggregator.patch_embed(((some.to(self.device) - mean) / std).to(dtype), grid)
                for some in images.split(FRAMES_AT_ONCE)
            ]
        )

    def aggregate(
        self, tokens: Tensor, grid: Grid, *, layers: tuple[int, ...] = LAYERS_READ, progress: Progress = silent
    ) -> ReadOuts:
        """Patch tokens [S, h * w, C] of all frames -> what the heads read.  The attention hooks fire here.

        layers: those whose output is kept; the last one is enough for ``predict_poses``.
        """
        x, rotary = self.aggregator.with_special_tokens(tokens.to(self.device)), self._rotary(grid)
        kept = []
        for layer, (within, among) in enumerate(self._blocks(self.config.depth, progress)):
            alone = within(x, rotary)
            x = among(alone.flatten(0, 1)[None], rotary).view_as(alone)
            if layer in layers:
                kept.append(torch.cat([alone, x], dim=-1))
        return ReadOuts(tuple(kept), grid)

    def attend(self, tokens: Tensor, grid: Grid, last_layer: int, *, progress: Progress = silent) -> None:
        """As far as the logits of global block ``last_layer`` (from 0), for the attention hooks alone."""
        if not 0 <= last_layer < self.config.depth:
            raise ValueError(f"Layer {last_layer} was asked for; this network has layers 0 to {self.config.depth - 1}.")
        x, rotary = self.aggregator.with_special_tokens(tokens.to(self.device)), self._rotary(grid)
        for layer, (within, among) in enumerate(self._blocks(last_layer + 1, progress)):
            x = within(x, rotary)
            if layer < last_layer:
                x = among(x.flatten(0, 1)[None], rotary).view_as(x)
        cast(Block, among).meet(x.flatten(0, 1)[None], rotary)

    def _blocks(self, count: int, progress: Progress) -> Iterable[tuple[nn.Module, nn.Module]]:
        """The first of the pairs of blocks: inside a frame, and among all."""
        within, among = (
            list(blocks)[:count] for blocks in (self.aggregator.frame_blocks, self.aggregator.global_blocks)
        )
        return progress(list(zip(within, among, strict=True)), "looking at all frames, layer by layer")

    def predict_poses(self, read_outs: ReadOuts) -> Tensor:
        """Pose encodings [4, S, 9] float32 of all iterations, the last one best; see ``vggt_poses``."""
        head, tokens = self._head("camera_head"), read_outs.layers[-1][:, 0].float()
        with unrounded(tokens):
            return head(tokens)  # type: ignore[no-any-return]

    def predict_depth(self, read_outs: ReadOuts) -> tuple[Tensor, Tensor]:
        """z-depth [S, H, W] in the network's own unit, and confidence [S, H, W] >= 1, both float32."""
        return self._predict_maps("depth_head", read_outs, depth_and_confidence)

    def predict_points(self, read_outs: ReadOuts) -> tuple[Tensor, Tensor]:
        """Points [S, H, W, 3] in the world's frame and unit, and confidence [S, H, W] >= 1, both float32."""
        return self._predict_maps("point_head", read_outs, points_and_confidence)

    def track(self, read_outs: ReadOuts, queries: Tensor) -> Tracks:
        """Follow ``queries`` [n, 2], (x, y) pixels of the first frame, through all frames.

        Raises InputError for images too small for the tracker's seven levels.
        """
        head, size = cast(TrackHead, self._head("track_head")), self._size(read_outs.grid)
        if min(size) < 128:
            raise InputError(
                f"Points cannot be tracked in images of {size[1]} x {size[0]} px; expected sides of at least 128 px, "
                "so use larger images."
            )
        queries = queries.to(self.device, torch.float32)
        with unrounded(queries):
            features = self._in_chunks(head.feature_extractor, read_outs)
            return cast(Tracks, head.tracker(torch.cat(list(features)), queries))

    def _predict_maps(
        self, name: str, read_outs: ReadOuts, decode: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        head = self._head(name)
        with unrounded(read_outs.layers[0]):
            values, confidences = zip(*map(decode, self._in_chunks(head, read_outs)), strict=True)
        return torch.cat(values), torch.cat(confidences)

    def _in_chunks(self, head: nn.Module, read_outs: ReadOuts) -> list[Tensor]:
        size = self._size(read_outs.grid)
        starts = range(0, len(read_outs.layers[0]), FRAMES_AT_ONCE)
        chunks = (read_outs.patches(slice(start, start + FRAMES_AT_ONCE)) for start in starts)
        return [head(chunk, read_outs.grid, size) for chunk in chunks]

    def _size(self, grid: Grid) -> tuple[int, int]:
        return grid[0] * self.config.patch_size, grid[1] * self.config.patch_size

    def _head(self, name: str) -> nn.Module:
        if name not in self._modules:
            raise InputError(f"These weights hold no {name}; expected weights of VGGT with it, so give other weights.")
        return self.get_submodule(name)

    def _rotary(self, grid: Grid) -> FrameRotary:
        return _frame_rotary(grid, self.num_special, self.config.embed_dim // self.config.num_heads, self.device)


@lru_cache(maxsize=8)
def _frame_rotary(grid: Grid, num_special: int, head_dim: int, device: torch.device) -> FrameRotary:
    with torch.inference_mode(False):  # the table outlives this call and may take part in training later
        return FrameRotary(grid, num_special, head_dim, ROPE_BASE, device)
