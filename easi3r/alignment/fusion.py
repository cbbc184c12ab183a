"""One depth map per frame from all that the pairs say of it: pair scales by least squares, then a robust mean.

A look is what one pair says of one of its two frames: a depth map up to the pair's scale.  Depths are logarithms
throughout, so that a scale is a shift and an error of a per cent is as large near as far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from easi3r.alignment.relative import CUTOFF, RelativePoses, read_view, spread
from easi3r.structures import Array, PairPredictions

POINTS = (800, 2500)  # of a look, round after round
START_LOOKS = 7  # whose median a mean starts from: of more, it takes longer than all the rest
LEAST_SCATTER = 1e-5  # in log depth: what float32 resolves


@dataclass(frozen=True)
class FusedDepth:
    """What all pairs say together."""

    log_depth: Tensor  # [n, N] float32
    pixel_scatter: float  # standard deviation of a look's log depth, pixel by pixel, where it is not smooth
    smooth_scatter: float  # the same of its mean over a cell of the grid
    looks: Tensor  # [n] how many looks a frame has


class Looks:
    """The looks of each frame, computed when asked for; nothing of their size is kept."""

    def __init__(
        self,
        predictions: PairPredictions,
        rays: Tensor,
        relative: RelativePoses,
        sample: slice = slice(None),
    ) -> None:
        self.predictions, self.rays, self.relative, self.sample = predictions, rays, relative, sample
        self.pairs = torch.from_numpy(predictions.pairs)
        self.num_frames, self.size = len(rays), (predictions.points_first.shape[1], predictions.points_first.shape[2])

    def on(self, count: int) -> Looks:
        """The same looks at about so many pixels."""
        return Looks(self.predictions, self.rays, self.relative, spread(count, self.size))

    def pairs_of(self, frame: int) -> Tensor:
        """[k] the pairs that look at a frame: those that begin there, then those that end there."""
        return torch.cat([(self.pairs[:, view] == frame).nonzero()[:, 0] for view in (0, 1)])

    def of(self, frame: int) -> tuple[Tensor, Tensor]:
        """Log depth [k, M] and weight [k, M], 0 where there is none, in the order of ``pairs_of``.

        A point counts where its pixel's ray passes it nearest: depth = (X . r) / (r . r).
        """
        ray = self.rays[frame][:, self.sample]
        first, second = ((self.pairs[:, view] == frame).nonzero()[:, 0] for view in (0, 1))
        near, weight = read_view(self.predictions, "first", first, self.sample)
        far, far_weight = read_view(self.predictions, "second", second, self.sample)
        turned = self.relative.rotation[second].float() @ ray  # the ray in the first camera's frame
        from_camera = far - self.relative.translation[second].float()[..., None]
        along = torch.cat([(near * ray).sum(dim=1), (from_camera * turned).sum(dim=1)]) / ray.square().sum(dim=0)
        weight = torch.cat([weight, far_weight])
        usable = (along > 0) & (weight > 0)
        return torch.where(usable, along, 1.0).log(), torch.where(usable, weight, 0.0)


def fuse(looks: Looks) -> Tensor:
    """[P] log scales of the pairs, mean 0: alternate between them and the frames' depths, on more and more pixels."""
    n, pairs = looks.num_frames, looks.pairs
    scale = torch.zeros(len(pairs), dtype=torch.float64)
    shift = torch.zeros(len(pairs), 2, dtype=torch.float64)  # of each look against its frame
    for round_, count in enumerate(POINTS):
        some = looks.on(count)
        for frame in range(n):
            index = some.pairs_of(frame)
            log_depth, weight = some.of(frame)
            if round_ == 0:  # nothing is known of the scales: the strongest look stands for the frame
                strongest = int(weight.sum(dim=1).argmax())
                fused = torch.where(weight[strongest] > 0, log_depth[strongest], log_depth.median())
            else:
                fused = robust_mean(log_depth + scale[index, None].float(), weight)
            view = (torch.arange(len(index)) >= (pairs[:, 0] == frame).sum()).long()
            shift[index, view] = robust_rows(fused - log_depth, weight).double()
        scale = scales_of_pairs(shift, pairs, n)
    return scale


