"""Random textured rooms with moving objects, as plain tensors; :mod:`easi3r.demo.rendering` looks at them.

World coordinates are metres, axes as OpenCV's (x right, y down, z forward), origin at the room's centre.
Surface 0 is the room itself, seen from inside; surfaces 1, 2, ... are the objects in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

NUM_WALLS = 6
_VIEW = torch.tensor([1.0, 0.75], dtype=torch.float64)  # objects are placed for a 4:3 picture
_CHECKED_TIMES = torch.linspace(0, 1, 33, dtype=torch.float64)  # where placement makes sure that nothing collides
_MIDDLE = 16  # _CHECKED_TIMES[16] is half time


@dataclass(frozen=True)
class Texture:
    """T solid textures of L layers, from coarse to fine, each made of M waves: one wave gives stripes, many give cells.

    Layer l is ``tanh(sharpness_l sum_m amplitude_lm sin(wave_lm . p + phase_lm))``, tinted, and shows most where the
    layer above it is positive: patches within patches, so that no part of a surface looks like another.
    """

    base: Tensor  # [T, 3] RGB in [0, 1]
    tint: Tensor  # [T, L, 3] RGB
    sharpness: Tensor  # [T, L]
    amplitude: Tensor  # [T, L, M]
    wave: Tensor  # [T, L, M, 3] radians per metre
    phase: Tensor  # [T, L, M] radians

    def colour(self, index: Tensor, points: Tensor, footprint: Tensor) -> Tensor:
        """[P, 3] RGB of the textures ``index`` [P] at object coordinates ``points`` [P, 3] metres.

        ``footprint`` [P] is the size of a pixel on the surface in metres: waves finer than that fade.
        """
        phase = (self.wave[index].flatten(1, 2) @ points[:, :, None]).reshape(-1, *self.phase.shape[1:])
        fade = torch.exp(-0.245 * self.wave.square().sum(-1)[index] * footprint[:, None, None] ** 2)  # sigma 0.7 pixels
        height = (self.amplitude[index] * fade * (phase + self.phase[index]).sin()).sum(-1)
        layers = torch.tanh(self.sharpness[index] * height)
        shown = torch.cat([layers[:, :1], layers[:, 1:] * (0.6 + 0.4 * layers[:, :-1])], dim=1)
        return (self.base[index] + (shown[:, :, None] * self.tint[index]).sum(1)).clamp(0, 1)


@dataclass(frozen=True)
class World:
    """All there is to render: n frames, S surfaces (the room first). Tensors share a device, floats a dtype."""

    camera_to_world: Tensor  # [n, 4, 4]
    object_to_world: Tensor  # [n, S, 4, 4]
    middle_to_world: Tensor  # [S, 4, 4] object_to_world at half time, where a frozen twin holds the movers
    half_extents: Tensor  # [S, 3] metres: half edges of a box, half axes of an ellipsoid
    is_ellipsoid: Tensor  # [S] bool
    moves: Tensor  # [S] bool
    light: Tensor  # [3] position of the lamp
    texture: Texture  # one row per wall, then one per object
    fov_deg: float  # horizontal

    def to(self, device: torch.device | str, dtype: torch.dtype) -> World:
        """The same world on ``device``, its floats in ``dtype``."""
        texture = replace(self.texture, **_to(self.texture, device, dtype))
        return replace(self, texture=texture, **_to(self, device, dtype))


def _to(record: Texture | World, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in tensors.items()}


def make_world(
    seed: int, *, num_movers: int = 2, num_static: int = 4, num_frames: int = 12, fov_deg: float = 60.0
) -> World:
    """A random room, objects and a camera's walk, float64 on the CPU: the same seed gives the same world.

    Movers and static objects are drawn by one law, paths included, and the static ones are then held at the middle of
    theirs, so that motion alone tells them apart. ``num_frames`` only sets how finely the same walk is sampled.
    """
    dice = _Dice(seed)
    frames = torch.linspace(0, 1, num_frames, dtype=torch.float64) if num_frames > 1 else _CHECKED_TIMES[_MIDDLE, None]
    times = torch.cat([_CHECKED_TIMES, frames])
    room = torch.cat([dice.uniform(3.5, 5.0, 1), dice.uniform(1.5, 2.0, 1), dice.uniform(3.5, 5.0, 1)])
    num_objects = num_movers + num_static
    is_mover = torch.randperm(num_objects, generator=dice.generator) < num_movers
    moves = torch.cat([torch.tensor([False]), is_mover])
    light = room * torch.cat([dice.uniform(-0.5, 0.5, 1), dice.uniform(-0.9, -0.7, 1), dice.uniform(-0.8, 0.0, 1)])
    texture = _random_texture(dice, num_objects)
    cameras = _camera_path(dice, room, times)

    paths = [torch.eye(4).to(times).expand(len(times), 4, 4)]
    sizes, ellipsoids = [room], [False]
    obstacles: list[tuple[Tensor, Tensor]] = []
    for _ in range(num_objects):
        path, size, ellipsoid = _place_object(dice, room, cameras, obstacles, times, fov_deg)
        paths, sizes, ellipsoids = [*paths, path], [*sizes, size], [*ellipsoids, ellipsoid]
    object_to_world = torch.stack(paths, dim=1)
    middle = object_to_world[_MIDDLE]
    return World(
        camera_to_world=cameras[len(_CHECKED_TIMES) :],
        object_to_world=torch.where(moves[:, None, None], object_to_world[len(_CHECKED_TIMES) :], middle),
        middle_to_world=middle,
        half_extents=torch.stack(sizes),
        is_ellipsoid=torch.tensor(ellipsoids),
        moves=moves,
        light=light,
        texture=texture,
        fov_deg=fov_deg,
    )


class _Dice:
    """Random float64 numbers from one explicit generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def wobble(self, times: Tensor) -> Tensor:
        """A smooth path about zero at ``times`` [n] in [0, 1]: [n, 3] of about one, three slow sinusoids each."""
        cycles, phase = self.uniform(0.5, 2, 3, 3), self.uniform(0, 2 * math.pi, 3, 3)
        return (2 * math.pi * times[:, None, None] * cycles + phase).sin().sum(1) / 1.5


