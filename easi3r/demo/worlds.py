"""Random textured rooms with moving objects, as plain tensors; :mod:`easi3r.demo.rendering` looks at them.

World coordinates are metres, axes as OpenCV's (x right, y down, z forward), origin at the room's centre.
Surface 0 is the room itself, seen from inside; surfaces 1, 2, ... are the objects in it.  Worlds are made and rendered
many at a time: W worlds of n frames, S surfaces and T textures each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NUM_WALLS = 6
NUM_LAYERS, NUM_WAVES = 4, 6
TRIES = 192  # places that are drawn for each object
_VIEW = torch.tensor([1.0, 0.75], dtype=torch.float64)  # objects are placed for a 4:3 picture
_CHECKED_TIMES = torch.linspace(0, 1, 33, dtype=torch.float64)  # where placement makes sure that nothing collides
_MIDDLE = 16  # _CHECKED_TIMES[16] is half time

Range = tuple[float, float]


@dataclass(frozen=True)
class Family:
    """The law by which worlds are drawn; a range is uniform.  The defaults are what the bundled network is trained on.

    A walk begins near one wall and looks across the room at a target; ``stride`` and ``pan_deg`` say how far the
    camera and its line of sight come within the clip.
    """

    fov_deg: Range = (56.0, 62.0)  # horizontal field of view
    room_m: Range = (3.8, 4.8)  # half the room's width and depth
    height_m: Range = (1.6, 1.9)  # half its height
    stride: Range = (0.07, 0.28)  # way of the camera over the distance of its target
    pan_deg: Range = (0.0, 7.5)  # turn of the line of sight on top of what following the target needs
    shake: float = 1.0  # hand-held sway of position, target and roll; 0 = none
    shake_cycles: Range = (0.5, 2.0)  # its frequencies, per clip
    num_movers: int = 2
    num_static: int = 4
    size: Range = (0.11, 0.18)  # half extents of an object over its distance
    drift_m: Range = (0.6, 1.4)  # way of a mover
    contrast: float = 1.0  # of the textures


FAMILIES = {  # from easy to hard
    "tripod": Family(stride=(0.0, 0.0), pan_deg=(0.0, 0.0), shake=0.0),
    "sharp": Family(),
    "crowd": Family(num_movers=3, num_static=3, size=(0.14, 0.24)),
    "handheld": Family(shake=3.0, shake_cycles=(2.0, 5.0)),
    "plain": Family(contrast=0.35),
    "wide": Family(
        fov_deg=(45.0, 80.0),
        room_m=(3.2, 7.0),
        height_m=(1.4, 2.4),
        stride=(0.05, 0.5),
        pan_deg=(0.0, 25.0),
        shake=2.0,
        size=(0.08, 0.22),
    ),
}


@dataclass(frozen=True)
class Texture:
    """T solid textures of L layers, from coarse to fine, each made of M waves: one wave gives stripes, many give cells.

    Layer l is ``tanh(sharpness_l sum_m amplitude_lm sin(wave_lm . p + phase_lm))``, tinted, and shows most where the
    layer above it is positive: patches within patches, so that no part of a surface looks like another.
    """

    base: Tensor  # [W, T, 3] RGB in [0, 1]
    tint: Tensor  # [W, T, L, 3] RGB
    sharpness: Tensor  # [W, T, L]
    amplitude: Tensor  # [W, T, L, M]
    wave: Tensor  # [W, T, 3, L, M] radians per metre
    phase: Tensor  # [W, T, L, M] radians

    def colour(self, row: Tensor, points: Tensor, footprint: Tensor) -> Tensor:
        """[P, 3] RGB at object coordinates ``points`` [P, 3] metres of the textures ``row`` [P] (world * T + texture).

        ``footprint`` [P] is the size of a pixel on the surface in metres: layers finer than that fade.
        """
        base, tint, sharpness, amplitude, wave, phase = (
            getattr(self, field.name).flatten(0, 1) for field in fields(self)
        )
        fineness = wave.square().sum(1).amax(-1)  # [T, L]
        fade = torch.exp(-0.245 * fineness[row] * footprint[:, None] ** 2)  # a Gaussian of 0.7 pixels
        angle = phase[row]
        for axis in range(3):
            angle = torch.addcmul(angle, wave[:, axis][row], points[:, axis, None, None])
        layers = torch.tanh(sharpness[row] * (amplitude[row] * angle.sin_()).sum(-1) * fade)
        shown = torch.cat([layers[:, :1], layers[:, 1:] * (0.6 + 0.4 * layers[:, :-1])], dim=1)
        colour: Tensor = base[row] + (shown[:, :, None] * tint[row]).sum(1)
        return colour.clamp(0, 1)


@dataclass(frozen=True)
class World:
    """All there is to render of W worlds: n frames, S surfaces (the room first).  Floats share a dtype."""

    camera_to_world: Tensor  # [W, n, 4, 4]
    object_to_world: Tensor  # [W, n, S, 4, 4]
    middle_to_world: Tensor  # [W, S, 4, 4] object_to_world at half time, where a frozen twin holds the movers
    half_extents: Tensor  # [W, S, 3] metres: half edges of a box, half axes of an ellipsoid
    is_ellipsoid: Tensor  # [W, S] bool
    moves: Tensor  # [W, S] bool
    light: Tensor  # [W, 3] position of the lamp
    fov_deg: Tensor  # [W] horizontal
    texture: Texture  # one row per wall, then one per object

    def to(self, device: torch.device | str, dtype: torch.dtype) -> World:
        """The same worlds on ``device``, their floats in ``dtype``."""
        texture = replace(self.texture, **_to(self.texture, device, dtype))
        return replace(self, texture=texture, **_to(self, device, dtype))


def _to(record: Texture | World, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in tensors.items()}


def make_world(seed: int, family: Family | None = None, *, num_frames: int = 12) -> World:
    """One world (W = 1) of a clip: see :func:`make_worlds`."""
    return make_worlds([seed], family, num_frames=num_frames)


def make_worlds(
    seeds: Sequence[int], family: Family | None = None, *, num_frames: int = 12, times: Tensor | None = None
) -> World:
    """Random rooms, objects and walks of a camera, float64 on the CPU: the same seed gives the same world.

    Movers and static objects are drawn by one law, paths included, and the static ones are then held at the middle of
    theirs, so that motion alone tells them apart.  The walk is seen at ``num_frames`` equal steps, or at ``times`` [n]
    float64 in [0, 1]; either only sets how finely the same walk is sampled.
    """
    family = family or Family()
    dice = _Dice(seeds)
    if times is None:
        times = torch.linspace(0, 1, num_frames).double() if num_frames > 1 else _CHECKED_TIMES[_MIDDLE, None]
    times = torch.cat([_CHECKED_TIMES, times])
    across, up = dice.uniform(*family.room_m, 2), dice.uniform(*family.height_m, 1)
    room = torch.cat([across[:, :1], up, across[:, 1:]], dim=1)
    num_objects = family.num_movers + family.num_static
    is_mover = dice.uniform(0, 1, num_objects).argsort(dim=1) < family.num_movers
    moves = pad(is_mover, (1, 0), value=False)
    light = room * torch.cat([dice.uniform(-0.5, 0.5, 1), dice.uniform(-0.9, -0.7, 1), dice.uniform(-0.8, 0.0, 1)], 1)
    fov_deg = dice.uniform(*family.fov_deg)
    texture = _random_texture(dice, num_objects, family.contrast)
    cameras = _camera_path(dice, family, room, times)

    paths = [torch.eye(4).to(times).expand(len(seeds), len(times), 4, 4)]
    sizes, ellipsoids = [room], [torch.zeros(len(seeds), dtype=torch.bool)]
    obstacles: list[tuple[Tensor, Tensor]] = []
    for _ in range(num_objects):
        path, size, ellipsoid = _place_object(dice, family, room, cameras, obstacles, times, fov_deg)
        paths, sizes, ellipsoids = [*paths, path], [*sizes, size], [*ellipsoids, ellipsoid]
    object_to_world = torch.stack(paths, dim=2)
    middle = object_to_world[:, _MIDDLE]
    frames = object_to_world[:, len(_CHECKED_TIMES) :]
    return World(
        camera_to_world=cameras[:, len(_CHECKED_TIMES) :],
        object_to_world=torch.where(moves[:, None, :, None, None], frames, middle[:, None]),
        middle_to_world=middle,
        half_extents=torch.stack(sizes, dim=1),
        is_ellipsoid=torch.stack(ellipsoids, dim=1),
        moves=moves,
        light=light,
        fov_deg=fov_deg,
        texture=texture,
    )


class _Dice:
    """Random float64 numbers [W, *shape], each world's from a generator of its own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        drawn = [torch.rand(shape, generator=generator, dtype=torch.float64) for generator in self.generators]
        return low + (high - low) * torch.stack(drawn)

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in self.generators])

    def wobble(self, times: Tensor, cycles: Range = (0.5, 2.0)) -> Tensor:
        """Smooth paths about zero at ``times`` [n] in [0, 1]: [W, n, 3] of about one, three slow sinusoids each."""
        rate, phase = self.uniform(*cycles, 1, 3, 3), self.uniform(0, 2 * math.pi, 1, 3, 3)
        return (2 * math.pi * times[:, None, None] * rate + phase).sin().sum(2) / 1.5


