"""The terms of the alignment's objective; all are means, so that none depends on the size of the image.

The two dense terms visit every pixel of every pair in every iteration.  They walk frame by frame, so that a block
stays in the cache, and find their gradients on the way forward, so that nothing per pair and pixel is kept.
(``tests/test_alignment_losses.py`` holds the same terms written plainly, with autograd.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from easi3r.alignment.initialise import centred_pixels
from easi3r.alignment.observations import Observations, rows_by_value
from easi3r.structures import Array, PairFlow

TINY = 1e-8


@dataclass(frozen=True)
class World:
    """The unknowns as the losses see them, differentiable.  N = H * W pixels."""

    rotation: Tensor  # [n, 3, 3] camera to world
    translation: Tensor  # [n, 3]
    focal_px: Tensor  # [n]
    depth: Tensor  # [n, N]
    pair_rotation: Tensor  # [P, 3, 3] first view's camera to world
    pair_translation: Tensor  # [P, 3]
    pair_scale: Tensor  # [P]
    size: tuple[int, int]

    def camera_points(self) -> Tensor:
        """[n, 3, N]: depths unprojected, in each camera's frame; the principal point is the image's centre."""
        rays = centred_pixels(self.size).to(self.depth) / self.focal_px[:, None, None]
        return torch.cat([rays * self.depth[:, None], self.depth[:, None]], dim=1)


def point_loss(world: World, camera_points: Tensor, observations: Observations) -> Tensor:
    """Weighted distance between a frame's world points and what each pair says of them, summed over both views.

    ``mean over pairs and pixels of log(conf) * |chi_v - (s_e R_e X_{v,e} + t_e)|`` (DUSt3R, equation 5).
    """
    points = torch.baddbmm(world.translation[..., None], world.rotation, camera_points)
    matrix = (world.pair_scale[:, None, None] * world.pair_rotation)[observations.pair]
    total: Tensor = _WeightedDistance.apply(points, matrix, world.pair_translation[observations.pair], observations)
    return 2 * total / observations.weight.numel()


class _WeightedDistance(torch.autograd.Function):
    """Sum of ``weight * |points[frame] - (matrix X + shift)|`` over observations and pixels."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, matrix: Tensor, shift: Tensor, observations: Observations) -> Tensor:
        weight = observations.weight
        grad_points, grad_matrix, grad_shift = (torch.zeros_like(x) for x in (points, matrix, shift))
        total = points.new_zeros(())
        for frame, rows in enumerate(observations.rows_of_frames()):
            said = observations.points[rows]
            residual = torch.baddbmm(points[frame].expand_as(said), matrix[rows], said, beta=-1)
            residual.add_(shift[rows, :, None])
            x, y, z = residual.unbind(dim=1)  # written out: torch's norm along a short axis is ten times slower
            distance = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()
            total += torch.dot(weight[rows].flatten(), distance.flatten())
            residual.mul_((weight[rows] / distance.clamp_(min=TINY))[:, None])  # the gradient for what the pair says
            grad_matrix[rows] = residual @ said.transpose(1, 2)
            grad_shift[rows] = residual.sum(dim=2)
            grad_points[frame] = -residual.sum(dim=0)
        ctx.save_for_backward(grad_points, grad_matrix, grad_shift)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * saved for saved in ctx.saved_tensors), None)


@dataclass(frozen=True)
class FlowTargets:
    """Optical flow of the pairs at pixels that are static and seen in both frames, sorted by first frame."""

    first: Tensor  # [P] int64 ascending
    second: Tensor  # [P]
    target: Tensor  # [P, 2, N] where the pixel is in the second frame, relative to that image's centre
    usable: Tensor  # [P, N] bool
    rows: list[slice]  # [n] the pairs of each first frame


