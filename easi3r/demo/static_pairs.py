"""Training and test material: static worlds seen from a few places along a walk, with the truth about every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from easi3r.demo.rendering import observe
from easi3r.demo.worlds import Family, make_worlds, transform
from easi3r.geometry import pixel_grid

HELD_OUT_SEED = 1 << 40  # seeds from here on are never trained on; clips use small ones, training those between
BASELINES = (0.05, 0.30)  # of the median depth: the held-out pairs


@dataclass(frozen=True)
class StaticViews:
    """n views of each of W static worlds; float32, lengths in metres."""

    images: Tensor  # [W, n, 3, H, W] RGB in [-1, 1], as the network takes them
    points: Tensor  # [W, n, H, W, 3] in the view's own camera frame
    camera_to_world: Tensor  # [W, n, 4, 4]
    focal_px: Tensor  # [W]

    def relative_pose(self, first: int | Tensor, second: int | Tensor) -> Tensor:
        """[W, ..., 4, 4] poses of the views ``second`` in the camera frames of the views ``first``."""
        first_from_world: Tensor = torch.linalg.inv(self.camera_to_world[:, first])
        return first_from_world @ self.camera_to_world[:, second]

    def points_in(self, first: int | Tensor, second: int | Tensor) -> Tensor:
        """[W, ..., H, W, 3] points of the views ``second`` in the camera frames of the views ``first``."""
        return transform(self.relative_pose(first, second)[..., None, None, :, :], self.points[:, second])

    def correspondence(self, patch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where each view sees the tokens of each other view.

        Returns [N, 2] pixels of the tokens' centres; [W, n, n, N, 2] pixels of the tokens of view i in view j; and
        [W, n, n, N] bool, True where view j shows that spot: inside the image and not hidden.
        """
        height, width = self.points.shape[2:4]
        count, centres = self.points.shape[1], token_centres(height, width, patch).to(self.points)
        middle = torch.tensor([(width - 1) / 2, (height - 1) / 2]).to(self.points)
        # the four pixels around the centre of each patch
        inner = self.points.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))
        core = slice(patch // 2 - 1, patch // 2 + 1)
        spots = inner[:, :, :, core][:, :, :, :, :, core].mean((3, 5)).flatten(2, 3)  # [W, n, N, 3]
        view = torch.arange(count)
        there = transform(self.relative_pose(view[None], view[:, None])[:, :, :, None], spots[:, :, None])
        depth = there[..., 2].clamp(min=1e-3)
        place = there[..., :2] / depth[..., None] * self.focal_px[:, None, None, None, None] + middle
        column, row = place.round().long().unbind(-1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        surface = self.points[..., 2].flatten(2)[:, None].expand(-1, count, -1, -1).gather(3, index)
        return centres, place, inside & ((surface / depth - 1).abs() < 0.05)

    def to(self, device: torch.device) -> StaticViews:
        return StaticViews(*(value.to(device) for value in vars(self).values()))


def static_views(
    seeds: Sequence[int], family: Family, times: Sequence[float], size: tuple[int, int], device: torch.device | str
) -> StaticViews:
    """Render the worlds of ``seeds`` without movers, seen at ``times`` in [0, 1]; ``size`` is (width, height)."""
    still = replace(family, num_movers=0, num_static=family.num_movers + family.num_static)
    world = make_worlds(seeds, still, times=torch.tensor(times, dtype=torch.float64)).to(device, torch.float32)
    at_once = 1 << 14 if torch.device(device).type == "cpu" else 1 << 22
    views = observe(world, *size, rays_at_once=at_once)
    focal = views.intrinsics[:, 0, 0]
    pixels = centred_pixels(size[1], size[0]).to(focal)
    depth = views.depth[..., None]
    points = torch.cat([pixels / focal[:, None, None, None, None] * depth, depth], dim=-1)
    return StaticViews(views.images.permute(0, 1, 4, 2, 3) * 2 - 1, points, world.camera_to_world, focal)


def centred_pixels(height: int, width: int) -> Tensor:
    """[H, W, 2] float32 (x, y) from the middle of the image."""
    return torch.from_numpy(pixel_grid(height, width)) - torch.tensor([(width - 1) / 2, (height - 1) / 2])


def token_centres(height: int, width: int, patch: int) -> Tensor:
    """[N, 2] float32 pixel coordinates (x, y) of the middles of an image's patches, row by row."""
    return torch.from_numpy(pixel_grid(height // patch, width // patch)).flatten(0, 1) * patch + (patch - 1) / 2


def held_out_pairs(family: Family, count: int, size: tuple[int, int], first_seed: int = HELD_OUT_SEED) -> StaticViews:
    """``count`` pairs, the two ends of unseen walks, those whose baseline is 5 to 30 % of view 1's median depth.

    Consecutive seeds from ``first_seed`` on; the few whose walk is shorter or longer are passed over.
    """
    kept: list[StaticViews] = []
    seed, found = first_seed, 0
    while found < count:
        views = static_views(range(seed, seed + 32), family, (0.0, 1.0), size, "cpu")
        baseline = views.relative_pose(0, 1)[:, :3, 3].square().sum(-1).sqrt()
        ratio = baseline / views.points[:, 0, ..., 2].flatten(1).median(dim=1).values
        fits = (ratio > BASELINES[0]) & (ratio < BASELINES[1])
        kept.append(StaticViews(*(value[fits] for value in vars(views).values())))
        seed, found = seed + 32, found + int(fits.sum())
    columns = zip(*(vars(views).values() for views in kept), strict=True)
    return StaticViews(*(torch.cat(column)[:count] for column in columns))