def _camera_path(dice: _Dice, family: Family, room: Tensor, times: Tensor) -> Tensor:
    """[W, n, 4, 4] a hand-held walk, near one wall and looking across the room."""
    start = room * torch.cat([dice.uniform(-0.15, 0.15, 2), dice.uniform(-0.75, -0.65, 1)], dim=1)
    distance = dice.uniform(4.0, 5.5, 1)
    stride = (distance * dice.uniform(*family.stride, 1))[:, None]
    share = (times - 0.5)[:, None]
    along = share * stride * _unit(dice.normal(1, 3) * torch.tensor([1.0, 0.4, 0.5]))
    turn = share * (distance * torch.deg2rad(dice.uniform(*family.pan_deg, 1)))[:, None]
    pan = turn * _unit(dice.normal(1, 3) * torch.tensor([1.0, 0.4, 0.0]))
    target = start + torch.cat([dice.uniform(-0.4, 0.4, 1), dice.uniform(0.1, 0.5, 1), distance], dim=1)
    sway = family.shake * dice.wobble(times, family.shake_cycles)
    target = target[:, None] + dice.uniform(0.0, 0.8, 1, 1) * along + pan + 0.05 * sway
    position = start[:, None] + along + 0.07 * stride * family.shake * dice.wobble(times, family.shake_cycles)
    position = torch.clamp(position, -0.95 * room[:, None], 0.95 * room[:, None])

    forward = _unit(target - position)
    right = _unit(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]).to(forward).expand_as(forward), forward))
    level = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-1)
    roll = 0.012 * family.shake * dice.wobble(times, family.shake_cycles) * torch.tensor([0.0, 0.0, 1.0])
    return _rigid(level @ rotation(roll), position)


