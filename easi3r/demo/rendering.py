"""Clips of random worlds: ray-cast images with exact depth, cameras, object ids and optical flow.

Image coordinates are pixels with the centre of the top-left pixel at (0, 0): u = fx X/Z + cx.

>>> clip = render(make_world(seed=0))
>>> flow, visible = clip.flow(0, 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

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

        rays = _rays(pixels, intrinsics).reshape(1, -1, 3).mT
        hit = trace(self.world.to("cpu", torch.float64), torch.tensor([0]), cameras[None, j], after[None], rays)
        depth, surface = hit.depth.reshape(height, width), hit.surface.reshape(height, width)
        seen = (surface == ids) & ((depth - points[..., 2]).abs() < 1e-3 * depth)
        last = torch.tensor([width - 1, height - 1])
        seen &= ((pixels > -1e-3) & (pixels < last + 1e-3)).all(-1)
        return (pixels - _pixel_grid(height, width)).float().numpy(), seen.numpy()


@dataclass(frozen=True)
class Views:
    """What the cameras of W worlds see in n frames each; tensors on the worlds' device."""

    images: Tensor  # [W, n, H, W, 3] float32 RGB in [0, 1]
    depth: Tensor  # [W, n, H, W] z-depth at the pixel centres, metres
    surface: Tensor  # [W, n, H, W] int64, 0 = room
    intrinsics: Tensor  # [W, 3, 3] pixels


@dataclass(frozen=True)
class Hit:
    """Where the P rays of V views meet the world first."""

    depth: Tensor  # [V, P] z-depth, metres
    surface: Tensor  # [V, P] int64, 0 = room
    texture: Tensor  # [V, P] int64, which of the world's textures
    points: Tensor  # [V, 3, P] object coordinates, metres
    normal: Tensor  # [V, 3, P] object coordinates, unit length, towards the camera's side


def trace(world: World, which: Tensor, camera_to_world: Tensor, object_to_world: Tensor, rays: Tensor) -> Hit:
    """First hits of ``rays`` [V, 3, P] (camera frame, z = 1) in V views.

    which: [V] the world of each view.  camera_to_world: [V, 4, 4].  object_to_world: [V, S, 4, 4].
    """
    object_from_camera = torch.linalg.inv(object_to_world) @ camera_to_world[:, None]
    half_extents, ellipsoid = world.half_extents[which], world.is_ellipsoid[which]
    # In units of its half extents every box is [-1, 1]^3 and every ellipsoid the unit sphere.
    size = half_extents[..., None]
    origin = object_from_camera[..., :3, 3:] / size  # [V, S, 3, 1]
    direction = object_from_camera[..., :3, :3] / size @ rays[:, None]  # [V, S, 3, P]

    a, b, c = direction.square().sum(2), (origin * direction).sum(2), origin.square().sum(2) - 1
    discriminant = b.square() - a * c
    sphere = torch.where(discriminant > 0, (-b - discriminant.clamp(min=0).sqrt()) / a, torch.inf)

    inverse = 1 / torch.where(direction.abs() < 1e-12, 1e-12, direction)
    middle, half = -origin * inverse, inverse.abs()
    entry, leave = (middle - half).amax(2), (middle + half).amin(2)
    box = torch.where(entry < leave, entry, torch.inf)

    distance = torch.where(ellipsoid[..., None], sphere, box)
    distance[:, 0] = leave[:, 0]  # the camera is inside the room
    depth, surface = torch.where(distance > 0, distance, torch.inf).min(1)

    chosen = surface[:, None, None].expand(-1, 1, 3, -1)
    view = torch.arange(len(rays), device=rays.device)[:, None]
    size, is_room = half_extents[view, surface].mT, surface[:, None] == 0
    unit = origin[view, surface, :, 0].mT + depth[:, None] * direction.gather(1, chosen)[:, 0]  # [V, 3, P]
    axis = unit.abs().argmax(1, keepdim=True)
    side = unit.gather(1, axis).sign()
    face = torch.zeros_like(unit).scatter(1, axis, torch.where(is_room, -side, side))
    normal = torch.where(ellipsoid[view, surface][:, None], unit / size, face)
    normal = normal / normal.square().sum(1, keepdim=True).sqrt()
    wall = (2 * axis + (side > 0))[:, 0]
    texture = torch.where(surface == 0, wall, surface + NUM_WALLS - 1)
    return Hit(depth, surface, texture, unit * size, normal)


