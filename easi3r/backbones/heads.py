"""From decoder tokens to pointmaps and confidences: the linear head and the DPT head (arXiv 2103.13413)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CHANNELS = 4  # x, y, z, confidence


def points_and_confidence(raw: Tensor, conf_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """[B, 4, H, W] -> points [B, H, W, 3] and confidence [B, H, W], both float32 (DUSt3R section 3.2).

    ``xyz -> xyz / |xyz| * expm1(|xyz|)``; ``confidence = low + exp(c)``, at most high.
    """
    raw = raw.float().permute(0, 2, 3, 1)
    xyz, c = raw[..., :3], raw[..., 3]
    length = xyz.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    low, high = conf_range
    return xyz / length * torch.expm1(length), low + c.exp().clamp(max=high - low)


def unrounded(x: Tensor) -> torch.autocast:
    """A context for a head's last layer, in which nothing is computed in low precision."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


class LinearHead(nn.Module):
    """One linear layer per token, its patch unfolded by pixel shuffle; reads the last tokens alone."""

    last_layer = "proj"

    def __init__(self, dec_depth: int, enc_dim: int, dec_dim: int, patch_size: int) -> None:
        super().__init__()
        self.layers_read = (dec_depth,)
        self.patch_size = patch_size
        self.proj = nn.Linear(dec_dim, NUM_CHANNELS * patch_size**2)

    def forward(self, tokens: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens of ``layers_read``, each [B, h * w, C] -> [B, 4, H, W]."""
        with unrounded(tokens[0]):
            patches = self.proj(tokens[0].to(self.proj.weight.dtype)).transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(patches, self.patch_size)


class ResidualConvUnit(nn.Module):
    """Two convolutions around a skip connection, same shape in and out."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # type: ignore[no-any-return]


class FusionBlock(nn.Module):
    """Add a finer level to a coarser one, then double the resolution."""

    def __init__(self, features: int, *, with_skip: bool) -> None:
        super().__init__()
        if with_skip:
            self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)  # type: ignore[no-any-return]


class DptScratch(nn.Module):
    """Brings four levels to one width and fuses them from coarse to fine."""

    def __init__(self, level_dims: tuple[int, ...], features: int) -> None:
        super().__init__()
        for level, dim in enumerate(level_dims, start=1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(dim, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", FusionBlock(features, with_skip=level < len(level_dims)))

    def forward(self, levels: list[Tensor]) -> Tensor:
        path: Tensor | None = None
        for level in (4, 3, 2, 1):
            skip = self.get_submodule(f"layer{level}_rn")(levels[level - 1])
            fuse = self.get_submodule(f"refinenet{level}")
            # an odd grid is rounded up on the way down, so the coarsest level comes back one too large
            path = fuse(skip) if path is None else fuse(path[..., : skip.shape[-2], : skip.shape[-1]], skip)
        return cast(Tensor, path)


class Dpt(nn.Module):
    """Four levels of tokens as maps at 4x, 2x, 1x and 1/2 of the token grid, fused from coarse to fine."""

    LEVEL_DIMS = (96, 192, 384, 768)
    FEATURES = 256

    def __init__(self, level_inputs: tuple[int, ...]) -> None:
        super().__init__()
        a, b, _, d = self.LEVEL_DIMS
        to_a, to_b, to_c, to_d = (
            nn.Conv2d(dim, out, 1) for dim, out in zip(level_inputs, self.LEVEL_DIMS, strict=True)
        )
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(to_a, nn.ConvTranspose2d(a, a, 4, stride=4)),
                nn.Sequential(to_b, nn.ConvTranspose2d(b, b, 2, stride=2)),
                nn.Sequential(to_c),
                nn.Sequential(to_d, nn.Conv2d(d, d, 3, stride=2, padding=1)),
            ]
        )
        self.scratch = DptScratch(self.LEVEL_DIMS, self.FEATURES)
        half = self.FEATURES // 2
        self.head = nn.Sequential(
            nn.Conv2d(self.FEATURES, half, 3, padding=1),
            nn.Identity(),  # the place of the upsampling, which depends on the patch size
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, NUM_CHANNELS, 1),
        )

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        fused = self.scratch([process(m) for process, m in zip(self.act_postprocess, maps, strict=True)])
        x = F.interpolate(self.head[0](fused), size=size, mode="bilinear", align_corners=True)
        x = self.head[2:4](x)
        with unrounded(x):
            return self.head[4](x.to(self.head[4].weight.dtype))  # type: ignore[no-any-return]


class DptHead(nn.Module):
    """Reads the encoder's output and three decoder layers."""

    last_layer = "dpt.head.4"

    def __init__(self, dec_depth: int, enc_dim: int, dec_dim: int, patch_size: int) -> None:
        super().__init__()
        self.layers_read = (0, dec_depth * 2 // 4, dec_depth * 3 // 4, dec_depth)
        self.patch_size = patch_size
        self.dpt = Dpt((enc_dim, dec_dim, dec_dim, dec_dim))

    def forward(self, tokens: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens of ``layers_read``, each [B, h * w, C] -> [B, 4, H, W]."""
        maps = [t.transpose(1, 2).unflatten(2, grid) for t in tokens]
        return cast(Tensor, self.dpt(maps, (grid[0] * self.patch_size, grid[1] * self.patch_size)))


HEADS: dict[str, type[LinearHead] | type[DptHead]] = {"linear": LinearHead, "dpt": DptHead}