def _camera_path(dice: _Dice, room: Tensor, times: Tensor) -> Tensor:
    """[n, 4, 4] a hand-held walk by 8 to 30 % of the viewing distance, near one wall and looking across the room."""
    start = room * torch.cat([dice.uniform(-0.15, 0.15, 2), dice.uniform(-0.75, -0.65, 1)])
    distance = dice.uniform(4.0, 5.5, 1)
    stride = distance * dice.uniform(0.08, 0.3)
    along = (times[:, None] - 0.5) * stride * normalize(dice.normal(3) * torch.tensor([1.0, 0.4, 0.5]), dim=0)
    target = start + torch.cat([dice.uniform(-0.4, 0.4, 1), dice.uniform(0.1, 0.5, 1), distance])
    target = target + dice.uniform(0.0, 0.8) * along + 0.05 * dice.wobble(times)
    position = start + along + 0.07 * stride * dice.wobble(times)

    forward = normalize(target - position, dim=-1)
    right = normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]).to(forward).expand_as(forward), forward), dim=-1)
    level = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)
    return _rigid(level @ _rotation(0.012 * dice.wobble(times) * torch.tensor([0.0, 0.0, 1.0])), position)


def _place_object(
    dice: _Dice, room: Tensor, cameras: Tensor, obstacles: list[tuple[Tensor, Tensor]], times: Tensor, fov_deg: float
) -> tuple[Tensor, Tensor, bool]:
    """A drift of about a metre, in view, inside the room, clear of the cameras [n, 4, 4] and of the ``obstacles``.

    An obstacle is the path of a centre [33, 3] at the checked times and a radius; the object joins them. Returns its
    poses [n, 4, 4], half extents [3] and whether it is an ellipsoid.
    """
    tries, view = 512, cameras[_MIDDLE]
    slope = math.tan(math.radians(fov_deg) / 2) * _VIEW
    ellipsoid, on_floor = (dice.uniform(0, 1, 2) < 0.5).tolist()
    distance = dice.uniform(2.3, 5.0, tries, 1)
    shrink = 0.99 ** torch.arange(tries)[:, None].clamp(max=80)  # in a crowd, the later tries fit
    size = shrink * distance * dice.uniform(0.11, 0.18, tries, 1) * dice.uniform(-0.35, 0.35, tries, 3).exp()
    radius = size.amax(1) if ellipsoid else 0.85 * size.norm(dim=1)
    middle = transform(view, torch.cat([distance * slope * dice.uniform(-0.8, 0.8, tries, 2), distance], dim=1))
    if on_floor:
        middle[:, 1] = room[1] - size[:, 1]
    freedom = torch.tensor([1.0, 0.0 if on_floor else 0.3, 0.6])
    drift = dice.uniform(0.6, 1.4, tries, 1) * normalize(dice.normal(tries, 3) * freedom, dim=1)
    sway = 0.08 * freedom * dice.wobble(times)
    path = middle[:, None] + (times - 0.5)[:, None] * drift[:, None] + sway - sway[_MIDDLE]  # [tries, n, 3]

    centres, eyes = path[:, : len(_CHECKED_TIMES)], cameras[: len(_CHECKED_TIMES), :3, 3]
    reach = torch.stack([radius, size[:, 1] if on_floor else radius, radius], dim=1)[:, None]
    seen = transform(torch.linalg.inv(view), centres)
    gaps = [
        (room + 1e-9 - reach - centres.abs()).amin((1, 2)),
        (0.9 * slope * seen[..., 2:] - seen[..., :2].abs()).amin((1, 2)),
        (centres - eyes).norm(dim=-1).amin(1) - radius - 0.5,
    ]
    for other, other_radius in obstacles:
        gaps.append((centres - other).norm(dim=-1).amin(1) - radius - other_radius)
        other_seen = transform(torch.linalg.inv(view), other[_MIDDLE])
        # Neither hides the other: their pictures overlap little.
        apart = (seen[:, _MIDDLE, :2] / seen[:, _MIDDLE, 2:] - other_seen[:2] / other_seen[2]).norm(dim=-1)
        gaps.append(apart - 0.6 * (radius / seen[:, _MIDDLE, 2] + other_radius / other_seen[2]))
    gap = torch.stack(gaps).amin(0)
    best = int((gap.clamp(max=0) - 1e-9 * torch.arange(tries)).argmax())  # the first that fits, or nearly
    obstacles.append((centres[best], radius[best]))
    return _rigid(_tumble(dice, on_floor, times), path[best]), size[best], ellipsoid


