"""VGGT's track head: where points of the first frame are in all others (arXiv 2503.11651), with the public names.

Shapes: S frames, n tracks, L channels of a track's feature.  Pixel (0, 0) is the centre of the top-left pixel; the
tracker works on maps of half the image's size, at half its coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easi3r.backbones.layers import Mlp
from easi3r.backbones.vggt_heads import DptConfig, DptHead
from easi3r.backbones.vggt_layers import EPS, TwoLayers

HEADS = 8
LEVELS = 7
RADIUS = 4
ITERATIONS = 4
FLOW_UNIT_PX = 518  # flow is told to the transformer in this unit too, whatever the image's size
TRACKS_AT_ONCE = 64  # whose neighbourhoods are sampled together: 3 MB of features per frame


@dataclass(frozen=True)
class TrackerConfig:
    """Widths and depths of the track head; defaults are the public model's."""

    dpt: DptConfig = field(default_factory=partial(DptConfig, features=128, hidden=128, outputs=None))  # hidden is L
    hidden: int = 384
    depth: int = 6  # time blocks, and as many rounds of space blocks
    correlation_hidden: int = 384
    num_virtual: int = 64


@dataclass(frozen=True)
class Tracks:
    """Tracks of n query points through S frames, float32."""

    coordinates: Tensor  # [4, S, n, 2] (x, y) in pixels of the network images, after each iteration
    visibility: Tensor  # [S, n] in [0, 1]
    confidence: Tensor  # [S, n] in [0, 1]


class TrackBlock(nn.Module):
    """Attention to x itself or to a context, and an MLP; the skip connections carry what is normalised."""

    def __init__(self, dim: int, *, crossing: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        if crossing:
            self.norm_context = nn.LayerNorm(dim, eps=EPS)
            self.cross_attn = attention
        else:
            self.attn = attention
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, N, C]; context [B, M, C]."""
        x = self.norm1(x)
        if context is None:
            x = x + self.attn(x, x, x, need_weights=False)[0]
        else:
            context = self.norm_context(context)
            x = x + self.cross_attn(x, context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class UpdateFormer(nn.Module):
    """Attends along time for each track and, through a few virtual tracks, between the tracks of each frame."""

    def __init__(self, inputs: int, outputs: int, config: TrackerConfig) -> None:
        super().__init__()
        dim = config.hidden
        self.input_norm = nn.LayerNorm(inputs, eps=EPS)
        self.input_transform = nn.Linear(inputs, dim)
        self.virual_tracks = nn.Parameter(torch.zeros(1, config.num_virtual, 1, dim))  # so spelt in the files
        for name, crossing in (
            ("time_blocks", False),
            ("space_virtual_blocks", False),
            ("space_point2virtual_blocks", True),
            ("space_virtual2point_blocks", True),
        ):
            self.add_module(name, nn.ModuleList(TrackBlock(dim, crossing=crossing) for _ in range(config.depth)))
        self.output_norm = nn.LayerNorm(dim, eps=EPS)
        self.flow_head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[n, S, inputs] -> [n, S, outputs]."""
        tokens = self.input_transform(self.input_norm(x))
        num_tracks, num_frames = tokens.shape[:2]
        x = torch.cat([tokens, self.virual_tracks[0].expand(-1, num_frames, -1)])
        rounds = zip(
            self.get_submodule("time_blocks").children(),
            self.get_submodule("space_virtual2point_blocks").children(),
            self.get_submodule("space_virtual_blocks").children(),
            self.get_submodule("space_point2virtual_blocks").children(),
            strict=True,
        )
        for along_time, gather, among_virtual, spread in rounds:
            points, virtual = along_time(x).transpose(0, 1).tensor_split([num_tracks], dim=1)
            virtual = among_virtual(gather(virtual, points))
            x = torch.cat([spread(points, virtual), virtual], dim=1).transpose(0, 1)
        return self.flow_head(self.output_norm(x[:num_tracks] + tokens))  # type: ignore[no-any-return]


