"""Pixels of one frame, where optical flow sees them in other frames, and where depth and cameras say they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from easi3r.structures import Array, PairFlow


@dataclass(frozen=True)
class Cameras:
    """Of all frames."""

    rotation: Tensor  # [n, 3, 3] float64 camera to world
    translation: Tensor  # [n, 3] float64
    focal: Tensor  # [n, 2] float64 pixels, along x and y
    centre: Tensor  # [n, 2] float64 pixels, the principal point


@dataclass(frozen=True)
class Matches:
    """M pixels of one frame in the k frames it is paired with."""

    frame: int
    second: Tensor  # [k] the other frames
    chosen: Tensor  # [M] which pixels, row-major
    pixel: Tensor  # [M, 2] float32 (x, y)
    target: Tensor  # [k, M, 2] float32 where they are in the other frames
    usable: Tensor  # [k, M] bool: flow is valid there, and nothing moves at either end


@dataclass(frozen=True)
class Seen:
    """The matches of a frame as depth and cameras have them."""

    residual: Tensor  # [k, 3, M] pixels along x and y, log depth
    usable: Tensor  # [k, M] bool
    slope: Tensor  # [k, 3, M] how the residuals grow with the log depth of the first frame
    focal_first: Tensor  # [2] float32 of the first frame
    focal: Tensor  # [k, 2] float32 of the others
    point: Tensor  # [3, M] in the first camera's frame
    turn: Tensor  # [k, 3, 3] first camera's frame to the second's
    image: Tensor  # [k, 2, M] (x, y) / z in the second camera's frame
    inverse_z: Tensor  # [k, M] there


class FlowField:
    """Optical flow of all pairs with what is still, asked for frame by frame."""

    def __init__(self, flow: PairFlow, dynamic_mask: Array) -> None:
        """dynamic_mask: [n, H, W] bool, True = moves."""
        self.flow, self.size = flow, dynamic_mask.shape[1:]
        self.static = torch.from_numpy(~dynamic_mask).flatten(1)
        apart = flow.pairs[:, 0] != flow.pairs[:, 1]
        self.rows = [np.flatnonzero(apart & (flow.pairs[:, 0] == i)) for i in range(len(dynamic_mask))]

    def matches(self, frame: int, chosen: Tensor) -> Matches:
        """chosen: [M] pixels of ``frame``, row-major."""
        rows = self.rows[frame]
        second = torch.from_numpy(self.flow.pairs[rows, 1])
        width = self.size[1]
        pixel = torch.stack([chosen % width, chosen // width], dim=1).float()
        moved = torch.from_numpy(self.flow.flow[rows].reshape(len(rows), -1, 2))[:, chosen]
        valid = torch.from_numpy(self.flow.valid[rows].reshape(len(rows), -1))[:, chosen]
        target = pixel + moved
        still = sample(self.static.float()[second].unflatten(1, self.size), target) > 0.5
        return Matches(frame, second, chosen, pixel, target, valid & still & self.static[frame, chosen])


def sample(maps: Tensor, at: Tensor) -> Tensor:
    """Maps [k, H, W] at pixels [k, M, 2] -> [k, M], bilinear, the border's values beyond it."""
    height, width = maps.shape[1:]
    scaled = 2 * at / at.new_tensor([max(width - 1, 1), max(height - 1, 1)]) - 1
    return grid_sample(maps[:, None], scaled[:, None], align_corners=True, padding_mode="border")[:, 0, 0]


def see(matches: Matches, cameras: Cameras, log_depth: Tensor, other: Tensor, ignore_px: float) -> Seen:
    """What is left between the matches and the world.

    log_depth: [M] of the pixels.  other: [k, M] log depth that the other frames have where the flow ends.
    ignore_px: flow residuals above are not usable (the published robustness).
    """
    frame, second = matches.frame, matches.second
    focal, centre = cameras.focal.float(), cameras.centre.float()
    ray = torch.cat([((matches.pixel - centre[frame]) / focal[frame]).T, torch.ones(1, len(log_depth))])
    point = ray * log_depth.exp()
    to_second = cameras.rotation[second].mT
    turn = (to_second @ cameras.rotation[frame]).float()
    shift = to_second @ (cameras.translation[frame] - cameras.translation[second])[..., None]
    turned = turn @ point
    seen = turned + shift.float()
    in_front = seen[:, 2] > 1e-3 * point[2]
    inverse_z = torch.where(in_front, seen[:, 2], 1.0).reciprocal()
    image = seen[:, :2] * inverse_z[:, None]
    flow = focal[second][..., None] * image + (centre[second][:, None] - matches.target).mT
    depth = -inverse_z.log() - other
    usable = matches.usable & in_front & (flow.square().sum(dim=1) < ignore_px**2)
    grows = turned * inverse_z[:, None]  # the point with its own log depth, in units of its depth in the second frame
    slope = torch.cat([focal[second][..., None] * (grows[:, :2] - image * grows[:, 2:]), grows[:, 2:]], dim=1)
    residual = torch.cat([flow, depth[:, None]], dim=1)
    return Seen(residual, usable, slope, focal[frame], focal[second], point, turn, image, inverse_z)
