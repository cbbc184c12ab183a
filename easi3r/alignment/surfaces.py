"""What the optical flow of one frame says of its surface, of that of the other frames, and of their cameras."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easi3r.alignment.matches import Cameras, Matches, Seen, sample, see
from easi3r.alignment.normal import BLOCK, BORDER, CENTRE, FOCAL, GRID, KNOT, KNOTS, POSE, SCALE, SHARED_FOCAL
from easi3r.alignment.relative import projection_jacobian

# The unknowns as a pixel sees them: those of either camera with its depth there, and the principal point; then what
# moves the two depths, the knots of either frame.
FIRST, SECOND, MIDDLE, CORE = slice(0, 8), slice(8, 16), slice(16, 18), 18
DEPTH = 7  # the last of either camera's, after POSE and FOCAL
FIRST_DEPTH, SECOND_DEPTH = FIRST.start + DEPTH, SECOND.start + DEPTH
FIRST_KNOTS, SECOND_KNOTS = slice(CORE, CORE + KNOTS), slice(CORE + KNOTS, CORE + 2 * KNOTS)
SIZE = CORE + 2 * KNOTS


@dataclass(frozen=True)
class Surface:
    """M pixels of one frame in the k frames it is paired with, and all of them that stays while cameras move."""

    matches: Matches
    log_depth: Tensor  # [M] float32 of the pixels
    other: Tensor  # [k, M] float32 that the other frames have where the flow ends
    here: Tensor  # [M, G] float32 weights of the frame's knots at the pixels
    there: Tensor  # [k, M, G] float32 and of the others' where the flow ends

    @classmethod
    def of(cls, matches: Matches, log_depth: Tensor, size: tuple[int, int]) -> Surface:
        """log_depth: [n, H W] of all frames.  size: (H, W)."""
        return cls(
            matches,
            log_depth[matches.frame, matches.chosen],
            sample(log_depth[matches.second].unflatten(1, size), matches.target),
            knot_weights(matches.pixel, size),
            knot_weights(matches.target, size),
        )

    def seen(self, cameras: Cameras, correction: Tensor, shift: Tensor, ignore_px: float) -> Seen:
        """correction: [n, G] of the log depth at the knots.  shift: [n] of all of a frame's log depth."""
        frame, second = self.matches.frame, self.matches.second
        correction = correction.float()
        log_depth = self.log_depth + self.here @ correction[frame] + shift[frame]
        other = self.other + (self.there @ correction[second][..., None])[..., 0] + shift[second, None]
        return see(self.matches, cameras, log_depth, other, ignore_px)

    def normal(self, seen: Seen, weight: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Hessian [k, U, U] and gradient [k, U] of the first frame's unknowns, the second's, the border's.

        weight: [k, 3, M] of the squared residuals.  scaled: [n] how the world's scale moves each frame's log depth.
        The knots of a frame move a pixel's residuals through its depth alone, so their part needs no Jacobian.
        """
        core = jacobian(seen)
        weighted = core * weight[:, None]
        by_first = (weighted * core[:, None, FIRST_DEPTH]).sum(dim=2)  # [k, CORE, M]
        by_second = -weighted[:, :, 2]  # the depth of the second frame is in one residual alone
        hessian = core.new_zeros(len(core), SIZE, SIZE)
        hessian[:, :CORE, :CORE] = weighted.flatten(2) @ core.flatten(2).mT
        hessian[:, :CORE, FIRST_KNOTS] = by_first @ self.here
        hessian[:, :CORE, SECOND_KNOTS] = by_second @ self.there
        hessian[:, CORE:, :CORE] = hessian[:, :CORE, CORE:].mT
        hessian[:, FIRST_KNOTS, FIRST_KNOTS] = (by_first[:, FIRST_DEPTH, None] * self.here.T) @ self.here
        hessian[:, FIRST_KNOTS, SECOND_KNOTS] = (by_first[:, SECOND_DEPTH, None] * self.here.T) @ self.there
        hessian[:, SECOND_KNOTS, FIRST_KNOTS] = hessian[:, FIRST_KNOTS, SECOND_KNOTS].mT
        hessian[:, SECOND_KNOTS, SECOND_KNOTS] = (by_second[:, SECOND_DEPTH, None] * self.there.mT) @ self.there
        pull = (weighted * seen.residual[:, None]).sum(dim=2)  # [k, CORE, M]
        of_knots = pull[:, FIRST_DEPTH] @ self.here, (pull[:, SECOND_DEPTH, None] @ self.there)[:, 0]
        gradient = torch.cat([pull.sum(dim=2), *of_knots], dim=1)
        chain = self.chain(scaled)
        return chain.mT @ hessian @ chain, (gradient[:, None] @ chain)[:, 0]

    def chain(self, scaled: Tensor) -> Tensor:
        """[k, SIZE, 2 BLOCK + BORDER] how the unknowns of :class:`Normal` move those that a pixel sees."""
        second = self.matches.second
        chain = torch.zeros(len(second), SIZE, 2 * BLOCK + BORDER)
        border = 2 * BLOCK
        for camera, knots, block, scale in (
            (FIRST.start, FIRST_KNOTS, 0, scaled[self.matches.frame]),
            (SECOND.start, SECOND_KNOTS, BLOCK, scaled[second]),
        ):
            pose_and_focal = range(camera, camera + DEPTH)
            chain[:, pose_and_focal, range(block, block + DEPTH)] = 1
            chain[:, camera + FOCAL, border + SHARED_FOCAL] = 1
            chain[:, camera + DEPTH, border + SCALE] = scale
            chain[:, range(knots.start, knots.stop), range(block + KNOT.start, block + KNOT.stop)] = 1
        chain[:, range(MIDDLE.start, MIDDLE.stop), range(border + CENTRE.start, border + CENTRE.stop)] = 1
        return chain


def jacobian(seen: Seen) -> Tensor:
    """[k, CORE, 3, M] of the residuals."""
    k, _, count = seen.residual.shape
    core = seen.residual.new_zeros(k, CORE, 3, count)
    first, second, middle = core[:, FIRST], core[:, SECOND], core[:, MIDDLE]
    # a small turn and move of the point in the second camera's frame; of the camera itself, it is the other way
    of_point = seen.residual.new_zeros(k, 6, 3, count)
    of_point[:, :, :2] = projection_jacobian(seen.image, seen.inverse_z, seen.focal)
    of_point[:, 0, 2], of_point[:, 1, 2], of_point[:, 5, 2] = seen.image[:, 1], -seen.image[:, 0], seen.inverse_z
    torch.neg(of_point, out=second[:, POSE])
    carried = (seen.turn.mT @ of_point[:, 3:].flatten(2)).unflatten(2, (3, count))  # by a move in the first's frame
    x, y, z = seen.point
    first[:, :3] = torch.linalg.cross(seen.point[:, None].expand_as(carried), carried, dim=1)
    first[:, 3:6] = carried
    first[:, FOCAL] = -(carried[:, 0] * x + carried[:, 1] * y)  # a longer focal length brings the point to the axis
    first[:, DEPTH] = seen.slope
    second[:, FOCAL, :2] = seen.focal[..., None] * seen.image
    second[:, DEPTH, 2] = -1
    torch.mul(carried[:, :2], (-z / seen.focal_first[:, None])[:, None], out=middle)
    middle[:, 0, 0] += 1
    middle[:, 1, 1] += 1
    return core


def knot_weights(pixel: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 2] (x, y) -> [..., G]: bilinear weights of the knots, which span the image."""
    (height, width), (rows, columns) = size, GRID
    x = pixel[..., 0] * ((columns - 1) / max(width - 1, 1))
    y = pixel[..., 1] * ((rows - 1) / max(height - 1, 1))
    along_x = (1 - (x[..., None] - torch.arange(columns)).abs()).clamp(min=0)
    along_y = (1 - (y[..., None] - torch.arange(rows)).abs()).clamp(min=0)
    return (along_y[..., :, None] * along_x[..., None, :]).flatten(-2)