def fuse_all(looks: Looks, scale: Tensor, cells: Tensor) -> FusedDepth:
    """Every frame's depth, and how far the looks scatter about it.  cells: [G, N] 1 where a pixel lies in a cell."""
    fused, pixel, smooth, count = [], [], [], []
    for frame in range(looks.num_frames):
        index = looks.pairs_of(frame)
        log_depth, weight = looks.of(frame)
        log_depth += scale[index, None].float()
        fused.append(robust_mean(log_depth, weight))
        count.append(len(index))
        if len(index) > 1:
            deviation = torch.where(weight > 0, log_depth - fused[-1], 0.0)
            in_cell = (cells @ deviation.T) / (cells @ (weight > 0).float().T).clamp(min=1)  # [G, k]
            rough = (deviation - in_cell.T @ cells)[weight > 0]
            unbiased = (len(index) / (len(index) - 1)) ** 0.5
            smooth.append(unbiased * _scatter(in_cell.flatten().abs()))
            pixel.append(unbiased * _scatter(rough.abs()))
    return FusedDepth(
        log_depth=torch.stack(fused),
        pixel_scatter=float(np.median(pixel)) if pixel else LEAST_SCATTER,
        smooth_scatter=float(np.median(smooth)) if smooth else LEAST_SCATTER,
        looks=torch.tensor(count),
    )


def robust_mean(values: Tensor, weight: Tensor) -> Tensor:
    """[k, M] -> [M] mean over k, outliers turned down (Cauchy's weights, from the median of a few on)."""
    usable = weight > 0
    some = slice(None, None, math.ceil(len(values) / START_LOOKS))
    start = torch.where(usable[some], values[some], torch.nan).nanmedian(dim=0).values
    centre = torch.where(start.isnan(), (weight * values).sum(dim=0) / weight.sum(dim=0).clamp(min=1e-12), start)
    scatter = _scatter(torch.where(usable, (values - centre).abs(), torch.nan).flatten())
    for _ in range(2):
        robust = weight / (1 + ((values - centre) / (CUTOFF * scatter)).square())
        total = robust.sum(dim=0)
        centre = torch.where(total > 0, (robust * values).sum(dim=0) / total.clamp(min=1e-12), centre)
    return centre


def robust_rows(values: Tensor, weight: Tensor) -> Tensor:
    """[k, M] -> [k] robust mean along M; 0 where nothing has weight."""
    thin = slice(None, None, max(1, values.shape[1] // 2000))
    known = torch.where(weight > 0, values, torch.nan)[:, thin]
    centre = known.nanmedian(dim=1, keepdim=True).values.nan_to_num(0.0)
    scatter = (1.4826 * (known - centre).abs().nanmedian(dim=1, keepdim=True).values).nan_to_num(1.0)
    scatter = scatter.clamp(min=LEAST_SCATTER)
    for _ in range(2):
        robust = weight / (1 + ((values - centre) / (CUTOFF * scatter)).square())
        centre = (robust * values).sum(dim=1, keepdim=True) / robust.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return centre[:, 0]


def _scatter(deviation: Tensor) -> float:
    thin = deviation[:: max(1, len(deviation) // 10_000)]
    return max(float((1.4826 * thin.nanmedian()).nan_to_num(1.0)), LEAST_SCATTER)


def scales_of_pairs(shift: Tensor, pairs: Tensor, num_frames: int) -> Tensor:
    """[P] log scale of each pair, mean 0: ``scale[e] = shift[e, v] + level[frame]`` in the least absolute sense.

    shift: [P, 2] of each look against its frame's present depth.  With the two looks of a pair its scale cancels, which
    leaves one unknown level per frame: a Laplacian on the graph of pairs.
    """
    first, second = pairs.numpy().T
    difference = (shift[:, 0] - shift[:, 1]).numpy()  # level[second] - level[first]
    weight = np.ones(len(pairs))
    level: Array = np.zeros(num_frames)
    for _ in range(6):
        laplacian = 1e-9 * np.eye(num_frames)
        np.add.at(laplacian, (first, first), weight)
        np.add.at(laplacian, (second, second), weight)
        np.add.at(laplacian, (first, second), -weight)
        np.add.at(laplacian, (second, first), -weight)
        right = np.zeros(num_frames)
        np.add.at(right, second, weight * difference)
        np.add.at(right, first, -weight * difference)
        level = np.linalg.solve(laplacian, right)
        residual = np.abs(level[second] - level[first] - difference)
        scatter = max(1.4826 * float(np.median(residual)), LEAST_SCATTER)
        weight = 1 / (1 + (residual / (CUTOFF * scatter)) ** 2)
    both = 0.5 * (shift[:, 0].numpy() + level[first] + shift[:, 1].numpy() + level[second])
    return torch.from_numpy(both - both.mean())