def shade(world: World, which: Tensor, hit: Hit, object_to_world: Tensor, focal_px: Tensor) -> Tensor:
    """[V, P, 3] RGB in [0, 1] of what was hit: texture times Lambert's law, half of the light being ambient."""
    view = torch.arange(len(which), device=which.device)[:, None]
    points, normal = hit.points.mT, hit.normal.mT
    turn = object_to_world[..., :3, :3]  # into the object's frame goes the lamp: one per object, not one per pixel
    lamp = (turn.mT @ (world.light[which][:, None] - object_to_world[..., :3, 3])[..., None])[..., 0]  # [V, S, 3]
    to_light = lamp[view, hit.surface] - points
    lambert = (normal * to_light).sum(-1, keepdim=True) / to_light.square().sum(-1, keepdim=True).sqrt()
    row = which[:, None] * world.texture.base.shape[1] + hit.texture
    footprint = hit.depth / focal_px[which][:, None]
    colour = world.texture.colour(row.flatten(), points.reshape(-1, 3), footprint.flatten())
    return colour.reshape(points.shape) * (0.5 + 0.5 * lambert.clamp(min=0))


def observe(
    world: World, width: int, height: int, *, frozen: bool = False, supersample: int = 1, rays_at_once: int = 1 << 14
) -> Views:
    """Render every frame of every world, on the device and in the precision of ``world``; colours in float32.

    Depth and surface are exact at the pixel centres, a colour is the mean of ``supersample``^2 rays.  ``frozen``
    holds the movers where they are at half time.  Views are taken together as long as their rays are fewer than
    ``rays_at_once``: a cache's worth on a CPU, many more on a GPU.
    """
    worlds, frames = world.camera_to_world.shape[:2]
    poses = world.middle_to_world[:, None].expand_as(world.object_to_world) if frozen else world.object_to_world
    cameras, poses = world.camera_to_world.flatten(0, 1), poses.flatten(0, 1)
    device = cameras.device
    focal = width / 2 / torch.deg2rad(world.fov_deg / 2).tan()
    grid = _pixel_grid(height, width).to(cameras).reshape(-1, 2).T  # [2, H W]
    centre = torch.tensor([[(width - 1) / 2], [(height - 1) / 2]]).to(cameras)
    steps = (torch.arange(supersample) + 0.5) / supersample - 0.5
    offsets = torch.cartesian_prod(steps, steps).reshape(-1, 2, 1).to(cameras)
    quick = world.to(device, torch.float32)

    images, depths, surfaces = [], [], []
    for views in torch.arange(worlds * frames, device=device).split(max(1, rays_at_once // (width * height))):
        which = views // frames

        def hits(scene: World, offset: Tensor, views: Tensor = views, which: Tensor = which) -> Hit:
            rays = pad((grid + offset - centre) / focal[which][:, None, None], (0, 0, 0, 1), value=1.0)
            dtype = scene.light.dtype
            return trace(scene, which, cameras[views].to(dtype), poses[views].to(dtype), rays.to(dtype))

        hit = hits(world, torch.zeros_like(offsets[0]))
        samples = (
            [hit] if supersample == 1 and world.light.dtype == torch.float32 else [hits(quick, o) for o in offsets]
        )
        colours = [shade(quick, which, sample, poses[views].float(), focal.float()) for sample in samples]
        images.append(torch.stack(colours).mean(0))
        depths.append(hit.depth)
        surfaces.append(hit.surface)
    intrinsics = torch.eye(3).to(cameras).repeat(worlds, 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, :2, 2] = centre[:, 0]
    shape = (worlds, frames, height, width)
    return Views(
        torch.cat(images).reshape(*shape, 3),
        torch.cat(depths).reshape(shape),
        torch.cat(surfaces).reshape(shape),
        intrinsics,
    )


def render(world: World, width: int = 128, height: int = 96, *, frozen: bool = False, supersample: int = 2) -> Clip:
    """The first world as a clip with its truth, geometry in the precision of ``world`` (float64 as made).

    ``frozen`` renders the twin without motion: the same cameras, the movers held where they are at half time.
    """
    views = observe(world, width, height, frozen=frozen, supersample=supersample)
    poses = world.middle_to_world[:, None].expand_as(world.object_to_world) if frozen else world.object_to_world
    surface = views.surface[0].cpu().numpy()
    movers = world.moves[0].cpu().numpy()[surface]
    return Clip(
        images=(views.images[0] * 255).round().to(torch.uint8).cpu().numpy(),
        depth=views.depth[0].float().cpu().numpy(),
        camera_to_world=np.array(world.camera_to_world[0].double().cpu().numpy()),
        intrinsics=np.tile(views.intrinsics[0].double().cpu().numpy(), (len(surface), 1, 1)),
        object_ids=surface,
        dynamic_mask=movers & (not frozen),
        mover_mask=movers,
        object_to_world=np.array(poses[0].double().cpu().numpy()),
        world=world,
    )


def _pixel_grid(height: int, width: int) -> Tensor:
    """[H, W, 2] float64 coordinates (x, y) of the pixel centres."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).double()


def _rays(pixels: Tensor, intrinsics: Tensor) -> Tensor:
    """[..., 3] camera-frame directions through ``pixels`` [..., 2] with z = 1: distance along them is z-depth."""
    return pad((pixels - intrinsics[:2, 2]) / intrinsics.diagonal()[:2], (0, 1), value=1.0)
