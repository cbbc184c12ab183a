"""Where the second camera of each pair stands in the frame of its first: PnP on what the network says of the second.

Only pixels, rays and one pair at a time are needed: no world, no depth of other frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import roma
import torch
from torch import Tensor

from easi3r.structures import PairPredictions

START_POINTS = 500  # of the Procrustes start
ROUGH, FINE = (1, 1, 1, 1, 1), (4, 4, 1)  # steps of Gauss-Newton on every so manieth pixel
CUTOFF = 2.4  # standard deviations beyond which a residual counts for little
LEAST_SCATTER_PX = 1e-3  # lest predictions without noise divide by 0


@dataclass(frozen=True)
class RelativePoses:
    """One per directed pair; translations are in the unit of the points that they come from."""

    rotation: Tensor  # [P, 3, 3] float64, second camera's frame to the first's
    translation: Tensor  # [P, 3] float64
    information: Tensor  # [P, 6, 6] float64 inverse covariance of (rotation, translation), in the second camera's frame


def relative_poses(
    predictions: PairPredictions, rays: Tensor, focal_px: Tensor, static: Tensor, sample: slice
) -> RelativePoses:
    """Robust reprojection of the second view's points into the second camera, by Gauss-Newton, all pairs alike.

    rays: [n, 3, N] through the pixels, z = 1.  focal_px: [n, 2] along x and y.  static: [n, N] bool; the pixels that
    count.  sample: which of the N pixels are looked at.
    """
    pairs = torch.from_numpy(predictions.pairs)
    rays, static = rays[..., sample], static[:, sample]
    thin = slice(None, None, max(1, rays.shape[2] // START_POINTS))
    begins = torch.stack([(pairs[:, 0] == frame).nonzero()[0, 0] for frame in range(len(rays))])
    own = read_view(predictions, "first", begins, sample)[0][..., thin]  # each frame in its own camera's frame
    found = []
    for frame in range(len(rays)):
        index = (pairs[:, 0] == frame).nonzero()[:, 0]
        second = pairs[index, 1]
        points, weight = read_view(predictions, "second", index, sample)
        weight = _of_static(weight, static[second])
        rotation, translation = registered(own[second], points[..., thin], weight[:, thin])
        found.append(refine(rotation, translation, points, weight, rays[second], focal_px[second], ROUGH))
    order = torch.argsort(torch.argsort(pairs[:, 0], stable=True), stable=True)
    return RelativePoses(*(torch.cat(parts)[order] for parts in zip(*found, strict=True)))


def poses_by_direction(
    predictions: PairPredictions,
    rays: Tensor,
    focal_px: Tensor,
    static: Tensor,
    sample: slice,
    log_depth: Tensor,
    rough: RelativePoses,
) -> RelativePoses:
    """The first camera's pose in the frame of the second: from where the first sees the second frame's fused depth.

    A pair's own points err along their rays, which makes translations from them too short (as a slope is whose
    abscissa errs).  So depth is the mean of all looks, and of the pair's points only their direction counts.

    log_depth: [n, N] of all frames in one unit, that of the answer.  rough: the start, in that unit.
    """
    pairs, found = torch.from_numpy(predictions.pairs), []
    for frame in range(len(rays)):
        index = (pairs[:, 1] == frame).nonzero()[:, 0]
        if not len(index):
            continue
        said, weight = read_view(predictions, "second", index, sample)
        in_front = said[:, 2] > 0
        directions = said / torch.where(in_front, said[:, 2], 1.0)[:, None]
        weight = _of_static(weight * in_front, static[frame, sample].expand(len(index), -1))
        points = (rays[frame][:, sample] * log_depth[frame, sample].exp()).expand(len(index), -1, -1)
        back = rough.rotation[index].mT
        start = -(back @ rough.translation[index, :, None])[..., 0]
        found.append(refine(back, start, points, weight, directions, focal_px[pairs[index, 0]], FINE))
    order = torch.argsort(torch.argsort(pairs[:, 1], stable=True), stable=True)
    return RelativePoses(*(torch.cat(parts)[order] for parts in zip(*found, strict=True)))


def _of_static(weight: Tensor, static: Tensor) -> Tensor:
    """Without what moves, unless hardly anything rests."""
    return torch.where(static.float().mean(dim=1, keepdim=True) > 0.1, weight * static, weight)


def read_view(predictions: PairPredictions, view: str, index: Tensor, sample: slice) -> tuple[Tensor, Tensor]:
    """Points [k, 3, M] and weights [k, M] = log(confidence) of some pairs; 0 where a point is not finite."""
    points = getattr(predictions, f"points_{view}").flatten(1, 2)[:, sample][index]
    weight = getattr(predictions, f"confidence_{view}").flatten(1)[:, sample][index].float().log()
    points = points.float().transpose(1, 2)
    usable = points.isfinite().all(dim=1) & weight.isfinite()
    return torch.where(usable[:, None], points, 0.0), torch.where(usable, weight.clamp(min=1e-6), 0.0)


def spread(count: int, size: tuple[int, int]) -> slice:
    """About ``count`` of all pixels, row-major, evenly over rows and columns, whatever the width."""
    height, width = size
    step = max(1, height * width // count)
    while step > 1 and gcd(step, width) > 1:
        step += 1
    return slice(None, None, step)


def registered(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation [k, 3, 3] and translation [k, 3] of the similarity from [k, 3, M] onto [k, 3, M], least distances."""
    reweighted = weight
    for _ in range(2):
        rotation, translation, scale = roma.rigid_points_registration(
            source.mT, target.mT, weights=reweighted.clamp(min=1e-12), compute_scaling=True
        )
        residual = target - scale[:, None, None] * rotation @ source - translation[..., None]
        distance = residual.square().sum(dim=1).sqrt()
        reweighted = weight / distance.clamp(min=1e-3 * float(distance.median()) + 1e-9)
    usable = rotation.isfinite().flatten(1).all(dim=1) & translation.isfinite().all(dim=1)
    rotation = torch.where(usable[:, None, None], rotation, torch.eye(3).to(rotation))
    return rotation, torch.where(usable[:, None], translation, 0.0)