class Tracker(nn.Module):
    """Moves points until the features around them agree with those where they started."""

    def __init__(self, config: TrackerConfig) -> None:
        super().__init__()
        self.latent = latent = config.dpt.hidden
        inputs = 3 * latent + 4
        self.fmap_norm = nn.LayerNorm(latent, eps=EPS)
        self.corr_mlp = TwoLayers(LEVELS * (2 * RADIUS + 1) ** 2, config.correlation_hidden, latent)
        self.query_ref_token = nn.Parameter(torch.zeros(1, 2, inputs))
        self.updateformer = UpdateFormer(inputs, 2 + latent, config)
        self.ffeat_norm = nn.GroupNorm(1, latent, eps=EPS)
        self.ffeat_updater = nn.Sequential(nn.Linear(latent, latent), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(latent, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(latent, 1))

    def forward(self, features: Tensor, queries: Tensor) -> Tracks:
        """Maps [S, L, h, w] and query points [n, 2] (x, y) of frame 0, in pixels of the images twice as large."""
        maps = self.fmap_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pyramid = [maps]
        for _ in range(1, LEVELS):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        num_frames, start = len(maps), queries / 2
        coordinates = start.expand(num_frames, -1, -1)
        track = sample(maps[:1], start[None, None], "border")[0, :, 0].T.expand(num_frames, -1, -1)  # [S, n, L]
        fixed = self._fixed_code(start, maps.shape[-2:], num_frames)
        results = []
        for _ in range(ITERATIONS):
            flow = coordinates - start
            parts = [flow_code(flow, self.latent), self._correlate(pyramid, coordinates, track), track]
            x = torch.cat(parts, dim=-1) + fixed
            change = self.updateformer(x.transpose(0, 1)).transpose(0, 1)
            moved = coordinates + change[..., :2]
            coordinates = torch.cat([start[None], moved[1:]])
            news = self.ffeat_norm(change[..., 2:].flatten(0, 1)).view_as(track)
            track = track + self.ffeat_updater(news)
            results.append(2 * coordinates)
        visibility, confidence = (layer(track)[..., 0].sigmoid() for layer in (self.vis_predictor, self.conf_predictor))
        return Tracks(torch.stack(results), visibility, confidence)

    def _fixed_code(self, start: Tensor, size: tuple[int, int], num_frames: int) -> Tensor:
        """[S, n, 3 L + 4]: where a track starts, and whether this is the frame where it starts."""
        code = place_code(start, size, 3 * self.latent + 4)
        first, others = self.query_ref_token[0]
        return code + torch.stack([first] + [others] * (num_frames - 1))[:, None]

    def _correlate(self, pyramid: list[Tensor], coordinates: Tensor, track: Tensor) -> Tensor:
        """[S, n, L]: how well each track's feature agrees with the maps around its place, at all levels.

        Correlation is linear in the map, so that the maps are sampled first and no correlation image is formed.
        """
        steps = torch.arange(-RADIUS, RADIUS + 1, dtype=coordinates.dtype, device=coordinates.device)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).flatten(0, 1)  # x slow, y fast
        parts = zip(coordinates.split(TRACKS_AT_ONCE, dim=1), track.split(TRACKS_AT_ONCE, dim=1), strict=True)
        correlations = []
        for places, feature in parts:
            levels = []
            for level, maps in enumerate(pyramid):
                around = sample(maps, places[:, :, None] / 2**level + offsets, "zeros")  # [S, L, n, 81]
                levels.append(torch.einsum("snl,slnk->snk", feature, around) / self.latent**0.5)
            correlations.append(self.corr_mlp(torch.cat(levels, dim=-1)))
        return torch.cat(correlations, dim=1)


class TrackHead(nn.Module):
    """Features of all frames, and the tracker that reads them."""

    def __init__(self, dim: int, config: TrackerConfig) -> None:
        super().__init__()
        self.feature_extractor = DptHead(dim, config.dpt)
        self.tracker = Tracker(config)


def sample(maps: Tensor, places: Tensor, padding: str) -> Tensor:
    """Maps [B, C, h, w] at ``places`` [B, a, b, 2] (x, y), 0 = the first pixel's centre -> [B, C, a, b]."""
    height, width = maps.shape[-2:]
    last = torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=places.dtype, device=places.device)
    return F.grid_sample(maps, places * (2 / last) - 1, padding_mode=padding, align_corners=True)


def flow_code(flow: Tensor, latent: int) -> Tensor:
    """[..., 2] px -> [..., L + 4]: sines (even places) and cosines (odd) of x, of y; then the flow itself twice."""
    half = latent // 2
    speeds = torch.arange(0, half, 2, dtype=torch.float32, device=flow.device) * (1000 / half)
    angles = flow[..., None] * speeds  # [..., 2, L / 4]
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
    return torch.cat([waves, flow / FLOW_UNIT_PX, flow / FLOW_UNIT_PX], dim=-1)


def place_code(places: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """[n, 2] (x, y) -> [n, channels]: a table of sines and cosines over a map of ``size``, sampled between pixels."""
    quarter = channels // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=places.device) / quarter)
    codes = []
    for along, count in zip(places.double().unbind(-1), (size[1], size[0]), strict=True):
        along = along.clamp(0, count - 1)[:, None]
        below = along.floor()
        at_below, at_above = (
            torch.cat([(at * frequencies).sin(), (at * frequencies).cos()], dim=-1) for at in (below, below + 1)
        )
        codes.append(torch.lerp(at_below, at_above, along - below))
    return torch.cat(codes, dim=-1).to(places.dtype)