def _tumble(dice: _Dice, on_floor: bool, times: Tensor) -> Tensor:
    """[n, 3, 3] a turn of 20 to 70 degrees about a vertical axis, or roughly vertical if not ``on_floor``."""
    axes = torch.tensor([0.0, 1.0, 0.0] if on_floor else [0.3, 1.0, 0.3])
    turn = dice.uniform(0.3, 1.2) * normalize(dice.normal(3) * axes, dim=0)
    return _rotation((times - 0.5)[:, None] * turn) @ _rotation(dice.uniform(-math.pi, math.pi, 3) * axes)


def _random_texture(dice: _Dice, num_objects: int) -> Texture:
    """Four layers from coarse cells to fine stripes; objects are seen from nearer than walls, so theirs are finer."""
    num, layers, waves = NUM_WALLS + num_objects, 4, 6
    coarsest = torch.tensor([2.5] * NUM_WALLS + [1.0] * num_objects).double()
    period = coarsest[:, None, None] * 0.5 ** torch.arange(layers)[:, None] * dice.uniform(0.6, 1.4, num, layers, waves)
    direction = normalize(dice.normal(num, layers, waves, 3), dim=-1)
    count = torch.tensor([1, 2, waves, waves])[torch.randint(4, (num, layers, 1), generator=dice.generator)]
    count[:, :2] = waves
    return Texture(
        base=dice.uniform(0.35, 0.7, num, 3),
        tint=0.12 * dice.normal(num, layers, 1).sign() + 0.07 * dice.normal(num, layers, 3),
        sharpness=dice.uniform(1.5, 4.0, num, layers),
        amplitude=(torch.arange(waves) < count) * (2 / count).sqrt(),
        wave=2 * math.pi * direction / period[..., None],
        phase=dice.uniform(0, 2 * math.pi, num, layers, waves),
    )


def transform(pose: Tensor, points: Tensor) -> Tensor:
    """[..., 4, 4] applied to [..., 3] -> [..., 3]."""
    return (pose[..., :3, :3] @ points[..., None])[..., 0] + pose[..., :3, 3]


def _rotation(axis_angle: Tensor) -> Tensor:
    """[..., 3] radians -> [..., 3, 3]."""
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1)
    rotation: Tensor = torch.linalg.matrix_exp(skew.reshape(*axis_angle.shape, 3))
    return rotation


def _rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """[..., 3, 3] and [..., 3] -> [..., 4, 4]."""
    pose = pad(torch.cat([rotation, translation[..., None]], dim=-1), (0, 0, 0, 1))
    pose[..., 3, 3] = 1
    return pose