def flow_targets(flow: PairFlow, dynamic_mask: Array) -> FlowTargets:
    """dynamic_mask: [n, H, W] bool, True = moves; pairs of a frame with itself are left out."""
    height, width = dynamic_mask.shape[1:]
    pairs = torch.from_numpy(flow.pairs)
    order = torch.argsort(pairs[:, 0], stable=True)
    order = order[pairs[order, 0] != pairs[order, 1]]
    first, second = pairs[order].T.contiguous()
    static = torch.from_numpy(~dynamic_mask).flatten(1)
    usable = torch.from_numpy(flow.valid).flatten(1)[order] & static[first]
    moved = torch.from_numpy(flow.flow).flatten(1, 2)[order].transpose(1, 2) + centred_pixels((height, width))
    return FlowTargets(first, second, moved, usable, rows_by_value(first, len(dynamic_mask)))


def flow_loss(world: World, camera_points: Tensor, targets: FlowTargets, *, ignore_px: float, drop_px: float) -> Tensor:
    """Smooth-L1 between the flow that depths and cameras induce and the estimated one, in pixels.

    Residuals above ``ignore_px`` are left out; zero if the mean exceeds ``drop_px`` or nothing is left (MonST3R,
    equation 5, and its published robustness).
    """
    second_from_world = world.rotation[targets.second].transpose(1, 2)
    rotation = second_from_world @ world.rotation[targets.first]
    apart = world.translation[targets.first] - world.translation[targets.second]
    translation = (second_from_world @ apart[..., None])[..., 0]
    focal = world.focal_px[targets.second]
    total, count = _FlowResidual.apply(camera_points, rotation, translation, focal, targets, ignore_px)
    mean = total / count.clamp(min=1)
    return torch.where(mean < drop_px, mean, 0.0)


class _FlowResidual(torch.autograd.Function):
    """Sum of smooth-L1 residuals of reprojection, and how many pixels took part.

    A point y = R x + t of the second camera's frame is seen at ``focal * (y1, y2) / y3``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        rotation: Tensor,
        translation: Tensor,
        focal: Tensor,
        targets: FlowTargets,
        ignore_px: float,
    ) -> tuple[Tensor, Tensor]:
        gradients = tuple(torch.zeros_like(x) for x in (points, rotation, translation, focal))
        grad_points, grad_rotation, grad_translation, grad_focal = gradients
        total, count = points.new_zeros(()), points.new_zeros(())
        for frame, rows in enumerate(targets.rows):
            y = torch.bmm(rotation[rows], points[frame].expand(rows.stop - rows.start, -1, -1))
            y.add_(translation[rows, :, None])
            in_front = y[:, 2] > 1e-3 * points[frame, 2]
            inverse_z = torch.where(in_front, y[:, 2], 1.0).reciprocal_()
            ray = y[:, :2].mul_(inverse_z[:, None])
            error = (focal[rows, None, None] * ray).sub_(targets.target[rows])
            clipped = error.clamp(-1, 1)
            loss = error.sub_(0.5 * clipped).mul_(clipped).sum(dim=1)  # smooth-L1: e^2 / 2 within 1, then |e| - 1/2
            taken = targets.usable[rows] & in_front & (loss < ignore_px)
            total += torch.where(taken, loss, 0.0).sum()
            count += taken.sum()
            pull = clipped.mul_(taken[:, None])  # the gradient for the image point
            grad_focal[rows] = (pull * ray).sum(dim=(1, 2))
            scaled = pull.mul_(focal[rows, None, None] * inverse_z[:, None])
            grad_y = torch.cat([scaled, -(scaled * ray).sum(dim=1, keepdim=True)], dim=1)
            grad_rotation[rows] = grad_y @ points[frame].T
            grad_translation[rows] = grad_y.sum(dim=2)
            grad_points[frame] = torch.einsum("kij,kin->jn", rotation[rows], grad_y)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * saved for saved in ctx.saved_tensors), None, None)


def smoothness_loss(world: World) -> Tensor:
    """Mean change of pose between consecutive frames: rotation (Frobenius norm from the identity) plus translation."""
    rotation = world.rotation[:-1].transpose(1, 2) @ world.rotation[1:]
    identity = torch.eye(3).to(rotation)
    step = world.rotation[:-1].transpose(1, 2) @ (world.translation[1:] - world.translation[:-1])[..., None]
    loss: Tensor = ((rotation - identity).flatten(1).norm(dim=1) + step[..., 0].norm(dim=1)).mean()
    return loss