def refine(
    rotation: Tensor,
    translation: Tensor,
    points: Tensor,
    weight: Tensor,
    rays: Tensor,
    focal: Tensor,
    strides: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Newton on the reprojection of points [k, 3, M] to rays [k, 3, M], with Cauchy's weights."""
    k = len(points)
    rotation, translation = rotation.double(), translation.double()
    information = torch.zeros(k, 6, 6, dtype=torch.float64)
    identity = torch.eye(6, dtype=torch.float64)
    every = points, weight, rays
    for stride in strides:
        points, weight, rays = (x[..., ::stride] if x.shape[-1] > 16 * stride else x for x in every)
        seen = rotation.mT.float() @ (points - translation.float()[..., None])
        inverse_z = torch.where(seen[:, 2] > 1e-6, 1 / seen[:, 2], 0.0)
        image = seen[:, :2] * inverse_z[:, None]
        residual = focal[..., None] * (image - rays[:, :2])
        usable = (weight > 0) & (inverse_z > 0)
        squares = torch.where(usable, residual.square().sum(dim=1), 0.0)
        scatter = robust_scatter(squares, usable)
        robust = usable * weight / (1 + squares / (CUTOFF * scatter[:, None]) ** 2)
        # of a motion of the point; the camera's own is the other way
        jacobian = -projection_jacobian(image, inverse_z, focal).flatten(2)
        weighted = jacobian * robust.repeat(1, 2)[:, None]
        normal = (weighted @ jacobian.mT).double()
        gradient = (weighted @ residual.flatten(1)[..., None])[..., 0].double()
        size = normal.diagonal(dim1=1, dim2=2)
        damped = normal + torch.diag_embed(1e-9 * size + 1e-12) + 1e-12 * identity
        step = torch.linalg.solve(damped, -gradient)
        step = torch.where(step.isfinite().all(dim=1, keepdim=True) & (size > 0).all(dim=1, keepdim=True), step, 0.0)
        step = step * (0.5 / step[:, :3].norm(dim=1, keepdim=True)).clamp(max=1.0)  # half a radian at most
        translation = translation + (rotation @ step[:, 3:, None])[..., 0]
        rotation = rotation @ roma.rotvec_to_rotmat(step[:, :3])
        mean_weight = (weight.sum(dim=1) / usable.sum(dim=1).clamp(min=1)).clamp(min=1e-12)
        information = normal / (scatter**2 * mean_weight).double()[:, None, None]
    return rotation, translation, information


def robust_scatter(squares: Tensor, usable: Tensor) -> Tensor:
    """[k] standard deviation per axis of 2-vectors with these squared lengths [k, M], from their median."""
    thin = slice(None, None, max(1, squares.shape[1] // 2000))
    median = torch.where(usable, squares, torch.nan)[:, thin].nanmedian(dim=1).values
    return (median / 1.386).sqrt().nan_to_num(LEAST_SCATTER_PX).clamp(min=LEAST_SCATTER_PX)


def projection_jacobian(image: Tensor, inverse_z: Tensor, focal: Tensor) -> Tensor:
    """[k, 6, 2, M] change of the pixel with a small motion (rotation vector, translation) of the point.

    image: [k, 2, M] (x, y) / z of the point.  inverse_z: [k, M].  focal: [k, 2].
    """
    x, y = image.unbind(dim=1)
    jacobian = image.new_zeros(len(image), 6, 2, image.shape[2])
    of_x, of_y = jacobian.unbind(dim=2)
    of_x[:, 0], of_y[:, 1] = -x * y, x * y
    of_x[:, 1], of_y[:, 0] = 1 + x * x, -1 - y * y
    of_x[:, 2], of_y[:, 2] = -y, x
    of_x[:, 3], of_y[:, 4] = inverse_z, inverse_z
    of_x[:, 5], of_y[:, 5] = -x * inverse_z, -y * inverse_z
    return jacobian.mul_(focal[:, None, :, None])


def cross(vector: Tensor) -> Tensor:
    """[..., 3] -> [..., 3, 3] with ``cross(v) @ w = v x w``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    matrix: Tensor = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    return matrix
