"""Clips of random worlds: ray-cast images with exact depth, cameras, object ids and optical flow.

Image coordinates are pixels with the centre of the top-left pixel at (0, 0): u = fx X/Z + cx.

>>> clip = render(make_world(seed=0))
>>> flow, visible = clip.flow(0, 3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, pad

from easi3r.demo.worlds import NUM_WALLS, World, transform

Array = NDArray[Any]


@dataclass(frozen=True)
class Clip:
    """A rendered world: n frames of H x W pixels and the truth about them."""

    images: Array  # [n, H, W, 3] uint8 RGB
    depth: Array  # [n, H, W] float32 z-depth at the pixel centres, metres
    camera_to_world: Array  # [n, 4, 4] float64
    intrinsics: Array  # [n, 3, 3] float64 pixels, the same for all frames
    object_ids: Array  # [n, H, W] int64, 0 = room
    dynamic_mask: Array  # [n, H, W] bool, True = belongs to an object that moves; all False in a frozen twin
    mover_mask: Array  # [n, H, W] bool, the same, but True in a frozen twin as well
    object_to_world: Array  # [n, S, 4, 4] float64
    world: World

    def points(self, frame: int) -> Array:
        """[H, W, 3] float64 points of ``frame`` in its own camera frame, metres."""
        rays = _rays(_pixel_grid(*self.depth.shape[1:]), torch.from_numpy(self.intrinsics[frame]))
        return np.asarray(rays.numpy() * self.depth[frame, ..., None])

    def flow(self, i: int, j: int, *, camera_only: bool = False) -> tuple[Array, Array]:
        """Exact optical flow: what frame i shows at pixel (x, y) is at (x, y) + flow in frame j.

        Returns [H, W, 2] float32 pixels and [H, W] bool, True where frame j shows that point too: inside the image
        and not hidden. With ``camera_only`` the objects have stood still since frame i.
        """
        height, width = self.depth.shape[1:]
        cameras, intrinsics = torch.from_numpy(self.camera_to_world), torch.from_numpy(self.intrinsics[j])
        before = torch.from_numpy(self.object_to_world[i])
        after = before if camera_only else torch.from_numpy(self.object_to_world[j])
        ids = torch.from_numpy(self.object_ids[i])
        i_to_j = torch.linalg.inv(cameras[j]) @ after @ torch.linalg.inv(before) @ cameras[i]  # [S, 4, 4]
        points = transform(i_to_j[ids], torch.from_numpy(self.points(i)))
        pixels = points[..., :2] / points[..., 2:] * intrinsics.diagonal()[:2] + intrinsics[:2, 2]

        hit = trace(self.world.to("cpu", torch.float64), cameras[j], after, _rays(pixels, intrinsics).reshape(-1, 3))
        depth, surface = hit.depth.reshape(height, width), hit.surface.reshape(height, width)
        seen = (surface == ids) & ((depth - points[..., 2]).abs() < 1e-3 * depth)
        last = torch.tensor([width - 1, height - 1])
        seen &= ((pixels > -1e-3) & (pixels < last + 1e-3)).all(-1)
        return (pixels - _pixel_grid(height, width)).float().numpy(), seen.numpy()


@dataclass(frozen=True)
class Hit:
    """Where P rays meet the world first."""

    depth: Tensor  # [P] z-depth, metres
    surface: Tensor  # [P] int64, 0 = room
    texture: Tensor  # [P] int64, row of World.texture
    points: Tensor  # [P, 3] object coordinates, metres
    normal: Tensor  # [P, 3] object coordinates, unit length, towards the camera's side


def trace(world: World, camera_to_world: Tensor, object_to_world: Tensor, rays: Tensor) -> Hit:
    """First hits of ``rays`` [P, 3] (camera frame, z = 1) from one camera [4, 4], surfaces posed by [S, 4, 4]."""
    object_from_camera = torch.linalg.inv(object_to_world) @ camera_to_world
    # In units of its half extents every box is [-1, 1]^3 and every ellipsoid the unit sphere. Rays come last: faster.
    size = world.half_extents[:, :, None]
    origin = object_from_camera[:, :3, 3:] / size  # [S, 3, 1]
    direction = object_from_camera[:, :3, :3] / size @ rays.T  # [S, 3, P]

    a, b, c = direction.square().sum(1), (origin * direction).sum(1), origin.square().sum(1) - 1
    discriminant = b.square() - a * c
    sphere = torch.where(discriminant > 0, (-b - discriminant.clamp(min=0).sqrt()) / a, torch.inf)

    inverse = 1 / torch.where(direction.abs() < 1e-12, 1e-12, direction)
    middle, half = -origin * inverse, inverse.abs()
    entry, leave = (middle - half).amax(1), (middle + half).amin(1)
    box = torch.where(entry < leave, entry, torch.inf)

    distance = torch.where(world.is_ellipsoid[:, None], sphere, box)
    distance[0] = leave[0]  # the camera is inside the room
    depth, surface = torch.where(distance > 0, distance, torch.inf).min(0)

    unit = origin[surface, :, 0] + depth[:, None] * direction[surface, :, torch.arange(len(rays), device=rays.device)]
    axis = unit.abs().argmax(-1, keepdim=True)
    side = unit.gather(-1, axis).sign()
    face = torch.zeros_like(unit).scatter(-1, axis, torch.where(surface[:, None] == 0, -side, side))
    normal = torch.where(world.is_ellipsoid[surface, None], unit / world.half_extents[surface], face)
    wall = (2 * axis + (side > 0)).squeeze(-1)
    texture = torch.where(surface == 0, wall, surface + NUM_WALLS - 1)
    return Hit(depth, surface, texture, unit * world.half_extents[surface], normalize(normal, dim=-1))


def shade(world: World, hit: Hit, object_to_world: Tensor, focal_px: float) -> Tensor:
    """[P, 3] RGB in [0, 1] of what was hit: texture times Lambert's law, half of the light being ambient."""
    pose = object_to_world[hit.surface]
    normal = (pose[:, :3, :3] @ hit.normal[:, :, None])[:, :, 0]
    to_light = normalize(world.light - transform(pose, hit.points), dim=-1)
    lambert = (normal * to_light).sum(-1, keepdim=True).clamp(min=0)
    return world.texture.colour(hit.texture, hit.points, hit.depth / focal_px) * (0.5 + 0.5 * lambert)


