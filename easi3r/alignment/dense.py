"""Every depth by itself, once the cameras stand: one unknown per pixel, one step in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from easi3r.alignment.bundle import Scatters
from easi3r.alignment.matches import Cameras, FlowField, sample, see
from easi3r.alignment.relative import CUTOFF


def refined(
    flow: FlowField,
    cameras: Cameras,
    log_depth: Tensor,
    precision: Tensor,
    scatters: Scatters,
    ignore_px: float,
) -> Tensor:
    """[n, N] log depth, from what the pairs say, where the flow sees each pixel, and the depth that is there.

    log_depth: [n, N] from the pairs.  precision: [n, N] 1 / variance of each pixel, by itself.
    One step of Gauss and Newton on the terms of :mod:`easi3r.alignment.bundle`, of all frames from the same maps.
    """
    better = torch.empty_like(log_depth)
    everywhere = torch.arange(log_depth.shape[1])
    scatter = torch.tensor([scatters.flow_px, scatters.flow_px, scatters.log_depth])[:, None]
    for frame in range(len(log_depth)):
        matches = flow.matches(frame, everywhere)
        other = sample(log_depth[matches.second].unflatten(1, flow.size), matches.target)
        seen = see(matches, cameras, log_depth[frame], other, ignore_px)
        standard = seen.residual / scatter
        squares = torch.stack([standard[:, :2].square().sum(dim=1), standard[:, 2].square()], dim=1)
        weight = seen.usable[:, None] / (1 + squares / CUTOFF**2).square()
        weight = weight[:, [0, 0, 1]] / scatter.square()
        gradient = (weight * seen.slope * seen.residual).sum(dim=(0, 1))
        curvature = precision[frame] + (weight * seen.slope.square()).sum(dim=(0, 1))
        better[frame] = log_depth[frame] - (gradient / curvature).clamp(-0.5, 0.5)
    return better
