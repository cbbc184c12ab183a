"""From captured attention to the four maps of the method (Easi3R, arXiv 2503.24391, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easi3r.canvas import Box, extended
from easi3r.normalise import EPS, min_max, min_max_per_frame
from easi3r.structures import Array, AttentionMaps
from hooks import FrameStatistics

# Below this deviation over all pairs, relative to the spread of the mean over the tokens, nothing varies: the frames
# are the same frame.  Measured: 1e-7 for identical frames, 8e-3 for noise of one grey level, 0.14 for consecutive ones.
STILL = 1e-3


class AttentionStatistics:
    """Folds the captured maps of pairs into per-frame means and deviations while they stream by."""

    def __init__(self, num_frames: int, grid: tuple[int, int], boxes: Sequence[Box] | None = None) -> None:
        """boxes: where each frame lies on the grid, in tokens, if they are of unequal size."""
        self.grid = grid
        self.boxes = boxes or [Box(0, 0, *grid)] * num_frames
        self.source = FrameStatistics(num_frames)
        self.reference = FrameStatistics(num_frames)

    def update(self, pairs: Array, source: Tensor, reference: Tensor) -> None:
        """pairs: [B, 2] (first, second).  source: [B, N, C] maps of the second views.  reference: of the first.

        Of one batch, all first views have one size, and all second views.
        """
        first, second = pairs.T.tolist()
        for statistics, frames, maps in ((self.source, second, source), (self.reference, first, reference)):
            box = self.boxes[frames[0]]
            statistics.update(frames, extended(replace_sink(maps, box.size), box, self.grid))

    def reopened(self, pairs: Array, changed: Array) -> tuple[AttentionStatistics, Array]:
        """For a pass that differs from this one in the ``changed`` [P] bool of ``pairs`` [P, 2] alone.

        Returns statistics in which only the frames that these pairs touch start anew, and the pairs [P] bool that
        have to be seen again for them.
        """
        again = AttentionStatistics(len(self.source.counts), self.grid, self.boxes)
        first, second = torch.from_numpy(pairs).T
        anew = torch.zeros(2, len(self.source.counts), dtype=torch.bool)
        anew[0, second[torch.from_numpy(changed)]] = True
        anew[1, first[torch.from_numpy(changed)]] = True
        again.source, again.reference = self.source.reopened(anew[0]), self.reference.reopened(anew[1])
        return again, (anew[0, second] | anew[1, first]).numpy()

    def nothing_varies(self) -> bool:
        """True when all pairs show the same attention: identical frames, or a single one."""
        return all(
            float(statistics.pooled_std().mean())
            <= STILL * float(statistics.mean.std(dim=1, correction=0).mean() + EPS)
            for statistics in (self.source, self.reference)
        )

    def maps(self) -> AttentionMaps:
        """Normalise, average over channels, multiply.

        Where a frame was seen in fewer than two pairs no deviation exists: its std maps are zero, take no part in the
        normalisation, and its dynamic map is the product of the mean maps alone.  Where nothing varies over pairs
        (``nothing_varies``) the dynamic map is zero.
        """
        seen_twice = (self.source.counts >= 2) & (self.reference.counts >= 2)
        source_mean, reference_mean = (normalised_map(s.mean) for s in (self.source, self.reference))
        source_std, reference_std = torch.zeros_like(source_mean), torch.zeros_like(reference_mean)
        rows = seen_twice.to(source_std.device)
        if rows.any():
            source_std[rows] = normalised_map(self.source.std[rows])
            reference_std[rows] = normalised_map(self.reference.std[rows])
        product = (1 - source_mean) * reference_mean
        product[rows] *= source_std[rows] * (1 - reference_std[rows])
        dynamic = torch.zeros_like(product) if self.nothing_varies() else min_max_per_frame(product)
        shaped = [
            m.unflatten(1, self.grid).cpu().numpy()
            for m in (source_mean, source_std, reference_mean, reference_std, dynamic)
        ]
        return AttentionMaps(*shaped)


def replace_sink(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] -> the same with the first token's value replaced by the mean of its right and lower neighbour.

    An attention sink sits in the top-left token.  On a grid of one row or column the one neighbour that exists is
    taken; a single token stays as it is.
    """
    height, width = grid
    neighbours = [1] * (width > 1) + [width] * (height > 1)
    if not neighbours:
        return maps
    replaced = maps.clone()
    replaced[:, 0] = maps[:, neighbours].mean(dim=1)
    return replaced


def normalised_map(stack: Tensor) -> Tensor:
    """[n, N, C] -> [n, N] in [0, 1]: min-max over everything, mean over channels, min-max over everything."""
    return min_max(min_max(stack).mean(dim=-1))