def _place_object(
    dice: _Dice,
    family: Family,
    room: Tensor,
    cameras: Tensor,
    obstacles: list[tuple[Tensor, Tensor]],
    times: Tensor,
    fov_deg: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A drift of about a metre, in view, inside the room, clear of the cameras [W, n, 4, 4] and of the ``obstacles``.

    An obstacle is the path of a centre [W, 33, 3] at the checked times and a radius [W]; the object joins them.
    Returns its poses [W, n, 4, 4], half extents [W, 3] and whether it is an ellipsoid [W].
    """
    num_checked, view = len(_CHECKED_TIMES), cameras[:, _MIDDLE]
    slope = torch.deg2rad(fov_deg / 2).tan()[:, None, None] * _VIEW  # [W, 1, 2]
    ellipsoid, on_floor = (dice.uniform(0, 1, 2) < 0.5).unbind(1)
    distance = dice.uniform(2.3, 5.0, TRIES, 1)
    shrink = 0.985 ** torch.arange(TRIES)[:, None].clamp(max=80)  # in a crowd, the later tries fit
    size = shrink * distance * dice.uniform(*family.size, TRIES, 1) * dice.uniform(-0.35, 0.35, TRIES, 3).exp()
    radius = torch.where(ellipsoid[:, None], size.amax(-1), 0.85 * _length(size))  # [W, tries]
    middle = torch.cat([distance * slope * dice.uniform(-0.8, 0.8, TRIES, 2), distance], dim=-1)
    middle = transform(view[:, None], middle)
    floor = room[:, None, 1] - size[..., 1]
    middle[..., 1] = torch.where(on_floor[:, None], floor, middle[..., 1])
    lift = torch.where(on_floor, 0.0, 0.3)
    freedom = torch.stack([torch.ones_like(lift), lift, torch.full_like(lift, 0.6)], dim=-1)[:, None]  # [W, 1, 3]
    drift = dice.uniform(*family.drift_m, TRIES, 1) * _unit(dice.normal(TRIES, 3) * freedom)
    sway = 0.08 * freedom * dice.wobble(times)
    bend = (sway - sway[:, _MIDDLE, None])[:, None]
    path = middle[:, :, None] + (times - 0.5)[:, None] * drift[:, :, None] + bend  # [W, tries, n, 3]

    centres, eyes = path[:, :, :num_checked], cameras[:, None, :num_checked, :3, 3]
    reach = torch.stack([radius, torch.where(on_floor[:, None], size[..., 1], radius), radius], dim=-1)[:, :, None]
    seen = transform(torch.linalg.inv(view)[:, None, None], centres)
    gaps = [
        (room[:, None, None] + 1e-9 - reach - centres.abs()).amin((2, 3)),
        (0.9 * slope[:, None] * seen[..., 2:] - seen[..., :2].abs()).amin((2, 3)),
        _length(centres - eyes).amin(-1) - radius - 0.5,
    ]
    image = seen[:, :, _MIDDLE, :2] / seen[:, :, _MIDDLE, 2:]
    for other, other_radius in obstacles:
        gaps.append(_length(centres - other[:, None]).amin(-1) - radius - other_radius[:, None])
        other_seen = transform(torch.linalg.inv(view), other[:, _MIDDLE])[:, None]
        # Neither hides the other: their pictures overlap little.
        apart = _length(image - other_seen[..., :2] / other_seen[..., 2:])
        gaps.append(apart - 0.6 * (radius / seen[:, :, _MIDDLE, 2] + other_radius[:, None] / other_seen[..., 2]))
    gap = torch.stack(gaps).amin(0)
    best = (gap.clamp(max=0) - 1e-9 * torch.arange(TRIES)).argmax(1)  # the first that fits, or nearly
    world = torch.arange(len(best))
    obstacles.append((centres[world, best], radius[world, best]))
    return _rigid(_tumble(dice, on_floor, times), path[world, best]), size[world, best], ellipsoid


def _tumble(dice: _Dice, on_floor: Tensor, times: Tensor) -> Tensor:
    """[W, n, 3, 3] a turn of 20 to 70 degrees about a vertical axis, or roughly vertical if not ``on_floor`` [W]."""
    tilt = torch.where(on_floor, 0.0, 0.3)
    axes = torch.stack([tilt, torch.ones_like(tilt), tilt], dim=-1)
    turn = dice.uniform(0.3, 1.2, 1) * _unit(dice.normal(3) * axes)
    start = rotation(dice.uniform(-math.pi, math.pi, 3) * axes)
    return rotation((times - 0.5)[:, None] * turn[:, None]) @ start[:, None]


def _random_texture(dice: _Dice, num_objects: int, contrast: float) -> Texture:
    """Four layers from coarse cells to fine stripes; objects are seen from nearer than walls, so theirs are finer."""
    num, layers, waves = NUM_WALLS + num_objects, NUM_LAYERS, NUM_WAVES
    coarsest = torch.tensor([2.5] * NUM_WALLS + [1.0] * num_objects).double()
    period = coarsest[:, None, None] * 0.5 ** torch.arange(layers)[:, None] * dice.uniform(0.6, 1.4, num, layers, waves)
    direction = _unit(dice.normal(num, layers, waves, 3)).movedim(-1, 2)
    count = torch.tensor([1, 2, waves, waves])[dice.uniform(0, 4, num, layers, 1).long()]
    count[:, :, :2] = waves
    return Texture(
        base=dice.uniform(0.35, 0.7, num, 3),
        tint=contrast * (0.12 * dice.normal(num, layers, 1).sign() + 0.07 * dice.normal(num, layers, 3)),
        sharpness=dice.uniform(1.5, 4.0, num, layers),
        amplitude=(torch.arange(waves) < count) * (2 / count).sqrt(),
        wave=2 * math.pi * direction / period[:, :, None],
        phase=dice.uniform(0, 2 * math.pi, num, layers, waves),
    )


def transform(pose: Tensor, points: Tensor) -> Tensor:
    """[..., 4, 4] applied to [..., 3] -> [..., 3]."""
    return (pose[..., :3, :3] @ points[..., None])[..., 0] + pose[..., :3, 3]


def rotation(axis_angle: Tensor) -> Tensor:
    """[..., 3] radians -> [..., 3, 3] (Rodrigues' formula)."""
    angle = _length(axis_angle)[..., None, None]
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    sinc, half_sinc = torch.sinc(angle / math.pi), torch.sinc(angle / (2 * math.pi))
    turned: Tensor = torch.eye(3).to(axis_angle) + sinc * skew + 0.5 * half_sinc**2 * skew @ skew
    return turned


def _length(vectors: Tensor) -> Tensor:
    """[..., D] -> [...]; written out, since norms over a short axis are slow on CPUs."""
    return vectors.square().sum(-1).sqrt()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _length(vectors)[..., None].clamp(min=1e-12)


def _rigid(turn: Tensor, translation: Tensor) -> Tensor:
    """[..., 3, 3] and [..., 3] -> [..., 4, 4]."""
    pose = pad(torch.cat([turn, translation[..., None]], dim=-1), (0, 0, 0, 1))
    pose[..., 3, 3] = 1
    return pose
