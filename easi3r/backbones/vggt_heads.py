"""VGGT's camera head and its DPT heads (arXiv 2503.11651, 2103.13413), with the public tensor names.

Shapes: S frames, B frames that go through together, C channels of a token (the aggregator's twice over).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easi3r.backbones.vggt_layers import EPS, Block, TwoLayers

NUM_POSE = 9  # translation, quaternion with its scalar last, field of view of the height and of the width
POSE_ITERATIONS = 4
POSITION_SCALE = 0.1
POSITION_BASE = 100.0


class CameraHead(nn.Module):
    """Cameras from one token per frame, refined four times over."""

    def __init__(self, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim, eps=EPS)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, NUM_POSE))
        self.embed_pose = nn.Linear(NUM_POSE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.trunk_norm = nn.LayerNorm(dim, eps=EPS)
        self.pose_branch = TwoLayers(dim, dim // 2, NUM_POSE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Camera tokens [S, C] -> pose encodings [4, S, 9] of all iterations; the last is the result."""
        tokens = self.token_norm(tokens)[None]
        still = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        pose, results = self.empty_pose_tokens.expand(1, tokens.shape[1], -1), []
        for iteration in range(POSE_ITERATIONS):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, dim=-1)
            x = tokens + gate * (still * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            change = self.pose_branch(self.trunk_norm(x))
            pose = pose + change if iteration else change
            results.append(torch.cat([pose[0, :, :7], F.relu(pose[0, :, 7:])], dim=-1))
        return torch.stack(results)


def add_position(x: Tensor, aspect: float) -> Tensor:
    """Add to maps [B, D, h, w] a code of where their pixels lie in an image of ``aspect`` = width / height."""
    channels, height, width = x.shape[1:]
    diagonal = math.hypot(aspect, 1)
    frequencies = POSITION_BASE ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))

    def code(count: int, side: float) -> Tensor:
        """[D / 2, count], computed in double."""
        span = side / diagonal * (count - 1) / count
        angles = torch.outer(frequencies, torch.linspace(-span, span, count, dtype=torch.float64))
        return (POSITION_SCALE * torch.cat([angles.sin(), angles.cos()])).to(x)

    by_column, by_row = code(width, aspect)[:, None], code(height, 1.0)[:, :, None]
    half = channels // 2
    return torch.cat([x[:, :half] + by_column, x[:, half:] + by_row], dim=1)


class ResidualUnit(nn.Module):
    """Two convolutions around a skip connection that carries relu(x), unlike DUSt3R's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """Add a finer level to a coarser one, then resize."""

    def __init__(self, features: int, *, with_skip: bool) -> None:
        super().__init__()
        if with_skip:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        # a 1 x 1 convolution and a bilinear resize may change places; before it has a quarter of the pixels
        return F.interpolate(self.out_conv(self.resConfUnit2(x)), size=size, mode="bilinear", align_corners=True)


@dataclass(frozen=True)
class DptConfig:
    """Widths of a DPT head.  ``outputs`` is None for the tracker's, which gives features and knows no positions."""

    channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    features: int = 256
    hidden: int = 128  # after output_conv1
    outputs: int | None = 2  # 2: depth and confidence; 4: points and confidence


class DptScratch(nn.Module):
    """Brings four levels to one width, fuses them from coarse to fine, and narrows the result."""

    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        for level, channels in enumerate(config.channels, start=1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(channels, config.features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", Fusion(config.features, with_skip=level < 4))
        self.output_conv1 = nn.Conv2d(config.features, config.hidden, 3, padding=1)
        if config.outputs is not None:
            self.output_conv2 = nn.Sequential(
                nn.Conv2d(config.hidden, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, config.outputs, 1)
            )

    def fuse(self, levels: list[Tensor]) -> Tensor:
        """Four maps from fine to coarse -> [B, hidden, h, w] at twice the finest size."""
        skips = [self.get_submodule(f"layer{i}_rn")(level) for i, level in enumerate(levels, start=1)]
        finest = skips[0].shape[-2:]
        sizes = [(2 * finest[0], 2 * finest[1]), *(skip.shape[-2:] for skip in skips[:3])]
        x = self.get_submodule("refinenet4")(skips[3], None, sizes[3])
        for level in (3, 2, 1):
            x = self.get_submodule(f"refinenet{level}")(x, skips[level - 1], sizes[level - 1])
        return self.output_conv1(x)  # type: ignore[no-any-return]


class DptHead(nn.Module):
    """Four read-outs as maps at 4x, 2x, 1x and 1/2 of the token grid, fused from coarse to fine."""

    def __init__(self, dim: int, config: DptConfig) -> None:
        super().__init__()
        self.config = config
        a, b, _, d = config.channels
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in config.channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(a, a, 4, stride=4),
                nn.ConvTranspose2d(b, b, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(d, d, 3, stride=2, padding=1),
            ]
        )
        self.scratch = DptScratch(config)

    def forward(self, tokens: list[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Patch tokens of four read-outs, each [B, h * w, C], of images of ``size`` (height, width).

        Returns raw outputs [B, outputs, H, W], or features [B, hidden, H // 2, W // 2] for the tracker.
        """
        positions = self.config.outputs is not None
        aspect = size[1] / size[0]
        levels = []
        for level, project, resize in zip(tokens, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(level).transpose(1, 2).unflatten(2, grid))
            levels.append(resize(add_position(x, aspect) if positions else x))
        x = self.scratch.fuse(levels)
        size = size if positions else (size[0] // 2, size[1] // 2)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return self.scratch.output_conv2(add_position(x, aspect)) if positions else x


def depth_and_confidence(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2, H, W] -> z-depth [B, H, W] > 0 and confidence [B, H, W] >= 1."""
    return raw[:, 0].exp(), 1 + raw[:, 1].exp()


def points_and_confidence(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 4, H, W] -> points [B, H, W, 3] in the world's frame and confidence [B, H, W] >= 1."""
    xyz = raw[:, :3].permute(0, 2, 3, 1)
    return xyz.sign() * xyz.abs().expm1(), 1 + raw[:, 3].exp()
