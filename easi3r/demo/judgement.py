"""How good a network's geometry is on held-out static pairs, beside baselines that look good for the wrong reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r, PointmapPair
from easi3r.demo.static_pairs import StaticViews, centred_pixels
from easi3r.demo.worlds import rotation


@dataclass(frozen=True)
class PairErrors:
    """Over all pairs.  Distances are divided by the pair's mean distance, of truth and prediction alike (DUSt3R 3.2).

    The baselines have to be worse, or the network does not compare the two views.
    """

    first_view: float  # mean distance of view 1's points from the truth
    second_view: float  # the same of view 2's points, in view 1's camera frame
    second_view_wrong_other: float  # ... when view 1 shows another world
    second_view_monocular: float  # ... when the network sees view 2 alone, as if the camera had stood still
    second_view_mean: float  # ... of the mean pointmap of all these pairs
    rotation_deg: float  # median angle between relative rotation and truth
    rotation_deg_identity: float  # ... of "the camera did not turn"
    direction_deg: float  # median angle between direction of translation and truth; chance is 90
    focal_percent: float  # median error of the focal length

    def line(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in asdict(self).items())


def judge_pairs(network: Dust3r, pairs: StaticViews, batch: int = 16) -> PairErrors:
    """Predict each pair (view 0 first), measure; the network runs in its own precision, on its own device."""
    columns: list[dict[str, Tensor]] = []
    with torch.inference_mode():
        for start in range(0, len(pairs.images), batch):
            some = StaticViews(*(value[start : start + batch] for value in vars(pairs).values()))
            columns.append(_measure(network, some.to(network.device)))
    column = {name: torch.cat([some[name] for some in columns]) for name in columns[0]}
    second = column.pop("truth")
    mean_map = second.mean(0)
    column["second_view_mean"] = (second - mean_map).square().sum(-1).sqrt().mean((1, 2))
    medians = {"rotation_deg", "rotation_deg_identity", "direction_deg", "focal_percent"}
    return PairErrors(**{k: float(v.median() if k in medians else v.mean()) for k, v in column.items()})


def _measure(network: Dust3r, pairs: StaticViews) -> dict[str, Tensor]:
    """One value per pair of each field but the mean pointmap's, and the normalised truth [B, H, W, 3]."""
    first, second = pairs.images.unbind(1)
    grid = network.grid_of(*first.shape[-2:])
    tokens, other = network.encode(first), network.encode(second)
    predicted = network.predict(network.decode(tokens, other, grid))
    wrong = network.predict(network.decode(tokens.roll(1, 0), other, grid))
    alone = network.predict(network.decode(other, other, grid))
    truth1, truth2 = pairs.points[:, 0], pairs.points_in(0, 1)
    truth1, truth2 = (x / _mean_distance(truth1, truth2) for x in (truth1, truth2))

    def error(points: Tensor, prediction: PointmapPair, truth: Tensor) -> Tensor:
        unit = _mean_distance(prediction.points_first, prediction.points_second)
        return (points / unit - truth).square().sum(-1).sqrt().mean((1, 2))

    true_pose = pairs.relative_pose(0, 1)
    focal = focal_of_pointmap(predicted.points_first)
    pose = pose_of_pointmap(predicted.points_second, focal)
    return {
        "first_view": error(predicted.points_first, predicted, truth1),
        "second_view": error(predicted.points_second, predicted, truth2),
        "second_view_wrong_other": error(wrong.points_second, wrong, truth2),
        "second_view_monocular": error(alone.points_first, alone, truth2),
        "truth": truth2,
        "rotation_deg": _angle_deg(pose[:, :3, :3].mT @ true_pose[:, :3, :3]),
        "rotation_deg_identity": _angle_deg(true_pose[:, :3, :3]),
        "direction_deg": _between_deg(pose[:, :3, 3], true_pose[:, :3, 3]),
        "focal_percent": 100 * (focal / pairs.focal_px - 1).abs(),
    }