def render(world: World, width: int = 128, height: int = 96, *, frozen: bool = False, supersample: int = 2) -> Clip:
    """Render every frame; depth and ids at the pixel centres, colour from ``supersample``^2 rays per pixel in float32.

    ``frozen`` renders the twin without motion: the same cameras, the movers held where they are at half time.
    """
    poses = world.middle_to_world.expand_as(world.object_to_world) if frozen else world.object_to_world
    focal = width / 2 / math.tan(math.radians(world.fov_deg) / 2)
    matrix = [[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]
    intrinsics = torch.tensor(matrix, dtype=torch.float64)
    rays = _rays(_pixel_grid(height, width), intrinsics).reshape(-1, 3).to(world.light)
    quick = world.to(world.light.device, torch.float32)
    steps = (torch.arange(supersample) + 0.5) / supersample - 0.5
    samples = _pixel_grid(height, width) + torch.cartesian_prod(steps, steps)[:, None, None]  # [supersample^2, H, W, 2]
    quick_rays = _rays(samples, intrinsics).flatten(1, 2).to(quick.light)

    images, hits = [], []
    for camera, pose in zip(world.camera_to_world, poses, strict=True):
        hits.append(trace(world, camera, pose, rays))
        camera, pose = camera.float(), pose.float()
        colours = [shade(quick, trace(quick, camera, pose, some), pose, focal) for some in quick_rays]
        images.append(torch.stack(colours).mean(0).reshape(height, width, 3))
    depth = torch.stack([hit.depth for hit in hits]).reshape(-1, height, width)
    ids = torch.stack([hit.surface for hit in hits]).reshape(-1, height, width)
    movers = world.moves[ids].cpu().numpy()
    return Clip(
        images=(torch.stack(images) * 255).round().to(torch.uint8).cpu().numpy(),
        depth=depth.float().cpu().numpy(),
        camera_to_world=np.array(world.camera_to_world.double().cpu().numpy()),
        intrinsics=np.tile(intrinsics.numpy(), (len(images), 1, 1)),
        object_ids=ids.cpu().numpy(),
        dynamic_mask=movers & (not frozen),
        mover_mask=movers,
        object_to_world=np.array(poses.double().cpu().numpy()),
        world=world,
    )


def _pixel_grid(height: int, width: int) -> Tensor:
    """[H, W, 2] float64 coordinates (x, y) of the pixel centres."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).double()


def _rays(pixels: Tensor, intrinsics: Tensor) -> Tensor:
    """[..., 3] camera-frame directions through ``pixels`` [..., 2] with z = 1: distance along them is z-depth."""
    return pad((pixels - intrinsics[:2, 2]) / intrinsics.diagonal()[:2], (0, 1), value=1.0)
