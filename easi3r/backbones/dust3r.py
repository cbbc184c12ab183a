"""The DUSt3R network (arXiv 2312.14132), written from the paper and the layout of its public checkpoints.

One encoder for all frames, two decoders that read each other, one head per view.  Split so that each part runs as
often as needed and no oftener: ``encode`` once per frame; per pair ``attend`` where attention alone is read, ``decode``
and ``predict`` where points are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor, nn

from easi3r.backbones.heads import HEADS, points_and_confidence
from easi3r.backbones.interface import Backbone, Gives, Grid
from easi3r.backbones.layers import LAYER_NORM_EPS, DecoderBlock, EncoderBlock, RotaryTable
from easi3r.errors import InputError


@dataclass(frozen=True)
class Dust3rConfig:
    """The constructor's arguments in a checkpoint; defaults are the large public model's."""

    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    patch_size: int = 16
    img_size: tuple[int, int] = (512, 512)  # (height, width) it was trained for
    head_type: Literal["linear", "dpt"] = "dpt"
    rope_base: float = 100.0
    conf_range: tuple[float, float] = (1.0, float("inf"))


@dataclass(frozen=True)
class Decoded:
    """The tokens that each head reads, [B, N, C] each, and where they stand."""

    first: list[Tensor]
    second: list[Tensor]
    grid_first: Grid
    grid_second: Grid


@dataclass(frozen=True)
class PointmapPair:
    """Float32 points [B, H, W, 3] of both views, both in view 1's camera frame, and confidences [B, H, W] >= 1."""

    points_first: Tensor
    points_second: Tensor
    confidence_first: Tensor
    confidence_second: Tensor


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] -> tokens [B, N, C], row-major."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Dust3r(Backbone):
    """See the module's text; tensor names are those of the public checkpoints."""

    config: Dust3rConfig
    kind = "DUSt3R"
    input_range = -1.0, 1.0

    def __init__(self, config: Dust3rConfig) -> None:
        super().__init__()
        self.config = config
        enc_dim, dec_dim = config.enc_embed_dim, config.dec_embed_dim
        self.patch_embed = PatchEmbed(enc_dim, config.patch_size)
        self.enc_blocks = nn.ModuleList(EncoderBlock(enc_dim, config.enc_num_heads) for _ in range(config.enc_depth))
        self.enc_norm = nn.LayerNorm(enc_dim, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(enc_dim, dec_dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(dec_dim, config.dec_num_heads) for _ in range(config.dec_depth))
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(dec_dim, config.dec_num_heads) for _ in range(config.dec_depth))
        self.dec_norm = nn.LayerNorm(dec_dim, eps=LAYER_NORM_EPS)
        head = HEADS[config.head_type]
        self.downstream_head1 = head(config.dec_depth, enc_dim, dec_dim, config.patch_size)
        self.downstream_head2 = head(config.dec_depth, enc_dim, dec_dim, config.patch_size)

    @property
    def gives(self) -> Gives:
        """Points of pairs."""
        return Gives(sees="pairs", points=True)

    @property
    def device(self) -> torch.device:
        return self.decoder_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; norms and each head's last layer may be finer."""
        return self.decoder_embed.weight.dtype

    @property
    def trained_size(self) -> int:
        return max(self.config.img_size)

    @property
    def narrowest(self) -> int:
        return min(self.config.enc_embed_dim, self.config.dec_embed_dim)

    def stays_float32(self, module: str) -> bool:
        """Each head's last layer."""
        head, _, layer = module.partition(".")
        return head in ("downstream_head1", "downstream_head2") and layer == self.downstream_head1.last_layer

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in [-1, 1] -> [B, N, enc_embed_dim] tokens, row-major."""
        grid = self.grid_of(*images.shape[-2:])
        rotary = self._rotary(grid, self.config.enc_embed_dim // self.config.enc_num_heads)
        x = self.patch_embed(images.to(self.device, self.patch_embed.proj.weight.dtype))
        for block in self.enc_blocks:
            x = block(x, rotary)
        return cast(Tensor, self.enc_norm(x))

    def decode(
        self, tokens_first: Tensor, tokens_second: Tensor, grid: Grid, grid_second: Grid | None = None
    ) -> Decoded:
        """Encoder tokens [B, N, C] of both views -> what the heads read.  The attention hooks fire here.

        grid_second: of the second view, where its image is of another size than the first's.
        """
        grid_second = grid_second or grid
        rotary1, rotary2 = self._decoder_rotary(grid), self._decoder_rotary(grid_second)
        kept = {0: (tokens_first, tokens_second)}
        x, y = self.decoder_embed(tokens_first), self.decoder_embed(tokens_second)
        for layer, (block1, block2) in enumerate(zip(self.dec_blocks, self.dec_blocks2, strict=True), start=1):
            x, y = block1(x, y, rotary1, rotary2), block2(y, x, rotary2, rotary1)
            if layer in self.downstream_head1.layers_read:
                kept[layer] = (x, y)
        kept[self.config.dec_depth] = (self.dec_norm(x), self.dec_norm(y))
        first, second = zip(*(kept[layer] for layer in self.downstream_head1.layers_read), strict=True)
        return Decoded(list(first), list(second), grid, grid_second)

    def attend(self, tokens_first: Tensor, tokens_second: Tensor, grid: Grid, grid_second: Grid | None = None) -> None:
        """The decoders as far as the logits of the last layer's cross-attention, for the attention hooks alone."""
        rotary1, rotary2 = self._decoder_rotary(grid), self._decoder_rotary(grid_second or grid)
        x, y = self.decoder_embed(tokens_first), self.decoder_embed(tokens_second)
        *before, (last1, last2) = zip(self.dec_blocks, self.dec_blocks2, strict=True)
        for block1, block2 in before:
            x, y = block1(x, y, rotary1, rotary2), block2(y, x, rotary2, rotary1)
        cast(DecoderBlock, last1).meet(x, y, rotary1, rotary2)
        cast(DecoderBlock, last2).meet(y, x, rotary2, rotary1)

    def predict(self, decoded: Decoded) -> PointmapPair:
        """Run both heads."""
        conf_range = self.config.conf_range
        points1, conf1 = points_and_confidence(self.downstream_head1(decoded.first, decoded.grid_first), conf_range)
        points2, conf2 = points_and_confidence(self.downstream_head2(decoded.second, decoded.grid_second), conf_range)
        return PointmapPair(points1, points2, conf1, conf2)

    def forward(self, images_first: Tensor, images_second: Tensor) -> PointmapPair:
        """Images [B, 3, H, W] in [-1, 1] of both views -> points and confidences."""
        grids = (self.grid_of(*images.shape[-2:]) for images in (images_first, images_second))
        return self.predict(self.decode(self.encode(images_first), self.encode(images_second), *grids))

    def _decoder_rotary(self, grid: Grid) -> RotaryTable:
        return self._rotary(grid, self.config.dec_embed_dim // self.config.dec_num_heads)

    def _rotary(self, grid: Grid, head_dim: int) -> RotaryTable:
        return _rotary_table(grid, head_dim, self.config.rope_base, self.device)


def seeing_pairs(network: Backbone) -> Dust3r:
    """The network itself; InputError for one that sees more than pairs, where pairs are measured."""
    if not isinstance(network, Dust3r):
        raise InputError(
            f"The weights are {network.kind}'s, which sees all frames at once; expected a network that sees pairs, "
            "such as DUSt3R."
        )
    return network


@lru_cache(maxsize=8)
def _rotary_table(grid: Grid, head_dim: int, base: float, device: torch.device) -> RotaryTable:
    with torch.inference_mode(False):  # the table outlives this call and may take part in training later
        return RotaryTable(grid, head_dim, base, device)