def focal_of_pointmap(points: Tensor, iterations: int = 10) -> Tensor:
    """[B] focal lengths in pixels that see [B, H, W, 3] points at their own pixels (Weiszfeld, DUSt3R 3.3)."""
    pixel = centred_pixels(*points.shape[1:3]).to(points).flatten(0, 1)
    ray = (points[..., :2] / points[..., 2:].clamp(min=1e-3)).flatten(1, 2)
    weight = torch.ones_like(ray[..., 0])
    for _ in range(iterations):
        focal = (weight * (pixel * ray).sum(-1)).sum(1) / (weight * ray.square().sum(-1)).sum(1)
        weight = 1 / (pixel - focal[:, None, None] * ray).square().sum(-1).sqrt().clamp(min=1e-6)
    return focal


def pose_of_pointmap(points: Tensor, focal: Tensor, iterations: int = 20) -> Tensor:
    """[B, 4, 4] camera poses, in the frame of ``points`` [B, H, W, 3], that see each point at its pixel.

    Gauss-Newton on the reprojection error in units of the focal length, robust weights 1 / (1 + r^2 / s^2) with s
    from the median residual, from the identity on.
    """
    target = (centred_pixels(*points.shape[1:3]).to(points).flatten(0, 1) / focal[:, None, None]).double()
    world = points.flatten(1, 2).double()
    unit = world.square().sum(-1).sqrt().mean(1)
    world = world / unit[:, None, None]
    turn = torch.eye(3).to(world).repeat(len(points), 1, 1)
    shift = torch.zeros_like(world[:, 0])  # camera from world: x -> turn x + shift
    for _ in range(iterations):
        x, y, z = (world @ turn.mT + shift[:, None]).unbind(-1)
        z = z.clamp(min=1e-2)
        u, v, zero, one = x / z, y / z, torch.zeros_like(x), torch.ones_like(x)
        residual = torch.stack([u, v], dim=-1) - target
        size = residual.square().sum(-1)
        weight = 1 / (1 + size / size.median(dim=1, keepdim=True).values.clamp(min=1e-12))
        # d(u, v) by a small turn about the camera's axes, then by a small shift
        du = torch.stack([-u * v, one + u * u, -v, one / z, zero, -u / z], dim=-1)
        dv = torch.stack([-(one + v * v), u * v, u, zero, one / z, -v / z], dim=-1)
        jacobian = torch.stack([du, dv], dim=-2)
        normal = torch.einsum("bn,bnki,bnkj->bij", weight, jacobian, jacobian)
        slope = torch.einsum("bn,bnki,bnk->bi", weight, jacobian, residual)
        normal = normal + 1e-9 * normal.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] * torch.eye(6).to(normal)
        change = -torch.linalg.solve(normal, slope)
        step = rotation(change[:, :3])
        turn, shift = step @ turn, (step @ shift[..., None])[..., 0] + change[:, 3:]
    pose = torch.eye(4).to(world).repeat(len(points), 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = turn.mT, -(turn.mT @ shift[..., None])[..., 0] * unit[:, None]
    return pose.to(points.dtype)


def _mean_distance(*points: Tensor) -> Tensor:
    """[B, 1, 1, 1] mean distance from view 1's camera over the points of both views."""
    lengths = [x.square().sum(-1).sqrt().flatten(1) for x in points]
    return torch.cat(lengths, dim=1).mean(1)[:, None, None, None]


def _angle_deg(turn: Tensor) -> Tensor:
    """[B, 3, 3] -> [B] angle of rotation; by the chord, which is exact for small angles too."""
    chord = (turn - torch.eye(3).to(turn)).square().sum((1, 2)).sqrt() / 8**0.5
    return torch.rad2deg(2 * chord.clamp(max=1).asin())


def _between_deg(a: Tensor, b: Tensor) -> Tensor:
    """[B, 3] and [B, 3] -> [B] angle between them."""
    cross, dot = torch.linalg.cross(a, b).square().sum(-1).sqrt(), (a * b).sum(-1)
    return torch.rad2deg(torch.atan2(cross, dot))
